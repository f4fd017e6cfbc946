"""`packlight batch`: real processes of the command line, killed, interrupted and resumed."""

from __future__ import annotations

import html
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny
from commands import Step, packlight, refused, until

from compress.batch.document import errors, markdown
from compress.batch.page import render
from compress.output.folder import locked

RECIPE = """
schema: 1
name: {name}
targets: {{gguf: {{type: Q4_0}}}}
quantize: {{solver: {solver}}}
calibration: {{tokens: 256, sequence_length: 32}}
verify: {{windows: 2, sequence_length: 32, gates: {{kl_divergence: "<={limit}"}}}}
"""
JOBS = """
schema: 1
output: {output}
models: ["shelf/*"]
recipes: [plain.yaml, scaled.yaml]
overrides:
  - jobs: "[csq]*/scaled"
    skip: true
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Two good models, one truncated, one of an unknown architecture, and two recipes."""
    shop = tmp_path_factory.mktemp("shop")
    tiny.make("llama", shop / "shelf" / "llama")
    tiny.make("qwen2", shop / "shelf" / "qwen")
    shutil.copytree(shop / "shelf" / "llama", shop / "shelf" / "cut")
    weights = shop / "shelf" / "cut" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    shutil.copytree(shop / "shelf" / "qwen", shop / "shelf" / "strange")
    config = shop / "shelf" / "strange" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"model_type": "t5", "architectures": ["T5Model"]}))
    (shop / "plain.yaml").write_text(RECIPE.format(name="plain", solver="rtn", limit=9))
    (shop / "scaled.yaml").write_text(RECIPE.format(name="scaled", solver="scale_search", limit=9))
    (shop / "jobs.yaml").write_text(JOBS.format(output="tree"))
    (shop / "written.yaml").write_text(JOBS.format(output="other") + "options: {verify: false}\n")
    return shop


def at_work(tree: str, name: str, number: int, to: str) -> Step:
    """A job of a batch, half of whose tensors are written."""
    return Step(rf"open .*/{tree}/{name}\.partial/.*/gguf\.ledger", 9, number, to)


def interrupted(shop: Path, step: Step, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A batch that is sent a signal at a step of one of its jobs, or that job is."""
    return packlight("batch", *arguments, cwd=shop, env=step.variables())


def command_lines() -> Iterator[str]:
    """Arguments of all processes."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            yield from process.cmdline()


def told(shop: Path, tree: str) -> dict:
    return json.loads((shop / tree / "batch.json").read_text())


def statuses(document: dict) -> dict[str, str]:
    return {job["name"]: job["status"] for job in document["jobs"]}


def started(output: str) -> list[str]:
    return re.findall(r"^started  (\S+)", output, re.MULTILINE)


def artifacts(folder: Path) -> dict[str, bytes]:
    """The files of a build, without the pages that contain speeds."""
    pages = ("report", "README", "SHA256SUMS")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(pages)
    }


@pytest.fixture(scope="module")
def shelf(shop) -> tuple[Path, dict, str]:
    """The models in one batch, one job of which is killed."""
    step = at_work("tree", "qwen/plain", signal.SIGKILL, "itself")
    batch = interrupted(shop, step, "jobs.yaml", "--max-memory", "3GB")
    assert batch.returncode == 2, batch.stderr
    return shop, told(shop, "tree"), batch.stderr


def test_what_fails_takes_nothing_with_it(shelf):
    shop, document, output = shelf
    assert statuses(document) == {
        "cut/plain": "error",
        "llama/plain": "passed",
        "llama/scaled": "passed",
        "qwen/plain": "killed",
        "strange/plain": "error",
    }
    errors = {job["name"]: job["error"] for job in document["jobs"] if job["status"] == "error"}
    assert "truncated" in errors["cut/plain"]
    assert "T5Model" in errors["strange/plain"]
    assert "could not run  cut/plain  " in output
    assert not (shop / "tree" / "cut").exists()
    assert sorted(path.name for path in (shop / "tree" / "llama").iterdir()) == ["plain", "scaled"]


def test_work_of_one_model_is_done_once(shelf):
    """The longest job of a model runs first, the other reuses the float model's logits."""
    shop, _, output = shelf
    assert started(output).index("llama/scaled") < started(output).index("llama/plain")
    phases = {
        name: {json.loads(line)["phase"] for line in file.read_text().splitlines()}
        for name in ("llama/scaled", "llama/plain")
        for file in [shop / "tree" / ".batch" / f"{name}.progress"]
    }
    assert "score the float model" in phases["llama/scaled"] - phases["llama/plain"]
    assert "verify gguf Q4_0" in phases["llama/plain"]
    first, second = (
        json.loads((shop / "tree" / name / "report.json").read_text())["baseline"]
        for name in ("llama/scaled", "llama/plain")
    )
    assert first == second
    assert not list((shop / "tree").rglob("baselines"))


