"""Reads a GGUF file with other libraries: gguf-py's decoders and tensor names, llama.cpp's
tokenizer.

``decoded_model`` puts the decoded tensors of a file into transformers' model of the checkpoint:
what llama.cpp must compute, without llama.cpp.
"""

from __future__ import annotations

import ctypes as c
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny
import torch

from exporters.gguf.runtime import LlamaCpp


def tokenize(runtime: LlamaCpp, text: str, *, add_special: bool = True) -> list[int]:
    """llama.cpp's own tokenization; ``<|user|>`` is the token, as for Hugging Face's tokenizers.

    Args:
        add_special: put BOS (and EOS) around it, where the file says so.
    """
    function = runtime._c.llama_tokenize
    function.restype = c.c_int32
    function.argtypes = [
        c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool,
    ]  # fmt: skip
    data = text.encode()
    tokens = (c.c_int32 * (len(data) + 8))()
    count = function(runtime._vocab, data, len(data), tokens, len(tokens), add_special, True)
    assert count >= 0  # never more tokens than bytes, and a few around them
    return list(tokens[:count])


def ends_generation(runtime: LlamaCpp, token: int) -> bool:
    """Whether llama.cpp stops at this token."""
    function = runtime._c.llama_vocab_is_eog
    function.restype, function.argtypes = c.c_bool, [c.c_void_p, c.c_int32]
    return bool(function(runtime._vocab, token))


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as float32, ``[rows, columns]``."""
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(
            tuple(reversed(tensor.shape.tolist()))
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def decoded_model(path: Path, checkpoint: Path) -> Any:
    """transformers' float32 model, with the weights as the file decodes them."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    model = tiny.reference(checkpoint)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    stored = tensors(path)
    used = set()
    state = model.state_dict()
    for name in state:
        stem, suffix = name.rsplit(".", 1)
        target = f"{names.get_name(stem)}.{suffix}"
        if name == "lm_head.weight" and target not in stored:
            target = "token_embd.weight"
        used.add(target)
        values = stored[target]
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            values = halves(values, head_dim)
        assert values.shape == tuple(state[name].shape), name
        state[name] = torch.tensor(values)
    assert {name for name in stored if not name.startswith("rope_")} == used
    model.load_state_dict(state)
    return model


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp's row order of q and k (pairs side by side) back to Hugging Face's (halves)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def kl_divergence(reference: Any, other: Any) -> float:
    """Mean over positions of KL(reference || other); logits ``[positions, vocab]``."""
    p = torch.log_softmax(torch.as_tensor(reference).double(), -1)
    q = torch.log_softmax(torch.as_tensor(other).double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())
