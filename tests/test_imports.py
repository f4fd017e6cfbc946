"""Imports between the rooms (docs/rooms.md), and the modules that `packlight --help` loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[1]
# Rooms by floor: a room imports only from floors below its own, and from itself.
FLOORS: list[set[str]] = [
    {"errors", "machine"},
    {"files", "formats", "progress"},
    {"console", "grids", "recipes"},
    {"decoder", "recipe", "demo"},
    {"checkpoint"},
    {"plan"},
    {"calibration"},
    {"solvers"},
    {"pruning"},
    {"verify"},
    {"allocation", "harness", "report"},
    {"output"},
    {"build"},
    {"exporters", "batch"},
    {"commands", "api"},
    {"cli", "packlight"},
    {"__main__"},
]

# Remaining imports from a higher floor: none may be added.
DEBTS: set[tuple[str, str]] = {
    ("compress.calibration.step", "compress.pruning.sparse"),
    ("compress.calibration.step", "compress.pruning.zeros"),
    ("compress.calibration.step", "compress.solvers"),
    ("compress.plan.document", "compress.solvers"),
    ("compress.plan.job", "compress.pruning.sparse"),
    ("compress.plan.job", "compress.pruning.zeros"),
    ("compress.plan.job", "compress.solvers"),
    ("compress.plan.memory", "compress.pruning.sparse"),
    ("compress.plan.memory", "compress.pruning.zeros"),
    ("compress.plan.memory", "compress.solvers"),
}


@cache  # 160 files are parsed once, not once for each of them
def modules() -> dict[str, ast.Module]:
    found = {}
    for package in ("compress", "exporters", "packlight", "recipes"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(tree: ast.AST) -> set[str]:
    """Modules named anywhere in the file, inside functions too; not those that only types need."""
    names = set()
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def at_import(tree: ast.Module) -> set[str]:
    """Modules that loading the file loads: not those inside functions or TYPE_CHECKING."""
    names = set()
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= imported(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        elif not isinstance(node, ast.FunctionDef):
            pending += [
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)
            ]
    return names


def room(name: str) -> str:
    """The room of a module: the package or module directly under ``compress``, or its package."""
    top, _, rest = name.partition(".")
    return rest.partition(".")[0] if top == "compress" else top


def floor(name: str) -> int | None:
    """The floor of the room that a module is in."""
    found = [level for level, rooms in enumerate(FLOORS) if room(name) in rooms]
    return found[0] if found else None


def test_every_module_has_a_room():
    homeless = [name for name in modules() if name != "compress" and floor(name) is None]
    assert homeless == []


def test_the_map_of_the_rooms_is_complete():
    """docs/rooms.md has a row for every room, and none for what is not there."""
    text = (ROOT / "docs" / "rooms.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([\w.]+)/?` \|", text, re.M))
    there = {room(name) for name in modules()} - {"", "__main__"}
    assert rows == there


@pytest.mark.parametrize("name", list(modules()))
def test_arrows_point_down(name):
    mine = floor(name)
    for other in imported(modules()[name]) & set(modules()):
        theirs = floor(other)
        if mine is None or theirs is None or room(name) == room(other):
            continue
        assert theirs < mine, f"{name} imports {other}, which is not below it"


def test_formats_never_see_each_other():
    formats = ("gguf", "onnx", "coreml", "coreai", "mlx")
    for name, tree in modules().items():
        for mine in formats:
            if name.startswith(f"exporters.{mine}"):
                for other in set(formats) - {mine}:
                    assert not any(i.startswith(f"exporters.{other}") for i in imported(tree)), name


def test_writers_never_see_solvers_and_grids_never_see_files():
    for name, tree in modules().items():
        names = imported(tree)
        if name.startswith("exporters"):
            assert not any(i.startswith("compress.solvers") for i in names), name
        if name.startswith("compress.grids"):
            assert not any(
                i.startswith(("compress.checkpoint.checkpoint", "compress.plan.shapes"))
                for i in names
            ), name
        if name.startswith("compress.solvers"):
            assert not any(i.startswith("exporters") for i in names), name


@pytest.mark.parametrize(
    "name", ["compress.decoder.config", "compress.recipe", "compress.checkpoint.checkpoint"]
)
def test_light_modules_do_not_load_torch(name):
    assert not {i.split(".")[0] for i in at_import(modules()[name])} & {"torch", "transformers"}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("words", [["--help"], ["build", "--help"], ["recipes", "--help"]])
def test_help_loads_little(words):
    """The number of modules, since a time would depend on the machine."""
    done = run(
        "import sys\n"
        "before = set(sys.modules)\n"
        "from compress.__main__ import main\n"
        f"sys.argv = ['packlight', *{words}]\n"
        "assert main() == 0\n"
        "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    loaded = done.stderr.split()
    tops = {name.partition(".")[0] for name in loaded}
    assert tops - sys.stdlib_module_names == {"compress", "exporters", "click"}
    assert len(loaded) <= 120  # 94, of them 19 our own


def test_writing_loads_no_torch(tmp_path):
    """coremltools and others would, to be able to convert from it: seconds, and 160 MB."""
    model = tiny.make("llama", tmp_path / "model", num_hidden_layers=1)
    where = ["build", str(model), "-o", str(tmp_path / "out")]
    options = [*where, "-r", "int4-fast", "--no-verify"]
    done = run(
        "import sys, compress.__main__ as c, compress.machine as m\n"
        "m.own_process()\n"
        f"assert c.main({options}) == 0\n"
        "assert 'coremltools' in sys.modules\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
        "import torch, transformers  # for whoever wants them afterwards\n"
    )
    assert done.stdout.splitlines()[-1] == "[]"
