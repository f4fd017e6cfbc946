"""The command line on small checkpoints: exit codes, outputs, refusals, interruptions."""

from __future__ import annotations

import html
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import sample_report
import test_help
import tiny
from commands import Step, packlight, paths, refused

import compress
from compress import __main__ as cli
from compress.build.decide import BuildSettings, command_line
from compress.checkpoint.checkpoint import Checkpoint
from compress.cli import cli as cli_group
from compress.verify import scorer

FAST = ["-r", "int4-fast", "--set", "verify.windows=4", "--set", "verify.sequence_length=64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def built(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    done = packlight(
        "build", model, "-f", "gguf", "-f", "onnx", "-o", "out", "--json", *FAST,
        "--set", "verify.gates={kl_divergence: '<=5'}", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "stdout.json").write_text(done.stdout)
    return folder


def test_a_build_leaves_what_the_design_promises(built):
    out = built / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {
        "gguf", "onnx", "report.json", "report.html", "README.md", "recipe.yaml", "plan.json",
        "SHA256SUMS", "provenance.json",
    }  # fmt: skip
    assert [path.name for path in (out / "gguf").iterdir()] == ["tiny-llama-Q4_K_M.gguf"]
    assert (out / "onnx" / "onnx" / "model_q4.onnx_data").exists()
    assert (out / "onnx" / "genai_config.json").exists()
    assert sorted(path.name for path in built.iterdir()) == ["out", "stdout.json"]


def test_json_prints_report_json_and_nothing_else(built):
    printed = json.loads((built / "stdout.json").read_text())
    assert printed == json.loads((built / "out" / "report.json").read_text())
    assert printed["verdict"] == "passed"
    assert [artifact["format"] for artifact in printed["artifacts"]] == ["gguf", "onnx"]
    for artifact in printed["artifacts"]:
        assert artifact["kl_divergence"]["mean"] < 5
        assert artifact["decode_tokens_per_second"] > 0
        assert artifact["peak_memory_bytes"] > artifact["weights_bytes"]


def test_no_absolute_path_in_what_is_shared(built):
    for path in (built / "out").rglob("*"):
        if path.suffix in (".json", ".html", ".md", ".yaml", ".onnx") or path.name == "SHA256SUMS":
            content = path.read_bytes()
            assert str(built).encode() not in content, path
            assert str(Path.home()).encode() + b"/" not in content, path


def test_checksums_hold(built):
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    subprocess.run(check, cwd=built / "out", check=True)


