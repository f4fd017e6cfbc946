"""Downloads by the real huggingface_hub client from a local Hub on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from compress.checkpoint.hub import page_of

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_for_this_test_only"

# Each line of stdin is a repository and keywords; each line of stdout the result.
CHILD = """
import json, sys
from compress.checkpoint.checkpoint import Checkpoint
from compress.errors import PacklightError
for line in sys.stdin:
    model, keywords = json.loads(line)
    try:
        checkpoint = Checkpoint.open(model, **keywords)
        norm = float(checkpoint.read("model.norm.weight").sum())
        files = sorted(file.name for file in checkpoint.path.rglob("*"))
        found = [checkpoint.source, checkpoint.revision, norm, files, checkpoint.warnings]
    except PacklightError as error:
        found = [type(error).__name__, error.message, error.hint]
    print(json.dumps(found))
"""


class Hub:
    """Repositories of files, and the requests for them."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, name: str, folder: Path, **more: bytes) -> None:
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.repositories[name] = files | {key.replace("__", "/"): more[key] for key in more}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = request.path.partition("?")[0].lstrip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, repository, verb, revision, *rest = [*(parts[2:] if api else parts), "", ""][:20]
        name = f"{owner}/{repository}"
        files = self.repositories.get(name)
        if files is None:
            return self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT, ""):
            return self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        if api and verb == "tree":  # which huggingface_hub 2 asks for
            rows = [
                {
                    "type": "file",
                    "path": file,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for file, data in files.items()
            ]
            return self.send(request, 200, json.dumps(rows).encode(), {})
        if api:
            siblings = [{"rfilename": file} for file in files]
            body = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
            return self.send(request, 200, json.dumps(body).encode(), {})
        if name in self.gated and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(request, 401, b"", {"X-Error-Code": "GatedRepo"})
        file = "/".join(part for part in rest if part)
        if verb != "resolve" or file not in files:
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        if request.command == "GET":
            self.fetched.append(file)
        etag = hashlib.sha256(files[file]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        return self.send(request, 200, files[file], headers)

    @staticmethod
    def send(
        request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]
    ) -> None:
        request.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("phi3", tmp_path_factory.mktemp("phi3"), shards=2)


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    hub = Hub()
    # Other files of real repositories.
    hub.add(
        "someone/phi3",
        folder,
        LICENSE=b"MIT",
        **{
            "README.md": b"# card",
            "pytorch_model.bin": b"\x80\x02pickle",
            "consolidated.safetensors": b"the same weights again",
            "model.gguf": b"GGUF",
            "onnx__model.onnx": b"onnx",
            "onnx__config.json": b"{}",
            "original__model.safetensors": b"again",
            "modeling_phi3.py": b"raise SystemExit",
        },
    )
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def open_in_child(
    hub: Hub, home: Path, *jobs: tuple[str, dict[str, Any]], **environment: str
) -> list[Any]:
    """``Checkpoint.open`` in a fresh process: HF_* variables are read at import."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = (
        kept
        | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        | environment
    )
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=lines,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_only_what_a_build_needs_is_fetched_and_then_the_cache_serves(
    hub: Hub, folder: Path, tmp_path: Path
):
    from compress.checkpoint.checkpoint import Checkpoint

    (found,) = open_in_child(hub, tmp_path, ("someone/phi3", {}))
    source, revision, norm, files, warnings = found
    assert (source, revision, warnings) == ("someone/phi3", COMMIT, [])
    assert norm == float(Checkpoint.open(folder).read("model.norm.weight").sum())
    needed = {file.name for file in folder.iterdir()} | {"LICENSE", "README.md"}
    assert set(files) == needed
    assert sorted(hub.fetched) == sorted(needed)  # each once

    hub.fetched.clear()
    hub.server.shutdown()
    hub.server.server_close()  # from here on the Hub is offline
    offline = open_in_child(
        hub, tmp_path, ("someone/phi3", {}), ("someone/else", {}), HF_HUB_OFFLINE="1"
    )
    assert offline[0] == found
    kind, message, hint = offline[1]
    assert kind == "CheckpointError"
    assert message == (
        "cannot fetch someone/else: HF_HUB_OFFLINE is set and it is not in the cache"
    )
    assert "local folder" in hint
    unconnected = open_in_child(hub, tmp_path, ("someone/phi3", {}), ("someone/else", {}))
    assert unconnected[0] == found
    assert unconnected[1][:2] == ["CheckpointError", "cannot fetch someone/else: no connection"]
    assert hub.fetched == []


def test_adapters_are_fetched_without_the_rest(hub: Hub, folder: Path, tmp_path: Path):
    lora = tmp_path / "lora"
    lora.mkdir()
    config = {"peft_type": "LORA", "target_modules": [], "modules_to_save": ["model.norm"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    norm = np.full(256, 3, np.float32)
    save_file({"base_model.model.model.norm.weight": norm}, lora / "adapter_model.safetensors")
    hub.add("someone/lora", lora, adapter_model__bin=b"pickle", checkpoint_1__x=b"again")
    hub.repositories["someone/lora"]["adapter_model.bin"] = b"pickle"
    hub.add("someone/ia3", lora)
    hub.repositories["someone/ia3"]["adapter_config.json"] = b'{"peft_type": "IA3"}'
    plain, merged, absent, model, other = open_in_child(
        hub,
        tmp_path / "home",
        (str(folder), {}),
        (str(folder), {"adapters": [f"someone/lora@{COMMIT}"]}),
        (str(folder), {"adapters": ["someone/nothing"]}),
        (str(folder), {"adapters": ["someone/phi3"]}),
        (str(folder), {"adapters": ["someone/ia3"]}),
    )
    assert plain[2] != merged[2] == 3 * 256
    assert absent[1].startswith("cannot fetch someone/nothing: the Hub has no such model")
    assert "no adapter_config.json" in model[1]
    assert "'IA3' of PEFT, not LoRA" in other[1]
    assert sorted(set(hub.fetched)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_cache_dir_revision_and_token(hub: Hub, tmp_path: Path):
    hub.gated.add("someone/phi3")
    cache = tmp_path / "cache"
    place = {"cache_dir": str(cache)}
    refused, bad, taken = open_in_child(
        hub,
        tmp_path / "home",
        ("someone/phi3", place),
        ("someone/phi3", place | {"revision": "v9"}),
        ("someone/phi3", place | {"token": TOKEN, "revision": COMMIT}),
    )
    assert refused[:2] == [
        "CheckpointError",
        "cannot fetch someone/phi3: its licence must be accepted first",
    ]
    assert "--token" in refused[2]
    assert bad == [
        "CheckpointError",
        "cannot fetch someone/phi3: it has no revision 'v9'",
        "check --revision",
    ]
    assert taken[1] == COMMIT
    assert (cache / "models--someone--phi3").is_dir()
    assert not (tmp_path / "home" / "hub").exists()
    # The environment's token serves as well.
    (taken,) = open_in_child(hub, tmp_path / "other", ("someone/phi3", {}), HF_TOKEN=TOKEN)
    assert taken[1] == COMMIT


def test_shards_go_by_the_names_of_the_index(hub: Hub, folder: Path, tmp_path: Path):
    files = hub.repositories["someone/phi3"]
    index = json.loads(files["model.safetensors.index.json"])
    names = {old: old.replace("model-", "model.safetensors-").removesuffix(".safetensors")
             for old in set(index["weight_map"].values())}  # fmt: skip
    index["weight_map"] = {key: names[file] for key, file in index["weight_map"].items()}
    other = {name: data for name, data in files.items() if name not in names}
    other |= {new: files[old] for old, new in names.items()}
    other["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.repositories["someone/other"] = other
    hub.repositories["someone/adapter"] = {
        "adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "a/b"}',
        "adapter_model.safetensors": b"",
    }
    small = {name: data for name, data in files.items() if not name.endswith((".bin", "tensors"))}
    del small["model.safetensors.index.json"]
    hub.repositories["someone/no-index"] = small | {"model-00001-of-00002.safetensors": b""}
    hub.repositories["someone/x-GGUF"] = {"x.Q4_K_M.gguf": b"GGUF", "README.md": b""}
    found, adapter, page, pinned, table, shards, ggufs = open_in_child(
        hub,
        tmp_path,
        ("someone/other", {}),
        ("someone/adapter", {}),
        (f"{hub.endpoint}/someone/phi3", {}),
        (f"{hub.endpoint}/someone/phi3/blob/{COMMIT}/config.json?x=1", {}),
        (f"{hub.endpoint}/datasets/someone/phi3", {}),
        ("someone/no-index", {}),
        ("someone/x-GGUF", {}),
    )
    assert "'model-00001-of-00002.safetensors', but its index is missing" in shards[1]
    assert ggufs[1].startswith("someone/x-GGUF holds 'x.Q4_K_M.gguf', which is a GGUF file")
    assert "x.Q4_K_M.gguf" not in hub.fetched
    assert set(names.values()) < set(found[3])
    assert "pytorch_model.bin" not in found[3]
    assert adapter[1] == "someone/adapter is a LoRA adapter of a/b, not a model"
    assert adapter[2] == "packlight build a/b --adapter someone/adapter"
    assert page[:2] == pinned[:2] == ["someone/phi3", COMMIT]
    assert "is not the page of a model" in table[1]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("https://huggingface.co/some/one", ("some/one", "")),
        ("huggingface.co/some/one/", ("some/one", "")),
        ("http://hf.co/some/one/tree/v1.0", ("some/one", "v1.0")),
        ("https://www.huggingface.co/some/one/resolve/main/a.safetensors", ("some/one", "main")),
        ("hf://some/one@v1", ("some/one", "v1")),
        ("https://huggingface.co/some/one.git", ("some/one", "")),
        ("git@hf.co:some/one.git", ("some/one", "")),
        ("https://me:secret@huggingface.co/some/one", ("some/one", "")),
        ("https://huggingface.co/some/one/tree/refs%2Fpr%2F1", ("some/one", "refs/pr/1")),
        ("https://huggingface.co/some/one/blob/refs/pr/1/x.json", ("some/one", "refs/pr/1")),
        ("https://hub.example/some/one", None),
        ("some/one", None),
        ("s3://huggingface.co/some", None),
    ],
)
def test_pages_of_the_hub(name: str, found: tuple[str, str] | None):
    assert page_of(name) == found


def test_refusals_come_before_the_weights(hub: Hub, tmp_path: Path):
    files = hub.repositories["someone/phi3"]
    small = {"architectures": ["Phi3SmallForCausalLM"], "auto_map": {"AutoConfig": "a.B"}}
    hub.repositories["someone/small"] = files | {"config.json": json.dumps(small).encode()}
    hub.repositories["someone/empty"] = {"README.md": b""}
    pickled = {name: data for name, data in files.items() if "safetensors" not in name}
    hub.repositories["someone/pickled"] = pickled
    small, empty, absent, bad = open_in_child(
        hub,
        tmp_path,
        ("someone/small", {}),
        ("someone/empty", {}),
        ("someone/absent", {}),
        ("some one/bad name", {}),
    )
    assert small[0] == "UnsupportedModelError"
    assert "never executes" in small[1]
    assert not any(name.endswith((".safetensors", ".bin", ".py")) for name in hub.fetched)
    assert empty[0] == "CheckpointError"
    assert empty[1].startswith("config.json is missing")
    assert absent == [
        "CheckpointError",
        "cannot fetch someone/absent: the Hub has no such model, or it is private",
        "check the name and --token",
    ]
    assert bad[0] == "CheckpointError"
    assert "\n" not in bad[1]
    # Pickles only where there is nothing else (this one is refused when it is read).
    (pickle,) = open_in_child(hub, tmp_path, ("someone/pickled", {}))
    assert "pytorch_model.bin" in hub.fetched
    assert pickle[0] == "CheckpointError"
    assert pickle[1].startswith("pytorch_model.bin ")
