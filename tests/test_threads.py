"""compress.machine: the same bits with any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from compress import machine
from compress.calibration.statistics import LayerStats
from compress.machine import one_thread
from compress.solvers import hessian as hessians
from compress.solvers.propagation import shifts

ROOT = Path(__file__).resolve().parents[1]

# Products that OpenBLAS and MKL split by the number of threads (as seen without ``prepare``).
PRODUCTS = """
import hashlib, sys
from compress import machine
if sys.argv[2] == "prepared":
    machine.make_deterministic()
import numpy as np, torch
machine.set_threads(int(sys.argv[1])) if sys.argv[2] == "prepared" else torch.set_num_threads(
    int(sys.argv[1]))
found = hashlib.sha256()
random = np.random.default_rng(0)
for rows, long, columns in ((64, 4096, 64), (511, 8192, 96), (33, 5000, 7), (1500, 3000, 1500)):
    a = random.standard_normal((rows, long), np.float32)
    b = random.standard_normal((long, columns), np.float32)
    found.update(np.ascontiguousarray(a @ b).tobytes())
    found.update((torch.from_numpy(a) @ torch.from_numpy(b)).numpy().tobytes())
print(found.hexdigest())
"""


def products(threads: int, how: str) -> str:
    unset = ("MKL_CBWR", "OMP_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"OPENBLAS_NUM_THREADS": str(threads)}  # as many CPUs would have it
    command = [sys.executable, "-c", PRODUCTS, str(threads), how]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
def test_products_do_not_depend_on_threads() -> None:
    assert len({products(threads, "prepared") for threads in (1, 3)}) == 1


def covariance(size: int) -> np.ndarray:
    rows = np.random.default_rng(1).standard_normal((size + 40, size), np.float32)
    with one_thread():
        return np.asarray((torch.from_numpy(rows.T.copy()) @ torch.from_numpy(rows)).numpy())


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()

    def use(count: int) -> None:
        monkeypatch.setattr(machine, "worker_threads", lambda: count)
        torch.set_num_threads(count)

    yield use
    torch.set_num_threads(before)


def test_solves_do_not_depend_on_threads(threads) -> None:
    """torch's Cholesky factor of 1,100 columns is another with each number of threads."""
    matrix = covariance(1100)
    drift = np.random.default_rng(2).standard_normal(matrix.shape, np.float32)
    stats = LayerStats(1, np.ones(1100, np.float32), hessian=(matrix,), drift=(drift,))
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(shifts(stats)[0])
    assert all(np.array_equal(found[0], other) for other in found[1:])
    damped = matrix + 0.03 * np.diagonal(matrix).mean() * np.eye(1100, dtype="f4")
    assert np.allclose(found[0] @ damped, drift, atol=2e-3)


def test_factors_do_not_depend_on_threads(threads) -> None:
    matrix, found = covariance(1300), []
    for count in (1, 3):
        threads(count)
        factor = matrix.copy()
        variances = hessians.factor_in_place(factor)
        found.append((factor, variances))
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


def test_a_calibrated_build_does_not_depend_on_threads(tmp_path: Path) -> None:
    """By the default recipe's solver, through quantized blocks."""
    from commands import packlight

    model, found = tiny.make("phi3", tmp_path / "model"), []
    for threads in (1, 2):
        done = packlight(
            "build", model, "-f", "onnx", "--no-verify", "-o", f"t{threads}",
            "--set", "calibration.tokens=1024", "--set", "calibration.sequence_length=256",
            "--set", "quantize.solver=gptq", "--set", "calibration.propagate=quantized",
            "--threads", threads, cwd=tmp_path,
            env={"PACKLIGHT_CACHE": str(tmp_path / f"cache{threads}")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        sums = (tmp_path / f"t{threads}" / "SHA256SUMS").read_text().splitlines()
        found.append([line for line in sums if "  onnx/" in line])
    assert found[0] == found[1] and len(found[0]) > 2
