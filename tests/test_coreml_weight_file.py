"""``weight.bin`` is, byte for byte, what coremltools' own writer makes of the same arrays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from coremltools.libmilstoragepython import _BlobStorageWriter

from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.sources import Stored
from compress.demo import model_path
from compress.grids import Array, Float32, Grid, Quantized
from compress.plan.job import describe_model
from compress.plan.shapes import Weights
from exporters.coreml.planning import Part
from exporters.coreml.weight_file import BlobFile, CountedBlobs, pack_bits

# MIL's types → lowest and highest value.
INTEGERS = {"uint1": (0, 1), "uint2": (0, 3), "uint3": (0, 7), "uint4": (0, 15), "int4": (-8, 7),
            "uint6": (0, 63), "uint8": (0, 255), "int8": (-128, 127)}  # fmt: skip


def no_solver(weight: Float32, grid: Grid, name: str) -> Quantized:
    raise AssertionError(name)


@pytest.fixture
def weights() -> Weights:
    checkpoint = Checkpoint.open(model_path())
    return Weights(Stored(checkpoint, describe_model(checkpoint)), no_solver)


def arrays() -> Iterator[tuple[str, Array]]:
    """Of every type that a package stores, of sizes that fill bytes and sizes that do not."""
    draw = np.random.default_rng(0)
    for shape in ((64, 24), (3, 7), (11, 1), (16, 1, 16, 1)):
        for dtype, (low, high) in INTEGERS.items():
            kind = np.int8 if low < 0 else np.uint8
            yield dtype, draw.integers(low, high + 1, shape).astype(kind)
        yield "fp16", draw.standard_normal(shape).astype(np.float16)
        yield "fp32", draw.standard_normal(shape).astype(np.float32)


def test_bytes_and_offsets_are_those_of_coremltools(tmp_path: Path, weights: Weights) -> None:
    theirs = _BlobStorageWriter(str(tmp_path / "theirs"))
    told: list[int] = []
    ours, counted = BlobFile(tmp_path / "ours", weights, told.append), CountedBlobs()
    total = 0
    for index, (dtype, values) in enumerate(arrays()):
        flat = values.reshape(-1).view(np.uint16) if dtype == "fp16" else values.reshape(-1)
        kind = "float" if dtype == "fp32" else dtype
        offset = getattr(theirs, f"write_{kind}_data")(flat)
        part = Part("", dtype, values.shape)
        # Runs of eight rows fill bytes, whatever the type.
        slabs = [values[start : start + 8] for start in range(0, len(values), 8)]
        assert ours.append(str(index), part, slabs, "") == offset
        assert counted.append(str(index), part, [], "") == offset
        assert ours.find(str(index)) == offset
        total += part.nbytes
    del theirs  # flushes
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert counted.end == (tmp_path / "ours").stat().st_size
    assert sum(told) == 2 * total  # `find` tells of what is there, too


def test_goes_on_behind_what_was_finished(tmp_path: Path, weights: Weights) -> None:
    """A record that was cut off, and the header's count, are written anew."""
    all_at_once = BlobFile(tmp_path / "whole", weights, lambda _: None)
    some = list(enumerate(arrays()))
    for index, (dtype, values) in some:
        all_at_once.append(str(index), Part("", dtype, values.shape), [values], "")
    whole = (tmp_path / "whole").read_bytes()
    for index, _ in some[5:]:
        del weights.ledger._rows[str(index)]
    cut = tmp_path / "cut"
    cut.write_bytes(whole[: weights.ledger["4"]["end"] + 70])
    again = BlobFile(cut, weights, lambda _: None)
    for index, (dtype, values) in some:
        if again.find(str(index)) is None:
            assert index >= 5
            again.append(str(index), Part("", dtype, values.shape), [values], "")
    assert cut.read_bytes() == whole


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_packed_bits_are_the_numbers_one_after_the_other(bits: int) -> None:
    values = np.random.default_rng(1).integers(0, 1 << bits, 40).astype(np.uint8)
    whole = sum(int(value) << (bits * place) for place, value in enumerate(values))
    assert pack_bits(values, bits).tobytes() == whole.to_bytes(5 * bits, "little")
