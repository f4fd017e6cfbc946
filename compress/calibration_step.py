"""The step of a build between plan and writing: what the solver must know of the inputs.

Statistics come from the recipe's texts (walked, or from the cache) or from an imatrix file; ``rtn``
needs none, and then nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.calibration import BUILTIN, CalibrationSet, collect
from compress.console import Console
from compress.errors import UsageError
from compress.job import Job, choose_threads
from compress.model import Shipyard
from compress.recipe import Recipe
from compress.solvers import NEEDS
from compress.statistics import Statistics


@dataclass(frozen=True)
class Importance:
    """The options that go around the recipe's calibration.

    Attributes:
        imatrix: take importance from this file of llama.cpp.
        save: write the importance to such a file.
    """

    imatrix: Path | None = None
    save: Path | None = None

    def check(self, recipe: Recipe, calibration: Sequence[Path]) -> None:
        """Refuse options that would have no effect, and files that are not there.

        Args:
            recipe: its solver and, where that looks at inputs, its texts count.
            calibration: ``--calibration``.

        Raises:
            UsageError: with what to type instead.
        """
        use, solver = "--set quantize.solver=scale_search", recipe.solver
        if self.imatrix and calibration:
            raise UsageError("--imatrix and --calibration exclude each other")
        if self.imatrix and NEEDS.get(solver) == "hessian":
            raise UsageError(f"--imatrix has less than {solver} needs", hint=f"{use}, or texts")
        if solver not in NEEDS and self.imatrix:
            raise UsageError(f"--imatrix has no effect: the solver is {solver}", hint=use)
        if solver not in NEEDS and calibration and not self.save:
            raise UsageError(f"--calibration has no effect: the solver is {solver}", hint=use)
        for path in texts_of(recipe) if solver in NEEDS or self.save else []:
            if not path.is_file() and not self.imatrix:
                raise UsageError(f"{path} does not exist", hint="a calibration text")
        if self.imatrix and not self.imatrix.is_file():
            raise UsageError(f"{self.imatrix} does not exist", hint="an imatrix of llama.cpp")


def texts_of(recipe: Recipe) -> list[Path]:
    """The recipe's own calibration files."""
    return [Path(text) for text in recipe.calibration["texts"] if text != BUILTIN]


def gather(
    job: Job, importance: Importance, shipyard: Shipyard, console: Console, threads: int
) -> tuple[Statistics | None, list[str]]:
    """Statistics for the recipe's solver, and a line for the report that says where they are from.

    Raises:
        UsageError: texts that are not there or too short.
        ArtifactError: an imatrix file that cannot be read or is another model's.
        CheckpointError: weights or a tokenizer that cannot be read.
    """
    solver = job.recipe.solver
    if importance.imatrix:
        statistics = shipyard.read_imatrix(importance.imatrix, job.config)
        line = f"Codes chosen by {solver}, with the importance in {importance.imatrix.name}"
    elif solver in NEEDS or importance.save:
        statistics, seen = calibrate(job, console, threads)
        line = f"Codes chosen by {solver}, calibrated on {seen}" if solver in NEEDS else ""
    else:
        return None, []
    if importance.save:
        shipyard.write_imatrix(importance.save, job.config, statistics)
        console.detail(f"importance: {importance.save}")
    return statistics, [line] if line else []


def calibrate(job: Job, console: Console, threads: int) -> tuple[Statistics, str]:
    """Statistics from the recipe's texts, and in words what was seen."""
    import torch

    from compress.tokenizer import Tokenizer

    settings = job.recipe.calibration
    calibration = CalibrationSet.load(
        settings["texts"],
        Tokenizer(job.checkpoint.path),
        tokens=settings["tokens"],
        sequence_length=min(settings["sequence_length"], job.config.max_context),
        seed=settings["seed"],
    )
    torch.set_num_threads(choose_threads(threads, job.config))
    with console.progress("calibrate", "windows") as update:
        statistics = collect(
            job.source.config,
            job.source.read,
            calibration,
            fingerprint=job.source.fingerprint(),
            hessian=NEEDS.get(job.recipe.solver) == "hessian",
            progress=update,
        )
    return statistics, f"{calibration.tokens} tokens of {', '.join(calibration.sources)}"
