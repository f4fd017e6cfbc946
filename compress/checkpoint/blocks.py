"""Blocks of remote shards in one file of bounded size on disk, fetched when they are read.

A block is some neighbouring tensors of one layer, or a part of a large tensor, and is fetched by
one request; so no byte is fetched for a tensor that is not read, and, as long as a layer fits,
none twice while a layer is read: by several writers, or in slabs of rows. The block that comes
next, of this layer or the next, is fetched ahead, while the last one is being worked on.

The file has no name: it is gone with its process, even after ``kill -9``.
"""

from __future__ import annotations

import bisect
import io
import os
import re
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from compress.checkpoint.ranges import RemoteFile
from compress.checkpoint.safetensors import TensorInfo
from compress.errors import DiskFullError, PacklightError, is_disk_full

__all__ = ["BLOCK", "MOST", "Block", "BlockCache", "cut"]

BLOCK = 1 << 26  # bytes of a request at most: 64 MiB
MOST = 5 * 10**9  # bytes on disk: a shard as transformers saves it by default, at most 5 GB
AHEAD = 2  # blocks that are fetched before they are asked for, each by a thread
SPARE = 4  # blocks beside a layer's: those fetched ahead, and those of its neighbours


@dataclass(frozen=True)
class Block:
    """The bytes ``start:stop`` of a shard; ``layer`` groups blocks that are read together."""

    file: RemoteFile
    start: int
    stop: int
    layer: tuple[int, int, str]


def layer_of(name: str) -> tuple[int, int, str]:
    """Sorts tensors by layer as a model runs: embeddings, the layers by number, and the rest."""
    if found := re.search(r"\.(\d+)\.", name):
        return (1, int(found[1]), "")
    return (0 if re.search("embed|wte", name) else 2, 0, name)


