"""Targets written together, by parts of the model: each part of the checkpoint is read once, and
the bytes are those of single builds.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import packlight, refused
from writing import plan_for

from compress.build.write import put_tensors, write_artifacts
from compress.calibration import statistics
from compress.calibration.statistics import LayerStats, Statistics, input_names
from compress.calibration.step import CalibrationStep, Importance
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.checkpoint.sources import Source
from compress.console import Console
from compress.grids import Float32, Grid, Quantized
from compress.plan.job import describe_model, prepare
from compress.plan.shapes import Artifact, Plan, PlanEntry
from compress.plan.weights import Weights
from compress.pruning.transforms import transforms_of
from compress.recipe import load

FORMATS = ("gguf", "onnx", "coreml")
CALIBRATED = (
    "quantize.solver=scale_search",
    "calibration.tokens=256",
    "calibration.sequence_length=64",
)
GPTQ = ("quantize.solver=gptq", *CALIBRATED[1:])


class SmallMemory(Checkpoint):
    """A checkpoint on a machine whose page cache holds no more than one block's tensors, or the
    embedding: the least recently used pages are dropped.

    Attributes:
        from_disk: bytes read from each shard that were not in the cache.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.from_disk = {info.file.name: 0 for info in self.tensors.values()}
        self._cached: OrderedDict[str, int] = OrderedDict()
        blocks = [info.nbytes for info in self.tensors.values() if ".layers.0." in info.name]
        self._room = max(sum(blocks), *(info.nbytes for info in self.tensors.values()))

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
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
    recipe = load("int4-fast", settings, formats)
    job = prepare(checkpoint, recipe, transforms=transforms_of(recipe))
    folder /= "work"
    folder.mkdir(parents=True)
    step = CalibrationStep(job, Importance(), Console(), threads=1)
    write_artifacts(job, step, folder, Console())
    places = (folder / name for name in formats)  # not used by --resume
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("family", ["llama", "phi3", "phi", "mobilellm", "qwen3"])
def test_each_shard_comes_from_disk_once(family, tmp_path):
    options = {"layer_sharing": True} if family == "mobilellm" else {}
    folder = tiny.make(family, tmp_path / "model", num_hidden_layers=4, shards=3, **options)
    checkpoint = SmallMemory(folder)
    write(checkpoint, tmp_path / "together", FORMATS)
    assert checkpoint.from_disk == shard_bytes(checkpoint)


def test_the_cache_of_these_tests_is_too_small_for_one_target_after_the_other(tmp_path):
    checkpoint = SmallMemory(tiny.make("llama", tmp_path / "model", num_hidden_layers=4))
    for name in FORMATS:
        write(checkpoint, tmp_path / name, (name,))
    (size,) = checkpoint.from_disk.values()
    assert size > 2.9 * checkpoint.nbytes


