"""Measures what a developer for iPhones gets: Core ML, Core AI and MLX, built and verified.

    python benchmarks/apple.py SmolLM2-135M-Instruct --windows 4
    python benchmarks/apple.py SmolLM2-135M-Instruct --agreement
    python benchmarks/make_checkpoint.py phi-3-mini-4k --layers 4 -o phi-3-4-layers
    python benchmarks/apple.py phi-3-4-layers --windows 2 --length 64 --solver rtn
    python benchmarks/apple.py phi-3-mini-4k --windows 1 --length 64 --only coreai:rtn,coreml:rtn

Each artifact is built and verified in processes of its own. CPU seconds are those of a process and
its children; where the machine is busy, they wander by some 20 %. Rows are added to ``apple.json``,
and ``apple.md`` is made from it. MLX's rows need ``PACKLIGHT_MLX_PYTHON``, a Python that has
mlx-lm. ``--agreement`` compares the float16 weights of a bundle in Core AI's runtime with
transformers. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FIGURES, PAGE = HERE / "apple.json", HERE / "apple.md"
ANONYMOUS = re.compile(r"RssAnon:\s*(\d+) kB")
COMMAND = (sys.executable, "-m", "compress")
RTN, GPTQ, THEIRS = "int4-fast", "phone-4bit", "mlx_lm.convert"
PYTHON = "PACKLIGHT_MLX_PYTHON"


@dataclass(frozen=True)
class Case:
    """A row.

    Attributes:
        format: of the artifact.
        recipe: of the build; or ``mlx_lm.convert``.
        settings: of the target.
        options: of the build.
    """

    format: str
    recipe: str
    settings: Mapping[str, object] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    @property
    def solver(self) -> str:
        return {RTN: "rtn", GPTQ: "gptq"}.get(self.recipe, self.recipe)

    @property
    def label(self) -> str:
        """``coreai:rtn:int4-g32``, for ``--only``."""
        return ":".join([self.format, self.solver, *map(str, self.settings.values())])


CASES = (
    Case("coreml", RTN),
    Case("coreml", GPTQ),
    Case("coreai", RTN),
    Case("coreai", GPTQ),
    Case("coreai", GPTQ, {"grid": "lut4-g32"}),
    Case("coreai", RTN, {"grid": "int8-channel"}),
    Case("coreai", RTN, {"grid": "F16"}),
    Case("mlx", RTN),
    Case("mlx", GPTQ),
    Case("mlx", THEIRS),
)

HEAD = """\
# Core ML, Core AI and MLX, built and verified

Written by `benchmarks/apple.py`, on one core of {cpu}. *rtn*: weights rounded to nearest
(`int4-fast`); *gptq*: calibrated (`phone-4bit`); MB are 10⁶ bytes; *build* is CPU seconds to read,
calibrate, quantize and write; *anonymous* the most memory that it held, without pages of files;
*verify* the CPU seconds of the float model, of loading and timing the artifact, of its greedy
sample and of the windows; *memory* the peak of the process that ran it. Nothing ran on Apple's
hardware: Core ML's programs ran in packlight's evaluator, with float16 rounding, Core AI's in
Apple's CPU runtime, as float32 twins, MLX's folders in mlx-lm on some tokens and in the reference
decoder on the windows.

"""
COLUMNS = (
    "model", "artifact", "solver", "MB", "build CPU s", "anonymous MB", "windows", "KL",
    "perplexity", "top-1", "verify CPU s", "memory MB",
)  # fmt: skip


def run(command: Sequence[object]) -> tuple[str, float, float]:
    """Stdout, CPU seconds and peak anonymous megabytes of a command."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*map(str, command)], stdout=output, env={**os.environ, "NO_COLOR": "1"}
        )
        peak = 0
        while True:
            done, status, used = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            found = ANONYMOUS.search(Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(found[1]) if found else 0)
            time.sleep(0.02)
        output.seek(0)
        text = output.read()
    if status not in (0, 256):  # 1: a gate failed
        raise SystemExit(f"{command}: status {status}")
    return text, used.ru_utime + used.ru_stime, peak * 1024 / 1e6


def written(model: Path, case: Case, out: Path) -> tuple[float, float]:
    """Build; CPU seconds and anonymous megabytes."""
    if case.recipe == THEIRS:
        words = ["-m", "mlx_lm", "convert", "--hf-path", model, "-q", "--mlx-path", out]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = ["env", "-i", *(f"{key}={value}" for key, value in environment.items())]
        _, seconds, peak = run([*command, environment[PYTHON], *words])
        return seconds, peak
    overrides = [
        word
        for key, value in case.settings.items()
        for word in ("--set", f"targets.{case.format}.{key}={value}")
    ]
    _, seconds, peak = run(
        [*COMMAND, "build", model, "-r", case.recipe, "-f", case.format, "-o", out, "--no-verify",
         "-q", *overrides, *case.options, "--threads", 1]
    )  # fmt: skip
    return seconds, peak


