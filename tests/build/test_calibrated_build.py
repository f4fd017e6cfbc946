"""Builds with input statistics, by the command line and in the real runtime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from commands import packlight, refused

from compress.demo import model_path

FAST = ("-r", "int4-fast")
SOLVER = ("--set", "quantize.solver=scale_search")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, str]:
    return {"PACKLIGHT_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def demo_text(tmp_path_factory) -> Path:
    """Text that is not the held-out one: this repository's own documentation."""
    root = Path(__file__).resolve().parents[2]
    path = tmp_path_factory.mktemp("texts") / "docs.txt"
    files = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]
    path.write_text("\n".join(file.read_text(encoding="utf-8") for file in files))
    return path


def test_what_inputs_tell_lowers_the_divergence_of_the_demo(cache, tmp_path):
    found = {}
    for solver in ("rtn", "scale_search", "gptq"):
        done = packlight(
            "build", model_path(), "-f", "gguf", "-o", solver, "--json", "--threads", 1,
            "--set", "verify.windows=4", "--set", f"quantize.solver={solver}",
            "--set", "calibration.tokens=4096", "--set", "calibration.sequence_length=128",
            "--keep-baseline", tmp_path / "float",
            cwd=tmp_path, env=cache,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        found[solver] = report["artifacts"][0]["kl_divergence"]["mean"]
    assert report["notes"][-1] == "Codes chosen by gptq, calibrated on 4096 tokens of builtin"
    assert "are as scale_search leaves them" in report["artifacts"][0]["notes"][-1]
    plan = json.loads((tmp_path / "gptq" / "plan.json").read_text())
    assert plan["quantize"]["solver"] == "gptq"
    assert plan["quantize"]["calibration"]["texts"] == ["builtin"]
    assert found["scale_search"] < 0.95 * found["rtn"]
    assert found["gptq"] < 0.7 * found["scale_search"]


@pytest.mark.parametrize(("solver", "first"), [("rtn", "Q5_K"), ("gptq", "IQ4_XS")])
def test_llama_cpps_presets_know_whether_codes_are_chosen_by_importance(solver, first, tmp_path):
    source = tiny.make("llama", tmp_path / "model", num_hidden_layers=8)
    done = packlight(
        "build", source, "-f", "gguf", "--dry-run", "--json",
        "--set", "targets.gguf.type=IQ4_XS", "--set", f"quantize.solver={solver}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tensors = json.loads(done.stdout)["targets"]["gguf"]["tensors"]
    grids = {t["target_name"]: t["grid"] for t in tensors}
    assert grids["blk.0.ffn_down.weight"] == first
    assert grids["blk.1.ffn_down.weight"] == "IQ4_XS"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make("phi3", tmp_path_factory.mktemp("models") / "tiny-phi3")


def test_an_imatrix_gives_the_bytes_of_its_own_statistics(model, demo_text, cache, tmp_path):
    build = ("build", model, "-f", "gguf", "-f", "onnx", "--no-verify", *SOLVER)
    short = ("--set", "calibration.tokens=512", "--set", "calibration.sequence_length=64")
    texts = ("--calibration", demo_text, "--seed", 5, *short)
    done = packlight(
        *build, *texts, "-o", "a", "--save-imatrix", "im.gguf", cwd=tmp_path, env=cache
    )
    assert done.returncode == 0, done.stderr
    done = packlight(*build, "-o", "b", "--imatrix", "im.gguf", cwd=tmp_path, env=cache)
    assert done.returncode == 0, done.stderr
    for path in ("gguf/tiny-phi3-Q4_K_M.gguf", "onnx/onnx/model_q4.onnx_data"):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert report["notes"][-1] == "Codes chosen by scale_search, with the importance in im.gguf"
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["notes"][-1].endswith("calibrated on 512 tokens of docs.txt")
    assert report["recipe"]["calibration"]["texts"] == ["docs.txt"]  # no path of this machine
    assert "--calibration docs.txt --seed 5" in report["tool"]["command"]
    assert str(demo_text.parent) not in (tmp_path / "a" / "recipe.yaml").read_text()
    done = packlight("build", model, "-f", "gguf", "--no-verify", *FAST, "-o", "c", cwd=tmp_path)
    plain = (tmp_path / "c" / "gguf" / "tiny-phi3-Q4_K_M.gguf").read_bytes()
    assert plain != (tmp_path / "a" / "gguf" / "tiny-phi3-Q4_K_M.gguf").read_bytes()


def test_dry_run_tells_the_solver(model, tmp_path):
    done = packlight("build", model, "-f", "gguf", "--dry-run", *SOLVER, cwd=tmp_path)
    assert "solver: scale_search, calibrated on 16384 tokens of builtin" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_a_tokenizer_the_way_out_is_told(cache, tmp_path):
    tiny.make("llama", tmp_path / "m", tokenizer=False)
    build = ("build", "m", "-o", "out", "-f", "onnx")
    for options in ((), ("--no-verify",), FAST):
        told = refused(packlight(*build, *options, cwd=tmp_path, env=cache))
        assert "no tokenizer in m" in told and "-r int4-fast --no-verify" in told
        assert [path.name for path in tmp_path.iterdir()] == ["m"]
    done = packlight(*build, *FAST, "--no-verify", cwd=tmp_path, env=cache)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*FAST, "--imatrix", "im.gguf"), "--imatrix has no effect: the solver is rtn"),
        ((*FAST, "--calibration", "a.txt"), "--calibration has no effect: the solver is rtn"),
        ((*SOLVER, "--calibration", "a.txt"), "a.txt does not exist"),
        ((*SOLVER, "--imatrix", "im.gguf"), "im.gguf does not exist"),
        ((*SOLVER, "--imatrix", "x", "--calibration", "y"), "exclude each other"),
        (("--imatrix", "x"), "less than gptq needs"),
        (("--set", "calibration.tokens=0"), "calibration.tokens"),
        (("--set", "calibration.text=builtin"), "did you mean texts"),
    ],
)
def test_refusals(model, cache, tmp_path, options, message):
    done = packlight("build", model, "-f", "gguf", "-o", "out", *options, cwd=tmp_path, env=cache)
    assert message in refused(done)
    assert list(tmp_path.iterdir()) == []
