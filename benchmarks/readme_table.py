"""Updates the README's figures: runs `packlight demo` and one `build`, and inserts their output.

    python benchmarks/readme_table.py

The table and the session between the `demo:` and `build:` markers are replaced. Speeds and memory
are those of the machine that ran this; sizes and quality are checked by tests/test_readme.py.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A packlight command; its output is what the README shows."""
    return subprocess.run(
        [sys.executable, "-m", "compress", *words], cwd=cwd, capture_output=True, text=True
    )


def size(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def table(report: dict) -> str:
    """One row for the float model and one per artifact, as Markdown."""
    base = report["baseline"]
    rows = [
        "| | bytes | bits/weight | perplexity | KL to float | top-1 agreement | decode tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| float ({base['dtype'].lower()}) | {size(base['bytes'])} | 16.00 "
        f"| {base['perplexity']:.2f} | 0 | 100 % | {base['decode_tokens_per_second']:.0f} |",
    ]
    names = {"gguf": "GGUF", "onnx": "ONNX", "coreml": "Core ML"}
    for artifact in report["artifacts"]:
        change = (artifact["perplexity_ratio"] - 1) * 100
        error = artifact["perplexity_ratio_se"] * 100
        speed = f"{artifact['decode_tokens_per_second']:.0f}"
        if "evaluator" in artifact["runtime"]:
            speed += " (evaluator)"
        rows.append(
            f"| {names[artifact['format']]} {artifact['type']} | {size(artifact['bytes'])} "
            f"| {artifact['bits_per_weight']:.2f} "
            f"| {artifact['perplexity']:.2f} ({change:+.1f} ± {error:.1f} %) "
            f"| {artifact['kl_divergence']['mean']:.4f} | {artifact['top1_agreement'] * 100:.1f} % "
            f"| {speed} |"
        )
    tokens = base["tokens"]
    where = f"{platform.system()} {platform.machine()}"
    return "\n".join(rows) + (
        f"\n\n`packlight demo`: the bundled {report['model']['parameters'] / 1e6:.1f} M-parameter "
        f"Phi-3-architecture model, {tokens:,} held-out tokens; speeds on one {where} core. "
        "Small models lose more to rounding than large ones.\n"
    )


def between(text: str, name: str, content: str) -> str:
    """``text`` with the part between the markers of ``name`` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content.strip()}\n{end}{rest.split(end)[1]}"


def main() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        demo = run("demo", cwd=folder)
        if demo.returncode != 0:
            sys.exit(demo.stderr)
        report = json.loads((folder / "packlight-demo" / "report.json").read_text())
        readme = between(readme, "demo", table(report))
        shutil.copytree(ROOT / "compress" / "demo" / "model", folder / "my-checkpoint")
        build = run("build", "./my-checkpoint", "-o", "out", cwd=folder)
        if build.returncode != 0:
            sys.exit(build.stderr)
    session = f"$ packlight build ./my-checkpoint -o out\n{build.stdout}{build.stderr}"
    readme = between(readme, "build", f"```console\n{session.strip()}\n```")
    (ROOT / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
