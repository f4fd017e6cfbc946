"""Rotations folded into the weights: the same function, in weights that palettes fit better.

R1 turns the residual stream by an orthogonal ``Q`` (``h`` becomes ``h Q``): every norm's weight
moves into the linears that follow it, whose columns are turned; embedding, ``o_proj`` and
``down_proj`` write turned vectors. An RMSNorm without a weight does not notice, since ``h Q`` is as
long as ``h``. R2 turns the values inside each head, between ``v_proj`` and ``o_proj``. Nothing is
added to the graph. The names are SpinQuant's (arXiv 2405.16406); the matrices are QuaRot's
randomised Hadamard matrices (arXiv 2404.00456): signs drawn from a fixed seed, then ``H``.

A Hadamard matrix mixes all coordinates with equal weight, so that the outliers of a few are spread
over all. That helps where one scale or palette serves a whole row; groups of 32 hold outliers in
already, and rotation makes them worse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint.sources import Around, Source
from compress.decoder.config import FUSED, DecoderConfig, Float32, WeightMap, split_name
from compress.errors import UnsupportedModelError

__all__ = ["KINDS", "Rotated", "Rotation", "hadamard_order"]

KINDS = ("none", "r1", "r2", "r1r2")
SEED = 0  # of the signs
VERSION = 1  # of the matrices; part of the fingerprint
SLAB = 1 << 22  # weights that are turned at a time: 16 MB as float32
FACTOR = 64  # widest power of two that is multiplied as one matrix

# Which norm's weight moves into a linear, by the linear's role.
NORMS = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
    "lm_head": "norm",
}
WRITERS = ("o_proj", "down_proj")  # what is added to the residual stream


# --- matrices -----------------------------------------------------------------------------------


class Rotation:
    """``diag(signs) H / √n``, applied as a Kronecker product of small matrices.

    ``H`` is Sylvester's for a power of two, and a Paley matrix ⊗ Sylvester's for the other orders
    that have one (12, 20, 28 … times powers of two: 3072, 896, 576). Where none is known by these
    constructions (an odd size, or 6), the odd part is Hartley's matrix ``cos + sin``: orthogonal
    too, with entries up to ``√2`` instead of 1.

    Attributes:
        size: ``n``.
        factors: orthogonal float32 ``[m, m]``; ``H / √n`` is their Kronecker product, in order.
        signs: float32 ``[n]``, +1 and -1, by a fixed seed.
    """

    def __init__(self, size: int, name: str) -> None:
        digest = hashlib.sha256(f"{SEED} {name} {size}".encode()).digest()
        draws = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        self.size = size
        self.factors = tuple(factors(size))
        self.signs = (1 - 2 * draws.integers(0, 2, size)).astype(np.float32)

    def columns(self, weight: Float32) -> Float32:
        """``weight Q``, for ``[rows, blocks × n]``: every run of ``n`` columns is turned."""
        rows, columns = weight.shape
        runs = weight.reshape(rows * (columns // self.size), self.size) * self.signs
        return self._mix(runs, 1).reshape(rows, columns)

    def rows(self, weight: Float32) -> Float32:
        """``Qᵀ weight``, for ``[blocks × n, …]``: every run of ``n`` rows is turned."""
        after = weight[0].size if weight.ndim > 1 else 1
        runs = weight.reshape(-1, self.size, after) * self.signs[:, None]
        return self._mix(runs, after).reshape(weight.shape)

    def matrix(self) -> Float32:
        """``Q`` itself, float32 ``[n, n]``."""
        return self.columns(np.eye(self.size, dtype=np.float32))

    def _mix(self, values: Float32, after: int) -> Float32:
        """``H / √n`` along an axis of ``n`` that has ``after`` values behind each coordinate."""
        right = self.size * after
        for factor in self.factors:
            right //= len(factor)
            shape = (-1, len(factor), right)
            if right == 1:
                values = values.reshape(shape[:2]) @ factor
            else:
                values = np.matmul(factor.T, values.reshape(shape))
        return values


def factors(size: int) -> Iterator[Float32]:
    """Small orthogonal matrices whose Kronecker product has ``size`` rows."""
    order = hadamard_order(size)
    odd = odd_part(size)
    if order > 1:
        yield scaled(paley(order))
    elif odd > 1:
        yield hartley(odd)
        order = odd
    rest = size // order
    while rest > 1:
        part = min(rest, FACTOR)
        yield scaled(sylvester(part))
        rest //= part


def odd_part(size: int) -> int:
    """What is left of a number without its factors of two."""
    return size // (size & -size)


def hadamard_order(size: int) -> int:
    """The smallest Paley order that divides ``size`` by a power of two; 1 where none does, and for
    powers of two, which need none."""
    order = 4 * odd_part(size)
    while order > 4 and order <= size:
        if is_prime(order - 1) or (order // 2 % 4 == 2 and is_prime(order // 2 - 1)):
            return order
        order *= 2
    return 1


def is_prime(number: int) -> bool:
    """By trial division; the numbers here are below the width of a model."""
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def paley(order: int) -> Float32:
    """Paley's Hadamard matrix, entries ±1: of the first kind where ``order - 1`` is prime, else of
    the second, where ``order / 2 - 1`` is (R. E. A. C. Paley, On Orthogonal Matrices, 1933)."""
    first = is_prime(order - 1)
    prime = order - 1 if first else order // 2 - 1
    character = np.full(prime, -1, np.int64)
    character[np.arange(1, prime) ** 2 % prime] = 1
    character[0] = 0
    indices = np.arange(prime)
    conference = np.ones((prime + 1, prime + 1), np.int64)
    conference[1:, 1:] = character[(indices[:, None] - indices) % prime]
    conference[0, 0] = 0
    if first:
        conference[1:, 0] = -1
        found = conference + np.eye(prime + 1, dtype=np.int64)
    else:
        unit = np.eye(prime + 1, dtype=np.int64)
        found = np.kron(conference, [[1, 1], [1, -1]]) + np.kron(unit, [[1, -1], [-1, -1]])
    return found.astype(np.float32)


def sylvester(order: int) -> Float32:
    """Sylvester's Hadamard matrix of a power of two, entries ±1."""
    indices = np.arange(order)
    parity: Float32 = (np.bitwise_count(indices[:, None] & indices) & 1).astype(np.float32)
    return 1 - 2 * parity


