"""The settings of a command: the recipe's overrides, and the command line that repeats it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.checkpoint.checkpoint import Checkpoint
from compress.errors import UsageError
from compress.pruning.options import prune_option
from compress.recipe import Recipe, load
from compress.report.ci import CiFiles
from compress.verify.gates import parse_option

__all__ = [
    "BuildSettings",
    "VerifySettings",
    "check_options",
    "command_line",
    "plan_file",
    "recipe_overrides",
    "resolved_recipe",
]


@dataclass(frozen=True)
class BuildSettings:
    """What ``packlight build`` was asked for; the options of the same names.

    ``source`` overrides the model's name (the bundled demo); ``hub`` has ``revision``, ``token``
    and ``cache_dir``. ``made``: a recipe that a program made, instead of ``recipe``, which is then
    the name of the file that the build writes it to.
    """

    model: str
    output: Path | None = None
    recipe: str = "phone-4bit"
    overrides: Sequence[str] = ()
    formats: Sequence[str] = ()
    eval_text: Path | None = None
    gates: Sequence[str] = ()
    against: Path | None = None
    max_regression: Sequence[str] = ()
    calibration: Sequence[Path] = ()
    seed: int | None = None
    imatrix: Path | None = None
    save_imatrix: Path | None = None
    budget: str = ""
    budget_memory: str = ""
    device: str = ""
    plan: Path | None = None
    locked: bool = False
    provenance: bool = False
    prune: str = ""
    save_checkpoint: Path | None = None
    allow_dense: bool = False
    context: int | None = None
    threads: int = 0
    max_memory: int | None = None
    dry_run: bool = False
    overwrite: bool = False
    resume: bool = False
    verify: bool = True
    keep_baseline: Path | None = None
    ci_files: CiFiles | None = None
    source: str = ""
    made: Recipe | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VerifySettings:
    """What ``packlight verify`` was asked for; the options of the same names."""

    artifact: Path
    baseline: str
    eval_text: Path | None = None
    tasks: Sequence[Path] = ()
    gates: Sequence[str] = ()
    against: Path | None = None
    max_regression: Sequence[str] = ()
    windows: int = 0
    sequence_length: int = 512
    threads: int = 0
    max_memory: int | None = None
    ci_files: CiFiles | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)


def check_options(settings: BuildSettings) -> None:
    """Refuse options that do not fit together.

    Raises:
        UsageError: two ways to choose grids.
    """
    budget = bool(settings.budget or settings.budget_memory or settings.device)
    if budget and settings.plan is not None:
        raise UsageError("a budget and --plan exclude each other")


def plan_file(plan: Path | None, output: Path | None, *, locked: bool) -> Path | None:
    """``--plan``; for ``--locked`` without it, the output's own ``plan.json``.

    Raises:
        UsageError: there is none to lock to.
    """
    if plan is not None or not locked:
        return plan
    plan = output / "plan.json" if output else None
    if plan is None or not plan.is_file():
        missing = f": {plan} is not there" if plan else ""
        raise UsageError(
            f"--locked needs a plan{missing}", hint="--plan plan.json of an earlier build"
        )
    return plan


def resolved_recipe(settings: BuildSettings) -> Recipe:
    """The recipe with the overrides and formats that were asked for.

    Raises:
        RecipeError: see ``compress.recipe.load``.
    """
    source = settings.made or settings.recipe
    return load(source, recipe_overrides(settings), settings.formats)


def recipe_overrides(settings: BuildSettings) -> list[str]:
    """``--set``, and the options that stand for keys of the recipe."""
    overrides = list(settings.overrides)
    if settings.prune:  # first, so that --set prune.heal adds to it
        overrides.insert(0, f"prune={json.dumps(prune_option(settings.prune))}")
    if settings.calibration:
        overrides.append(f"calibration.texts={json.dumps(list(map(str, settings.calibration)))}")
    if settings.seed is not None:
        overrides.append(f"calibration.seed={settings.seed}")
    for key, option in (("weights", "budget"), ("memory", "budget_memory"), ("device", "device")):
        if value := getattr(settings, option):
            overrides.append(f"budget.{key}={value}")
    if settings.allow_dense:
        overrides.append("allow_dense=true")
    for name, limit in map(parse_option, settings.gates):
        overrides.append(f"verify.gates.{name}={json.dumps(limit)}")
    return overrides


def without_folders(text: str) -> str:
    """An override without the folders of absolute paths in it, which are this machine's."""
    return re.sub(r"(?<![^\s=,\[\"'])/(?:[^/\s,\]\"']+/)+", "", text)


def command_line(checkpoint: Checkpoint, settings: BuildSettings, output: Path) -> str:
    """The command that makes this again, for the report: names instead of local paths."""
    if settings.source == "packlight-demo":
        return "packlight demo"
    words = ["packlight", "build", checkpoint.source, "-r", Path(settings.recipe).name]
    if revision := settings.hub.get("revision"):
        words += ["--revision", revision]
    for name in settings.formats:
        words += ["-f", name]
    for override in settings.overrides:
        words += ["--set", without_folders(override)]
    if settings.eval_text:
        words += ["--eval-text", settings.eval_text.name]
    for gate in settings.gates:
        words += ["--gate", gate]
    for path in settings.calibration:
        words += ["--calibration", path.name]
    for option in ("budget", "budget_memory", "device"):
        if value := getattr(settings, option):
            words += [f"--{option.replace('_', '-')}", value]
    if settings.plan:
        words += ["--plan", settings.plan.name]
    if settings.locked:
        words.append("--locked")
    if settings.imatrix:
        words += ["--imatrix", settings.imatrix.name]
    if settings.seed is not None:
        words += ["--seed", str(settings.seed)]
    if settings.prune:
        words += ["--prune", settings.prune]
    if settings.allow_dense:
        words.append("--allow-dense")
    if settings.context:
        words += ["--context", str(settings.context)]
    return shlex.join([*words, "-o", output.name])
