"""Targets that keep step: one at a time, each part of the checkpoint once, the bytes of single
builds; and a clean end for all when one fails or the user has had enough.
"""

from __future__ import annotations

import signal
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import packlight, refused
from compress.build.lockstep import in_lockstep
from test_interrupts import interrupted

from compress.build.write import write_artifacts
from compress.calibration import statistics
from compress.calibration.statistics import LayerStats, input_names
from compress.calibration.step import CalibrationStep, Importance
from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.sources import Source, Stored
from compress.console import Console
from compress.errors import CheckpointError
from compress.plan.job import describe_model, prepare
from compress.recipe import load
from exporters import SHIPYARD

FORMATS = ("gguf", "onnx", "coreml")
CALIBRATED = (
    "quantize.solver=scale_search",
    "calibration.tokens=256",
    "calibration.sequence_length=64",
)
GPTQ = ("quantize.solver=gptq", *CALIBRATED[1:])


class SmallMemory(Checkpoint):
    """A checkpoint on a machine whose page cache holds no more than one block's tensors, or the
    embedding: what was used least recently makes room.

    Attributes:
        from_disk: bytes read from each shard that were not in the cache.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.from_disk = {info.file.name: 0 for info in self.tensors.values()}
        self._cached: OrderedDict[str, int] = OrderedDict()
        blocks = [info.nbytes for info in self.tensors.values() if ".layers.0." in info.name]
        self._room = max(sum(blocks), *(info.nbytes for info in self.tensors.values()))
        self.readers: set[threading.Thread] = set()

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        self.readers.add(threading.current_thread())
        info = self.tensors[name]
        if name not in self._cached:
            self.from_disk[info.file.name] += info.nbytes
        self._cached[name] = info.nbytes
        self._cached.move_to_end(name)
        while sum(self._cached.values()) > self._room:
            self._cached.popitem(last=False)
        return super().read(name, rows)


def shard_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the tensors of each shard."""
    found: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        found[info.file.name] = found.get(info.file.name, 0) + info.nbytes
    return found


def write(
    checkpoint: Checkpoint, folder: Path, formats: tuple[str, ...], *settings: str
) -> dict[str, bytes]:
    """Every file that a build of these targets writes."""
    job = prepare(checkpoint, load("int4-fast", settings, formats), SHIPYARD.get_exporter)
    folder /= "work"
    folder.mkdir(parents=True)
    step = CalibrationStep(job, Importance(), SHIPYARD, Console(), threads=1)
    write_artifacts(step, SHIPYARD, folder, Console())
    places = (folder / name for name in formats)  # not what --resume would go by
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("family", ["llama", "phi3", "phi", "mobilellm", "qwen3"])
def test_each_shard_comes_from_disk_once(family, tmp_path):
    options = {"layer_sharing": True} if family == "mobilellm" else {}
    folder = tiny.make(family, tmp_path / "model", num_hidden_layers=4, shards=3, **options)
    checkpoint = SmallMemory(folder)
    write(checkpoint, tmp_path / "together", FORMATS)
    assert checkpoint.from_disk == shard_bytes(checkpoint)
    assert len(checkpoint.readers) == 3


def test_the_cache_of_these_tests_is_too_small_for_one_target_after_the_other(tmp_path):
    checkpoint = SmallMemory(tiny.make("llama", tmp_path / "model", num_hidden_layers=4))
    for name in FORMATS:
        write(checkpoint, tmp_path / name, (name,))
    (size,) = checkpoint.from_disk.values()
    assert size > 2.9 * checkpoint.nbytes
    assert checkpoint.readers == {threading.main_thread()}  # one target needs no thread


