"""The build's calibration step: the input statistics that the solver needs.

Statistics come from the recipe's texts (walked, or from the cache) or from an imatrix file; ``rtn``
needs none, and then nothing is read.

A walk (``walk.py``) that is killed leaves its results in the cache, and the next one with the same
weights and windows continues with the next block. Of two builds that need the same statistics, one
walks and the other waits for it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import is_zipfile

from compress.calibration.statistics import Statistics, file_name, input_names, save
from compress.calibration.texts import BUILTIN, CalibrationSet
from compress.calibration.walk import Boundary, walk
from compress.checkpoint.sources import Source
from compress.console import Console
from compress.errors import UsageError
from compress.files import (
    LARGEST_CORPUS,
    cache_folder,
    check_unchanged,
    computed_once,
    sync,
)
from compress.formats import FORMATS, Format
from compress.machine import set_threads
from compress.plan.job import Job, choose_threads, looks_at_inputs
from compress.plan.shapes import Plan
from compress.recipe import Recipe, method_of, needs_of

LAYOUT = 2  # of the cache; part of its key


@dataclass(frozen=True)
class Importance:
    """The options that bypass or export the recipe's calibration.

    Attributes:
        imatrix: llama.cpp file to read importance from.
        save: llama.cpp file to write importance to.
    """

    imatrix: Path | None = None
    save: Path | None = None

    def check(self, recipe: Recipe, calibration: Sequence[Path], *, measures: bool = False) -> None:
        """Refuse options that would have no effect, and missing files.

        Args:
            recipe: its solver is checked and, where that uses input statistics, its texts.
            calibration: ``--calibration``.
            measures: whether grids are chosen by measurement, which uses them too.

        Raises:
            UsageError: with a hint.
        """
        use, solver = "--set quantize.solver=scale_search", recipe.solver
        if self.imatrix and calibration:
            raise UsageError("--imatrix and --calibration exclude each other")
        if self.imatrix and recipe.prunes:
            raise UsageError(
                "--imatrix counts inputs of the whole model, and the recipe prunes it",
                hint="--calibration, or an imatrix of what --save-checkpoint writes",
            )
        if self.imatrix and needs_of(solver) == "hessian":
            raise UsageError(f"--imatrix has less than {solver} needs", hint=f"{use}, or texts")
        if recipe.folds and not needs_of(solver):
            raise UsageError(f"quantize.fold looks at inputs, {solver} does not", hint=use)
        if recipe.folds and self.imatrix:
            raise UsageError(
                "--imatrix has less than quantize.fold needs",
                hint="leave it out: calibration texts have it",
            )
        if not needs_of(solver) and not measures and self.imatrix:
            raise UsageError(f"--imatrix has no effect: the solver is {solver}", hint=use)
        looks = looks_at_inputs(recipe) or measures or self.save is not None
        updated = [name for name, its in recipe.targets.items() if method_of(its) == "sparsegpt"]
        if self.imatrix and updated:
            raise UsageError(
                "--imatrix has less than sparsegpt needs",
                hint=f"texts, or --set targets.{updated[0]}.sparsity_method=wanda",
            )
        if not looks and calibration:
            raise UsageError(f"--calibration has no effect: the solver is {solver}", hint=use)
        for path in texts_of(recipe) if looks and not self.imatrix else []:
            check_input(path, "a calibration text: .txt or .jsonl")
        if self.imatrix:
            check_input(self.imatrix, "an imatrix file")


def check_input(path: Path, hint: str) -> None:
    """Refuse a file that cannot be an input of a build, before it is hashed and read.

    Raises:
        UsageError: missing, not a regular file, or of more than ``LARGEST_CORPUS`` bytes.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise UsageError(f"{path} {what}", hint=hint)
    if (size := path.stat().st_size) > LARGEST_CORPUS:
        raise UsageError(f"{path} has {size:,} bytes, more than {LARGEST_CORPUS:,}", hint=hint)


def imatrix_format() -> Format:
    """The format that can read and write importance files (llama.cpp's imatrix)."""
    return next(row for row in FORMATS.values() if row.imatrix)


