"""`packlight push` through the real huggingface_hub client, to a local Hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sample_report
from commands import packlight, refused
from exported import greedy
from fake_hub import LARGE, TOKEN, Hub
from loaders import COUNT, TRANSFORMERS, Case, with_node

from compress.output.checksums import write_checksums
from compress.report.pages import model_card
from compress.report.report import Report
from exporters.onnx.runtime import OnnxRuntime

NAME = "someone/SmolThinker-GGUF"
DATA = "onnx/onnx/model_q4.onnx_data"
GGUF = "gguf/SmolThinker-1.1B-Q4_K_M.gguf"


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


def finished(folder: Path, *, passed: bool = True, verified: bool = True) -> Path:
    """A build's folder: its pages from a report, and large files in place of artifacts."""
    gates = {"bytes": "<1TB"} if passed else sample_report.GATES
    report = sample_report.make(gates=gates, verified=verified)
    for inside in ("onnx/onnx", "gguf", "coreml"):
        (folder / inside).mkdir(parents=True)
    random = np.random.default_rng(0)
    (folder / DATA).write_bytes(random.bytes(LARGE + 1))
    (folder / "onnx" / "config.json").write_text('{"model_type": "llama"}\n')
    (folder / "coreml" / "config.json").write_text("{}\n")
    (folder / GGUF).write_bytes(random.bytes(1000))
    (folder / "plan.json").write_text("{}\n")
    (folder / "report.json").write_text(json.dumps(report.to_dict()))
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    write_checksums(folder)
    return folder


def push(hub: Hub, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: "" for key in os.environ if key.startswith("HF_")}
    home = {"HF_HOME": str(Path(os.environ["PACKLIGHT_CACHE"]) / "hf"), "NO_PROXY": "127.0.0.1"}
    home["HF_HUB_DISABLE_XET"] = "1"  # no Xet store here: large files go through LFS
    token = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
    return packlight("push", *arguments, env=kept | home | token | environment)


