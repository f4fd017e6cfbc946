"""MLX folders of packlight and of mlx-lm, on one model, one text, in one scorer.

``PACKLIGHT_MLX_PYTHON=PYTHON python benchmarks/mlx.py MODEL WORK --name NAME`` adds NAME's rows to
mlx.json and writes mlx.md. Every folder is scored by ``packlight verify``: mlx-lm's code on some
tokens, the decoded weights on the windows. ``--peers`` also runs mlx-lm's own quantizers with
calibration (dynamic_quant, gptq, awq, dwq), on packlight's built-in texts: theirs are on the
network.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
FIGURES, PAGE = HERE.with_suffix(".json"), HERE.with_suffix(".md")
# Ours: label → recipe and overrides.
OURS = {
    "rtn 4 bits g64": ("int4-fast", ["targets.mlx.embedding_bits=4"]),
    "scale_search 4 bits g64": ("int4-balanced", ["targets.mlx.embedding_bits=4"]),
    "gptq 4 bits g64": ("phone-4bit", ["targets.mlx.embedding_bits=4"]),
    "gptq, the default's 8-bit tied embedding": ("phone-4bit", []),
    "gptq mxfp4": ("phone-4bit", ["targets.mlx.mode=mxfp4", "targets.mlx.embedding_bits=4"]),
    "gptq 4 bits g128": (
        "phone-4bit", ["targets.mlx.group_size=128", "targets.mlx.embedding_bits=4"],
    ),
}  # fmt: skip
# mlx_lm.convert: label → its options.
THEIRS = {
    "mlx_lm.convert 4 bits g64": ["--q-bits", "4", "--q-group-size", "64"],
    "mlx_lm.convert 4 bits g32": ["--q-bits", "4", "--q-group-size", "32"],
    "mlx_lm.convert 3 bits g64": ["--q-bits", "3", "--q-group-size", "64"],
    "mlx_lm.convert mxfp4": ["--q-mode", "mxfp4"],
}
# Ours at the bytes of one of theirs: label → whose.
EQUAL = {
    "gptq, budget of convert's 4 bits g64": "mlx_lm.convert 4 bits g64",
    "gptq, budget of convert's 4 bits g32": "mlx_lm.convert 4 bits g32",
    "gptq, budget of convert's 3 bits g64": "mlx_lm.convert 3 bits g64",
    "gptq, budget of dynamic_quant's": "mlx_lm.dynamic_quant",
}
# dwq with its data set replaced: 512 passages to train on, 32 to validate.
DWQ = """
import numpy as np
from pathlib import Path
from mlx_lm.quant import dwq

def load_data(tokenizer, data_path, num_samples, max_seq_length, num_valid_samples=32):
    ids = tokenizer.encode(Path(data_path).read_text(encoding="utf-8"))
    starts = np.random.permutation(range(0, len(ids) - max_seq_length, max_seq_length))
    pieces = [(ids[start : start + max_seq_length], 0) for start in starts]
    return pieces[num_valid_samples:][:num_samples], pieces[:num_valid_samples]

