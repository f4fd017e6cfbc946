"""The ledger of finished tensors, and writers that continue an interrupted one."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from writing import plan_for, write

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig
from compress.grids import get_grid
from compress.plan.weights import Ledger, Weights
from compress.solvers import rtn


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(bytes(100))
    return path


def test_a_ledger_remembers(tmp_path, data):
    path = tmp_path / "ledger"
    first = Ledger(path, "Q4_0")
    first.add("a", data, 10, offset=3)
    first.add("b", data, 20)
    again = Ledger(path, "Q4_0")
    assert ("a" in again, "c" in again, len(again)) == (True, False, 2)
    assert again["a"] == {"done": "a", "end": 10, "offset": 3}
    assert [row["end"] for row in again.values()] == [10, 20]
    assert again.cut(data)
    assert data.stat().st_size == 20
    assert len(Ledger(path, "Q8_0")) == 0  # something else is written now
    assert len(Ledger(path, "Q4_0")) == 0


def test_a_ledger_without_a_file_is_empty_at_first(data):
    ledger = Ledger()
    assert not ledger.cut(data)
    ledger.add("a", data, 10)
    assert "a" in ledger


def test_every_torn_end_is_left_out(tmp_path, data):
    path = tmp_path / "ledger"
    ledger = Ledger(path, "t")
    ledger.add("a", data, 10)
    whole = path.stat().st_size
    ledger.add("b", data, 20)
    written = path.read_bytes()
    for end in range(len(written)):
        path.write_bytes(written[:end])
        again = Ledger(path, "t")
        assert len(again) == (end >= whole)
        again.add("c", data, 30)
        assert len(Ledger(path, "t")) == len(again)
    path.write_bytes(written[:whole] + bytes(40))  # pages that were never written to disk
    assert len(Ledger(path, "t")) == 1


def test_a_file_shorter_than_its_ledger_is_written_anew(tmp_path, data):
    ledger = Ledger(tmp_path / "ledger", "t")
    ledger.add("a", data, 101)
    assert not ledger.cut(data)
    assert len(ledger) == 0
    assert len(Ledger(tmp_path / "ledger", "t")) == 0
    ledger.add("a", data, 10)
    data.unlink()
    assert not Ledger(tmp_path / "ledger", "t").cut(data)


def test_after_a_loss_of_power_only_what_was_synced_counts(tmp_path, data):
    boot, path = tmp_path / "boot_id", tmp_path / "ledger"
    boot.write_text("one\n")

    def opened(sync_every: float = 1e9) -> Ledger:
        return Ledger(path, "t", sync_every=sync_every, boot=boot)

    opened().add("a", data, 10)
    opened(-1.0).add("b", data, 20)
    opened().add("c", data, 30)
    assert len(opened()) == 3
    boot.write_text("two\n")
    assert list(opened()) == ["a", "b"]
    opened().add("c", data, 30)
    assert len(opened()) == 3
    boot.unlink()  # a system without a boot id
    assert len(opened()) == 2


class Killed(BaseException):
    pass


class Mortal:
    """A solver that counts its calls, and ends the process at the n-th."""

    def __init__(self, life: int) -> None:
        self.left, self.calls = life, 0

    def __call__(self, weight, grid, name):
        if self.left == 0:
            raise Killed
        self.left -= 1
        self.calls += 1
        return rtn(weight, grid)


SETTINGS = {
    "gguf": {"type": "Q4_K_M"},
    "onnx": {"bits": 4, "group_size": 32},
    "coreml": {"grid": "lut4-g16", "context": 64},
    "coreml iphone-ane": {"preset": "iphone-ane", "chunk": "500KB", "context": 64},
}
SLAB = 1 << 16  # a small one, so that a tensor has several


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Stored:
    checkpoint = Checkpoint.open(tiny.make("phi3", tmp_path_factory.mktemp("m") / "tiny"))
    return Stored(checkpoint, DecoderConfig.from_hf(checkpoint.config))


@pytest.mark.parametrize("format", SETTINGS)
def test_a_writer_goes_on_where_it_was_cut_off(format, source, tmp_path):
    plan = plan_for(format.split()[0], source.config, SETTINGS[format], model_name="m")
    whole = tmp_path / "whole"
    whole.mkdir()
    counted = Mortal(-1)
    expected = write(plan, Weights(source, counted, slab=SLAB), whole)

    folder, ledger = tmp_path / "resumed", tmp_path / "ledger"
    folder.mkdir()
    calls, finished, told = 0, [0], []
    for life in (0, 1, 2, 6, 8, 5, 8, -1):
        solver = Mortal(life)
        weights = Weights(source, solver, Ledger(ledger, plan.type_name), slab=SLAB)
        told.clear()
        try:
            artifact = write(plan, weights, folder, told.append)
        except Killed:
            for name in ("*.gguf", "**/weight.bin", "**/*_data"):  # half a tensor more
                for file in folder.glob(name):
                    file.write_bytes(file.read_bytes() + b"half a tensor")
            with ledger.open("ab") as stream:
                stream.write(b'{"done": "torn')
        calls += solver.calls
        finished.append(len(Ledger(ledger, plan.type_name)))
    assert artifact.nbytes == expected.nbytes
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    for file in files:
        assert (whole / file).read_bytes() == (folder / file).read_bytes(), file
    # What was finished was not solved again: at most one tensor each time, of a few slabs.
    assert finished == sorted(finished) and finished[-2] > 3
    slabs = (1 << 18) // SLAB  # of gate_up_proj, the largest
    assert calls <= counted.calls + 7 * (slabs - 1)
    assert sum(told) == plan.weights_bytes  # earlier lines count


@pytest.mark.parametrize("format", SETTINGS)
def test_bytes_do_not_depend_on_how_many_slabs_are_solved_at_once(format, source, tmp_path):
    plan = plan_for(format.split()[0], source.config, SETTINGS[format], model_name="m")
    found, threads = [], []

    def solve(weight, grid, name):
        threads.append(threading.get_ident())
        return rtn(weight, grid)

    for at_once, slab in ((1, None), (2, SLAB), (3, SLAB)):  # whole tensors the first time
        folder = tmp_path / str(at_once)
        folder.mkdir()
        threads.clear()
        weights = Weights(source, solve, at_once=at_once, slab=slab)
        write(plan, weights, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        found.append([(path.relative_to(folder), path.read_bytes()) for path in files])
        assert (len(set(threads)) > 1) == (at_once > 1)
    assert found[0] == found[1] == found[2] and len(found[0]) > 0


def test_a_failure_in_a_thread_ends_the_writer(source, tmp_path):
    plan = plan_for("gguf", source.config, SETTINGS["gguf"], model_name="m")
    before = threading.active_count()
    with pytest.raises(Killed):
        write(plan, Weights(source, Mortal(5), at_once=3, slab=SLAB), tmp_path)
    assert threading.active_count() == before


def test_a_ledger_tells_of_rows_that_fell_back(source, tmp_path, data):
    class Falls:
        def __call__(self, weight, grid, name):
            return replace(rtn(weight, grid), fallen=3)

    name, grid = "blocks.0.o_proj.weight", get_grid("Q8_0")
    ledger = tmp_path / "ledger"
    weights = Weights(source, Falls(), Ledger(ledger, "t"))
    for rows in (slice(0, 8), slice(8, 16)):
        weights.quantize(name, grid, rows)
    assert weights.fallen == {name: 6}
    weights.ledger.add("o", data, 10, weight=name, fallen=6)
    again = Weights(source, Falls(), Ledger(ledger, "t"))
    assert again.notes() == weights.notes() != ()
    again.quantize(name, grid, slice(0, 8))  # as a trial does, to know how long it takes
    assert again.notes() == weights.notes()
