"""A short run of the fuzzer, and that it would notice."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from tiny_families import ROWS as ROWS_OF_FAMILIES

from compress.decoder.config import DecoderConfig, WeightMap
from compress.errors import PacklightError

HARNESS = Path(__file__).with_name("harness.py")
sys.path.insert(0, str(HARNESS.parent))

from harness import judged  # noqa: E402
from inputs import ROWS  # noqa: E402
from mutations import json_bytes  # noqa: E402


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


FAMILIES = {**tiny.CONFIGS, **{name: row.config for name, row in ROWS_OF_FAMILIES.items()}}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_no_config_of_any_family_is_a_bug(family):
    """What ``config.json`` describes is decided by its family, before any file of weights."""
    refused = configs(family, range(60))
    assert refused > 5


def configs(family: str, numbers: range) -> int:
    """How many changed configs of a family are refused; the others are described."""
    model = str(FAMILIES[family]["model_type"])
    refused = 0
    for number in numbers:
        rng = random.Random(f"{family}-{number}")
        try:
            config = json.loads(json_bytes(rng, {**FAMILIES[family], "model_type": model}))
        except (ValueError, RecursionError):
            continue
        if not isinstance(config, dict):
            continue
        try:
            WeightMap(DecoderConfig.from_hf(config, {})).expected()
        except PacklightError as error:
            assert error.message.count("\n") == 0 and len(error.message) < 600
            refused += 1
    return refused


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
