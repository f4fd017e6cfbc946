"""GGUF: one file for llama.cpp, with the weights, the keys and the tokenizer.

    planning.py   type name → which tensor gets which grid, and its bytes
    mixes.py      llama.cpp's presets (Q4_K_M …) and what rows that do not fit get
    metadata.py   tensor names, architecture keys, rope tables
    tokenizer.py  the tokenizer's keys; splitting.py: llama.cpp's name of its pattern
    writer.py     the file, streamed
    runtime.py    llama.cpp itself
    card.py       where its files lie, and how to run them
    inspection.py what a file says of itself; head.py reads its keys and tensor table

Importing this package loads neither gguf nor llama.cpp.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "open_runtime":
        raise AttributeError(name)
    from exporters.gguf.runtime import open_runtime

    return open_runtime
