"""Quantizers of blocks alone, against AutoRound and GPTQModel: KL of their codes on one grid.

    python benchmarks/blocks.py [MODEL] [--quantizer NAME ...] [--block N ...] [--windows N]
                                [--iterations N] [--tokens N] [--out FILE]

MODEL (default: the bundled demo) keeps its embedding, its head and, with ``--block``, all other
blocks in float: learned rounding takes hours of CPU for a whole model of 135 million parameters.
All quantizers have int4-g32, symmetric, the same calibration texts and float16 scales; the codes
are decoded and run by the reference decoder on held-out text, as these tools write no file that is
equal to packlight's. AutoRound and GPTQModel need an environment of their own in which they can be
imported beside packlight (``pip install auto-round==0.16.0``; of GPTQModel its class ``GPTQ`` is
enough). Rows that are in FILE (default: benchmarks/blocks.json) are not measured again; its
sibling ``.md`` has the table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Uses internal names: rounds single tensors and runs the float decoder on them.
import exporters  # noqa: F401 -- fills the table of formats
from compress.calibration.statistics import Statistics
from compress.calibration.step import collect
from compress.calibration.texts import CalibrationSet
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import Float32, WeightMap, split_name
from compress.decoder.decoder import Decoder, reader
from compress.demo import model_path
from compress.grids import get_grid
from compress.plan.job import describe_model
from compress.solvers import get_solver
from compress.verify.baseline import log_softmax
from compress.verify.scorer import read_text

GRID, GROUP = "int4-g32", 32
LENGTH = 512  # tokens of a window
OURS = ("rtn", "scale_search", "gptq")
PEERS = ("GPTQModel", "AutoRound")
MIDDLE = 8  # the code of zero


class Model:
    """A checkpoint, its calibration, and the float model's answers on held-out text.

    Attributes:
        chosen: names of the weights that are quantized.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.path = options.model
        checkpoint = Checkpoint.open(self.path)
        self.config = describe_model(checkpoint)
        self.source = source = Stored(checkpoint, self.config)
        names = WeightMap(self.config).names(tied_head=False, repeats=False)
        self.weights = {name: source.read(name) for name in names}
        self.chosen = [name for name in self.weights if self.wanted(name, options.block)]
        self.texts = CalibrationSet.load(
            ["builtin"], checkpoint.tokenizer, tokens=options.tokens, sequence_length=LENGTH, seed=0
        )
        ids = checkpoint.tokenizer.encode(read_text(None))
        step = (len(ids) - LENGTH) // options.windows
        self.windows = [ids[i * step : i * step + LENGTH] for i in range(options.windows)]
        self.float = list(self.answers(self.weights))
        self.statistics: Statistics | None = None

    def wanted(self, name: str, blocks: list[int]) -> bool:
        """Whether a weight is quantized: a matrix of the chosen blocks."""
        block, _, _ = split_name(name)
        chosen = block is not None and (not blocks or block in blocks)
        return chosen and self.weights[name].ndim == 2

    def answers(self, weights: Mapping[str, Float32]) -> Any:
        """Log-probabilities of each window."""
        for logits in Decoder(self.config, reader(self.config, weights)).stream_logits(
            self.windows
        ):
            yield log_softmax(logits)

    def moments(self) -> Statistics:
        """Second moments of the inputs in the float model, cached as a build's."""
        if self.statistics is None:
            self.statistics = collect(self.source, self.texts, hessian=True)
        return self.statistics

    def score(self, decoded: Mapping[str, Float32]) -> dict[str, Any]:
        """KL of the model with some weights replaced."""
        kls, same = [], 0
        weights = {**self.weights, **decoded}
        for expected, found in zip(self.float, self.answers(weights), strict=True):
            kls.append((np.exp(expected) * (expected - found)).sum(axis=1))
            same += int((expected.argmax(1) == found.argmax(1)).sum())
        kl = np.concatenate(kls)
        return {
            "kl_mean": float(f"{kl.mean():.4g}"),
            "kl_mean_se": float(f"{kl.std() / len(kl) ** 0.5:.2g}"),
            "top1_agreement": round(same / len(kl), 4),
        }


def by_solver(name: str, model: Model, options: argparse.Namespace) -> dict[str, Float32]:
    """Weights decoded from the codes of one of packlight's solvers."""
    grid, solve = get_grid(GRID), get_solver(name)
    statistics = model.moments() if name != "rtn" else None
    return {
        key: solve(
            model.weights[key], grid, statistics.for_weight(key) if statistics else None
        ).decode()
        for key in model.chosen
    }


