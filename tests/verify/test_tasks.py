"""compress.verify.tasks: log-likelihoods by brute force, accuracy, refusals, and the command."""

from __future__ import annotations

import json
import math
import statistics
import string
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import sample_report
import tiny
import torch
from commands import packlight, refused
from echo_model import EchoModel
from exported import Exports

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig
from compress.decoder.decoder import Decoder
from compress.decoder.tokenizer import Tokenizer
from compress.errors import UsageError
from compress.plan.weights import Weights
from compress.report.pages import render
from compress.report.report import Report
from compress.solvers import rtn
from compress.verify import tasks
from compress.verify.tasks import Item, Request, Task, TaskSet, read_task
from exporters.gguf.runtime import open_runtime

QUESTIONS = [  # white space at the end, none, a newline, not ASCII
    ("The river runs to", ["the sea.", "a mountain of stone", "7"], 0),
    ("Question: how many bits?\nAnswer: ", ["four", "sixteen bits of every weight"], 1),
    ("Zürich is in\n", ["Schweiz", "日本", "the north"], 0),
    ("Pick a letter. Answer:", ["A", "B", "C", "D"], 3),
    # Many that are near each other: two bits choose another one somewhere.
    ("A word of a letter:", list(string.ascii_letters), 0),
    ("The unknown is called", list(string.ascii_letters), 23),
]
COUNT = len(QUESTIONS)


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def rows_of(answers: list[int]) -> list[object]:
    triples = zip(QUESTIONS, answers, strict=True)
    return [{"question": q, "choices": c, "answer": a, "subject": "x"} for (q, c, _), a in triples]


def brute_force(logits, tokenizer: Tokenizer) -> list[list[float]]:  # type: ignore[no-untyped-def]
    """Log-likelihood of every choice, one token and one whole forward pass at a time."""
    found = []
    for question, choices, _ in QUESTIONS:
        found.append([])
        for choice in choices:
            context = tokenizer.encode(question.rstrip())
            tokens = context + tokenizer.encode(question + " " + choice)[len(context) :]
            head = [tokenizer.bos_id] if tokenizer.adds_bos else []
            total = 0.0
            for end in range(len(context), len(tokens)):
                last = np.asarray(logits(head + tokens[:end])[-1], np.float64)
                total += last[tokens[end]] - last.max() - math.log(np.exp(last - last.max()).sum())
            found[-1].append(total)
    return found


def per_byte(values: list[list[float]]) -> list[list[float]]:
    pairs = zip(QUESTIONS, values, strict=True)
    return [[v / len(c.encode()) for v, c in zip(vs, q[1], strict=True)] for q, vs in pairs]


def best(values: list[list[float]]) -> list[int]:
    return [row.index(max(row)) for row in values]


def transformers_logits(folder: Path):  # type: ignore[no-untyped-def]
    model = tiny.reference(folder)

    def logits(tokens):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].numpy()

    return logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # SentencePiece with BOS; bytes, none
def test_the_float_model_answers_as_transformers_does(
    exported: Exports, family: str, tmp_path: Path
) -> None:
    folder = exported.checkpoint(family)
    tokenizer = Tokenizer(folder)
    expected = brute_force(transformers_logits(folder), tokenizer)
    checkpoint = Checkpoint.open(folder)
    config = DecoderConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    decoder = Decoder(config, Weights(Stored(checkpoint, config), rtn).read)

    own = write(tmp_path / "own.jsonl", rows_of(best(expected)))
    answers = [answer for _, _, answer in QUESTIONS]
    other = write(tmp_path / "other.jsonl", rows_of(answers))
    task_set = TaskSet([read_task(own), read_task(other)], tokenizer, 256)
    task_set.ask_baseline(tmp_path, decoder.stream_logits)
    flat = [value for row in expected for value in row]
    np.testing.assert_allclose(task_set.baseline, [*flat, *flat], atol=2e-3)
    assert min(flat) < max(flat) - 10  # the choices differ by far more than that

    assert tasks.load_requests(tmp_path) == task_set.requests
    first, second = task_set.judge(task_set.baseline)
    assert (first.name, first.items, first.baseline_accuracy.value) == ("own", COUNT, 1.0)
    assert first.accuracy == (1.0, 0.0) and first.agreement == (1.0, 0.0)
    norm = best(per_byte(expected))
    assert second.accuracy_norm.value == pytest.approx(sum(map(int.__eq__, norm, answers)) / COUNT)
    assert second.accuracy.value == pytest.approx(
        sum(map(int.__eq__, best(expected), answers)) / COUNT
    )
    assert second.difference == (0.0, 0.0)
    assert best(expected) != norm  # the division matters here