def test_predictions_are_upper_bounds(shelf):
    _, document, _ = shelf
    for job in document["jobs"]:
        if job["status"] == "passed":
            assert 0 < job["peak_memory_bytes"] < job["predicted"]["memory_bytes"]
            assert job["predicted"]["bytes"] < sum(a["bytes"] for a in job["artifacts"])


@pytest.mark.slow
def test_again_retries_the_killed_one_only_when_asked(shelf):
    shop, *_ = shelf
    before = artifacts(shop / "tree" / "llama" / "plain")
    again = packlight("batch", "jobs.yaml", cwd=shop)
    assert again.returncode == 2
    assert started(again.stderr) == []
    assert "killed  qwen/plain" in again.stderr
    retried = packlight("batch", "jobs.yaml", "--retry-failed", "--json", cwd=shop)
    document = json.loads(retried.stdout)
    assert retried.returncode == document["exit_code"] == 2  # bad input is still bad
    assert [job["name"] for job in document["jobs"] if job["now"]] == ["qwen/plain"]
    assert statuses(document)["qwen/plain"] == "passed"
    assert artifacts(shop / "tree" / "llama" / "plain") == before
    # A finished model is not planned again.
    shutil.copytree(shop / "shelf" / "llama", shop / "shelf" / "cut", dirs_exist_ok=True)
    mended = packlight("batch", "jobs.yaml", "--only", "cut/plain", "--only", "llama", cwd=shop)
    assert mended.returncode == 0, mended.stderr
    assert started(mended.stderr) == ["cut/plain"]


def test_a_batch_that_was_killed_does_what_is_missing(shelf):
    shop, *_ = shelf
    options = ("written.yaml", "-o", "second", "--only", "llama", "--jobs", "1")
    # The second: llama/scaled is done.
    step = at_work("second", "llama/plain", signal.SIGKILL, "parent")
    batch = interrupted(shop, step, *options)
    assert batch.returncode == -signal.SIGKILL
    until(
        lambda: all(f"{shop}/second/" not in word for word in command_lines())
    )  # the child ends, too
    assert (shop / "second" / "llama" / "scaled").is_dir()
    assert not (shop / "second" / "llama" / "plain").exists()
    again = packlight("batch", *options, cwd=shop)
    assert again.returncode == 0, again.stderr
    assert started(again.stderr) == ["llama/plain"]
    for name in ("llama/plain", "llama/scaled"):
        assert artifacts(shop / "second" / name) == artifacts(shop / "tree" / name)
    assert not list((shop / "second").glob("*/*.partial"))


def test_interrupted(shelf):
    """Ctrl-C ends the jobs; the next batch resumes them."""
    shop, *_ = shelf
    step = at_work("third", "qwen/plain", signal.SIGINT, "parent")
    batch = interrupted(shop, step, "written.yaml", "-o", "third", "--only", "qwen/plain")
    assert "interrupted; the same command goes on with what is there" in batch.stderr
    assert batch.returncode == 130
    assert statuses(told(shop, "third")) == {"qwen/plain": "interrupted"}
    assert told(shop, "third")["exit_code"] == 2


def test_a_gate_that_fails_is_exit_code_1_and_stops_a_batch_that_should_not_go_on(shelf):
    shop, *_ = shelf
    (shop / "strict.yaml").write_text(RECIPE.format(name="strict", solver="rtn", limit=1e-6))
    jobs = {
        "schema": 1,
        "models": ["shelf/llama"],
        "recipes": ["strict.yaml", "plain.yaml"],
        "options": {"set": {"verify.windows": 2}},
    }
    (shop / "strict-jobs.yaml").write_text(json.dumps(jobs))
    files = ["--junit", "junit.xml", "--summary", "summary.md"]
    done = packlight("batch", "strict-jobs.yaml", "--fail-fast", "--jobs", "1", *files, cwd=shop)
    assert done.returncode == 1, done.stderr
    (suite,) = ET.parse(shop / "junit.xml").getroot()
    assert suite.attrib["name"] == "llama/strict GGUF Q4_0"
    assert suite.attrib["failures"] == "1"
    assert "- llama/strict, gguf: kl_divergence is" in (shop / "summary.md").read_text()
    document = told(shop, "strict-jobs")
    assert statuses(document) == {"llama/strict": "failed", "llama/plain": "not run"}
    page = (shop / "strict-jobs" / "batch.html").read_text()
    assert "A gate failed" in page
    assert "llama/strict, GGUF: kl_divergence is" in page


