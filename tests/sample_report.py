"""A report as a real build makes it, from simulated scores: for the tests of what is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from compress.plan.shapes import Artifact, Plan, PlanEntry
from compress.report.describe import Baseline, build_report
from compress.report.report import ModelFacts, Report
from compress.verify import Verified
from compress.verify.gates import parse
from compress.verify.generate import Generation
from compress.verify.quality import TokenScores, summarize
from compress.verify.resources import Resources, Speed

SCHEMA = Path(__file__).resolve().parents[1] / "compress/report/report.schema.json"

HIDDEN, FFN, VOCAB, LAYERS = 2048, 8192, 32064, 16
PARAMETERS = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN + 2 * HIDDEN) + 2 * VOCAB * HIDDEN
BITS = {"Q4_K": 4.5, "Q6_K": 6.5625, "int4-g32": 4.5, "int8-g32": 8.5, "lut4-g8": 4.125, "F32": 32}
GATES = {
    "perplexity_ratio": "<=1.06",
    "kl_divergence": "<=0.06",
    "top1_agreement": ">=0.88",
    "bytes": "<=620MiB",
}
CODE = "def parse(text):\n    for line in text.splitlines():\n        if line"
CONTINUATION = ".startswith('#'):\n            continue\n        yield line.strip()\n"


def tensors(format: str, low: str, high: str) -> tuple[PlanEntry, ...]:
    shapes = {
        "q_proj": (HIDDEN, HIDDEN),
        "k_proj": (HIDDEN, HIDDEN),
        "v_proj": (HIDDEN, HIDDEN),
        "o_proj": (HIDDEN, HIDDEN),
        "gate_proj": (FFN, HIDDEN),
        "up_proj": (FFN, HIDDEN),
        "down_proj": (HIDDEN, FFN),
    }
    rows: list[tuple[str, str, tuple[int, ...], str]] = []
    rows.append(("embed_tokens.weight", low, (VOCAB, HIDDEN), ""))
    for i in range(LAYERS):
        rows.append((f"blocks.{i}.input_layernorm.weight", "F32", (HIDDEN,), ""))
        for role, shape in shapes.items():
            more = role in ("v_proj", "down_proj") and (i < 2 or i >= LAYERS - 2 or i % 3 == 2)
            grid = high if more and format == "gguf" else low
            note = "more bits: llama.cpp's rule for Q4_K_M" if grid == high else ""
            rows.append((f"blocks.{i}.{role}.weight", grid, shape, note))
    rows.append(("norm.weight", "F32", (HIDDEN,), ""))
    rows.append(("lm_head.weight", high, (VOCAB, HIDDEN), "head at more bits"))
    return tuple(
        PlanEntry(name, name, grid, shape, int(np.prod(shape) * BITS[grid] / 8), note)
        for name, grid, shape, note in rows
    )


def simulated(seed: int, kl: float, memory: float, speed: float, runtime: str) -> Verified:
    random = np.random.default_rng(seed)
    windows, length = 16, 511
    window = np.repeat(np.arange(windows, dtype=np.int32), length)
    shared = np.random.default_rng(0).normal(0, 0.4, windows)[window]
    divergence = np.exp(random.normal(-0.6, 1.1, len(window)) + shared) * kl
    nll = np.exp(np.random.default_rng(1).normal(0.4, 0.7, len(window)) + shared / 2)
    scores = TokenScores(
        window=window,
        position=np.tile(np.arange(length, dtype=np.int32), windows),
        baseline_nll=nll,
        nll=nll + divergence + random.normal(0, 0.1, len(window)),
        kl=divergence,
        agrees=random.random(len(window)) > kl * 2,
    )
    return Verified(
        quality=summarize(scores),
        resources=Resources(
            runtime=runtime,
            load_seconds=1.234,
            startup_memory_bytes=61_000_000,
            peak_memory_bytes=int(memory),
            peak_anonymous_bytes=int(memory * 0.55),
            speed=Speed(speed * 6, speed, 256, 32, 3),
        ),
        generation=Generation((1, 2, 3), tuple(range(32)), True),
    )


def make(
    name: str = "SmolThinker-1.1B",
    *,
    verified: bool = True,
    artifacts: int = 3,
    gates: dict[str, str] = GATES,
    notes: tuple[str, ...] = ("Scored on held-out text; another text gives other figures.",),
    budget_bytes: int | None = 640_000_000,
    command: str = "packlight build acme/SmolThinker-1.1B -r phone-4bit -o out",
) -> Report:
    folder = Path("out")
    made = []
    for format, type_name, low, high, path, kl, memory, speed, runtime in (
        ("gguf", "Q4_K_M", "Q4_K", "Q6_K", f"gguf/{name}-Q4_K_M.gguf", 0.031, 9.4e8, 21.5,
         "llama.cpp (xllamacpp 2026.10.11549)"),
        ("onnx", "int4-g32", "int4-g32", "int8-g32", "onnx", 0.052, 1.25e9, 14.2,
         "onnxruntime 1.31.1"),
        ("coreml", "lut4-g8", "lut4-g8", "lut4-g8", f"coreml/{name}.mlpackage", 0.071, 1.9e9, 2.3,
         "MIL evaluator (packlight 0.1.0)"),
    )[:artifacts]:  # fmt: skip
        entries = tensors(format, low, high)
        weights = sum(entry.nbytes for entry in entries)
        plan = Plan(format, type_name, name, entries, max_context=4096)
        artifact = Artifact(
            format,
            type_name,
            folder / path,
            weights + 2_300_000,
            weights,
            LAYERS * 2 * HIDDEN * 2,
            plan,
        )
        seed = len(made) + 3
        found = simulated(seed, kl, memory, speed, runtime) if verified else None
        made.append((artifact, found))
    return build_report(
        model=ModelFacts(
            name=name,
            source=f"acme/{name}",
            revision="0123abcd",
            license="apache-2.0",
            family="llama",
            architecture="LlamaForCausalLM",
            parameters=PARAMETERS,
            num_hidden_layers=LAYERS,
            hidden_size=HIDDEN,
            vocab_size=VOCAB,
            max_context=4096,
        ),
        recipe={"name": "phone-4bit", "schema": 1, "quantize": {"solver": "rtn"}},
        command=command,
        context=2048,
        baseline=Baseline(
            bytes=PARAMETERS * 2,
            dtype="BF16",
            runtime="torch 2.13.0+cpu, float32",
            text="built-in",
            speed=Speed(61.0, 3.4, 256, 32, 3) if verified else None,
        ),
        artifacts=made,
        limits=parse(gates),
        folder=folder,
        decode=lambda tokens: CODE if len(tokens) == 3 else CONTINUATION,
        budget_bytes=budget_bytes,
        notes=notes,
    )


def schema() -> dict[str, Any]:
    """The JSON schema of ``report.json``."""
    found: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return found


def change(part: BaseModel, **values: Any) -> None:
    """Set keys of one mapping of a report."""
    for key, value in values.items():
        setattr(part, key, value)