def hartley(order: int) -> Float32:
    """The orthogonal Hartley matrix ``(cos 2πij/n + sin 2πij/n) / √n``, of any order."""
    indices = np.arange(order)
    angles = 2 * np.pi * (indices[:, None] * indices % order) / order
    found: NDArray[np.float64] = (np.cos(angles) + np.sin(angles)) / np.sqrt(order)
    return found.astype(np.float32)


def scaled(matrix: Float32) -> Float32:
    """A Hadamard matrix as an orthogonal one."""
    return matrix / np.float32(np.sqrt(len(matrix)))


@cache
def rotation(size: int, name: str) -> Rotation:
    """The one rotation of that size and name (``R1``, ``R2``)."""
    return Rotation(size, name)


# --- weights ------------------------------------------------------------------------------------


class Rotated(Around):
    """A source whose weights are rotated, computing the same logits.

    A head that is tied to the embedding becomes a tensor of its own: only the head takes the final
    norm's weight. Reading rows of ``o_proj`` or ``down_proj`` reads the whole tensor, since R1
    mixes its rows; two copies of it are in memory then. Everything else goes by slabs of rows.

    Args:
        source: the weights to turn.
        kinds: ``r1``, ``r2`` or ``r1r2``.

    Raises:
        UnsupportedModelError: LayerNorm, which subtracts a mean and so does notice a rotation.
    """

    def __init__(self, source: Source, kinds: str) -> None:
        check(source.config)
        config = source.config
        self._kinds = kinds
        self._shapes = WeightMap(config)
        self._residual = rotation(config.hidden_size, "R1") if "r1" in kinds else None
        self._values = rotation(config.head_dim, "R2") if "r2" in kinds else None
        if self._residual is not None:
            config = replace(config, tie_word_embeddings=False)
        super().__init__(source, config)

    def fingerprint(self) -> str:
        """See ``Source.fingerprint``."""
        key = f"rotated {VERSION} {SEED} {self._kinds} {self.source.fingerprint()}"
        return hashlib.sha256(key.encode()).hexdigest()

    @property
    def unties(self) -> bool:
        """Whether the head was the embedding and is a tensor of its own now."""
        return self.source.config.tie_word_embeddings and not self.config.tie_word_embeddings

    def summary(self) -> str:
        """For the report: what was done to the weights."""
        words = {"r1": "the residual stream (R1)", "r2": "the values in each head (R2)"}
        turned = " and ".join(text for kind, text in words.items() if kind in self._kinds)
        return f"weights rotated: {turned}; before rounding, the logits are the float model's"

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """See ``Source.read``."""
        block, role, kind = split_name(name)
        start, stop, _ = (rows or slice(None)).indices(self._shapes.shape(name)[0])
        if role in FUSED:
            pieces = []
            for member in FUSED[role]:
                part = f"blocks.{block}.{member}.{kind}"
                count = self._shapes.shape(part)[0]
                pieces.append(self.read(part, slice(max(start, 0), max(min(stop, count), 0))))
                start, stop = start - count, stop - count
            return np.concatenate(pieces)
        if kind == "bias":
            return self._bias(name, role)[start:stop]
        if role.endswith("norm"):
            return self._norm(name, role)[start:stop]
        if role in WRITERS and self._residual is not None:
            return self._writer(name, role)[start:stop]
        return self._reader(name, start, stop)

    def _norm(self, name: str, role: str) -> Float32:
        """All ones where R1 moved the weight on; the norms of q and k are inside a head."""
        weight = self.source.read(name)
        if self._residual is None or role in ("q_norm", "k_norm"):
            return weight
        return np.ones_like(weight)

    def _bias(self, name: str, role: str) -> Float32:
        """What is added to an output turns with the output."""
        bias = self.source.read(name)
        if role in WRITERS and self._residual is not None:
            return self._residual.rows(bias)
        if role == "v_proj" and self._values is not None:
            return self._values.rows(bias)
        return bias

    def _writer(self, name: str, role: str) -> Float32:
        """``o_proj`` or ``down_proj``, whole: its rows are turned, by slabs of columns."""
        assert self._residual is not None
        weight = self.source.read(name)
        turned = np.empty_like(weight)
        count = self._values.size if self._values is not None and role == "o_proj" else 1
        width = max(SLAB // weight.shape[0] // count, 1) * count  # whole heads
        for first in range(0, weight.shape[1], width):
            slab = np.ascontiguousarray(weight[:, first : first + width])
            if self._values is not None and role == "o_proj":
                slab = self._values.columns(slab)
            turned[:, first : first + width] = self._residual.rows(slab)
        return turned

    def _reader(self, name: str, start: int, stop: int) -> Float32:
        """Rows of a weight whose rows stay apart, or (``v_proj``) within their heads."""
        turned = np.empty((stop - start, self._shapes.shape(name)[1]), np.float32)
        size = 1
        if split_name(name)[1] == "v_proj" and self._values is not None:
            size = self._values.size
        norm = self._norm_before(name)
        height = max(SLAB // turned.shape[1] // size, 1) * size
        for first in range(start - start % size, stop, height):
            last = min(first + height, -(-stop // size) * size)
            slab = self._turn(name, norm, first, last)
            here = slice(max(first, start), min(last, stop))
            turned[here.start - start : here.stop - start] = slab[
                here.start - first : here.stop - first
            ]
        return turned

    def _norm_before(self, name: str) -> Float32 | None:
        """The weight of the norm that R1 moves into a linear."""
        block, role, _ = split_name(name)
        if self._residual is None or role not in NORMS:
            return None
        stem = "" if block is None else f"blocks.{block}."
        return self.source.read(f"{stem}{NORMS[role]}.weight")

    def _turn(self, name: str, norm: Float32 | None, first: int, last: int) -> Float32:
        """Some rows of the embedding or of a linear: of ``v_proj``, whole heads."""
        _, role, _ = split_name(name)
        slab = self.source.read(name, slice(first, last))
        if norm is not None:
            slab = slab * norm
        if self._residual is not None and (norm is not None or role == "embed_tokens"):
            slab = self._residual.columns(slab)
        if self._values is not None and role == "v_proj":
            slab = self._values.rows(slab)
        if self._values is not None and role == "o_proj":
            slab = self._values.columns(slab)
        return slab


def check(config: DecoderConfig) -> None:
    """Refuse decoders that a rotation would change.

    Raises:
        UnsupportedModelError: with what to set instead.
    """
    if config.norm != "rmsnorm" or config.parallel_residual:
        raise UnsupportedModelError(
            f"{config.family} models cannot be rotated: LayerNorm subtracts a mean, which a "
            "rotation does not keep",
            hint="rotate: none; only models with RMSNorm can be rotated",
        )
