"""Runs jobs on the nodes of a Ray cluster: one task each, placed by predicted memory and CPUs.

Ray decides where and when, and restarts a job elsewhere when its node or worker is lost; a command
that ends by itself, successfully or not, is never repeated. The output tree must be storage that
all nodes share, or a URL; all of them must have the same version of packlight.

https://docs.ray.io/en/latest/ray-core/tasks.html, …/fault_tolerance/tasks.html
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress import __version__
from compress.batch.engine import Outcome, Watch, Work, longest_first, run_work
from compress.batch.output_tree import fetch_records, run_and_copy
from compress.console import format_bytes
from compress.decoder.config_json import json_or_empty
from compress.errors import RuntimeMissingError, UsageError, one_line
from compress.output.checksums import NAME as SUMS
from compress.output.folder import locked

__all__ = ["RayEngine"]

RETRIES = 3  # restarts of a job whose node or worker was lost
LOST = 300.0  # seconds that a job on a lost node has to end
PERIOD = 1.0  # seconds between checks whether more jobs are wanted


class RayEngine:
    """Runs jobs as Ray tasks.

    Args:
        ray: the connected module (``connected``).
        url: of an output tree that nodes copy their folders to; empty where they share the tree.
        tree: the tree; with a URL, this machine's part of it.
    """

    def __init__(self, ray: Any, url: str, tree: Path) -> None:
        self._ray, self._url, self._tree = ray, url, tree

    def run(self, works: Sequence[Work], watch: Watch) -> Generator[Outcome, None, None]:
        """See ``Engine.run``. A job that fits on no node ends with code 2, unstarted."""
        ray = self._ray
        task = ray.remote(run_on_node)
        waiting = longest_first(works)
        running: dict[Any, Work] = {}
        begun: set[str] = set()
        try:
            while True:
                for work in [work for work in waiting if is_free(work, waiting, running)]:
                    if not watch.wanted():
                        break
                    waiting.remove(work)
                    if reason := misfit(ray, work):
                        yield Outcome(work.name, 2, 0.0, error=reason)
                        continue
                    options = {"num_cpus": work.threads, "memory": work.memory}
                    stream = task.options(
                        **options, max_retries=RETRIES, name=work.name, num_returns="streaming"
                    ).remote(work, __version__, self._url)
                    running[stream] = work
                if not running:
                    return
                ready, _ = ray.wait(list(running), num_returns=1, timeout=PERIOD)
                for stream in ready:
                    event = next_event(ray, stream, running[stream])
                    if event is None:
                        begun.add(running[stream].name)
                        watch.started(running[stream])
                    else:
                        del running[stream]
                        if event.copied:
                            fetch_records(self._url, event.name, self._tree)
                        yield event
                if not watch.wanted():
                    for stream in [s for s, work in running.items() if work.name not in begun]:
                        ray.cancel(stream)
                        del running[stream]
        finally:
            for stream in running:
                # This ends the worker, and so the job: its stdin closes (compress.batch.child).
                ray.cancel(stream, force=True)


def run_on_node(work: Work, version: str, url: str) -> Iterator[Outcome | None]:
    """The Ray task: yields None when the job starts, then its outcome."""
    if version != __version__:
        reason = f"this node has packlight {__version__}, the batch {version}"
        yield Outcome(work.name, 2, 0.0, error=reason, hint="install the same on all nodes")
        return
    yield None
    if url:
        yield run_and_copy(work, url)
        return
    yield finished_before(work) or run_work(work)


def finished_before(work: Work) -> Outcome | None:
    """The outcome of a job that finished on a node before that was lost; None where it did not."""
    if "-o" not in work.arguments:
        return None
    output = Path(work.arguments[work.arguments.index("-o") + 1])
    await_lock(output)
    # With --overwrite an existing output may be older than the batch, so it is not counted.
    if "--overwrite" in work.arguments or not (output / SUMS).is_file():
        return None
    failed = json_or_empty(output / "report.json").get("verdict") == "failed"
    return Outcome(work.name, int(failed), 0.0)


def await_lock(output: Path) -> None:
    """Wait until no process writes to an output: the same job may still run on a lost node."""
    deadline = time.monotonic() + LOST
    while time.monotonic() < deadline:
        try:
            with locked(output):
                return
        except UsageError:
            time.sleep(0.5)


def next_event(ray: Any, stream: Any, work: Work) -> Outcome | None:
    """The next event of a task; a task that Ray has given up becomes an outcome."""
    try:
        event: Outcome | None = ray.get(next(stream))
        return event
    except (ray.exceptions.RayError, StopIteration) as error:
        reason = f"given up by Ray after {RETRIES} retries: {one_line(error)}"
        return Outcome(work.name, -9, 0.0, error=reason)


def is_free(work: Work, waiting: Sequence[Work], running: dict[Any, Work]) -> bool:
    """Whether a job may start: its ``after``, if any, has ended."""
    return work.after not in {other.name for other in (*waiting, *running.values())}


def largest_node(ray: Any) -> tuple[int, int]:
    """Memory in bytes and CPUs of the node with the most memory."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sizes = [(int(node.get("memory", 0)), int(node.get("CPU", 0))) for node in nodes]
    return max((size for size in sizes if size[1]), default=(0, 1))


def misfit(ray: Any, work: Work) -> str:
    """Why a job fits on no current node, so that Ray would never start it; ``""`` where it fits."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(
        node.get("memory", 0) >= work.memory and node.get("CPU", 0) >= work.threads
        for node in nodes
    ):
        return ""
    memory, cpus = largest_node(ray)
    return (
        f"no node can hold it: it takes {format_bytes(work.memory)} and {work.threads} CPUs, the "
        f"largest has {format_bytes(memory)} and {cpus}"
    )


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield the connected ``ray`` module; a local cluster started here is stopped afterwards.

    Args:
        address: ``HOST:PORT`` or ``auto`` of a cluster; empty: that of ``RAY_ADDRESS``, or else a
            local one.

    Raises:
        RuntimeMissingError: Ray is not installed.
        UsageError: the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise RuntimeMissingError(
            "Ray is not installed", hint='pip install "packlight[ray]"'
        ) from error
    if address and address != "auto":
        check_answers(address)  # Ray itself would retry for minutes
    try:
        ray.init(
            address=address or None,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"no Ray cluster at {address or 'RAY_ADDRESS'}: {one_line(error)}",
            hint="--address HOST:PORT, or none for a cluster on this machine alone",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_answers(address: str) -> None:
    """Check that a server listens at ``HOST:PORT``.

    Raises:
        UsageError: none does, or the address is invalid.
    """
    hint = "--address HOST:PORT as `ray start --head` prints it, or none for this machine alone"
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"{address} is not the address of a Ray cluster", hint=hint)
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UsageError(f"no Ray cluster at {address}: {one_line(error)}", hint=hint) from error
