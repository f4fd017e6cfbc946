"""The jobs file: its validation, and the jobs made from it."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from compress.batch.jobs import arguments, read_jobs, select
from compress.errors import RecipeError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, **document: object) -> Path:
    path = folder / "night.yaml"
    path.write_text(yaml.safe_dump({"schema": 1, **document}))
    return path


@pytest.fixture
def shelf(tmp_path) -> Path:
    for name in ("b", "a"):
        (tmp_path / "shelf" / name).mkdir(parents=True)
        (tmp_path / "shelf" / name / "config.json").write_text("{}")
    (tmp_path / "shelf" / "notes").mkdir()
    return tmp_path


def test_adapters_are_seen_from_the_file(shelf):
    (shelf / "loras" / "a=0.5").mkdir(parents=True)
    (shelf / "loras" / "b").mkdir()
    given = ["loras/b", "loras/b=0.25", "loras/a=0.5", "./c=2", "someone/lora=0.5", "someone/x@v1"]
    job = read_jobs(write(shelf, models=["shelf/a"], options={"adapter": given})).jobs[0]
    settings = job.settings(shelf / "out")
    place = shelf / "loras"
    assert list(settings.adapters) == [
        f"{place}/b", f"{place}/b=0.25", f"{place}/a=0.5", f"{shelf}/c=2",
        "someone/lora=0.5", "someone/x@v1",
    ]  # fmt: skip
    words = arguments(settings)
    assert [b for a, b in pairwise(words) if a == "--adapter"] == list(settings.adapters)


def test_the_matrix(shelf):
    (shelf / "mine.yaml").write_text("schema: 1\ntargets: {gguf: {}, onnx: {}}\n")
    path = write(
        shelf,
        models=["shelf/*", "org/model", {"model": "org/other", "name": "o", "revision": "v1"}],
        recipes=["int4-fast", "mine.yaml"],
        formats=["gguf", "onnx"],
    )
    file = read_jobs(path)
    assert file.output == str(shelf / "night")
    assert [job.name for job in file.jobs] == [
        f"{model}/{recipe}"
        for model in ("a", "b", "model", "o")
        for recipe in ("int4-fast", "mine")
    ]
    first, last = file.jobs[0], file.jobs[-1]
    assert first.model == str(shelf / "shelf" / "a")
    assert first.formats == ("gguf", "onnx")
    assert (last.model, last.revision, last.recipe) == ("org/other", "v1", str(shelf / "mine.yaml"))
    split = read_jobs(write(shelf, models=["shelf/a"], recipes=["mine.yaml"], split=True)).jobs
    assert [(job.name, job.formats) for job in split] == [
        ("a/mine/gguf", ("gguf",)),
        ("a/mine/onnx", ("onnx",)),
    ]
    assert [job.name for job in read_jobs(write(shelf, models=["shelf/a"])).jobs] == [
        "a/phone-4bit"
    ]


def test_budgets_are_jobs_of_their_own(shelf):
    path = write(
        shelf,
        models=["shelf/a"],
        recipes=["int4-fast"],
        formats=["gguf", "onnx"],
        budgets=["1.8GiB", "2GB"],
        overrides=[{"jobs": "*-2GB", "formats": ["gguf"]}],
    )
    first, second = read_jobs(path).jobs
    assert (first.name, first.formats) == ("a/int4-fast-1.8GiB", ("gguf", "onnx"))
    assert (second.name, second.formats) == ("a/int4-fast-2GB", ("gguf",))
    assert arguments(first.settings(Path("/out")))[-2:] == ["--budget", "1.8GiB"]
    with pytest.raises(RecipeError, match="budgets: '2XB' is not a size"):
        read_jobs(write(shelf, models=["shelf/a"], budgets=["2XB"]))


def test_options_of_all_of_a_model_and_of_some_jobs(shelf):
    path = write(
        shelf,
        models=["shelf/a", {"model": "shelf/b", "options": {"context": 64}}],
        recipes=["int4-fast", "phone-4bit"],
        options={"set": {"verify.windows": 4, "targets.gguf.type": "Q4_0"}, "eval-text": "x.txt"},
        overrides=[
            {"jobs": "b/*", "options": {"set": {"targets.gguf.type": "Q8_0"}, "verify": False}},
            {"jobs": "*/phone-4bit", "formats": ["gguf"]},
            {"jobs": "a/int4-fast", "skip": True},
        ],
    )
    a, b, c = read_jobs(path).jobs
    assert [job.name for job in (a, b, c)] == ["a/phone-4bit", "b/int4-fast", "b/phone-4bit"]
    assert a.formats == c.formats == ("gguf",)
    assert arguments(b.settings(Path("/out"))) == [
        "build", str(shelf / "shelf" / "b"), "-r", "int4-fast", "-o", "/out",
        "--set", 'targets.gguf.type="Q8_0"', "--set", "verify.windows=4",
        "--eval-text", str(shelf / "x.txt"), "--context", "64", "--no-verify",
    ]  # fmt: skip


def test_a_seed_of_zero_is_a_seed(shelf):
    (job,) = read_jobs(write(shelf, models=["shelf/a"], options={"seed": 0})).jobs
    assert arguments(job.settings(Path("o")))[-2:] == ["--seed", "0"]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "'models' is a required property"),
        ({"models": []}, "models"),
        ({"models": ["shelf/a"], "recipe": ["x"]}, "unknown key recipe"),
        ({"models": ["shelf/a"], "options": {"thread": 1}}, "unknown key options.thread"),
        ({"models": ["shelf/a"], "formats": ["tflite"]}, "formats.0: 'tflite' is not allowed"),
        ({"models": ["shelf/a"], "options": {"memory": "lots"}}, "'lots' is not a size"),
    ],
)
def test_what_is_not_valid_names_its_place(shelf, document, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        read_jobs(write(shelf, **document))


def test_refusals(shelf):
    for document, words in (
        ({"models": ["shelf/z*"]}, "no folder with a checkpoint matches shelf/z*"),
        ({"models": ["shelf/a", "org/a"]}, "two models would go to a/"),
        ({"models": ["shelf/*", "shelf/a"]}, "two jobs would go to a/phone-4bit/"),
        ({"models": ["shelf/a"], "recipes": ["x/r.yaml", "y/r.yaml"]}, "two jobs would go to a/r/"),
        ({"models": ["shelf/a"], "overrides": [{"jobs": "*", "skip": True}]}, "skip every job"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            read_jobs(write(shelf, **document))
    with pytest.raises(UsageError, match="cannot be read"):
        read_jobs(shelf / "none.yaml")
    (shelf / "list.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match="a jobs file is a mapping"):
        read_jobs(shelf / "list.yaml")


def test_only(shelf):
    jobs = read_jobs(write(shelf, models=["shelf/*"], recipes=["int4-fast", "phone-4bit"])).jobs
    assert [job.name for job in select(jobs, ["a"])] == ["a/int4-fast", "a/phone-4bit"]
    assert [job.name for job in select(jobs, ["*/int4-fast"])] == ["a/int4-fast", "b/int4-fast"]
    assert len(select(jobs, ())) == 4
    with pytest.raises(UsageError, match="no such job") as refused:
        select(jobs, ["a/int4-fats"])
    assert refused.value.hint == "did you mean a/int4-fast?"


def test_the_page_of_the_manual_shows_a_file_that_is_valid(shelf):
    text = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (shelf / "jobs.yaml").write_text(example)
    (shelf / "my-recipe.yaml").write_text("schema: 1\ntargets: {gguf: {}}\n")
    file = read_jobs(shelf / "jobs.yaml")
    assert file.output == str(shelf / "artifacts")
    assert {"a/int4-fast", "b/int4-fast"} <= {job.name for job in file.jobs}
