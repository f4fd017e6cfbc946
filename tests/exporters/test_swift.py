"""The Swift packages that lie beside a Core ML package or in a Core AI bundle.

No Swift compiler runs here: its syntax is parsed, and its names are compared with the written
package and lists of Apple's.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exported import Exports

from compress.checkpoint.checkpoint import Stored
from compress.plan.job import Job
from compress.recipe import load
from compress.verify.parity import vectors
from exporters import app
from exporters.coreml.app import write_app_files
from exporters.coreml.mil import read_package
from exporters.coreml.runtime import open_runtime

tree_sitter = pytest.importorskip("tree_sitter", reason="pip install tree-sitter")
tree_sitter_swift = pytest.importorskip("tree_sitter_swift", reason="pip install tree-sitter-swift")

FOLDER = Path(app.__file__).with_name("swift")
FILES = sorted(FOLDER.rglob("*.swift"))

# Members of frameworks, and the oldest iOS that has each (developer.apple.com/documentation).
COREML = {
    "load": 14, "compileModel": 16, "makeState": 18, "prediction": 18, "computeUnits": 12,
    "cpuAndGPU": 12, "featureValue": 11, "multiArrayValue": 11, "strides": 11, "float16": 16,
    "int32": 11, "withUnsafeBytes": 15, "withUnsafeMutableBytes": 15,
}  # fmt: skip
# Types whose names begin as those of Core ML do.
TYPES = {
    "MLModel": 11, "MLModelConfiguration": 12, "MLComputeUnits": 12, "MLState": 18,
    "MLMultiArray": 11, "MLDictionaryFeatureProvider": 11,
}  # fmt: skip
TOKENIZER = {"from", "encode", "decode", "applyChatTemplate"}
FRAMEWORKS = {
    "PacklightCore": {"Foundation"},
    "PacklightModel": {"Foundation", "CoreML", "Darwin", "Tokenizers", "PacklightCore"},
    "measure": {"Foundation", "PacklightModel"},
    "PacklightCoreAI": {
        "CoreAILanguageModels", "Foundation", "FoundationModels", "PacklightCore", "PacklightModel",
    },
    "measure-coreai": {"Foundation", "PacklightCoreAI"},
    "CoreAIParityTests": {"Foundation", "XCTest", "Tokenizers", "PacklightCore", "PacklightCoreAI"},
    "CoreAI": {"PackageDescription"},
    "CoreTests": {"Foundation", "XCTest", "PacklightCore"},
    "ParityTests": {"Foundation", "XCTest", "Tokenizers", "PacklightCore", "PacklightModel"},
    "swift": {"PackageDescription"},
}  # fmt: skip


def parse(source: bytes) -> Any:
    language = tree_sitter.Language(tree_sitter_swift.language())
    return tree_sitter.Parser(language).parse(source).root_node


def nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in node.children:
        yield from nodes(child)


def texts(path: Path, kind: str) -> list[str]:
    return [each.text.decode() for each in nodes(parse(path.read_bytes())) if each.type == kind]


def members(path: Path) -> set[str]:
    """Names after a dot."""
    found = set()
    for each in nodes(parse(path.read_bytes())):
        text = each.text.decode()
        if each.type in ("navigation_suffix", "prefix_expression") and text.startswith("."):
            found.add(text[1:].split("(")[0].split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_syntax(path: Path) -> None:
    wrong = [
        (each.start_point[0] + 1, each.text.decode()[:60])
        for each in nodes(parse(path.read_bytes()))
        if each.type == "ERROR" or each.is_missing
    ]
    assert not wrong


def test_damage_is_seen() -> None:
    text = (FOLDER / "Sources/PacklightModel/Decoder.swift").read_text(encoding="utf-8")
    for whole in ("public func append(_", "let end = length", "-> [[Float]] {"):
        assert whole in text
        tree = parse(text.replace(whole, whole[: len(whole) // 2], 1).encode())
        assert any(node.type == "ERROR" or node.is_missing for node in nodes(tree))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_target_imports_what_it_may(path: Path) -> None:
    imported = {text.split()[-1] for text in texts(path, "import_declaration")}
    assert imported <= FRAMEWORKS[path.parent.name]


def test_targets_have_their_folders() -> None:
    for package in (FOLDER, FOLDER / "CoreAI"):
        text = (package / "Package.swift").read_text(encoding="utf-8")
        places = [*package.glob("Sources/*"), *package.glob("Tests/*")]
        assert len(places) > 2
        for place in places:
            assert place.name in FRAMEWORKS and f'name: "{place.name}"' in text


def test_features_have_the_names_of_the_package(exported: Exports) -> None:
    function = read_package(exported("coreml", "llama3", grid="int4-g32").path).function("main")
    names = set(texts(FOLDER / "Sources/PacklightModel/Decoder.swift", "line_string_literal"))
    plain = {ast.literal_eval(name) for name in names if "\\(" not in name}
    assert {*function.inputs, *function.outputs} <= plain
    assert plain - {*function.inputs, *function.outputs} == {
        "mlmodelc", "Manifest.json", "model.json"
    }  # fmt: skip


def test_core_ml_is_called_by_members_of_ios_18() -> None:
    path = FOLDER / "Sources/PacklightModel/Decoder.swift"
    oldest = {**COREML, **TYPES}
    assert max(oldest.values()) <= 18  # as Package.swift says
    assert ".iOS(.v18)" in (FOLDER / "Package.swift").read_text(encoding="utf-8")
    used = {name for name in texts(path, "simple_identifier") if name.startswith("ML")}
    used |= {name for name in texts(path, "type_identifier") if name.startswith("ML")}
    assert used == TYPES.keys()
    ours = {  # of Foundation, Swift and this file
        "file", "package", "context", "vocabSize", "chunk", "compiled", "default", "path", "count",
        "deletingPathExtension", "appendingPathExtension", "appendingPathComponent",
        "lastPathComponent", "fileExists", "attributesOfItem", "modificationDate", "url",
        "cachesDirectory", "userDomainMask", "timeIntervalSince1970", "moveItem", "tooLong",
        "noLogits", "enumerated", "bindMemory", "initializeMemory", "intValue", "map", "self",
    }  # fmt: skip
    assert members(path) - ours == COREML.keys()


# What is used of coreai-models 0.2.0, github.com/apple/coreai-models: its public declarations.
COREAI = {
    "makeInferenceEngine", "generate", "reset", "greedy", "logits",  # CoreAIRunner, InferenceEngine
    "respond", "content",  # FoundationModels, iOS 27
}  # fmt: skip
COREAI_TYPES = {
    "CoreAILanguageModel", "CoreAIRunner", "InferenceEngine", "InferenceOptions",
    "LanguageModelSession",
}  # fmt: skip


def test_core_ai_is_called_by_what_apples_package_has() -> None:
    used, types = set(), set()
    for path in (FOLDER / "CoreAI/Sources/PacklightCoreAI").glob("*.swift"):
        used |= members(path)
        types |= {*texts(path, "simple_identifier"), *texts(path, "type_identifier")}
    ours = {  # of Foundation, Swift and these files
        "dropFirst", "prefix", "map", "now", "duration", "Instant", "file", "folder", "context",
        "vocabSize", "count", "append",
    }  # fmt: skip
    assert used - ours - {"self"} == COREAI
    apples = {name for name in types if name.startswith(("CoreAI", "Inference", "LanguageModel"))}
    assert apples - {"CoreAIResponder", "CoreAIBundle", "CoreAILanguageModels"} == COREAI_TYPES
    text = (FOLDER / "CoreAI/Package.swift").read_text(encoding="utf-8")
    assert 'coreai-models", from: "0.2.0"' in text and '.iOS("27.0")' in text


def test_tokenizers_are_loaded_from_the_folder() -> None:
    for place in (
        "Sources/PacklightModel/Responder.swift",
        "Tests/ParityTests/ParityTests.swift",
        "CoreAI/Tests/CoreAIParityTests/CoreAIParityTests.swift",
    ):
        text = (FOLDER / place).read_text(encoding="utf-8")
        assert "AutoTokenizer.from(modelFolder:" in text
        assert "pretrained:" not in text  # would ask the Hub
    used = members(FOLDER / "Sources/PacklightModel/Responder.swift")
    assert used >= TOKENIZER


def test_json_keys_are_those_that_are_written(exported: Exports, tmp_path: Path) -> None:
    built = exported("coreml", "llama3", grid="int4-g32")
    runtime = open_runtime(built.path, context=64)
    tokens = built.tokens(32)
    parity = vectors("r", tokens, runtime.logits(tokens))
    runtime.close()
    for file in built.path.parent.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    job = Job(Stored(built.checkpoint, built.config), built.config, load("int4-fast"),
              (built.plan,), 64)  # fmt: skip
    write_app_files(replace(built.artifact, path=tmp_path / "x.mlpackage"), job, parity)
    model = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    found = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))
    core = FOLDER / "Sources/PacklightCore"
    decoded = {
        "ModelFile": model, "Memory": model["memory"], "ParityLogits": found["logits"],
        "Tolerance": found["logits"]["tolerance"], "Text": found["texts"][0],
        "ParityFile": {**found, "why_no_logits": ""},
    }  # fmt: skip
    seen = set()
    for path in (core / "ModelFile.swift", core / "Parity.swift"):
        for node in nodes(parse(path.read_bytes())):
            name = node.child_by_field_name("name") if node.type == "class_declaration" else None
            if name is None:
                continue
            document = {camel(key): value for key, value in decoded[name.text.decode()].items()}
            seen.add(name.text.decode())
            for line in node.text.decode().splitlines():
                if line.strip().startswith("public let ") and own(node, line):
                    key, kind = line.strip().removeprefix("public let ").split(": ")
                    assert key in document, key
                    assert document[key] is not None or kind.endswith("?"), key
    assert seen == decoded.keys()


def own(node: Any, line: str) -> bool:
    """Whether a line is of the struct itself: indented by one level more."""
    return len(line) - len(line.lstrip()) == node.start_point[1] + 4


def camel(key: str) -> str:
    """As ``convertFromSnakeCase`` has it."""
    first, *others = key.split("_")
    return first + "".join(part.capitalize() for part in others)
