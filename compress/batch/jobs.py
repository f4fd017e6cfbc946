"""The jobs file and its matrix models × recipes × budgets × formats.

A job is one model with one recipe, all formats in one ``build``, which reads every shard once for
all of them; ``split: true`` makes a job of each format, ``budgets`` one of each size. Jobs are
named ``MODEL/RECIPE`` (``MODEL/RECIPE-1.8GiB/FORMAT``), and so are their folders in the tree.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import recipes
from compress.batch.jobs_file import JobsFile, ModelEntry, Options
from compress.build.decide import BuildSettings
from compress.checkpoint.remote import find
from compress.console import parse_bytes
from compress.errors import RecipeError, UsageError, did_you_mean
from compress.files import is_url, read_bounded
from compress.formats import FORMATS
from compress.recipe import parse
from compress.recipe.model import hint_of
from compress.recipe.schema import explain

__all__ = ["BatchFile", "BatchJob", "read_jobs", "select"]

# Options whose values are paths, relative to the jobs file.
PATHS = ("eval_text", "imatrix", "plan")
# Options that are passed to the command line unchanged.
WORDS = ("budget", "budget_memory", "device", "prune", "context", "seed", "threads")
GLOB = "*?["


@dataclass(frozen=True)
class BatchJob:
    """One job: a model, a recipe, formats and options.

    Attributes:
        name: ``MODEL/RECIPE``; also its folder in the output tree.
        model: folder or Hub id, as for ``packlight build``.
        model_name: first part of the name; jobs of one model share cached work.
        recipe: shipped name or path.
        formats: of this job; empty: those of the recipe.
        options: of ``packlight build``; paths made absolute.
        revision: of a Hub model; empty for its main branch.
    """

    name: str
    model: str
    model_name: str
    recipe: str
    formats: tuple[str, ...] = ()
    options: Options = field(default_factory=Options)
    revision: str = ""

    def settings(self, output: Path) -> BuildSettings:
        """The settings of the job's build."""
        options = self.options
        words: dict[str, Any] = {
            name: Path(value) if name in PATHS else value
            for name, value in options.given()
            if name in (*PATHS, *WORDS)
        }
        return BuildSettings(
            model=self.model,
            output=output,
            adapters=tuple(options.adapter or ()),
            recipe=self.recipe,
            overrides=overrides(options),
            formats=self.formats,
            calibration=tuple(map(Path, options.calibration or ())),
            allow_dense=options.allow_dense or False,
            force=options.force or False,
            verify=options.verify is not False,
            hub=self.hub,
            **words,
        )

    @property
    def hub(self) -> dict[str, Any]:
        """Where the checkpoint comes from: ``revision`` and ``fetch``."""
        return {"revision": self.revision or None, "fetch": self.options.fetch or "auto"}

    @property
    def memory(self) -> int | None:
        """The job's memory in bytes as set in the file; None where not set."""
        return None if self.options.memory is None else parse_bytes(self.options.memory)


def overrides(options: Options) -> tuple[str, ...]:
    """The option ``set`` as ``--set`` arguments; values are JSON, which is YAML."""
    return tuple(f"{key}={json.dumps(value)}" for key, value in (options.set or {}).items())


def arguments(settings: BuildSettings) -> list[str]:
    """The ``packlight`` command line of these settings, with local paths."""
    words = ["build", settings.model, "-r", settings.recipe, "-o", str(settings.output)]
    for name in settings.formats:
        words += ["-f", name]
    for override in settings.overrides:
        words += ["--set", override]
    for adapter in settings.adapters:
        words += ["--adapter", adapter]
    for text in settings.calibration:
        words += ["--calibration", str(text)]
    for key in (*PATHS, *WORDS):
        value = getattr(settings, key)
        if value not in (None, "", 0) or (key == "seed" and value == 0):
            words += [f"--{key.replace('_', '-')}", str(value)]
    if settings.allow_dense:
        words.append("--allow-dense")
    if settings.force:
        words.append("--force")
    if not settings.verify:
        words.append("--no-verify")
    if revision := settings.hub.get("revision"):
        words += ["--revision", revision]
    if (fetch := settings.hub.get("fetch", "auto")) != "auto":
        words += ["--fetch", fetch]
    return words


