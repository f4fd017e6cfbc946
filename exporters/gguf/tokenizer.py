"""Converts a Hugging Face tokenizer to the keys of a GGUF file.

Two of llama.cpp's tokenizers are supported. ``llama`` merges characters by score (SentencePiece BPE
with byte fallback); ``gpt2`` is byte-level BPE (see ``splitting``).

The source is the loaded tokenizer and not its files: transformers adds tokens that are only in
``tokenizer_config.json`` or ``added_tokens.json``, and applies other settings.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.decoder.config import DecoderConfig
from compress.decoder.config_json import short
from compress.decoder.tokenizer_facts import TokenizerFacts, parse
from compress.errors import CheckpointError, UnsupportedModelError
from exporters.gguf.splitting import (
    IGNORE_MERGES,
    WITHOUT_GGUF,
    classify,
    space_prefix,
    step_notes,
)

if TYPE_CHECKING:
    import gguf

# llama_token_type of llama.h.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# End-of-turn tokens that llama.cpp knows by text, best first; others only end generation.
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
END_OF_GENERATION = (
    *END_OF_TURN, "<|endoftext|>", "</s>", "<|eom_id|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "<|return|>", "<|call|>", "<end_of_utterance>", "<eos>", "[EOS]", "[EOT]",
)  # fmt: skip

# Tokens that llama.cpp makes control tokens because of their text, with a warning where the file
# gives them another type ("probably a bug in the model"): ends of generation, fill-in-the-middle.
CONTROL_BY_TEXT = {
    *END_OF_GENERATION, "<|flush|>", "<|calls|>",
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<reponame>", "<|file_sep|>",
}  # fmt: skip

# Token that llama.cpp looks up, unchecked, in a model named phi-3.
PHI3_NEEDS = ("<unk>", "<s>", "</s>", "<|endoftext|>")
PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's data in GGUF.

    Attributes:
        model: ``llama`` or ``gpt2``.
        pre: llama.cpp's name of the pre-tokenizer.
        tokens, types: one of each per row of the embedding.
        scores: per token, higher merges first (``llama`` only).
        merges: ``"left right"``, first merged first (``gpt2`` only).
        chat_templates: by name, the default one first.
        special: ``bos``, ``eos``, ``eot``, ``eom``, ``unk``, ``pad`` → id.
        strips_after_special: whitespace after special tokens is dropped (Phi-3).
        notes: lines where llama.cpp will tokenize differently.
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
    chat_templates: dict[str, str]
    strips_after_special: bool
    notes: tuple[str, ...]


@functools.lru_cache(maxsize=2)  # for the float model and the pruned one
def read_vocabulary(tokenizer: TokenizerFacts, config: DecoderConfig) -> Vocabulary:
    """Convert a loaded tokenizer to its data in GGUF.

    Raises:
        CheckpointError: damaged, or not expressible as tokenizer.json.
        UnsupportedModelError: llama.cpp cannot express it.
    """
    try:
        return make_vocabulary(tokenizer, config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"tokenizer.json is damaged: {what}") from error


def make_vocabulary(tokenizer: TokenizerFacts, config: DecoderConfig) -> Vocabulary:
    """See ``read_vocabulary``; raises other exceptions for a damaged tokenizer."""
    document, by_text, added = parse(tokenizer.text)
    model = document["model"]
    kind, pre = classify(document)
    tokens, types = token_table(by_text, added, model, kind, config.vocab_size)
    if cut := next((text for text in tokens if "\0" in text), ""):
        raise UnsupportedModelError(
            f"a GGUF file cannot hold the token {short(cut)}: NUL ends a text in llama.cpp",
            hint=WITHOUT_GGUF,
        )
    special, eog_notes = special_ids(tokenizer, config, by_text, tokens)
    add_bos, add_eos, around_notes = added_around(tokenizer, special)
    strips, strip_notes = strips_after_special(added, by_text)
    space, space_notes = space_prefix(document) if kind == "llama" else (False, [])
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    notes = [*eog_notes, *around_notes, *strip_notes, *space_notes, *step_notes(document, kind)]
    if kind == "llama" and missing_merges(model["vocab"], set(merges)):
        notes.append(
            "the tokenizer lists fewer merges than its vocabulary allows: "
            "llama.cpp, which merges by score, can split rare words differently"
        )
    if kind == "gpt2" and bool(model.get("ignore_merges")) != (pre in IGNORE_MERGES):
        looks = "looks" if model.get("ignore_merges") else "does not look"
        notes.append(
            f"the tokenizer {looks} whole words up before it merges, llama.cpp's {pre} does the "
            "other: rare words can differ"
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
        chat_templates=tokenizer.chat_templates,
        strips_after_special=strips,
        notes=tuple(notes),
    )


def write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write the ``tokenizer.*`` keys."""
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
    if named := list(vocabulary.chat_templates.items()):
        writer.add_chat_template(named[0][1])  # llama.cpp's default
        names: list[str] = []
        for name, _ in named[1:]:
            key = re.sub(r"[^A-Za-z0-9]", "_", name)
            while key in names:
                key += "_"
            names.append(key)
        for name, (_, template) in zip(names, named[1:], strict=True):
            writer.add_string(f"tokenizer.chat_template.{name}", template)
        if names:
            writer.add_array("tokenizer.chat_templates", names)


_ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}


# --- tokens ------------------------------------------------------------------------------------