def cut(files: Mapping[str, RemoteFile], tensors: Iterable[TensorInfo], block: int) -> list[Block]:
    """Cut shards into blocks, in the order in which a model's layers are read.

    Args:
        files: by name of the shard.
        tensors: of all shards; what lies between them is in no block.
        block: most bytes of one.
    """
    runs: list[Block] = []
    for info in sorted(tensors, key=lambda info: (info.file.name, info.offset)):
        file, layer, stop = files[info.file.name], layer_of(info.name), info.offset + info.nbytes
        last = runs[-1] if runs else None
        if last and (last.file, last.stop, last.layer) == (file, info.offset, layer):
            runs[-1] = Block(file, last.start, stop, layer)
        else:
            runs.append(Block(file, info.offset, stop, layer))
    blocks = []
    for run in sorted(runs, key=lambda run: (run.layer, run.file.name, run.start)):
        nbytes = run.stop - run.start
        count = -(-nbytes // block)
        edges = [run.start + nbytes * part // count for part in range(count + 1)] if count else []
        blocks += [Block(run.file, *ends, run.layer) for ends in pairwise(edges)]
    return blocks


class Slot:
    """The place of a block in the file, and who reads it.

    Attributes:
        number: of the place.
        ready: the bytes are there.
        used: they have been read; False of a block that was fetched ahead.
        readers: that read it now, the one that fetches it included.
    """

    def __init__(self, number: int) -> None:
        self.number, self.ready, self.used, self.readers = number, False, False, 1


class BlockCache:
    """Reads blocks, and keeps some of them on disk.

    Attributes:
        most: bytes on disk at most.
        held: bytes on disk so far, at most.
    """

    def __init__(
        self, blocks: Sequence[Block], folder: Path, *, block: int = BLOCK, most: int = MOST
    ) -> None:
        """
        Args:
            blocks: from ``cut``.
            folder: for the file, on the disk that holds it.
            block: as for ``cut``.
            most: bytes on disk, or what one layer takes where that is more.
        """
        self._blocks, self._block = blocks, block
        layers: dict[object, list[int]] = {}
        for number, one in enumerate(blocks):
            layers.setdefault(one.layer, []).append(number)
        self._layers = layers
        self._near = max(map(len, layers.values()), default=0) + AHEAD
        self._slots = min(max(most // block, self._near + SPARE), max(len(blocks), 1))
        self.most, self.held = self._slots * block, 0
        self._starts: dict[str, tuple[list[int], list[int]]] = {}
        for number in sorted(range(len(blocks)), key=lambda n: blocks[n].start):
            starts, numbers = self._starts.setdefault(blocks[number].file.name, ([], []))
            starts.append(blocks[number].start)
            numbers.append(number)
        self._there: OrderedDict[int, Slot] = OrderedDict()  # the last used one is last
        self._free = list(range(self._slots))[::-1]
        self._changed = threading.Condition()
        self._file = tempfile.TemporaryFile(prefix="packlight-", dir=folder)  # noqa: SIM115
        self._wanted: list[int] = []  # to be fetched ahead, of the block that was read last
        for _ in range(AHEAD):
            args = (self._changed, self._wanted, weakref.ref(self))
            threading.Thread(target=fetch_ahead, args=args, daemon=True).start()
        weakref.finalize(self, stop_ahead, self._changed, self._wanted)

    def open(self, shard: Path) -> io.RawIOBase:
        """A stream of the tensors' bytes of a shard, by its name; for one thread."""
        return BlockStream(self, shard.name)

    def find(self, shard: str, position: int) -> int:
        """The number of the block that holds a byte of a shard."""
        starts, numbers = self._starts[shard]
        return numbers[bisect.bisect_right(starts, position) - 1]

    def bounds(self, number: int) -> tuple[int, int]:
        """First and last byte of a block in its shard."""
        return self._blocks[number].start, self._blocks[number].stop

    def acquire(self, number: int) -> Slot:
        """The slot of a block, fetched if it is not there; it stays until ``release``.

        Raises:
            CheckpointError: see ``RemoteFile.read``.
            DiskFullError: the disk is full.
        """
        layer = self._layers[self._blocks[number].layer]
        after = range(layer[-1] + 1, min(layer[-1] + 1 + AHEAD, len(self._blocks)))
        next_ones = (*range(number + 1, layer[-1] + 1), *range(layer[0], number), *after)
        while True:
            with self._changed:
                self._wanted[:] = [one for one in next_ones if one not in self._there][:AHEAD]
                self._changed.notify_all()
                slot = self._there.get(number)
                if slot is None:
                    slot = self._changed.wait_for(self._claim)
                    assert slot is not None
                    self._there[number] = slot
                    break
                slot.readers += 1
                slot.used = True
                self._there.move_to_end(number)
                while not slot.ready and self._there.get(number) is slot:
                    self._changed.wait()
                if slot.ready:
                    return slot
        slot.used = True
        self._fetch(number, slot)
        return slot

    def claim_ahead(self, number: int) -> Slot | None:
        """A slot for a block that is not there; None where it is, or all slots are being read.

        Called with ``_changed`` held.
        """
        if number in self._there or (slot := self._claim()) is None:
            return None
        self._there[number] = slot
        return slot

    def fetch_ahead(self, number: int, slot: Slot) -> None:
        """Fetch a claimed block; an error is left to its reader, who tries again."""
        try:
            self._fetch(number, slot)
        except (PacklightError, OSError):
            return
        self.release(slot)

    def release(self, slot: Slot) -> None:
        """Let go of a slot."""
        with self._changed:
            slot.readers -= 1
            self._changed.notify_all()

    def read_into(self, slot: Slot, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from an offset of a block."""
        position = slot.number * self._block + offset
        while buffer:
            count = os.preadv(self._file.fileno(), [buffer], position)
            buffer, position = buffer[count:], position + count

    def _claim(self) -> Slot | None:
        """A slot for another block, or None while all are being read.

        Kept are the blocks used last, a layer of them, those that were fetched ahead since, and
        beside them the first ones: the next pass over the model begins with those. So the one that
        goes was used before this layer, but after all others.
        """
        if self._free:
            return Slot(self._free.pop())
        idle = [n for n, slot in self._there.items() if slot.ready and not slot.readers]
        if not idle:
            return None
        order = list(self._there)
        recent = set(order[-self._near :])
        recent.update(n for n in order[-2 * self._near :] if not self._there[n].used)
        old = [number for number in idle if number not in recent]
        return Slot(self._there.pop(old[-1] if old else idle[0]).number)

    def _fetch(self, number: int, slot: Slot) -> None:
        block, begin = self._blocks[number], slot.number * self._block

        def keep(offset: int, data: bytes) -> None:
            position, rest = begin + offset - block.start, memoryview(data)
            while rest:
                count = os.pwrite(self._file.fileno(), rest, position)
                rest, position = rest[count:], position + count

        done = False
        try:
            block.file.read(block.start, block.stop, keep)
            done = True
        except OSError as error:
            if is_disk_full(error):
                raise DiskFullError(
                    f"no room left for the {self.most:,} bytes of the checkpoint that are kept "
                    "while it is read",
                    hint="free some space, or set PACKLIGHT_CACHE to a folder on another disk",
                ) from error
            raise
        finally:
            with self._changed:
                if done:
                    slot.ready = True
                    self.held = max(self.held, os.fstat(self._file.fileno()).st_blocks * 512)
                else:
                    del self._there[number]
                    self._free.append(slot.number)
                self._changed.notify_all()


STOP = -1  # in place of a block's number


def fetch_ahead(
    changed: threading.Condition, wanted: list[int], cache: Callable[[], BlockCache | None]
) -> None:
    """A thread that fetches wanted blocks until the cache is dropped."""
    while True:
        with changed:
            while not wanted:
                changed.wait()
            number = wanted.pop(0)
            if number == STOP or (found := cache()) is None:
                return
            slot = found.claim_ahead(number)
        if slot is not None:
            found.fetch_ahead(number, slot)
        del found


def stop_ahead(changed: threading.Condition, wanted: list[int]) -> None:
    """End the threads of ``fetch_ahead``."""
    with changed:
        wanted[:] = [STOP] * AHEAD
        changed.notify_all()


class BlockStream(io.RawIOBase):
    """Reads a shard's tensors, as its open file would; holds the block that it has read last."""

    def __init__(self, cache: BlockCache, shard: str) -> None:
        self._cache, self._shard, self._position = cache, shard, 0
        self._held: tuple[int, int, Slot] | None = None

    def readable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset from the shard's start."""
        assert whence == os.SEEK_SET
        self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, up to the end of a block."""
        view = memoryview(buffer).cast("B")
        if not view:
            return 0
        if self._held is None or not self._held[0] <= self._position < self._held[1]:
            self._let_go()
            number = self._cache.find(self._shard, self._position)
            self._held = (*self._cache.bounds(number), self._cache.acquire(number))
        start, stop, slot = self._held
        view = view[: stop - self._position]
        self._cache.read_into(slot, self._position - start, view)
        self._position += len(view)
        return len(view)

    def close(self) -> None:
        """Let go of the block."""
        self._let_go()
        super().close()

    def _let_go(self) -> None:
        if self._held is not None:
            self._cache.release(self._held[2])
            self._held = None
