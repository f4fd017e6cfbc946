"""What loads an ONNX folder: each returns greedy tokens of a prompt, or the text of its refusal.

Transformers.js is in ``.venv-node``, which ``make loaders`` fills from npm.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from screenshot import BROWSERS, FLAGS  # noqa: E402

COUNT = 16
MODULES = ROOT / ".venv-node" / "node_modules"
TRANSFORMERS = MODULES / "@huggingface" / "transformers"
# A browser without a network and with WebGPU in software.
NO_GPU = {"--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"}
WEBGPU = (
    "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip

Found = dict[str, list[int] | str]
"""By family: tokens, or what the loader says."""


@dataclass(frozen=True)
class Case:
    """A folder, and the prompt to continue."""

    folder: Path
    prompt: list[int]


Cases = Mapping[str, Case]


@dataclass(frozen=True)
class Loader:
    """A loader of ONNX folders.

    Attributes:
        title: in the table.
        version: of its packages; skips the test where one is missing.
        run: generates ``COUNT`` tokens for each case.
    """

    title: str
    version: Callable[[], str]
    run: Callable[[Cases], Found]


def one_by_one(generate: Callable[[Case], list[int]]) -> Callable[[Cases], Found]:
    """``Loader.run`` of a function for one case, which may raise."""

    def run(cases: Cases) -> Found:
        found: Found = {}
        for family, case in cases.items():
            try:
                found[family] = generate(case)
            except Exception as error:  # what a loader raises is what the table tells
                found[family] = f"{type(error).__name__}: {error}"
        return found

    return run


def with_onnxruntime(case: Case) -> list[int]:
    """Plain ``session.run``: the cache goes out and in again."""
    import onnxruntime

    (graph,) = case.folder.glob("onnx/*.onnx")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    caches = {  # of no positions, or states of zeros
        value.name: np.zeros(
            [1, *(size if isinstance(size, int) else 0 for size in value.shape[1:])], np.float32
        )
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    tokens, ids = list(case.prompt), list(case.prompt)
    while len(tokens) < len(case.prompt) + COUNT:
        feed = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens) - len(ids), len(tokens), dtype=np.int64)[None],
        }
        logits, *presents = session.run(None, feed | caches)
        caches = dict(zip(caches, presents, strict=True))
        ids = [int(logits[0, -1].argmax())]
        tokens += ids
    return tokens[len(case.prompt) :]


def with_genai(case: Case) -> list[int]:
    import onnxruntime_genai as genai

    model = genai.Model(str(case.folder))
    parameters = genai.GeneratorParams(model)
    length = len(case.prompt) + COUNT
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([case.prompt], np.int32))
    tokens = []
    while len(tokens) < COUNT:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def with_optimum(case: Case) -> list[int]:
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(str(case.folder))
    ids = torch.tensor([case.prompt])
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=COUNT,
        do_sample=False,
        eos_token_id=None,
    )
    tokens: list[int] = generated[0].tolist()[len(case.prompt) :]
    return tokens


# --- Transformers.js -------------------------------------------------------------------------


def with_node(cases: Cases, hub: str = "") -> Found:
    """Transformers.js in Node; with ``hub``, folders are ids of repositories at that address."""
    listed = [
        {"name": family, "place": case.folder.as_posix(), "prompt": case.prompt}
        for family, case in cases.items()
    ]
    script = ["node", str(ROOT / "tests/loaders_node.mjs")]
    with tempfile.TemporaryDirectory() as cache:
        wanted = {"cases": listed, "count": COUNT, "hub": hub, "cache": cache}
        done = subprocess.run(
            [*script, str(TRANSFORMERS / "dist/transformers.node.mjs")],
            input=json.dumps(wanted), capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


PAGE = """<!doctype html><link rel=icon href=data:,><script type=module>
const tell = (path, value) => fetch(path, { method: "POST", body: JSON.stringify(value) });
try {
  const { generate } = await import("/generate.mjs");
  const library = await import("/modules/@huggingface/transformers/dist/transformers.min.js");
  library.env.allowRemoteModels = false;
  library.env.allowLocalModels = true;
  library.env.localModelPath = "/models/";
  library.env.useBrowserCache = false;
  library.env.backends.onnx.wasm.wasmPaths = "/modules/onnxruntime-web/dist/";
  const { cases, count, options } = await (await fetch("/job")).json();
  await tell("/found", await generate(library, cases, count, options));
} catch (error) {
  await tell("/failed", String(error));
}
</script>"""


def with_browser(cases: Cases, options: Mapping[str, str]) -> Found:
    """Transformers.js in headless Chromium, from a server of this process."""
    job = {
        "cases": [{"name": n, "place": n, "prompt": case.prompt} for n, case in cases.items()],
        "count": COUNT,
        "options": options,
    }
    with serve(cases, job) as server, tempfile.TemporaryDirectory() as profile:
        flags = [flag for flag in FLAGS if flag not in NO_GPU]
        browser = subprocess.Popen(
            [chromium(), *flags, *WEBGPU, f"--user-data-dir={profile}", server.address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert server.done.wait(900), "the page did not end"
        finally:
            browser.kill()
            browser.wait()
    assert isinstance(server.found, dict), server.found
    return server.found


class Server(ThreadingHTTPServer):
    """Serves the page, Transformers.js and the folders, and takes the answer."""

    daemon_threads = True

    def __init__(self, cases: Cases, job: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cases, self.job = cases, job
        self.done = threading.Event()
        self.found: Any = None
        self.address = f"http://127.0.0.1:{self.server_port}/"


class Handler(SimpleHTTPRequestHandler):
    """Answers for ``Server``."""

    server: Server
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def translate_path(self, path: str) -> str:
        top, _, rest = path.split("?")[0].strip("/").partition("/")
        family, _, name = rest.partition("/")
        if top == "models" and family in self.server.cases:
            return str(self.server.cases[family].folder / name)
        return str(MODULES / rest if top == "modules" else ROOT / "tests/loaders_generate.mjs")

    def do_GET(self) -> None:
        texts = {"/": ("text/html", PAGE), "/job": ("text/json", json.dumps(self.server.job))}
        if self.path not in texts:
            return super().do_GET()
        kind, text = texts[self.path]
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.server.found = json.loads(body)
        self.server.done.set()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(cases: Cases, job: Any) -> Iterator[Server]:
    server = Server(cases, job)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


# --- versions --------------------------------------------------------------------------------


def package(name: str) -> str:
    """The version of an npm package; skips the test where it is missing."""
    file = MODULES / name / "package.json"
    if not file.is_file() or shutil.which("node") is None:
        pytest.skip(f"no {name} in {MODULES.parent.name}, or no node: make loaders")
    return str(json.loads(file.read_text())["version"])


def chromium() -> str:
    """A browser; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} on the PATH")
    return found


