"""Updates the README's figures: runs `packlight demo` and one `build`, and inserts their output.

    python benchmarks/readme_table.py [--figures]

The table and the session between the `demo:` and `build:` markers are replaced. Speeds and memory
are those of the machine that ran this; sizes and quality are checked by tests/test_readme.py. The
text between the markers `real:` and `recipes:` comes from full_size.json and accuracy.json;
`--figures` renews only this, and runs nothing.
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


def rows_of_phi3() -> dict[str, dict]:
    """The rows of full_size.json for Phi-3-mini's shape."""
    document = json.loads((ROOT / "benchmarks" / "full_size.json").read_text())
    rows: dict[str, dict] = document["families"]["phi-3-mini-4k"]["rows"]
    return rows


def real() -> str:
    """What the README's first command takes: time, disk, memory."""
    rows = rows_of_phi3()
    fast, verified = rows["gguf:Q4_K_M"], rows["verify:gguf"]
    read = rows["read"]["from_disk"] / 1e9
    return (
        f"{read:.1f} GB come from the Hub, {fast['bytes'] / 1e9:.1f} GB are written. Calibrated, "
        "the default, takes one to two CPU hours and 2.3 GB of memory\n"
        "([docs/performance.md](docs/performance.md)); `-r int4-fast` rounds instead: "
        f"{fast['cpu_seconds']:.0f} CPU seconds ({fast['wall_seconds']:.0f} s on two cores)\n"
        f"and {fast['peak_resident'] / 1e9:.2f} GB. "
        "Running the file and the float model to compare them takes "
        f"{verified['wall_seconds']:.0f} s more, and\n"
        f"{verified['peak_resident'] / 1e9:.1f} GB, most of it llama.cpp's."
    )


# Recipe; row of full_size.json with its bytes; CPU time, or the row that has it; setting and solver
# of accuracy.json with its KL divergence; for whom.
RECIPES = (
    ("int4-fast", "gguf:Q4_K_M", "gguf:Q4_K_M", "GGUF Q4_K_M", "rtn",
     "a first look; CI of every commit"),
    ("int4-balanced", "gguf:Q4_K_M", "calibrated", "GGUF Q4_K_M", "scale_search",
     "where an hour is too long"),
    ("phone-4bit", "gguf:Q4_K_M", "1 to 2 h", "GGUF Q4_K_M", "gptq",
     "what you publish; the default"),
    ("small-4bit", "gguf:IQ4_XS", "1 to 2 h", "GGUF IQ4_XS", "gptq", "a tenth fewer bytes"),
    ("phone-1.8GiB", 1_932_735_283, "1 to 2 h", "", "", "a hard limit in bytes"),
    ("phi3-mini-iphone", 2_150_360_384, "1 to 2 h", "Core ML int4-g32", "gptq",
     "iPhones: Core ML for the GPU, 1024 positions"),
)  # fmt: skip


def recipes() -> str:
    """The table that chooses a recipe, as Markdown."""
    rows = rows_of_phi3()
    quality = {
        (row["setting"], row["solver"]): row["kl_mean"]
        for row in json.loads((ROOT / "benchmarks" / "accuracy.json").read_text())["rows"]
    }
    lines = [
        "| recipe | Phi-3-mini | CPU time | KL | for |",
        "|---|---:|---:|---:|---|",
    ]
    for name, place, time, setting, solver, whom in RECIPES:
        nbytes = place if isinstance(place, int) else rows[place]["bytes"]
        if time in rows:
            seconds = rows[time]["cpu_seconds"]
            time = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        kl = f"{quality[setting, solver]:.4f}" if setting else "–"
        lines.append(f"| `{name}` | {nbytes / 1e9:.2f} GB | {time} | {kl} | {whom} |")
    return "\n".join(lines) + (
        "\n\nSize of Phi-3-mini's GGUF file (Core ML package for `phi3-mini-iphone`); KL of the "
        "small bundled model, which loses more\nthan large ones. `near-lossless-8bit` is half of "
        "bf16 with the float model's quality.\n"
    )


def between(text: str, name: str, content: str) -> str:
    """``text`` with the part between the markers of ``name`` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content.strip()}\n{end}{rest.split(end)[1]}"


def main() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = between(between(readme, "real", real()), "recipes", recipes())
    if "--figures" in sys.argv[1:]:
        (ROOT / "README.md").write_text(readme, encoding="utf-8")
        return
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
