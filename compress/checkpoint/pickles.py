"""Shards that are pickles (``.bin``), read with ``weights_only=True`` only."""

from __future__ import annotations

import pickle
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint.safetensors import BYTES, TensorInfo
from compress.decoder.config_json import short
from compress.decoder.names import BUFFERS
from compress.errors import CheckpointError

__all__ = ["PickleShards"]


class PickleShards:
    """The pickled shards of a checkpoint; the tensors of the last used one are cached.

    Args:
        warn: takes a line for the user.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._last: tuple[Path, Mapping[str, Any]] | None = None
        self._lock = threading.Lock()  # slabs of a weight are read by several threads

    def scan(self, file: Path) -> dict[str, TensorInfo]:
        """The tensors of a shard; known buffers that are not float are left out.

        Raises:
            CheckpointError: damaged, unsafe, or with weights that are not float.
        """
        self._warn("the weights are pickles: read with weights_only=True; safetensors is safer")
        names = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
        tensors = {}
        for name, tensor in self.load(file).items():
            dtype = names.get(str(getattr(tensor, "dtype", type(tensor).__name__)))
            if dtype is None and BUFFERS.search(str(name)):
                continue
            if dtype is None or str(tensor.layout) != "torch.strided":
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise CheckpointError(
                    f"{file.name}: {short(name)} is {kind}, not a float tensor",
                    hint="" if dtype else "save the model with transformers: save_pretrained",
                )
            nbytes = tensor.numel() * BYTES[dtype]
            tensors[str(name)] = TensorInfo(name, dtype, tuple(tensor.shape), file, -1, nbytes)
        return tensors

    def load(self, file: Path) -> Mapping[str, Any]:
        """The tensors of one shard; the last used one is cached. One thread at a time."""
        with self._lock:
            return self._load(file)

    def _load(self, file: Path) -> Mapping[str, Any]:
        import torch

        if self._last is not None and self._last[0] == file:
            return self._last[1]
        self._last = None
        try:
            # mmap: tensors stay on disk until touched. Files older than torch 1.6 are no zips
            # and cannot be mapped.
            zipped = zipfile.is_zipfile(file)
            if zipped:
                check_stored(file)
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{file.name} holds more than weights, and unpickling code is never run",
                hint="convert it to safetensors where you trust it",
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{file.name} cannot be read: damaged or truncated") from error
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{file.name} holds no table of tensors")
        self._last = (file, state)
        return state


def check_stored(file: Path) -> None:
    """Refuse an archive with compressed entries, a few of whose bytes can become gigabytes.

    Raises:
        CheckpointError: it is not one of ``torch.save``, which stores all entries as they are.
        zipfile.BadZipFile: damaged.
    """
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError(
                f"{file.name} is compressed, and could become of any size",
                hint="save it again with torch.save, or as safetensors",
            )
