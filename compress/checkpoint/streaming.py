"""A checkpoint whose shards stay on the server: headers on opening, weights in ranges when read.

On disk are the small files, and some gigabytes of the blocks that were read last
(``compress.checkpoint.blocks``); so a build needs the room of a shard, and not of the model. Each
pass over the weights fetches what is not among them again: one pass to write, one to calibrate,
one to compute the float model's answers (docs/checkpoints.md).
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from compress.checkpoint.blocks import BLOCK, MOST, BlockCache, cut
from compress.checkpoint.hub import WEIGHTS, download, weight_files
from compress.checkpoint.ranges import HubFile, RemoteFile, StoreFile, Traffic
from compress.checkpoint.remote import at_store, fetch_small, is_copied
from compress.checkpoint.safetensors import TensorInfo, scan_safetensors
from compress.console import format_bytes
from compress.decoder.config_json import json_or_empty
from compress.errors import CheckpointError, without_secrets
from compress.files import cache_folder

__all__ = ["RemoteShards", "find_hub", "find_url"]

HEAD = 1 << 17  # bytes of a shard's first request: most headers are shorter
AT_ONCE = 8  # requests for headers at a time
ROOM = 2  # times the weights: what a build takes of the disk where it downloads them (docs/ci.md)


class RemoteShards:
    """The safetensors shards of a checkpoint on a server.

    Attributes:
        files: name → file.
        size: of all of them, in bytes.
        notice: a warning for the user, or ``""``.
        traffic: what was fetched of them.
    """

    def __init__(
        self, files: Mapping[str, RemoteFile], *, block: int = BLOCK, most: int | None = None
    ) -> None:
        """
        Args:
            files: at least one.
            block: bytes of a request at most.
            most: bytes of blocks on disk; None: 5 GB, or an eighth of what is free there.
        """
        self.files = files
        self.size = sum(file.size for file in files.values())
        self.notice = ""
        self.traffic: Traffic = next(iter(files.values())).traffic
        self._tensors: dict[str, TensorInfo] = {}
        self._block, self._most = block, most
        self._lock = threading.Lock()
        self._blocks: BlockCache | None = None  # until the first weight is read

    @cached_property
    def heads(self) -> dict[str, Head]:
        """The beginning of each shard that is not scanned yet, by its name.

        Raises:
            CheckpointError: see ``RemoteFile.read``.
        """
        found = {name: Head(file) for name, file in self.files.items()}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(Head.fetch, found.values()))
        return found

    def scan(self, shard: Path) -> dict[str, TensorInfo]:
        """The tensors of a shard: see ``scan_safetensors``."""
        found = scan_safetensors(shard, lambda file: io.BufferedReader(self.heads.pop(file.name)))
        self._tensors |= found
        return found

    def open(self, shard: Path) -> io.RawIOBase:
        """A stream of the tensors' bytes of a shard."""
        with self._lock:  # several threads may read
            if self._blocks is None:
                self._blocks = self._make_blocks()
        return self._blocks.open(shard)

    def _make_blocks(self) -> BlockCache:
        place, most = cache_folder("streaming"), self._most
        if most is None:
            most = min(MOST, shutil.disk_usage(place).free // 8)
        blocks = cut(self.files, self._tensors.values(), self._block)
        return BlockCache(blocks, place, block=self._block, most=most)

    def digests(
        self, thorough: bool, progress: Callable[[int, int], None], small: int
    ) -> dict[str, str | None]:
        """SHA-256 of each shard; None where it is not known.

        Args:
            thorough: fetch every shard as a whole, hash it, and compare with what the Hub states.
            progress: ``progress(done, total)`` in bytes, of shards that are fetched for that.
            small: bytes of all shards up to which those without a stated hash are fetched.

        Raises:
            CheckpointError: a shard whose bytes are not those that the Hub states.
        """
        found: dict[str, str | None] = {n: file.sha256 or None for n, file in self.files.items()}
        done = 0
        unknown = [file for name, file in self.files.items() if thorough or not found[name]]
        for file in unknown if thorough or self.size <= small else ():
            digest = hashlib.sha256()
            file.read(0, file.size, partial(hash_piece, digest))
            if file.sha256 and digest.hexdigest() != file.sha256:
                raise CheckpointError(
                    f"{file.name} of {file.source} is not what the Hub states: SHA-256 "
                    f"{digest.hexdigest()[:12]}…, not {file.sha256[:12]}…",
                    hint="try again; if it stays so, the file on the server is damaged",
                )
            found[file.name] = digest.hexdigest()
            done += file.size
            progress(done, self.size)
        return found

    def describe_traffic(self) -> str:
        """A line for the report on what was fetched."""
        held = self._blocks.held if self._blocks else 0
        times = self.traffic.bytes / max(1, self.size)
        return (
            f"The weights were read from the server in ranges: {format_bytes(self.traffic.bytes)} "
            f"in {self.traffic.requests:,} requests, {times:.1f} times the checkpoint; at most "
            f"{format_bytes(held)} of them were on disk at a time."
        )


def hash_piece(digest: hashlib._Hash, _offset: int, data: bytes) -> None:
    """A sink that hashes; pieces come in order."""
    digest.update(data)


class Head(io.RawIOBase):
    """The beginning of a shard, fetched as far as it is read."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._data, self._position = file, bytearray(), 0

    def fetch(self, stop: int = HEAD) -> None:
        """Fetch up to an offset, or the end of the file."""
        stop = min(stop, self._file.size)
        if stop > len(self._data):
            self._file.read(len(self._data), stop, lambda _, data: self._data.extend(data))

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset from the start, or from the end."""
        self._position = offset + (self._file.size if whence == os.SEEK_END else 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer."""
        view = memoryview(buffer).cast("B")
        self.fetch(self._position + len(view))
        data = self._data[self._position : self._position + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


Found = tuple[Path, RemoteShards]
"""The folder of the small files, and the shards on the server."""


def find_hub(
    repo_id: str,
    *,
    fetch: str,
    headers: bool,
    revision: str | None,
    token: str | None,
    cache_dir: str | None,
) -> Found | None:
    """Find the shards of a Hub checkpoint without downloading them.

    Args:
        repo_id: of the repository.
        fetch: ``streaming`` or ``auto``.
        headers: no weights are going to be read.
        revision, token, cache_dir: see ``Checkpoint.open``.

    Returns:
        None where it is to be downloaded, or has been.

    Raises:
        CheckpointError: the Hub refuses it; or, with ``streaming``, its weights are pickles.
    """
    path = download(repo_id, revision=revision, token=token, cache_dir=cache_dir, weights=False)
    names = weight_files(path, WEIGHTS[0])
    if not names[1:] and (path / names[0]).is_file():
        return None
    if names[1:] and all((path / name).is_file() for name in names[1:]):
        return None
    stated = json_or_empty(path / f"{WEIGHTS[0]}.index.json").get("metadata")
    size = stated.get("total_size") if isinstance(stated, dict) else None
    if fetch == "auto" and not headers and isinstance(size, int) and has_room(path, size):
        return None
    from huggingface_hub import hf_hub_url

    traffic = Traffic()

    def find(name: str) -> RemoteFile | None:
        url = hf_hub_url(repo_id, name, revision=path.name)
        try:
            return HubFile(name, repo_id, url, token, traffic)
        except FileNotFoundError:
            return None

    try:
        shards = find_all(names, find)
    except CheckpointError:
        if fetch == "auto":  # the download tells why
            return None
        raise
    return decide(fetch, headers, path, repo_id, shards)


def find_url(url: str, cache: Path, *, fetch: str, headers: bool) -> Found | None:
    """Find the shards of a checkpoint behind a URL without copying them; see ``find_hub``.

    Args:
        url: a folder for fsspec.
        cache: folder of the copies, one for each URL.
        fetch: ``streaming`` or ``auto``.
        headers: no weights are going to be read.
    """
    path, fs, found = fetch_small(url, cache)
    names = weight_files(path, WEIGHTS[0])
    stored = [name for name in names if name in found]
    if stored and all(is_copied(name, found[name], path) for name in stored):
        return None
    traffic, source = Traffic(), without_secrets(url)

    def find(name: str) -> RemoteFile | None:
        return StoreFile(name, source, fs, found[name]["name"], traffic) if name in found else None

    with at_store(f"fetch {url}"):
        shards = find_all(names, find)
    return decide(fetch, headers, path, url, shards)


def find_all(
    names: Sequence[str], find: Callable[[str], RemoteFile | None]
) -> dict[str, RemoteFile]:
    """The shards that exist; the single file where it does, as ``Checkpoint`` reads it."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(find, names))
    shards = {file.name: file for file in found if file is not None}
    return {WEIGHTS[0]: shards[WEIGHTS[0]]} if WEIGHTS[0] in shards else shards


def decide(
    fetch: str, headers: bool, path: Path, source: str, shards: Mapping[str, RemoteFile]
) -> Found | None:
    """The shards on the server; None where they are to be downloaded.

    Raises:
        CheckpointError: ``streaming`` of weights that are not safetensors.
    """
    if not shards:
        if fetch == "streaming":
            raise CheckpointError(
                f"{without_secrets(source)} has no weights of safetensors, which alone can be read "
                "in parts",
                hint="--fetch download",
            )
        return None
    found = RemoteShards(shards)
    if fetch == "auto" and not headers:
        if has_room(path, found.size):
            return None
        free = format_bytes(shutil.disk_usage(path).free)
        found.notice = (
            f"the disk has {free} free, less than twice the {format_bytes(found.size)} of the "
            "weights: they are not downloaded, but read from the server in ranges, once for each "
            "pass over them (--fetch)"
        )
    return path, found


def has_room(folder: Path, nbytes: int) -> bool:
    """Whether the disk of a folder has room to download such a checkpoint and to build."""
    return ROOM * nbytes <= shutil.disk_usage(folder).free