dwq.load_data = load_data
dwq.main()
"""
TEXTS = "{texts}"  # the place of the calibration texts
PEERS = {
    "mlx_lm.dynamic_quant": ["-m", "mlx_lm", "dynamic_quant"],
    "mlx_lm.gptq": ["-m", "mlx_lm", "gptq"],
    "mlx_lm.awq": ["-m", "mlx_lm", "awq"],
    "mlx_lm.dwq 4 bits g64": [
        "-c", DWQ, "--data-path", TEXTS, "--num-samples", "512", "--max-seq-length", "257",
    ],
}  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--only", default="", help="rows whose label has this text")
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    figures = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    rows: dict[str, dict[str, Any]] = figures.setdefault(options.name, {})

    def keep(label: str, folder: Path, seconds: float) -> None:
        row = scored(folder, options.model, options.windows)
        rows[label] = row | {"cpu_seconds": round(seconds, 1)}
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        print(label, rows[label], flush=True)
        PAGE.write_text(page(figures))

    for label, arguments in (*THEIRS.items(), *(PEERS.items() if options.peers else ())):
        if options.only in label:
            folder = fresh(options.work / label.replace(" ", "-"))
            keep(label, folder, theirs(label, arguments, options.model, folder, options.work))
    for label, (recipe, overrides) in OURS.items():
        if options.only in label:
            folder = fresh(options.work / label.replace(" ", "-"))
            keep(label, folder / "mlx", ours(options.model, folder, recipe, overrides))
    for label, whose in EQUAL.items():
        if options.only in label and whose in rows:
            folder = fresh(options.work / label.replace(" ", "-"))
            budget = ["--budget", f"{rows[whose]['bytes']}B"]
            keep(label, folder / "mlx", ours(options.model, folder, "phone-4bit", [], budget))


def fresh(folder: Path) -> Path:
    """A path where nothing is."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def cpu(command: list[str], **keywords: Any) -> float:
    """Run a command; its CPU seconds with those of its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, **keywords)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(
    model: str, folder: Path, recipe: str, overrides: list[str], more: list[str] | None = None
) -> float:
    """Build; CPU seconds."""
    command = [sys.executable, "-m", "compress", "build", model, "-r", recipe, "-f", "mlx", "-q"]
    command += [word for override in overrides for word in ("--set", override)]
    return cpu([*command, *(more or []), "--no-verify", "-o", str(folder)])


def theirs(label: str, arguments: list[str], model: str, folder: Path, work: Path) -> float:
    """Run one of mlx-lm's quantizers in its own Python; CPU seconds."""
    python = os.environ["PACKLIGHT_MLX_PYTHON"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if not label.startswith("mlx_lm.convert"):
        home = work / "home"
        texts = sorted((HERE.parents[1] / "compress" / "calibration" / "builtin").glob("*.txt"))
        place = home / ".cache" / "mlx-lm" / "calibration_v5.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("\n".join(text.read_text(encoding="utf-8") for text in texts))
        environment["HOME"] = str(home)
        words = [str(place) if word == TEXTS else word for word in arguments]
        command = [python, *words, "--model", model, "--mlx-path", str(folder)]
        return cpu(command, env=environment)
    command = [python, "-m", "mlx_lm", "convert", "--hf-path", model, "-q", *arguments]
    return cpu([*command, "--mlx-path", str(folder)], env=environment)


def scored(folder: Path, model: str, windows: int) -> dict[str, Any]:
    """Figures of ``packlight verify``."""
    command = [sys.executable, "-m", "compress", "verify", str(folder), "--baseline", model]
    done = subprocess.run(
        [*command, "--windows", str(windows), "--json"], check=False, capture_output=True, text=True
    )
    try:
        found = json.loads(done.stdout)["artifacts"][0]
    except (ValueError, KeyError):
        raise SystemExit(done.stdout + done.stderr) from None
    return {
        "bytes": found["bytes"],
        "bits_per_weight": round(found["bits_per_weight"], 2),
        "kl": found["kl_divergence"]["mean"],
        "perplexity_ratio": found["perplexity_ratio"],
        "top1": found["top1_agreement"],
        "runtime": found["runtime"],
    }


def page(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The text of mlx.md."""
    lines = [
        "# MLX: packlight and mlx-lm",
        "",
        "<!-- Made by benchmarks/mlx.py. -->",
        "",
        "Every folder is scored by `packlight verify`: mlx-lm's own code computes some tokens, in",
        "one call and cached, and must agree with the reference decoder; the decoded weights are",
        "scored on windows. KL in nats per token from the float model; *÷ convert*: over that of",
        "`mlx_lm.convert` with the most bytes that are not more.",
    ]
    for name, rows in figures.items():
        lines += [
            "",
            f"## {name}",
            "",
            "| | bytes | bits per weight | KL | ÷ convert | top-1 | CPU s |",
        ]
        lines += ["|---|---:|---:|---:|---:|---:|---:|"]
        converts = [row for label, row in rows.items() if label.startswith("mlx_lm.convert")]
        for label, row in sorted(rows.items(), key=lambda item: item[1]["bytes"]):
            # A budget's file is some bytes smaller than the one whose size it got.
            fitting = [c for c in converts if c["bytes"] <= row["bytes"] * 1.01]
            best = min((c["kl"] for c in fitting), default=None)
            ratio = f"{row['kl'] / best:.2f}" if best else "–"
            lines.append(
                f"| {label} | {row['bytes']:,} | {row['bits_per_weight']:.2f} | {row['kl']:.4f} "
                f"| {ratio} | {100 * row['top1']:.1f} % | {row['cpu_seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
