"""Measures the accuracy of every solver and of other tools' quantizers on every grid, in runtimes.

    python benchmarks/accuracy.py [MODEL] [--eval-text FILE] [--calibration FILE ...] [--windows N]
                                  [--solver NAME ...] [--setting NAME ...] [--all-types]
                                  [--no-peers] [--set KEY=VALUE ...] [--out DIR] [--name NAME]
                                  [--cache DIR] [--append]

For each setting one artifact by each solver, and by each peer (``peers.py``), is built from MODEL
(default: the bundled demo), loaded in llama.cpp, onnxruntime or the MIL evaluator, and compared
with the float model on held-out text that is not in the calibration. Those of a setting have the
same tensors, types and bytes. Writes DIR/NAME.json and DIR/NAME.md (default: benchmarks/accuracy).
CPU seconds are those of choosing codes and writing; the time of the walk over the calibration
texts, which all settings share, is below the table. ``--cache``: statistics of a build's
``PACKLIGHT_CACHE``, no walk is measured. ``--append``: other settings of an earlier run stay.

A setting is a format and a type or grid: ``GGUF IQ4_XS``, ``ONNX int4-g64-asym``,
``Core ML lut6-tensor``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peers import PEERS, OnnxHqq, Peer, PeerWeights
from writing import write

# Uses internal names: times the choice of codes of packlight and of other tools.
from compress.build.write import target_weights
from compress.calibration.statistics import Statistics
from compress.calibration.step import CalibrationStep, Importance
from compress.checkpoint.checkpoint import Checkpoint
from compress.console import Console
from compress.demo import model_path
from compress.grids import get_grid
from compress.plan.job import Job, prepare
from compress.plan.shapes import Artifact, Plan
from compress.plan.weights import Weights
from compress.pruning.transforms import transforms_of
from compress.recipe import load, needs_of
from compress.solvers import get_solver
from compress.verify import Verified
from compress.verify.scorer import Scorer, read_text
from exporters.gguf.mixes import MIXES

FORMATS = {"GGUF": "gguf", "ONNX": "onnx", "Core ML": "coreml"}
GGUF_TYPES = tuple(f"GGUF {name}" for name in MIXES if name not in ("F16", "BF16"))
SETTINGS = (
    "GGUF Q4_K_M", "GGUF IQ4_XS", "GGUF Q3_K_M", "GGUF Q4_0",
    "ONNX int4-g32", "ONNX int4-g32-asym", "ONNX int4-g128",
    "Core ML int4-g32", "Core ML lut4-g8", "Core ML lut4-g16",
)  # fmt: skip
# Mean KL of gptq's artifact over that of the best peer, at most.
BARS = {
    "GGUF Q4_K_M": 0.90,
    "GGUF IQ4_XS": 0.90,
    "ONNX int4-g32": 0.80,
    "Core ML lut4-g8": 0.70,
    "Core ML lut4-g16": 0.70,
}
BAR = 1.00  # where BARS has none
SOLVERS = ("rtn", "scale_search", "gptq")
DEMO = str(model_path())
# Above this size, peers that load the whole written file are skipped.
WHOLE_LIMIT = 2 << 30


@dataclass(frozen=True)
class Built:
    """One artifact of the table, and the CPU seconds of choosing its codes and writing it."""

    setting: str
    name: str
    peer: bool
    artifact: Artifact
    seconds: float


def overrides(setting: str) -> tuple[str, list[str]]:
    """The format of a setting, and its overrides of the recipe."""
    label, _, what = setting.rpartition(" ")
    name = FORMATS[label]
    if name == "gguf":
        return name, [f"targets.gguf.type={what}"]
    if name == "coreml":
        return name, [f"targets.coreml.grid={what}"]
    bits, group, *kind = what.removeprefix("int").split("-")
    symmetric = json.dumps(kind != ["asym"])
    settings = {"bits": bits, "group_size": group[1:], "symmetric": symmetric}
    return name, [f"targets.onnx.{key}={value}" for key, value in settings.items()]


def plan(checkpoint: Checkpoint, setting: str, solver: str, chosen: argparse.Namespace) -> Job:
    """One setting by one solver, as ``packlight build`` would prepare it."""
    name, changes = overrides(setting)
    texts = chosen.calibration or ["builtin"]
    changes += [
        f"quantize.solver={solver}",
        f"calibration.texts={json.dumps(texts)}",
        f"verify.windows={chosen.windows}",
        *chosen.set,
    ]
    recipe = load("phone-4bit", changes, [name])
    return prepare(checkpoint, recipe, transforms=transforms_of(recipe))


def contestants(
    checkpoint: Checkpoint, setting: str, chosen: argparse.Namespace
) -> Iterator[tuple[Job, type[Peer] | None]]:
    """The jobs of a setting: one for each of our solvers, then one for each peer.

    All have the plan of a calibrated build: llama.cpp's presets differ where there is an
    importance.
    """
    calibrated = plan(checkpoint, setting, "scale_search", chosen)
    for name in chosen.solver:
        yield replace(plan(checkpoint, setting, name, chosen), plans=calibrated.plans), None
    label, _, what = setting.rpartition(" ")
    for peer in PEERS[FORMATS[label], what.endswith("-asym")] if chosen.peers else ():
        yield calibrated, peer


def walks(checkpoint: Checkpoint, chosen: argparse.Namespace, folder: Path) -> dict[str, float]:
    """CPU seconds of the walk of each solver; all settings use the statistics of the last walk."""
    seconds: dict[str, float] = {}
    if chosen.cache:
        os.environ["PACKLIGHT_CACHE"] = str(chosen.cache)
        return seconds
    for solver in (name for name in SOLVERS if name in chosen.solver and needs_of(name)):
        os.environ["PACKLIGHT_CACHE"] = str(folder / f"cache-{solver}")
        start = time.process_time()
        statistics_of(plan(checkpoint, chosen.setting[0], solver, chosen))
        seconds[solver] = round(time.process_time() - start, 1)
    return seconds


def statistics_of(job: Job) -> tuple[CalibrationStep, Statistics | None]:
    """Statistics of the inputs of the job's source, cached."""
    calibration = CalibrationStep(job, Importance(), Console(), threads=1)
    return calibration, calibration.gather(job.source, job.plans[0])


