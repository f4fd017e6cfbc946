"""A model from a Hub that makes its bytes as they are asked for: traffic, and the disk it takes.

    python benchmarks/streaming.py --model phi-3-medium-4k --layers 0 -o streaming.json

The shards are those of ``make_checkpoint.py`` without a byte in them (headers and sparse files);
``range_hub.py`` serves them on 127.0.0.1 with weights that depend on file and offset alone. So a
model of 28 GB is built on a disk that does not hold it, and the largest sum of all files at any
request is measured: the Hub's cache, blocks of the checkpoint (a file without a name), the output.
``--same`` also writes the shards, builds from the folder, and compares the artifacts' hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent), str(HERE)]

from make_checkpoint import make  # noqa: E402
from range_hub import RangeHub, Served  # noqa: E402

PIECE = 1 << 20  # bytes that one seed makes


def weights(seed: int, start: int, stop: int) -> bytes:
    """Bytes of a shard: bfloat16 of 2⁻⁸ to 2⁻⁴, by offset."""
    first, last = start // PIECE, -(-stop // PIECE)
    parts = []
    for piece in range(first, last):
        raw = np.random.Generator(np.random.Philox(key=[seed, piece])).bytes(PIECE)
        bits = np.frombuffer(raw, "<u2")
        parts.append(((bits & 0x807F) | ((119 + (bits >> 8 & 3)) << 7)).astype("<u2").tobytes())
    return b"".join(parts)[start - first * PIECE : stop - first * PIECE]


def served(shard: Path) -> Served:
    """A shard with the header of a file and made weights."""
    with shard.open("rb") as stream:
        length = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(0)
        header = stream.read(length)
    seed, size = zlib.crc32(shard.name.encode()), shard.stat().st_size

    def read(start: int, stop: int) -> bytes:
        if start >= length:
            return weights(seed, start, stop)
        return (header[start:stop] + weights(seed, length, max(stop, length)))[: stop - start]

    return Served(read, size, hashlib.sha1(shard.name.encode()).hexdigest())


class Disk:
    """The bytes of all files below some folders, and of a process's files without a name."""

    def __init__(self, *folders: Path) -> None:
        self.folders, self.pid, self.largest, self.unnamed = folders, 0, 0, 0

    def measure(self) -> None:
        """Note the sum, if it is the largest so far."""
        named = unnamed = 0
        for folder in self.folders:
            for path in folder.rglob("*"):
                with suppress(OSError):
                    named += path.lstat().st_blocks * 512 if path.is_file() else 0
        for handle in Path("/proc").glob(f"{self.pid}/fd/*"):
            with suppress(OSError):
                if os.readlink(handle).endswith("(deleted)"):
                    unnamed += handle.stat().st_blocks * 512
        self.unnamed = max(self.unnamed, unnamed)
        self.largest = max(self.largest, named + unnamed)


def build(
    model: str,
    output: Path,
    environment: dict[str, str],
    started: Callable[[int], None],
    *more: str,
) -> float:
    """``packlight build`` in a process of its own; returns seconds."""
    words = ["build", model, "-r", "int4-fast", "-f", "gguf", "--no-verify", "-o", str(output)]
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "compress", *words, *more], env=environment)
    started(process.pid)
    if process.wait():
        raise SystemExit(process.returncode)
    return time.monotonic() - begun


def sums(folder: Path) -> dict[str, str]:
    """Name → SHA-256 of the artifacts in a build's folder."""
    found = {}
    for path in sorted(folder.glob("gguf/*")):
        with path.open("rb") as stream:
            found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def run(model: str, layers: int, place: Path, same: bool) -> dict[str, Any]:
    """Serve a model, build it, and measure."""
    folder = make(model, place / "headers" / model, layers=layers, weights=False)
    hub = RangeHub()
    files: dict[str, Served] = {}
    for path in folder.iterdir():
        shard = path.suffix == ".safetensors"
        files[path.name] = served(path) if shard else Served(path.read_bytes())
    hub.repositories[f"someone/{model}"] = files
    home, output = place / "home", place / "out"
    disk = Disk(home, output.with_name("out.partial"), output)
    hub.on_range = disk.measure
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = kept | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "PACKLIGHT_CACHE": str(home / "packlight"),
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(HERE.parent),
    }

    def started(pid: int) -> None:
        disk.pid = pid

    seconds = build(f"someone/{model}", output, environment, started, "--fetch", "streaming")
    disk.measure()
    total = sum(one.size for name, one in files.items() if name.endswith(".safetensors"))
    artifact = sum(path.stat().st_size for path in output.glob("gguf/*"))
    found: dict[str, Any] = {
        "model": model, "layers": layers or "all", "seconds": round(seconds),
        "checkpoint_bytes": total, "fetched_bytes": hub.fetched, "requests": len(hub.ranges),
        "artifact_bytes": artifact, "largest_disk_bytes": disk.largest,
        "largest_block_bytes": disk.unnamed, "sha256": sums(output),
    }  # fmt: skip
    hub.close()
    if same:
        for name, one in files.items():
            if name.endswith(".safetensors"):
                with (folder / name).open("r+b") as stream:
                    for start in range(0, one.size, 16 * PIECE):
                        stream.write(one.read(start, min(start + 16 * PIECE, one.size)))
        # As transformers saves it; general.organization comes from there.
        config = json.loads((folder / "config.json").read_text())
        config["_name_or_path"] = f"someone/{model}"
        (folder / "config.json").write_text(json.dumps(config))
        build(str(folder), place / "local", environment, lambda pid: None)
        found["same_as_from_a_folder"] = sums(place / "local") == found["sha256"]
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", __doc__ or "")[0])
    parser.add_argument("--model", default="phi-3-medium-4k")
    parser.add_argument("--layers", type=int, default=0, help="only so many; 0: all")
    parser.add_argument("--same", action="store_true", help="compare with a build from a folder")
    parser.add_argument("--place", type=Path, help="a folder to work in; default: TMPDIR")
    parser.add_argument("-o", "--output", type=Path, help="JSON; the rows in it are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        row = run(options.model, options.layers, Path(place), options.same)
    print(json.dumps(row, indent=2))
    if options.output:
        rows = json.loads(options.output.read_text()) if options.output.exists() else []
        options.output.write_text(json.dumps([*rows, row], indent=2) + "\n")


if __name__ == "__main__":
    main()
