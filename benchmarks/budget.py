"""Compares byte budgets, with a grid per tensor, with fixed types of the same size.

    python benchmarks/budget.py [MODEL] [--eval-text FILE] [--calibration FILE ...] [--windows N]
                                [--solver NAME] [--mixes N] [--sampled] [--out DIR]

GGUF: five budgets between 3.3 and 5.0 bits per weight, each against the next larger of llama.cpp's
own mixes with importance matrix (``ggml_quantize_chunk``, as in peers.py). ONNX and Core ML: every
uniform grid by the same solver, against a budget of that grid's bytes, and against the best
quantizer of the format's own tools on the same grid. All are run in their runtimes on held-out
text. Random mixes measure how well the cost table predicts a divergence; ``--sampled`` mixes, of
the same budgets, the loss from a table that is measured as for a large model
(``compress.allocation.effort``). Writes DIR/budget.json and DIR/budget.md (default: benchmarks/).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import DEMO, build, overrides
from peers import PEERS, LlamaCpp, Peer

# Uses internal names: compares single cost tables with measurements of their choices.
import exporters  # noqa: F401 -- fills the table of formats
from compress.allocation import effort
from compress.allocation.step import BudgetStep, limit_for
from compress.calibration.step import CalibrationStep, Importance
from compress.checkpoint.checkpoint import Checkpoint
from compress.console import Console
from compress.plan.job import Job, prepare
from compress.plan.shapes import Artifact
from compress.recipe import load
from compress.verify.scorer import Scorer, read_text

BITS = (3.3, 3.7, 4.1, 4.5, 5.0)
LLAMA_MIXES = (
    "IQ3_XXS", "IQ3_XS", "Q3_K_S", "IQ3_S", "IQ3_M", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL",
    "Q4_K_S", "Q4_K_M", "Q5_K_S",
)  # fmt: skip
UNIFORM = (
    "ONNX int4-g128", "ONNX int4-g64", "ONNX int4-g32", "ONNX int4-g16",
    "Core ML lut3-g8", "Core ML lut4-g16", "Core ML lut4-g8", "Core ML int4-g64",
    "Core ML int4-g32",
)  # fmt: skip
BAR = 0.80


@dataclass(frozen=True)
class Entry:
    """One artifact.

    Attributes:
        group: entries of one group are compared: ``gguf``, or a uniform setting.
        kind: ``budget``, ``sampled`` (the same by a large model's table), ``fixed`` (ours,
            uniform), ``peer`` or ``random``.
        budget: bytes allowed; 0 where there is no budget.
        expected: KL by the cost table; None for what it has not chosen.
    """

    group: str
    name: str
    kind: str
    artifact: Artifact
    budget: int = 0
    expected: float | None = None
    seconds: float = 0.0


class Bench:
    """Builds the artifacts of one model.

    Attributes:
        entries: what was built.
        measuring: CPU seconds of the cost tables, by kind of entry.
    """

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        self.chosen, self.folder = chosen, folder
        self.checkpoint = Checkpoint.open(chosen.model)
        self.entries: list[Entry] = []
        self.measuring = {"budget": 0.0, "sampled": 0.0}

    def job(self, format: str, changes: Sequence[str]) -> Job:
        """A job as prepared by ``packlight build``."""
        texts = json.dumps(self.chosen.calibration or ["builtin"])
        common = [f"calibration.texts={texts}", f"verify.windows={self.chosen.windows}"]
        common.append(f"quantize.solver={self.chosen.solver}")
        recipe = load("phone-4bit", [*common, *changes], [format])
        return prepare(self.checkpoint, recipe, transforms={})

    def add(self, group: str, name: str, kind: str, job: Job, peer: type[Peer] | None = None,
            budget: int = 0) -> Artifact:  # fmt: skip
        """Build one artifact."""
        artifact, seconds = build(job, peer, self.folder / str(len(self.entries)))
        expected = job.plans[0].expected_divergence
        self.entries.append(Entry(group, name, kind, artifact, budget, expected, seconds))
        print(f"{group}: {name}, {artifact.nbytes:,} bytes", file=sys.stderr, flush=True)
        return artifact

    def step(self, format: str, changes: Sequence[str]) -> BudgetStep:
        """The budget of a job."""
        job = self.job(format, changes)
        calibration = CalibrationStep(job, Importance(), Console(), threads=1)
        return BudgetStep(calibration)

    def within(self, group: str, format: str, changes: Sequence[str], budget: int) -> None:
        """The artifact of a budget, if there is one so small; and the same from a sample, where
        that is asked for.
        """
        known = effort.LARGE
        self.allocate(group, "budget", format, changes, budget)
        if self.chosen.sampled:
            effort.LARGE = 0
            self.allocate(group, "sampled", format, changes, budget)
            effort.LARGE = known

    def allocate(
        self, group: str, kind: str, format: str, changes: Sequence[str], budget: int
    ) -> None:
        """The artifact of a budget by one cost table."""
        changes = [*changes, f"budget.weights={budget}"]
        step = self.step(format, changes)
        if step.targets[0].smallest_bytes > budget:
            return
        start = time.process_time()
        budgeted = step.allocate([limit_for(step.job, target) for target in step.targets])
        self.measuring[kind] += time.process_time() - start
        recipe = step.job.recipe
        settled = step.settle(
            budgeted,
            partial(prepare, self.checkpoint, recipe=recipe, transforms={}),
        )
        name = settled.plans[0].type_name
        self.add(group, name, kind, settled, budget=budget)

    def gguf(self) -> None:
        """Five budgets, and llama.cpp's mixes."""
        parameters = self.job("gguf", []).config.num_parameters
        for bits in BITS:
            self.within("gguf", "gguf", [], int(bits * parameters / 8))
        for mix in LLAMA_MIXES:
            # The peer's codes do not depend on the solver; its mixes depend on having an
            # importance.
            changes = [f"targets.gguf.type={mix}", "quantize.solver=scale_search"]
            self.add("gguf", mix, "peer", self.job("gguf", changes), LlamaCpp)

    def uniform(self, setting: str) -> None:
        """A uniform grid, the format's own tools on it, and a budget of its bytes."""
        format, changes = overrides(setting)
        made = self.add(setting, "uniform", "fixed", self.job(format, changes))
        for peer in PEERS[format, False]:
            self.add(setting, peer.name, "peer", self.job(format, changes), peer)
        # The grid of the recipe implies the hardware: palettes remain palettes.
        self.within(setting, format, changes, made.nbytes)

    def random_mixes(self) -> None:
        """Any grid for any tensor of at least three bits."""
        step = self.step("gguf", [f"budget.weights={10**15}"])
        (target,) = step.targets
        table = step.table
        rng = random.Random(0)
        for number in range(self.chosen.mixes):
            options = [
                rng.choice([i for i, o in enumerate(c.options) if o.grid not in ("Q2_K", "F16")])
                for c in target.choices
            ]
            costs = [
                target.options(c, table)[i].cost
                for c, i in zip(target.choices, options, strict=True)
            ]
            plan = replace(target.plan_of(options), expected_divergence=sum(costs))
            self.add("random", f"random {number}", "random", replace(step.job, plans=(plan,)))

    def score(self) -> list[dict[str, Any]]:
        """One row for each entry."""
        plans = tuple(entry.artifact.plan for entry in self.entries)
        everything = replace(self.job("gguf", []), plans=plans)
        scorer = Scorer(everything, read_text(self.chosen.eval_text), 1, Console())
        artifacts = [entry.artifact for entry in self.entries]
        scored = scorer.verify(artifacts, self.folder, keep_going=False)
        return [
            {
                "group": entry.group,
                "name": entry.name,
                "kind": entry.kind,
                "budget": entry.budget,
                "bytes": entry.artifact.nbytes,
                "bits_per_weight": round(
                    8 * entry.artifact.nbytes / everything.config.num_parameters, 3
                ),
                "expected_kl": None if entry.expected is None else float(f"{entry.expected:.4g}"),
                "kl_mean": round(found.quality.kl_mean.value, 6),
                "kl_mean_se": round(found.quality.kl_mean.se or 0.0, 6),
                "perplexity_ratio": round(found.quality.perplexity_ratio.value, 5),
                "top1_agreement": round(found.quality.top1_agreement.value, 4),
                "cpu_seconds": round(entry.seconds, 1),
            }
            for entry, found in zip(self.entries, scored, strict=True)
            if found is not None
        ]


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entry that each budget is compared with, and whether it is within the limit."""
    found = []
    for row in rows:
        if row["kind"] != "budget":
            continue
        others = [r for r in rows if r["group"] == row["group"] and r is not row]
        peers = [r for r in others if r["kind"] == "peer" and r["bytes"] >= row["bytes"]]
        if row["group"] == "gguf":
            rivals = sorted(peers, key=lambda r: (r["bytes"], r["kl_mean"]))[:1]
        else:
            rivals = [r for r in others if r["kind"] == "fixed"]
        for rival in rivals:
            share = row["kl_mean"] / rival["kl_mean"]
            found.append(
                {
                    "group": row["group"],
                    "budget": row["name"],
                    "rival": rival["name"],
                    "rival_bytes": rival["bytes"],
                    "of_rival": round(share, 3),
                    "of_peer": round(row["kl_mean"] / min(r["kl_mean"] for r in peers), 3)
                    if peers and row["group"] != "gguf"
                    else None,
                    "used": round(row["bytes"] / row["budget"], 5),
                    "passed": share <= BAR and 0.99 <= row["bytes"] / row["budget"] <= 1,
                }
            )
    return found


def agreement(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How well the expected divergences are those measured: correlation of logarithms, and the
    geometric mean of measured over expected.
    """
    pairs = [(r["expected_kl"], r["kl_mean"]) for r in rows if r["expected_kl"]]
    if not pairs:
        return {}
    logs = np.log(np.array(pairs))
    return {
        "artifacts": len(pairs),
        "correlation": round(float(np.corrcoef(logs.T)[0, 1]), 4),
        "measured_over_expected": round(float(math.exp((logs[:, 1] - logs[:, 0]).mean())), 3),
    }


