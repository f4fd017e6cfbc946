"""The calibration set of the package: complete, readable, varied, without repetition."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from pathlib import Path

import pytest

from compress.calibration.texts import BUILTIN_PATHS

KILOBYTES = {
    "prose.txt": 60,
    "chat.jsonl": 60,
    "code.txt": 45,
    "numbers.txt": 18,
    "languages.txt": 28,
}
# Letters or words that hardly occur outside the language, or outside its near relations.
SIGNS = {
    "German": r"\b(nicht|und|für)\b",
    "French": r"\b(une|était|jusqu)\b",
    "Spanish": r"[¿]|\b(los|usted)\b",
    "Italian": r"\b(della|più|perdonami)\b",
    "Portuguese": r"\b(não|você|vocês|ônibus)\b",
    "Polish": r"[łęąż]",
    "Russian": r"[ыэъ]",
    "Ukrainian": r"[їєґ]",
    "Greek": r"[α-ω]",
    "Turkish": r"[ğış]",
    "Arabic": r"[\u0621-\u064a]",
    "Hebrew": r"[\u05d0-\u05ea]",
    "Hindi": r"[\u0904-\u0939]",
    "Chinese": r"[这们为说]",
    "Japanese": r"[\u3041-\u3096]",
    "Korean": r"[\uac00-\ud7a3]",
    "Vietnamese": r"[ơưđ]",
    "Dutch": r"\b(het|een|niet)\b",
    "Swedish": r"\b(och|är|inte|jag)\b",
}


def paragraphs(path: Path) -> list[str]:
    """Paragraphs, or the turns of a conversation file, of more than a few words."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        found = [
            turn["content"] for line in text.splitlines() for turn in json.loads(line)["messages"]
        ]
    else:
        found = re.split(r"\n\s*\n", text)
    return [" ".join(piece.split()) for piece in found if len(piece.strip()) > 30]


def test_files_and_their_order():
    assert [path.name for path in BUILTIN_PATHS] == list(KILOBYTES)
    folder = BUILTIN_PATHS[0].parent
    shipped = {path.name for path in folder.iterdir() if path.suffix in {".txt", ".jsonl", ".md"}}
    assert shipped == {*KILOBYTES, "README.md"}


@pytest.mark.parametrize("path", BUILTIN_PATHS, ids=lambda path: path.name)
def test_clean_and_not_repetitive(path):
    raw = path.read_bytes()
    assert len(raw) > 1000 * KILOBYTES[path.name]
    raw.decode("utf-8")
    assert b"\r" not in raw and b"\x00" not in raw and not raw.startswith(b"\xef\xbb\xbf")
    assert raw.endswith(b"\n")
    assert len(zlib.compress(raw, 9)) > 0.35 * len(raw)


def test_no_paragraph_twice():
    counted = Counter(piece for path in BUILTIN_PATHS for piece in paragraphs(path))
    assert [piece for piece, times in counted.items() if times > 1] == []


def test_conversations():
    path = next(path for path in BUILTIN_PATHS if path.suffix == ".jsonl")
    conversations = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(conversations) >= 80
    for conversation in conversations:
        assert list(conversation) == ["messages"]
        turns = conversation["messages"]
        assert all(set(turn) == {"role", "content"} and turn["content"].strip() for turn in turns)
        # No system turns: the chat templates of some families (Mistral) refuse them.
        roles = [turn["role"] for turn in turns]
        assert roles and roles == ["user", "assistant"] * (len(roles) // 2)
    assert sum(len(conversation["messages"]) > 3 for conversation in conversations) >= 10


def test_languages():
    text = next(path for path in BUILTIN_PATHS if path.name == "languages.txt").read_text("utf-8")
    missing = {language for language, sign in SIGNS.items() if len(re.findall(sign, text)) < 3}
    assert not missing
