"""The jobs file: YAML against ``schema.json``, and the matrix models × recipes × formats.

A job is one model with one recipe, all formats in one ``build``, which reads every shard once for
all of them; ``split: true`` makes a job of each format. Jobs are named ``MODEL/RECIPE`` (and
``/FORMAT``), and so are their folders in the output tree.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

import recipes
from compress.build.settings import BuildSettings
from compress.checkpoint.remote import find, is_url
from compress.console import parse_bytes
from compress.errors import RecipeError, UsageError, did_you_mean
from compress.recipe import explain, parse

__all__ = ["BatchFile", "BatchJob", "read_jobs", "select"]

# Options whose values are files, and so relative to the jobs file.
PATHS = ("eval-text", "imatrix", "plan")
# Those that stand in the command line as they are.
WORDS = ("budget", "budget-memory", "device", "prune", "context", "seed", "threads")
GLOB = "*?["


@dataclass(frozen=True)
class BatchJob:
    """One job: a model, a recipe, formats and options.

    Attributes:
        name: ``MODEL/RECIPE``; its folder in the output tree.
        model: folder or Hub id, as ``packlight build`` takes it.
        model_name: the first part of the name; jobs of one model share work.
        recipe: shipped name or path.
        formats: of this job; empty for those of the recipe.
        options: of ``packlight build``, by the schema's names; paths made absolute.
        revision: of a Hub model; empty for its main branch.
    """

    name: str
    model: str
    model_name: str
    recipe: str
    formats: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    revision: str = ""

    def settings(self, output: Path) -> BuildSettings:
        """What ``build`` is asked for."""
        options = self.options
        words: dict[str, Any] = {
            key.replace("-", "_"): Path(options[key]) if key in PATHS else options[key]
            for key in (*PATHS, *WORDS)
            if key in options
        }
        return BuildSettings(
            model=self.model,
            output=output,
            recipe=self.recipe,
            overrides=overrides(options),
            formats=self.formats,
            calibration=tuple(map(Path, options.get("calibration", ()))),
            allow_dense=options.get("allow-dense", False),
            verify=options.get("verify", True),
            hub={"revision": self.revision or None},
            **words,
        )

    @property
    def memory(self) -> int | None:
        """What the file says that it takes, in bytes."""
        return parse_bytes(self.options["memory"]) if "memory" in self.options else None


def overrides(options: Mapping[str, Any]) -> tuple[str, ...]:
    """``set`` as ``--set`` takes it; values are JSON, which is YAML."""
    return tuple(f"{key}={json.dumps(value)}" for key, value in options.get("set", {}).items())


def arguments(settings: BuildSettings) -> list[str]:
    """The command line of ``packlight`` that is these settings, with local paths."""
    words = ["build", settings.model, "-r", settings.recipe, "-o", str(settings.output)]
    for name in settings.formats:
        words += ["-f", name]
    for override in settings.overrides:
        words += ["--set", override]
    for text in settings.calibration:
        words += ["--calibration", str(text)]
    for key in (*PATHS, *WORDS):
        value = getattr(settings, key.replace("-", "_"))
        if value not in (None, "", 0) or (key == "seed" and value == 0):
            words += [f"--{key}", str(value)]
    if settings.allow_dense:
        words.append("--allow-dense")
    if not settings.verify:
        words.append("--no-verify")
    if revision := settings.hub.get("revision"):
        words += ["--revision", revision]
    return words


@dataclass(frozen=True)
class BatchFile:
    """What a jobs file says: its jobs, in order, and where their folders go."""

    path: Path
    output: str
    jobs: tuple[BatchJob, ...]


def read_jobs(path: Path) -> BatchFile:
    """Read and expand a jobs file; models are not opened.

    Raises:
        UsageError: it cannot be read, a pattern finds nothing, two models or two jobs have one
            name, or overrides leave no job.
        RecipeError: it is not valid; the message names the key's path.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"{path} cannot be read: {why}", hint="docs/batch.md shows one") from error
    document = parse(text, str(path), "a jobs file", "docs/batch.md shows one")
    check(document, str(path))
    home = path.resolve().parent
    jobs = list(expand(document, home))
    if not jobs:
        raise UsageError(f"{path}: overrides skip every job")
    output = document.get("output", path.stem)
    output = output if is_url(output) else str(home / output)
    twice = [name for name, count in Counter(job.name for job in jobs).items() if count > 1]
    if twice:
        raise UsageError(
            f"{path}: two jobs would go to {twice[0]}/",
            hint="each model once with each recipe, and recipes with names of their own",
        )
    return BatchFile(path, output, tuple(jobs))


def check(document: Mapping[str, Any], source: str) -> None:
    """Hold a document against the schema.

    Raises:
        RecipeError: the first problem, with its path.
    """
    from jsonschema import Draft202012Validator

    schema = json.loads((files(__package__) / "schema.json").read_text(encoding="utf-8"))
    problems = list(Draft202012Validator(schema).iter_errors(document))
    if problems:
        raise explain(min(problems, key=lambda error: list(map(str, error.absolute_path))), source)
    for options in every_options(document):
        if "memory" in options:
            try:
                parse_bytes(options["memory"])
            except ValueError as error:
                raise RecipeError(f"{source}: options.memory: {error}") from error


