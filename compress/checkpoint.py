"""A checkpoint on disk: names, types and byte ranges from the shard headers; tensors when asked.

Nothing is loaded on opening. ``read`` touches the bytes of one tensor (or some of its rows) and
returns float32. The safetensors layout (8-byte little-endian header length, JSON header, data) is
that of https://huggingface.co/docs/safetensors. Pickles (``.bin``) are read with
``weights_only=True`` only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import CheckpointError, UsageError

Float32 = NDArray[np.float32]

BYTES: dict[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER = 100_000_000  # the limit of the safetensors reference implementation

# What a build needs from the Hub, and nothing of the other formats that live beside it.
HUB_FILES = ["*.json", "tokenizer.model", "*.safetensors", "chat_template.jinja", "LICENSE*"]
HUB_PICKLES = ["pytorch_model*.bin"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a shard header tells it.

    Attributes:
        dtype: ``F32``, ``F16`` or ``BF16``.
        file: the shard.
        offset: of the first byte in the file; -1 in a pickle.
        nbytes: length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class Checkpoint:
    """A Hugging Face checkpoint folder.

    Attributes:
        path: the folder.
        source: what the user typed: a Hub id, or the folder's name.
        revision: commit of a Hub checkpoint, or ``""``.
        config: ``config.json``.
        generation_config: ``generation_config.json``, or empty.
        tensors: name → TensorInfo, of all shards.
        warnings: lines for the user (pickled weights).
    """

    def __init__(self, path: Path, source: str = "", revision: str = "") -> None:
        self.path = path
        self.source = source or path.resolve().name
        self.revision = revision
        self.warnings: list[str] = []
        self.config: dict[str, Any] = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config: dict[str, Any] = read_json(generation) if generation.exists() else {}
        self._pickle: tuple[Path, Mapping[str, Any]] | None = None
        self.tensors: dict[str, TensorInfo] = self._scan()

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
    ) -> Checkpoint:
        """Open a local folder, or fetch a Hub id through huggingface_hub (``HF_*`` honoured).

        Raises:
            UsageError: neither a folder nor something that can be a Hub id.
            CheckpointError: no weights, damaged or inconsistent files, or the Hub refused.
        """
        folder = Path(model).expanduser()
        if folder.is_dir():
            return cls(folder)
        name = str(model)
        looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or folder.exists()
        if looks_local:
            raise UsageError(
                f"{name} is not a folder with a checkpoint",
                hint="give a folder that holds config.json and *.safetensors, or a Hub id "
                "such as microsoft/Phi-3-mini-4k-instruct",
            )
        path = download(name, revision=revision, token=token, cache_dir=cache_dir)
        # Hub snapshots live in folders named after the commit.
        return cls(path, source=name, revision=path.name)

    # --- headers -----------------------------------------------------------------------------

    def _scan(self) -> dict[str, TensorInfo]:
        for index_name, single, scan in (
            ("model.safetensors.index.json", "model.safetensors", self._scan_safetensors),
            ("pytorch_model.bin.index.json", "pytorch_model.bin", self._scan_pickle),
        ):
            index = self.path / index_name
            if index.exists():
                return self._scan_index(index, scan)
            if (self.path / single).exists():
                return scan(self.path / single)
        raise CheckpointError(
            f"no weights in {self.path}",
            hint="expected model.safetensors or model.safetensors.index.json",
        )

    def _scan_index(self, index: Path, scan: Any) -> dict[str, TensorInfo]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index.name} has no weight_map")
        tensors: dict[str, TensorInfo] = {}
        for shard in sorted(set(map(str, weight_map.values()))):
            file = self.path / shard
            # A plain name only: no folder, no "..", nothing absolute.
            if Path(shard).name != shard or shard in ("", ".", ".."):
                raise CheckpointError(f"{index.name} points outside the folder: {shard!r}")
            if not file.exists():
                raise CheckpointError(
                    f"{shard} is missing, {index.name} names it", hint="finish the download"
                )
            tensors |= scan(file)
        for name, shard in weight_map.items():
            if name not in tensors or tensors[name].file.name != shard:
                raise CheckpointError(f"{index.name} places {name!r} in {shard}, it is not there")
        return {name: info for name, info in tensors.items() if name in weight_map}

    def _scan_safetensors(self, file: Path) -> dict[str, TensorInfo]:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{file.name} is not a safetensors file, or is truncated")
            try:
                header = json.loads(stream.read(length))
                header.pop("__metadata__", None)
                rows = [
                    (name, entry["dtype"], tuple(map(int, entry["shape"])), *entry["data_offsets"])
                    for name, entry in header.items()
                ]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{file.name} has a damaged header") from error
        start = 8 + length
        tensors = {}
        for name, dtype, shape, begin, end in rows:
            if dtype not in BYTES:
                raise CheckpointError(
                    f"{file.name}: {name} has dtype {dtype}, not F32, F16 or BF16",
                    hint="packlight starts from float checkpoints, not from quantized ones",
                )
            if end - begin != math.prod(shape) * BYTES[dtype] or begin < 0:
                raise CheckpointError(f"{file.name}: {name} has a wrong byte range")
            if start + end > size:
                raise CheckpointError(
                    f"{file.name} is truncated: {name} ends at byte {start + end}, "
                    f"the file has {size}",
                    hint="download it again",
                )
            tensors[name] = TensorInfo(name, dtype, shape, file, start + begin, end - begin)
        return tensors

    def _scan_pickle(self, file: Path) -> dict[str, TensorInfo]:
        self.warnings.append(
            f"{file.name} is a pickle: read with weights_only=True; safetensors is safer"
        )
        names = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
        tensors = {}
        for name, tensor in self._load_pickle(file).items():
            dtype = names.get(str(tensor.dtype))
            if dtype is None:
                raise CheckpointError(f"{file.name}: {name} has dtype {tensor.dtype}")
            nbytes = tensor.numel() * BYTES[dtype]
            tensors[name] = TensorInfo(name, dtype, tuple(tensor.shape), file, -1, nbytes)
        return tensors

    def _load_pickle(self, file: Path) -> Mapping[str, Any]:
        import pickle

        import torch

        if self._pickle is not None and self._pickle[0] == file:
            return self._pickle[1]
        try:
            # mmap: tensors stay on disk until touched.
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{file.name} holds more than weights, and unpickling code is never run",
                hint="convert it to safetensors where you trust it",
            ) from error
        except (RuntimeError, OSError, EOFError) as error:
            raise CheckpointError(f"{file.name} cannot be read: damaged or truncated") from error
        self._pickle = (file, state)
        return state

    # --- tensors -----------------------------------------------------------------------------

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """A tensor as float32 in its own shape, or rows ``start:stop`` of it.

        Raises:
            CheckpointError: no such tensor, a short read, or NaN/Inf among the values.
        """
        if name not in self.tensors:
            raise CheckpointError(f"no tensor {name!r} in the checkpoint")
        info = self.tensors[name]
        start, stop, _ = (rows or slice(None)).indices(info.shape[0])
        shape = (stop - start, *info.shape[1:])
        if info.offset < 0:
            tensor = self._load_pickle(info.file)[name][start:stop]
            values: Float32 = tensor.float().numpy().reshape(shape)
        else:
            values = self._read_range(info, start, math.prod(shape)).reshape(shape)
        # One pass: a sum is finite unless a value is not (or the sum itself overflows).
        if not np.isfinite(values.sum(dtype=np.float64)):
            bad = int(np.count_nonzero(~np.isfinite(values)))
            raise CheckpointError(f"{name} has {bad} NaN or Inf value(s)")
        return values

    def _read_range(self, info: TensorInfo, start_row: int, count: int) -> Float32:
        size = BYTES[info.dtype]
        offset = info.offset + start_row * math.prod(info.shape[1:]) * size
        kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[info.dtype]
        raw = np.fromfile(info.file, dtype=kind, count=count, offset=offset)
        if raw.size != count:
            raise CheckpointError(f"{info.file.name} is truncated inside {info.name}")
        if info.dtype == "BF16":
            wide = raw.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return raw.astype(np.float32, copy=False)

    # --- facts about the whole ---------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> str:
        """SHA-256 over config, shard headers, sizes and times: names a checkpoint for resuming."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, info in sorted(self.tensors.items()):
            stat = info.file.stat()
            row = (name, info.dtype, info.shape, info.offset, stat.st_size, stat.st_mtime_ns)
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files, those that exist."""
        return [self.path / name for name in TOKENIZER_FILES if (self.path / name).exists()]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: not there, not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file.name} is missing in {file.parent}",
            hint="a checkpoint folder holds config.json beside its weights",
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} is not a JSON object")
    return value


def download(
    repo_id: str, *, revision: str | None, token: str | None, cache_dir: str | None
) -> Path:
    """Fetch what a build needs of a Hub repository; the snapshot's folder.

    Raises:
        CheckpointError: the Hub or the cache does not have it; the reason in one line.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],  # onnx/, original/ and the like
            )
        )

    try:
        path = fetch(HUB_FILES)
        if not list(path.glob("*.safetensors")):
            path = fetch(HUB_FILES + HUB_PICKLES)
        return path
    except LocalEntryNotFoundError as error:
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else "no connection"
        raise CheckpointError(
            f"cannot fetch {repo_id}: {why}", hint="give a local folder instead"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot fetch {repo_id}: {why}",
            hint="check the name, --revision and --token (or HF_TOKEN)",
        ) from error