def test_verify_answers_in_the_artifacts_runtime(exported: Exports, tmp_path: Path) -> None:
    folder = exported.checkpoint("llama")
    artifact = exported("gguf", "llama", type="Q2_K").path
    tokenizer = Tokenizer(folder)
    runtime = open_runtime(artifact, context=256, threads=1)
    answers = best(brute_force(runtime.logits, tokenizer))
    runtime.close()
    baseline = best(brute_force(transformers_logits(folder), tokenizer))

    mine = write(tmp_path / "artifact.jsonl", rows_of(answers))
    floats = write(tmp_path / "float.jsonl", rows_of(baseline))
    done = packlight(
        "verify", artifact, "--baseline", folder, "--windows", 2, "--sequence-length", 32,
        "--threads", 1, "--task", mine, "--task", floats, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    jsonschema.validate(report, sample_report.schema())
    first, second = report["artifacts"][0]["tasks"]
    same = sum(map(int.__eq__, answers, baseline)) / COUNT
    assert (first["name"], first["items"], first["accuracy"]) == ("artifact", COUNT, 1)
    assert first["baseline_accuracy"] == first["agreement"] == pytest.approx(same, rel=1e-6)
    assert (second["name"], second["baseline_accuracy"]) == ("float", 1)
    assert second["accuracy"] == second["agreement"] == pytest.approx(same, rel=1e-6)
    assert second["difference"] == pytest.approx(same - 1, rel=1e-6)
    page = render(Report.from_dict(report))
    assert 'id="tasks"' in page and page.count('data-label="questions">6<') == 2
    assert same < 1  # two bits: the figures are not all 1 for another reason


def judged(answers: list[int], ours: list[list[float]], theirs: list[list[float]]):  # type: ignore[no-untyped-def]
    task = Task("t", tuple(Item("q", ("a", "bb"), answer, "t:1") for answer in answers))
    return tasks.judge_task(task, np.array(ours).ravel(), np.array(theirs).ravel())


def test_figures_by_hand() -> None:
    ours = [[-1.0, -2.5], [-1.0, -1.5], [-3.0, -2.0], [-1.0, -9.0], [-2.0, -1.0]]
    theirs = [[-1.0, -2.5], [-2.0, -1.5], [-1.0, -2.0], [-1.0, -9.0], [-1.0, -2.0]]
    found = judged([0, 1, 1, 1, 1], ours, theirs)
    # ours: 0 0 1 0 1, right in 3; float: 0 1 0 0 0, right in 2; per byte ours: 0 1 1 0 1
    assert found.accuracy.value == pytest.approx(0.6)
    assert found.accuracy.se == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert found.baseline_accuracy.value == pytest.approx(0.4)
    assert found.accuracy_norm.value == pytest.approx(0.8)
    assert found.agreement.value == pytest.approx(0.4)
    paired = [0, -1, 1, 0, 1]
    assert found.difference.value == pytest.approx(0.2)
    assert found.difference.se == pytest.approx(statistics.stdev(paired) / math.sqrt(5))
    assert judged([0], ours[:1], theirs[:1]).accuracy == (1.0, None)


def test_nan_is_never_right_and_never_agrees() -> None:
    broken = [[math.nan, -1.0], [-1.0, math.nan]]
    found = judged([0, 1], broken, broken)
    assert found.accuracy.value == found.agreement.value == found.accuracy_norm.value == 0


def test_batches_are_bounded_and_equal_inputs_run_once() -> None:
    model = EchoModel(50)
    requests = [Request([1, 2, 3, last], 3) for last in (4, 5, 6)]
    requests += [Request([7, *range(20), last], 11) for last in (8, 9)] + [Request([5, 6], 1)]
    sizes: list[int] = []

    def logits(batch):  # type: ignore[no-untyped-def]
        sizes.append(sum(map(len, batch)))
        return map(model.logits, batch)

    steps: list[tuple[int, int]] = []
    whole = tasks.score(requests, logits, lambda *step: steps.append(step))
    assert sizes == [3 + 21 + 1] and steps == [(1, 3), (2, 3), (3, 3)]
    assert tasks.score(requests, logits, batch_tokens=10) == whole
    assert sizes[1:] == [3, 21, 1]
    assert tasks.score([], logits) == []


GOOD = {"question": "q", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        (json.dumps(GOOD | {"question": " \n"}), "question must be a text"),
        (json.dumps({"choices": ["a", "b"], "answer": 0}), "question must be a text"),
        (json.dumps(GOOD | {"choices": ["a"]}), "choices must be a list of two or more"),
        (json.dumps(GOOD | {"choices": "ab"}), "choices must be a list of two or more"),
        (json.dumps(GOOD | {"choices": ["a", ""]}), "choices must be texts"),
        (json.dumps(GOOD | {"answer": 2}), "answer must be a number from 0 to 1"),
        (json.dumps(GOOD | {"answer": "1"}), "answer must be a number from 0 to 1"),
        (json.dumps(GOOD | {"answer": True}), "answer must be a number from 0 to 1"),
    ],
)
def test_a_bad_line_is_named(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "quiz.jsonl"
    separator = GOOD | {"question": "a\u2028b"}  # one line of the file, two of str.splitlines
    write(path, [separator])
    path.write_text(path.read_text("utf-8") + "\n" + line + "\n", "utf-8")
    with pytest.raises(UsageError, match=says) as caught:
        read_task(path)
    assert caught.value.message.startswith(f"{path}:3: ")
    assert "\n" not in caught.value.message and caught.value.hint


def test_an_empty_file_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match="has no items"):
        read_task(tmp_path / "empty.jsonl")
    says = refused(packlight("verify", "x", "--baseline", "y", "--task", tmp_path / "none.jsonl"))
    assert "none.jsonl does not exist" in says


def test_an_item_must_fit_the_context(exported: Exports) -> None:
    tokenizer = Tokenizer(exported.checkpoint("llama"))
    task = Task("t", (Item("a river", ("to the sea", "b"), 0, "quiz.jsonl:7"),))
    longest = max(len(request.tokens) for request in TaskSet([task], tokenizer, 99).requests) - 1
    TaskSet([task], tokenizer, longest)
    with pytest.raises(UsageError, match=rf"quiz.jsonl:7: {longest} tokens, the context is"):
        TaskSet([task], tokenizer, longest - 1)


def test_no_task_no_section() -> None:
    report = sample_report.make()
    assert all(artifact.tasks == [] for artifact in report.artifacts)
    assert 'id="tasks"' not in render(report)
