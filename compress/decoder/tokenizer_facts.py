"""A tokenizer's data for artifacts, as loaded by transformers, in plain types.

transformers and torch take seconds to load, and more memory than a build with ``rtn``. A build that
reads no text loads the tokenizer in a child process, without torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from compress.decoder.tokenizer import Tokenizer
from compress.errors import CheckpointError

SPECIAL = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


class Parsed(NamedTuple):
    """``tokenizer.json``, parsed: tens of MB for a large vocabulary, not for holding.

    Attributes:
        document: the whole.
        ids: text → id of every token.
        added: id → row of ``added_tokens``.
    """

    document: dict[str, Any]
    ids: dict[str, int]
    added: dict[int, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class TokenizerFacts:
    """A tokenizer as plain data.

    Attributes:
        text: of its ``tokenizer.json``, with added tokens, in UTF-8: a str of it takes up to four
            bytes per character.
        last_id: the largest id of a token; -1 without tokens.
        pre_tokenizer: of ``tokenizer.json``; empty where there is none.
        special: name (``bos_token`` …) → text of the token.
        others: additional special tokens.
        chat_templates: by name, the default one first.
        before, behind: ids that it adds before and after a text.
        samples: text → its ids with special tokens, of some ordinary texts.
    """

    text: bytes
    last_id: int
    pre_tokenizer: Mapping[str, Any]
    special: Mapping[str, str]
    others: list[str]
    chat_templates: dict[str, str]
    before: list[int]
    behind: list[int]
    samples: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerFacts:
        """The facts of a loaded tokenizer.

        Raises:
            CheckpointError: it cannot be written as ``tokenizer.json``, or has an invalid template.
        """
        from compress.decoder.tokenizer_texts import TEXTS  # which imports this module

        hf, samples = tokenizer.hf, {}
        for sample in (*TEXTS[:2], *TEXTS[7:25]):
            with suppress(CheckpointError):  # the tokenizer fails on it
                samples[sample] = tokenizer.encode_all(sample, add_special=True)
        special = {key: str(hf_token) for key in SPECIAL if (hf_token := getattr(hf, key, None))}
        bare = tokenizer.encode_all("a")
        whole = tokenizer.encode_all("a", add_special=True)
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        text = tokenizer.to_json().encode()
        parsed = parse(text)
        return cls(
            text=text,
            last_id=max(parsed.ids.values(), default=-1),
            pre_tokenizer=parsed.document.get("pre_tokenizer") or {},
            special=special,
            others=[token for token in hf.all_special_tokens if token not in special.values()],
            chat_templates=tokenizer.chat_templates,
            before=whole[:at],
            behind=whole[at + len(bare) :],
            samples=samples,
        )


def parse(text: bytes) -> Parsed:
    """Parse the text of a ``tokenizer.json``; a Unigram model has no ids of its own."""
    document = json.loads(text)
    added = {int(token["id"]): token for token in document.get("added_tokens") or []}
    vocabulary = document["model"]["vocab"]
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    return Parsed(document, ids | {row["content"]: index for index, row in added.items()}, added)


def facts_from_child(folder: Path) -> TokenizerFacts:
    """The facts of a folder's tokenizer, loaded in a child process.

    Raises:
        CheckpointError: see ``Tokenizer``; or the process ended early.
    """
    root = str(Path(__file__).resolve().parents[2])  # a bare checkout
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "compress.decoder.tokenizer_facts", str(folder)],
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths, "USE_TORCH": "0"},  # for transformers
    )  # fmt: skip
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
        raise CheckpointError(f"the tokenizer cannot be loaded: {lines[-1][:200]}") from None
    if "error" in answer:
        raise CheckpointError(answer["error"], answer["hint"])
    return TokenizerFacts(**answer | {"text": answer["text"].encode()})


def main() -> None:
    """Print the facts of the folder in the argument, or the error, as JSON."""
    try:
        facts = TokenizerFacts.of(Tokenizer(sys.argv[1]))
        answer = asdict(facts) | {"text": facts.text.decode()}
    except CheckpointError as error:
        answer = {"error": error.message, "hint": error.hint}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
