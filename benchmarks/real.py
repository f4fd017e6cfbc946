"""Every shipped recipe on a real checkpoint, format by format: bytes, quality, CPU seconds.

    python benchmarks/real.py CHECKPOINT [--recipe NAME ...] [--bits N ...] [-f FORMAT ...]
                              [--windows N] [--work DIR] [--out FILE]

CHECKPOINT is a folder, e.g. of SmolLM2-135M-Instruct. A row is ``packlight build --no-verify`` and
then ``packlight verify`` of its artifact, each in a process of its own on one thread; input
statistics and the float model's answers are cached in DIR, so that the first row that needs them
pays. ``--bits 4.5``: rows with a budget of so many bits per weight, planned first. Every artifact,
and the float model, answers ``QUESTIONS`` greedily, through the model's chat template where it has
one. Rows that are in FILE (default: benchmarks/real.json) are not built again, so that an
interrupted run continues; FILE's sibling ``.md`` has the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Uses internal names: lets artifacts and the float model answer questions.
import exporters  # noqa: F401 -- fills the table of formats
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.decoder import Decoder
from compress.formats import get_format
from compress.harness.answers import Prompt, generate
from compress.plan.job import describe_model
from compress.plan.shapes import Runtime

FORMATS = ("gguf", "onnx", "coreml")
RECIPES = ("int4-fast", "int4-balanced", "phone-4bit", "small-4bit", "near-lossless-8bit")
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Why is the sky blue? Answer in one sentence.",
)
MOST = 32  # tokens of an answer
FLOAT = "float model"
INTRODUCTION = """\
`python benchmarks/real.py CHECKPOINT`: recipes on real checkpoints, every artifact written, run in
its runtime and compared with the float model; `N bits` is `phone-4bit` with a budget of so many
bits per weight. `smollm2-s05` is SmolLM2-135M-Instruct whose weights, dequantized from a Q4_1 file,
were moved at random by up to a quarter of its step, so that no grid finds its own codes;
`gemma3-270m` is made from a Q4_K_M file, and scored on two windows. CPU seconds are of one thread
on a shared machine; the first row that needs input statistics, or the float model's answers, pays
for them.
"""


def run(words: Sequence[str], work: Path) -> tuple[dict[str, Any], float]:
    """The JSON that a ``packlight`` command prints, and its CPU seconds.

    Raises:
        SystemExit: it could not run; a failed gate is no reason to stop.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PACKLIGHT_CACHE": str(work / "cache")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "compress", *words, "--threads", "1", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode > 1:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()[-800:]}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout), seconds


def measure(
    model: Path, recipe: str, form: str, bits: float, chosen: argparse.Namespace
) -> dict[str, Any]:
    """One row.

    Args:
        bits: per weight, of a budget; 0: the recipe's own grids.
    """
    budget = []
    if bits:
        budget = ["--budget", f"{int(bits * parameters(model, chosen.work) / 8)}B"]
    with tempfile.TemporaryDirectory(prefix="packlight-", dir=chosen.work) as folder:
        out = str(Path(folder) / "out")
        words = ["build", str(model), "-r", recipe, "-f", form, "-o", out, *budget]
        planning = run([*words, "--dry-run"], chosen.work)[1] if budget else 0.0
        built, writing = run([*words, "--no-verify"], chosen.work)
        (artifact,) = built["artifacts"]
        words = ["verify", out, "--baseline", str(model), "--windows", str(chosen.windows)]
        verified, verifying = run(words, chosen.work)
        path = Path(out) / artifact["path"]
        runtime = get_format(form).open_runtime(path, context=256, threads=1)
        answered = answers(chosen.model, runtime)
        runtime.close()
    (found,) = verified["artifacts"]
    return {
        "recipe": f"{recipe}, {bits:g} bits" if bits else recipe,
        "format": form,
        "type": artifact["type"],
        "bytes": artifact["bytes"],
        "bits_per_weight": round(8 * artifact["bytes"] / built["model"]["parameters"], 3),
        "perplexity_ratio": round(found["perplexity_ratio"], 4),
        "kl_mean": found["kl_divergence"]["mean"],
        "kl_mean_se": found["kl_divergence"]["se"],
        "top1_agreement": found["top1_agreement"],
        "planning_cpu_seconds": round(planning, 1),
        "writing_cpu_seconds": round(writing, 1),
        "verifying_cpu_seconds": round(verifying, 1),
        "baseline_perplexity": verified["baseline"]["perplexity"],
        "scored_tokens": verified["baseline"]["tokens"],
        "gates": recipe_gates(built, found),
        "answers": answered,
    }