def measure(model: Path, case: Case, windows: int, length: int) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        seconds, peak = written(model, case, out)
        text, verifying, _ = run(
            [*COMMAND, "verify", out, "--baseline", model, "--windows", windows,
             "--sequence-length", length, "--threads", 1, "--json"]
        )  # fmt: skip
        (artifact,) = json.loads(text)["artifacts"]
    return {
        "model": model.name,
        "case": case.label,
        "artifact": f"{case.format} {artifact['type']}",
        "solver": case.solver,
        "bytes": artifact["bytes"],
        "build_cpu_seconds": round(seconds, 1),
        "build_anonymous_mb": round(peak, 1),
        "windows": f"{windows} × {length}",
        "kl": artifact["kl_divergence"]["mean"],
        "perplexity": artifact["perplexity"],
        "top1": artifact["top1_agreement"],
        "verify_cpu_seconds": round(verifying, 1),
        "memory_mb": artifact["peak_memory_bytes"] / 1e6,
        "runtime": artifact["runtime"],
    }


def agreement(model: Path, length: int) -> dict[str, Any]:
    """Logits of an F16 bundle in Core AI's runtime, in float32, and those of transformers."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    import exporters  # noqa: F401 -- fills the table of formats
    from compress.decoder.tokenizer import Tokenizer
    from compress.demo import heldout_path
    from compress.formats import get_format
    from compress.verify.baseline import log_softmax

    torch.set_num_threads(1)
    tokens = Tokenizer(model).encode(heldout_path().read_text("utf-8"))[:length]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        written(model, Case("coreai", RTN, {"grid": "F16"}), out)
        runtime = get_format("coreai").open_runtime(out / "coreai", context=length, threads=1)
        found = runtime.logits(tokens)
        name = runtime.name
        runtime.close()
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        expected = theirs(torch.tensor([tokens])).logits[0].numpy()
    before, after = log_softmax(expected), log_softmax(found)
    return {
        "model": model.name,
        "runtime": name,
        "tokens": len(tokens),
        "kl": float((np.exp(before) * (before - after)).sum(axis=1).mean()),
        "largest": float(np.abs(found - expected).max()),
        "top1": float((found.argmax(1) == expected.argmax(1)).mean()),
    }


def page(figures: Mapping[str, Any]) -> str:
    """The tables."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    order = {case.label: place for place, case in enumerate(CASES)}
    rows = sorted(
        figures["rows"], key=lambda row: (row["model"] != "SmolLM2-135M-Instruct", row["model"],
                                          order.get(row["case"], len(order)))
    )  # fmt: skip
    lines = [
        f"|{row['model']} | {row['artifact']} | {row['solver']} | {row['bytes'] / 1e6:.1f} | "
        f"{row['build_cpu_seconds']:.1f} | {row['build_anonymous_mb']:.0f} | {row['windows']} | "
        f"{row['kl']:.2g} | {row['perplexity']:.2f} | {row['top1']:.1%} | "
        f"{row['verify_cpu_seconds']:.0f} | {row['memory_mb']:.0f}|\n"
        for row in rows
    ]
    head = HEAD.format(cpu=found[1] if found else "this machine")
    titles = f"|{' | '.join(COLUMNS)}|\n|---|---|---{'|--:' * 3}|---{'|--:' * 5}|\n"
    text = head + titles + "".join(lines)
    runtimes = dict.fromkeys(row["runtime"] for row in rows)
    text += "\nRun in:\n\n" + "".join(f"- {name}\n" for name in runtimes)
    for each in figures.get("agreement", ()):
        text += (
            f"\n{each['runtime']} and transformers, float32, {each['model']} with float16 weights, "
            f"{each['tokens']} tokens in one call: KL divergence {each['kl']:.1g} nats, largest "
            f"difference of a logit {each['largest']:.1g}, top-1 {each['top1']:.1%}.\n"
        )
    mlx = json.loads((HERE / "mlx.json").read_text()).get("SmolLM2-135M", {})
    text += "\nMLX, SmolLM2-135M, by benchmarks/mlx.py on 8 windows of 512 tokens:\n\n"
    text += "| | MB | CPU s | KL | top-1 |\n|---|--:|--:|--:|--:|\n"
    for label, row in sorted(mlx.items(), key=lambda item: item[1]["kl"]):
        text += f"| {label} | {row['bytes'] / 1e6:.1f} | {row['cpu_seconds']:.0f} "
        text += f"| {row['kl']:.2g} | {row['top1']:.1%} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--solver", default="", help="rtn, gptq or mlx_lm.convert; default: all")
    parser.add_argument("--only", default="", help="labels, comma-separated")
    parser.add_argument("--agreement", action="store_true", help="with transformers, nothing else")
    options = parser.parse_args()
    figures = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {"rows": []}

    def keep(key: str, row: dict[str, Any], *same: str) -> None:
        print(json.dumps(row), flush=True)
        others = [old for old in figures.get(key, ()) if any(old[k] != row[k] for k in same)]
        figures[key] = [*others, row]
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        PAGE.write_text(page(figures))

    for model in options.models:
        if options.agreement:
            keep("agreement", agreement(model, options.length), "model")
            continue
        for case in CASES:
            if options.solver and case.solver != options.solver:
                continue
            if not options.only or case.label in options.only.split(","):
                row = measure(model, case, options.windows, options.length)
                keep("rows", row, "model", "case", "windows")


if __name__ == "__main__":
    main()