def test_a_second_build_writes_the_same_bytes(built, model, tmp_path):
    done = packlight(
        "build",
        model,
        "-f",
        "gguf",
        "-f",
        "onnx",
        "-o",
        "out",
        "--no-verify",
        "-r",
        "int4-fast",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for path in (built / "out").rglob("*"):
        relative = path.relative_to(built / "out")
        if path.is_file() and relative.parts[0] in ("gguf", "onnx", "plan.json"):
            assert path.read_bytes() == (tmp_path / "out" / relative).read_bytes(), relative
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"] == "not verified"


def test_an_existing_output_is_refused_and_kept(built, model):
    before = (built / "out" / "report.json").read_bytes()
    says = refused(packlight("build", model, "-f", "gguf", "-o", "out", cwd=built))
    assert "exists" in says and "--overwrite" in says
    assert (built / "out" / "report.json").read_bytes() == before


def test_a_failed_gate_is_exit_code_1_and_the_artifact_is_there(model, tmp_path):
    done = packlight(
        "build", model, "-f", "gguf", "-o", "out", *FAST,
        "--set", "verify.gates={kl_divergence: '<=0.0000001'}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "FAILED" in done.stderr and "kl_divergence" in done.stderr
    assert "hint: calibrated codes: -r phone-4bit" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"] == "failed"


def test_quiet_prints_the_artifacts_paths(model, tmp_path):
    done = packlight(
        "build", model, "-f", "gguf", "-o", "o", *FAST, "--no-verify", "-q", cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "o/gguf/tiny-llama-Q4_K_M.gguf\n")
    assert done.stderr == ""


def test_dry_run_writes_nothing(model, tmp_path):
    done = packlight("build", model, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Q4_K_M" in done.stdout and "int4-g32" in done.stdout
    assert list(tmp_path.iterdir()) == []
    done = packlight("build", model, "--dry-run", "--json", cwd=tmp_path)
    assert set(json.loads(done.stdout)["targets"]) == {"gguf", "onnx", "coreml"}


def test_the_planned_bytes_are_the_written_bytes(built):
    plan = json.loads((built / "out" / "plan.json").read_text())
    report = json.loads((built / "out" / "report.json").read_text())
    for artifact in report["artifacts"]:
        assert plan["targets"][artifact["format"]]["weights_bytes"] == artifact["weights_bytes"]


def test_verify_compares_what_was_built(built, model):
    done = packlight(
        "verify", built / "out", "--baseline", model, "--windows", 4, "--sequence-length", 64,
        "--gate", "kl_divergence=<=5", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    first = json.loads((built / "out" / "report.json").read_text())
    for one, two in zip(first["artifacts"], again["artifacts"], strict=True):
        assert one["kl_divergence"] == two["kl_divergence"]
        assert one["path"] == two["path"]
        assert one["bytes"] == two["bytes"]
        assert one["kv_cache_bytes_per_token"] == two["kv_cache_bytes_per_token"]


def test_verify_fails_on_a_gate(built, model):
    gguf = built / "out" / "gguf" / "tiny-llama-Q4_K_M.gguf"
    done = packlight(
        "verify", gguf, "--baseline", model, "--windows", 2, "--sequence-length", 32,
        "--gate", "top1_agreement>=0.9999999",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "FAILED  2 gates of tiny-llama" in done.stderr  # one is on the tokenizer
    assert done.stderr.splitlines()[-1].startswith("hint: build it with a calibrated recipe")


def test_verify_of_another_models_artifact(built, model, tmp_path):
    other = tiny.make("llama", tmp_path / "other", vocab_size=640, tokenizer=False)
    says = refused(packlight("verify", built / "out" / "gguf", "--baseline", other))
    assert "has a vocab_size of 512, the float model 640" in says
    other = tiny.make("mistral", tmp_path / "mistral")
    onnx = built / "out" / "onnx" / "onnx" / "model_q4.onnx"
    done = packlight("verify", onnx, "--baseline", other, "--windows", 2, "--sequence-length", 32)
    assert done.returncode == 0, done.stderr
    assert "a num_key_value_heads of 4, the float model 2: pruned, or another" in done.stderr


def test_verify_without_gates_passes_no_judgement(built, model):
    gguf = built / "out" / "gguf" / "tiny-llama-Q4_K_M.gguf"
    done = packlight("verify", gguf, "--baseline", model, "--windows", 2, "--sequence-length", 32)
    assert done.returncode == 0
    assert done.stderr == "measured; no gate was set\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "nowhere"], "not a folder"),
        (["build", "{model}", "--set", "targets.gguf.typ=Q4_0"], "did you mean type"),
        (["build", "{model}", "-r", "phone"], "phone-4bit"),
        (["build", "{model}", "-f", "tflite"], "tflite"),
        (["build", "{model}", "--context", "100000"], "positions"),
        (["build", "{model}", "--eval-text", "no.txt"], "no.txt"),
        (["build", "{model}", "--set", "verify.gates={perplexity_ration: '<=1'}"],
         "did you mean perplexity_ratio"),
        (["build", "{model}", "--set", "name=a/b"], "letters, digits"),
        (["build", "{model}", "--eval-text", "{model}"], "cannot be read: Is a directory"),
        (["build", "{model}", "--eval-text", "{model}/model.safetensors"], "not UTF-8"),
        (["verify", "nowhere", "--baseline", "{model}"], "does not exist"),
        (["verify", "{model}/config.json", "--baseline", "{model}"], "not an artifact"),
        (["verify", "{gguf}", "--baseline", "{model}", "--gate", "quality=1"], "quality"),
        (["inspect", "nowhere"], "not a folder"),
        (["inspect", "no\nwhere\x1b[31m"], "error: no where [31m is not a folder"),
        (["build", ""], "name is empty"),
        (["fit", "{model}", "--device", "iphone14"], "iphone-14"),
        (["fit", "{model}", "--memory", "lots"], "not a size"),
        (["fit", "{gguf}", "--context", "257"], "more than the 256 positions"),
        (["recipes", "check", "nowhere.yaml"], "no such file"),
        (["recipes", "show", "phone-4bits"], "phone-4bit"),
        (["biuld"], "biuld"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(arguments, says, built, model, tmp_path):
    gguf = built / "out" / "gguf" / "tiny-llama-Q4_K_M.gguf"
    places = {"{model}": str(model), "{gguf}": str(gguf)}
    words = [places.get(word, word).replace("{model}", str(model)) for word in arguments]
    assert says in refused(packlight(*words, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short_is_told_before_any_work(model, tmp_path):
    (tmp_path / "short.txt").write_text("Once upon a time")
    done = packlight("build", model, "--eval-text", "short.txt", "-o", "out", "-v", cwd=tmp_path)
    assert "a window needs" in refused(done)
    assert "write gguf" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_the_float_logits_lie_beside_the_artifacts_meanwhile(model, tmp_path, monkeypatch):
    """Where their bytes were reckoned with, and where the next build clears them after kill -9."""
    real, seen = scorer.verify_artifact, []

    def spy(path, format, baseline, *rest, **options):
        seen.append(baseline.folder.parents[1])
        return real(path, format, baseline, *rest, **options)

    monkeypatch.setattr(scorer, "verify_artifact", spy)
    assert cli.main(["build", str(model), "-f", "gguf", "-o", str(tmp_path / "out"), *FAST]) < 2
    assert seen == [tmp_path / "out.partial" / "new"]
    assert not list((tmp_path / "out").glob("packlight-*"))


def test_an_artifact_that_its_runtime_refuses_does_not_cost_the_others(
    model, tmp_path, monkeypatch, capsys
):
    real = scorer.verify_artifact

    def damaged_first(path, format, baseline, *rest, **options):
        if format == "gguf":
            path.write_bytes(path.read_bytes()[:5000])
        return real(path, format, baseline, *rest, **options)

    monkeypatch.setattr(scorer, "verify_artifact", damaged_first)
    out, junit = tmp_path / "out", tmp_path / "junit.xml"
    line = ["build", str(model), "-f", "gguf", "-f", "onnx", "-o", str(out), "--junit", str(junit)]
    assert cli.main([*line, *FAST]) == 2
    told = capsys.readouterr().err
    (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: GGUF Q4_K_M could not be run: ")
    report = json.loads((out / "report.json").read_text())
    jsonschema.validate(report, sample_report.schema())
    gguf, onnx = report["artifacts"]
    assert report["verdict"] == "failed"
    assert gguf["failure"] in error and gguf["runtime"] is None and gguf["gates"] == []
    assert onnx["failure"] is None and onnx["perplexity"] > 1
    assert "**Failed**: GGUF Q4_K_M could not be run" in (out / "README.md").read_text()
    assert gguf["failure"] in html.unescape((out / "report.html").read_text())
    assert '<failure type="runtime"' in junit.read_text()
    assert (out / gguf["path"]).stat().st_size == 5000
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)


def test_inspect_shows_a_checkpoint_and_its_artifacts(built, model):
    done = packlight("inspect", model)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout
    done = packlight("inspect", built / "out", "--json")
    described = json.loads(done.stdout)
    assert [facts["format"] for facts in described] == ["gguf", "onnx"]
    assert all(facts["parameters"] == described[0]["parameters"] for facts in described)
    assert "token_embd.weight" in packlight("inspect", built / "out", "-v").stdout


def test_fit_adds_up(built, model):
    for target in (model, built / "out", built / "out" / "gguf" / "tiny-llama-Q4_K_M.gguf"):
        done = packlight("fit", target, "--context", 128, "--device", "iphone-14", "--json")
        assert done.returncode == 0, done.stderr
        for row in json.loads(done.stdout)["rows"]:
            parts = row["weights_bytes"] + row["kv_cache_bytes"] + row["activation_bytes"]
            assert row["total_bytes"] == parts
            assert row["verdict"] == "fits"
            slow, fast = row["tokens_per_second_realistic"]
            assert slow < fast < row["tokens_per_second_bound"]
            assert not row["limits_measured"] and row["limits_source"]
    assert packlight("fit", model, "--memory", "1MB").returncode == 1


def test_fit_counts_a_whole_prompt_where_an_app_gives_it_in_one_call(model):
    done = packlight("fit", model, "-r", "int4-fast", "--context", 128, "--device", "iphone-14")
    assert "~ estimated" in done.stdout
    done = packlight(
        "fit", model, "-r", "int4-fast", "--context", 128, "--device", "iphone-14", "--json"
    )
    gguf, onnx, coreml = (row["activation_bytes"] for row in json.loads(done.stdout)["rows"])
    assert gguf == onnx != coreml


def test_doctor_and_recipes():
    done = packlight("doctor", "--json")
    assert done.returncode == 0, done.stdout
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["torch"]["ok"] and checks["llama.cpp"]["ok"]
    assert "phone-4bit" in packlight("recipes").stdout
    assert json.loads(packlight("recipes", "schema").stdout)["title"]
    assert packlight("recipes", "check", "phone-4bit").returncode == 0


def with_json() -> list[list[str]]:
    """Every command that has --json, with its path."""
    return [
        words
        for path, command in test_help.commands(cli_group, "")
        if not hasattr(command, "commands")
        and any("--json" in parameter.opts for parameter in command.params)
        for words in [path.split()]
    ]


@pytest.mark.parametrize("words", with_json(), ids=" ".join)
def test_json_prints_an_object_on_errors_too(words, tmp_path):
    """A place that is not there, or an option that no command has."""
    places = [str(tmp_path / "nowhere"), "me/model"][: {"push": 2}.get(words[-1], 1)]
    nothing = ["doctor", "list", "demo"]
    line = [*words, *(["--nonsense"] if words[-1] in nothing else places), "--json"]
    if words == ["verify"]:
        line += ["--baseline", str(tmp_path)]
    done = packlight(*line, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    document = json.loads(done.stdout)
    assert sorted(document) == ["error", "hint"]
    assert document["error"] and document["error"] in done.stderr
    assert "Traceback" not in done.stderr


def test_json_and_quiet_exclude_each_other():
    done = packlight("build", "x", "--json", "-q")
    assert json.loads(done.stdout)["error"] == "--json and --quiet exclude each other"
    assert done.returncode == 2


def test_help_of_a_command_by_name():
    assert packlight("help").stdout == packlight("--help").stdout
    assert packlight("help", "recipes", "show").stdout == (
        packlight("recipes", "show", "--help").stdout
    )
    assert "hint: did you mean build?" in refused(packlight("help", "biuld"))
    assert "packlight build has no command" in refused(packlight("help", "build", "x"))


def test_version():
    assert packlight("--version").stdout == f"packlight {compress.__version__}\n"


def test_shell_completion_knows_commands_recipes_and_formats():
    def complete(words: str) -> str:
        env = {"_PACKLIGHT_COMPLETE": "bash_complete", "COMP_WORDS": words,
               "COMP_CWORD": str(len(words.split(" ")) - 1)}  # fmt: skip
        code = "from compress.__main__ import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
        )
        return done.stdout

    assert "build" in complete("packlight bu")
    assert "phone-4bit" in complete("packlight build -r pho")
    assert "coreml" in complete("packlight build -f co")


def test_a_reader_that_goes_away_is_not_a_failed_gate(model):
    """`packlight inspect … | head`: exit code 128 + SIGPIPE, as in shells, without a message."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "compress", "inspect", str(model)],
        stdout=writer, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_leaves_nothing(model, tmp_path, monkeypatch, capsys):
    """Injected where the GGUF writer's bytes reach the file: the write fails half-way."""
    from exporters.gguf import writer

    real = writer.Writer.put

    def full(self, entry):
        real(self, entry)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.Writer, "put", full)
    out = tmp_path / "out"
    assert cli.main(["build", str(model), "-f", "gguf", "-o", str(out), "--no-verify", *FAST]) == 2
    assert "ran full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["while writing", "while verifying"])
def test_an_interrupted_build_leaves_nothing(model, tmp_path, where, ending):
    writing = where == "while writing"  # half of the tensors are in the file
    step = Step(r"open .*/gguf\.ledger", 9, ending) if writing else Step("Popen", 1, ending)
    done = packlight("build", model, "-o", "out", "-f", "gguf", *FAST, cwd=tmp_path, step=step)
    assert done.returncode == (130 if ending == signal.SIGINT else 143), done.stderr
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "calibration.texts=[/home/me/texts/a.jsonl, builtin]",
            "calibration.texts=[a.jsonl, builtin]",
        ),
        ('calibration.texts=["/home/me/a.txt","/b/c.txt"]', 'calibration.texts=["a.txt","c.txt"]'),
        ("calibration.texts=[texts/a.txt]", "calibration.texts=[texts/a.txt]"),
        ("name=n/a", "name=n/a"),
    ],
)
def test_the_reported_command_names_no_place_of_this_machine(model, override, told):
    settings = BuildSettings(str(model), overrides=[override])
    words = shlex.split(command_line(Checkpoint.open(model), settings, Path("/tmp/out")))
    assert words[words.index("--set") + 1] == told
    assert words[-2:] == ["-o", "out"]


# --- the process that a shell starts ------------------------------------------------------------


def test_closed_streams_and_letters_beyond_ascii(model, tmp_path):
    """``2>&-`` (an artifact must not get the number of stderr), and the C locale in which Python
    takes paths for ASCII."""
    named = tmp_path / "größe"
    shutil.copytree(model, named)
    program = [sys.executable, "-m", "compress", "build", "größe", "-r", "int4-fast", "-f", "gguf",
               "--no-verify", "--threads", "1", "-o"]  # fmt: skip
    plain = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | {"PYTHONPATH": paths()} | plain
    for out, closing in (("a", "2>&-"), ("b", "<&- >&- 2>&-"), ("c", "")):
        line = f"exec {shlex.join([*program, out])} {closing}"
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True
        )
        assert done.returncode == 0, done
        (file,) = (tmp_path / out / "gguf").iterdir()
        assert file.read_bytes()[:4] == b"GGUF" and file.name.startswith("größe")
        assert "größe" in (tmp_path / out / "report.json").read_text(encoding="utf-8")
