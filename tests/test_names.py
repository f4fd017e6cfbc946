"""No identifier of the packages contains a refused word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path for room in ("compress", "exporters", "packlight") for path in (ROOT / room).rglob("*.py")
)
# Words that do not describe data or actions in the field's terms; add others when found.
REFUSED = {
    "agenda", "audible", "away", "baton", "glance", "ground", "hear", "heard", "hollow", "house",
    "kept", "nobody", "pace", "shipyard", "somebody", "speak", "steady", "story", "stranger",
    "strangers", "talk", "tell", "telling", "tells", "told", "ward", "whoever", "workshop",
}  # fmt: skip
WRITTEN = {"kept_high"}  # a key of plan.json, which others read


def words(identifier: str) -> set[str]:
    """An identifier's parts, split at underscores and where the case changes, in lower case."""
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each name that a module defines (function, class, argument, variable …), and its line."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.arg():
                yield node.arg, node.lineno
            case ast.Name(ctx=ast.Store()):
                yield node.id, node.lineno
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr, node.lineno
            case ast.alias(asname=str(name)) | ast.MatchAs(name=str(name)):
                yield name, node.lineno
            case ast.ExceptHandler(name=str(name)):
                yield name, node.lineno


def refused(source: str) -> list[str]:
    found = [
        (line, name)
        for name, line in identifiers(ast.parse(source))
        if words(name) & REFUSED and name not in WRITTEN
    ]
    return [f"{line}: {name}" for line, name in sorted(set(found))]


def test_no_identifier_is_a_refused_word():
    found = {str(path.relative_to(ROOT)): refused(path.read_text("utf-8")) for path in FILES}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_files_are_named_likewise():
    names = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert len(names) > 100
    assert not [name for name in names if words(name) & REFUSED]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def tell_all(): ...", "tell_all"),
        ("class ShipYard: ...\nclass Ward: ...", "Ward"),
        ("def f(*, kept_in=1): ...", "kept_in"),
        ("limit.told = 1", "told"),
        ("for paceOf in x: ...", "paceOf"),
        ("with a as (b, STORY): ...", "STORY"),
        ("import numpy as ground", "ground"),
    ],
)
def test_each_kind_of_name_is_seen(source, name):
    assert [line.split(": ")[1] for line in refused(source)] == [name]


def test_words_inside_words_are_none():
    assert refused("reward = forward = background = history = space = 1\nstream.tell()") == []