def sampled(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """KL of the mixes that a sample chose over that of those that the full table chose, within the
    same budgets; and how well the sample's expectations agree.
    """
    full = {(r["group"], r["budget"]): r["kl_mean"] for r in rows if r["kind"] == "budget"}
    some = [row for row in rows if row["kind"] == "sampled"]
    logs = [math.log(row["kl_mean"] / full[row["group"], row["budget"]]) for row in some]
    return {
        **agreement(some),
        "over_full": {
            "geometric_mean": round(math.exp(float(np.mean(logs))), 3),
            "most": round(math.exp(max(logs)), 3),
        },
    }


def page(document: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| compared | artifact | bytes | bits per weight | expected KL | mean KL | perplexity "
        "ratio | top-1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        name = f"*{row['name']}*" if row["kind"] == "peer" else row["name"]
        name += " (sampled)" if row["kind"] == "sampled" else ""
        expected = "" if row["expected_kl"] is None else f"{row['expected_kl']:.4f}"
        lines.append(
            f"| {row['group']} | {name} | {row['bytes']:,} | {row['bits_per_weight']:.2f} "
            f"| {expected} | {row['kl_mean']:.5f} | {row['perplexity_ratio']:.4f} "
            f"| {100 * row['top1_agreement']:.1f} % |"
        )
    lines += [
        "",
        f"Bar: at most {BAR:.2f} of the mean KL of llama.cpp's next larger mix (GGUF), or of the "
        "uniform grid of the same bytes by the same solver.",
        "",
        "| compared | budget | used | against | of its KL | of the best tool's | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["bars"]:
        peer = "" if row["of_peer"] is None else f"{row['of_peer']:.2f}"
        lines.append(
            f"| {row['group']} | {row['budget']} | {100 * row['used']:.2f} % | {row['rival']} "
            f"({row['rival_bytes']:,}) | {row['of_rival']:.2f} | {peer} "
            f"| {'pass' if row['passed'] else '**fail**'} |"
        )
    told, some = document["agreement"], document.get("sampled")
    seconds = document["measuring_cpu_seconds"]
    lines += [
        "",
        f"Expected and measured KL of {told['artifacts']} mixes: their logarithms correlate by "
        f"{told['correlation']:.3f}; measured is {told['measured_over_expected']:.2f} of expected "
        "(geometric mean).",
        "",
        f"Solver: {document['solver']}. CPU seconds of the cost tables: {seconds['budget']}.",
    ]
    if some:
        over = some["over_full"]
        lines += [
            "",
            f"Chosen by a large model's table instead ({some['artifacts']} mixes, "
            f"{seconds['sampled']} CPU seconds): {over['geometric_mean']:.2f} of the KL of the "
            f"full table's mixes in the same budgets (geometric mean; at most {over['most']:.2f}); "
            f"correlation {some['correlation']:.3f}, measured over expected "
            f"{some['measured_over_expected']:.2f}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=DEMO)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--calibration", action="append")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--solver", default="gptq")
    parser.add_argument("--mixes", type=int, default=8)
    parser.add_argument("--sampled", action="store_true", help="also as large models are planned")
    parser.add_argument("--format", action="append", choices=("gguf", "onnx", "coreml"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        os.environ["PACKLIGHT_CACHE"] = folder
        bench = Bench(chosen, Path(folder))
        formats = chosen.format or ("gguf", "onnx", "coreml")
        if "gguf" in formats:
            bench.gguf()
            bench.random_mixes()
        for setting in UNIFORM:
            if overrides(setting)[0] in formats:
                bench.uniform(setting)
        rows = bench.score()
    document = {
        "model": "packlight-demo" if chosen.model == DEMO else Path(chosen.model).name,
        "solver": chosen.solver,
        "measuring_cpu_seconds": {k: round(v, 1) for k, v in bench.measuring.items()},
        "rows": rows,
        "bars": judge(rows),
        "agreement": agreement([row for row in rows if row["kind"] != "sampled"]),
        **({"sampled": sampled(rows)} if chosen.sampled else {}),
    }
    (chosen.out / "budget.json").write_text(json.dumps(document, indent=2) + "\n")
    (chosen.out / "budget.md").write_text(page(document))
    print(page(document))


if __name__ == "__main__":
    main()
