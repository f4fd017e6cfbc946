"""The harness's model class over a ``Model``: texts to tokens and back.

Tokens, truncation and stops are those of the harness's own ``hf`` class, so that both give the same
scores; the differences: decoding is greedy only, and chat templates are rendered in a process with
limits (``compress.decoder.chat``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from compress.decoder.tokenizer import Tokenizer
from compress.errors import CheckpointError, UsageError
from compress.harness.answers import Answer, Prompt
from compress.harness.models import Model
from compress.verify.tasks import Request

MAX_GEN_TOKS = 256  # as in the harness, where a task has no limit


class RuntimeLM(TemplateLM):  # type: ignore[misc]
    """A model of the harness.

    Args:
        model: answers requests of tokens.
        tokenizer: of the checkpoint.
        max_length: positions that every compared model holds.
        ends: tokens that end a generated text.

    Attributes:
        truncated: requests so far whose beginning was cut off.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, max_length: int, ends: Sequence[int]
    ) -> None:
        super().__init__()
        self._model, self._tokenizer = model, tokenizer
        self.tokenizer = tokenizer.hf  # of the harness's own methods
        self.max_length, self.max_gen_toks = max_length, MAX_GEN_TOKS
        self._ends = list(ends)
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end: int | None = self.tokenizer.eos_token_id
        if end is None:
            raise CheckpointError("the tokenizer has no end-of-text token")
        return end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or else EOS."""
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; with the tokenizer's special tokens, unless it starts with BOS itself."""
        if add_special_tokens is None:
            bos = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not string.startswith(bos)
        return self._tokenizer.encode(string, add_special=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Answer]:
        asked = []
        for _texts, context, continuation in requests:
            if not continuation:
                raise UsageError("a task has a choice that adds no tokens to its question")
            if len(continuation) > self.max_length:
                raise UsageError(
                    f"a task has an answer of {len(continuation)} tokens, the context is "
                    f"{self.max_length}",
                    hint="a larger --context, up to what every artifact was built for",
                )
            tokens = [*context, *continuation]
            self.truncated += len(tokens) > self.max_length + 1
            tokens = tokens[-(self.max_length + 1) :]
            asked.append(Request(tokens, len(tokens) - len(continuation)))
        return self._model.score(asked)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-likelihood of whole texts, in windows of ``max_length`` that do not overlap."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for (text,) in [request.args for request in requests]:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += found
            counts.append(len(found))
        values = iter(self._loglikelihood_tokens(windows))
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """The greedy continuation of each prompt, without the stop that ended it."""
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        prompts = []
        for text, settings in [request.args for request in requests]:
            wanted: Mapping[str, Any] = normalize_gen_kwargs(settings, self.max_gen_toks)
            if wanted["do_sample"]:
                raise UsageError("a task samples its answers; only greedy decoding is supported")
            stops = handle_stop_sequences(list(wanted["until"]), eos=end)
            most = wanted["max_gen_toks"]
            if (room := self.max_length - most) <= 0:
                raise UsageError(
                    f"a task generates {most} tokens, the context is {self.max_length}",
                    hint="a larger --context, up to what every artifact was built for",
                )
            tokens = self.tok_encode(text) or [self.prefix_token_id]
            self.truncated += len(tokens) > room
            prompts.append(Prompt(tokens[-room:], most, stops))
        made = self._model.generate(prompts, self._ends)
        return [
            postprocess_generated_text(
                self.tokenizer.decode(tokens, skip_special_tokens=True), prompt.stops, None
            )
            for tokens, prompt in zip(made, prompts, strict=True)
        ]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat; without a generation prompt it ends in the last message's text, which the
        model continues. A template that refuses system messages gets the chat without them."""
        try:
            text = self._render(chat_history, add_generation_prompt)
        except CheckpointError:
            others = [message for message in chat_history if message["role"] != "system"]
            if others == chat_history:
                raise
            text = self._render(others, add_generation_prompt)
        if not add_generation_prompt:
            last = chat_history[-1]["content"]
            stripped = last if last in text else last.strip()
            text = text[: text.rindex(stripped) + len(stripped)]
        return text

    def _render(self, chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self._tokenizer.render_chat(chat, add_generation_prompt=add_generation_prompt)
