"""Work is kept, and builds that want the same take turns at it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compress.errors import UsageError
from compress.output.cache import cache_folder, taking_turns


def test_one_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    lock, inside, most = tmp_path / "key.lock", [], []

    def work(number: int) -> None:
        with taking_turns(lock):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))
    assert most == [1] * 24
    assert list(tmp_path.iterdir()) == []


def hold(lock: Path, told: multiprocessing.synchronize.Event) -> None:
    with taking_turns(lock):
        told.set()
        time.sleep(60)


def test_the_dead_let_go(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "key.lock", held))
    holder.start()
    assert held.wait(60)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with taking_turns(tmp_path / "key.lock"):
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
