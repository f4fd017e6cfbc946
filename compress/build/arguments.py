"""Converts arguments of ``compress.api`` to the settings of commands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.build.decide import BuildSettings, plan_of
from compress.console import parse_bytes
from compress.errors import UsageError, check_utf8

if TYPE_CHECKING:
    from compress.recipe import Recipe

__all__ = [
    "PathLike",
    "adapter_texts",
    "build_settings",
    "limits",
    "path",
    "paths",
    "settings_of",
    "size",
]

PathLike = str | Path
PATHS = {
    "output", "imatrix", "save_imatrix", "save_checkpoint", "plan", "eval_text", "against",
    "keep_baseline",
}  # fmt: skip


def build_settings(model: PathLike, recipe: str | Path | Recipe, **given: Any) -> BuildSettings:
    """``BuildSettings`` from arguments of the same names; None means the default."""
    hub = {key: given.pop(key) for key in ("revision", "token", "cache_dir", "fetch")}
    given = {key: value for key, value in given.items() if value is not None}
    for value in (model, *given.values()):
        if isinstance(value, str | Path):
            check_utf8(str(value))
    for key in given.keys() & PATHS:
        given[key] = Path(given[key])
    for key in given.keys() & {"budget", "budget_memory"}:
        given[key] = str(given[key])
    given |= {
        "overrides": settings_of(given.get("overrides")),
        "adapters": adapter_texts(given.get("adapters", ())),
        "gates": limits(given.get("gates")),
        "calibration": paths(given.get("calibration", ())),
        "max_memory": size("max_memory", given.get("max_memory")),
    }
    if given.get("locked") and "plan" not in given:
        given["plan"] = plan_of(given.get("output"))
    if isinstance(recipe, str | Path):
        given["recipe"] = str(recipe)
    else:
        given |= {"recipe": "recipe.yaml", "made": recipe}  # which the build writes
    return BuildSettings(model=str(model), hub=hub, **given)


def settings_of(overrides: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Overrides as ``KEY=VALUE`` texts with YAML values, as ``--set`` takes them."""
    import yaml

    found = []
    for key, value in (overrides or {}).items():
        plain = isinstance(value, str) and yaml.safe_load(value) == value
        found.append(f"{key}={value if plain else json.dumps(value)}")
    return tuple(found)


def adapter_texts(
    adapters: PathLike | Sequence[PathLike] | Mapping[PathLike, float],
) -> tuple[str, ...]:
    """Adapters as ``PATH=WEIGHT`` texts, as ``--adapter`` takes them."""
    if isinstance(adapters, str | Path):
        return (str(adapters),)
    if isinstance(adapters, Mapping):
        return tuple(f"{path}={weight!r}" for path, weight in adapters.items())
    return tuple(map(str, adapters))


def limits(gates: Mapping[str, str] | None) -> tuple[str, ...]:
    """Gates as ``NAME=LIMIT`` texts, as ``--gate`` takes them."""
    return tuple(f"{name}={limit}" for name, limit in (gates or {}).items())


def size(name: str, given: str | int | None) -> int | None:
    """Bytes from a number or a size such as ``2GiB``.

    Raises:
        UsageError: not a size.
    """
    try:
        return None if given is None else parse_bytes(str(given))
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error


def path(given: PathLike | None) -> Path | None:
    """An optional path as a ``Path``."""
    return None if given is None else Path(given)


def paths(given: Sequence[PathLike]) -> tuple[Path, ...]:
    """Paths as a tuple of ``Path``."""
    return tuple(map(Path, given))