@pytest.mark.parametrize(
    "settings",
    [
        (),
        CALIBRATED,
        ("targets.coreml.grid=lut4-g8",),
        ("targets.onnx.embedding_bits=8", "targets.onnx.head_bits=4"),
        GPTQ,
        (*GPTQ, "calibration.propagate=quantized"),
        (
            *CALIBRATED[:1],
            "calibration.tokens=512",
            "calibration.sequence_length=32",
            "quantize.fold=awq",
        ),
    ],
    ids=["plain", "calibrated", "palettes", "tied head apart", "gptq", "propagated", "folded"],
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
    """A statistic is freed before the next one is loaded."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    read: list[weakref.ref[LayerStats]] = []
    still_there: list[int] = []
    before = statistics.load

    def load(path: Path, key: str, *, hessian: bool) -> LayerStats | None:
        still_there.append(sum(one() is not None for one in read))
        found = before(path, key, hessian=hessian)
        assert found is not None and found.hessian is not None
        read.append(weakref.ref(found))
        return found

    monkeypatch.setattr(statistics, "load", load)
    checkpoint = Checkpoint.open(tiny.make("llama", tmp_path / "model"))
    write(checkpoint, tmp_path / "out", FORMATS, *GPTQ)
    inputs = len(list(input_names(describe_model(checkpoint))))
    assert still_there == [0] * (3 * inputs)


# --- the loop ---------------------------------------------------------------------------------


class Recorder:
    """A writer that records its calls."""

    def __init__(self, plan: Plan, weights: Weights, calls: list[tuple[str, str]]) -> None:
        self.plan, self.weights, self.file = plan, weights, Path("file")
        self._calls = calls

    def put(self, entry: PlanEntry) -> int:
        self._calls.append((self.plan.format, entry.name))
        return len(self._calls)

    def close(self) -> Artifact:
        raise NotImplementedError


def unused(weight: Float32, grid: Grid, name: str) -> Quantized:
    raise AssertionError(name)


def parts_of(plan: Plan, blocks: int) -> list[str]:
    """The part of each entry: embedding, blocks and end; of a table that of the entry before."""
    parts = ["embed_tokens"]
    for entry in plan.entries:
        first, *number = entry.name.split(".")[:2]
        if first == "blocks":
            parts.append(f"block {int(number[0])}")
        elif first != "rope":
            parts.append(first if first == "embed_tokens" else f"block {blocks}")
        else:
            parts.append(parts[-1])
    return parts[1:]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tiny.make("llama3", tmp_path_factory.mktemp("model"), num_hidden_layers=3)
    checkpoint = Checkpoint.open(folder)
    return Stored(checkpoint, describe_model(checkpoint))


def test_each_part_goes_to_all_writers_before_the_next(source):
    """And of a writer's entries each once, in the order of its plan."""
    calls: list[tuple[str, str]] = []
    writers = [
        Recorder(plan_for(name, source.config), Weights(source, unused), calls)
        for name in FORMATS
    ]  # fmt: skip
    put_tensors(writers, lambda nbytes: None)
    parts = ["embed_tokens", *(f"block {number}" for number in range(4))]
    order = []
    for writer in writers:
        plan = writer.plan
        assert [name for format, name in calls if format == plan.format] == [
            entry.name for entry in plan.entries
        ]
        order.append(list(zip(parts_of(plan, 3), plan.entries, strict=True)))
    assert calls == [
        (writer.plan.format, entry.name)
        for part in parts
        for writer, entries in zip(writers, order, strict=True)
        for of_it, entry in entries
        if of_it == part
    ]
    for writer in writers:
        ends = [row["end"] for row in writer.weights.ledger.values()]
        assert len(ends) == len(writer.plan.entries)
        assert ends == sorted(ends)  # as the writers said


def test_what_a_ledger_has_is_not_put_again_but_counted(source):
    calls: list[tuple[str, str]] = []
    told: list[int] = []
    plan = plan_for("gguf", source.config)
    there = plan.entries[1::3]
    weights = Weights(source, unused)
    for entry in there:
        weights.ledger.add(entry.target_name, Path("file"), 7)
    put_tensors([Recorder(plan, weights, calls)], told.append)
    assert [name for _, name in calls] == [e.name for e in plan.entries if e not in there]
    assert told == [entry.nbytes for entry in there]


def test_statistics_are_let_go_at_the_end_of_each_part(source):
    class Counted(Statistics):
        def forget(self) -> None:
            calls.append(("", "forget"))

    calls: list[tuple[str, str]] = []
    weights = Weights(source, unused, statistics=Counted.of(source.config, {}))
    plan = plan_for("onnx", source.config)
    put_tensors([Recorder(plan, weights, calls)], lambda nbytes: None)
    found = [name for _, name in calls]
    parts = parts_of(plan, 3)
    for before, part, entry in zip([parts[0], *parts], parts, plan.entries, strict=False):
        if part != before:
            assert found.pop(0) == "forget"
        assert found.pop(0) == entry.name
    assert found == ["forget"]


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
