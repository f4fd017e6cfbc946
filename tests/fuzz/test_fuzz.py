"""A short run of the fuzzer, and that it would notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("harness.py")
sys.path.insert(0, str(HARNESS.parent))

from harness import judged  # noqa: E402
from inputs import ROWS  # noqa: E402


def fuzzed(work: Path, rows: list[str], *options: str) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, str(HARNESS), *rows, "--work", str(work), *options],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_hostile_files_are_refused_in_one_line(tmp_path):
    rows = [name for name in ROWS if not name.endswith("verify")]
    counts = fuzzed(tmp_path, rows, "--start", "40", "--count", "1", "--seed", "1")
    assert [row["row"] for row in counts] == rows
    assert sum(int(str(row.get("refusal", 0))) for row in counts) > len(rows) // 3


@pytest.mark.slow
def test_more_hostile_files(tmp_path):
    fuzzed(tmp_path, [], "--count", "25", "--seed", "2")


@pytest.mark.parametrize(
    ("code", "err", "made", "kind"),
    [
        (0, "", set(), "success"),
        (2, "error: damaged\nhint: --x", set(), "refusal"),
        (2, "error: KeyError: 2\nhint: this is a bug in packlight; ...", set(), "bug"),
        (2, "Traceback (most recent call last):\nKeyError: 2", set(), "bug"),
        (70, "", set(), "bug"),
        (-11, "", set(), "died"),
        (2, "error: a\nerror: b", set(), "unclean"),
        (2, "", set(), "unclean"),
        (2, "error: \x1b[2J", set(), "unclean"),
        (2, f"error: {'x' * 700}", set(), "unclean"),
        (2, "error: full", {"cwd/made.partial"}, "unclean"),
    ],
)
def test_what_must_not_be_is_noticed(code, err, made, kind):
    assert judged(code, "", err, made).kind == kind
