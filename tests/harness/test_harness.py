"""`packlight eval`: our model class beside the harness's own on local tasks, and the command.

The tasks are in ``tasks/``: English multiple choice with a worked example, English prose, and
Python to complete.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import sample_report
import tiny
from commands import packlight, refused
from exported import Exports

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.console import Console
from compress.demo import model_path
from compress.errors import RuntimeMissingError
from compress.harness.tasks import Harness, TaskOptions
from compress.plan.job import describe_model
from compress.report.pages import render
from compress.report.report import Report

TASKS = Path(__file__).parent / "tasks"
NAMES = ["english.yaml", "python.yaml", "prose.yaml"]


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeMissingError, match="harness is not installed") as caught:
        Harness(["mmlu"], TaskOptions(), tmp_path)
    assert "packlight[eval]" in caught.value.hint


needs_harness = pytest.mark.skipif(
    not any((Path(place) / "lm_eval").is_dir() for place in sys.path if place),
    reason="lm-evaluation-harness is not installed: make test-eval",
)


@pytest.fixture(autouse=True, scope="module")
def cached_data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Data sets are cached in a folder of the tests, and never fetched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def ours(folder: Path, length: int) -> Any:
    """Our class over the float model of a checkpoint."""
    from compress.harness.language_model import RuntimeLM
    from compress.harness.models import FloatModel

    checkpoint = Checkpoint.open(folder)
    stored = Stored(checkpoint, describe_model(checkpoint))
    model = FloatModel(stored, 1, Console("silent"))
    ends = checkpoint.generation_config.get("eos_token_id")
    return RuntimeLM(
        model, checkpoint.tokenizer, length, [ends] if isinstance(ends, int) else ends or []
    )


def theirs(folder: Path, length: int) -> Any:
    """The harness's own class over transformers."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, max_length=length
    )


def values(figures: Any) -> dict[tuple[str, str], float]:
    return {(each.task, each.metric): each.value for each in figures}