def texts_of(recipe: Recipe) -> list[Path]:
    """The recipe's own calibration files."""
    return [Path(text) for text in recipe.calibration.texts if text != BUILTIN]


class CalibrationStep:
    """Input statistics for the targets of one job. Texts are tokenized once, and equal sources are
    walked once. ``keep``: keep a walk's results on disk where it ends by an exception.
    """

    def __init__(
        self,
        job: Job,
        importance: Importance,
        console: Console,
        threads: int = 0,
        keep: bool = False,
    ) -> None:
        self.job, self._keep = job, keep
        self._experts = ""  # how many tokens they saw
        self._importance = importance
        self.console, self.threads = console, threads

    def on(self, job: Job) -> CalibrationStep:
        """The same step for another job."""
        step = copy(self)  # keeps the texts, if they were read
        step.job = job
        return step

    def gather(self, source: Source, plan: Plan) -> Statistics | None:
        """The input statistics of ``source`` that a target's solver and transforms need; None if
        none.

        Args:
            source: the weights that ``plan`` is made of.
            plan: of the target.

        Raises:
            UsageError: texts that are missing or too short.
            ArtifactError: an imatrix file that cannot be read or is another model's.
            CheckpointError: weights or a tokenizer that cannot be read.
        """
        if self._importance.imatrix:
            return imatrix_format().read_imatrix(self._importance.imatrix, source.config)
        needs = {change.needs for change in self.job.transforms.get(plan.format, ())}
        if not needs_of(self.job.recipe.solver) and not any(needs):
            return None
        found = self._collect(source, self.texts, hessian="hessian" in needs)
        if source.config.experts is not None:
            from compress.calibration.experts import describe_experts

            self._experts = describe_experts(source.config, found)
        return found

    def for_costs(self, source: Source, tokens: int = 0) -> tuple[Statistics, CalibrationSet, str]:
        """The data to measure a cost table with, for any solver: input statistics of the model,
        the texts, and a description of the statistics' source.

        Args:
            source: the weights.
            tokens: of the texts, without Hessians; 0: the recipe's number.

        Raises:
            As ``gather``.
        """
        texts = self.texts.first(tokens) if tokens else self.texts
        given = self._importance.imatrix
        if given:
            name = hashlib.sha256(given.read_bytes()).hexdigest()
            return imatrix_format().read_imatrix(given, source.config), texts, name
        if tokens:
            return self._collect(source, texts, hessian=None), texts, ""
        return self._collect(source, texts), texts, ""

    @property
    def propagates(self) -> bool:
        """Whether each block is quantized on the outputs of the quantized blocks before it."""
        recipe = self.job.recipe
        wanted = bool(needs_of(recipe.solver)) and recipe.calibration.propagate == "quantized"
        return wanted and not self._importance.imatrix

    def windows(self) -> Sequence[Sequence[int]]:
        """The recipe's texts as windows of token ids; also sets the threads for a walk.

        Raises:
            UsageError: texts that are not there or too short.
        """
        set_threads(choose_threads(self.threads, self.job.config))
        return self.texts.windows

    def notes(self) -> list[str]:
        """A line for the report that names the source of the solver's statistics."""
        solver = self.job.recipe.solver
        if self._importance.imatrix:
            name = self._importance.imatrix.name
            return [f"Codes chosen by {solver}, with the importance in {name}"]
        if not needs_of(solver):
            return []
        seen = f"{self.texts.tokens} tokens of {', '.join(self.texts.sources)}"
        through = " through the quantized blocks before each" if self.propagates else ""
        lines = [f"Codes chosen by {solver}, calibrated on {seen}{through}"]
        return [*lines, self._experts] if self._experts else lines

    def save_imatrix(self) -> None:
        """``--save-imatrix``: write the common source's input importance as an imatrix file."""
        path, source = self._importance.save, self.job.source
        if path is None:
            return
        given = self._importance.imatrix
        statistics = (
            imatrix_format().read_imatrix(given, source.config)
            if given
            else self._collect(source, self.texts)
        )
        imatrix_format().write_imatrix(path, source.config, statistics)
        self.console.detail(f"importance: {path}")

    @cached_property
    def texts(self) -> CalibrationSet:
        """The recipe's calibration texts as windows of token ids.

        Raises:
            UsageError: texts that are not there or too short.
            CheckpointError: no tokenizer.
        """
        settings = self.job.recipe.calibration
        return CalibrationSet.load(
            settings.texts,
            self.job.checkpoint.tokenizer,
            tokens=settings.tokens,
            sequence_length=min(settings.sequence_length, self.job.config.max_context),
            seed=settings.seed,
        )

    def _collect(
        self, source: Source, texts: CalibrationSet, *, hessian: bool | None = False
    ) -> Statistics:
        """Statistics from these texts.

        Args:
            hessian: True: with Hessians even where the recipe does not need them; None: without.
        """
        recipe = self.job.recipe
        if hessian is not None:
            hessian = hessian or recipe.folds or needs_of(recipe.solver) == "hessian"
        set_threads(choose_threads(self.threads, self.job.config))
        with self.console.progress("calibrate", "windows") as update:
            return collect(source, texts, hessian=bool(hessian), keep=self._keep, progress=update)


