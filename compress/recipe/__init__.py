"""Recipes: YAML in, a validated ``Recipe`` out.

The recipe's types are in ``compress.recipe.model``, which loads pydantic and is imported on first
use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import recipes
from compress.errors import RecipeError, UsageError, did_you_mean, one_line
from compress.files import read_bounded
from compress.formats import FORMATS

if TYPE_CHECKING:
    from compress.recipe.model import Recipe as Recipe

__all__ = [
    "AMOUNTS", "MASK_NEEDS", "Recipe", "apply_override", "describe_all", "load",
    "method_of", "needs_of", "parse", "put", "read",
]  # fmt: skip

# Input statistics that each way to choose zeros needs, and the default way.
MASK_NEEDS: dict[str, str] = {"wanda": "importance", "sparsegpt": "hessian"}
MASK = "sparsegpt"

# Keys that say how much is pruned, by method: exactly one of them is set.
AMOUNTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "depth": ("ratio", "blocks"),
    "ffn": ("ratio", "width"),
    "heads": ("ratio", "kv_heads"),
}


def __getattr__(name: str) -> Any:
    if name != "Recipe":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from compress.recipe.model import Recipe

    return Recipe


def method_of(settings: Mapping[str, Any]) -> str | None:
    """The way a target's zeros are chosen, from its settings; None where it has none."""
    if settings.get("sparsity", "none") in ("none", None):
        return None
    return str(settings.get("sparsity_method", MASK))


@dataclass(frozen=True)
class SolverRow:
    """One solver (``quantize.solver``).

    Attributes:
        solve: ``solve(weight, grid, stats) -> Quantized``, see ``compress.solvers``; or its
            location, ``module:function``: modules are loaded at first use.
        needs: input statistics that it uses: ``importance``, ``hessian``, or None, which means no
            calibration.
    """

    solve: Callable[..., Any] | str
    needs: str | None = None


SOLVERS: dict[str, SolverRow] = {
    "rtn": SolverRow("compress.solvers:rtn"),
    "scale_search": SolverRow("compress.solvers:scale_search", "importance"),
    "gptq": SolverRow("compress.solvers.gptq:gptq", "hessian"),
}
BUILTIN_SOLVERS = tuple(SOLVERS)
SOLVER_NEEDS = (None, "importance", "hessian")
SOLVER_ENTRY_POINTS = "packlight.solvers"  # group in which other packages name solvers


def solver_names() -> list[str]:
    """Names of all solvers: those of the table, then those of installed packages."""
    from importlib.metadata import entry_points

    found = entry_points(group=SOLVER_ENTRY_POINTS)
    return list(dict.fromkeys([*SOLVERS, *(point.name for point in found)]))


def solver_row(name: str) -> SolverRow:
    """The solver of that name.

    A solver of another package is loaded here. Its function's attribute ``needs`` says what it
    needs; without the attribute it needs nothing.

    Raises:
        UsageError: no such solver, or one that cannot be loaded.
    """
    if name in SOLVERS:
        return SOLVERS[name]
    from importlib.metadata import entry_points

    for point in entry_points(group=SOLVER_ENTRY_POINTS, name=name):
        try:
            solve = point.load()
        except Exception as error:  # importing another package may raise anything
            raise UsageError(
                f"solver {name!r} cannot be loaded: {one_line(error)}", hint=f"it is {point.value}"
            ) from error
        SOLVERS[name] = checked_row(name, SolverRow(solve, getattr(solve, "needs", None)))
        return SOLVERS[name]
    raise UsageError(f"unknown solver {name!r}", hint=did_you_mean(name, solver_names()))


def checked_row(name: str, row: SolverRow) -> SolverRow:
    """Check a solver's row, and return it.

    Raises:
        UsageError: its solver is no function, or it needs unknown statistics.
    """
    if not callable(row.solve):
        raise UsageError(f"solver {name!r} is no function", hint="solve(weight, grid, stats)")
    if row.needs not in SOLVER_NEEDS:
        raise UsageError(
            f"solver {name!r} needs {row.needs!r}, which calibration does not have",
            hint="None, importance or hessian",
        )
    return row


