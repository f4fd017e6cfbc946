"""exporters.probe: a real artifact in its runtime, in the child process that builds use."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from exported import Exports

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig
from compress.decoder.decoder import Decoder
from compress.errors import ArtifactError, UsageError
from compress.plan.weights import Weights
from compress.solvers import rtn
from compress.verify import BaselineStore, quality, verify_artifact
from compress.verify.child import run_child
from exporters.gguf.runtime import open_runtime


@pytest.fixture(scope="module")
def baseline(exported: Exports, tmp_path_factory: pytest.TempPathFactory) -> BaselineStore:
    checkpoint = Checkpoint.open(exported.checkpoint("llama"))
    config = DecoderConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    decoder = Decoder(config, Weights(Stored(checkpoint, config), rtn).read)
    windows = np.random.default_rng(0).integers(3, 500, (3, 40)).tolist()
    folder = tmp_path_factory.mktemp("baseline")
    return BaselineStore.write(folder, windows, decoder.stream_logits(windows))


def test_a_gguf_file_in_llama_cpp(exported: Exports, baseline: BaselineStore) -> None:
    path = exported("gguf", "llama", type="Q8_0").path
    found = verify_artifact(path, "gguf", baseline, context=64, threads=1)
    assert found.resources.runtime.startswith("llama.cpp")
    assert found.generation.consistent and len(found.generation.tokens) == 32
    assert 1e-6 < found.quality.kl_mean.value < 0.02
    assert found.quality.top1_agreement.value > 0.9
    assert found.resources.peak_memory_bytes is None or (
        found.resources.peak_memory_bytes > path.stat().st_size
    )
    runtime = open_runtime(path, context=64, threads=1)
    here = quality.summarize(quality.score(runtime, baseline))
    runtime.close()
    assert here.kl_mean.value == pytest.approx(found.quality.kl_mean.value, rel=1e-3)
    assert here.perplexity.value == pytest.approx(found.quality.perplexity.value, rel=1e-5)


def test_a_damaged_file_is_an_error_of_ours(
    exported: Exports, baseline: BaselineStore, tmp_path: Path
) -> None:
    whole = exported("gguf", "llama", type="Q8_0").path
    cut = tmp_path / "cut.gguf"
    shutil.copyfile(whole, cut)
    with cut.open("r+b") as file:
        file.truncate(whole.stat().st_size // 2)
    with pytest.raises(ArtifactError, match=r"cut\.gguf"):
        verify_artifact(cut, "gguf", baseline, context=64)


def test_an_unknown_format(baseline: BaselineStore) -> None:
    with pytest.raises(UsageError, match="unknown format 'zip'"):
        verify_artifact(Path("x.zip"), "zip", baseline, context=64)


PARENT = """
import sys
from contextlib import closing
from compress.verify.child import run_child
with closing(run_child([sys.executable, "-c", sys.argv[1]], "it")) as events:
    for event in events:
        print(event["pid"], flush=True)
"""
CHILD = """
import os, time
from compress.verify.child import run_as_child
def work(emit, ask):
    emit({"pid": os.getpid()})
    time.sleep(600)
run_as_child(work)
"""


def test_a_probe_ends_with_its_killed_parent() -> None:
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        probe = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([probe], timeout=60)
    assert not probe.is_running() or probe.status() == psutil.STATUS_ZOMBIE


ABORTING = """
import ctypes
from compress.verify.child import run_as_child
from exporters.gguf.runtime import load_library
run_as_child(lambda emit, ask: load_library().functions.ggml_abort(
    b"ggml.c", ctypes.c_int(7), b"GGML_ASSERT(%s) failed", b"n > 0"))
"""


def test_what_llama_cpp_said_when_it_aborted_is_told() -> None:
    says = r"crashed with SIGABRT while starting: ggml\.c:7: GGML_ASSERT\(n > 0\) failed$"
    with pytest.raises(ArtifactError, match=says):
        list(run_child([sys.executable, "-c", ABORTING], "it"))