# --- the cache ------------------------------------------------------------------------------


def collect(
    source: Source,
    calibration: CalibrationSet,
    *,
    hessian: bool,
    keep: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Input statistics from the cache, or from a walk that is then cached.

    Args:
        source: the weights; equal ones (``Source.fingerprint``) share their statistics.
        calibration: windows.
        hessian: whether Hessians are needed; cached statistics with them serve both cases.
        keep: keep the walk's results where it ends by an exception.
        progress: of the walk.
    """
    place, config = cache_folder(), source.config
    facts = f"{LAYOUT} {source.fingerprint()} {calibration.digest()}"
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    full, light = place / f"{key}-hessian", place / key

    names = {file_name(key) for key in input_names(config)}

    def known() -> Statistics | None:
        for folder in (full,) if hessian else (light, full):
            if folder.is_dir() and all(is_zipfile(folder / name) for name in names):
                return Statistics.open(config, folder, hessian=hessian)
        return None

    def walked() -> Statistics:
        final = full if hessian else light
        shutil.rmtree(final, ignore_errors=True)  # damaged
        collect_anew(source, calibration, final, hessian, keep, progress)
        if hessian:  # an entry with Hessians also serves without: delete the entry without them
            shutil.rmtree(light, ignore_errors=True)
        return Statistics.open(config, final, hessian=hessian)

    return computed_once(place / f"{key}.lock", known, walked)


def collect_anew(
    source: Source,
    calibration: CalibrationSet,
    final: Path,
    hessian: bool,
    keep: bool,
    progress: Callable[[int, int], None],
) -> None:
    """Walk, and save the statistics in the folder ``final``; arguments as of ``collect``."""
    with walk_folder(final, keep=keep) as work:
        folder = work / "statistics"
        folder.mkdir(exist_ok=True)
        blocks = walk(
            source.config,
            source.read,
            calibration.windows,
            hessian=hessian,
            work=work,
            boundary=Boundary(work / "boundary"),
            progress=progress,
        )
        for stats in blocks:
            file = folder / file_name(next(iter(stats)))
            save(file, stats)
            sync(file)
            del stats  # before the next ones are summed up
        check_unchanged(source.checkpoint.opened)  # or the entry would be of other weights
        folder.rename(final)


@contextmanager
def walk_folder(final: Path, *, keep: bool) -> Iterator[Path]:
    """The work folder of a walk: ``FINAL.partial``, new or left by an interrupted walk; removed at
    the end.

    Args:
        final: folder of the finished statistics.
        keep: do not remove it where the walk ends by an exception.
    """
    partial = final.with_name(final.name + ".partial")
    partial.mkdir(exist_ok=True)
    try:
        yield partial
    except BaseException:
        if not keep:
            shutil.rmtree(partial)
        raise
    shutil.rmtree(partial)
