"""The README is correct: each of its commands is run, and its figures are measured again."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from commands import packlight as command_line
from trees import warm

import packlight
from compress.recipe import load

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import readme_table  # noqa: E402
from screenshot import BROWSERS, GALLERY, HEIGHT, WIDTH, screenshot  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Every command in the README."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += [
        line[2:] for block in blocks("console") for line in block.splitlines() if line[0] == "$"
    ]
    return [line for line in lines if line.strip()]


HUB = "microsoft/Phi-3-mini-4k-instruct"


def here(command: str) -> str:
    """A command on the model that is here, not on the one of the Hub."""
    if f"{HUB} -f gguf -o out" in command:
        command = command.replace("-o out", "-o out-hub")
    # For 1,024 positions; this model has 512.
    command = command.replace("--context 1024", "--context 512")
    command = command.replace("-r phi3-mini-iphone", "-r phi3-mini-iphone --context 512")
    return command.replace(HUB, "./my-checkpoint")


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "NO_COLOR": "1"}
    return subprocess.run(command, shell=True, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The files of `git clone`: the committed tree, or this tree without git."""
    folder = tmp_path_factory.mktemp("stranger")
    target = folder / "packlight"
    if (ROOT / ".git").exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], check=True)
    else:
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".venv", "demo-out"))
    warm(target)
    return target


