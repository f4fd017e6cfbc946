"""Makes tests/data/mlx_affine.npz with MLX itself, in a Python that has mlx and numpy.

``python tests/mlx_oracle.py tests/data/mlx_affine.npz``: for every kind of code and group a small
matrix as ``mx.quantize`` packs it, and the weights that ``mx.dequantize`` makes of it in float32.
"""

import sys

import mlx.core as mx
import numpy as np

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


def main() -> None:
    """See the module."""
    random = np.random.default_rng(17)
    found = {}
    for bits in BITS:
        for group in GROUPS:
            weight = mx.array(random.standard_normal((2, 128)).astype(np.float32) * 0.05)
            for dtype in (mx.float16, mx.bfloat16):
                words, scales, biases = mx.quantize(weight.astype(dtype), group, bits)
                wide = [part.astype(mx.float32) for part in (scales, biases)]
                name = f"affine{bits}-g{group}" + ("-bf16" if dtype == mx.bfloat16 else "")
                if dtype == mx.float16:
                    stored = [np.array(part) for part in (scales, biases)]
                else:
                    stored = [np.array(part.view(mx.uint16)) for part in (scales, biases)]
                found[f"{name}/weight"] = np.array(words)
                found[f"{name}/scales"], found[f"{name}/biases"] = stored
                found[f"{name}/decoded"] = np.array(mx.dequantize(words, *wide, group, bits))
    np.savez_compressed(sys.argv[1], **found)


if __name__ == "__main__":
    main()
