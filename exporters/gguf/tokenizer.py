"""The tokenizer inside a GGUF file, made from a Hugging Face tokenizer.

llama.cpp has two that concern us. ``llama`` merges characters by score (SentencePiece BPE with
byte fallback); ``gpt2`` is byte-level BPE, whose splitting into words is compiled into llama.cpp
and chosen by name (``tokenizer.ggml.pre``). That name is found here from the splitting pattern
itself, so a retrained vocabulary is as good as a published one.

The text of ``tokenizer.json`` is that of Hugging Face's ``tokenizers``; where a checkpoint has only
``tokenizer.model`` (or ``vocab.json`` and ``merges.txt``), transformers makes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.arch import DecoderConfig
from compress.checkpoint import read_json
from compress.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import gguf

# llama_token_type of llama.h.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

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

# Ends of a turn that llama.cpp knows by their text, best first; the rest only end generation.
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
END_OF_GENERATION = (
    *END_OF_TURN, "<|endoftext|>", "</s>", "<|eom_id|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "<|return|>", "<|call|>", "<end_of_utterance>", "<eos>", "[EOS]", "[EOT]",
)  # fmt: skip

# What llama.cpp looks up, unchecked, in a model named phi-3.
PHI3_NEEDS = ("<unk>", "<s>", "</s>", "<|endoftext|>")
PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")

# Tokenizer classes of transformers 4.57 that rebuild their template from `add_bos_token`.
_REBUILD_TEMPLATE = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer")


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF holds of a tokenizer.

    Attributes:
        model: ``llama`` or ``gpt2``.
        pre: llama.cpp's name of the splitting into words.
        tokens, types: one of each per row of the embedding.
        scores: per token, higher merges first (``llama`` only).
        merges: ``"left right"``, first merged first (``gpt2`` only).
        special: ``bos``, ``eos``, ``eot``, ``eom``, ``unk``, ``pad`` → id.
        strips_after_special: special tokens swallow the whitespace behind them (Phi-3).
        notes: where llama.cpp will tokenize differently.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str
    strips_after_special: bool
    notes: tuple[str, ...]


def read_vocabulary(folder: Path, config: DecoderConfig) -> Vocabulary:
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: no tokenizer, or a damaged one.
        UnsupportedModelError: one that llama.cpp cannot express.
    """
    tokenizer = read_tokenizer(folder)
    settings = read_settings(folder)
    model = tokenizer["model"]
    added = {int(token["id"]): token for token in tokenizer.get("added_tokens") or []}
    kind, pre = classify(tokenizer)
    by_text = {text: int(index) for text, index in model["vocab"].items()}
    by_text |= {token["content"]: index for index, token in added.items()}
    tokens, types = token_table(by_text, added, model, kind, config.vocab_size)
    special, eog_notes = special_ids(settings, config, by_text, tokens)
    add_bos, add_eos = added_around(tokenizer, settings, special, tokens)
    strips, strip_notes = strips_after_special(added, by_text)
    space, space_notes = space_prefix(tokenizer) if kind == "llama" else (False, [])
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    notes = [*eog_notes, *strip_notes, *space_notes, *normalizer_notes(tokenizer)]
    if kind == "llama" and missing_merges(model["vocab"], set(merges)):
        notes.append(
            "the tokenizer lists fewer merges than its vocabulary allows: "
            "llama.cpp, which merges by score, can split rare words differently"
        )
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores(tokens, types, merges) if kind == "llama" else [],
        merges=[" ".join(pair) for pair in merges] if kind == "gpt2" else [],
        special=special,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=space,
        chat_template=settings["chat_template"],
        strips_after_special=strips,
        notes=tuple(notes),
    )


def write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """The ``tokenizer.*`` keys."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for kind, index in vocabulary.special.items():
        writer.add_uint32(_ID_KEYS[kind], index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


_ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}


# --- files -------------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """``tokenizer.json``, or what transformers makes of the older files.

    Raises:
        CheckpointError: none there, or unreadable.
    """
    if (folder / "tokenizer.json").exists():
        return read_json(folder / "tokenizer.json")
    if not any((folder / name).exists() for name in ("tokenizer.model", "vocab.json")):
        raise CheckpointError(
            f"no tokenizer in {folder.name}",
            hint="a GGUF file holds its tokenizer: tokenizer.json or tokenizer.model is needed",
        )
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        made: dict[str, Any] = json.loads(fast.backend_tokenizer.to_str())
    except Exception as error:  # transformers raises whatever its converters raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the tokenizer cannot be read: {reason}") from error
    return made


def read_settings(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` over ``special_tokens_map.json``; one ``chat_template``, or ``""``.

    Null settings count as not there.
    """
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            settings |= {k: v for k, v in read_json(folder / name).items() if v is not None}
    template = folder / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    templates = settings.setdefault("chat_template", "")
    if isinstance(templates, list):  # named templates: the default one, or the first
        by_name = {entry["name"]: entry["template"] for entry in templates}
        settings["chat_template"] = by_name.get("default", next(iter(by_name.values()), ""))
    return settings


