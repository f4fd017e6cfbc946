"""Sizes, tables and the separation of data and messages."""

from __future__ import annotations

import json

import pytest

from compress.console import (
    Console,
    format_bytes,
    format_table,
    parse_bytes,
    print_error,
    short_bytes,
)
from compress.errors import PacklightError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1.8GiB", 1932735283), ("1.8GB", 1_800_000_000), ("512", 512), ("512B", 512),
        ("1 MiB", 1 << 20), ("2kb", 2000), ("1tb", 10**12),
    ],
)  # fmt: skip
def test_sizes_are_bytes_with_their_unit(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "1.8", "-1GB", "1..2GB", "1XB", "nanGB", "infGB", "0GB"]
)
def test_what_is_no_size_is_refused(text):
    if text == "1.8":
        assert parse_bytes(text) == 1
    else:
        with pytest.raises(ValueError, match="not a size"):
            parse_bytes(text)


def test_both_units_are_printed():
    assert format_bytes(2_396_785_760) == "2.40 GB (2.23 GiB)"
    assert format_bytes(12) == "12 B"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (3_859_000, "3.86 MB"), (70_950_000, "71.0 MB"),
        (740_481_234, "740 MB"), (9_996_000, "10.0 MB"), (999_600_000, "1.00 GB"),
        (2_396_785_760, "2.40 GB"),
    ],
)  # fmt: skip
def test_short_bytes_have_three_digits(count, text):
    assert short_bytes(count) == text


def test_a_table_that_is_too_wide_goes_on_below():
    rows = [["a", "1" * 30, "2" * 30, "3" * 30], ["b", "4", "5", "6"]]
    text = format_table(["job", "one", "two", "three"], rows)
    assert [line.split() for line in text.splitlines()] == [
        ["job", "one", "two"], ["a", "1" * 30, "2" * 30], ["b", "4", "5"],
        ["job", "three"], ["a", "3" * 30], ["b", "6"],
    ]  # fmt: skip
    assert max(map(len, text.splitlines())) <= 80


def test_tables_align():
    text = format_table(["name", "bytes"], [["a", "1"], ["longer", "1,000"]])
    assert text.splitlines() == ["name    bytes", "a           1", "longer  1,000"]


def test_json_mode_prints_one_document_and_no_talk(capsys):
    console = Console("json")
    console.say("talk")
    console.data("data")
    console.table(["a"], [["1"]])
    console.result({"x": 1})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"x": 1}
    assert captured.err == ""


def test_quiet_prints_paths_only(capsys):
    console = Console("quiet")
    console.data("data")
    console.say("talk")
    console.path("out/a.gguf")
    assert capsys.readouterr().out == "out/a.gguf\n"


def test_progress_is_silent_when_piped(capsys):
    with Console("human").progress("write") as update:
        update(1, 2)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


HOSTILE = "\x1b]0;owned\x07\x9b31mkey\u202e\nerror: faked\ud800 s3://me:SECRET@b/m " + "x" * 10**4


def test_a_strangers_words_are_cleaned_where_they_are_printed(capsys):
    console = Console(verbose=True)
    for tell in (console.data, console.say, console.detail, console.warning):
        tell(HOSTILE)
    console.verdict(True, HOSTILE)
    console.table([HOSTILE], [[HOSTILE]])
    print_error(PacklightError(HOSTILE, HOSTILE))
    printed = capsys.readouterr()
    for stream, count in ((printed.out, 3), (printed.err, 6)):
        lines = stream.splitlines()
        assert len(lines) == count
        assert all(line.isprintable() and len(line) < 500 for line in lines)
        assert "SECRET" not in stream


def test_json_escapes_what_a_terminal_would_obey(capsys):
    console = Console("json")
    console.result({HOSTILE: "größe"})
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert json.loads(printed) == {HOSTILE: "größe"}
