"""What a batch stands on: the machines for its jobs, and the place of its output tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compress.batch.away import Publishing
from compress.batch.engine import Engine, LocalEngine
from compress.checkpoint.remote import fingerprint_text, is_url
from compress.errors import UsageError
from compress.machine import available_cpus, available_memory
from compress.output.cache import cache_folder
from compress.plan.job import model_name

__all__ = ["Ground", "Tree", "stand_on"]


@dataclass(frozen=True)
class Tree:
    """Where the output tree is.

    Attributes:
        folder: on this machine, or on storage that all machines share.
        url: that finished jobs are copied to; then ``folder`` keeps their reports and checksums
            alone. Empty for a tree that is a folder.
    """

    folder: Path
    url: str = ""

    @classmethod
    def at(cls, place: str) -> Tree:
        """A folder or a URL."""
        if not is_url(place):
            return cls(Path(place).resolve())
        name = f"{model_name(place)}-{fingerprint_text(place)[:12]}"
        return cls(cache_folder("batch") / "trees" / name, place.rstrip("/"))


@dataclass(frozen=True)
class Ground:
    """What jobs may take, and what runs them.

    Attributes:
        memory: bytes that one job may be predicted to take.
        cpus: that one job may keep busy.
        engine: makes the engine for a tree.
    """

    memory: int
    cpus: int
    engine: Callable[[Tree], Engine]


@contextmanager
def stand_on(engine: str, address: str, max_memory: int | None, jobs: int) -> Iterator[Ground]:
    """The ground of the options ``--engine``, ``--address``, ``--max-memory`` and ``--jobs``.

    Raises:
        UsageError: options that do not fit together, or a cluster that does not answer.
        RuntimeMissingError: Ray is not installed.
    """
    if engine == "local":
        if address:
            raise UsageError("--address is of a Ray cluster", hint="--engine ray")
        memory, cpus = max_memory or available_memory(), available_cpus()

        def make(tree: Tree) -> Engine:
            here = LocalEngine(memory, cpus, jobs)
            return Publishing(here, tree.folder, tree.url) if tree.url else here

        yield Ground(memory, cpus, make)
        return
    if max_memory or jobs:
        raise UsageError(
            "--max-memory and --jobs are of this machine alone; Ray goes by what its nodes have",
            hint="`ray start --memory BYTES --num-cpus N` says what a node gives",
        )
    from compress.batch.ray_engine import RayEngine, connected, largest_node

    with connected(address) as ray:
        memory, cpus = largest_node(ray)
        yield Ground(memory, cpus, lambda tree: RayEngine(ray, tree.url, tree.folder))
