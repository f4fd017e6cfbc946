"""Settings of every test: one thread per process, no network, no colour."""

from __future__ import annotations

import os
import socket

import pytest

import exporters  # noqa: F401 -- fills the table of formats

# Before torch loads: two xdist workers with two OpenMP threads each fight over two cores, which
# makes small kernels tens of times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["NO_COLOR"] = "1"


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """A separate cache, so that the user's cache is not used."""
    os.environ["PACKLIGHT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Artifacts of tiny checkpoints, each made once in a worker: see ``exported.py``."""
    from exported import Exports

    return Exports(tmp_path_factory.mktemp("exported"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Allow connections to this machine only."""
    import psutil

    real = socket.socket.connect
    ours = {row.address for rows in psutil.net_if_addrs().values() for row in rows}

    def connect(self, address):
        if not (isinstance(address, str) or address[0] in {"localhost", *ours}):
            raise OSError(f"a test may not reach {address}")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="renew help.md and schemas")


# The longest files first: a long file at the end leaves one of two workers idle.
LONG = (
    "test_batch", "test_readme", "test_gptq", "test_batch_ray", "test_resume", "test_pruning",
    "test_process_state", "test_extension", "test_propagation", "test_descent",
    "test_calibrated_build", "test_gguf", "test_path", "test_wheel", "test_shipped_recipes",
    "test_allocation", "test_coreml_package", "test_mil_evaluator", "test_api", "test_cli",
    "test_heal", "test_action", "test_gitlab", "test_make_checkpoint", "test_threads",
    "test_baseline_cache", "test_write", "test_file_bytes", "test_kquant", "test_coreml",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
