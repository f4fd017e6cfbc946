"""Who answers the harness: the float model in this process, an artifact in a child process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from compress.checkpoint.checkpoint import Stored
from compress.console import Console
from compress.decoder.decoder import Decoder
from compress.errors import ArtifactError
from compress.harness.answers import Answer, Cursor, Prompt, generate, score, streamed
from compress.machine import available_memory
from compress.plan.memory import embedding_bytes
from compress.plan.shapes import Artifact
from compress.verify.child import run_child
from compress.verify.tasks import Request

ANSWER = (sys.executable, "-P", "-m", "exporters.answer")
RESIDENT_SHARE = 1 / 2  # of the available memory, for the float model's weights


class Model(Protocol):
    """Answers requests.

    Attributes:
        runtime: name and version; empty before the first answer.
    """

    runtime: str

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """See ``answers.score``."""
        ...

    def generate(self, prompts: Sequence[Prompt], ends: Sequence[int]) -> list[list[int]]:
        """See ``answers.generate``."""
        ...


class FloatModel:
    """The checkpoint in the reference decoder.

    Its weights stay in memory where they take at most ``RESIDENT_SHARE`` of it, and sequences then
    share their beginnings. Otherwise every weight is read once for each batch of sequences, and for
    each generated token.
    """

    def __init__(self, stored: Stored, threads: int, console: Console) -> None:
        config = stored.config
        needed = 4 * config.num_parameters + embedding_bytes(config)
        self._resident = needed <= available_memory() * RESIDENT_SHARE
        self._decoder = Decoder(config, stored.read, threads=threads, resident=self._resident)
        self._decode = stored.checkpoint.tokenizer.decode
        self._console, self.runtime = console, self._decoder.name

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        rows = Cursor(self._decoder).rows if self._resident else streamed(self._decoder)
        with self._console.progress("ask the float model", "sequences") as update:
            return score(requests, rows, update)

    def generate(self, prompts: Sequence[Prompt], ends: Sequence[int]) -> list[list[int]]:
        with self._console.progress("ask the float model", "prompts") as update:
            return generate(prompts, self._decoder, ends, self._decode, update)


class ArtifactModel:
    """An artifact in its own runtime; a process is started for each kind of request.

    Args:
        artifact: to run.
        vocab_size: of the float model.
        tokenizer: folder of the checkpoint, whose tokenizer finds the stops.
        scratch: folder for the requests.
        threads: 0 for the CPUs that the process may use.
        console: shows the progress.
    """

    def __init__(
        self,
        artifact: Artifact,
        vocab_size: int,
        tokenizer: Path,
        scratch: Path,
        threads: int,
        console: Console,
    ) -> None:
        self._artifact, self._vocab_size, self._tokenizer = artifact, vocab_size, tokenizer
        self._scratch, self._threads, self._console = scratch, threads, console
        self.runtime = ""

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        longest = max((len(request.tokens) - 1 for request in requests), default=1)
        found = self._ask({"requests": requests}, longest, "sequences")
        return [(float(value), bool(greedy)) for value, greedy in found]

    def generate(self, prompts: Sequence[Prompt], ends: Sequence[int]) -> list[list[int]]:
        longest = max((len(prompt.tokens) + prompt.most for prompt in prompts), default=1)
        return self._ask({"prompts": prompts, "ends": list(ends)}, longest, "prompts")

    def _ask(self, asked: dict[str, Any], context: int, unit: str) -> list[Any]:
        artifact, path = self._artifact, self._scratch / "requests.json"
        path.write_text(json.dumps({**asked, "vocab_size": self._vocab_size}), encoding="utf-8")
        command = [*ANSWER, artifact.format, str(artifact.path), "--requests", str(path)]
        command += ["--context", str(context), "--threads", str(self._threads)]
        command += ["--tokenizer", str(self._tokenizer)]
        name = f"{artifact.path.name} ({artifact.format})"
        answers: list[Any] | None = None
        label = f"ask {artifact.format} {artifact.type_name}"
        with (
            self._console.progress(label, unit) as update,
            closing(run_child(command, name)) as events,
        ):
            for event in events:
                self.runtime = event.get("runtime", self.runtime)
                answers = event.get("answers", answers)
                if "done" in event:
                    update(event["done"], event["total"])
        if answers is None:
            raise ArtifactError(f"{name}: the child gave no answers")
        return answers
