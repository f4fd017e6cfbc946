"""A new format is a folder and a row: tests/toy in a copy of the tree, where only its row is
added to ``exporters/formats.py``; and no module of ``compress`` names a format."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import packlight
from trees import PACKAGES, warm

from compress.demo import model_path

ROOT = Path(__file__).resolve().parents[2]
LAST_ROW = ")  # fmt: skip\n\nFORMATS.update"
ROW = """    Format("toy", "Toy™", "exporters.toy", "a .toy file", ProcessCost(10**8, 4.0, 1e-9)),
"""
MEASURE = ["--set", "verify.windows=2", "--set", "verify.sequence_length=64"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """packlight with the toy format."""
    root = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, root / package, ignore=ignore)
    shutil.copytree(ROOT / "tests" / "toy", root / "exporters" / "toy", ignore=ignore)
    table = root / "exporters" / "formats.py"
    text = table.read_text(encoding="utf-8")
    assert text.count(LAST_ROW) == 1
    table.write_text(text.replace(LAST_ROW, ROW + LAST_ROW), encoding="utf-8")
    warm(root)
    return root


def run(tree: Path, *arguments: object) -> str:
    """What a command prints, in the folder ``tree/work``."""
    place = tree / "work"
    place.mkdir(exist_ok=True)
    # Not from the tree: the package must be importable from any folder.
    done = packlight(*arguments, cwd=place, tree=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tree: Path) -> Path:
    """The folder of a build of two formats, verified."""
    run(tree, "build", model_path(), "-r", "int4-fast", "-f", "toy", "-f", "onnx", "-o", "out",
        *MEASURE, "--set", "verify.gates={}")  # fmt: skip
    return tree / "work" / "out"


def test_a_build_writes_it_and_its_pages_name_it(built: Path) -> None:
    report = json.loads((built / "report.json").read_text())
    toy = report["artifacts"][0]
    assert (toy["format"], toy["type"], toy["runtime"]) == (
        "toy",
        "int8-channel",
        "the toy's runtime",
    )
    assert toy["kl_divergence"]["mean"] < 0.02
    assert toy["generation_consistent"]
    assert (built / toy["path"]).stat().st_size == toy["bytes"]
    assert "Toy™ int8-channel" in (built / "report.html").read_text()
    card = (built / "README.md").read_text()
    assert "Toy™ int8-channel" in card and "\nplay toy/model.toy\n" in card
    assert json.loads((built / "plan.json").read_text())["targets"].keys() == {"toy", "onnx"}


def test_commands_know_it(tree: Path, built: Path) -> None:
    facts = json.loads(run(tree, "inspect", built / "toy", "--json"))
    assert facts["format"] == "toy" and facts["metadata"] == {"made for": "tests"}
    rows = json.loads(run(tree, "fit", built, "--device", "iphone-14", "--json"))["rows"]
    assert [row["artifact"].split()[0] for row in rows] == ["onnx", "toy"]
    report = json.loads(
        run(tree, "verify", built / "toy", "--baseline", model_path(), "--windows", 2,
            "--sequence-length", 64, "--gate", "kl_divergence<=0.02", "--json")
    )  # fmt: skip
    assert report["verdict"] == "passed"
    assert report["artifacts"][0]["path"] == "model.toy"
    dry = run(
        tree, "build", model_path(), "-f", "toy", "--dry-run", "--set", "targets.toy.grid=int8-g32"
    )
    assert "int8-g32" in dry
    assert "in the box" in run(tree, "doctor")
    schema = json.loads(run(tree, "recipes", "schema"))
    assert "toy" in schema["$defs"]["Targets"]["properties"]


@pytest.mark.slow
def test_a_batch_builds_it(tree: Path) -> None:
    jobs = tree / "work" / "jobs.yaml"
    jobs.parent.mkdir(exist_ok=True)
    jobs.write_text(
        f"""schema: 1
output: tree
models: [{model_path()}]
recipes: [int4-fast]
formats: [toy]
options:
  set: {{verify.windows: 2, verify.sequence_length: 64, verify.gates: {{}}}}
"""
    )
    run(tree, "batch", jobs)
    place = jobs.parent / "tree"
    document = json.loads((place / "batch.json").read_text())
    assert document["jobs"][0]["artifacts"][0]["format"] == "toy"
    assert "Toy™" in (place / "batch.html").read_text()


def test_a_program_builds_it(tree: Path) -> None:
    code = (
        "import packlight, sys\n"
        "plan = packlight.plan(sys.argv[1], 'int4-fast', formats=['toy'])['toy']\n"
        "report = packlight.build(sys.argv[1], 'int4-fast', formats=['toy'], output='api',\n"
        "                         verify=False)\n"
        "assert report['toy'].bytes == plan.file_bytes\n"
    )
    subprocess.run(
        [sys.executable, "-P", "-c", code, model_path()],
        cwd=tree / "work", env={**os.environ, "PYTHONPATH": str(tree)}, check=True,
    )  # fmt: skip


# --- compress/ names no format ----------------------------------------------------------------

NAMES = re.compile(
    r"gguf|onnx|core_?ml|core ml|core_?ai|core ai|\bmlx|llama\.?_?cpp|mlpackage|\btoy\b", re.I
)
ALLOWED = {  # the library that has the tables of the codebook grids
    ("compress/grids/codebook.py", "gguf"),
    ("compress/grids/codebook.py", "gguf.quants"),
}
# Other files that users pass instead of a checkpoint, and their names in messages.
ERRORS = "compress/checkpoint/not_a_checkpoint.py"


def words(tree: ast.Module) -> Iterator[str]:
    """Identifiers and string literals of a module; no docstrings."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word):
                yield word
            case ast.FunctionDef(name=word) | ast.ClassDef(name=word) | ast.alias(name=word):
                yield word
            case ast.keyword(arg=str(word)) | ast.Constant(value=str(word)):
                yield word


def without_docstrings(tree: ast.Module) -> ast.Module:
    """A module without strings that are statements."""
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [
                each
                for each in body
                if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
            ]
    return tree


def test_compress_names_no_format() -> None:
    found = set()
    for path in sorted((ROOT / "compress").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        module = without_docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if name != ERRORS:
            found |= {(name, word) for word in words(module) if NAMES.search(word)}
    for path in sorted((ROOT / "compress").rglob("*.j2")):
        name = path.relative_to(ROOT).as_posix()
        found |= {(name, word) for word in NAMES.findall(path.read_text(encoding="utf-8"))}
    assert found == ALLOWED
