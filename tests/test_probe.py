"""exporters.probe: a real artifact in its runtime, in the child process that builds use."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from exported import Exports

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig
from compress.decoder.decoder import Decoder
from compress.errors import ArtifactError, UsageError
from compress.plan.weights import Weights
from compress.solvers import rtn
from compress.verify import BaselineStore, quality, verify_artifact
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
