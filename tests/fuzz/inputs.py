"""What is made hostile: one row for each file that packlight reads of somebody else.

Every row starts from good files (``make_base``): a tiny checkpoint and the three artifacts of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mutations import DEEP, DOCUMENTS, json_bytes, mangled

RECIPE = """\
schema: 1
name: tiny
quantize: {solver: rtn}
targets:
  gguf: {type: Q4_K_M}
  onnx: {bits: 4, group_size: 32}
  coreml: {grid: int4-g32}
verify: {windows: 2, sequence_length: 32, gates: {kl_divergence: "<=9"}}
"""
JOBS = {
    "schema": 1, "output": "tree", "models": ["m"], "recipes": ["rec.yaml"], "formats": ["gguf"],
    "options": {"verify": False},
}  # fmt: skip
LOOP = "{% for i in range(99999) %}"
SAMPLING = {
    "bos_token_id": 1, "eos_token_id": [1, 2], "pad_token_id": None, "do_sample": True, "top_k": 50,
    "top_p": 0.9, "min_p": 0.05, "temperature": 0.7, "transformers_version": "4.57.6",
}  # fmt: skip
CARD = """\
---
license: mit
license_name: some-license
license_link: https://example.org/LICENSE
base_model: [org/base-7B, org/other]
datasets: [org/data]
tags: [text-generation, x]
language: [en, no]
model_name: Some Model
pipeline_tag: text-generation
---
# Some Model
"""
CHATS = [{"messages": [{"role": "user", "content": "Hello"}]}, {"text": "One line of text."}]
QUESTIONS = [{"question": "One and one is", "choices": [" two", " three"], "answer": 0}] * 3
SETTINGS = "m/tokenizer_config.json"
SHARD = "m/model-00001-of-00001.safetensors"
INSPECT = ["inspect", "m"]
DRY = ["build", "m", "-r", "rec.yaml", "--dry-run", "-o", "made"]
GGUF = ["build", "m", "-r", "rec.yaml", "-f", "gguf", "--no-verify", "-o", "made", "--threads", "1"]
WRITE = ["build", "m", "-r", "rec.yaml", "--no-verify", "-o", "made", "--threads", "1"]
GPTQ = [
    *GGUF, "--set", "quantize.solver=gptq", "--set", "calibration.tokens=512",
    "--set", "calibration.sequence_length=64",
]  # fmt: skip
ADAPTER = [*GGUF, "--adapter", "a"]
PUSH = ["push", "out", "a/b", "--dry-run", "--allow-failed"]
VERIFY = ["--baseline", "m", "--windows", "2", "--sequence-length", "32", "--threads", "1"]


@dataclass(frozen=True)
class Row:
    """A file, and who reads it.

    Attributes:
        file: in the working folder, where ``m`` is the checkpoint and ``out`` a build.
        commands: one of which is run for each input.
        head: bytes that are mutated of a binary file; 0 for all of it.
        given: the good document, where the file is not there yet.
        hand: name → bytes, tried before the mutations.
        without: good files that would be read in its place.
    """

    file: str
    commands: tuple[list[str], ...]
    head: int = 0
    given: Any = None
    hand: Callable[[], dict[str, bytes]] = lambda: DOCUMENTS
    without: tuple[str, ...] = ()


def templates() -> dict[str, bytes]:
    """Chat templates that loop, grow, look around or are no templates."""
    bodies = {
        "nested loops": LOOP + LOOP + 2 * "{% endfor %}",
        "a range": "{% for i in range(10**9) %}{% endfor %}",
        "grows": LOOP + "{{ 'x' * 1000000 }}{% endfor %}",
        "doubles": "{% set n = namespace(x='xx') %}"
        + LOOP
        + "{% set n.x = n.x ~ n.x %}{% endfor %}",
        "a long text": "{{ 'x' * 10**10 }}",
        "a power": "{{ 10**10**10 }}",
        "a list": "{{ [0] * 10**9 }}",
        "format": "{{ '%1000000000d' % 1 }}",
        "center": "{{ 'x' | center(10**10) }}",
        "indent": "{{ messages | tojson(indent=10**8) }}",
        "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "globals": "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
        "lipsum": "{{ lipsum.__globals__['os'].popen('touch PWNED').read() }}",
        "include": "{% include '/etc/passwd' %}",
        "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "deep": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "parentheses": "{{ " + "(" * 10000 + "1" + ")" * 10000 + " }}",
        "10 MB": "x" * 10_000_000,
        "many tags": "{{ messages }}" * 300_000,
        "syntax": "{% for %}",
        "raise": "{{ raise_exception('\x1b[31mboo\nerror: fake') }}",
        "escapes": "\x1b[2J{{ messages }}",
        "break": "{% break %}",
        "null byte": "\x00",
        "the time": "{{ strftime_now('%Y') }}",
    }
    return {name: text.encode("utf-8", "surrogatepass") for name, text in bodies.items()}


def yaml_documents() -> dict[str, bytes]:
    """YAML that grows, or is no mapping."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    return DOCUMENTS | {
        "aliases": bomb.encode(),
        "recursive": b"a: &a [*a]",
        "python tag": b"!!python/object/apply:os.system ['touch PWNED']",
        "date": b"schema: 2001-99-99",
        "hex": b"schema: 0x1" + b"0" * 5000,
        "brackets": b"a: " + b"[" * DEEP,
        "2 MB": b"schema: 1\n" + b"# comment\n" * 200_000,
        "a merge": b"<<: 5",
        "sets": b"!!set {a, b}",
        "binary": b"schema: !!binary x",
    }


