"""Runs GGUF files in llama.cpp, through the C API of a prebuilt wheel.

The shared library of the ``xllamacpp`` wheel exports llama.cpp's C API (Linux and macOS);
``llama-cpp-python`` is used where that is installed instead. Only functions are called and only the
first three numbers of the context's parameters are set, so that this works with many versions of
llama.cpp: parameter structs are passed as opaque bytes, larger than those of any version.
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.metadata
import importlib.util
import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import ArtifactError, RuntimeMissingError
from compress.files import open_plain
from compress.machine import available_cpus
from compress.plan.shapes import check_room
from exporters.gguf.planning import CONTEXT_STEP

# Tokens per llama_decode: its logits buffer is this many rows of the vocabulary.
BATCH = 512
ERROR = 4  # ggml_log_level
NO_VOCABULARY = 0  # llama_vocab_type

# Distribution, import package, path of its library.
LIBRARIES = (
    ("xllamacpp", "xllamacpp", ("xllamacpp*.so",)),
    ("llama-cpp-python", "llama_cpp", ("lib/libllama.so", "lib/libllama.dylib", "lib/llama.dll")),
)


class _Params(c.Structure):
    """``llama_model_params`` or ``llama_context_params``: opaque, with room to spare."""

    _fields_ = (("bytes", c.c_uint8 * 768),)


class _Batch(c.Structure):
    """``llama_batch`` of llama.h."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


_LOG_CALLBACK = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_POINTER, _FLOATS = c.c_void_p, c.POINTER(c.c_float)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, _LOG_CALLBACK, _POINTER),
    "llama_model_default_params": (_Params,),
    "llama_context_default_params": (_Params,),
    "llama_model_load_from_file": (_POINTER, c.c_char_p, _Params),
    "llama_init_from_model": (_POINTER, _POINTER, _Params),
    "llama_model_free": (None, _POINTER),
    "llama_free": (None, _POINTER),
    "llama_model_meta_val_str": (c.c_int32, _POINTER, c.c_char_p, c.c_char_p, c.c_size_t),
    "llama_set_n_threads": (None, _POINTER, c.c_int32, c.c_int32),
    "llama_model_get_vocab": (_POINTER, _POINTER),
    "llama_vocab_n_tokens": (c.c_int32, _POINTER),
    "llama_vocab_type": (c.c_int, _POINTER),
    "llama_tokenize": (c.c_int32, _POINTER, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32,
                       c.c_bool, c.c_bool),
    "llama_batch_init": (_Batch, c.c_int32, c.c_int32, c.c_int32),
    "llama_batch_free": (None, _Batch),
    "llama_decode": (c.c_int32, _POINTER, _Batch),
    "llama_get_logits": (_FLOATS, _POINTER),
    "llama_get_logits_ith": (_FLOATS, _POINTER, c.c_int32),
    "llama_get_memory": (_POINTER, _POINTER),
    "llama_memory_clear": (None, _POINTER, c.c_bool),
    "llama_memory_seq_rm": (c.c_bool, _POINTER, c.c_int32, c.c_int32, c.c_int32),
}  # fmt: skip


class Library:
    """A loaded llama.cpp.

    Attributes:
        name: ``llama.cpp (xllamacpp 2026.10.11549)``.
        functions: the C API, with its types declared.
        errors: llama.cpp's last error lines; its log is not printed.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.errors: deque[str] = deque(maxlen=20)
        self.functions = c.CDLL(str(path))
        for function, (result, *arguments) in _SIGNATURES.items():
            symbol = getattr(self.functions, function)
            symbol.restype, symbol.argtypes = result, arguments
        self._log = _LOG_CALLBACK(self._keep)  # referenced as long as the library
        self.functions.llama_log_set(self._log, None)
        self.functions.llama_backend_init()

    def _keep(self, level: int, text: bytes | None, _data: Any) -> None:
        line = (text or b"").decode("utf-8", "replace").strip()
        if level == ERROR and line:
            self.errors.append(line)

    def reason(self) -> str:
        """llama.cpp's message on the last failed call; clears it."""
        lines = [line for line in self.errors if "failed to load model" not in line]
        self.errors.clear()
        if not lines:
            return "no reason given"
        first = lines[0].removeprefix("llama_model_load: error loading model: ")
        return re.sub(r"^[a-z_0-9]+: ", "", first)  # the name of the C function


