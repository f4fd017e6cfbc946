"""A checkpoint on disk: names, dtypes and byte ranges from shard headers; tensors read on request.

No tensor is loaded on opening. ``read`` reads the bytes of one tensor (or some of its rows) and
returns float32. The safetensors layout (8-byte little-endian header length, JSON header, data) is
that of https://huggingface.co/docs/safetensors. Pickles (``.bin``) are read with
``weights_only=True`` only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint.hub import download, page_of
from compress.checkpoint.not_a_checkpoint import explain_folder, other_file, read_config
from compress.checkpoint.pickles import PickleShards
from compress.checkpoint.remote import fetch as fetch_url
from compress.checkpoint.safetensors import (
    TensorInfo,
    check_finite,
    read_range,
    scan_safetensors,
)
from compress.decoder.config import DecoderConfig, WeightMap
from compress.decoder.config_json import read_json, short
from compress.decoder.families import find_family
from compress.decoder.tokenizer import VOCABULARIES, Tokenizer
from compress.decoder.tokenizer_facts import TokenizerFacts, facts_from_child
from compress.errors import CheckpointError, UsageError, without_secrets
from compress.files import cache_folder, check_folder, is_url, stamps

if TYPE_CHECKING:
    from compress.checkpoint.adapter import Adapter
    from compress.checkpoint.streaming import RemoteShards

__all__ = ["TOKENIZER_FILES", "Checkpoint", "Stored", "TensorInfo", "read_json"]

Float32 = NDArray[np.float32]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)


class Checkpoint:
    """A Hugging Face checkpoint folder.

    Attributes:
        path: the folder.
        source: a Hub id, a URL without secrets, or the folder's name, as given by the user.
        revision: commit of a Hub checkpoint, or ``""``.
        hub_id: the Hub's name of the model, or ``""``: a folder's name is not one.
        config: ``config.json``.
        generation_config: ``generation_config.json``, or empty.
        tensors: name → TensorInfo, of all shards.
        opened: size and time of the files when opened (``compress.files.stamps``).
        warnings: lines for the user and the report: pickled weights, names that differ.
        adapters: merged into the weights (``compress.checkpoint.merged``).
        remote: the shards, where they stay on a server and ``path`` has the small files only.

    Example:
        >>> from compress.demo import model_path
        >>> checkpoint = Checkpoint.open(model_path())
        >>> checkpoint.config["model_type"], checkpoint.tensors["model.norm.weight"].shape
        ('phi3', (256,))
        >>> checkpoint.read("model.norm.weight").dtype
        dtype('float32')
    """

    adapters: tuple[Adapter, ...] = ()

    def __init__(
        self, path: Path, source: str = "", revision: str = "", remote: RemoteShards | None = None
    ) -> None:
        self.path, self.remote = path, remote
        self.source = without_secrets(source) or path.resolve().name
        self.revision, self.hub_id = revision, source if revision else ""
        self.warnings: list[str] = [remote.notice] if remote and remote.notice else []
        check_folder(path)
        before = stamps(path.iterdir())
        config = path / "config.json"  # where it is missing, the error lists the files found
        self.config: dict[str, Any] = read_json(config) if config.exists() else read_config(path)
        generation = path / "generation_config.json"
        self.generation_config: dict[str, Any] = (
            read_json(generation) if generation.exists() else {}
        )
        try:
            self.tensors: dict[str, TensorInfo] = self._scan()
        except CheckpointError:
            find_family(self.config)  # an unknown architecture explains other dtypes and names
            raise
        files = self.files()
        before |= stamps(file for file in files if file.parent != path)  # in subfolders
        self.opened = {file: before.get(file) for file in files}
        if self.config.get("model_type") == "gemma3" and "text_config" in self.config:
            from compress.checkpoint.text_part import text_part

            self.config, self.tensors = text_part(self.config, self.tensors)
            self.warn("a model that sees pictures: only its text decoder is built")

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        adapters: str | Sequence[str] = (),
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        fetch: str = "auto",
        headers: bool = False,
    ) -> Checkpoint:
        """Open a local folder, a Hub id with huggingface_hub (``HF_*`` variables apply), or a URL
        with fsspec.

        Args:
            model: folder, Hub id or URL.
            adapters: PEFT LoRA adapters, merged as the weights are read: folders or Hub ids, each
                with ``=WEIGHT`` appended where that is not 1.
            revision, token, cache_dir: for a Hub id; the revision is the model's.
            fetch: the shards of a Hub id or URL: ``download``; ``streaming``, read from the server
                in ranges (``compress.checkpoint.streaming``); or ``auto``, ``download`` where the
                disk has the room.
            headers: no weights are going to be read; with ``auto``, no shards are downloaded.

        Raises:
            UsageError: neither a folder nor a possible Hub id; or a revision without a Hub id.
            CheckpointError: no weights, damaged or inconsistent files, or the Hub refused.
        """
        if adapters:
            from compress.checkpoint.merged import merge

            local = os.path.exists(os.path.expanduser(str(model)))
            base = cls.open(  # in a local folder, the Hub's options are those of the adapters
                model, revision=revision, fetch=fetch, headers=headers,
                token=None if local else token, cache_dir=None if local else cache_dir,
            )  # fmt: skip
            return merge(base, adapters, token=token, cache_dir=cache_dir)
        name = str(model)
        if not name:  # an empty path, e.g. from an unset shell variable, is not the current folder
            raise UsageError("the model's name is empty")
        # os.path's, not Path's: it does not change "~nobody/x", where Path raises.
        folder = Path(os.path.expanduser(name))
        if page := None if folder.exists() else page_of(name):
            name, linked = page
            revision = revision or linked or None
        if revision and (folder.exists() or is_url(name)):
            raise UsageError(
                f"--revision {revision}: {without_secrets(name)} is not on the Hub, and has no "
                "revisions",
                hint="leave it out, or give a Hub id",
            )
        if folder.is_dir():
            checkpoint = cls(folder)
            if idle := [
                f"--{k}" for k, given in (("token", token), ("cache-dir", cache_dir)) if given
            ]:
                checkpoint.warn(
                    f"{' and '.join(idle)} of the Hub: not used, {name} is a local folder"
                )
            return checkpoint
        if folder.is_file():
            raise other_file(folder)
        if name.startswith(("file://", "local://")):
            return cls.open(name.partition("://")[2])
        if is_url(name):
            copies, found = cache_folder("checkpoints"), None
            if fetch != "download":
                from compress.checkpoint.streaming import find_url

                found = find_url(name, copies, fetch=fetch, headers=headers)
            path, remote = found or (fetch_url(name, copies), None)
            return cls(path, name, remote=remote)
        looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
        if looks_local or folder.exists():
            raise UsageError(
                f"{name} is not a folder with a checkpoint",
                hint="give a folder that holds config.json and *.safetensors, a Hub id "
                "such as microsoft/Phi-3-mini-4k-instruct, or a URL such as s3://bucket/model",
            )
        found = None
        if fetch != "download":
            from compress.checkpoint.streaming import find_hub

            found = find_hub(
                name, fetch=fetch, headers=headers, revision=revision, token=token,
                cache_dir=cache_dir,
            )  # fmt: skip
        if found is None:
            path = download(name, revision=revision, token=token, cache_dir=cache_dir)
        path, remote = found or (path, None)
        # Hub snapshots are in folders named after the commit.
        return cls(path, name, path.name, remote)

    # --- headers -----------------------------------------------------------------------------

    def _scan(self) -> dict[str, TensorInfo]:
        remote = self.remote
        # The order in which transformers looks.
        for single, scan in (
            ("model.safetensors", remote.scan if remote else scan_safetensors),
            ("pytorch_model.bin", lambda file: self.pickles.scan(file)),
        ):
            file, index = self.path / single, self.path / f"{single}.index.json"
            try:
                if file.is_file() or (remote and single in remote.files):
                    return scan(file)
                if index.is_file():
                    return self._scan_index(index, scan)
            except OSError as error:
                raise CheckpointError(f"{single} cannot be read: {error.strerror}") from error
        none = CheckpointError(
            f"no weights in {self.path}",
            hint="expected model.safetensors or model.safetensors.index.json",
        )
        raise explain_folder(self.path, none)

    def _scan_index(
        self, index: Path, scan: Callable[[Path], dict[str, TensorInfo]]
    ) -> dict[str, TensorInfo]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index.name} has no weight_map")
        shards = sorted(set(map(str, weight_map.values())))
        elsewhere = self.remote.files if self.remote else ()
        for shard in shards:
            path = PurePosixPath(shard)
            if path.is_absolute() or path.name in ("", "..") or ".." in path.parts:
                raise CheckpointError(f"{index.name} points outside the folder: {short(shard)}")
            if any(part.startswith(".") for part in path.parts):  # ``check_folder`` skips them
                raise CheckpointError(f"{index.name} names a hidden file: {short(shard)}")
            for above in list(path.parents)[-2::-1]:  # folders of the checkpoint, not itself
                check_folder(self.path / above, within=self.path)
            if not ((self.path / shard).is_file() or shard in elsewhere):
                raise CheckpointError(
                    f"{short(shard)} is missing, {index.name} names it", hint="finish the download"
                )
        found = {shard: scan(self.path / shard) for shard in shards}
        for name, shard in weight_map.items():
            if name not in found[str(shard)]:
                raise CheckpointError(
                    f"{index.name} places {short(name)} in {short(shard)}, it is not there"
                )
        # Tensors that the index does not name are listed too, to be refused as unexpected.
        return {
            name: info
            for shard, tensors in found.items()
            for name, info in tensors.items()
            if weight_map.get(name, shard) == shard
        }

    @cached_property
    def pickles(self) -> PickleShards:
        """Reads shards that are pickles."""
        return PickleShards(self.warn)

    # --- tensors -----------------------------------------------------------------------------

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """A tensor as float32 in its own shape, or rows ``start:stop`` of it.

        Raises:
            CheckpointError: no such tensor, a short read, or NaN/Inf among the values.
        """
        if name not in self.tensors:
            raise CheckpointError(f"no tensor {name!r} in the checkpoint")
        info = self.tensors[name]
        start, stop, _ = (rows or slice(None)).indices(info.shape[0] if info.shape else 1)
        shape = (max(stop - start, 0), *info.shape[1:])
        if info.offset < 0:
            tensor = self.pickles.load(info.file)[info.name].reshape(-1, *info.shape[1:])[
                start:stop
            ]
            values: Float32 = tensor.float().numpy()
            check_finite(name, values)
        else:
            elsewhere = self.remote and info.file.name in self.remote.files
            opened = self.remote.open if self.remote and elsewhere else None
            values = read_range(info, start, math.prod(shape), opened=opened)
        return values.reshape(shape if info.shape else ())

    def warn(self, line: str) -> None:
        """Add a line to ``warnings``, once."""
        if line not in self.warnings:
            self.warnings.append(line)

    # --- the whole checkpoint ----------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> str:
        """SHA-256 of config, shard headers, sizes and times: identifies the checkpoint."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        elsewhere = self.remote.files if self.remote else {}
        for name, info in sorted(self.tensors.items()):
            if file := elsewhere.get(info.file.name):
                version: tuple[object, ...] = (file.size, file.tag)
            else:
                stat = info.file.stat()
                version = (stat.st_size, stat.st_mtime_ns)
            digest.update(repr((name, info.dtype, info.shape, info.offset, *version)).encode())
        return digest.hexdigest()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, cached.

        Raises:
            CheckpointError: see ``Tokenizer``.
        """
        rows = self.config.get("vocab_size")
        return Tokenizer(self.path, rows if isinstance(rows, int) else None)

    @cached_property
    def tokenizer_facts(self) -> TokenizerFacts:
        """The tokenizer's data for artifacts, by a child process unless transformers is loaded.

        Raises:
            CheckpointError: see ``TokenizerFacts``.
        """
        if "transformers" in sys.modules:
            return TokenizerFacts.of(self.tokenizer)
        return facts_from_child(self.path)

    def files(self) -> list[Path]:
        """The files on disk that a build reads, sorted by name, without those of adapters."""
        shards = set() if self.remote else {info.file for info in self.tensors.values()}
        shards -= {adapter.file for adapter in self.adapters}
        names = ("config.json", "generation_config.json", "README.md")  # the last for its licence
        others = [self.path / name for name in names]
        others += [*self.path.glob("*.index.json"), *self.tokenizer_files()]
        found = shards | {path for path in others if path.is_file()}
        return sorted(found, key=lambda path: path.name)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a vocabulary."""
        return any(file.name in VOCABULARIES for file in self.tokenizer_files())

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files that exist."""
        templates = sorted(self.path.glob("additional_chat_templates/*.jinja"))
        return [path for name in TOKENIZER_FILES if (path := self.path / name).exists()] + templates


@dataclass(frozen=True)
class Stored:
    """A ``Source`` of a checkpoint's unchanged weights, by packlight's names. Caches nothing."""

    checkpoint: Checkpoint
    config: DecoderConfig
    threadsafe: ClassVar[bool] = True

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """See ``compress.checkpoint.sources.Source.read``."""
        weights, pieces = WeightMap(self.config), []
        shape = weights.shape(name)
        start, stop, _ = (rows or slice(None)).indices(shape[0])
        offset = 0  # of the part's first row within the weight
        for part in weights.parts(name):
            length = len(range(part.start, part.stop, part.step))
            first, last = max(start - offset, 0), min(stop - offset, length)
            if first < last:
                begin, end = (part.start + n * part.step for n in (first, last))
                window = slice(begin, end, part.step)
                if part.expert is not None and f"{part.source}_blocks" in self.checkpoint.tensors:
                    from compress.checkpoint.packed import read_packed, unpacked

                    packed = read_packed(self.checkpoint, part.source, part.expert, window)
                    pieces.append(unpacked(*packed))
                elif part.expert is not None:
                    one = slice(part.expert, part.expert + 1)
                    matrix = self.checkpoint.read(part.source, one)[0]
                    pieces.append(matrix[:, window].T if part.transposed else matrix[window])
                elif part.transposed:
                    pieces.append(self.checkpoint.read(part.source)[:, window].T)
                else:
                    pieces.append(self.checkpoint.read(part.source, window))
            offset += length
        if not pieces:
            return np.empty((0, *shape[1:]), np.float32)
        values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if values.ndim > len(shape):  # a convolution's [rows, 1, taps]
            values = values.reshape(-1, *shape[1:])
        if self.config.norm_offset and len(shape) == 1 and name.endswith("norm.weight"):
            values = values + np.float32(self.config.norm_offset)
        return values

    def fingerprint(self) -> str:
        """See ``Source.fingerprint``."""
        return self.checkpoint.fingerprint()
