"""A pruned model as a ``Source`` of the remaining weights.

Removed rows are left out when a weight is read; changed weights are computed once and stored in the
cache, in the checkpoint's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compress.checkpoint.safetensors import TensorInfo, read_range, scan_safetensors
from compress.checkpoint.sources import Change, Source
from compress.decoder.config import FUSED, DecoderConfig, Float32, split_name
from compress.grids import Array

__all__ = ["Healed", "Narrower", "Shallower", "retained_rows"]


class Shallower(Change):
    """A source with only some of the stored blocks, in order.

    Args:
        source: the whole model.
        config: with as many blocks as ``retained``.
        retained: ascending indices of stored blocks (a block that runs twice counts once).
    """

    def __init__(self, source: Source, config: DecoderConfig, retained: Sequence[int]) -> None:
        self.retained = tuple(retained)
        super().__init__(source, config, f"blocks {self.retained}")

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """See ``Source.read``."""
        block, role, kind = split_name(name)
        if block is not None:
            stored, run = divmod(block, self.config.block_repeat)
            name = f"blocks.{self.retained[stored] * self.config.block_repeat + run}.{role}.{kind}"
        return self.source.read(name, rows)


class Narrower(Change):
    """A source with rows removed, and with linears whose columns were removed and updated.

    Args:
        source: the whole model.
        config: with the smaller sizes.
        folder: from ``step.py``: a file per stored block with its changed weight.
        retained: first run of a stored block → retained rows, by role (``retained_rows``).
        name: of the folder's contents; part of the fingerprint.
    """

    def __init__(
        self,
        source: Source,
        config: DecoderConfig,
        folder: Path,
        retained: Mapping[int, Mapping[str, Array]],
        name: str,
    ) -> None:
        super().__init__(source, config, name)
        self._retained = retained
        self._changed = scan_folder(folder)

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """See ``Source.read``."""
        block, role, kind = split_name(name)
        if block is None:
            return self.source.read(name, rows)
        stored = block - block % self.config.block_repeat
        changed = f"blocks.{stored}.{role}.{kind}"
        if changed in self._changed:
            return read_rows(self._changed[changed], rows)
        index = self._rows(stored, role)
        if index is None:
            return self.source.read(name, rows)
        index = index[rows or slice(None)]
        if not len(index):
            return self.source.read(name, slice(0, 0))
        first = int(index.min())
        values: Float32 = self.source.read(name, slice(first, int(index.max()) + 1))[index - first]
        return values

    def _rows(self, stored: int, role: str) -> Array | None:
        """Retained rows of the source's weight; None: all."""
        retained = self._retained[stored]
        if role in retained:
            return retained[role]
        members = [member for member in FUSED.get(role, ()) if member in retained]
        if not members:
            return None
        sizes = [self.source.config.weight_shape(member)[0] for member in members]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        pieces = [retained[member] + start for member, start in zip(members, starts, strict=True)]
        rows: Array = np.concatenate(pieces)
        return rows


class Healed(Change):
    """A pruned source, some of whose blocks were trained (``heal.py``).

    Args:
        source: the pruned model.
        config: the pruned model's, with a record of the healing.
        folder: a file for each improved block, with all of its weights, unfused.
        name: of the folder's contents; part of the fingerprint.
    """

    def __init__(self, source: Source, config: DecoderConfig, folder: Path, name: str) -> None:
        super().__init__(source, config, name)
        self._healed = scan_folder(folder)

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """See ``Source.read``."""
        block, role, kind = split_name(name)
        if block is None:
            return self.source.read(name, rows)
        stem = f"blocks.{block - block % self.config.block_repeat}"
        names = [f"{stem}.{member}.{kind}" for member in FUSED.get(role, (role,))]
        if names[0] not in self._healed:
            return self.source.read(name, rows)
        parts = [self._healed[part] for part in names]
        if len(parts) == 1:
            return read_rows(parts[0], rows)
        first, last, _ = (rows or slice(None)).indices(sum(part.shape[0] for part in parts))
        pieces, start = [], 0
        for part in parts:
            pieces.append(read_rows(part, slice(max(first - start, 0), max(last - start, 0))))
            start += part.shape[0]
        whole: Float32 = np.concatenate(pieces)
        return whole


def scan_folder(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of all files of a folder, by name."""
    found: dict[str, TensorInfo] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= scan_safetensors(file)
    return found


def read_rows(info: TensorInfo, rows: slice | None) -> Float32:
    """A tensor of a file, or rows of it. May hold NaN, from a diverged training, which is not
    used."""
    start, stop, _ = (rows or slice(None)).indices(info.shape[0])
    shape = (max(stop - start, 0), *info.shape[1:])
    return read_range(info, start, math.prod(shape), checked=False).reshape(shape)


def retained_rows(config: DecoderConfig, method: str, retained: Array) -> dict[str, Array]:
    """The retained rows of the linears before the one whose columns are removed.

    Args:
        config: the whole model.
        method: ``ffn`` or ``heads``.
        retained: channels, or key-value heads, ascending.
    """
    if method == "ffn":
        roles = ("gate_proj", "up_proj") if config.gated_mlp else ("up_proj",)
        return dict.fromkeys(roles, retained)
    group = config.num_attention_heads // config.num_key_value_heads
    values = spread(retained, config.head_dim)
    return {"q_proj": spread(retained, group * config.head_dim), "k_proj": values, "v_proj": values}


def spread(groups: Array, size: int) -> Array:
    """The members of groups of ``size``: ``[1, 3], 2`` → ``[2, 3, 6, 7]``."""
    members: Array = (groups[:, None] * size + np.arange(size)).reshape(-1)
    return members