@dataclass(frozen=True)
class BatchFile:
    """An expanded jobs file: its jobs, in order, and the output tree."""

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
        text = read_bounded(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"{path} cannot be read: {why}", hint="docs/batch.md shows one") from error
    document = parse(text, str(path), "a jobs file", "docs/batch.md shows one")
    try:
        file = JobsFile.model_validate(document)
    except ValidationError as error:
        raise explain(error, str(path), document, JobsFile, hint_of) from None
    home = path.resolve().parent
    jobs = list(expand(file, home))
    if not jobs:
        raise UsageError(f"{path}: overrides skip every job")
    output = file.output or path.stem
    output = output if is_url(output) else str(home / output)
    twice = [name for name, count in Counter(job.name for job in jobs).items() if count > 1]
    if twice:
        raise UsageError(
            f"{path}: two jobs would go to {twice[0]}/",
            hint="each model once with each recipe, and recipes with names of their own",
        )
    return BatchFile(path, output, tuple(jobs))


def expand(file: JobsFile, home: Path) -> Iterator[BatchJob]:
    """The matrix, in the order of the file: models, then recipes, budgets, formats."""
    taken: dict[str, str] = {}
    for entry in file.models:
        asked = ModelEntry(model=entry) if isinstance(entry, str) else entry
        for model in find_models(asked.model, home):
            name = asked.name or safe_name(model)
            if taken.setdefault(name, model) != model:
                raise UsageError(
                    f"two models would go to {name}/: {taken[name]} and {model}",
                    hint="give one of them a name: {model: …, name: …}",
                )
            for recipe in asked.recipes or file.recipes:
                for budget in file.budgets or [""]:
                    yield from jobs_of(name, model, recipe, budget, asked, file, home)


def jobs_of(
    name: str,
    model: str,
    recipe: str,
    budget: str,
    asked: ModelEntry,
    file: JobsFile,
    home: Path,
) -> Iterator[BatchJob]:
    """The jobs of one model, recipe and budget (if any): one, or one for each format."""
    stem = f"{name}/{Path(recipe).stem if recipe not in recipes.names() else recipe}"
    stem += f"-{budget}" if budget else ""
    formats = asked.formats or file.formats or []
    place = recipe if recipe in recipes.names() else place_of(recipe, home)
    options = merged(merged(Options(), file.options, home), asked.options, home)
    if budget:
        options = options.model_copy(update={"budget": budget})
    if file.split and not formats:
        formats = targets_of(place)
    for part in [[one] for one in formats] if file.split else [formats]:
        own, mine, skip = f"{stem}/{part[0]}" if file.split else stem, options, False
        for rule in file.overrides:
            if fnmatchcase(own, rule.jobs):
                mine = merged(mine, rule.options, home)
                part = part if file.split else rule.formats or part
                skip = skip if rule.skip is None else rule.skip
        if not skip:
            yield BatchJob(own, model, name, place, tuple(part), mine, asked.revision)


def targets_of(recipe: str) -> list[str]:
    """The formats of a recipe; the default ones where it cannot be read, which its jobs report."""
    from compress.recipe import load

    try:
        return list(load(recipe).targets)
    except RecipeError:
        return list(FORMATS)


def find_models(model: str, home: Path) -> list[str]:
    """Folders or URLs that match a pattern, sorted; or the one folder, Hub id or URL itself."""
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
    """A path relative to the jobs file, made absolute."""
    return os.path.normpath(home / os.path.expanduser(path))


def adapter_place(text: str, home: Path) -> str:
    """A LoRA's path made absolute, or its Hub id, with its weight."""
    from compress.checkpoint.adapter import split_weight

    if (home / os.path.expanduser(text)).is_dir():
        return place_of(text, home)
    name, _ = split_weight(text)
    local = name.startswith((".", "/", "~")) or (home / os.path.expanduser(name)).is_dir()
    return place_of(name, home) + text[len(name) :] if local else text


def safe_name(model: str) -> str:
    """The last part of a path or a Hub id, as a safe folder name."""
    from compress.plan.job import model_name

    return model_name(model)


def merged(options: Options, more: Options, home: Path) -> Options:
    """Options overridden by ``more``, key by key in ``set``; paths are relative to ``home``."""
    changes = dict(more.given())
    for key in PATHS:
        if changes.get(key) is not None:
            changes[key] = place_of(changes[key], home)
    if more.adapter is not None:
        changes["adapter"] = [adapter_place(text, home) for text in more.adapter]
    if more.calibration is not None:
        changes["calibration"] = [place_of(text, home) for text in more.calibration]
    if more.set is not None:
        changes["set"] = {**(options.set or {}), **more.set}
    return options.model_copy(update=changes)


def select(jobs: Sequence[BatchJob], patterns: Iterable[str]) -> list[BatchJob]:
    """The jobs that match ``--only``; all of them without a pattern.

    Raises:
        UsageError: a pattern that no job matches.
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
