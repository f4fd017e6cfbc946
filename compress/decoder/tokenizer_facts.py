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
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.decoder.tokenizer import Tokenizer
from compress.errors import CheckpointError

SPECIAL = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip

PARSED = ("document", "ids", "added")
"""What ``TokenizerFacts`` makes of its text when asked: tens of MB of a large vocabulary, which
nobody should hold while weights are written: ``vars(facts).pop(name, None)``."""


@dataclass(frozen=True, eq=False)
class TokenizerFacts:
    """A tokenizer as plain data.

    Attributes:
        text: of its ``tokenizer.json``, with added tokens.
        special: name (``bos_token`` …) → text of the token.
        others: additional special tokens.
        chat_templates: by name, the default one first.
        before, behind: ids that it adds before and after a text.
    """

    text: str
    special: Mapping[str, str]
    others: list[str]
    chat_templates: dict[str, str]
    before: list[int]
    behind: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerFacts:
        """The facts of a loaded tokenizer.

        Raises:
            CheckpointError: it cannot be written as ``tokenizer.json``, or has an invalid template.
        """
        hf = tokenizer.hf
        special = {key: str(hf_token) for key in SPECIAL if (hf_token := getattr(hf, key, None))}
        bare = tokenizer.encode_all("a")
        whole = tokenizer.encode_all("a", add_special=True)
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return cls(
            text=tokenizer.to_json(),
            special=special,
            others=[token for token in hf.all_special_tokens if token not in special.values()],
            chat_templates=tokenizer.chat_templates,
            before=whole[:at],
            behind=whole[at + len(bare) :],
        )

    @cached_property
    def document(self) -> dict[str, Any]:
        """``tokenizer.json``, parsed."""
        document: dict[str, Any] = json.loads(self.text)
        return document

    @cached_property
    def added(self) -> dict[int, dict[str, Any]]:
        """Id → row of ``added_tokens``."""
        return {int(token["id"]): token for token in self.document.get("added_tokens") or []}

    @cached_property
    def ids(self) -> dict[str, int]:
        """Text → id of every token.

        Raises:
            CheckpointError: a damaged vocabulary.
        """
        vocabulary = self.document["model"]["vocab"]
        found = dict(vocabulary) if isinstance(vocabulary, dict) else {}
        return found | {token["content"]: index for index, token in self.added.items()}


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
    return TokenizerFacts(**answer)


def main() -> None:
    """Print the facts of the folder in the argument, or the error, as JSON."""
    try:
        answer = asdict(TokenizerFacts.of(Tokenizer(sys.argv[1])))
    except CheckpointError as error:
        answer = {"error": error.message, "hint": error.hint}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
