"""The checkpoint's tokenizer, loaded with transformers, and the windows that verification scores.

Loading is offline and without remote code, and imports ``transformers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.decoder.chat import ChatTemplate
from compress.decoder.config_json import read_json
from compress.decoder.tokenizer_files import check_files, silence
from compress.errors import CheckpointError, PacklightError, UsageError, one_line, reading
from compress.machine import change_setting

Messages = Sequence[Mapping[str, str]]
"""A chat: ``[{"role": "user", "content": "..."}, ...]``."""


class Tokenizer:
    """Converts between text and token ids.

    Attributes:
        hf: the transformers tokenizer underneath.
        rows: of the embedding; ``encode`` drops ids beyond them.
    """

    def __init__(self, path: str | Path, rows: int | None = None) -> None:
        """Load the tokenizer of a checkpoint folder.

        Raises:
            CheckpointError: no tokenizer files, damaged ones, or one that needs remote code.
        """
        from transformers.utils import logging

        # transformers' warnings are for programmers, not for users of a command line.
        verbosity = logging.get_verbosity, logging.set_verbosity
        change_setting("transformers' verbosity", *verbosity, logging.ERROR)
        folder = Path(path)
        if not has_tokenizer(folder):
            raise CheckpointError(
                f"no tokenizer in {folder}",
                hint=f"expected one of {', '.join(VOCABULARIES)}",
            )
        with reading("tokenizer.json", CheckpointError):
            prints = check_files(folder)
        with in_words("the tokenizer cannot be loaded"), silence() if prints else nullcontext():
            self.hf: Any = load(folder)
        if isinstance(self.hf, bool):  # of transformers 4, where a slow tokenizer fails
            raise CheckpointError("the tokenizer cannot be loaded: its files do not fit together")
        # Not used here, but compared with the length of each text in any case.
        self.hf.model_max_length = 10**30
        self.rows = rows
        self._rendering: dict[str, ChatTemplate] = {}  # each has a process
        if not self.hf.chat_template and (folder / PROCESSOR_TEMPLATE).exists():
            self.hf.chat_template = read_json(folder / PROCESSOR_TEMPLATE).get("chat_template")

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of a text. ``add_special``: with the tokenizer's special tokens (often BOS).

        Special tokens written in the text (``<|end|>``) become their ids in both cases.
        """
        ids = self.encode_all(text, add_special)
        return ids if self.rows is None else [index for index in ids if index < self.rows]

    def encode_all(self, text: str, add_special: bool = False) -> list[int]:
        """``encode``, with ids beyond the embedding.

        Raises:
            CheckpointError: the tokenizer fails on the text.
        """
        with in_words("the tokenizer fails on a text"):
            # verbose=False: no warning about texts longer than the model's context.
            return list(self.hf.encode(text, add_special_tokens=add_special, verbose=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, with special tokens, without clean-up of spaces."""
        text: str = self.hf.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text

    def to_json(self) -> str:
        """The text of ``tokenizer.json``, converted where the folder has only older files.

        Raises:
            CheckpointError: transformers has no fast form of this tokenizer.
        """
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is None:
            raise CheckpointError("the tokenizer cannot be written as tokenizer.json")
        text: str = backend.to_str(pretty=True)
        return text

    @property
    def bos_id(self) -> int | None:
        """The id of the BOS token, whether or not the tokenizer adds it."""
        token: int | None = self.hf.bos_token_id
        return token

    @cached_property
    def adds_bos(self) -> bool:
        """Whether ``encode(..., add_special=True)`` starts with ``bos_id``."""
        return self.bos_id is not None and self.encode("a", add_special=True)[0] == self.bos_id

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template: base models have none."""
        return bool(self.hf.chat_template)

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Name → chat template, the default first; most models have one, ``default``.

        Raises:
            CheckpointError: not a template.
        """
        found = self.hf.chat_template or {}
        named = {"default": found} if isinstance(found, str) else found
        if not isinstance(named, Mapping) or not all(isinstance(t, str) for t in named.values()):
            raise CheckpointError(
                "the tokenizer's chat_template is neither a template nor a list of named ones"
            )
        return dict(sorted(named.items(), key=lambda entry: entry[0] != "default"))

    def render_chat(
        self, messages: Messages, *, add_generation_prompt: bool = True, template: str = ""
    ) -> str:
        """Render a chat with the model's template, ready for ``encode(text)``.

        The template adds BOS itself where the model needs one. Its date is ``chat_server.DATE``, so
        that builds are reproducible.

        Args:
            template: one of ``chat_templates``' values; default: the first.

        Raises:
            CheckpointError: no chat template, or one that fails on these messages.
        """
        if not self.hf.chat_template:
            raise CheckpointError("the tokenizer has no chat template")
        template = template or next(iter(self.chat_templates.values()))
        if template not in self._rendering:
            self._rendering[template] = ChatTemplate(template, self.hf.special_tokens_map)
        rendering = self._rendering[template]
        return rendering.render(messages, add_generation_prompt=add_generation_prompt)


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """Convert what the library raises, bare exceptions and Rust's panics, to one error.

    Raises:
        CheckpointError: ``what``, with the library's reason.
    """
    try:
        yield
    except BaseException as error:
        panics = type(error).__name__ == "PanicException"  # a BaseException
        if isinstance(error, PacklightError) or not (panics or isinstance(error, Exception)):
            raise
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                "the tokenizer needs the checkpoint's own code, which packlight never executes"
            ) from error
        raise CheckpointError(f"{what}: {one_line(error)}") from error


# File of the chat template of multimodal processors, which tokenizers do not read.
PROCESSOR_TEMPLATE = "chat_template.json"

MARGIN = 64  # tokens before a cut that may differ from the whole text's

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder has a vocabulary."""
    return any((folder / name).exists() for name in VOCABULARIES)


# Tokenizer classes that build their post-processor from add_bos_token and ignore tokenizer.json's.
REMADE = ("LlamaTokenizer", "CodeLlamaTokenizer")
# Model types whose tokenizer is of the first class where none is named.
LLAMAS = ("llama", "mistral", "phi3")


def saved_by_5(settings: Mapping[str, Any]) -> bool:
    """Whether transformers 5 wrote this ``tokenizer_config.json``: tokenizer.json is complete."""
    return (
        "backend" in settings
        or settings.get("tokenizer_class") == "TokenizersBackend"
        or isinstance(settings.get("extra_special_tokens"), list)
    )


def load(folder: Path) -> Any:
    """Load a folder's tokenizer as transformers 4.57 does, with transformers 4 and 5.

    The two differ in what they read from ``tokenizer.json``: 4 everything but the post-processor of
    the classes in ``REMADE``; 5, for its own classes, only the vocabulary. A tokenizer saved by 5,
    or of a class unknown to the installed version, is read from ``tokenizer.json`` alone.
    """
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES as MODELS
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    new, keys = saved_by_5(settings), dict[str, Any](local_files_only=True)
    if isinstance(extra := settings.get("extra_special_tokens"), list):  # as in transformers 4
        keys |= {"extra_special_tokens": {}, "additional_special_tokens": extra}
    kind: Any = transformers.AutoTokenizer
    path = folder / "config.json"
    config = read_json(path) if path.exists() and "tokenizer_class" not in settings else {}
    model = config.get("model_type")
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    name = name or ("LlamaTokenizer" if model in LLAMAS else None)
    whole = (folder / "tokenizer.json").exists() and "auto_map" not in settings
    unknown = model is not None and not (isinstance(model, str) and model in MODELS)
    if isinstance(name, str):
        unknown = not (tokenizer_class_from_name(name) or tokenizer_class_from_name(f"{name}Fast"))
    if whole and (new or unknown):
        kind = transformers.PreTrainedTokenizerFast
    elif not transformers.__version__.startswith("4.") and "auto_map" not in settings:
        remade = isinstance(name, str) and name.removesuffix("Fast") in REMADE
        if remade and settings.get("add_prefix_space") is False:
            kind = transformers.LlamaTokenizer
        elif whole or remade:
            kind = transformers.PreTrainedTokenizerFast
            keys |= {"add_bos_token": settings.get("add_bos_token", True)} if remade else {}
    if kind is transformers.AutoTokenizer:
        keys["trust_remote_code"] = False
    found = kind.from_pretrained(str(folder), **keys)
    remakes = settings.keys() & {"add_bos_token", "add_eos_token"} and "add_bos_token" not in keys
    if remakes and kind is transformers.PreTrainedTokenizerFast:  # transformers 5: any class
        from tokenizers import Tokenizer as Core

        stated = Core.from_file(str(folder / "tokenizer.json"))
        found.backend_tokenizer.post_processor = stated.post_processor
    return found


def eval_windows(text: str, tokenizer: Tokenizer, length: int, count: int) -> list[list[int]]:
    """The first ``count`` windows of a text, each exactly ``length`` ids long.

    The text is encoded without special tokens and cut into contiguous, non-overlapping pieces; an
    incomplete last piece is dropped. If the tokenizer adds a BOS to texts, every window starts with
    one and has ``length - 1`` ids of the text, otherwise ``length`` ids. Scoring starts at the
    second id of a window, so with BOS every id of the text is scored. Returns fewer windows where
    the text is shorter.

    Raises:
        UsageError: the text does not fill one window, or ``length`` or ``count`` is too small.
    """
    if length < 2 or count < 1:
        raise UsageError(f"cannot score {count} window(s) of {length} token(s)")
    head = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    body = length - len(head)
    # A text of gigabytes is not encoded to the end: no tokenizer averages 16 characters a token.
    # The last tokens before the cut may differ from those of the whole text: not used.
    start = text[: 16 * (body * count + MARGIN)]
    tokens = tokenizer.encode(start)
    if len(start) < len(text) and len(tokens) < body * count + MARGIN:
        tokens = tokenizer.encode(text)
    if len(tokens) < body:
        raise UsageError(
            f"the evaluation text has {len(tokens)} tokens, a window needs {body}",
            hint="a longer --eval-text, or shorter windows (verify.sequence_length)",
        )
    starts = range(0, len(tokens) - body + 1, body)[:count]
    return [[*head, *tokens[start : start + body]] for start in starts]