def in_node() -> str:
    return transformers_js("onnxruntime-node")


def in_browser() -> str:
    chromium()
    return transformers_js("onnxruntime-web")


def transformers_js(runtime: str) -> str:
    """Its version, with that of its runtime."""
    return f"{package('@huggingface/transformers')} ({runtime} {package(runtime)})"


def installed(*names: str) -> str:
    """Versions of distributions: the first one's, the others' in parentheses."""
    first, *others = (importlib.metadata.version(name) for name in names)
    beside = ", ".join(f"{n} {v}" for n, v in zip(names[1:], others, strict=True))
    return f"{first} ({beside})" if beside else first


LOADERS = {
    "onnxruntime": Loader(
        "onnxruntime", functools.partial(installed, "onnxruntime"), one_by_one(with_onnxruntime)
    ),
    "genai": Loader(
        "ONNX Runtime GenAI",
        functools.partial(installed, "onnxruntime-genai"),
        one_by_one(with_genai),
    ),
    "optimum": Loader(
        "Optimum",
        functools.partial(installed, "optimum", "optimum-onnx", "transformers"),
        one_by_one(with_optimum),
    ),
    "node": Loader("Transformers.js, Node", in_node, with_node),
    "wasm": Loader(
        "Transformers.js, browser, default (wasm)",
        in_browser,
        functools.partial(with_browser, options={}),
    ),
    "webgpu": Loader(
        "Transformers.js, browser, WebGPU",
        in_browser,
        functools.partial(with_browser, options={"device": "webgpu"}),
    ),
}


def told(error: str, folder: Path) -> str:
    """An error's text for the table: one short line without paths."""
    text = re.sub(r"\s+", " ", error.replace(str(folder), "FOLDER"))
    text = re.sub(r"past_key_values\.\d+\.\w+", "past_key_values", text)  # whichever comes first
    return text if len(text) <= 120 else f"{text[:119]}…"
