"""Runs a written folder: mlx-lm's own code on some tokens, the reference decoder on the others.

MLX's kernels on a Linux CPU compute about one token a second at 135 million weights, too few to
score windows of text. So a runtime does two things:

  * with the first tokens that it gets, mlx-lm loads and runs the folder in a process of its own
    (child.py): its decoded weights must be ours bit for bit, and its logits, in one call and
    through its cache, those of the reference decoder with these weights;
  * the reference decoder with exactly these weights answers everything else.

``name`` says so, with the difference that was found; it goes into the report.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.decoder.config import DecoderConfig
from compress.decoder.config_json import read_json
from compress.decoder.decoder import Decoder
from compress.errors import ArtifactError, RuntimeMissingError
from compress.machine import available_memory
from compress.plan.shapes import check_room
from compress.verify.baseline import log_softmax
from exporters.mlx.card import runtime_python
from exporters.mlx.decoded import Decoded
from exporters.mlx.folder import without_quantization
from exporters.mlx.tensors import read_headers

Float32 = NDArray[np.float32]

CHILD = Path(__file__).with_name("child.py")
# Tokens that mlx-lm computes, and of these in one call in the stored type, by parameters from.
TOKENS = ((1_000_000_000, 8, 4), (200_000_000, 16, 8), (0, 32, 16))
PROMPT = 4  # of these before the cache is used one token at a time
# KL from the reference decoder, nats per token. Equal arithmetic in float32 in another order is at
# 1e-9; mlx-lm's approximations (gelu, embedding scales in bfloat16) are below the limit. In the
# stored type MLX's CPU kernels also sum, as a GPU's do not: only overflow counts there.
LIMIT = 1e-4


def open_runtime(path: Path, *, context: int, threads: int = 0) -> MlxRuntime:
    """Open a folder; see ``compress.formats``. mlx-lm runs at the first tokens.

    Raises:
        ArtifactError: damaged, or not a decoder's folder.
        RuntimeMissingError: there is no mlx-lm.
    """
    return MlxRuntime(path, runtime_python(), context=context, threads=threads)


class MlxRuntime:
    """See ``compress.plan.shapes.RewindingRuntime``, and the module.

    Args:
        folder: the artifact.
        python: of the environment that has mlx-lm.
        context: positions.
        threads: of the reference decoder.
    """

    def __init__(self, folder: Path, python: str, *, context: int, threads: int = 0) -> None:
        self._folder, self._python = folder, python
        self._pieces, _ = read_headers(folder)
        keys = read_json(folder / "config.json")
        self.config = DecoderConfig.from_hf(without_quantization(keys))
        self._weights = Decoded(folder, self.config, self._pieces, keys.get("quantization") or {})
        self._context, self._length = min(context, self.config.max_context), 0
        resident = 5 * self.config.num_parameters < available_memory() // 2
        read = self._weights.read
        self._decoder = Decoder(self.config, read, threads=threads, resident=resident)
        self._found = ""  # how mlx-lm's logits compare, once they were

    @property
    def name(self) -> str:
        """mlx-lm and what it was compared on, and what computed the other figures."""
        others = f"{self._decoder.name}, with the decoded weights"
        return f"{self._found}; all else: {others}" if self._found else others

    @property
    def vocab_size(self) -> int:
        return self._decoder.vocab_size

    def reset(self) -> None:
        """Empty the KV cache."""
        self._decoder.reset()
        self._length = 0

    def logits(self, tokens: Sequence[int]) -> Float32:
        """See ``compress.plan.shapes.Runtime``."""
        self.reset()
        self._begin(tokens)
        return self._decoder.logits(tokens)

    def feed(self, tokens: Sequence[int]) -> Float32:
        """See ``compress.plan.shapes.Runtime``."""
        self._begin(tokens)
        self._length += len(tokens)
        return self._decoder.feed(tokens)

    def extend(self, tokens: Sequence[int]) -> Float32:
        """See ``compress.plan.shapes.RewindingRuntime``."""
        self._begin(tokens)
        self._length += len(tokens)
        return self._decoder.extend(tokens)

    def rewind(self, length: int) -> int:
        """See ``compress.plan.shapes.RewindingRuntime``."""
        self._length = self._decoder.rewind(length)
        return self._length

    def close(self) -> None:
        """Free the weights."""
        self._decoder.close()

    def _begin(self, tokens: Sequence[int]) -> None:
        """Check the room for some tokens; the first go to mlx-lm, too."""
        check_room(self._length, len(tokens), self._context)
        if not self._found:
            size = self.config.num_parameters
            count, stored = next(rest for least, *rest in TOKENS if size >= least)
            some = [int(token) for token in tokens[:count]]
            run = run_child(self._python, self._folder, some, min(stored, len(some)))
            self._compare_weights(run.digests)
            self._found = run.compare(self._decoder.logits(some), self._folder.name)
            self._decoder.reset()

    def _compare_weights(self, digests: Mapping[str, str]) -> None:
        """Compare mlx's decoded matrices with ours.

        Raises:
            ArtifactError: one differs, or mlx-lm has other matrices.
        """
        end = ".scales"
        mine = {f"{n.removesuffix(end)}.weight" for n in self._pieces if n.endswith(end)}
        if mine != digests.keys():
            odd = min(mine ^ digests.keys())
            raise ArtifactError(f"{self._folder.name}: mlx-lm does not read {odd} as quantized")
        for name, digest in digests.items():
            if hashlib.sha256(self._weights.tensor(name).data).hexdigest() != digest:
                raise ArtifactError(f"{self._folder.name}: mx.dequantize decodes {name} otherwise")


class ChildRun:
    """What child.py found.

    Attributes:
        digests: of the decoded matrices, by tensor name.
    """

    def __init__(self, events: Mapping[str, Any], logits: Mapping[str, Float32]) -> None:
        self._versions: Mapping[str, str] = events["versions"]
        self.digests: Mapping[str, str] = events["digests"]
        self._logits = logits

    def compare(self, expected: Float32, artifact: str) -> str:
        """Compare with the reference decoder's logits ``[tokens, vocab]``; a line for the report.

        Raises:
            ArtifactError: they differ by more than rounding.
        """
        found = {}
        for name, logits in self._logits.items():
            if not np.isfinite(logits).all():
                raise ArtifactError(
                    f"{artifact}: mlx-lm's logits are not finite ({name})",
                    hint="targets.mlx.dtype=bfloat16" if name == "stored" else "",
                )
            found[name] = divergence(expected[: len(logits)], logits)
            if name != "stored" and found[name] > LIMIT:
                raise ArtifactError(
                    f"{artifact}: mlx-lm's logits ({name}) are {found[name]:.2g} nats from the "
                    "reference decoder's with the same weights"
                )
        versions = " ".join(f"{name} {number}" for name, number in sorted(self._versions.items()))
        worst = max(found["whole"], found["cached"])
        return (
            f"{versions}: {len(expected)} tokens, whole and cached, within {worst:.1g} nats "
            f"({found['stored']:.1g} in its own type, in which this CPU also sums)"
        )


def divergence(expected: Float32, found: Float32) -> float:
    """Mean KL divergence over positions, nats."""
    before, after = log_softmax(expected), log_softmax(found)
    return float((np.exp(before) * (before - after)).sum(axis=1).mean())


def run_child(python: str, folder: Path, tokens: Sequence[int], stored: int) -> ChildRun:
    """Run child.py in the environment of mlx-lm.

    Raises:
        ArtifactError: mlx-lm refuses the folder, or crashes.
        RuntimeMissingError: the environment has no mlx-lm.
    """
    prompt = max(1, min(PROMPT, len(tokens) - 1))
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = dict(os.environ) if python == sys.executable else own
    environment["PYTHONSAFEPATH"] = "1"  # this folder's modules are not the runtime's
    with tempfile.TemporaryDirectory(prefix="packlight-") as out:
        command = [python, str(CHILD), str(folder.resolve()), out]
        command += [json.dumps(list(tokens)), str(prompt), str(stored)]
        done, errors = communicate(command, environment)
        lines = [json.loads(line) for line in done.splitlines()]
        events = {key: value for line in lines for key, value in line.items()}
        if "done" not in events:
            last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
            if "versions" not in events:
                raise RuntimeMissingError(f"{python} does not load mlx-lm: {last[:200]}")
            raise ArtifactError(f"{folder.name}: mlx-lm cannot run it: {last[:300]}")
        rows = {"whole": len(tokens), "cached": len(tokens), "stored": stored}
        logits = {k: np.fromfile(Path(out) / k, "<f4").reshape(n, -1) for k, n in rows.items()}
    return ChildRun(events, logits)


def communicate(command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, str]:
    """Stdout and stderr of a command, which ends with this process: at the end of its stdin."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, env=environment,
        )  # fmt: skip
        assert process.stdin and process.stdout
        with process, process.stdin:
            try:
                out = process.stdout.read()
            finally:
                process.kill()
        errors.seek(0)
        return out, errors.read()
