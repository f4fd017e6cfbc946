"""Conversions between float16 and float32 bits: every value, against numpy."""

import numpy as np

from compress.grids.lanes import from_half, to_half, widen_bfloat16

EVERY = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def test_every_finite_float16_is_converted_as_numpy_does() -> None:
    halves = EVERY.view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(2, -1)
    singles = halves.astype(np.float32)
    np.testing.assert_array_equal(from_half(halves).view(np.uint32), singles.view(np.uint32))
    np.testing.assert_array_equal(to_half(singles).view(np.uint16), halves.view(np.uint16))


def test_bfloat16_is_the_upper_half_of_a_float32_and_says_what_is_not_finite() -> None:
    for stored in EVERY.reshape(-1, 64):
        bits = np.empty(stored.shape, np.uint32)
        largest = widen_bfloat16(stored, bits)
        np.testing.assert_array_equal(bits, stored.astype(np.uint32) << 16)
        assert (largest < 0x7F80) == np.isfinite(bits.view(np.float32)).all()
