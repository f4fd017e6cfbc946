"""``weight.bin`` is equal, byte for byte, to that of coremltools' writer for the same arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from coremltools.libmilstoragepython import _BlobStorageWriter

from compress.grids import Array, pack_bits
from exporters.coreml.constants import HEADER, VERSION, Blob, Layout
from exporters.coreml.planning import ALIGNMENT, Part

# MIL's types → lowest and highest value.
INTEGERS = {"uint1": (0, 1), "uint2": (0, 3), "uint3": (0, 7), "uint4": (0, 15), "int4": (-8, 7),
            "uint6": (0, 63), "uint8": (0, 255), "int8": (-128, 127)}  # fmt: skip


def arrays() -> Iterator[tuple[str, Array]]:
    """Of every type that a package stores, of sizes that fill bytes and sizes that do not."""
    draw = np.random.default_rng(0)
    for shape in ((64, 24), (3, 7), (11, 1), (16, 1, 16, 1)):
        for dtype, (low, high) in INTEGERS.items():
            kind = np.int8 if low < 0 else np.uint8
            yield dtype, draw.integers(low, high + 1, shape).astype(kind)
        yield "fp16", draw.standard_normal(shape).astype(np.float16)
        yield "fp32", draw.standard_normal(shape).astype(np.float32)


def write(path: Path, numbered: Sequence[tuple[int, str, Array]], layout: Layout) -> None:
    """Arrays by number to their places, eight rows at a time."""
    with path.open("r+b", buffering=0) as stream:
        for number, dtype, values in numbered:
            part = Part("", dtype, values.shape)
            blob = Blob(stream, layout.add(str(number), part), part)
            # Runs of eight rows fill bytes, whatever the type.
            written = [blob.append(values[row : row + 8]) for row in range(0, len(values), 8)]
            assert sum(written) == part.nbytes
            assert blob.close() == layout.offsets[str(number)] + ALIGNMENT + part.nbytes


def test_bytes_and_offsets_are_those_of_coremltools(tmp_path: Path) -> None:
    theirs, layout = _BlobStorageWriter(str(tmp_path / "theirs")), Layout()
    numbered = [(number, *row) for number, row in enumerate(arrays())]
    for number, dtype, values in numbered:
        flat = values.reshape(-1).view(np.uint16) if dtype == "fp16" else values.reshape(-1)
        kind = "float" if dtype == "fp32" else dtype
        offset = getattr(theirs, f"write_{kind}_data")(flat)
        assert layout.add(str(number), Part("", dtype, values.shape)) == offset
    del theirs  # flushes
    end = layout.end
    for name, order in (("forwards", numbered), ("backwards", numbered[::-1])):
        ours = tmp_path / name
        ours.write_bytes(HEADER.pack(len(numbered), VERSION))
        write(ours, order, layout)
        assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()
        assert layout.end == end == ours.stat().st_size  # an existing offset is reused


def test_an_array_of_which_rows_are_missing_does_not_end(tmp_path: Path) -> None:
    part = Part("", "uint3", (16, 4))
    with (tmp_path / "file").open("w+b", buffering=0) as stream:
        blob = Blob(stream, ALIGNMENT, part)
        blob.append(np.zeros((8, 4), np.uint8))
        with pytest.raises(AssertionError):
            blob.close()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_packed_bits_are_the_numbers_one_after_the_other(bits: int) -> None:
    values = np.random.default_rng(1).integers(0, 1 << bits, 40).astype(np.uint8)
    whole = sum(int(value) << (bits * place) for place, value in enumerate(values))
    assert pack_bits(values, bits).tobytes() == whole.to_bytes(5 * bits, "little")
