"""Who imports whom (docs/rooms.md), and what `packlight --help` may load and cost."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from compress.demo import model_path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "onnxruntime", "coremltools", "onnx", "numba", "numpy", "gguf"}

# A module may import the rooms of its own line and of those below it.
FLOORS: list[set[str]] = [
    {"compress.errors", "compress.interrupts", "compress.steady", "compress.report.markdown",
     "compress.progress", "compress.output.scratch"},
    {"compress.decoder.config_json", "compress.decoder.rope", "compress.decoder.families", "compress.checkpoint.hub",
     "compress.machine", "compress.output.cache", "compress.checkpoint.remote", "compress.checkpoint.safetensors",
     "compress.output.ledger"},
    {"compress.console", "compress.checkpoint.checkpoint", "compress.decoder.config", "compress.recipe", "recipes",
     "compress.demo"},
    {"compress.grids", "compress.decoder.tokenizer", "compress.checkpoint.side_files", "compress.calibration.statistics",
     "compress.calibration.builtin", "compress.calibration.texts", "compress.checkpoint.sources",
     "compress.solvers.folding", "compress.pruning.rotation"},
    {"compress.plan.shapes", "compress.decoder.kv_cache", "compress.decoder.decoder", "compress.decoder.footprint"},
    {"compress.solvers", "compress.verify", "compress.report.report", "compress.report.html",
     "compress.report.charts", "compress.output.folder", "compress.plan.job", "compress.calibration.collect",
     "compress.calibration.step", "compress.calibration.walk", "compress.build.target", "compress.build.lockstep",
     "compress.build.write",
     "compress.calibration.propagation", "compress.report.summary", "compress.output.checksums",
     "compress.verify.scorer", "compress.report.junit", "compress.report.ci",
     "compress.pace", "compress.plan.memory", "compress.pruning", "compress.checkpoint.save"},
    {"compress.allocation", "compress.build.settings", "compress.plan.document", "compress.output.lock",
     "compress.output.provenance"},
    {"compress.output.resume", "compress.build.decide"},
    {"compress.build.pipeline"},
    {"compress.commands.inspection", "compress.commands.doctor_checks", "compress.output.publish", "compress.batch"},
    {"exporters"},
    {"compress.commands"},
    {"compress.cli", "compress.__main__", "compress.batch.child"},
]  # fmt: skip


@cache  # 160 files are parsed once, not once for each of them
def modules() -> dict[str, ast.Module]:
    found = {}
    for package in ("compress", "exporters", "recipes"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(tree: ast.AST) -> set[str]:
    """Modules named anywhere in the file, inside functions too."""
    names = set()
    for node in ast.walk(tree):
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


def floor(name: str) -> int | None:
    """The floor of the room that a module is in (longest matching name)."""
    best: tuple[int, int] | None = None
    for level, rooms in enumerate(FLOORS):
        for room in rooms:
            if (name == room or name.startswith(room + ".")) and (
                best is None or len(room) > best[0]
            ):
                best = (len(room), level)
    return None if best is None else best[1]


def test_every_module_has_a_room():
    homeless = [name for name in modules() if name != "compress" and floor(name) is None]
    assert homeless == []


def test_the_map_of_the_rooms_is_complete():
    """docs/rooms.md names every module of compress, and nothing that is not there."""
    text = (ROOT / "docs" / "rooms.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:[\w*]+/)*([\w*]+(?:\.py|/))`", text))
    top = (ROOT / "compress").iterdir()
    there = {f"{path.name}/" if path.is_dir() else path.name for path in top}
    there = {name for name in there if name.endswith((".py", "/")) and not name.startswith("__")}
    globs = {name for name in named if "*" in name}
    covered = named | {name for name in there for glob in globs if fnmatch(name, glob)}
    assert there - covered == set()
    formats = {path.name for path in (ROOT / "exporters").glob("*/*.py")}
    others = {path.name for path in (ROOT / "exporters").iterdir()}
    known = there | formats | others | {"recipes/", "test_imports.py", "__init__.py"}
    assert named - globs - known == set()


@pytest.mark.parametrize("name", list(modules()))
def test_arrows_point_down(name):
    mine = floor(name)
    for other in imported(modules()[name]):
        theirs = floor(other)
        if mine is not None and theirs is not None and other.split(".")[0] in (
            "compress", "exporters", "recipes"
        ):  # fmt: skip
            assert theirs <= mine, f"{name} imports {other}, which is above it"


def test_formats_never_see_each_other():
    formats = ("gguf", "onnx", "coreml")
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


def test_help_loads_nothing_heavy():
    done = run(
        "import sys, compress.cli as c\n"
        "assert c.run(['--help']) == 0\n"
        "assert c.run(['build', '--help']) == 0\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    assert done.stderr.strip() == "[]"


def test_writing_loads_no_torch(tmp_path):
    """coremltools and others would, to be able to convert from it: seconds, and 160 MB."""
    where = ["build", str(model_path()), "-o", str(tmp_path / "out")]
    options = [*where, "-r", "int4-fast", "--no-verify"]
    done = run(
        "import sys, compress.cli as c\n"
        f"assert c.run({options}) == 0\n"
        "assert 'coremltools' in sys.modules\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
        "import torch, transformers  # for whoever wants them afterwards\n"
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_answers_in_half_a_second_of_cpu():
    command = [sys.executable, "-m", "compress", "--help"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)  # compile .pyc once
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5
