"""The tokenizer inside a GGUF file, made from a Hugging Face tokenizer.

llama.cpp has two that concern us. ``llama`` merges characters by score (SentencePiece BPE with
byte fallback); ``gpt2`` is byte-level BPE (see ``splitting``).

The text of ``tokenizer.json`` is that of Hugging Face's ``tokenizers``; where a checkpoint has only
``tokenizer.model`` (or ``vocab.json`` and ``merges.txt``), transformers makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.decoder.config import DecoderConfig
from compress.decoder.config_json import read_json
from compress.decoder.tokenizer import Tokenizer, saved_by_5
from compress.errors import CheckpointError
from exporters.gguf.splitting import classify, normalizer_notes, space_prefix, steps

if TYPE_CHECKING:
    import gguf

# llama_token_type of llama.h.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

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
    tokenizer, settings = read_tokenizer(folder), read_settings(folder)
    try:
        return make_vocabulary(tokenizer, settings, config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"tokenizer.json is damaged: {what}") from error


def make_vocabulary(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], config: DecoderConfig
) -> Vocabulary:
    """From the contents of ``tokenizer.json`` and ``read_settings``."""
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
    made: dict[str, Any] = json.loads(Tokenizer(folder).to_json())
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
    if settings.get("tokenizer_class") in _REBUILD_TEMPLATE and not saved_by_5(settings):
        add_bos = bool(settings.get("add_bos_token", True))
        add_eos = bool(settings.get("add_eos_token", False))
        return add_bos and "bos" in special, add_eos and "eos" in special

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
    """Whether the model's name has to make llama.cpp drop whitespace behind tokens."""
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
