"""What pruning costs, at a glance: for models so large that to prune each shape that a budget might
take would take hours.

Channels go by what each carries alone (``E[x²] ‖w‖²`` of ``down_proj``), of the float model's own
statistics, and what stays is left as it is; blocks go by how far they turn the hidden states, which
takes one walk (ShortGPT's block influence, Men et al., arXiv 2403.03853). The real thing updates
what stays, and tries blocks by the logits (``width.py``, ``depth.py``), so this is an upper bound.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.calibration.statistics import Statistics, input_names
from compress.checkpoint.sources import Source
from compress.console import Console
from compress.decoder.config import split_name
from compress.decoder.config_json import read_json
from compress.errors import CheckpointError
from compress.grids import Array
from compress.output.cache import cache_folder
from compress.pruning.cut import Cut
from compress.pruning.pruned import Narrower, Shallower, kept_rows

__all__ = ["Glance", "glance"]

TOKENS = 256  # that shapes are judged on

Windows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Glance:
    """What was seen of a shape.

    Attributes:
        kl: mean KL divergence from the float model, nats a token.
        kept: the stored blocks that stay.
    """

    kl: float
    kept: tuple[int, ...]


def glance(
    source: Source, cut: Cut, statistics: Statistics, windows: Windows, console: Console
) -> Glance:
    """What a shape costs before bits; from the cache where it is known.

    Args:
        source: the float model.
        cut: ``ffn`` or ``depth``.
        statistics: of the float model's inputs.
        windows: calibration text; ``TOKENS`` tokens of it are walked.
        console: for progress.
    """
    from compress.pruning.depth import model_divergence, turning_blocks

    windows = shortened(windows)
    total = source.config.num_hidden_layers // source.config.block_repeat
    facts = f"glance {source.fingerprint()} {windows} {cut.method} {cut.kept}"
    path = cache_folder("pruning") / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
    known = load(path)
    if known:
        return known
    if cut.method == "depth":
        with console.progress("compare blocks", "blocks") as update:
            blocks = turning_blocks(source, windows, update)[: cut.kept]
        shallow = Shallower(source, cut.config, sorted(blocks))
        with console.progress(f"judge {cut.kept} blocks", "steps") as update:
            kl = model_divergence(source, shallow, windows, update)
        found = Glance(kl, shallow.kept)
    else:
        channels = ranked_channels(source, statistics, cut.kept)
        narrow = Narrower(source, cut.config, None, channels, path.stem)
        with console.progress(f"judge {cut.kept} channels", "steps") as update:
            found = Glance(model_divergence(source, narrow, windows, update), tuple(range(total)))
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"kl": found.kl, "kept": found.kept}), encoding="utf-8")
    partial.replace(path)
    return found


def load(path: Path) -> Glance | None:
    """What was kept; None where nothing was, or it is damaged."""
    try:
        document = read_json(path)
        return Glance(float(document["kl"]), tuple(map(int, document["kept"])))
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def shortened(windows: Windows) -> list[list[int]]:
    """Windows of ``TOKENS`` tokens together, at least one."""
    length = min(len(windows[0]), TOKENS)
    return [list(window[:length]) for window in windows[: max(1, TOKENS // length)]]


def ranked_channels(
    source: Source, statistics: Statistics, kept: int
) -> dict[int, Mapping[str, Array]]:
    """First run of each stored block → rows that stay (``kept_rows``), the channels being those
    that carry most.
    """
    found: dict[int, Mapping[str, Array]] = {}
    for name in input_names(source.config):
        block, role, _ = split_name(f"{name}.weight")
        if role != "down_proj" or block is None:
            continue
        weight = source.read(f"{name}.weight")
        stats = statistics.for_weight(f"{name}.weight")
        carried = np.einsum("rc,rc->c", weight, weight, dtype=np.float64)
        if stats is not None:
            carried *= stats.importance
        channels = np.sort(np.argsort(-carried, kind="stable")[:kept])
        found[block] = kept_rows(source.config, "ffn", channels)
    return found