def needs_of(solver: str) -> str | None:
    """Input statistics that a solver uses; None: no calibration.

    Raises:
        UsageError: as ``solver_row``.
    """
    return (SOLVERS.get(solver) or solver_row(solver)).needs


def load(
    source: str | Path | Recipe, overrides: Iterable[str] = (), formats: Iterable[str] = ()
) -> Recipe:
    """A recipe by shipped name or file path, with ``--set`` overrides and chosen formats.

    Args:
        source: ``phone-4bit``, ``./mine.yaml``, or a recipe.
        overrides: ``targets.gguf.type=Q5_K_M`` …; values are YAML.
        formats: use only these targets; one that the recipe lacks is added with its defaults.
            Without them a shipped recipe has no target whose runtime is an extra.

    Raises:
        RecipeError: not found, not YAML, or not valid; the message names the key's path.
    """
    from compress.recipe.model import Recipe

    shipped = str(source) in recipes.names()
    if isinstance(source, Recipe):
        document, source = source.model_dump(by_alias=True, exclude_none=True), source.name
    else:
        source = str(source)
        document = parse(read(source), source)
    targets = document.setdefault("targets", {}) if isinstance(document, dict) else {}
    chosen = list(formats)
    if isinstance(targets, dict) and (chosen or shipped):
        own = [name for name in targets if name not in FORMATS or not FORMATS[name].extra]
        document["targets"] = {name: targets.get(name) or {} for name in chosen or own}
    for override in overrides:
        apply_override(document, override)
        if chosen and (left_out := set(document.get("targets") or ()) - set(chosen)):
            name = min(map(str, left_out))
            raise RecipeError(
                f"--set {override}: -f {' -f '.join(chosen)} leaves {name} out",
                hint=f"add -f {name}, or leave the override out",
            )
    return Recipe.from_dict(document, source)


def read(source: str) -> str:
    """The YAML text of a shipped recipe or a file."""
    if source in recipes.names():
        return recipes.read(source)
    path = Path(source)
    if not path.is_file():
        raise RecipeError(
            f"no recipe named {source!r}, and no such file",
            hint=did_you_mean(source, recipes.names(), "shipped"),
        )
    try:
        return read_bounded(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(f"{source} cannot be read: {why}") from error


def parse(
    text: str, source: str, what: str = "a recipe", hint: str = "see `packlight recipes show`"
) -> dict[str, Any]:
    """Parse a YAML text as a mapping.

    Args:
        text: of the document.
        source, what, hint: name, kind and hint for errors.

    Raises:
        RecipeError: not YAML, or not a mapping.
    """
    try:
        document = load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a 13th month; 10,000 brackets
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise RecipeError(f"{source}:{where} {problem}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{source}: {what} is a mapping", hint=hint)
    return document


LONGEST = 1_000_000  # characters of YAML


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few hundred bytes of them can expand to gigabytes."""

    def fetch_alias(self) -> None:
        mark = self.get_mark()
        raise yaml.MarkedYAMLError(problem="aliases (*) are not allowed", problem_mark=mark)


def load_yaml(text: str) -> Any:
    """The value of a YAML text of at most ``LONGEST`` characters, without aliases.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: the text is not valid.
    """
    if len(text) > LONGEST:
        raise yaml.MarkedYAMLError(problem=f"more than {LONGEST:,} characters")
    return yaml.load(text, PlainLoader)  # a SafeLoader


def apply_override(document: dict[str, Any], override: str) -> None:
    """``--set a.b=value``: set ``value`` (YAML) at the path; missing mappings are created.

    A limit needs no YAML quotes (``verify.gates.top1_agreement=>=0.9``).
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override}: write KEY=VALUE", hint="--set quantize.solver=gptq")
    try:
        put(document, keys, text if text.startswith((">=", "<=")) else load_yaml(text))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"--set {override}: {text!r} is not a YAML value") from error


def put(document: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a value at a path; missing mappings are created."""
    node = document
    for key in keys[:-1]:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    node[keys[-1]] = value


def describe_all() -> list[tuple[str, str]]:
    """Name and one-line description of each shipped recipe."""
    return [
        (name, parse(recipes.read(name), name).get("description", "")) for name in recipes.names()
    ]
