"""Finds llama.cpp's name of a pre-tokenizer, by its split patterns.

The pre-tokenizers of byte-level BPE are compiled into llama.cpp and selected by a name,
``tokenizer.ggml.pre``. llama.cpp's converter finds the name by the hash of an encoded text, so it
does not know any retrained vocabulary; here the pattern itself is looked up.
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
# deepseek-llm's cased letters, as listed in its tokenizer.json.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉ"
    "ⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_HAN_AND_HANGUL = "[一-龥ࠀ-一가-퟿]+"
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, DIGIT)
_PUNCTUATION = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"
DEEPSEEK_LLM = (
    r"[\r\n]", rf"\s?[{_CASED}]+", _PUNCTUATION, r"\s+$", _HAN_AND_HANGUL, DIGIT,
)  # fmt: skip
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SEED_CODER = (
    rf"{_ENGLISH}|{_EDGE}\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    rf"{_ENGLISH}|{_EDGE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
VIKING = r" ?[^(\s|.,!?…。，、।۔،)]+"
MINICPM5 = (r"\p{N}{1,3}", rf"{_ENGLISH}|{_EDGE}\p{{L}}+|\p{{N}}+|{_TAIL}")
# Its digits are split after bytes have become letters, some of which are digits (½, ²); no merge
# crosses them, so that llama.cpp, which splits before, has the same tokens.
FALCON = ("Contiguous punctuation", GPT2, "runs of digits", "[0-9][0-9][0-9]")
TEKKEN = rf"{_EDGE}{_UPPER}*{_LOWER}+|{_EDGE}{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_TAIL}"

# Split patterns, in order → llama.cpp's name of the pre-tokenizer.
PATTERNS: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",  # also phi-1, 1.5 and 2
    (DIGIT, GPT2): "smollm",
    (LLAMA3,): "llama-bpe",  # the same as llama.cpp's "lfm2" and "falcon3"
    (QWEN2,): "qwen2",
    (O200K,): "gpt-4o",
    (TEKKEN,): "tekken",
    DEEPSEEK_CODER: "deepseek-coder",
    DEEPSEEK_LLM: "deepseek-llm",
    DEEPSEEK_V3: "deepseek-v3",
    (SEED_CODER,): "seed-coder",
    (QWEN35,): "qwen35",
    (VIKING, DIGIT): "viking",
    MINICPM5: "minicpm5",
    FALCON: "falcon",
}


def escaped(pattern: str) -> str:
    """A pattern with escaped line ends, which only some tokenizer.json files escape."""
    return pattern.replace("\r", "\\r").replace("\n", "\\n")


WITHOUT_GGUF = "-f onnx -f coreml: these keep the tokenizer in a file of its own"
# Names that imply `ignore_merges` (whole words are looked up first) → the same without.
IGNORE_MERGES = ("llama-bpe", "tekken", "minicpm5")
WITHOUT_IGNORE_MERGES = {"llama-bpe": "smaug-bpe"}


def steps(node: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Flatten a normalizer, pre-tokenizer or post-processor (``Sequence``)."""
    waiting = [node] if node else []
    while waiting:
        found = waiting.pop()
        if found["type"] == "Sequence":
            keys = ("normalizers", "pretokenizers", "processors")
            waiting += reversed([child for key in keys for child in found.get(key, ())])
        else:
            yield found