@pytest.mark.slow  # what a build does then: tests/commands/test_cli.py; its page: test_batch_state
@pytest.mark.parametrize("away", [False, True])
def test_an_artifact_that_its_runtime_refused_has_its_reason_and_its_report_on_the_page(
    away, shop, tmp_path
):
    """Without onnxruntime the folder is written, with the figures of its other artifact."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not on this machine')")
    tree = tmp_path / "tree"
    jobs = {"schema": 1, "models": [str(shop / "shelf" / "llama")]}
    jobs |= {"output": f"file://{tree}" if away else str(tree)}
    jobs |= {"recipes": [str(shop / "plain.yaml")], "options": {"set": {"targets.onnx.bits": 4}}}
    (tmp_path / "jobs.yaml").write_text(json.dumps(jobs))
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": paths, "PACKLIGHT_CACHE": str(tmp_path / "cache")}
    line = ("batch", "jobs.yaml", "--junit", "junit.xml")
    done = packlight(*line, cwd=tmp_path, env=environment)
    assert done.returncode == 2, done.stderr
    (job,) = told(tmp_path, "tree")["jobs"]
    gguf, onnx = job["artifacts"]
    assert job["status"] == "error" and job["report"] == "llama/plain/report.html"
    assert gguf["failure"] is None and gguf["passed"] and gguf["kl_divergence"] > 0
    assert "onnxruntime is not installed" in onnx["failure"] and not onnx["passed"]
    assert job["error"] == f"ONNX {onnx['type']} could not be run: {onnx['failure']}"
    page = (tree / "batch.html").read_text()
    assert html.unescape(page).count(f"could not be run: {onnx['failure']}") == 2
    links = [link for link in Page(page).links if not link.startswith("data:")]
    assert links.count("llama/plain/report.html") >= 3
    for link in links:
        if not (away and link.startswith(".batch/")):  # logs stay with the batch
            assert (tree / link).is_file(), link
    assert all((tree / artifact["path"]).exists() for artifact in (gguf, onnx))
    suites = {suite.attrib["name"]: suite for suite in ET.parse(tmp_path / "junit.xml").getroot()}
    assert {name: suite.attrib["failures"] for name, suite in suites.items()} == {
        "llama/plain GGUF Q4_0": "0",
        f"llama/plain ONNX {onnx['type']}": "1",
    }


@pytest.mark.slow
def test_budgets_of_a_model_share_one_cost_table_and_make_a_curve(shop, tmp_path):
    jobs = {
        "schema": 1,
        "output": str(tmp_path / "tree"),
        "models": ["shelf/llama"],
        "recipes": ["plain.yaml"],
        "budgets": ["1.6MB", "1MB"],
        "options": {"set": {"quantize.candidates": ["Q3_K", "Q4_K", "Q8_0"]}},
    }
    (shop / "budgets.yaml").write_text(json.dumps(jobs))
    environment = {"PACKLIGHT_CACHE": str(tmp_path / "cache")}
    done = packlight("batch", "budgets.yaml", cwd=shop, env=environment)
    assert done.returncode == 0, done.stderr
    document = told(tmp_path, "tree")
    names = [job["name"] for job in document["jobs"]]
    assert names == [f"llama/plain-{size}" for size in jobs["budgets"]]
    phases: list[str] = []
    for name in names:
        lines = (tmp_path / "tree" / ".batch" / f"{name}.progress").read_text().splitlines()
        phases += {json.loads(line)["phase"] for line in lines}
    assert [phases.count(p) for p in ("measure sensitivities", "measure grids")] == [1, 1]
    assert len(list((tmp_path / "cache").rglob("*-costs.json"))) == 1
    found = {name: job["artifacts"][0] for name, job in zip(names, document["jobs"], strict=True)}
    for size, artifact in zip((1_600_000, 1_000_000), found.values(), strict=True):
        assert 0.95 * size < artifact["bytes"] <= size
    page = (tmp_path / "tree" / "batch.html").read_text()
    (line,) = re.findall(r'<polyline points="([^"]*)" class="curve c0"', page)
    places = [tuple(map(float, place.split(","))) for place in line.split()]
    assert places == sorted(places) and len(places) == 2
    # y points down: larger files are lower if their divergence is smaller.
    ordered = sorted(found.values(), key=lambda artifact: artifact["bytes"])
    heights = [y for _, y in places]
    assert (
        np.argsort(heights).tolist() == np.argsort([-a["kl_divergence"] for a in ordered]).tolist()
    )


def test_two_batches_into_one_tree(shop):
    with locked((shop / "busy").resolve()):
        done = packlight("batch", "jobs.yaml", "-o", "busy", "--only", "llama", cwd=shop)
    assert "busy" in refused(done)


def test_a_checkpoint_that_nobody_thought_of_stops_no_other(shop):
    """An error in planning is reported for the jobs concerned."""
    odd = shop / "odd" / "model"
    shutil.copytree(shop / "shelf" / "qwen", odd)
    config = odd / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": [2]}))
    jobs = {"schema": 1, "models": ["odd/model", "shelf/qwen"], "recipes": ["plain.yaml"]}
    (shop / "odd.yaml").write_text(json.dumps(jobs))
    done = packlight("batch", "odd.yaml", "--dry-run", "--json", cwd=shop)
    assert done.returncode == 2
    first, second = json.loads(done.stdout)["jobs"]
    assert first["error"] and "predicted" not in first
    assert second["predicted"]["seconds"] > 0


def test_dry_run_tells_every_job(shop):
    done = packlight("batch", "jobs.yaml", "--dry-run", "--json", "--only", "llama", cwd=shop)
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert [job["name"] for job in document["jobs"]] == ["llama/plain", "llama/scaled"]
    assert all(min(job["predicted"].values()) > 0 for job in document["jobs"])
    small = packlight("batch", "jobs.yaml", "--dry-run", "--max-memory", "100MB", cwd=shop)
    assert small.returncode == 2
    assert "of memory, the batch has 100.00 MB" in small.stderr


def test_what_no_job_could_do_is_told_by_the_dry_run(shop):
    options = {
        "plain": ({"eval-text": "none.txt"}, f"{shop / 'none.txt'}: No such file or directory"),
        "scaled": ({"memory": "10MB"}, "memory: 10.00 MB"),
        "int4-fast": ({"plan": "p", "budget": "1MB"}, "a budget and --plan exclude"),
        "small-4bit": ({"budget": "10kB"}, "gguf: no choice of grids fits in 10.00 kB"),
        "phone-4bit": (
            {"set": {"verify.gates.bytes": "<=lots"}},
            "verify.gates.bytes: 'lots' is not a size",
        ),
    }
    jobs = {
        "schema": 1,
        "models": ["shelf/llama"],
        "recipes": ["plain.yaml", "scaled.yaml", "int4-fast", "small-4bit", "phone-4bit"],
        "overrides": [{"jobs": f"*/{name}", "options": o} for name, (o, _) in options.items()],
    }
    (shop / "hopeless.yaml").write_text(json.dumps(jobs))
    done = packlight("batch", "hopeless.yaml", "--dry-run", "--json", cwd=shop)
    assert done.returncode == 2
    for job in json.loads(done.stdout)["jobs"]:
        assert job["error"].startswith(options[job["name"].split("/")[1]][1]), job
        if "memory" in job["error"]:
            assert re.search(r"memory: \d+MB is the smallest that works", job["hint"])


class Page(HTMLParser):
    """Tags and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for key, value in attributes if key in ("href", "src")]