@pytest.fixture(scope="module")
def session(clone) -> subprocess.CompletedProcess[str]:
    """`make demo` in the clone, with this environment instead of a second installation."""
    stamp = clone / "installed"
    stamp.touch()
    done = shell(f"make demo VENV={Path(sys.executable).parents[1]} BASE={stamp}", clone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stderr
    return done


@pytest.fixture(scope="module")
def demo(session, clone) -> dict:
    """Its report."""
    return json.loads((clone / "demo-out" / "report.json").read_text())


@pytest.mark.slow
def test_make_demo_builds_and_verifies_three_artifacts(demo, clone):
    assert [artifact["format"] for artifact in demo["artifacts"]] == ["gguf", "onnx", "coreml"]
    assert demo["verdict"] == "passed"
    for artifact in demo["artifacts"]:
        assert (clone / "demo-out" / artifact["path"]).exists()
        assert artifact["runtime"]
        generation = artifact["generation"]
        assert artifact["generation_consistent"] or generation["gap"] < 0.05
    assert (clone / "demo-out" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_four_bits_hurt_the_demo_measurably(demo):
    for artifact in demo["artifacts"]:
        assert artifact["kl_divergence"]["mean"] > 5 * artifact["kl_divergence"]["se"]
        assert artifact["perplexity"] > demo["baseline"]["perplexity"]


@pytest.mark.slow
def test_the_table_holds(demo):
    """Bytes to the digit, quality within what another CPU's kernels change."""
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in README.splitlines()
            if row.startswith("| ")}  # fmt: skip
    names = {"gguf": "GGUF", "onnx": "ONNX", "coreml": "Core ML"}
    for artifact in demo["artifacts"]:
        cells = rows[f"{names[artifact['format']]} {artifact['type']}"]
        number = [float(re.search(r"[\d.]+", cell)[0]) for cell in cells]
        assert number[0] == pytest.approx(artifact["bytes"] / 1e6, abs=0.006)
        assert number[1] == pytest.approx(artifact["bits_per_weight"], abs=0.006)
        assert number[2] == pytest.approx(artifact["perplexity"], rel=0.01)
        assert number[3] == pytest.approx(artifact["kl_divergence"]["mean"], rel=0.1)
        assert number[4] == pytest.approx(artifact["top1_agreement"] * 100, abs=1)


def columns(lines: list[str]) -> list[list[str]]:
    """Of each line what does not depend on the machine: format, type and size, or the words."""
    return [re.split(r"\s{2,}", line)[:3] for line in lines]


def as_shown(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a build of the demo printed what the README shows, all but the report's place."""
    printed = [
        line
        for line in (done.stdout + done.stderr).strip().splitlines()
        if not line.startswith(("make", "/", ".venv", "report:"))
    ]
    return columns(printed) == columns(blocks("console")[0].splitlines()[1:-1])


def in_order() -> list[str]:
    """The `packlight` commands, those first that others go on from."""
    found = [here(command) for command in commands() if command.startswith("packlight")]
    return sorted(found, key=lambda line: not line.endswith(("-o out", "-o out-iphone")))


@pytest.mark.slow
def test_the_session_is_what_a_build_of_the_demo_prints(session):
    assert as_shown(session), session.stdout + session.stderr


def checkpoint(clone: Path, folder: Path) -> None:
    shutil.copytree(clone / "compress" / "demo" / "model", folder / "my-checkpoint")


@pytest.mark.slow
def test_every_command_is_understood(demo, clone, tmp_path):
    """Of one format and on two windows; what comes after the first build is planned only."""
    checkpoint(clone, tmp_path)
    for command in in_order():
        words = shlex.split(command, comments=True)[1:]
        if words[0] == "build":
            words += ["-f", "gguf", "--set", "verify.windows=2"]
            if (tmp_path / "out").exists() and "--dry-run" not in words:
                words += ["--dry-run"]
        elif words[0] == "verify" and "--checksums" not in words:
            words += ["--windows", "2"]
        done = command_line(*words, cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if (tmp_path / "out").exists() and not (tmp_path / "last").exists():
            shutil.copytree(tmp_path / "out", tmp_path / "last")  # which was released


@pytest.mark.slow
def test_every_command_runs_as_it_is_typed(clone, tmp_path):
    """In its order, where ./my-checkpoint is."""
    checkpoint(clone, tmp_path)
    for command in in_order():
        done = shell(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if command.endswith("./my-checkpoint -o out"):
            shutil.copytree(tmp_path / "out", tmp_path / "last")  # which was released
            assert as_shown(done)
            assert "report: out/report.html" in done.stderr


def test_every_command_is_one_that_is_run_here():
    for command in commands():
        known = ("packlight ", "make demo", "git clone ", "cd packlight")
        # Tried by hand in empty environments, and of programs that are not here.
        others = (
            "pip install ",
            "pipx install ",
            "uv tool install ",
            "llama-cli ",
            "ollama ",
            "echo ",
        )
        assert command.startswith((*known, *others)), command


@pytest.mark.parametrize("name", ["real", "recipes"])
def test_figures_are_those_of_the_benchmarks(name):
    """`python benchmarks/readme_table.py --figures` renews them."""
    assert readme_table.between(README, name, getattr(readme_table, name)()) == README
    assert f"<!-- {name}:end -->" in README


def test_recipes_of_the_table_are_there():
    for row in readme_table.RECIPES:
        assert load(row[0]).name == row[0]


def test_no_more_words_than_six_need_an_explanation():
    words = README.partition("## Six words")[2].partition("\n## ")[0]
    assert len(re.findall(r"^- \*\*", words, re.MULTILINE)) == 6


def test_the_recipe_is_valid(tmp_path):
    (recipe,) = blocks("yaml")
    file = tmp_path / "my-phone.yaml"
    file.write_text(recipe)
    assert load(str(file)).targets["coreml"]["grid"] == "int4-g32"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_python_lines_name_what_there_is():
    code, genai = blocks("python")
    compile(genai, "README.md", "exec")
    compile(code, "README.md", "exec")
    for name in re.findall(r"pk\.(\w+)", code):
        assert name in packlight.__all__


@pytest.mark.slow  # docs/api.md's and the docstrings' examples run in each suite
def test_the_python_lines_work(clone, tmp_path):
    checkpoint(clone, tmp_path)
    code, _ = blocks("python")
    (tmp_path / "reader.py").write_text(code)
    done = shell(f"{sys.executable} reader.py", tmp_path)
    assert re.fullmatch(r"True 0\.00\d+\n", done.stdout), done.stdout + done.stderr
    assert not done.stderr


@pytest.mark.slow
def test_the_lines_for_onnxruntime_genai_work(demo, clone):
    pytest.importorskip("onnxruntime_genai")
    _, code = blocks("python")
    code = code.replace('"out/onnx"', '"demo-out/onnx"')
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("Once upon a time") and len(done.stdout) > 60


def test_the_gallery_shows_the_pictures_that_are_renewed():
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    shown = re.findall(r"^!\[[^]]+\]\(([^)]+)\)$", page, re.MULTILINE)
    assert shown == [path.name for path in GALLERY]
    for name, (_, height) in zip(shown, GALLERY.values(), strict=True):
        picture = (ROOT / "docs" / name).read_bytes()
        assert struct.unpack(">II", picture[16:24]) == (WIDTH, height)
        assert len(picture) < 1_500_000


def test_the_picture_is_the_top_of_a_report():
    picture = (ROOT / "docs" / "report.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) < 300_000
    assert struct.unpack(">II", picture[16:24]) == (WIDTH, HEIGHT)
    assert "](docs/report.png)" in README


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium")
def test_a_screenshot_has_that_size(tmp_path):
    page = tmp_path / "report.html"
    page.write_text("<h1>Passed</h1>")
    taken = tmp_path / "report.png"
    screenshot(page, taken, next(filter(None, map(shutil.which, BROWSERS))))
    assert struct.unpack(">II", taken.read_bytes()[16:24]) == (WIDTH, HEIGHT)
