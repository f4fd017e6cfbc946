"""Seeded mutations of JSON documents and of bytes."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

INTEGERS = [
    0, 1, -1, 2, 3, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**60, 2**62,
    2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63), 10**30, 10**400,
]  # fmt: skip
FLOATS = [0.0, -0.0, 0.5, 256.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "", " ", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\nb", "a\r\nb\terror: fake", "\u202eevil",
    "\u2066x\u2069", "\x00", "\ud800", "<script>alert(1)</script>", "../../etc/passwd",
    "/etc/passwd", "|x|`y`", "A" * 5000, "\x9b31m", "null", "%s%n{0}", "${HOME}", "²³",
    "\U0001f600" * 30, "1e999", "0x10", "True", "9" * 5000,
]  # fmt: skip
OTHERS: list[Any] = [
    None, True, False, [], {}, [[]], [None], {"": ""}, [1] * 1000, [1, 2], {"a": {"b": {"c": []}}},
    ["x"], [0.5], {"type": "x"}, [[[[[[1]]]]]],
]  # fmt: skip
DEEP = 100_000
DOCUMENTS: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "text": b'"x"',
    "number": b"5",
    "NaN": b"NaN",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "BOM": b"\xef\xbb\xbf{}",
    "zeros": bytes(100),
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep lists": b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "5000 digits": b'{"schema": ' + b"9" * 5000 + b"}",
    "a long key": b'{"' + b"x" * 1_000_000,
    "escapes": b'{"\x1b[31m": }',
    "a million lists": b'{"a":[' + b"[]," * 1_000_000 + b"1]}",
}
"""What may lie where a JSON document is expected."""


def json_bytes(rng: random.Random, document: Any) -> bytes:
    """A document with one to three values changed; now and then its bytes, too."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = [place for place in paths(document) if place]
        if not places:
            break
        places.sort(key=len)  # shallow ones more often: long lists have most of the paths
        pick = int(rng.expovariate(4 / max(4, len(places))))
        change(rng, document, places, places[min(pick, len(places) - 1)])
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return mangled(rng, text) if rng.random() < 0.08 else text


def change(rng: random.Random, document: Any, places: list[Any], place: Any) -> None:
    """Replace, remove, rename or double one value."""
    parent, key = at(document, place[:-1]), place[-1]
    act = rng.randrange(9)
    if act < 6:
        parent[key] = copy.deepcopy(rng.choice(rng.choice([INTEGERS, FLOATS, TEXTS, OTHERS])))
    elif act == 6:
        del parent[key]
    elif act == 7 and isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(at(document, rng.choice(places)))


def paths(document: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value lies; of long lists the first fifty."""
    found = [prefix]
    if isinstance(document, dict):
        for key, item in list(document.items())[:400]:
            found += paths(item, (*prefix, key))
    elif isinstance(document, list):
        for number, item in enumerate(document[:50]):
            found += paths(item, (*prefix, number))
    return found


def at(document: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        document = document[key]
    return document


def mangled(rng: random.Random, data: bytes, head: int = 0) -> bytes:
    """Bytes changed here and there; ``head``: only among the first of them."""
    raw = bytearray(data)
    span = min(head or len(raw), len(raw))
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not raw:
            break
        place = rng.randrange(max(1, min(span, len(raw))))
        act = rng.randrange(8)
        if act == 0:
            raw[place] ^= 1 << rng.randrange(8)
        elif act == 1:
            raw[place] = rng.randrange(256)
        elif act == 2:
            raw[place : place + 8] = struct.pack("<Q", rng.choice(INTEGERS[:20]) & (2**64 - 1))
        elif act == 3:
            raw[place : place + 4] = struct.pack("<I", rng.choice(INTEGERS[:14]) & (2**32 - 1))
        elif act == 4:
            del raw[place : place + rng.choice([1, 4, 8, 100])]
        elif act == 5:
            raw[place:place] = rng.choice([b"\0", b"\xff" * 9, b"\x80" * 10 + b"\x01"])
        elif act == 6:
            other, size = rng.randrange(len(raw)), rng.choice([1, 8, 64])
            raw[place : place + size] = raw[other : other + size]
        else:
            del raw[rng.randrange(len(raw)) :]
    return bytes(raw)
