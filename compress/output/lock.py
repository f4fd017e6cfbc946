"""What a build was made from, byte for byte: versions, checkpoint, other files; and ``--locked``,
which refuses to build from anything else.

Hashing takes about 0.8 CPU seconds per gigabyte and reads every shard once more than a build does,
so a large local checkpoint is hashed only on demand (``--provenance``, ``--locked``); the hash then
stands in the cache under path, size and time. Of a Hub checkpoint the hashes are known: the Hub's
cache names each large file by its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress import __version__
from compress.allocation.chosen import Chosen
from compress.allocation.lock import read_lock
from compress.build.settings import BuildSettings
from compress.calibration.step import Importance, texts_of
from compress.checkpoint.checkpoint import Checkpoint
from compress.console import Console
from compress.decoder.config_json import json_or_empty, write_json
from compress.errors import UsageError
from compress.output.cache import cache_folder
from compress.output.checksums import sha256_of
from compress.plan.document import plan_document
from compress.plan.job import Job, looks_at_inputs

__all__ = ["check_lock", "lock_build", "lock_document", "source_files", "versions"]

# What has a part in the bytes of artifacts; runtimes only read them.
LIBRARIES = (
    "coremltools", "gguf", "jinja2", "llvmlite", "numba", "numpy", "onnx", "onnx-ir", "protobuf",
    "sentencepiece", "tokenizers", "torch", "transformers",
)  # fmt: skip

SMALL = 256_000_000  # bytes that are always hashed: a fifth of a second
TOLD = 4  # differences that one line names

Progress = Callable[[int, int], None]


def versions() -> dict[str, str]:
    """packlight and the libraries that have a part in the bytes; those that are installed."""
    found = {"packlight": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def lock_build(
    job: Job, chosen: Chosen, importance: Importance, settings: BuildSettings, console: Console
) -> dict[str, Any]:
    """The ``lock`` of a build that is about to begin; with ``--locked``, held against its plan.

    Raises:
        UsageError: see ``check_lock``.
    """
    inputs = texts_of(job.recipe) if looks_at_inputs(job.recipe) else []
    if importance.imatrix:
        inputs = [importance.imatrix]
    with console.progress("hash the checkpoint") as update:
        lock = lock_document(
            job.checkpoint,
            inputs,
            thorough=settings.provenance or settings.locked,
            progress=update,
        )
    if settings.locked and settings.plan:
        now = {**plan_document(job, chosen.budgets), "lock": lock}
        check_lock(settings.plan.name, read_lock(settings.plan), now)
    return lock


def lock_document(
    checkpoint: Checkpoint,
    inputs: Sequence[Path],
    *,
    thorough: bool,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """``plan.json``'s ``lock``: ``versions``; the checkpoint's ``headers`` (hash of its config and
    of all tensors' names, types and places) and ``files`` (name → SHA-256); ``inputs`` likewise.

    ``files`` is None where hashing them would take time and nobody asked for it.

    Args:
        checkpoint: opened.
        inputs: other files that the artifacts depend on: calibration texts, an imatrix.
        thorough: hash every file of the checkpoint, however large, even where the Hub told.
        progress: ``progress(done, total)`` in bytes.
    """
    files = source_files(checkpoint)
    digests = {path: None if thorough else hub_digest(path) for path in files}
    unknown = [path for path, digest in digests.items() if digest is None]
    total = sum(path.stat().st_size for path in unknown)
    known = thorough or total <= SMALL
    done = 0
    for path in unknown if known else ():
        digests[path] = cached_digest(path)
        done += path.stat().st_size
        progress(done, total)
    return {
        "versions": versions(),
        "checkpoint": {
            "headers": headers_digest(checkpoint),
            "files": {path.name: digests[path] for path in files} if known else None,
        },
        "inputs": {name: sha256_of(path) for name, path in named(inputs).items()},
    }


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Files by their names without folders; ``text.txt#2`` for a second one of a name."""
    found: dict[str, Path] = {}
    for path in paths:
        count = sum(name.partition("#")[0] == path.name for name in found)
        found[f"{path.name}#{count + 1}" if count else path.name] = path
    return found


def source_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of a checkpoint that a build reads, by name."""
    folder = checkpoint.path
    shards = {info.file for info in checkpoint.tensors.values()}
    names = ("config.json", "generation_config.json")
    others = {folder / name for name in names if (folder / name).is_file()}
    indices = {path for path in folder.glob("*.index.json") if path.is_file()}
    tokenizer = set(checkpoint.tokenizer_files())
    return sorted(shards | others | indices | tokenizer, key=lambda path: path.name)


def headers_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of config and shard headers: cheap, and the same wherever the files lie."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, info in sorted(checkpoint.tensors.items()):
        row = (name, info.dtype, list(info.shape), info.file.name, info.offset, info.nbytes)
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def hub_digest(path: Path) -> str | None:
    """SHA-256 of a large file in the Hub's cache, where snapshots link to ``blobs/<sha256>``.

    Small files are there under their git hash, of 40 digits.
    """
    if not path.is_symlink():
        return None
    blob = path.resolve()
    known = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if known else None


def cached_digest(path: Path) -> str:
    """SHA-256 of a file, kept in the cache for as long as its size and time stay."""
    real = path.resolve()
    stat = real.stat()
    if stat.st_size <= SMALL:
        return sha256_of(real)
    key = hashlib.sha256(str(real).encode()).hexdigest()[:16]
    entry = cache_folder("hashes") / f"{key}.json"
    facts = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
    found = json_or_empty(entry)
    if {name: found.get(name) for name in facts} == facts and "sha256" in found:
        return str(found["sha256"])
    digest = sha256_of(real)
    write_json(entry, {**facts, "sha256": digest})
    return digest


def check_lock(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """``--locked``: refuse whatever would not give the bytes of an earlier build.

    Args:
        name: of the plan's file.
        before: that ``plan.json``.
        now: what this build's would say, with its ``lock``.

    Raises:
        UsageError: what differs, old and new; or the plan cannot tell.
    """
    lock = before.get("lock")
    if not isinstance(lock, dict) or not (lock.get("checkpoint") or {}).get("files"):
        raise UsageError(
            f"{name} does not say which bytes the checkpoint had, so nothing can be held to it",
            hint="build once with --provenance, and lock to the plan.json of that",
        )
    found = list(differences(facts(before), facts(now)))
    if not found:
        return
    more = f"; and {len(found) - TOLD} more" if len(found) > TOLD else ""
    raise UsageError(
        f"--locked: this would not be the build of {name}: {'; '.join(found[:TOLD])}{more}",
        hint="the same versions, checkpoint and recipe; or leave --locked out",
    )


def facts(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan decides the bytes, with tensors by name."""
    targets = plan.get("targets") or {}
    return {
        **{key: plan.get(key) for key in ("lock", "model", "prune", "quantize")},
        "targets": {
            name: {
                **{key: target.get(key) for key in ("type", "settings", "prune")},
                "tensors": {row["name"]: row["grid"] for row in target.get("tensors") or ()},
            }
            for name, target in targets.items()
        },
    }


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """A line for each leaf that is another, is gone, or is new."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            place = f"{where}.{key}" if where else key
            yield from differences(before.get(key), now.get(key), place)
    elif before != now:
        yield f"{where.removeprefix('lock.')} was {show(before)}, is {show(now)}"


def show(value: Any) -> str:
    """A value in a sentence: hashes by their first digits."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"sha256 {value[:12]}…"
    if value is None:
        return "not there"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
