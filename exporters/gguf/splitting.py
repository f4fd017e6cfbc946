"""How a tokenizer splits text before it merges, and llama.cpp's name for that.

The splitting of byte-level tokenizers is compiled into llama.cpp and chosen by a name,
``tokenizer.ggml.pre``. llama.cpp's own converter finds the name by the hash of an encoded text, so
that every retrained vocabulary is unknown to it; here the pattern itself is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compress.errors import UnsupportedModelError

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_EDGE = r"[^\r\n\p{L}\p{N}]?"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
LLAMA3 = rf"{_ENGLISH}|{_EDGE}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
QWEN2 = rf"{_ENGLISH}|{_EDGE}\p{{L}}+|\p{{N}}|{_TAIL}"
O200K = (
    rf"{_EDGE}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_EDGE}{_UPPER}+{_LOWER}*{_ENGLISH}?"
    rf"|\p{{N}}{{1,3}}|{_CASED_TAIL}"
)
TEKKEN = rf"{_EDGE}{_UPPER}*{_LOWER}+|{_EDGE}{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_TAIL}"

# The patterns that split a text, one after the other → llama.cpp's name for that splitting.
PATTERNS: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",  # also phi-1, 1.5 and 2
    (DIGIT, GPT2): "smollm",
    (LLAMA3,): "llama-bpe",
    (QWEN2,): "qwen2",
    (O200K,): "gpt-4o",
    (TEKKEN,): "tekken",
}
# Names that imply `ignore_merges` (whole words are looked up first), and their twins without.
IGNORE_MERGES = ("llama-bpe", "tekken")
WITHOUT_IGNORE_MERGES = {"llama-bpe": "smaug-bpe"}


def steps(node: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A normalizer, pre-tokenizer or post-processor as a flat list (``Sequence`` opened)."""
    if node is None:
        return
    if node["type"] != "Sequence":
        yield node
        return
    for key in ("normalizers", "pretokenizers", "processors"):
        for child in node.get(key, ()):
            yield from steps(child)


def classify(tokenizer: Mapping[str, Any]) -> tuple[str, str]:
    """``(tokenizer.ggml.model, tokenizer.ggml.pre)``.

    Raises:
        UnsupportedModelError: neither of llama.cpp's two kinds, or a splitting it does not know.
    """
    model = tokenizer["model"]
    splits = list(steps(tokenizer.get("pre_tokenizer")))
    if model.get("type") == "BPE" and any(step["type"] == "ByteLevel" for step in splits):
        return "gpt2", splitting(splits, ignore_merges=bool(model.get("ignore_merges")))
    if model.get("type") == "BPE" and "<0x0A>" in model["vocab"]:
        return "llama", "default"
    raise UnsupportedModelError(
        f"llama.cpp has no {model.get('type')} tokenizer like this one",
        hint="byte-level BPE and SentencePiece BPE with byte fallback can go into a GGUF file",
    )


def splitting(splits: Sequence[Mapping[str, Any]], *, ignore_merges: bool) -> str:
    """The name that llama.cpp has for a byte-level tokenizer's splitting into words."""
    patterns: list[str] = []
    for step in splits:
        if step["type"] == "Split":
            # Isolated matches, or everything else removed: the same where a pattern covers all.
            isolated = step["behavior"] == "Isolated" and not step.get("invert")
            matched = step["behavior"] == "Removed" and step.get("invert")
            pattern = step["pattern"].get("Regex", "")
            patterns.append(pattern if isolated or matched else f"{step['behavior']} {pattern}")
        elif step["type"] == "Digits" and step.get("individual_digits"):
            patterns.append(DIGIT)
        elif step["type"] == "ByteLevel":
            if step.get("add_prefix_space"):
                patterns.append("a space in front")
            if step.get("use_regex", True):
                patterns.append(GPT2)
        else:
            patterns.append(step["type"])
    name = PATTERNS.get(tuple(patterns), "")
    if name in IGNORE_MERGES and not ignore_merges:
        name = WITHOUT_IGNORE_MERGES.get(name, name)
    if not name:
        raise UnsupportedModelError(
            f"llama.cpp has no pre-tokenizer for the pattern {' then '.join(patterns)!r}",
            hint="known: GPT-2, SmolLM, Llama 3, Qwen2, GPT-4o and Tekken splitting",
        )
    return name


def space_prefix(tokenizer: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space goes in front of a text, and a note where llama.cpp adds more of them."""
    for step in [*steps(tokenizer.get("normalizer")), *steps(tokenizer.get("pre_tokenizer"))]:
        if step["type"] == "Prepend":
            return True, []
        if step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme") or (
                "always" if step.get("add_prefix_space", True) else "never"
            )
            if scheme == "first":
                return True, [
                    "llama.cpp puts a space after each special token, this tokenizer only at the "
                    "start: tokens behind special tokens can differ"
                ]
            return scheme == "always", []
    return False, []


def normalizer_notes(tokenizer: Mapping[str, Any]) -> list[str]:
    """Normalizers that llama.cpp does not run."""
    ours = ("Prepend", "Replace")
    found = [s["type"] for s in steps(tokenizer.get("normalizer")) if s["type"] not in ours]
    if not found:
        return []
    return [
        f"the tokenizer normalizes ({', '.join(found)}), llama.cpp does not: text in another "
        "Unicode form can tokenize differently"
    ]