def build(job: Job, peer: type[Peer] | None, folder: Path) -> tuple[Artifact, float]:
    """The artifact of a job's one plan, by its solver or by a peer, and its CPU seconds."""
    (made,) = job.plans

    calibration, statistics = statistics_of(job)
    solve = get_solver(job.recipe.solver)
    warm(made, PeerWeights(job.source, peer(statistics)) if peer else Weights(
        job.source, solve, statistics=statistics
    ))  # fmt: skip
    folder.mkdir(parents=True)
    start = time.process_time()
    if peer is not None:
        other = peer(statistics)
        artifact = write(made, PeerWeights(job.source, other), folder)
        artifact = other.finish(artifact)
    else:
        with tempfile.TemporaryDirectory(prefix="packlight-") as work:
            ledger = Path(work) / "ledger"
            weights, _ = target_weights(made, job, calibration, Console(), Path(work), ledger)
            artifact = write(made, weights, folder)
    return artifact, time.process_time() - start


def warm(made: Plan, weights: Weights) -> None:
    """Quantize a few rows on each grid, so that compiling and importing are not measured."""
    first = {e.grid: e for e in made.entries if len(e.shape) == 2 and e.name[:5] != "rope."}
    for entry in first.values():
        if entry.grid not in ("F32", "F16", "BF16"):
            weights.quantize(entry.name, get_grid(entry.grid), slice(0, min(64, entry.shape[0])))


def row(built: Built, verified: Verified, parameters: int) -> dict[str, Any]:
    """The table's row of one artifact."""
    quality = verified.quality
    return {
        "setting": built.setting,
        "solver": built.name,
        "peer": built.peer,
        "bytes": built.artifact.nbytes,
        "bits_per_weight": round(8 * built.artifact.nbytes / parameters, 3),
        "kl_mean": round(quality.kl_mean.value, 6),
        "kl_mean_se": round(quality.kl_mean.se or 0.0, 6),
        "kl_p99": round(quality.kl_p99.value, 5),
        "perplexity_ratio": round(quality.perplexity_ratio.value, 5),
        "top1_agreement": round(quality.top1_agreement.value, 4),
        "cpu_seconds": round(built.seconds, 2),
    }


