"""GGUF: one file for llama.cpp, with the weights, the keys and the tokenizer.

    planning.py   type name → grid and bytes of each tensor
    mixes.py      llama.cpp's presets (Q4_K_M …) and fallback types for rows that do not fit
    metadata.py   tensor names, architecture keys, rope tables
    tokenizer.py  the tokenizer's keys; splitting.py: the pre-tokenizer's name in llama.cpp
    imatrix.py    reads and writes llama.cpp's importance files
    writer.py     writes the file, streamed
    runtime.py    runs it in llama.cpp
    card.py       finds files, and how to run them
    inspection.py describes a file; head.py reads its keys and tensor table

Importing this package loads neither gguf nor llama.cpp.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "open_runtime":
        raise AttributeError(name)
    from exporters.gguf.runtime import open_runtime

    return open_runtime
