"""The same sums with any number of threads.

Floating-point sums depend on their order, and libraries choose the order by the number of threads.
Row by row work (grids, codes) is not touched by that; matrix products are. So:

- Products in torch (MKL): Intel's strict reproducibility mode, at no measurable cost; its products
  are the same bits for any number of threads on one kind of CPU. Where torch has another library,
  or the mode came too late, products that feed bytes run on one thread.
- LAPACK in torch has no such mode: factorisations and solves run on one thread (``one_thread``).
- Products in NumPy (OpenBLAS): one thread each; the solvers work on several slabs of rows at a time
  instead.

MKL: Intel oneMKL Developer Guide, "Obtaining Numerically Reproducible Results".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["one_thread", "prepare", "set_threads"]


def prepare() -> None:
    """Tell the libraries; of effect only before they load.

    ``MKL_CBWR`` may be given, ``AVX2,STRICT`` for example, which gives the same bits on every CPU
    that has AVX2.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"


def set_threads(count: int) -> None:
    """Threads for torch's products, or one where their results would depend on it."""
    import torch

    torch.set_num_threads(count if count == 1 or same_with_any(count) else 1)


@cache
def same_with_any(count: int) -> bool:
    """Whether long narrow products, which are split along the sum, are the same on one thread and
    on ``count``; a few milliseconds.
    """
    import torch

    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    found = []
    try:
        for threads in (1, count):
            torch.set_num_threads(threads)
            generator.manual_seed(0)
            products = []
            for rows, long, columns in ((64, 4096, 64), (511, 8192, 96), (33, 5000, 7)):
                left = torch.randn(rows, long, generator=generator)
                right = torch.randn(long, columns, generator=generator)
                products.append(left @ right)
            found.append(products)
    finally:
        torch.set_num_threads(before)
    return all(torch.equal(one, many) for one, many in zip(*found, strict=True))


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread within."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