def answers(model: Path, runtime: Runtime | None = None) -> list[str]:
    """Greedy answers to ``QUESTIONS``, of an artifact or of the float model."""
    checkpoint = Checkpoint.open(model)
    tokenizer, ends = checkpoint.tokenizer, checkpoint.generation_config.get("eos_token_id")
    if runtime is None:
        stored = Stored(checkpoint, describe_model(checkpoint))
        runtime = Decoder(stored.config, stored.read, threads=1, resident=True)
    prompts = []
    for question in QUESTIONS:
        text = f"Question: {question}\nAnswer:"
        if tokenizer.has_chat_template:
            text = tokenizer.render_chat([{"role": "user", "content": question}])
        prompts.append(Prompt(list(tokenizer.encode(text)), MOST, []))
    stops = set(ends) if isinstance(ends, list) else {ends}
    made = generate(prompts, runtime, stops, tokenizer.decode)
    return [tokenizer.decode([t for t in each if t not in stops]).strip() for each in made]


def parameters(model: Path, work: Path) -> int:
    """The checkpoint's number of parameters."""
    planned, _ = run(["build", str(model), "-r", "int4-fast", "-f", "gguf", "--dry-run"], work)
    return int(planned["model"]["parameters"])


def recipe_gates(built: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The recipe's own gates that the artifact fails, by metric."""
    values = {
        "perplexity_ratio": found["perplexity_ratio"],
        "kl_divergence": found["kl_divergence"]["mean"],
        "top1_agreement": found["top1_agreement"],
    }
    failed = []
    for name, limit in built["recipe"]["verify"]["gates"].items():
        bound = float(limit[2:])
        if name in values and (values[name] > bound if limit[0] == "<" else values[name] < bound):
            failed.append(name)
    return failed


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per row."""
    titles = (
        "recipe", "format", "type", "bytes", "bits per weight", "mean KL", "perplexity ratio",
        "top-1", "CPU s: planning", "writing", "verifying", "own gates",
    )  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [
            row["recipe"], row["format"], row["type"], f"{row['bytes']:,}",
            f"{row['bits_per_weight']:.2f}", f"{row['kl_mean']:.4f} ± {row['kl_mean_se']:.4f}",
            f"{row['perplexity_ratio']:.3f}", f"{100 * row['top1_agreement']:.1f} %",
            f"{row['planning_cpu_seconds']:.0f}" if row.get("planning_cpu_seconds") else "",
            f"{row['writing_cpu_seconds']:.0f}", f"{row['verifying_cpu_seconds']:.0f}",
            "fails " + ", ".join(row["gates"]) if row["gates"] else "pass",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def said(entry: dict[str, Any]) -> str:
    """Markdown: the answers of the float model, then of each row."""
    titles = ("artifact", *QUESTIONS)
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    known = [(FLOAT, entry["answers"])]
    known += [(f"{row['recipe']}, {row['format']}", row["answers"]) for row in entry["rows"]]
    for name, texts in known:
        plain = (text.replace("|", "\\|").replace("\n", " ⏎ ") for text in texts)
        lines.append(f"| {name} | {' | '.join(plain)} |")
    return "\n".join(lines) + "\n"


def page(document: dict[str, Any]) -> str:
    """Markdown: a section for each checkpoint."""
    sections = [INTRODUCTION]
    for name, entry in document.items():
        (first, *_) = entry["rows"]
        scored = f"{first['scored_tokens']:,} scored tokens"
        told = f"Float perplexity {first['baseline_perplexity']:.2f} on {scored}."
        sections.append(f"## {name}\n\n{told}\n\n{table(entry['rows'])}\n{said(entry)}")
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--bits", action="append", type=float, default=[])
    parser.add_argument("-f", "--format", action="append", default=[])
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, scored")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {}
    if chosen.out.exists():
        document = json.loads(chosen.out.read_text())
    name = chosen.model.resolve().name
    if name not in document:
        document[name] = {"answers": answers(chosen.model), "rows": []}
    rows = document[name]["rows"]
    known = {(row["recipe"], row["format"]) for row in rows}
    recipes = chosen.recipe or ([] if chosen.bits else list(RECIPES))
    wanted = [(recipe, 0.0) for recipe in recipes]
    wanted += [("phone-4bit", bits) for bits in chosen.bits]
    for recipe, bits in wanted:
        for form in chosen.format or FORMATS:
            if (f"{recipe}, {bits:g} bits" if bits else recipe, form) in known:
                continue
            rows.append(measure(chosen.model, recipe, form, bits, chosen))
            chosen.out.write_text(json.dumps(document, indent=1) + "\n")
            chosen.out.with_suffix(".md").write_text(page(document))
            print(table(rows[-1:]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