def token_table(
    by_text: Mapping[str, int],
    added: Mapping[int, Mapping[str, Any]],
    model: Mapping[str, Any],
    kind: str,
    size: int,
) -> tuple[list[str], list[int]]:
    """Texts and types of all ``size`` rows; unused rows are ``[PADi]``.

    llama.cpp refuses two rows with the same text: the id of ``by_text`` keeps it.
    """
    tokens, types = [""] * size, [UNUSED] * size
    for text, index in by_text.items():
        if not 0 <= index < size:
            continue
        tokens[index] = text
        if text in CONTROL_BY_TEXT:
            types[index] = CONTROL
        elif token := added.get(index):
            types[index] = CONTROL if token.get("special") else USER_DEFINED
        elif kind == "llama" and len(text) == 6 and text.startswith("<0x"):
            types[index] = BYTE
        else:
            types[index] = UNKNOWN if text == model.get("unk_token") else NORMAL
    for index in range(size):
        if types[index] == UNUSED:
            tokens[index] = f"[PAD{index}]"
            while tokens[index] in by_text:
                tokens[index] += "_"
    return tokens, types


def scores(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, ...]]
) -> list[float]:
    """Scores that make llama.cpp merge in the order of ``merges``: minus the first rank.

    Scores of tokens without a merge are never used; they are lowest, as in SentencePiece.
    """
    rank: dict[str, int] = {}
    for position, pair in enumerate(merges):
        rank.setdefault("".join(pair), position)
    last = len(merges)
    return [
        -float(rank.get(text, last)) if kind == NORMAL else 0.0
        for text, kind in zip(tokens, types, strict=True)
    ]


MOST_CHARACTERS = (
    10**9
)  # characters copied for the cuts of all tokens; real vocabularies need a hundredth


def missing_merges(vocab: Mapping[str, int], merges: set[tuple[str, ...]]) -> bool:
    """Whether two tokens concatenate to a third without a merge: llama.cpp would merge them.

    Raises:
        CheckpointError: tokens so long that the search would take minutes.
    """
    if sum(len(text) ** 2 for text in vocab) > MOST_CHARACTERS:
        longest = max(map(len, vocab))
        raise CheckpointError(f"the tokenizer has a token of {longest:,} characters: damaged?")
    for text in vocab:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab and (left, right) not in merges:
                return True
    return False


def special_ids(
    tokenizer: TokenizerFacts,
    config: DecoderConfig,
    by_text: Mapping[str, int],
    tokens: Sequence[str],
) -> tuple[dict[str, int], list[str]]:
    """Ids of the special tokens, such that llama.cpp ends generation at every end id.

    llama.cpp ends at tokens that it knows by text, and at ``eos``, ``eot`` and ``eom``.
    """
    ends = [index for index in config.eos_token_ids if index < len(tokens)]
    none = [index for index in config.eos_token_ids if index >= len(tokens)]
    notes = [f"the end of generation {none[0]} is no token of the model"] if none else []
    defaults = {
        "bos": config.bos_token_id,
        "eos": ends[0] if ends else None,
        "unk": None,
        "pad": config.pad_token_id,
    }
    special: dict[str, int] = {}
    for kind, default in defaults.items():
        index = by_text.get(tokenizer.special.get(f"{kind}_token", ""), default)
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
            return special, [*notes, f"llama.cpp will not stop at {tokens[index]!r} by itself"]
        special[slot] = index
    return special, notes


def added_around(
    tokenizer: TokenizerFacts, special: MutableMapping[str, int]
) -> tuple[bool, bool, list[str]]:
    """Whether encoding adds ``bos`` before and ``eos`` after a text; notes where it adds others.

    A single other token becomes ``bos`` or ``eos`` in ``special`` where the tokenizer has none.
    """
    around = {"bos": tokenizer.before, "eos": tokenizer.behind}
    for kind, ids in around.items():
        if len(ids) == 1 and f"{kind}_token" not in tokenizer.special:
            special[kind] = ids[0]
    adds = {kind: ids == [special.get(kind)] for kind, ids in around.items()}
    notes = [
        f"the tokenizer puts tokens {ids} {'in front of' if kind == 'bos' else 'behind'} a text: "
        f"llama.cpp can only put {kind} there"
        for kind, ids in around.items()
        if ids and not adds[kind]
    ]
    return adds["bos"], adds["eos"], notes


def strips_after_special(
    added: Mapping[int, Mapping[str, Any]], by_text: Mapping[str, int]
) -> tuple[bool, list[str]]:
    """Whether the model's name must make llama.cpp drop whitespace after tokens, and notes."""
    wanted = {token["content"] for token in added.values() if token.get("rstrip")}
    would = {token["content"] for token in added.values()} - set(PHI3_KEEPS)
    able = all(text in by_text for text in PHI3_NEEDS)
    strips = able and len(wanted ^ would) < len(wanted)
    differing = sorted(wanted ^ would if strips else wanted)
    notes = [
        f"whitespace behind {len(differing)} special token(s), such as {differing[0]!r}, is "
        "treated differently by llama.cpp"
    ] if differing else []  # fmt: skip
    for flag in ("lstrip", "single_word"):
        if flagged := [token["content"] for token in added.values() if token.get(flag)]:
            notes.append(
                f"llama.cpp does not follow {flag} of {len(flagged)} token(s), such as "
                f"{flagged[0]!r}"
            )
    return strips, notes
