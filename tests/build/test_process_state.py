"""A build in another program's process leaves no state behind; builds in two threads."""

from __future__ import annotations

import hashlib
import json
import locale
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import tiny
from commands import packlight

from compress import machine

ROOT = Path(__file__).resolve().parents[2]

# A program that imported numpy and torch, changed their settings, and builds with the API.
PROGRAM = """
import gc, hashlib, json, locale, logging, os, random, signal, sys, threading, warnings
from pathlib import Path
import numpy as np
import torch
import transformers
from transformers import AutoTokenizer  # torch sets a variable as that loads its compiler
sys.path[:0] = ["tests", "tests/build"]
import test_process_state as here
torch.set_num_threads(2)
logging.getLogger("coremltools").setLevel(logging.INFO)
transformers.utils.logging.set_verbosity_info()
import packlight
import coremltools
before = here.state()
out = Path(sys.argv[1])
report = packlight.build(
    sys.argv[2], "phone-4bit", output=out, threads=1, max_memory=3 << 30,
    overrides={"calibration.tokens": 256, "calibration.sequence_length": 64, "verify.windows": 2,
               "verify.sequence_length": 32, "verify.gates": {}})
assert report.passed
after_build = here.state()
assert packlight.verify(
    out / "gguf", sys.argv[2], windows=2, sequence_length=32, threads=1).passed
print(json.dumps([before, after_build, here.state()]))
"""


def digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def state() -> dict[str, object]:
    """The process-global state that other code could observe, as JSON."""
    import numpy as np
    import torch
    import transformers

    library = next((Path(np.__file__).parents[1] / "numpy.libs").glob("*openblas*"), None)
    blas = 0
    if library is not None:
        import ctypes

        blas = ctypes.CDLL(str(library)).scipy_openblas_get_num_threads64_()
    return {
        **{f"${name}": digest(value) for name, value in os.environ.items()},
        "folder": os.getcwd(),
        "umask": umask(),
        "torch threads": torch.get_num_threads(),
        "torch grad": torch.is_grad_enabled(),
        "torch dtype": str(torch.get_default_dtype()),
        "OpenBLAS threads": blas,
        "worker threads": machine.worker_threads(),
        "random": digest(random.getstate()),
        "numpy random": digest(np.random.get_state(legacy=True)),
        "numpy errors": np.geterr(),
        "torch random": digest(torch.get_rng_state().tolist()),
        "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "locale": str(locale.setlocale(locale.LC_ALL)),
        "hooks": [str(sys.excepthook), str(sys.unraisablehook), str(threading.excepthook)],
        "warnings": digest(warnings.filters),
        "hidden modules": [name for name, module in sys.modules.items() if module is None],
        "path": sys.path,
        "log levels": {
            name: logging.getLogger(name).level for name in ("", "coremltools", "transformers")
        },
        "verbosity": transformers.utils.logging.get_verbosity(),
        "threads": [thread.name for thread in threading.enumerate() if not thread.daemon],
        "stdout": sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__,
    }


def umask() -> int:
    before = os.umask(0o22)
    os.umask(before)
    return before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("phi3", tmp_path_factory.mktemp("models") / "phi3")


def test_a_build_and_a_verification_leave_the_process_as_it_was(
    model: Path, tmp_path: Path
) -> None:
    unset = ("MKL_CBWR", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out"), str(model)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after_build, after_both = json.loads(done.stdout.splitlines()[-1])
    for after in (after_build, after_both):
        assert {
            key: (before.get(key), after.get(key))
            for key in before | after
            if before.get(key) != after.get(key)
        } == {}


def test_bounds_are_of_their_block_and_their_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cpus", lambda: 8)
    monkeypatch.setattr(machine, "default_threads", lambda: 8)
    inside, leave = threading.Barrier(2, timeout=600), threading.Barrier(2, timeout=600)
    seen = []

    def other() -> None:
        with machine.bounded(threads=3, memory=1):
            inside.wait()
            leave.wait()
            seen.append((machine.worker_threads(), machine.available_memory()))

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    with machine.bounded(threads=5):
        leave.wait()
        thread.join()
        assert machine.worker_threads() == 5
        assert machine.available_memory() > 1
        with machine.bounded(threads=2):
            assert machine.worker_threads() == 2
        assert machine.worker_threads() == 5
    assert machine.worker_threads() == 8
    assert seen == [(3, 0)]


def test_bounds_reach_the_threads_of_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cpus", lambda: 8)
    seen = []
    with machine.bounded(threads=4, memory=1):
        machine.in_threads(lambda *_: seen.append(machine.available_memory()), 8, 1)
        shares = list(machine.in_order([machine.worker_threads] * 3, 2))
        left = list(machine.in_order([machine.available_memory] * 3, 2))
    assert seen == [0] * 4 and left == [0] * 3
    assert shares == [2] * 3


def test_a_setting_is_as_before_when_the_last_block_is_left() -> None:
    setting = ["before"]

    def put(value: str) -> None:
        setting[0] = value

    def change(value: str) -> None:
        machine.change_setting("a test's", lambda: setting[0], put, value)

    first, second = machine.bounded(), machine.bounded()
    first.__enter__()
    change("first")
    second.__enter__()
    change("second")
    first.__exit__(None, None, None)
    assert setting == ["second"]
    second.__exit__(None, None, None)
    assert setting == ["before"]
    change("for good")
    assert setting == ["for good"]


def test_an_abandoned_pool_does_not_keep_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "default_threads", lambda: 8)
    monkeypatch.setattr(machine, "available_cpus", lambda: 8)
    with machine.bounded(threads=4):
        works = machine.in_order([machine.worker_threads] * 9, 2)
        next(works)
        assert machine.worker_threads() == 1
    assert machine.worker_threads() == 8
    works.close()
    assert machine.worker_threads() == 8


PAIR = """
import sys, threading
import packlight

def build(out, threads):
    made.append(packlight.build(
        sys.argv[1], "phone-4bit", output=out, threads=threads, verify=False,
        overrides={"calibration.tokens": 256, "calibration.sequence_length": 64}))

made = []
threads = [threading.Thread(target=build, args=(out, 1 + number))
           for number, out in enumerate(sys.argv[2:])]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
build(sys.argv[2] + "-after", 1)  # one after the other
assert len(made) == len(threads) + 1
"""


def test_builds_of_one_process_give_the_bytes_of_two_processes(model: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PACKLIGHT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", PAIR, str(model), str(tmp_path / "one"), str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = packlight(
        "build", model, "-r", "phone-4bit", "-o", tmp_path / "alone", "--threads", 1, "--no-verify",
        "--set", "calibration.tokens=256", "--set", "calibration.sequence_length=64",
        env={"PACKLIGHT_CACHE": str(tmp_path / "cache-alone")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    def artifacts(name: str) -> str:
        lines = (tmp_path / name / "SHA256SUMS").read_text().splitlines()
        return "\n".join(line for line in lines if "/" in line)

    assert artifacts("alone")
    assert artifacts("one") == artifacts("two") == artifacts("one-after") == artifacts("alone")