def every_options(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All mappings of options in a file."""
    sections = [document, *document["models"], *document.get("overrides", ())]
    yield from (
        part["options"] for part in sections if isinstance(part, dict) and "options" in part
    )


def expand(document: Mapping[str, Any], home: Path) -> Iterator[BatchJob]:
    """The matrix, in the order of the file: models, then recipes, then formats."""
    taken: dict[str, str] = {}
    for entry in document["models"]:
        told = {"model": entry} if isinstance(entry, str) else entry
        for model in find_models(told["model"], home):
            name = told.get("name") or safe_name(model)
            if taken.setdefault(name, model) != model:
                raise UsageError(
                    f"two models would go to {name}/: {taken[name]} and {model}",
                    hint="give one of them a name: {model: …, name: …}",
                )
            for recipe in told.get("recipes") or document.get("recipes") or ["phone-4bit"]:
                yield from jobs_of(name, model, recipe, told, document, home)


def jobs_of(
    name: str,
    model: str,
    recipe: str,
    told: Mapping[str, Any],
    document: Mapping[str, Any],
    home: Path,
) -> Iterator[BatchJob]:
    """The jobs of one model and one recipe: one, or one for each format."""
    stem = f"{name}/{Path(recipe).stem if recipe not in recipes.names() else recipe}"
    formats = told.get("formats") or document.get("formats") or []
    place = recipe if recipe in recipes.names() else place_of(recipe, home)
    options = merged({}, document.get("options", {}), home)
    options = merged(options, told.get("options", {}), home)
    splits = document.get("split", False)
    if splits and not formats:
        formats = targets_of(place)
    for part in [[one] for one in formats] if splits else [formats]:
        own, mine, skip = f"{stem}/{part[0]}" if splits else stem, options, False
        for rule in document.get("overrides", ()):
            if fnmatchcase(own, rule["jobs"]):
                mine = merged(mine, rule.get("options", {}), home)
                part = part if splits else rule.get("formats", part)
                skip = rule.get("skip", skip)
        if not skip:
            revision = told.get("revision", "")
            yield BatchJob(own, model, name, place, tuple(part), mine, revision)


def targets_of(recipe: str) -> list[str]:
    """The formats of a recipe; those that it has by default where it cannot be read, which its
    jobs will tell."""
    from compress.recipe import load

    try:
        return list(load(recipe).targets)
    except RecipeError:
        return ["gguf", "onnx", "coreml"]


def find_models(model: str, home: Path) -> list[str]:
    """Folders or URLs of a pattern, sorted; or the one folder, Hub id or URL that is named."""
    if is_url(model) and any(char in model for char in GLOB):
        if urls := find(model):
            return urls
        raise UsageError(f"no folder with a checkpoint matches {model}")
    expanded = Path(os.path.expanduser(model))
    if not any(char in model for char in GLOB):
        local = model.startswith((".", "/", "~")) or (home / expanded).is_dir()
        return [place_of(model, home)] if local else [model]
    base, pattern = (home, model) if not expanded.is_absolute() else (Path("/"), str(expanded)[1:])
    found = sorted(
        os.path.normpath(path) for path in base.glob(pattern) if (path / "config.json").is_file()
    )
    if not found:
        raise UsageError(f"no folder with a checkpoint matches {model}", hint=f"seen from {home}")
    return found


def place_of(path: str, home: Path) -> str:
    """A path that is relative to the jobs file."""
    return os.path.normpath(home / os.path.expanduser(path))


def safe_name(model: str) -> str:
    """The last part of a path or a Hub id, as a folder's name."""
    from compress.plan.job import model_name

    return model_name(model)


def merged(options: Mapping[str, Any], more: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """Options under those that go over them; keys of ``set`` one by one; paths from ``home``."""
    told = dict(more)
    for key in PATHS:
        if key in told:
            told[key] = place_of(told[key], home)
    if "calibration" in told:
        told["calibration"] = [place_of(text, home) for text in told["calibration"]]
    if "set" in told:
        told["set"] = {**options.get("set", {}), **told["set"]}
    return {**options, **told}


def select(jobs: Sequence[BatchJob], patterns: Iterable[str]) -> list[BatchJob]:
    """The jobs that ``--only`` names; all of them without a pattern.

    Raises:
        UsageError: a pattern that no job has.
    """
    chosen: set[str] = set()
    patterns = list(patterns)
    for pattern in patterns:
        matches = [
            job.name
            for job in jobs
            if fnmatchcase(job.name, pattern) or pattern in (job.model_name, job.name)
        ]
        if not matches:
            hint = did_you_mean(pattern, [job.name for job in jobs], "jobs")
            raise UsageError(f"--only {pattern}: no such job", hint=hint)
        chosen.update(matches)
    return [job for job in jobs if not patterns or job.name in chosen]
