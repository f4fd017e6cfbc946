"""``import packlight``: names, examples, no output, progress, errors; docs/api.md's code runs.

test_process_state tests the state of a process after builds, and the bytes of two builds in one.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import packlight
from compress.build.arguments import build_settings
from compress.console import Console
from compress.demo import model_path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("click", "coremltools", "gguf", "numba", "numpy", "onnx", "pydantic", "rich", "torch",
         "transformers", "yaml")  # fmt: skip
FAST = {"verify.windows": 2, "verify.sequence_length": 32, "verify.gates": {}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("tiny") / "tiny-llama")


def test_public_names_are_sorted_documented_and_all_there() -> None:
    assert packlight.__all__ == sorted(packlight.WHERE)
    assert set(packlight.__all__) <= set(dir(packlight))
    for name in packlight.__all__:
        found = getattr(packlight, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            assert inspect.getdoc(found), name
    with pytest.raises(AttributeError, match="has no attribute 'bild'"):
        packlight.bild  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    source = inspect.getsource(packlight)
    imports = re.findall(r"^    from ([\w.]+) import (\w+) as (\w+)$", source, re.M)
    assert {name: module for module, name, _ in imports} == packlight.WHERE
    assert all(name == alias for _, name, alias in imports)
    for package in ("compress", "exporters", "packlight"):
        assert (ROOT / package / "py.typed").is_file()


def test_importing_it_loads_nothing_else() -> None:
    code = (
        "import sys, packlight\n"
        f"print([name for name in {('compress', 'exporters', *HEAVY)!r} if name in sys.modules])\n"
        "packlight.PacklightError\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "[]"], done.stderr


@pytest.mark.parametrize("name", sorted({*packlight.WHERE.values()} - {"compress"}))
def test_examples_run(name: str) -> None:
    """One for each public name, in the docstring that is shown of it."""
    module = importlib.import_module(name)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for public in (key for key, where in packlight.WHERE.items() if where == name):
        found = getattr(module, public)
        if not (inspect.isclass(found) or inspect.isfunction(found)):
            continue  # a type of arguments
        examples = 0
        for test in finder.find(found, public, globs={**vars(module), "packlight": packlight}):
            examples += len(test.examples)
            runner.run(test)
        assert examples, f"{public} has no example"
    assert runner.summarize(verbose=False).failed == 0


def test_a_build_prints_nothing_and_reports_its_progress(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int, int, str]] = []
    report = packlight.build(
        model,
        "int4-fast",
        formats=["gguf"],
        output=tmp_path / "out",
        overrides=FAST,
        gates={"kl_divergence": "<=100"},
        progress=lambda *update: seen.append(update),
    )
    assert capfd.readouterr() == ("", "")
    assert report.passed
    assert report["gguf"].gates[0].limit == "<=100"
    saved = packlight.Report.load(tmp_path / "out" / "report.json")
    assert saved == report

    phases = list(dict.fromkeys(phase for phase, *_ in seen))
    assert phases[0] == "plan"
    writing = [update for update in seen if update[0] == "write gguf"]
    assert writing[0] == ("write gguf", 0, 0, "bytes")
    assert writing[-1][1] == writing[-1][2] == report["gguf"].weights_bytes
    done = [update[1] for update in writing]
    assert done == sorted(done) and len(set(done)) > 10

    again = packlight.verify(tmp_path / "out", model, {"perplexity_ratio": "<=0.1"}, windows=2)
    assert capfd.readouterr() == ("", "")
    assert not again.passed and again.verdict == "failed"


def test_an_exception_of_the_callback_ends_the_build(model: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def progress(phase: str, done: int, total: int, unit: str) -> None:
        if phase == "write gguf" and done:
            raise Stop

    with pytest.raises(Stop):
        packlight.build(
            model, "int4-fast", formats=["gguf"], output=tmp_path / "out", verify=False,
            progress=progress,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_console_prints_as_the_command_does(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    packlight.build(
        model, "int4-fast", formats=["gguf"], output=tmp_path / "out", verify=False,
        console=Console("human", verbose=True),
    )  # fmt: skip
    assert "write gguf" in capfd.readouterr().err
    with pytest.raises(packlight.PacklightError, match="exclude each other"):
        packlight.plan(model, console=Console("quiet"), progress=print)


def test_warnings_go_to_the_logger(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pickled = tmp_path / "pickled"
    import torch
    from safetensors.torch import load_file

    pickled.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(model / "model.safetensors"), pickled / "pytorch_model.bin")
    with caplog.at_level(logging.WARNING, logger="packlight"):
        packlight.plan(pickled, "int4-fast")
    assert any("pickles" in record.message for record in caplog.records)


def test_a_plan_counts_the_bytes_that_a_build_writes(model: Path, tmp_path: Path) -> None:
    recipe = packlight.Recipe.load("int4-fast").set("targets.gguf.type", "Q8_0")
    plans = packlight.plan(model, recipe)
    report = packlight.build(model, recipe, output=tmp_path / "out", verify=False)
    assert {found.format: found.bytes for found in report.artifacts} == {
        name: plan.file_bytes for name, plan in plans.items()
    }
    assert report["gguf"].type == plans["gguf"].type_name == "Q8_0"
    written = packlight.Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert written.targets == recipe.targets
    assert "-r recipe.yaml" in report.tool.command


def test_arguments_become_the_settings_of_the_command(model: Path, tmp_path: Path) -> None:
    settings = build_settings(
        model, "phone-4bit", output=str(tmp_path / "out"), budget=10**7, max_memory="2GiB",
        overrides={"targets.gguf.type": "Q4_0", "name": "yes", "allow_dense": True},
        gates={"bytes": "<=1GB"}, calibration=["a.txt"], plan=None,
        revision="main", token=None, cache_dir=None, fetch="streaming",
    )  # fmt: skip
    assert settings.output == tmp_path / "out"
    assert (settings.budget, settings.max_memory) == ("10000000", 2 << 30)
    assert settings.overrides == ("targets.gguf.type=Q4_0", 'name="yes"', "allow_dense=true")
    assert settings.gates == ("bytes=<=1GB",)
    assert settings.calibration == (Path("a.txt"),)
    assert (settings.hub["revision"], settings.hub["fetch"]) == ("main", "streaming")
    hub = dict.fromkeys(("revision", "token", "cache_dir", "fetch"))
    for given, expected in (
        ("lora", ("lora",)),
        ([Path("a"), "b=2"], ("a", "b=2")),
        ({"a": 0.5, Path("b"): 1}, ("a=0.5", "b=1")),
    ):
        assert build_settings(model, "phone-4bit", adapters=given, **hub).adapters == expected


@pytest.mark.parametrize(
    ("call", "message", "hint"),
    [
        (lambda: packlight.build(model_path(), "fone-4bit"), "fone-4bit", "phone-4bit"),
        (
            lambda: packlight.plan(model_path(), overrides={"targets.gguf.typ": "Q4_0"}),
            "targets.gguf.typ",
            "type",
        ),
        (
            lambda: packlight.Recipe.load("phone-4bit").set("quantize.solver", "gtpq"),
            "gtpq",
            "gptq",
        ),
        (lambda: packlight.build(model_path(), locked=True), "needs a plan", "plan"),
        (lambda: packlight.fit(model_path(), memory="3 apples"), "3 apples", ""),
        (lambda: packlight.fit(model_path(), "iphone-41"), "iphone-41", "iphone-17"),
        (lambda: packlight.verify("/nowhere", model_path()), "/nowhere", ""),
        (lambda: packlight.inspect("/nowhere"), "/nowhere", ""),
        (lambda: packlight.get_grid("Q4_L"), "Q4_L", "Q4_K"),
    ],
)
def test_errors_have_a_line_and_a_hint(call, message: str, hint: str) -> None:
    with pytest.raises(packlight.PacklightError) as caught:
        call()
    assert message in caught.value.message and "\n" not in caught.value.message
    assert hint in caught.value.hint


def test_facts_and_rows(model: Path) -> None:
    (facts,) = packlight.inspect(model)
    assert facts["format"] == "checkpoint"
    assert facts["bytes"] == sum(row["bytes"] for row in facts["tensors"])
    rows = packlight.fit(model, memory=10**9, recipe="int4-fast")
    assert [row["artifact"].split()[0] for row in rows] == ["gguf", "onnx", "coreml"]
    for row in rows:
        parts = row["weights_bytes"], row["kv_cache_bytes"], row["activation_bytes"]
        assert row["total_bytes"] == sum(parts)
        assert row["verdict"] == "fits"


def tasks_of_the_page() -> list[tuple[str, str]]:
    """Title and Python code of each section of docs/api.md."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = []
    for section in page.split("\n## ")[1:]:
        blocks = re.findall(r"```python\n(.*?)```", section, re.S)
        if blocks:
            found.append((section.partition("\n")[0], "\n".join(blocks)))
    return found


@pytest.mark.parametrize(("title", "code"), tasks_of_the_page(), ids=lambda text: text[:30])
def test_the_page_runs(
    title: str, code: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``model`` a folder, in an empty one, each task by itself."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"docs/api.md: {title}", "exec"), {"model": str(model)})
