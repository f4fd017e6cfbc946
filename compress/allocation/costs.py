"""The cost of each tensor on each grid: the KL divergence that it is expected to add, in nats.

``cost = relative error of the tensor on the grid × nats per unit of error`` (``tensor_error.py``,
``sensitivity.py``). Codes are chosen by the recipe's solver, with its statistics, so that the error
of a solver that compensates rounding is the one it really leaves.

The table is cached beside the calibration's statistics and grows: another budget or format measures
only missing entries; concurrent builds wait for each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from compress.allocation.effort import Effort
from compress.allocation.sensitivity import Sensitivity, measure
from compress.allocation.tensor_error import relative_error, sampled
from compress.calibration.statistics import Statistics
from compress.calibration.texts import CalibrationSet
from compress.checkpoint.sources import Source
from compress.console import Console
from compress.decoder.config import FUSED, DecoderConfig, WeightMap, split_name, stored_block
from compress.files import cache_folder, check_unchanged, file_lock, write_whole
from compress.grids import Float32, get_grid
from compress.plan.weights import Solver

__all__ = ["CostTable", "measured", "members"]

LAYOUT = 3  # of the file; part of its key

Progress = Callable[[int, int], None]


@dataclass
class CostTable:
    """Sensitivities and errors, by unfused name of a stored weight.

    Attributes:
        config: the model.
        sensitivities: of every linear and the embedding.
        errors: name → grid → relative error.
    """

    config: DecoderConfig
    sensitivities: dict[str, Sensitivity] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    def cost(self, name: str, grid: str, *, tied: bool = False) -> float:
        """Expected KL, in nats per token, of a weight (fused or not) on a grid.

        Args:
            tied: an embedding that is also the head.
        """
        return sum(
            self.sensitivities[member].slope * self.errors[member][grid]
            for member in members(self.config, name, tied=tied)
        )

    def missing(self, wanted: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
        """Missing pairs of name and grid, by unfused name."""
        found: dict[str, list[str]] = {}
        for name, grid in wanted:
            if grid not in self.errors.get(name, {}):
                grids = found.setdefault(name, [])
                if grid not in grids:
                    grids.append(grid)
        return found

    @classmethod
    def load(cls, config: DecoderConfig, path: Path) -> CostTable:
        """Load a saved table; empty where it is missing or damaged."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            sensitivities = {
                n: Sensitivity(**entry) for n, entry in document["sensitivities"].items()
            }
            return cls(config, sensitivities, document["errors"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls(config)

    def save(self, path: Path) -> None:
        """Write the table as JSON, atomically."""
        document = {
            "sensitivities": {name: asdict(entry) for name, entry in self.sensitivities.items()},
            "errors": self.errors,
        }
        write_whole(path, json.dumps(document, indent=1))


def members(config: DecoderConfig, name: str, *, tied: bool = False) -> list[str]:
    """Unfused names of the stored weights that a plan's entry holds."""
    block, role, kind = split_name(name)
    if block is None:
        return [name, "lm_head.weight"] if tied else [name]
    stem = f"blocks.{stored_block(config, block)}"
    return [f"{stem}.{member}.{kind}" for member in FUSED.get(role, (role,))]


def measured(
    source: Source,
    calibration: CalibrationSet,
    statistics: Statistics,
    solve: Solver,
    effort: Effort,
    origin: str,
    wanted: Sequence[tuple[str, str]],
    console: Console,
) -> CostTable:
    """The cost table of a source with all wanted pairs; measures those that are not cached.

    Args:
        source: the weights.
        calibration: the windows, with their digest.
        statistics: of the inputs.
        solve: the effort's solver.
        effort: how much is measured.
        origin: identifies the statistics' source, where that is not ``calibration``.
        wanted: pairs of unfused name and grid.
        console: for progress.
    """
    facts = f"{LAYOUT} {source.fingerprint()} {calibration.digest()} {effort} {origin}"
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    path = cache_folder() / f"{key}-costs.json"
    with file_lock(path.with_suffix(".lock")):
        table = CostTable.load(source.config, path)
        if not table.sensitivities:
            with console.progress("measure sensitivities", "blocks") as progress:
                table.sensitivities = measure(
                    source, calibration.windows, statistics, progress, most=effort.scored
                )
            check_unchanged(source.checkpoint.opened)
            table.save(path)
        if missing := table.missing(wanted):
            with console.progress("measure grids", "tensors") as progress:
                measure_errors(source, statistics, solve, missing, table.errors, effort, progress)
            check_unchanged(source.checkpoint.opened)
            table.save(path)
    return table


def measure_errors(
    source: Source,
    statistics: Statistics,
    solve: Solver,
    missing: Mapping[str, Sequence[str]],
    errors: dict[str, dict[str, float]],
    effort: Effort,
    progress: Progress,
) -> None:
    """Measure the missing errors, one tensor in memory at a time."""
    shapes = WeightMap(source.config)
    tied = source.config.tie_word_embeddings
    for done, (name, grids) in enumerate(missing.items()):
        rows, columns = shapes.shape(name)
        # A tied head has the embedding's codes.
        stored = "embed_tokens.weight" if tied and name == "lm_head.weight" else name

        def read(run: slice, name: str = stored) -> Float32:
            return source.read(name, run)

        weight = sampled(read, rows, columns, effort.sample)
        for grid in map(get_grid, grids):
            change = solve(weight, grid, statistics.for_weight(stored)).decode() - weight
            error = relative_error(weight, change, statistics.for_weight(name))
            errors.setdefault(name, {})[grid.name] = effort.left * error
        progress(done + 1, len(missing))