@pytest.mark.parametrize(
    "settings",
    [
        (),
        CALIBRATED,
        ("targets.coreml.grid=lut4-g8", "targets.coreml.rotate=r1r2"),
        ("targets.onnx.embedding_bits=8",),
        GPTQ,
        (*GPTQ, "calibration.propagate=quantized"),
        (
            *CALIBRATED[:1],
            "calibration.tokens=512",
            "calibration.sequence_length=32",
            "quantize.fold=awq",
        ),
    ],
    ids=["plain", "calibrated", "rotated", "tied head apart", "gptq", "propagated", "folded"],
)
def test_the_bytes_are_those_of_builds_of_one_target(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    model = tiny.make("llama3", tmp_path / "model")  # tied
    together = write(Checkpoint.open(model), tmp_path / "together", FORMATS, *settings)
    apart: dict[str, bytes] = {}
    for name in FORMATS:
        mine = tuple(s for s in settings if not s.startswith("targets.") or name in s)
        apart |= write(Checkpoint.open(model), tmp_path / name, (name,), *mine)
    assert together == apart


def test_targets_that_wait_hold_no_hessian(tmp_path, monkeypatch):
    """Whatever a statistic is read for, it is let go before another one is."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    read: list[weakref.ref[LayerStats]] = []
    still_there: list[int] = []

    def load(path: Path, key: str, *, hessian: bool) -> LayerStats | None:
        still_there.append(sum(one() is not None for one in read))
        found = statistics.read(path, key, hessian=hessian)
        assert found is not None and found.hessian is not None
        read.append(weakref.ref(found))
        return found

    monkeypatch.setattr(statistics, "load", load)
    checkpoint = Checkpoint.open(tiny.make("llama", tmp_path / "model"))
    write(checkpoint, tmp_path / "out", FORMATS, *GPTQ)
    inputs = len(list(input_names(describe_model(checkpoint))))
    assert still_there == [0] * (3 * inputs)


# --- the relay --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tiny.make("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=3)
    checkpoint = Checkpoint.open(folder)
    return Stored(checkpoint, describe_model(checkpoint))


NAMES = (
    "embed_tokens.weight",
    *(f"blocks.{n}.{role}.weight" for n in range(3) for role in ("q_proj", "o_proj")),
    "norm.weight",
)


def test_one_runs_at_a_time_and_nobody_runs_ahead(source):
    story: list[tuple[int, str]] = []
    running = threading.Lock()

    def pull(index: int, weights: Source) -> int:
        for name in NAMES:
            weights.read(name)
            assert running.acquire(blocking=False)
            story.append((index, name))
            running.release()
        return index * index

    assert in_lockstep([source] * 3, pull) == [0, 1, 4]
    heads = [".".join(name.split(".")[:-2]) for _, name in story]  # "", blocks.0, …
    assert heads == sorted(heads[:-3]) + [""] * 3
    for index in range(3):
        assert [name for runner, name in story if runner == index] == list(NAMES)


def test_the_first_error_ends_the_others(source, tmp_path):
    """One fails in its second block; the others have come no further, and clean up."""
    story: list[str] = []

    def pull(index: int, weights: Source) -> None:
        file = tmp_path / f"{index}.partial"
        file.touch()
        try:
            for name in NAMES:
                weights.read(name)
                story.append(name)
                if index == 1 and name.startswith("blocks.1"):
                    raise CheckpointError("the first error")
        finally:
            file.unlink()

    with pytest.raises(CheckpointError, match="the first error"):
        in_lockstep([source] * 3, pull)
    assert not any(name.startswith("blocks.2") for name in story)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_reads_nothing_does_not_hold_up_the_others(source):
    def pull(index: int, weights: Source) -> int:
        return sum(weights.read(name).size for name in NAMES) if index == 1 else 0

    none, all_of_them, none_too = in_lockstep([source] * 3, pull)
    assert (none, none_too) == (0, 0) and all_of_them > 0


def test_a_damaged_weight_ends_the_build_with_one_line(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    model = tiny.make("llama", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "built"
    done = packlight("build", model, "-r", "int4-fast", "--no-verify", "-o", output, cwd=tmp_path)
    assert "up_proj.weight has 1 NaN or Inf value(s)" in refused(done)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_targets(tmp_path, number):
    """It arrives while a target works; each cleans up, one after the other."""
    body = """
        from types import SimpleNamespace
        from compress.build.lockstep import in_lockstep

        config = SimpleNamespace(num_hidden_layers=1000, block_repeat=1)
        source = SimpleNamespace(config=config, read=lambda name, rows: None)

        def pull(index, weights):
            try:
                for block in range(1000):
                    weights.read(f"blocks.{block}.q_proj.weight")
                    if (block, index) == (3, 1):
                        print("ready")
                    time.sleep(0.05)
                print("lost")
            finally:
                time.sleep(0.2)
                print("cleaned", index)

        in_lockstep([source] * 3, pull)
        print("lost")
    """
    code, said = interrupted(tmp_path, body, number, number)
    assert sorted(said) == ["0", "1", "2", "cleaned", "cleaned", "cleaned"]
    assert code == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
