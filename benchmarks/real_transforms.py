"""Measures `fold: awq` on a checkpoint with massive activations.

    python benchmarks/real_transforms.py CHECKPOINT [--only TEXT ...] [--tokens N] [--windows N]
                                         [--threads N] [--work DIR] [--out FILE]

CHECKPOINT is a folder, e.g. of SmolLM2-135M-Instruct (llama, tied embedding, residual stream up to
23,490). Each row is one ``packlight build``; its figures are those of the report, mean KL against
the float model on the built-in held-out text. Rows that are in OUT are not built again, so that an
interrupted run continues. Writes OUT (default: benchmarks/real_transforms.json) after
every row and prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDS = ("none", "awq")


@dataclass(frozen=True)
class Row:
    """One build: a setting (format and grids), a solver, and a fold of the weights.

    Attributes:
        setting: as the tables call it; its format's default grids.
        format: gguf or onnx.
        solver: scale_search or gptq.
        fold: none or awq.
    """

    setting: str
    format: str
    solver: str
    fold: str

    @property
    def name(self) -> str:
        """Of the row in the document."""
        return f"{self.setting}, {self.solver}, fold {self.fold}"

    def command(self, model: Path, chosen: argparse.Namespace, folder: Path) -> list[str]:
        """The ``packlight build`` that makes it."""
        settings = (
            f"quantize.solver={self.solver}",
            f"quantize.fold={self.fold}",
            f"calibration.tokens={chosen.tokens}",
            f"verify.windows={chosen.windows}",
        )
        words = [sys.executable, "-m", "compress", "build", str(model), "-f", self.format, "--json"]
        words += ["-o", str(folder / "built"), "--keep-baseline", str(chosen.work / "baseline")]
        words += ["--threads", str(chosen.threads)]
        return words + [word for setting in settings for word in ("--set", setting)]


def all_rows() -> list[Row]:
    """Every build, in the order of the table."""
    return [
        Row(setting, name, solver, fold)
        for solver in ("gptq", "scale_search")
        for setting, name in (("ONNX int4-g32", "onnx"), ("GGUF Q4_K_M", "gguf"))
        for fold in FOLDS
    ]


def measure(row: Row, chosen: argparse.Namespace) -> dict[str, Any]:
    """Build a row and take its figures from the report.

    Raises:
        SystemExit: the build could not run; a failed gate is no reason to stop.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(chosen.threads)}
    with tempfile.TemporaryDirectory(prefix="packlight-", dir=chosen.work) as folder:
        command = row.command(chosen.model, chosen, Path(folder))
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode > 1:
        raise SystemExit(f"{row.name}: {done.stderr.strip()[-800:]}")
    return figures(row, json.loads(done.stdout))


def figures(row: Row, report: dict[str, Any]) -> dict[str, Any]:
    """The document's figures of a report."""
    (artifact,) = report["artifacts"]
    types: dict[str, int] = {}
    for tensor in artifact["tensors"]:
        types[tensor["grid"]] = types.get(tensor["grid"], 0) + 1
    kl, series = artifact["kl_divergence"], artifact["kl_along_text"]
    return {
        "row": row.name,
        "setting": row.setting,
        "solver": row.solver,
        "fold": row.fold,
        "bytes": artifact["bytes"],
        "types": types,
        "kl_mean": kl["mean"],
        "kl_mean_se": kl["se"],
        "kl_p99": kl["p99"],
        "perplexity_ratio": artifact["perplexity_ratio"],
        "top1_agreement": artifact["top1_agreement"],
        "baseline_perplexity": report["baseline"]["perplexity"],
        "scored_tokens": report["baseline"]["tokens"],
        "windows": report["baseline"]["windows"],
        "calibration_tokens": report["recipe"]["calibration"]["tokens"],
        "kl_along_text": [round(value, 5) for value in series["mean"]],
    }


def difference(row: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """Mean KL less that of another row on the same text, and the standard error of that.

    The text's own difficulty cancels: the error is over as many parts of the text as it has
    windows, of the differences in each.
    """
    apart = np.array(row["kl_along_text"]) - np.array(base["kl_along_text"])
    parts = np.array([part.mean() for part in np.array_split(apart, row["windows"])])
    return row["kl_mean"] - base["kl_mean"], float(parts.std(ddof=1) / math.sqrt(len(parts)))


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: a line per row, beside the same setting and solver without the fold."""
    found = list(rows)
    titles = ("setting", "solver", "fold", "bytes", "mean KL", "share", "difference", "top-1")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in sorted(found, key=place):
        same = ("setting", "solver")
        base = [b for b in found if b["fold"] == "none" and all(b[k] == row[k] for k in same)]
        cells = [row["setting"], row["solver"], row["fold"]]
        cells += [f"{row['bytes']:,}", f"{row['kl_mean']:.4f} ± {row['kl_mean_se']:.4f}"]
        if base and row["fold"] != "none":
            apart, error = difference(row, base[0])
            cells += [f"{row['kl_mean'] / base[0]['kl_mean']:.2f}", f"{apart:+.4f} ± {error:.4f}"]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} | {100 * row['top1_agreement']:.1f} % |")
    return "\n".join(lines) + "\n"


def place(row: dict[str, Any]) -> int:
    """Sort key of a row: by setting, without the fold first."""
    settings = list(dict.fromkeys((r.setting, r.solver) for r in all_rows()))
    return settings.index((row["setting"], row["solver"])) * len(FOLDS) + FOLDS.index(row["fold"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", action="append", help="rows whose names hold this text")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, scored")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"model": chosen.model.resolve().name, "rows": []}
    if chosen.out.exists():
        document = json.loads(chosen.out.read_text())
    for row in all_rows():
        if chosen.only and not any(text in row.name for text in chosen.only):
            continue
        if row.name in {found["row"] for found in document["rows"]}:
            continue
        found = measure(row, chosen)
        document["rows"].append(found)
        chosen.out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{row.name}: {found['kl_mean']:.4f} ± {found['kl_mean_se']:.4f}", flush=True)
    print(table(document["rows"]))


if __name__ == "__main__":
    main()
