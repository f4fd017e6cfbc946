"""One folder, every loader: each gives the tokens of our own loop, or what docs/loaders.md tells.

The table is made from tests/golden/loaders.json; ``--update-golden`` renews what the installed
loaders say. Transformers.js is slow and needs ``make loaders``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from exported import Exported, Exports, greedy
from loaders import COUNT, LOADERS, Case, told, with_genai, with_optimum
from tiny_families import ROWS
from transformers import AutoTokenizer

from exporters.onnx.runtime import OnnxRuntime

ROOT = Path(__file__).resolve().parents[3]
GOLDEN, PAGE = ROOT / "tests/golden/loaders.json", ROOT / "docs/loaders.md"
FAMILIES = (
    "llama", "llama3", "mistral", "phi3", "phi3-window", "phi3-longrope", "phi4-mini", "phi",
    "qwen2", "qwen3", "mobilellm",
)  # fmt: skip
# Those of docs/families.md whose folders are written.
MORE = tuple(name for name, row in ROWS.items() if "onnx" not in row.refused)
RUNS = "runs"
CHANGES = "experts: other tokens, or an error, from run to run"


def open_runtime(made: Exported) -> OnnxRuntime:
    return OnnxRuntime(made.path, context=made.config.max_context, threads=1)


# At accuracy_level 0, where a near-tie of two random logits cannot turn on a rounding to int8.
def made(exported: Exports, family: str) -> Exported:
    return exported("onnx", family, accuracy_level=0, symmetric=family != "llama")


@pytest.mark.parametrize(
    ("name", "families"),
    [
        *((name, FAMILIES) for name in ("onnxruntime", "genai", "optimum")),
        *(
            pytest.param(name, FAMILIES, marks=pytest.mark.slow)
            for name in ("node", "wasm", "webgpu")
        ),
        *(pytest.param(name, MORE, marks=pytest.mark.slow, id=f"{name}-more") for name in LOADERS),
    ],
)
def test_a_loader_gives_our_tokens(
    exported: Exports, name: str, families: tuple[str, ...], request: Any
) -> None:
    loader = LOADERS[name]
    version = loader.version()
    cases = {f: Case(made(exported, f).path, made(exported, f).tokens(9)) for f in families}
    said: dict[str, str] = {}
    if name == "webgpu":  # of one folder QMoE gave our tokens, others and an error, run by run
        mixtures = [f for f in cases if made(exported, f).config.experts is not None]
        said = {family: CHANGES for family in mixtures}
        cases = {family: case for family, case in cases.items() if family not in said}
    for family, answer in loader.run(cases).items():
        if isinstance(answer, str):
            said[family] = told(answer, cases[family].folder)
        else:
            ours = greedy(open_runtime(made(exported, family)), cases[family].prompt, COUNT)
            said[family] = RUNS if answer == ours else "other tokens"
    if request.config.getoption("--update-golden"):
        table = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
        before = table.get(name, {}).get("families", {}) | said
        row = {f: before[f] for f in (*FAMILIES, *MORE) if f in before}
        table[name] = {"title": loader.title, "version": version, "families": row}
        table = {key: table[key] for key in LOADERS if key in table}
        GOLDEN.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(rendered(table), encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]["families"]
    assert said == {family: golden[family] for family in families}
    # optimum-onnx 0.1.0 reads some families' cache shape wrongly, Transformers.js lacks some
    # families; the plan's notes say which.
    cannot = "Transformers.js 4.3 cannot run"
    telling = {"optimum": "optimum-onnx", "node": cannot, "wasm": cannot, "webgpu": cannot[:19]}
    noted = [
        family
        for family in (families if name in telling else ())
        if telling[name] in " ".join(made(exported, family).plan.notes)
    ]
    assert [f for f in families if said[f] != RUNS] == noted


def rendered(table: dict[str, Any]) -> str:
    """docs/loaders.md from the golden table."""
    lines = [
        "# Loaders",
        "",
        "One ONNX folder, tried with everything that loads it: 16 greedy tokens of each family's",
        "small random checkpoint are compared with those of packlight's own loop. Renewed by",
        "`pytest tests/exporters/onnx/test_onnx_loaders.py -m '' --update-golden` where",
        "`make loaders` has installed Transformers.js; versions are those of the last renewal.",
        "",
    ]
    lines += [f"- {row['title']}: {row['version']}" for row in table.values()]
    lines += ["", f"| family | {' | '.join(row['title'] for row in table.values())} |"]
    lines += [f"| --- |{' --- |' * len(table)}"]
    for family in (*FAMILIES, *MORE):
        cells = [row["families"].get(family, "not tried") for row in table.values()]
        marks = " | ".join(cell if cell in (RUNS, "not tried") else "no" for cell in cells)
        lines.append(f"| {family} | {marks} |")
    refusals = [
        f"- {row['title']}, {family}: `{cell}`"
        for row in table.values()
        for family, cell in row["families"].items()
        if cell not in (RUNS, "not tried")
    ]
    lines += ["", "What the others say:", "", *refusals] if refusals else []
    return "\n".join([*lines, ""])


def test_the_page_is_the_table() -> None:
    table = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert list(table) == list(LOADERS)
    assert PAGE.read_text(encoding="utf-8") == rendered(table)


def test_same_tokens_with_the_default_settings(exported: Exports) -> None:
    for settings in ({}, {"bits": 8}):
        case = exported("onnx", "phi3", **settings)
        prompt = case.tokens(9)
        ours = greedy(open_runtime(case), prompt, COUNT)
        assert with_optimum(Case(case.path, prompt)) == ours
        assert with_genai(Case(case.path, prompt)) == ours


def read(case: Exported, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((case.path / name).read_text())
    return value


def test_configs(exported: Exports) -> None:
    case = exported("onnx", "phi3")
    files = {file.name for file in case.path.iterdir()}
    assert files >= {"config.json", "generation_config.json", "genai_config.json", "onnx"}
    assert files >= {"tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (case.path / "onnx").iterdir()} == {
        "model_q4.onnx",
        "model_q4.onnx_data",
    }
    config = read(case, "config.json")
    assert config["architectures"] == ["Phi3ForCausalLM"]
    assert config["transformers.js_config"] == {
        "dtype": "q4",
        "kv_cache_dtype": {"q4": "float32"},
        "use_external_data_format": {"model_q4.onnx": 1},
    }
    genai = read(case, "genai_config.json")
    assert genai["model"]["type"] == "phi3"
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == 256
    assert genai["model"]["decoder"]["filename"] == "onnx/model_q4.onnx"
    stops = list(case.config.eos_token_ids)
    assert len(stops) == 3
    assert genai["model"]["eos_token_id"] == stops
    assert read(case, "generation_config.json")["eos_token_id"] == stops


def test_eight_bits_have_the_suffix_of_their_dtype(exported: Exports) -> None:
    case = exported("onnx", "llama", bits=8)
    assert (case.path / "onnx/model_int8.onnx_data").exists()
    config = read(case, "config.json")["transformers.js_config"]
    assert config["dtype"] == "int8"
    assert config["use_external_data_format"] == {"model_int8.onnx": 1}


def test_mobilellm_travels_as_a_llama(exported: Exports) -> None:
    case = exported("onnx", "mobilellm", {"layer_sharing": True})
    config = read(case, "config.json")
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["num_hidden_layers"] == 4
    assert not {"auto_map", "share_embedding", "layer_sharing"} & set(config)


@pytest.mark.parametrize("family", ["phi3", "qwen2", "mobilellm"])
def test_tokenizers_agree(exported: Exports, family: str) -> None:
    import onnxruntime_genai as genai

    case = exported("onnx", family)
    original = AutoTokenizer.from_pretrained(case.checkpoint.path)
    copied = AutoTokenizer.from_pretrained(case.path)
    native = genai.Tokenizer(genai.Model(str(case.path)))
    for text in ("The river goes down to the sea.", "for i in range(10):\n    print(i)\n"):
        ids = original.encode(text)
        assert copied.encode(text) == ids
        # GenAI leaves the BOS to the chat template.
        assert native.encode(text).tolist() == original.encode(text, add_special_tokens=False)
    assert (case.path / "tokenizer.json").exists()


def test_without_a_tokenizer(exported: Exports) -> None:
    case = exported("onnx", "phi", {"tokenizer": False})
    assert not (case.path / "tokenizer.json").exists()
    assert len(greedy(open_runtime(case), [3, 4], 2)) == 2