def classify(tokenizer: Mapping[str, Any]) -> tuple[str, str]:
    """``(tokenizer.ggml.model, tokenizer.ggml.pre)``.

    Raises:
        UnsupportedModelError: neither of llama.cpp's two kinds, or an unknown pre-tokenizer.
    """
    model = tokenizer["model"]
    splits = list(steps(tokenizer.get("pre_tokenizer")))
    whole = not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    if whole and model.get("type") == "BPE" and any(step["type"] == "ByteLevel" for step in splits):
        return "gpt2", splitting(splits, ignore_merges=bool(model.get("ignore_merges")))
    if whole and model.get("type") == "BPE" and "<0x0A>" in model["vocab"]:
        every = (f"<0x{byte:02X}>" for byte in range(256))
        if missing := next((text for text in every if text not in model["vocab"]), ""):
            raise UnsupportedModelError(
                f"the tokenizer has no token {missing}, and llama.cpp needs one for every byte",
                hint=WITHOUT_GGUF,
            )
        return "llama", "default"
    raise UnsupportedModelError(
        f"packlight does not know how llama.cpp would take this {model.get('type')} tokenizer: "
        "byte-level BPE and SentencePiece BPE with byte fallback can go into a GGUF file",
        hint=WITHOUT_GGUF,
    )


def splitting(splits: Sequence[Mapping[str, Any]], *, ignore_merges: bool) -> str:
    """llama.cpp's name of a byte-level tokenizer's pre-tokenizer."""
    patterns: list[str] = []
    for step in splits:
        if step["type"] == "Split":
            # Isolated matches, or the rest removed: the same where a pattern matches everything.
            isolated = step["behavior"] == "Isolated" and not step.get("invert")
            matched = step["behavior"] == "Removed" and step.get("invert")
            pattern = escaped(step["pattern"].get("Regex", ""))
            patterns.append(pattern if isolated or matched else f"{step['behavior']} {pattern}")
        elif step["type"] == "Digits":
            patterns.append(DIGIT if step.get("individual_digits") else "runs of digits")
        elif step["type"] == "Punctuation":
            patterns.append(f"{step.get('behavior', 'Isolated')} punctuation")
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
            f"packlight does not know this pre-tokenizer ({shown(patterns)}), and so not "
            "llama.cpp's name for it",
            hint=WITHOUT_GGUF,
        )
    return name


def shown(patterns: Sequence[str]) -> str:
    """Patterns for a message; of long ones the end."""
    text = " then ".join(patterns)
    return text if len(text) <= 200 else f"…{text[-199:]}"


def space_prefix(tokenizer: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space is added before a text, and a note where llama.cpp adds more."""
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


# SentencePiece's ``▁`` before a text or in place of spaces: prepend, replaced string, content.
SPACE_MARKS = (("▁", None, None), (None, " ", "▁"))


def step_notes(tokenizer: Mapping[str, Any], kind: str) -> list[str]:
    """Notes on what llama.cpp does not do: normalizers; and by ``llama``, which merges whole texts,
    splits and fall-backs.

    Args:
        kind: ``tokenizer.ggml.model``.
    """
    notes = []
    normalizers = [
        step["type"]
        for step in steps(tokenizer.get("normalizer"))
        if (step.get("prepend"), (step.get("pattern") or {}).get("String"), step.get("content"))
        not in SPACE_MARKS
    ]
    if normalizers:
        notes.append(
            f"the tokenizer normalizes ({', '.join(normalizers)}), llama.cpp does not: text in "
            "another form can tokenize differently"
        )
    if kind != "llama":
        return notes
    splits = [
        step["type"]
        for step in steps(tokenizer.get("pre_tokenizer"))
        if step["type"] != "Metaspace" and (step.get("pattern") or {}).get("String") != " "
    ]
    if splits:
        notes.append(
            f"the tokenizer splits texts ({', '.join(splits)}) before it merges, llama.cpp does "
            "not: text can tokenize differently"
        )
    if not tokenizer["model"].get("byte_fallback"):
        notes.append(
            "the tokenizer has no byte_fallback: characters without a token are unknown to it, and "
            "bytes to llama.cpp"
        )
    if added := [t["content"] for t in tokenizer.get("added_tokens") or [] if t.get("normalized")]:
        notes.append(
            f"llama.cpp looks for {len(added)} added token(s), such as {added[0]!r}, in the text "
            "as it is, this tokenizer in the normalized text"
        )
    return notes
