"""Selects where the jobs of a batch run: on this machine, or on the nodes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from compress.batch.engine import Engine, LocalEngine
from compress.batch.output_tree import CopyingEngine, OutputTree
from compress.errors import UsageError
from compress.machine import available_cpus, available_memory

__all__ = ["Workers", "open_workers"]


@dataclass(frozen=True)
class Workers:
    """The limits of jobs, and their engine.

    Attributes:
        memory: most bytes that one job may be predicted to use.
        cpus: most CPUs of one job.
        engine: makes the engine for an output tree.
    """

    memory: int
    cpus: int
    engine: Callable[[OutputTree], Engine]


@contextmanager
def open_workers(engine: str, address: str, max_memory: int | None, jobs: int) -> Iterator[Workers]:
    """The workers for the options ``--engine``, ``--address``, ``--max-memory`` and ``--jobs``.

    Raises:
        UsageError: conflicting options, or a cluster that does not answer.
        RuntimeMissingError: Ray is not installed.
    """
    if engine == "local":
        if address:
            raise UsageError("--address is of a Ray cluster", hint="--engine ray")
        memory, cpus = max_memory or available_memory(), available_cpus()

        def make(tree: OutputTree) -> Engine:
            here = LocalEngine(memory, cpus, jobs)
            return CopyingEngine(here, tree.folder, tree.url) if tree.url else here

        yield Workers(memory, cpus, make)
        return
    if max_memory or jobs:
        raise UsageError(
            "--max-memory and --jobs are of this machine alone; Ray goes by what its nodes have",
            hint="`ray start --memory BYTES --num-cpus N` says what a node gives",
        )
    from compress.batch.ray_engine import RayEngine, connected, largest_node

    with connected(address) as ray:
        memory, cpus = largest_node(ray)
        yield Workers(memory, cpus, lambda tree: RayEngine(ray, tree.url, tree.folder))