# --- what kind it is ---------------------------------------------------------------------------


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
            kept = step["behavior"] == "Removed" and step.get("invert")
            pattern = step["pattern"].get("Regex", "")
            patterns.append(pattern if isolated or kept else f"{step['behavior']} {pattern}")
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


# --- tokens ------------------------------------------------------------------------------------


def token_table(
    by_text: Mapping[str, int],
    added: Mapping[int, Mapping[str, Any]],
    model: Mapping[str, Any],
    kind: str,
    size: int,
) -> tuple[list[str], list[int]]:
    """Texts and types of all ``size`` rows; rows that no token uses are ``[PADi]``.

    Raises:
        CheckpointError: two tokens with one text, which llama.cpp refuses.
    """
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [UNUSED] * size
    for text, index in by_text.items():
        if index < size and index not in added:
            tokens[index] = text
            is_byte = kind == "llama" and len(text) == 6 and text.startswith("<0x")
            unknown = text == model.get("unk_token")
            types[index] = BYTE if is_byte else UNKNOWN if unknown else NORMAL
    for index, token in added.items():
        if index < size:
            tokens[index] = token["content"]
            types[index] = CONTROL if token.get("special") else USER_DEFINED
    if len(set(tokens)) != size:
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise CheckpointError(f"the tokenizer has two tokens with the text {twice!r}")
    return tokens, types


def scores(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, ...]]
) -> list[float]:
    """Scores that make llama.cpp merge in the order of ``merges``: minus the first rank.

    Tokens that no merge makes are never asked for theirs; they come last, as in SentencePiece.
    """
    rank: dict[str, int] = {}
    for position, pair in enumerate(merges):
        rank.setdefault("".join(pair), position)
    last = len(merges)
    return [
        -float(rank.get(text, last)) if kind == NORMAL else 0.0
        for text, kind in zip(tokens, types, strict=True)
    ]


def missing_merges(vocab: Mapping[str, int], merges: set[tuple[str, ...]]) -> bool:
    """Whether two tokens make a third without a merge that says so: llama.cpp would merge them."""
    for text in vocab:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab and (left, right) not in merges:
                return True
    return False


def special_ids(
    settings: Mapping[str, Any],
    config: DecoderConfig,
    by_text: Mapping[str, int],
    tokens: Sequence[str],
) -> tuple[dict[str, int], list[str]]:
    """Ids of the special tokens; every id that ends generation gets llama.cpp to see it.

    llama.cpp ends at the tokens it knows by text, and at ``eos``, ``eot`` and ``eom``.
    """
    ends = [index for index in config.eos_token_ids if index < len(tokens)]
    defaults = {
        "bos": config.bos_token_id,
        "eos": ends[0] if ends else None,
        "unk": None,
        "pad": config.pad_token_id,
    }
    special: dict[str, int] = {}
    for kind, default in defaults.items():
        entry = settings.get(f"{kind}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        index = by_text.get(text, default) if isinstance(text, str) else default
        if index is not None and 0 <= index < len(tokens):
            special[kind] = index
    turn = next((by_text[text] for text in END_OF_TURN if text in by_text), None)
    if turn is not None and turn != special.get("eos") and turn < len(tokens):
        special["eot"] = turn
    for index in ends:
        if tokens[index] in END_OF_GENERATION or index in special.values():
            continue
        slot = next((slot for slot in ("eom", "eot") if slot not in special), None)
        if slot is None or (slot == "eom" and "<|eom_id|>" in by_text):
            return special, [f"llama.cpp will not stop at {tokens[index]!r} by itself"]
        special[slot] = index
    return special, []


def added_around(
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    special: Mapping[str, int],
    tokens: Sequence[str],
) -> tuple[bool, bool]:
    """Whether encoding puts ``bos`` in front and ``eos`` behind, as transformers does."""
    if settings.get("tokenizer_class") in _REBUILD_TEMPLATE:
        bos = settings.get("add_bos_token", True), settings.get("add_eos_token", False)
        return bool(bos[0]) and "bos" in special, bool(bos[1]) and "eos" in special

    def is_token(item: Mapping[str, Any], kind: str) -> bool:
        text = item.get("SpecialToken", {}).get("id")
        return kind in special and text == tokens[special[kind]]

    for step in steps(tokenizer.get("post_processor")):
        if step["type"] == "TemplateProcessing" and len(step["single"]) > 1:
            return is_token(step["single"][0], "bos"), is_token(step["single"][-1], "eos")
    return False, False


def strips_after_special(
    added: Mapping[int, Mapping[str, Any]], by_text: Mapping[str, int]
) -> tuple[bool, list[str]]:
    """Whether llama.cpp must be told (by the model's name) to drop whitespace behind tokens."""
    wanted = {token["content"] for token in added.values() if token.get("rstrip")}
    if not wanted:
        return False, []
    able = all(text in by_text for text in PHI3_NEEDS)
    would = {token["content"] for token in added.values()} - set(PHI3_KEEPS)
    if able and wanted == would:
        return True, []
    differing = sorted(wanted ^ would) if able else sorted(wanted)
    return able, [
        f"whitespace behind {len(differing)} special token(s), such as {differing[0]!r}, is "
        "treated differently by llama.cpp"
    ]
