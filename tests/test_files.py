"""Locks between processes, work that is done once, files written whole, scratch folders."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compress.errors import PacklightError, UsageError
from compress.files import (
    cache_folder,
    check_place,
    computed_once,
    file_lock,
    read_corpus,
    scratch_folder,
    write_whole,
)


def test_one_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    lock, inside, most = tmp_path / "key.lock", [], []

    def work(number: int) -> None:
        with file_lock(lock):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))
    assert most == [1] * 24
    assert list(tmp_path.iterdir()) == []


def hold(lock: Path, held: multiprocessing.synchronize.Event) -> None:
    with file_lock(lock):
        held.set()
        time.sleep(600)


def test_the_dead_let_go(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "key.lock", held))
    holder.start()
    assert held.wait(60)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with file_lock(tmp_path / "key.lock"):
        assert (tmp_path / "key.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot write to") as refused:
        cache_folder("hashes")
    assert "PACKLIGHT_CACHE" in refused.value.hint


def test_a_lock_that_is_held_is_not_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "key.lock"
    with file_lock(lock):
        with pytest.raises(BlockingIOError), file_lock(lock, wait=False):
            pass
        assert lock.exists()  # it belongs to its owner
    with file_lock(lock, wait=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_many_want_is_computed_once(tmp_path: Path) -> None:
    place, together, computed = tmp_path / "found", threading.Barrier(6), []

    def load() -> str | None:
        return place.read_text() if place.exists() else None

    def compute() -> str:
        computed.append(1)
        time.sleep(0.05)  # the other threads arrive meanwhile
        write_whole(place, "found")
        return "found"

    def want(_: int) -> str:
        together.wait(600)
        return computed_once(tmp_path / "key.lock", load, compute)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(want, range(6))) == ["found"] * 6
    assert computed == [1]
    place.unlink()  # damaged, say
    assert computed_once(tmp_path / "key.lock", load, compute) == "found"
    assert computed == [1, 1]


def test_a_file_is_whole_whoever_reads_and_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    texts = [str(digit) * 100_000 for digit in range(4)]
    write_whole(file, texts[0])

    def write(text: str) -> None:
        for _ in range(20):
            write_whole(file, text)

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(write, text) for text in texts]
        while not all(future.done() for future in done):
            assert file.read_text() in texts
        for future in done:
            future.result()
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


HOLD = """
import sys, time
from pathlib import Path
from compress.files import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "logits").write_text("many")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_scratch_folder_is_empty_and_gone_at_the_end(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as folder:
        assert list(folder.iterdir()) == []
        (folder / "logits").write_text("many")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), scratch_folder(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_what_the_next_one_clears(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout is not None
        assert living.stdout.readline() == "ready\n"
        with scratch_folder(tmp_path):
            held = [path for path in tmp_path.rglob("logits")]
            assert len(held) == 1  # a living process keeps its own
        living.send_signal(signal.SIGKILL)
        living.wait()
    assert held[0].exists()
    with scratch_folder(tmp_path):
        assert not held[0].exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["a file beside", "a lock with words", "a link"])
def test_a_folder_that_only_has_a_scratch_folders_name_stays(tmp_path: Path, kind: str) -> None:
    mine, lock = tmp_path / "packlight-mine.scratch", "lock"
    if kind == "a link":
        (tmp_path / "elsewhere" / "work").mkdir(parents=True)
        mine.symlink_to("elsewhere")
    else:
        (mine / "work").mkdir(parents=True)
    (mine / "work" / "thesis").write_text("years of work")
    (mine / lock).write_text("words" if kind == "a lock with words" else "")
    if kind == "a file beside":
        (mine / "thesis").touch()
    with scratch_folder(tmp_path):
        assert (mine / "work" / "thesis").exists()
    assert (mine / "work" / "thesis").exists()


def readers() -> dict[str, Callable[[Path], object]]:
    from compress.batch.jobs import read_jobs
    from compress.calibration.texts import read_words
    from compress.checkpoint.not_a_checkpoint import other_file
    from compress.decoder.config_json import read_json
    from compress.output.checksums import read_checksums, sha256_of
    from compress.verify.tasks import read_task
    from exporters.coreml.mil import read_package
    from exporters.gguf.head import read_head
    from exporters.gguf.runtime import check_head
    from exporters.onnx.inspection import describe

    def raise_other(path: Path) -> None:
        raise other_file(path)

    return {
        "JSON": read_json,
        "jobs": read_jobs,
        "text": lambda path: read_words(path, "", ""),
        "a file as MODEL": raise_other,
        "checksums": read_checksums,
        "a digest": sha256_of,
        "task": read_task,
        "Manifest.json": lambda path: read_package(path.parent),
        "GGUF head": read_head,
        "GGUF in llama.cpp": check_head,
        "ONNX": lambda path: describe(path.parent),
    }


@pytest.mark.parametrize("reader", list(readers()))
def test_nobody_waits_for_a_pipe(tmp_path: Path, reader: str) -> None:
    name = {"Manifest.json": "Manifest.json", "ONNX": "a.onnx"}.get(reader, "pipe")
    os.mkfifo(tmp_path / name)
    with pytest.raises((PacklightError, OSError), match=r"plain file|it has no Manifest\.json"):
        readers()[reader](tmp_path / name)


@pytest.mark.parametrize("reader", ["JSON", "jobs", "text", "checksums", "task", "ONNX"])
def test_nobody_reads_twenty_gigabytes_of_holes(tmp_path: Path, reader: str) -> None:
    file = tmp_path / "a.onnx"
    file.touch()
    os.truncate(file, 20 * 10**9)
    with pytest.raises((PacklightError, OSError), match="20,000,000,000 bytes are more than"):
        readers()[reader](file)


def test_a_place_that_would_wait_for_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"--junit .*pipe is a pipe"):
        check_place("--junit", tmp_path / "pipe")


@pytest.mark.parametrize("text", ["a\nb\n", "a\r\nb\r\n", "a\rb\r"])
def test_a_corpus_has_the_line_ends_of_python(tmp_path: Path, text: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    assert read_corpus(file) == file.read_text(encoding="utf-8") == "a\nb\n"


@pytest.mark.parametrize(("there", "kept"), [(b"", False), (b"<?xml", False), (b"{}", True)])
def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path, there: bytes, kept: bool) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(there)
    if not kept:
        return check_place("--junit", file, begins=b"<")
    with pytest.raises(UsageError, match="is a file of another kind"):
        check_place("--junit", file, begins=b"<")
