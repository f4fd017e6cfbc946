"""Measures calibration and solvers on one block of Phi-3-mini's shape, on one core.

    python benchmarks/solver_cost.py [--tokens N] [--out DIR]     # some minutes

The block (hidden 3072, intermediate 8192, 32 heads) has heavy-tailed random weights, and its
inputs are 16,384 tokens through it, heavy-tailed and correlated: embeddings are mixtures of 512
directions with a Student-t share each, their channels of log-normal size. Walk, statistics on
disk and solvers are packlight's; every measurement runs in its own process, for its peak memory.
Limits: a gptq pass under 90 CPU seconds and 2.5 GB.
Writes DIR/solver_cost.json and DIR/solver_cost.md (default: benchmarks/).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from published import MODELS  # noqa: E402

# Uses internal names: times the walk and the solver of a block separately.
from compress.calibration.statistics import Statistics, file_name, save  # noqa: E402
from compress.calibration.walk import walk  # noqa: E402
from compress.decoder.config import FUSED, DecoderConfig, split_name  # noqa: E402
from compress.grids import Float32, get_grid  # noqa: E402
from compress.machine import bounded  # noqa: E402
from compress.recipe import needs_of  # noqa: E402
from compress.solvers import get_solver  # noqa: E402

GRIDS = ("Q4_K", "int4-g32", "lut4-g8")
SOLVERS = ("gptq", "scale_search", "rtn")
LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
BLOCKS = 32
WINDOW = 512
SLAB = 8 << 20  # weights that a writer requests at once
CPU_BAR, MEMORY_BAR = 90.0, 2.5e9


def phi3_mini() -> DecoderConfig:
    """One block, and a vocabulary that is large enough for a full Hessian."""
    _, _, published = MODELS["phi-3-mini-4k"]
    return DecoderConfig.from_hf(published | {"num_hidden_layers": 1, "vocab_size": 8192}, {})


def weight(config: DecoderConfig, name: str) -> Float32:
    """A seeded random weight, float32."""
    _, role, _ = split_name(name)
    draw = np.random.default_rng(sum(name.encode()))
    if role == "embed_tokens":
        shares = draw.standard_t(4, (config.vocab_size, 512)).astype(np.float32)
        directions = draw.standard_normal((512, config.hidden_size), np.float32)
        noise = draw.standard_normal((config.vocab_size, config.hidden_size), np.float32)
        sizes = np.exp(0.5 * draw.standard_normal(config.hidden_size, np.float32))
        return np.asarray((shares @ directions * 0.05 + 0.3 * noise) * sizes, np.float32)
    if role.endswith("norm"):
        return np.ones(config.hidden_size, np.float32)
    if role in FUSED:
        stem = name.rpartition(".")[0].rpartition(".")[0]
        return np.concatenate([weight(config, f"{stem}.{part}.weight") for part in FUSED[role]])
    rows, columns = config.weight_shape(role)
    values = draw.standard_normal((rows, columns), np.float32)
    values *= 1 + values * values / 4  # heavier tails than normal
    return values / np.float32(np.sqrt(columns))


def measured_walk(folder: Path, tokens: int, *, hessian: bool) -> dict[str, float]:
    """All tokens through the block; the statistics are left in the folder."""
    config = phi3_mini()
    draw = np.random.default_rng(0)
    windows = draw.integers(0, config.vocab_size, (tokens // WINDOW, WINDOW)).tolist()
    made: dict[str, Float32] = {}

    def read(name: str) -> Float32:
        return made.setdefault(name, weight(config, name))

    for role in (*config.linear_roles, *config.norm_roles):  # making them is not measured
        read(f"blocks.0.{role}.weight")
    read("embed_tokens.weight")
    start = time.process_time()
    stats = next(walk(config, read, windows, hessian=hessian, work=folder))
    middle = time.process_time()
    save(folder / file_name(next(iter(stats))), stats)
    return {"cpu_seconds": middle - start, "save_cpu_seconds": time.process_time() - middle}


def measured_solver(folder: Path, solver: str, grid: str) -> dict[str, float]:
    """All linears of the block on a grid, in slabs as a writer asks for them."""
    config = phi3_mini()
    hessian = needs_of(solver) == "hessian"
    statistics = Statistics.open(config, folder, hessian=hessian) if needs_of(solver) else None
    solve, chosen = get_solver(solver), get_grid(grid)
    name = "blocks.0.k_proj.weight"
    solve(weight(config, name)[:64], chosen, statistics.for_weight(name) if statistics else None)
    statistics = Statistics.open(config, folder, hessian=hessian) if needs_of(solver) else None
    spent = 0.0
    for role in LINEARS:
        name = f"blocks.0.{role}.weight"
        values = weight(config, name)
        step = SLAB // values.shape[1] // 64 * 64
        start = time.process_time()
        for first in range(0, len(values), step):
            stats = statistics.for_weight(name) if statistics else None
            solve(values[first : first + step], chosen, stats).pack()
        spent += time.process_time() - start
    return {"cpu_seconds": spent}


def child(arguments: list[str], folder: Path, tokens: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--tokens", str(tokens), "--child", str(folder)]
    done = subprocess.run([*command, *arguments], check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    print(*arguments, found, file=sys.stderr)
    return found


def run_child(folder: Path, arguments: list[str], tokens: int) -> None:
    """Measure, and print the resources."""
    import torch

    torch.set_num_threads(1)
    what = arguments[0]
    with bounded(threads=1):
        if what == "walk":
            result = measured_walk(folder, tokens, hessian=arguments[1] == "hessian")
        else:
            result = measured_solver(folder, *arguments)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({k: round(v, 1) for k, v in result.items()} | {"peak_bytes": peak}))


def measure(tokens: int) -> dict[str, Any]:
    """Every solver on every grid, on the statistics of one walk; a walk for importance alone."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="packlight-") as name:
        folder = Path(name)
        walks = {"hessian": child(["walk", "hessian"], folder, tokens)}
        for solver in SOLVERS:
            for grid in GRIDS:
                found = child([solver, grid], folder, tokens)
                rows.append({"grid": grid, "solver": solver} | found)
        walks["importance"] = child(["walk", "importance"], folder, tokens)
    return {"tokens": tokens, "blocks": BLOCKS, "walk": walks, "rows": rows}