def of_peers(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row of ours its KL over that of the setting's best peer, ``of_peer``."""
    best: dict[str, float] = {}
    for entry in rows:
        if entry["peer"]:
            setting = entry["setting"]
            best[setting] = min(best.get(setting, float("inf")), entry["kl_mean"])
    for entry in rows:
        if not entry["peer"] and entry["setting"] in best:
            entry["of_peer"] = round(entry["kl_mean"] / best[entry["setting"]], 3)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line per artifact; KL beside rtn's and the best peer's at the same setting."""
    lines = [
        "| setting | solver | bytes | bits per weight | mean KL | of rtn's | of peer's | 99 % KL "
        "| perplexity ratio | top-1 | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    plain = {entry["setting"]: entry["kl_mean"] for entry in rows if entry["solver"] == "rtn"}
    for entry in rows:
        kl, base, share = entry["kl_mean"], plain.get(entry["setting"]), entry.get("of_peer")
        name = f"*{entry['solver']}*" if entry["peer"] else entry["solver"]
        lines.append(
            f"| {entry['setting']} | {name} | {entry['bytes']:,} | {entry['bits_per_weight']:.2f} "
            f"| {kl:.5f} | {f'{kl / base:.2f}' if base else ''} "
            f"| {'' if share is None else f'{share:.2f}'} | {entry['kl_p99']:.3f} "
            f"| {entry['perplexity_ratio']:.4f} | {100 * entry['top1_agreement']:.1f} % "
            f"| {entry['cpu_seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def bars(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each setting with a peer, whether gptq is as far below it as required."""
    lines = [
        "| setting | of the best peer's KL: bar | gptq | scale_search | |",
        "|---|---|---|---|---|",
    ]
    shares = {(e["setting"], e["solver"]): e["of_peer"] for e in rows if "of_peer" in e}
    for setting in dict.fromkeys(entry["setting"] for entry in rows):
        ours = shares.get((setting, "gptq"))
        if ours is None:
            continue
        bar, other = BARS.get(setting, BAR), shares.get((setting, "scale_search"))
        lines.append(
            f"| {setting} | {bar:.2f} | {ours:.2f} | {'' if other is None else f'{other:.2f}'} "
            f"| {'pass' if ours <= bar else '**fail**'} |"
        )
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def measure(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build everything, then score everything against one run of the float model."""
    checkpoint, console = Checkpoint.open(chosen.model), Console()
    seconds = walks(checkpoint, chosen, folder)
    built: list[Built] = []
    notes: list[str] = []
    for setting in chosen.setting:
        for job, peer in contestants(checkpoint, setting, chosen):
            name = peer.name if peer else job.recipe.solver
            if peer is OnnxHqq and sum(plan.weights_bytes for plan in job.plans) > WHOLE_LIMIT:
                notes.append(f"{setting}, {name}: not run, it takes the whole file into memory")
                continue
            try:
                artifact, spent = build(job, peer, folder / str(len(built) + len(notes)))
            except ValueError as error:
                if peer is None:
                    raise
                notes.append(f"{setting}, {name}: not run, it fails ({error})")
                continue
            built.append(Built(setting, name, peer is not None, artifact, spent))
            console.detail(f"{setting}, {name}: {spent:.1f} CPU s")
    everything = replace(job, plans=tuple(entry.artifact.plan for entry in built))
    scorer = Scorer(everything, read_text(chosen.eval_text), 0, console)
    scored = scorer.verify([entry.artifact for entry in built], folder, keep_going=False)
    rows = [
        row(entry, found, job.config.num_parameters)
        for entry, found in zip(built, scored, strict=True)
        if found is not None
    ]
    of_peers(rows)
    return {
        "model": "packlight-demo" if chosen.model == DEMO else Path(chosen.model).name,
        "scored_tokens": scored[0].quality.tokens if scored[0] else 0,
        "calibration": job.recipe.to_dict()["calibration"],
        "walk_cpu_seconds": seconds,
        "rows": rows,
        "notes": notes,
    }


def page(document: dict[str, Any]) -> str:
    """The Markdown of a measurement."""
    spent = ", ".join(f"{name} {s} s" for name, s in document["walk_cpu_seconds"].items())
    lines = [f"CPU seconds of tokenizing and the walk: {spent}."] if spent else []
    told = "\n".join(f"{line}\n" for line in [*lines, *document["notes"]])
    return "\n".join(filter(None, [table(document["rows"]), told, bars(document["rows"])]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=DEMO)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--calibration", action="append")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--solver", action="append", choices=SOLVERS)
    parser.add_argument("--setting", action="append")
    parser.add_argument("--all-types", action="store_true", help="every type of GGUF too")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--set", action="append", default=[], help="of the recipe, for all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--name", default="accuracy", help="of the two files")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--append", action="store_true")
    chosen = parser.parse_args()
    chosen.solver = chosen.solver or list(SOLVERS)
    settings = (*(chosen.setting or SETTINGS), *(GGUF_TYPES if chosen.all_types else ()))
    chosen.setting = list(dict.fromkeys(settings))
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        document = measure(chosen, Path(folder))
    known = chosen.out / f"{chosen.name}.json"
    if chosen.append and known.exists():
        earlier = json.loads(known.read_text())
        kept = [entry for entry in earlier["rows"] if entry["setting"] not in chosen.setting]
        document["rows"] = kept + document["rows"]
        document["notes"] = earlier["notes"] + document["notes"]
    (chosen.out / f"{chosen.name}.json").write_text(json.dumps(document, indent=2) + "\n")
    (chosen.out / f"{chosen.name}.md").write_text(page(document))
    print(page(document))


if __name__ == "__main__":
    main()