def published(folder: Path) -> dict[str, bytes]:
    """What a push of the folder makes of it: files by the places where loaders look for them."""
    found = files_of(folder)
    moved = {
        DATA: "onnx/model_q4.onnx_data",
        "onnx/config.json": "config.json",
        GGUF: "SmolThinker-1.1B-Q4_K_M.gguf",
    }
    found = {moved.get(name, name): data for name, data in found.items() if name != "SHA256SUMS"}
    found["README.md"] = model_card(Report.load(folder / "report.json"), NAME).encode()
    sums = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(found.items())]
    return found | {"SHA256SUMS": "".join(sums).encode()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_becomes_one_commit_with_its_card(hub, tmp_path):
    folder = finished(tmp_path / "out")
    wanted = published(folder)
    (folder / "notes.txt").write_text("mine")
    done = push(hub, folder, NAME, "--private", "--json")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories[NAME]
    assert repository.branches["main"] == wanted  # large ones and small ones, byte for byte
    assert repository.private is True
    assert len(hub.puts()) == 2
    (commit,) = repository.commits
    assert commit["summary"] == "gguf Q4_K_M, onnx int4-g32, coreml lut4-g8 (phone-4bit)"
    assert "warning: notes.txt is not in SHA256SUMS, so it is not pushed" in done.stderr
    printed = json.loads(done.stdout)
    assert printed["url"] == f"{hub.endpoint}/{NAME}/commit/{1:040x}"
    assert printed["bytes"] == sum(map(len, wanted.values()))
    for name, data in repository.branches["main"].items():
        assert str(tmp_path).encode() not in data, name

    # Nothing to do: nothing is uploaded, and no empty commit.
    again = push(hub, folder, NAME)
    assert again.returncode == 0, again.stderr
    assert len(hub.puts()) == 2
    assert len(repository.commits) == 1


def test_the_card_names_the_repository(hub, tmp_path):
    folder = finished(tmp_path / "out")
    assert push(hub, folder, NAME).returncode == 0
    card = hub.repositories[NAME].branches["main"]["README.md"].decode()
    assert f"llama-cli --hf-repo {NAME} --hf-file SmolThinker-1.1B-Q4_K_M.gguf " in card
    assert f'pipeline("text-generation", "{NAME}")' in card
    assert f"og.Model(snapshot_download('{NAME}', " in card
    assert f"ORTModelForCausalLM.from_pretrained('{NAME}')" in card
    assert f"hf download {NAME} --include 'coreml/*'" in card
    order = [card.index(name) for name in ("onnxruntime_genai", "@huggingface/", "optimum==2.1.0")]
    assert order == sorted(order)
    assert NAME not in (folder / "README.md").read_text()


def test_a_failure_in_the_middle_is_told_and_the_next_run_goes_on(hub, tmp_path):
    folder = finished(tmp_path / "out")
    digest = hashlib.sha256((folder / DATA).read_bytes()).hexdigest()
    hub.refusals = {f"POST /lfs/verify/{digest}": 500}
    done = push(hub, folder, NAME)
    text = refused(done)
    assert f"cannot push to {NAME}: " in text
    assert "'onnx/model_q4.onnx_data' to the Hub. (500)" in text
    assert "hint: run it again" in text
    assert hub.repositories[NAME].branches["main"] == {}  # all or nothing
    del hub.objects[digest]  # nothing was uploaded

    hub.requests.clear()
    hub.refusals = {f"POST /api/models/{NAME}/commit": 500}
    assert "the Hub answered 500" in refused(push(hub, folder, NAME))
    assert hub.puts() == [f"PUT /lfs/{digest}"]  # the other one was there
    assert hub.repositories[NAME].branches["main"] == {}

    hub.requests.clear()
    hub.refusals = {}
    done = push(hub, folder, NAME)
    assert done.returncode == 0, done.stderr
    assert hub.puts() == []
    assert hub.repositories[NAME].branches["main"] == published(folder)


def test_branches_pull_requests_and_another_card(hub, tmp_path):
    folder = finished(tmp_path / "out")
    done = push(hub, folder, NAME, "--revision", "v1", "-m", "first")
    assert done.returncode == 0, done.stderr
    branches = hub.repositories[NAME].branches
    assert branches["main"] == {}
    assert branches["v1"] == published(folder)
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: mit\n---\n# Mine\n")
    done = push(hub, folder, NAME, "--create-pr", "--card", card, "-q")
    assert done.stdout == f"{hub.endpoint}/{NAME}/discussions/2\n", done.stderr
    proposed = branches["refs/pr/2"]
    assert branches["main"] == {}
    assert proposed["README.md"] == card.read_bytes()
    for line in proposed["SHA256SUMS"].decode().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256(proposed[name]).hexdigest() == digest, name
    assert (folder / "README.md").read_bytes() != card.read_bytes()


def test_what_is_not_a_good_build_is_refused_without_a_request(hub, tmp_path):
    for name in ("../elsewhere", "packlight", "a/b/c", "some one/x"):
        assert f"{name} is no repository" in refused(push(hub, tmp_path, name, "--dry-run"))
    failed = finished(tmp_path / "failed", passed=False)
    text = refused(push(hub, failed, NAME))
    assert "failed its gates, so it is not pushed" in text
    assert "hint: --allow-failed" in text
    unverified = finished(tmp_path / "unverified", verified=False)
    assert "was not verified" in refused(push(hub, unverified, NAME))
    assert "it has no report.json" in refused(push(hub, tmp_path, NAME))
    folder = finished(tmp_path / "out")
    (folder / "SHA256SUMS").rename(tmp_path / "sums")
    assert "it has no SHA256SUMS" in refused(push(hub, folder, NAME))
    (tmp_path / "sums").rename(folder / "SHA256SUMS")
    sums = (folder / "SHA256SUMS").read_text()
    large = folder / DATA
    data = bytearray(large.read_bytes())
    data[LARGE // 2] ^= 1
    large.write_bytes(data)
    text = refused(push(hub, folder, NAME))
    assert "is damaged: onnx/onnx/model_q4.onnx_data is not as SHA256SUMS has it" in text
    (folder / "SHA256SUMS").write_text(
        "".join(f"{line}\n" for line in sums.splitlines() if "report.json" not in line)
    )
    assert "is damaged: report.json is not in SHA256SUMS" in refused(push(hub, folder, NAME))
    (folder / "SHA256SUMS").write_text(sums)
    large.unlink()
    assert "is damaged: onnx/onnx/model_q4.onnx_data is missing" in refused(push(hub, folder, NAME))
    assert hub.requests == []

    done = push(hub, failed, NAME, "--allow-failed", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{NAME}: would get 8 files, 10.0")
    assert hub.requests == []
    done = push(hub, failed, NAME, "--allow-failed")
    assert done.returncode == 0, done.stderr
    assert hub.repositories[NAME].branches["main"] == published(failed)


@pytest.mark.parametrize(
    ("name", "environment", "told", "hint"),
    [
        (NAME, {"HF_TOKEN": ""}, "the Hub wants to know who you are", "set HF_TOKEN"),
        (NAME, {"HF_TOKEN": "hf_other"}, "the Hub does not accept the token", "hf auth login"),
        ("stranger/x", {}, "the token may not write there", "a token with write access"),
        (NAME, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set", "unset it"),
        (NAME, {"HF_ENDPOINT": "http://127.0.0.1:1"}, "no connection to the Hub", "run it again"),
    ],
)
def test_refusals_of_the_hub_are_one_line(hub, tmp_path, name, environment, told, hint):
    text = refused(push(hub, finished(tmp_path / "out"), name, **environment))
    assert f"cannot push to {name}: {told}" in text
    assert hint in text
    assert TOKEN not in text


def test_no_such_branch_to_open_a_pull_request_against(hub, tmp_path):
    text = refused(push(hub, finished(tmp_path / "out"), NAME, "--revision", "refs/pr/9"))
    assert "the Hub has no such account, repository or branch" in text


@pytest.mark.parametrize("name", ["onnx/config.json", "SHA256SUMS", "README.md"])
def test_a_link_is_not_pushed(hub, tmp_path, name):
    folder = finished(tmp_path / "out")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name} is a link" in refused(push(hub, folder, NAME))
    assert hub.requests == []


BY_ID = """
import sys
from pathlib import Path
from huggingface_hub import snapshot_download
from loaders import Case, with_genai, with_optimum
name, *prompt = sys.argv[1:]
prompt = [int(token) for token in prompt]
folder = snapshot_download(name, ignore_patterns=["*.gguf", "coreml/*"])
print([with_optimum(Case(Path(name), prompt)), with_genai(Case(Path(folder), prompt))])
"""


@pytest.mark.slow
def test_a_pushed_onnx_folder_is_loaded_by_its_id(hub, tmp_path, exported):
    made = exported("onnx", "qwen2", accuracy_level=0)
    folder = finished(tmp_path / "out")
    shutil.rmtree(folder / "onnx")
    shutil.copytree(made.path, folder / "onnx")
    write_checksums(folder)
    done = push(hub, folder, NAME)
    assert done.returncode == 0, done.stderr
    prompt = made.tokens(9)
    ours = greedy(OnnxRuntime(made.path, context=64, threads=1), prompt, COUNT)
    cache = {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = os.environ | cache | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", BY_ID, NAME, *map(str, prompt)],
        env={k: v for k, v in environment.items() if k != "HF_HUB_OFFLINE"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [ours, ours]
    if (TRANSFORMERS / "package.json").is_file() and shutil.which("node"):
        assert with_node({NAME: Case(Path(NAME), prompt)}, hub.endpoint) == {NAME: ours}
