"""A small language model of numpy arrays that follows the Runtime protocol, and its probe.

``logits[t] = table[token[t]] + 0.5 · Σ_{s<t} 0.7^(t-s) · past[token[s]]``: the logits depend on the
last token and, with falling weights, on all before it, so a KV cache is needed.
Run as a script it is a child of ``compress.verify`` (see ``probe.py`` of the exporters).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.errors import RuntimeMissingError
from compress.verify import BaselineStore, examine
from compress.verify.child import Ask, Emit, run_as_child


class EchoModel:
    """``noise`` is added to the weights; ``forgets`` breaks the cache at ``reset`` and ``feed``."""

    name = "numpy echo 1.0"

    def __init__(self, vocab: int, noise: float = 0.0, forgets: bool = False) -> None:
        random = np.random.default_rng(0)
        self.vocab_size = vocab
        self.table = random.normal(0, 2, (vocab, vocab)).astype(np.float32)
        self.past = random.normal(0, 2, (vocab, vocab)).astype(np.float32)
        self.table += random.normal(0, 1, (vocab, vocab)).astype(np.float32) * np.float32(noise)
        self.forgets = forgets
        self.memory = np.zeros(vocab, np.float32)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        memory = np.zeros(self.vocab_size, np.float32)
        rows = [memory := self.step(memory, token)[1] for token in tokens]
        before = [np.zeros(self.vocab_size, np.float32), *rows[:-1]]
        return np.stack([self.step(m, t)[0] for m, t in zip(before, tokens, strict=True)])

    def step(
        self, memory: NDArray[np.float32], token: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        out = self.table[token] + np.float32(0.5) * memory
        return out, np.float32(0.7) * (memory + self.past[token])

    def reset(self) -> None:
        self.memory = np.zeros(self.vocab_size, np.float32)

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        if self.forgets:
            self.reset()
        for token in tokens:
            out, self.memory = self.step(self.memory, token)
        return out

    def close(self) -> None:
        pass


def text_windows(vocab: int, count: int, length: int, seed: int = 1) -> list[list[int]]:
    """Windows sampled from the model itself, so that its perplexity is far below ``vocab``."""
    random = np.random.default_rng(seed)
    model = EchoModel(vocab)
    windows = []
    for _ in range(count):
        model.reset()
        window = [int(random.integers(vocab))]
        while len(window) < length:
            out = model.feed(window[-1:])
            p = np.exp(out - out.max())
            window.append(int(random.choice(vocab, p=p / p.sum())))
        windows.append(window)
    return windows


def main() -> int:
    """``echo_model.py HOW PATH --baseline FOLDER --scores FILE …`` misbehaves as HOW says."""
    how, baseline, scores = sys.argv[1], sys.argv[4], sys.argv[6]

    def open_runtime() -> EchoModel:
        print("a native library prints to stdout", flush=True)
        print("ggml: something to complain about", file=sys.stderr, flush=True)
        if how == "abort":
            os.abort()
        if how == "missing":
            raise RuntimeMissingError("echo is not installed", hint="pip install echo")
        if how == "raises":
            raise ZeroDivisionError("who divides by nought")
        if how == "hangs":
            import time

            time.sleep(3600)
        if how == "greedy":
            big = np.ones(200 << 17)  # 200 MiB, touched, and given back
            del big
        return EchoModel(64, noise=0.5)

    def work(emit: Emit, ask: Ask) -> None:
        if how == "silent":
            return
        examine(open_runtime, BaselineStore(Path(baseline)), Path(scores), 128, emit, ask)

    return run_as_child(work)


if __name__ == "__main__":
    sys.exit(main())