def cards() -> dict[str, bytes]:
    """Model cards whose head is one of these documents."""
    heads = {name: b"---\n" + text + b"\n---\n# x\n" for name, text in yaml_documents().items()}
    return heads | {
        key: f"---\n{key}: {value}\n---\n".encode()
        for key in ("license", "base_model", "tags", "language", "model_name", "author")
        for value in ("5", "[[x]]", "{a: b}", "'\x7f'", "a/" * 400, "[null, 1.5]", "b:a:c@d/../e")
    }


def headers() -> dict[str, bytes]:
    """safetensors headers."""

    def file(text: bytes, length: int | None = None) -> bytes:
        return (len(text) if length is None else length).to_bytes(8, "little") + text

    def one(**changes: Any) -> bytes:
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes
        return file(json.dumps({"model.norm.weight": entry}).encode()) + bytes(4)

    return {
        "empty": b"",
        "7 bytes": b"1234567",
        "length 2**63": file(b"", 2**63),
        "length -1": file(b"", 2**64 - 1),
        "30 MB of lists": file(b'{"a":[' + b"[]," * 10_000_000 + b"1]}"),
        "30 MB of brackets": file(b"[" * 30_000_000),
        "deep": file(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
        "a million dimensions": one(shape=[2**62] * 300_000),
        "negative": one(shape=[-1]),
        "offsets 10**400": one(data_offsets=[10**400, 10**400 + 4]),
        "bool": one(shape=[True]),
        "dtype": one(dtype="\x1b[31mX\n"),
        "a name": file(json.dumps({"\x1b[2J\u202e\n": {"dtype": "F32", "shape": [1]}}).encode()),
        "a long name": file(json.dumps({"x" * 1_000_000: {"dtype": "F32", "shape": [1]}}).encode()),
        "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }


def text_lines() -> dict[str, bytes]:
    """JSON lines."""
    return {name: raw + b"\n" for name, raw in DOCUMENTS.items()} | {
        "messages": b'{"messages": 5}\n',
        "a role": b'{"messages": [{"role": 5, "content": null}]}\n',
        "no key": b'{"x": "y"}\n',
    }


ROWS: dict[str, Row] = {
    "safetensors": Row(SHARD, (INSPECT, GGUF), head=4000, hand=headers),
    "config": Row("m/config.json", (INSPECT, DRY, GGUF)),
    "generation": Row("m/generation_config.json", (GGUF, WRITE), given=SAMPLING),
    "card": Row("m/README.md", (GGUF, WRITE), given=CARD, hand=cards),
    "added tokens": Row(
        "m/added_tokens.json", (GGUF, DRY), given={"<x>": 500, "<y>": 501}, without=(SETTINGS,)
    ),
    "special tokens": Row(
        "m/special_tokens_map.json", (GGUF, DRY),
        given={"bos_token": {"content": "<s>", "lstrip": False}, "unk_token": "<x>"},
        without=(SETTINGS,),
    ),
    "sentencepiece": Row(
        "m/tokenizer.model", (GGUF, WRITE), without=("m/tokenizer.json",), hand=dict
    ),
    "tokenizer": Row("m/tokenizer.json", (GGUF, WRITE)),
    "tokenizer settings": Row("m/tokenizer_config.json", (GGUF, WRITE)),
    "chat template": Row("m/chat_template.jinja", (GPTQ,), given="{{ messages }}", hand=templates),
    "pickle": Row(
        "m/pytorch_model.bin", (INSPECT, GGUF), head=4000,
        without=(SHARD, "m/model.safetensors.index.json"),
    ),
    "adapter": Row("a/adapter_config.json", (ADAPTER,)),
    "adapter weights": Row("a/adapter_model.safetensors", (ADAPTER,), head=1000, hand=headers),
    "task": Row(
        "task.jsonl", (["verify", "out/gguf", *VERIFY, "--task", "task.jsonl"],),
        given="\n".join(map(json.dumps, QUESTIONS)), hand=text_lines,
    ),
    "index": Row("m/model.safetensors.index.json", (INSPECT,)),
    "recipe": Row("rec.yaml", (DRY, ["recipes", "check", "rec.yaml"]), hand=yaml_documents),
    "jobs": Row(
        "jobs.yaml", (["batch", "jobs.yaml", "--dry-run"],), given=JOBS, hand=yaml_documents
    ),
    "plan": Row("out/plan.json", ([*GGUF, "--plan", "out/plan.json"],)),
    "report": Row(
        "out/report.json",
        ([*DRY, "--against", "out/report.json"],
         ["verify", "out/gguf", *VERIFY, "--against", "out/report.json"]),
    ),
    "provenance": Row("out/provenance.json", (PUSH,)),
    "checksums": Row("out/SHA256SUMS", (["verify", "out", "--checksums"],)),
    "texts": Row(
        "t.jsonl", ([*GPTQ, "--calibration", "t.jsonl"],),
        given="\n".join(map(json.dumps, CHATS * 20)), hand=text_lines,
    ),
    "gguf": Row("out/gguf/*.gguf", (["inspect", "out/gguf"], ["fit", "out/gguf"]), head=9000),
    "gguf verify": Row("out/gguf/*.gguf", (["verify", "out/gguf", *VERIFY],), head=9000),
    "imatrix": Row(
        "i.gguf", ([*GGUF, "--set", "quantize.solver=scale_search", "--imatrix", "i.gguf"],),
        head=3000,
    ),
    "onnx": Row("out/onnx/onnx/*.onnx", (["inspect", "out/onnx"], ["fit", "out/onnx"])),
    "onnx config": Row("out/onnx/config.json", (["inspect", "out/onnx"], ["fit", "out/onnx"])),
    "onnx verify": Row("out/onnx/onnx/*.onnx", (["verify", "out/onnx", *VERIFY],)),
    "coreml manifest": Row("out/coreml/*.mlpackage/Manifest.json", (["inspect", "out/coreml"],)),
    "coreml": Row(
        "out/coreml/*.mlpackage/Data/com.apple.CoreML/model.mlmodel",
        (["inspect", "out/coreml"], ["fit", "out/coreml"]),
    ),
    "coreml weights": Row(
        "out/coreml/*.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
        (["inspect", "out/coreml"],), head=4000,
    ),
    "coreml verify": Row(
        "out/coreml/*.mlpackage/Data/com.apple.CoreML/model.mlmodel",
        (["verify", "out/coreml", *VERIFY],),
    ),
}  # fmt: skip
GOOD = -1
"""The number of the input that is as it should be."""
STRUCTURED = (".json", ".yaml")


def make_base(folder: Path, run: Callable[[list[str]], int]) -> None:
    """The good files, once: a checkpoint, a recipe, a build, an imatrix.

    Args:
        run: packlight's command line, in the current folder.
    """
    import tiny
    import torch
    from safetensors import safe_open

    folder.mkdir(parents=True)
    model = tiny.make("llama", folder / "m", num_hidden_layers=1)
    shard = (model / "model.safetensors").rename(folder / SHARD)
    with safe_open(shard, "pt") as tensors:
        index = {"weight_map": dict.fromkeys(tensors.keys(), shard.name)}
        state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(state, model / "pytorch_model.bin")
    make_adapter(folder / "a")
    (folder / "rec.yaml").write_text(RECIPE)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run(WRITE) == 0
        Path("made").rename("out")
        assert run([*GPTQ, "--save-imatrix", "i.gguf"]) == 0
        shutil.rmtree("made")
    finally:
        os.chdir(before)


def make_adapter(folder: Path) -> None:
    """A LoRA adapter of one matrix, rank 2."""
    import numpy as np
    from safetensors.numpy import save_file

    name = "base_model.model.model.layers.0.self_attn.q_proj"
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "use_rslora": False,
        "base_model_name_or_path": "m", "use_dora": False, "bias": "none",
    }  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ones = np.ones((2, 256), np.float32)
    tensors = {f"{name}.lora_A.weight": ones, f"{name}.lora_B.weight": ones.T.copy()}
    save_file(tensors, folder / "adapter_model.safetensors")


def place_input(
    name: str, number: int, seed: int, base: Path, cwd: Path, *, fresh: bool = True
) -> tuple[str, list[str]]:
    """Lay out one input.

    Args:
        cwd: an empty folder; good files are links to those of ``base``.
        fresh: else the folder of another input of the row, which has only been read.

    Returns:
        What it is, and the command line that reads it.
    """
    row = ROWS[name]
    rng = random.Random(f"{name}-{seed}-{number}")  # the same input in every process
    if fresh:
        shutil.copytree(base, cwd, copy_function=os.link, dirs_exist_ok=True, symlinks=True)
    place = next(iter(base.glob(row.file)), base / row.file)
    target = cwd / place.relative_to(base)
    good = place.read_bytes() if place.exists() else b""
    hand = list(row.hand().items()) if not row.head or row.hand is headers else []
    if number == GOOD:
        label, data = "good", good if row.given is None else encoded(row.given)
    elif number < len(hand):
        label, data = hand[number]
    else:
        label, data = "mutated", mutated(rng, row, good, target.suffix)
    for other in (target, *(cwd / name for name in row.without)):  # a link to the good one
        other.unlink(missing_ok=True)
    target.write_bytes(data)
    return label, rng.choice(row.commands)


def mutated(rng: random.Random, row: Row, good: bytes, suffix: str) -> bytes:
    if suffix in STRUCTURED and rng.random() < 0.85:
        return json_bytes(rng, document(good) if row.given is None else row.given)
    if row.given is not None:
        good = encoded(row.given)
    head = row.head if not row.head or rng.random() < 0.8 else 0
    return mangled(rng, good, head)


def encoded(given: Any) -> bytes:
    return given.encode() if isinstance(given, str) else json.dumps(given).encode()


@cache
def document(good: bytes) -> Any:
    import yaml

    text = good.decode()
    return json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
