"""Measures the saving of writing all targets in one loop (``compress.build.write``).

    python benchmarks/make_checkpoint.py qwen2.5-0.5b -o model
    python benchmarks/shared_reading.py model [--room 400MB]

The checkpoint is read in slabs without writing; then four builds that round to nearest run, each in
its own process: every target alone, and all in one.
Then all in one loop, and in sequence in one process, with a page cache limited to ``--room`` of the
checkpoint: the least recently used pages are dropped during reading (``posix_fadvise``). Every row
begins with none of the checkpoint in the page cache. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

# Uses internal names: counts the bytes that writing reads from a checkpoint.
import exporters  # noqa: F401 -- fills the table of formats
from compress.build.write import write_artifacts
from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.safetensors import TensorInfo
from compress.console import Console, parse_bytes
from compress.plan.job import prepare
from compress.recipe import load

FORMATS = ("gguf", "onnx", "coreml")
SLAB = 1 << 23


class LittleRoom(Checkpoint):
    """A checkpoint of which the page cache keeps no more than ``room`` bytes."""

    room = sys.maxsize

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        kept = self.__dict__.setdefault("kept", OrderedDict())
        values = super().read(name, rows)
        kept[name] = self.tensors[name]
        kept.move_to_end(name)
        while len(kept) > 1 and sum(info.nbytes for info in kept.values()) > self.room:
            drop(kept.popitem(last=False)[1])
        return values


def drop(info: TensorInfo) -> None:
    """Drop the pages of a tensor from the page cache."""
    handle = os.open(info.file, os.O_RDONLY)
    os.posix_fadvise(handle, info.offset, info.nbytes, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def write(checkpoint: Checkpoint, formats: tuple[str, ...], folder: Path) -> None:
    """The artifacts of some targets."""
    job = prepare(checkpoint, load("int4-fast", (), formats), transforms={})
    (folder / "work").mkdir(parents=True)
    write_artifacts(job, None, folder / "work", Console())


def read_all(checkpoint: Checkpoint) -> None:
    """Every weight once, by slabs as the writers take them."""
    for name, info in checkpoint.tensors.items():
        rows = max(SLAB // (info.shape[1] if len(info.shape) > 1 else 1), 1)
        for start in range(0, info.shape[0], rows):
            checkpoint.read(name, slice(start, start + rows))


def run(model: Path, builds: list[list[str]], room: int) -> dict[str, float]:
    """Run builds in sequence in this process; their resources."""
    LittleRoom.room = room
    checkpoint = LittleRoom(model)
    for info in checkpoint.tensors.values():
        drop(info)
    begin, before = time.perf_counter(), from_disk()
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        for formats in builds:
            write(checkpoint, tuple(formats), Path(folder) / formats[0])
        if not builds:
            read_all(checkpoint)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "wall_seconds": time.perf_counter() - begin,
        "checkpoints_from_disk": (from_disk() - before) / checkpoint.nbytes,
        "peak_rss_mb": used.ru_maxrss / 1000,
    }


def from_disk() -> int:
    """Bytes that this process has read from disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--room", type=parse_bytes, default=parse_bytes("400MB"))
    parser.add_argument("--only", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options.model, *options.only)))
        return
    everything = sys.maxsize
    rows: dict[str, tuple[list[list[str]], int]] = {
        "reading only": ([], everything),
        **{name: ([[name]], everything) for name in FORMATS},
        "all in one": ([list(FORMATS)], everything),
        "little room, all in one": ([list(FORMATS)], options.room),
        "little room, one by one": ([[name] for name in FORMATS], options.room),
    }
    print("| | CPU s | wall s | checkpoints read from disk | peak RSS, MB |")
    print("|---|---:|---:|---:|---:|")
    seconds: dict[str, float] = {}
    for label, only in rows.items():
        command = [sys.executable, __file__, str(options.model), "--only", json.dumps(only)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        took = json.loads(done.stdout.splitlines()[-1])
        seconds[label] = took["cpu_seconds"]
        print(
            f"| {label} | {took['cpu_seconds']:.1f} | {took['wall_seconds']:.1f} "
            f"| {took['checkpoints_from_disk']:.2f} | {took['peak_rss_mb']:.0f} |",
            flush=True,
        )
    bound = sum(seconds[name] for name in FORMATS) - 2 * seconds["reading only"]
    print(f"all in one: {seconds['all in one'] / bound:.2f} of the three less two readings, CPU")


if __name__ == "__main__":
    main()
