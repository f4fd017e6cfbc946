"""The Ray engine on a real cluster of two nodes on this machine, one of which is killed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from commands import packlight, refused, until
from test_batch_engine import GIB, Seen, gone, work

from compress import __version__
from compress.batch.engine import LocalEngine, Outcome, Work, run_work
from compress.errors import UsageError

ray = pytest.importorskip("ray")  # the extra packlight[ray]
from compress.batch.ray_engine import RayEngine, connected, run_on_node  # noqa: E402

pytestmark = pytest.mark.slow  # a cluster of three raylets

STORE = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head node without jobs, and two nodes of one CPU and 4 GiB."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **STORE}
    )
    cluster.nodes = [cluster.add_node(num_cpus=1, memory=4 * GIB, **STORE) for _ in range(2)]
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def build(folder: Path, model: Path, name: str) -> Work:
    """A job as made by ``packlight batch``, which resumes the job of a lost node."""
    arguments = ("build", str(model), "-r", "int4-fast", "-f", "gguf", "-f", "onnx", "--no-verify")
    return work(folder, name, *arguments, "--resume", "-o", str(folder / name), seconds=5.0)


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


def on(cluster: Any, works: list[Work], seen: Seen, url: str = "", tree: Path = Path()) -> Seen:
    with connected(cluster.address) as connection:
        return seen.of(RayEngine(connection, url, tree), works)


def sums(folder: Path) -> str:
    return (folder / "SHA256SUMS").read_text(encoding="utf-8")


def files(folder: Path) -> list[str]:
    """Names and digests of all files but pages."""
    pages = ("README.md", "report.html", "report.json")
    return [line for line in sums(folder).splitlines() if not line.endswith(pages)]


def test_a_node_dies_and_every_job_ends_once_with_the_same_bytes(cluster, tmp_path):
    models = [tiny.make(family, tmp_path / family) for family in ("llama", "qwen2")]
    names = [f"job{number}" for number in range(4)]

    def works(folder: Path) -> list[Work]:
        return [build(folder, models[n % 2], name) for n, name in enumerate(names)]

    killed: list[psutil.Process] = []
    lost = cluster.nodes[1]

    class Killing(list[Outcome]):
        def append(self, outcome: Outcome) -> None:
            super().append(outcome)
            if not killed:
                killed.append(until(lambda: job_on(lost)))
                cluster.remove_node(lost, allow_graceful=False)

    seen = Seen()
    seen.ended = Killing()
    on(cluster, works(tmp_path / "ray"), seen)
    assert sorted(outcome.name for outcome in seen.ended) == names
    assert [outcome.code for outcome in seen.ended] == [0] * 4, seen.ended
    assert gone(killed[0].pid)
    assert sorted(seen.names) == names

    local = Seen().of(LocalEngine(2 * GIB, 2), works(tmp_path / "local")[:2])
    assert [outcome.code for outcome in local.ended] == [0] * 2
    for number, name in enumerate(names):  # of each model two, whose pages name their folders
        ours, theirs = tmp_path / "ray" / name, tmp_path / "local" / names[number % 2]
        assert files(ours) == files(theirs) and len(files(ours)) > 5
        assert number > 1 or sums(ours) == sums(theirs)
        assert not list((tmp_path / "ray").glob(f"{name}.*partial"))


def test_a_job_that_ended_with_its_node_is_not_done_again(tmp_path):
    """A node that is lost after the rename: the retry finds the job finished."""
    job = build(tmp_path, tiny.make("llama", tmp_path / "llama"), "job")
    first = run_work(job)
    assert first.code == 0
    before = (tmp_path / "job" / "SHA256SUMS").stat().st_mtime_ns
    started, outcome = run_on_node(job, __version__, "")
    assert started is None and outcome is not None
    assert outcome.code == 0, outcome
    assert (tmp_path / "job" / "SHA256SUMS").stat().st_mtime_ns == before


def test_a_node_with_another_version_refuses(tmp_path):
    (outcome,) = run_on_node(work(tmp_path, "job"), "0.0.1", "")
    assert outcome is not None and outcome.code == 2 and "0.0.1" in outcome.error


def test_a_tree_behind_a_url_has_the_same_bytes(cluster, tmp_path):
    """Nodes that share no disk: each copies its folder to the URL, and reports come back."""
    model = tiny.make("llama", tmp_path / "llama")
    url = f"file://{tmp_path}/store"
    jobs = [build(tmp_path / "here", model, f"job{n}") for n in range(2)]
    jobs.append(work(tmp_path / "here", "missing", "build", "/nowhere", "-o", "out"))
    seen = on(cluster, jobs, Seen(), url, tmp_path / "tree")
    codes = {outcome.name: outcome.code for outcome in seen.ended}
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


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_command_with_models_and_a_tree_behind_urls(engine, cluster, tmp_path):
    """`packlight batch` makes the same tree with both engines, and skips finished jobs."""
    tiny.make("llama", tmp_path / "shelf" / "llama")
    (tmp_path / "jobs.yaml").write_text(
        f"schema: 1\noutput: file://{tmp_path}/store\nmodels: ['file://{tmp_path}/shelf/*']\n"
        "recipes: [int4-fast]\nformats: [gguf]\noptions: {verify: false}\n"
    )
    options = {"local": ("--jobs", "1"), "ray": ("--engine", "ray", "--address", cluster.address)}
    command = ("batch", tmp_path / "jobs.yaml", *options[engine])
    environment = {"PACKLIGHT_CACHE": str(tmp_path / "cache")}
    done = packlight(*command, "-q", env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"file://{tmp_path}/store/llama/int4-fast\n"
    folder = tmp_path / "store" / "llama" / "int4-fast"
    assert list((folder / "gguf").glob("*.gguf"))
    assert (tmp_path / "store" / "batch.html").is_file()
    before = (folder / "SHA256SUMS").stat().st_mtime_ns
    again = packlight(*command, "--json", env=environment)
    assert again.returncode == 0, again.stderr
    (job,) = json.loads(again.stdout)["jobs"]
    assert job["status"] == "written" and not job["now"]
    assert (folder / "SHA256SUMS").stat().st_mtime_ns == before


def test_options_of_one_engine_are_refused_with_the_other(tmp_path):
    (tmp_path / "jobs.yaml").write_text("schema: 1\nmodels: [org/model]\n")
    for options in (("--engine", "ray", "--jobs", "2"), ("--address", "auto")):
        assert "hint:" in refused(packlight("batch", tmp_path / "jobs.yaml", *options))


def test_a_command_that_fails_is_not_repeated(cluster, tmp_path):
    missing = work(tmp_path, "missing", "build", str(tmp_path / "nothing"))
    seen = on(cluster, [missing, work(tmp_path, "good")], Seen())
    codes = {outcome.name: outcome.code for outcome in seen.ended}
    assert codes == {"missing": 2, "good": 0}
    (failed,) = (outcome for outcome in seen.ended if outcome.name == "missing")
    assert "is not a folder with a checkpoint" in failed.error
    assert seen.names.count("missing") == 1


def test_a_job_waits_for_the_one_before_it(cluster, tmp_path):
    first = work(tmp_path, "first")
    second = work(tmp_path, "second", seconds=9.0, after="first")
    seen = on(cluster, [second, first], Seen())
    assert seen.names == ["first", "second"]
    assert seen.most == 1


def test_a_job_larger_than_every_node_is_told(cluster, tmp_path):
    seen = on(cluster, [work(tmp_path, "huge", memory=64 * GIB)], Seen())
    (outcome,) = seen.ended
    assert outcome.code == 2 and "no node can hold it" in outcome.error
    assert seen.names == []


def test_nothing_more_starts_when_no_more_is_wanted(cluster, tmp_path):
    works = [work(tmp_path, f"job{n}") for n in range(5)]
    seen = on(cluster, works, Seen(limit=1))
    assert 1 <= len(seen.ended) < 5
    assert sorted(seen.names) == sorted(outcome.name for outcome in seen.ended)


@pytest.mark.parametrize(
    ("address", "why"),
    [("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1"), ("ray://here:1a", "is not the address")],
)
def test_no_cluster_is_one_clear_line(address, why):
    with pytest.raises(UsageError) as caught:
        connected(address).__enter__()
    assert why in caught.value.message