def by_gptqmodel(name: str, model: Model, options: argparse.Namespace) -> dict[str, Float32]:
    """Weights decoded from GPTQModel's codes, at its defaults but for the group size.

    It gets the float model's second moments, which its own loop would take after the quantized
    blocks before.
    """
    import torch
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    settings = QuantizeConfig(bits=4, group_size=GROUP)
    found = {}
    for key in model.chosen:
        stats = model.moments().for_weight(key)
        assert stats is not None and stats.hessian is not None
        weight = torch.from_numpy(model.weights[key])
        module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight.data = weight.clone()
        task = GPTQ(module, settings)
        task.quantizer.configure(perchannel=True)
        task.H = 2 * torch.from_numpy(np.concatenate(stats.hessian))  # one block, not a wide input
        task.nsamples = stats.count
        with torch.inference_mode():
            rounded, scale, *_ = task.quantize()
        found[key] = decoded(rounded.float().numpy(), scale.float().numpy())
    return found


def by_autoround(name: str, model: Model, options: argparse.Namespace) -> dict[str, Float32]:
    """Weights decoded from AutoRound's codes: signed gradients of the error of a block's output."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    windows = torch.tensor(model.texts.windows)
    names = hf_names(model)
    keep = {theirs: {"bits": 16} for key, theirs in names.items() if key not in model.chosen}
    tool = AutoRound(
        loaded,
        AutoTokenizer.from_pretrained(model.path),
        scheme="W4A16",
        group_size=GROUP,
        iters=options.iterations,
        seqlen=LENGTH,
        nsamples=len(windows),
        batch_size=options.batch,
        dataset=[{"input_ids": some} for some in windows.split(options.batch)],
        layer_config=keep,
        device_map="cpu",
        enable_torch_compile=False,
    )
    made, _ = tool.quantize()
    modules = dict(made.named_modules())
    found = {}
    for key in model.chosen:
        module = modules[names[key]]
        found[key] = decoded(module.weight.detach().float().numpy(), module.scale.float().numpy())
    return found


def hf_names(model: Model) -> dict[str, str]:
    """Name of a block's matrix → the module's name in transformers."""
    attention = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
    found = {}
    for key, weight in model.weights.items():
        block, role, _ = split_name(key)
        if block is not None and weight.ndim == 2:
            part = "self_attn" if role in attention else "mlp"
            found[key] = f"model.layers.{block}.{part}.{role}"
    return found


def decoded(weight: Float32, scale: Float32) -> Float32:
    """A weight that lies on the grid of some scales, with these in float16."""
    steps = np.repeat(scale.reshape(len(weight), -1), GROUP, axis=1)
    codes = np.rint(weight / steps)
    if np.abs(weight - codes * steps).max() > 1e-2 * np.abs(steps).max():
        raise SystemExit("the weights do not lie on the grid of the scales")
    if codes.min() < -MIDDLE or codes.max() >= MIDDLE:
        raise SystemExit("codes of more than four bits")
    result: Float32 = codes * steps.astype(np.float16).astype(np.float32)
    return result


QUANTIZERS: dict[str, Callable[..., dict[str, Float32]]] = {
    **dict.fromkeys(OURS, by_solver), "GPTQModel": by_gptqmodel, "AutoRound": by_autoround
}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per quantizer, with the share of the best peer's KL."""
    lines = [
        "| model | blocks | quantizer | mean KL | of the best peer's | top-1 | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        place = (row["model"], row["blocks"])
        peers = [r["kl_mean"] for r in rows if (r["model"], r["blocks"]) == place and r["peer"]]
        name = f"*{row['quantizer']}*" if row["peer"] else row["quantizer"]
        share = f"{row['kl_mean'] / min(peers):.2f}" if peers and not row["peer"] else ""
        figures = f"{row['kl_mean']:.4g} ± {row['kl_mean_se']:.2g} | {share}"
        more = f"{100 * row['top1_agreement']:.1f} % | {row['cpu_seconds']:.0f}"
        lines.append(f"| {row['model']} | {row['blocks']} | {name} | {figures} | {more} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(model_path()))
    parser.add_argument("--quantizer", action="append", choices=list(QUANTIZERS))
    parser.add_argument("--block", action="append", type=int, default=[])
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens")
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate on")
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    parser.add_argument("--batch", type=int, default=8, help="windows, of AutoRound")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    name = "packlight-demo" if options.model == str(model_path()) else Path(options.model).name
    blocks = ", ".join(map(str, options.block)) or "all"
    model = Model(options)
    for quantizer in options.quantizer or OURS:
        key = {"model": name, "blocks": blocks, "quantizer": quantizer}
        if any(key.items() <= row.items() for row in rows):
            continue
        if quantizer in ("scale_search", "gptq", "GPTQModel"):
            model.moments()
        start = time.process_time()
        weights = QUANTIZERS[quantizer](quantizer, model, options)
        spent = time.process_time() - start
        row = {**key, "peer": quantizer in PEERS, "cpu_seconds": round(spent, 1)}
        rows.append({**row, **model.score(weights)})
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(rows))
        print(table(rows[-1:]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
