"""Paths that a command reads and writes are checked before the work; errors are clear."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import tiny
from commands import Step, packlight, refused

from compress import api
from compress.commands.endings import in_words
from compress.errors import UsageError
from compress.files import check_place


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("model") / "tiny-llama")


SHORT = ("--set", "verify.windows=2", "--set", "verify.sequence_length=32", "--threads", "1")


def test_a_verified_build_leaves_what_is_documented(model: Path, tmp_path: Path) -> None:
    """docs/security.md: nothing but the cache of packlight, and nothing in TMPDIR."""
    home, tmp, out = tmp_path / "home", tmp_path / "tmp", tmp_path / "out"
    for folder in (home, tmp):
        folder.mkdir()
    gone = {key: "" for key in os.environ if key.startswith(("XDG_", "HF_", "ORT_"))}
    places = {"HOME": str(home), "TMPDIR": str(tmp), "PACKLIGHT_CACHE": str(home / "cache")}
    done = packlight(
        "build", model, "-r", "int4-fast", "--set", "quantize.solver=scale_search",
        "--set", "calibration.tokens=256", "--set", "calibration.sequence_length=64",
        *SHORT, "-o", out, env=gone | places | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    assert [path.name for path in home.iterdir()] == ["cache"]
    assert list(tmp.iterdir()) == []


def test_a_finished_build_that_is_resumed_says_so(model: Path, tmp_path: Path) -> None:
    def build(*more: object, step: Step | None = None, gate: str = "<=0.0001"):
        words = ("build", model, "-r", "int4-fast", "-f", "gguf", "--set", "targets.gguf.type=Q4_0")
        return packlight(
            *words, *SHORT, "--gate", f"kl_divergence={gate}", "-o", "out", "--resume", *more,
            cwd=tmp_path, step=step,
        )  # fmt: skip

    # Killed after the rename, before the end: there was no exit code.
    killed = build(step=Step(r"os\.remove.*out\.lock"))
    assert killed.returncode == -signal.SIGKILL
    before = (tmp_path / "out" / "report.json").read_bytes()
    again = build("--junit", "junit.xml")
    assert again.returncode == 1, again.stderr  # the gate failed
    assert "out is finished; nothing was left to do" in again.stderr
    assert "FAILED" in again.stderr
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    assert (tmp_path / "junit.xml").is_file()
    assert "out exists" in refused(build(gate="<=9"))  # judged otherwise
    os.utime(model / "model.safetensors")
    assert "out exists" in refused(build())  # perhaps of other weights
    assert json.loads(before)["verdict"] == "failed"


@pytest.mark.parametrize(
    ("option", "folder"), [("--save-imatrix", False), ("--keep-baseline", True), ("--junit", False)]
)
def test_a_place_is_looked_at_before_the_work(tmp_path: Path, option: str, folder: bool) -> None:
    file, inside = tmp_path / "file", tmp_path / "out" / "x"
    file.touch()
    check_place(option, tmp_path / ("new/deep" if folder else "new"), folder=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    wrong = file if folder else tmp_path
    for place in (Path("/proc/x"), file / "x", wrong, inside):
        with pytest.raises(UsageError, match=f"^{option} {place}"):
            check_place(option, place, tmp_path / "out", folder=folder)


@pytest.mark.parametrize(
    ("option", "more"),
    [
        ("--keep-baseline", ()),
        ("--save-imatrix", ("--set", "quantize.solver=scale_search")),
        ("--save-checkpoint", ("--prune", "ffn:256")),
        ("--summary", ()),
    ],
)
def test_a_build_refuses_such_a_place(
    model: Path, tmp_path: Path, option: str, more: tuple[str, ...]
) -> None:
    words = ("build", model, "-r", "int4-fast", "-f", "gguf", *more, option, "/proc/x")
    done = packlight(*words, cwd=tmp_path)
    assert f"error: {option} /proc/x" in refused(done)
    assert list(tmp_path.iterdir()) == []


ENDINGS = {
    "more memory": [MemoryError(), OSError(errno.ENOMEM, "no"),
                    RuntimeError("can't start new thread"),
                    RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    "no more files": [OSError(errno.EMFILE, "Too many open files", "x")],
    "not UTF-8": [UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed")],
    "no room left": [OSError(errno.ENOSPC, "No space left"), OSError("50 requested and 0 written")],
    "NUL character": [ValueError("embedded null byte")],
    "x: gone": [FileNotFoundError(errno.ENOENT, "gone", "x")],
    "torch is not installed": [ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")],
    "No module named": [ModuleNotFoundError("No module named 'compress.x'", name="compress.x")],
    "KeyError: 1": [KeyError(1)],
}  # fmt: skip


@pytest.mark.parametrize(("words", "errors"), ENDINGS.items())
def test_the_error_says_what_was_refused(words: str, errors: list[Exception]) -> None:
    for error in errors:
        found = in_words(error)
        assert words in found.message
        assert ("bug" in found.hint) == (words in ("KeyError: 1", "No module named"))


def test_a_name_that_no_report_can_hold(model: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff")
    with pytest.raises(UsageError, match=r"the name .*a\\udcff is not UTF-8"):
        api.build(model, "int4-fast", output=tmp_path / name, verify=False)
    done = packlight("build", model, "-o", tmp_path / name, new=True)
    assert "is not UTF-8" in refused(done)
    assert list(tmp_path.iterdir()) == []


def test_lines_are_short(tmp_path: Path) -> None:
    for words in (["inspect", "x" * 10**5], ["x" * 10**5], ["build", "-r", "y" * 10**5, "m"]):
        said = refused(packlight(*words, cwd=tmp_path))
        assert max(map(len, said.splitlines())) < 600