@functools.cache
def load_library() -> Library:
    """Load llama.cpp from an installed wheel.

    Raises:
        RuntimeMissingError: none is installed, or it does not export the C API (xllamacpp on
            Windows).
    """
    # Otherwise a debugger's output follows the reason of an abort.
    os.environ["GGML_NO_BACKTRACE"] = "1"
    unusable = ""
    for distribution, package, patterns in LIBRARIES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(p for pattern in patterns for p in Path(folder).glob(pattern)):
                try:
                    version = importlib.metadata.version(distribution)
                except importlib.metadata.PackageNotFoundError:
                    version = "unknown version"
                try:
                    return Library(path, f"llama.cpp ({distribution} {version})")
                except (OSError, AttributeError) as error:
                    unusable = f"; {distribution} {version} is there, but: {error}"
    raise RuntimeMissingError(
        f"llama.cpp is not installed{unusable}",
        hint="pip install xllamacpp (Linux, macOS), or pip install llama-cpp-python",
    )


class LlamaCpp:
    """A GGUF file in llama.cpp (``compress.plan.shapes.Runtime``)."""

    def __init__(self, path: Path, *, context: int, threads: int = 0, batch: int = BATCH) -> None:
        """Load the model and make room for ``context`` positions.

        llama.cpp chooses longrope's factors by the size of the context: up to the original one
        texts get a context of that size, longer ones a larger one.

        Raises:
            ArtifactError: llama.cpp refuses the file; the message has its reason.
            RuntimeMissingError: llama.cpp is not installed.
        """
        self._context: int | None = None
        self._model: int | None = None
        check_head(path)
        self._library = load_library()
        self._c = self._library.functions
        self._library.errors.clear()
        self._model = self._c.llama_model_load_from_file(
            os.fsencode(path), self._c.llama_model_default_params()
        )
        if not self._model:
            raise ArtifactError(f"llama.cpp refuses {path.name}: {self._library.reason()}")
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self.positions, short = context, self._room(context)
        self._switch = short if short < context else 0
        self._fed: list[int] = []  # the tokens of the cache, where there is a switch
        self._batch_size, self._threads = min(batch, short), threads or available_cpus()
        self._open(short, path.name)
        self._batch = self._c.llama_batch_init(self._batch_size, 0, 1)

    def _open(self, positions: int, name: str) -> None:
        """Make a context of that size, in place of the one there was."""
        if self._context:
            self._c.llama_free(self._context)
        params = self._c.llama_context_default_params()
        numbers = c.cast(c.byref(params), c.POINTER(c.c_uint32))
        # n_ctx, n_batch, n_ubatch: first in the struct in every version so far.
        numbers[0], numbers[1], numbers[2] = positions, self._batch_size, self._batch_size
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            reason = self._library.reason()
            self.close()
            raise ArtifactError(f"llama.cpp cannot run {name}: {reason}")
        self.use_threads(self._threads)
        self._held, self._used = positions, 0

    def use_threads(self, count: int) -> None:
        """Compute on so many threads from now on."""
        self._threads = count
        self._c.llama_set_n_threads(self._context, count, count)

    @property
    def name(self) -> str:
        """``llama.cpp (xllamacpp 2026.10.11549)``."""
        return self._library.name

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, including padding."""
        return int(self._c.llama_vocab_n_tokens(self._vocab))

    @property
    def tokenize(self) -> Callable[..., list[int]] | None:
        """``tokenize(text, add_special=True)``: ids by the tokenizer in the file, with BOS and EOS
        as it defines; None without one. ``<|user|>`` written in the text becomes the token, as in
        Hugging Face's tokenizers."""
        none = self._c.llama_vocab_type(self._vocab) == NO_VOCABULARY
        return None if none else self._tokenize

    def _tokenize(self, text: str, add_special: bool = True) -> list[int]:
        data = text.encode()
        # As many tokens as bytes and one at each end; more where a space is put after each of many
        # added tokens: then the negative number of them is returned.
        count = -(len(data) + 8)
        for _ in range(2):
            tokens = (c.c_int32 * -count)()
            count = self._c.llama_tokenize(
                self._vocab, data, len(data), tokens, len(tokens), add_special, True
            )
            if count >= 0:
                break
        if count < 0:
            raise ArtifactError(f"llama.cpp cannot tokenize {text!r}: {self._library.reason()}")
        return list(tokens[:count])

    def logits(self, tokens: Sequence[int], *, fresh: bool = True) -> NDArray[np.float32]:
        """Logits at every position of a fresh sequence, float32 ``[len(tokens), vocab]``.

        Args:
            tokens: at least one.
            fresh: empty the KV cache first.

        Raises:
            UsageError: no tokens, or more than there is room for.
            ArtifactError: llama.cpp cannot evaluate them.
        """
        if fresh:
            self.reset()
        check_room(self._used, len(tokens), self.positions)
        count, tokens = len(tokens), self._grown(tokens) if self._switch else tokens
        result = np.empty((len(tokens), self.vocab_size), np.float32)
        for start in range(0, len(tokens), self._batch_size):
            chunk = tokens[start : start + self._batch_size]
            self._decode(chunk, every=True)
            rows = result[start : start + len(chunk)]
            rows[:] = np.ctypeslib.as_array(self._c.llama_get_logits(self._context), rows.shape)
        return result[-count:]

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """``feed`` with the logits at every new position, float32 ``[len(tokens), vocab]``."""
        return self.logits(tokens, fresh=False)

    def rewind(self, length: int) -> int:
        """Keep the first ``length`` positions of the KV cache, or none where llama.cpp cannot cut
        the cache of this model; returns how many were kept."""
        memory = self._c.llama_get_memory(self._context)
        across = length <= self._switch < self._used and self._switch
        if across or not self._c.llama_memory_seq_rm(memory, 0, length, -1):
            self.reset()
        self._used = min(self._used, length)
        return self._used

    def reset(self) -> None:
        """Empty the KV cache."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        self._used = 0

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens to the cached sequence; logits after the last one, float32 ``[vocab]``.

        Raises:
            UsageError: no tokens, or more than there is room for.
            ArtifactError: llama.cpp cannot evaluate them.
        """
        check_room(self._used, len(tokens), self.positions)
        tokens = self._grown(tokens) if self._switch else tokens
        for start in range(0, len(tokens), self._batch_size):
            self._decode(tokens[start : start + self._batch_size], every=False)
        last = self._c.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(last, (self.vocab_size,)).copy()

    def close(self) -> None:
        """Free the model. Calling it twice is harmless."""
        if self._context:
            self._c.llama_batch_free(self._batch)
            self._c.llama_free(self._context)
        if self._model:
            self._c.llama_model_free(self._model)
        self._context = self._model = None

    def _grown(self, tokens: Sequence[int]) -> Sequence[int]:
        """The tokens to evaluate next, in a context whose size gives them the model's factors: of a
        text that grows beyond the original context all, from its start."""
        self._fed = [*self._fed[: self._used], *tokens]
        held = self.positions if len(self._fed) > self._switch else self._switch
        if held != self._held:
            self._open(held, "a longer text")
            return self._fed
        return tokens

    def _room(self, context: int) -> int:
        """The first context: at most longrope's original one."""
        arch = self._metadata("general.architecture")
        original = self._metadata(f"{arch}.rope.scaling.original_context_length")
        yarn = self._metadata(f"{arch}.rope.scaling.type") == "yarn"  # also has both keys
        if self._metadata(f"{arch}.rope.scaling.attn_factor") and original and not yarn:
            # llama.cpp rounds contexts up; rounding down keeps it at or below the original.
            return min(context, int(original) // CONTEXT_STEP * CONTEXT_STEP)
        return context

    def _metadata(self, key: str) -> str:
        """The value of a scalar key as text; ``""`` where it is missing."""
        buffer = c.create_string_buffer(256)
        size = self._c.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode() if size >= 0 else ""

    def _decode(self, tokens: Sequence[int], *, every: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = int(token)
            batch.pos[i] = self._used + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every or i == len(tokens) - 1
        if self._c.llama_decode(self._context, batch) != 0:
            raise ArtifactError(f"llama.cpp cannot evaluate: {self._library.reason()}")
        self._used += len(tokens)


def check_head(path: Path) -> None:
    """Refuse a file that is not GGUF before llama.cpp opens it.

    Raises:
        ArtifactError: missing, or another format.
    """
    try:
        with open_plain(path) as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ArtifactError(f"{path.name} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise ArtifactError(f"{path.name} is not a GGUF file")


open_runtime = LlamaCpp