def page(document: dict[str, Any]) -> str:
    """Markdown: the measurements, and what they come to for the whole model."""
    walks = document["walk"]
    lines = [
        f"One block of Phi-3-mini's shape, {document['tokens']:,} calibration tokens, one core.",
        "",
        "| | CPU s | peak memory |",
        "|---|---|---|",
    ]
    for kind, found in walks.items():
        lines.append(f"| walk, {kind} | {found['cpu_seconds']:.0f} | {memory(found)} |")
    lines += [
        "",
        f"| grid | solver | CPU s | peak memory | with its walk, {document['blocks']} blocks "
        f"| under {CPU_BAR:.0f} s and {MEMORY_BAR / 1e9} GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        need = needs_of(row["solver"])
        both = row["cpu_seconds"]
        if need:
            both += walks[need]["cpu_seconds"] + walks[need]["save_cpu_seconds"]
        peak = max(row["peak_bytes"], walks[need]["peak_bytes"] if need else 0)
        verdict = "pass" if row["cpu_seconds"] < CPU_BAR and peak < MEMORY_BAR else "**fail**"
        lines.append(
            f"| {row['grid']} | {row['solver']} | {row['cpu_seconds']:.1f} | {memory(row)} "
            f"| {both * document['blocks'] / 60:.0f} CPU min "
            f"| {verdict if row['solver'] == 'gptq' else ''} |"
        )
    return "\n".join(lines) + "\n"


def memory(found: dict[str, Any]) -> str:
    return f"{found['peak_bytes'] / 1e9:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        run_child(chosen.child, chosen.arguments, chosen.tokens)
        return
    document = measure(chosen.tokens)
    (chosen.out / "solver_cost.json").write_text(json.dumps(document, indent=2) + "\n")
    (chosen.out / "solver_cost.md").write_text(page(document))
    print(page(document))


if __name__ == "__main__":
    main()