@needs_harness
def test_scores_are_those_of_the_harness_own_class(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the demo checkpoint, 96 positions: some of the prose takes several windows."""
    monkeypatch.chdir(TASKS)
    harness = Harness(NAMES, TaskOptions(), tmp_path)
    mine, other = ours(model_path(), 96), theirs(model_path(), 96)
    found, expected = harness.run(mine), harness.run(other)
    assert values(found) == pytest.approx(values(expected), abs=1e-3)
    assert {each.task for each in found} == {"english", "python", "prose"}
    assert {each.metric for each in found} >= {"acc", "acc_norm", "word_perplexity", "exact_match"}
    assert harness.run(mine) == found  # the same worked examples again
    requests = [instance for task in harness._tasks.values() for instance in task.instances]
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        asked = [request for request in requests if request.request_type == kind]
        assert asked
        pairs = zip(getattr(mine, kind)(asked), getattr(other, kind)(asked), strict=True)
        for one, two in pairs:
            if kind == "generate_until":
                assert one == two
            elif kind == "loglikelihood":
                assert one[0] == pytest.approx(two[0], abs=1e-3) and one[1] == two[1]
            else:
                assert one == pytest.approx(two, abs=1e-3)


@needs_harness
def test_chats_are_those_of_the_harness_own_class(tmp_path: Path) -> None:
    folder = tiny.make("phi3", tmp_path / "model")
    mine, other = ours(folder, 64), theirs(folder, 64)
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven "}]
    for prompt, chats in ((True, chat[:1]), (False, chat)):
        found = mine.apply_chat_template(chats, add_generation_prompt=prompt)
        assert found == other.apply_chat_template(chats, add_generation_prompt=prompt)
        assert mine.tok_encode(found) == other.tok_encode(found)
    assert mine.prefix_token_id == other.prefix_token_id


@needs_harness
def test_the_command_on_two_artifacts(exported: Exports, tmp_path: Path) -> None:
    folder = exported.checkpoint("llama")
    artifacts = [exported("gguf", "llama", type="Q2_K").path, exported("onnx", "llama").path]
    quiz = tmp_path / "quiz.jsonl"
    rows = [json.loads(line) for line in (TASKS / "english.json").read_text().splitlines()]
    quiz.write_text("".join(json.dumps(row | {"other": 1}) + "\n" for row in rows))
    done = packlight(
        "eval", *artifacts, "--baseline", folder, "--tasks", ",".join([*NAMES, str(quiz)]),
        "--gate", "english.acc_drop<=1", "--gate", "prose.word_perplexity<1",
        "--threads", 1, "--context", 64, "--limit", 5, "--num-fewshot", 1, "--json",
        "-o", tmp_path / "out", cwd=TASKS,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    jsonschema.validate(document, sample_report.schema())
    report = Report.from_dict(document)
    assert report.verdict == "failed" and report.harness is not None
    assert report.harness.limit == 5 and report.harness.context == 64
    for artifact in report.artifacts:
        assert [gate.passed for gate in artifact.gates] == [True, False]
        found = {(each.task, each.metric): each for each in artifact.harness}
        for each in found.values():
            assert each.items == 5 and each.value is not None and each.baseline is not None
            digits = 1e-6 * max(1, each.value, each.baseline)  # the report has seven
            assert each.difference == pytest.approx(each.value - each.baseline, abs=digits)
        prose = found["prose", "word_perplexity"]
        assert prose.difference != 0 and prose.difference_se and not prose.higher_is_better
    written = Report.load(tmp_path / "out" / "report.json")
    assert written == report and 'id="harness"' in render(written)
    assert "prose" in (tmp_path / "out" / "report.html").read_text("utf-8")

    # The same questions by `verify --task`: the same share of right answers.
    rest = quiz.read_text().splitlines(keepends=True)[:5]
    quiz.write_text("".join(rest))
    done = packlight(
        "verify", artifacts[0], "--baseline", folder, "--task", quiz, "--windows", 2,
        "--sequence-length", 32, "--threads", 1, "--json",
    )  # fmt: skip
    (task,) = json.loads(done.stdout)["artifacts"][0]["tasks"]
    first = {(each.task, each.metric): each for each in report.artifacts[0].harness}
    assert first["quiz", "acc"].value == task["accuracy"]
    assert first["quiz", "acc"].baseline == task["baseline_accuracy"]
    assert first["quiz", "acc_bytes"].value == task["accuracy_norm"]


@needs_harness
def test_what_it_refuses(tmp_path: Path) -> None:
    where = ["--baseline", model_path(), "--tasks"]
    says = refused(packlight("eval", *where, tmp_path / "no.yaml"))
    assert "no.yaml does not exist" in says
    says = refused(packlight("eval", *where, "helaswag"))
    assert "no task 'helaswag'" in says and "hellaswag" in says
    says = refused(packlight("eval", *where, "humaneval"))
    assert "humaneval executes code" in says and "--confirm-run-unsafe-code" in says
    says = refused(packlight("eval", *where, "english.yaml", "--gate", "english.f1>=1", cwd=TASKS))
    assert "english has no metric f1" in says
    says = refused(packlight("eval", *where, "english.yaml", "--context", 100_000, cwd=TASKS))
    assert "the models hold" in says


@needs_harness
def test_the_float_model_alone(tmp_path: Path) -> None:
    """Code is executed only where that was confirmed."""
    unsafe = (TASKS / "python.yaml").read_text().replace("task: python", "task: run")
    unsafe = unsafe.replace("python.json", str(TASKS / "python.json")) + "unsafe_code: true\n"
    (tmp_path / "run.yaml").write_text(unsafe)
    where = ["eval", "--baseline", model_path(), "--tasks", tmp_path / "run.yaml"]
    assert "executes code" in refused(packlight(*where))
    done = packlight(*where, "--confirm-run-unsafe-code", "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert "exact_match" in done.stdout and "float" in done.stdout