def test_the_page_stands_alone_and_its_links_lead_somewhere(shelf):
    shop, document, _ = shelf
    page = Page(render(document))
    assert "script" not in page.tags
    assert {"svg", "table"} <= page.tags
    local = [link for link in page.links if not link.startswith("data:")]
    assert "llama/plain/report.html" in local
    assert ".batch/qwen/plain.log" in local
    for link in local:
        assert (shop / "tree" / link).is_file(), link
    words = render(document)
    assert "cut/plain</strong>: model.safetensors" in words
    assert "✕ Not every job could run" in words


def test_the_summary_has_every_job_and_every_reason(shelf):
    _, document, _ = shelf
    text = markdown(document).replace("\\", "")
    for job in document["jobs"]:
        assert f"| {job['name']} |" in text
    listed = dict(re.findall(r"^- (\S+): (.*)$", text, re.MULTILINE))
    assert listed == errors(document)
    assert listed["qwen/plain"] == "killed"
    assert "truncated" in listed["cut/plain"] and "T5Model" in listed["strange/plain"]


def test_the_page_escapes_what_a_model_calls_itself(shelf):
    _, document, _ = shelf
    evil = json.loads(json.dumps(document).replace("llama/plain", "<b>x</b>"))
    assert "<b>x" not in render(evil)


def test_a_terminal_gets_a_table(shelf):
    """All jobs were finished before: the live table appears and disappears."""
    shop, *_ = shelf
    master, slave = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "compress", "batch", "jobs.yaml", "--only", "llama"],
        cwd=shop, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    os.close(slave)
    output = b""
    while chunk := read(master):
        output += chunk
    assert done.wait() == 0
    assert "2 of 2 done" in output.decode()


def read(master: int) -> bytes:
    try:
        return os.read(master, 4096)
    except OSError:  # Linux's end of a terminal
        return b""
