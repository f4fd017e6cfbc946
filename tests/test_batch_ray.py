"""The Ray engine on a real cluster of two nodes on this machine, one of which is killed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from test_batch_engine import GIB, Seen, gone, until, work

from compress.batch.engine import LocalEngine, Work
from compress.errors import UsageError

ray = pytest.importorskip("ray")  # the extra packlight[ray]
from compress.batch.ray_engine import RayEngine  # noqa: E402

STORE = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs nothing, and two nodes of one CPU and 4 GiB."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **STORE}
    )
    cluster.nodes = [cluster.add_node(num_cpus=1, memory=4 * GIB, **STORE) for _ in range(2)]
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def build(folder: Path, model: Path, name: str) -> Work:
    arguments = ("build", str(model), "-r", "int4-fast", "-f", "gguf", "-f", "onnx", "--no-verify")
    return work(folder, name, *arguments, "-o", str(folder / name), seconds=5.0)


def job_on(node: Any) -> psutil.Process | None:
    """A job's process on a node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in raylet.children(recursive=True):
        try:
            if "compress.batch.child" in process.cmdline():
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def sums(folder: Path) -> str:
    return (folder / "SHA256SUMS").read_text(encoding="utf-8")


def test_a_node_dies_and_every_job_ends_once_with_the_same_bytes(cluster, tmp_path):
    models = [tiny.make(family, tmp_path / family) for family in ("llama", "qwen2")]
    names = [f"job{number}" for number in range(4)]

    def works(folder: Path) -> list[Work]:
        return [build(folder, models[n % 2], name) for n, name in enumerate(names)]

    killed: list[psutil.Process] = []
    seen, lost = Seen(), cluster.nodes[1]
    with closing(RayEngine(cluster.address).run(works(tmp_path / "ray"), seen)) as outcomes:
        for outcome in outcomes:
            seen.ended.append(outcome)
            if not killed:
                killed.append(until(lambda: job_on(lost)))
                cluster.remove_node(lost, allow_graceful=False)
    assert sorted(outcome.name for outcome in seen.ended) == names
    assert [outcome.code for outcome in seen.ended] == [0] * 4, seen.ended
    assert gone(killed[0].pid)
    assert sorted(seen.names) == names

    local = Seen().of(LocalEngine(2 * GIB, 2), works(tmp_path / "local"))
    assert [outcome.code for outcome in local.ended] == [0] * 4
    for name in names:
        assert sums(tmp_path / "ray" / name) == sums(tmp_path / "local" / name)
        assert not list((tmp_path / "ray").glob(f"{name}.*partial"))


def test_a_tree_behind_a_url_has_the_same_bytes(cluster, tmp_path):
    """Nodes that share no disk: each copies its folder to the URL, and reports come back."""
    model = tiny.make("llama", tmp_path / "llama")
    url = f"file://{tmp_path}/store"
    jobs = [build(tmp_path / "here", model, f"job{n}") for n in range(2)]
    jobs.append(work(tmp_path / "here", "missing", "build", "/nowhere", "-o", "out"))
    engine = RayEngine(cluster.address, url, tmp_path / "tree")
    codes = {outcome.name: outcome.code for outcome in Seen().of(engine, jobs).ended}
    assert codes == {"job0": 0, "job1": 0, "missing": 2}
    for name in ("job0", "job1"):
        there, told = tmp_path / "store" / name, tmp_path / "tree" / name
        assert (
            subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=there).returncode == 0
        )
        assert sums(told) == sums(there)
        assert (told / "report.json").read_bytes() == (there / "report.json").read_bytes()
        assert not (told / "gguf").exists()
    assert not (tmp_path / "store" / "missing").exists()
    assert not (tmp_path / "here" / "job0").exists()


def test_a_command_that_fails_is_not_repeated(cluster, tmp_path):
    missing = work(tmp_path, "missing", "build", str(tmp_path / "nothing"))
    seen = Seen().of(RayEngine(cluster.address), [missing, work(tmp_path, "good")])
    codes = {outcome.name: outcome.code for outcome in seen.ended}
    assert codes == {"missing": 2, "good": 0}
    (failed,) = (outcome for outcome in seen.ended if outcome.name == "missing")
    assert "is not a folder with a checkpoint" in failed.error
    assert seen.names.count("missing") == 1


def test_a_job_waits_for_the_one_before_it(cluster, tmp_path):
    first = work(tmp_path, "first")
    second = work(tmp_path, "second", seconds=9.0, after="first")
    seen = Seen().of(RayEngine(cluster.address), [second, first])
    assert seen.names == ["first", "second"]
    assert seen.most == 1


def test_a_job_larger_than_every_node_is_told(cluster, tmp_path):
    seen = Seen().of(RayEngine(cluster.address), [work(tmp_path, "huge", memory=64 * GIB)])
    (outcome,) = seen.ended
    assert outcome.code == 2 and "no node can hold it" in outcome.error
    assert seen.names == []


def test_nothing_more_starts_when_no_more_is_wanted(cluster, tmp_path):
    works = [work(tmp_path, f"job{n}") for n in range(5)]
    seen = Seen(limit=1).of(RayEngine(cluster.address), works)
    assert 1 <= len(seen.ended) < 5
    assert sorted(seen.names) == sorted(outcome.name for outcome in seen.ended)


@pytest.mark.parametrize(
    ("address", "why"),
    [("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1"), ("ray://here:1a", "is not the address")],
)
def test_no_cluster_is_one_clear_line(address, why, tmp_path):
    with pytest.raises(UsageError) as caught:
        Seen().of(RayEngine(address), [work(tmp_path, "job")])
    assert why in caught.value.message
