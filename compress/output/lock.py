"""Records the inputs that determine a build's bytes: versions, checkpoint, recipe, other files.

- ``lock_document``: hashes in ``plan.json``; ``--locked`` refuses to build from other inputs.
- ``provenance``: the same hashes as ``provenance.json``.

Hashing takes about 0.8 CPU seconds per gigabyte and reads every shard once more, so a large local
checkpoint is hashed only on demand (``--provenance``, ``--locked``); the hash is then cached by
path, size and time. Hashes of a Hub checkpoint are known: the Hub's cache names each large file by
its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress import __version__
from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config_json import json_or_empty
from compress.errors import UsageError
from compress.files import cache_folder, is_url, write_whole
from compress.formats import FORMATS
from compress.output.checksums import sha256_of
from compress.plan.document import CheckpointLock, Lock, PlanDocument
from compress.plan.job import Job

__all__ = [
    "PROVENANCE",
    "check_lock",
    "files_digest",
    "lock_document",
    "provenance",
    "versions",
]

# Packages that affect the bytes of artifacts of every format; runtimes only read them.
LIBRARIES = (
    "jinja2", "llvmlite", "numba", "numpy", "sentencepiece", "tokenizers", "torch", "transformers",
)  # fmt: skip

SMALL = 256_000_000  # bytes that are always hashed: a fifth of a second
SHOWN = 4  # differences that one line names

PROVENANCE = "provenance.json"
DOCUMENT = "https://github.com/packlight/packlight/blob/main/docs/reproducible.md"
BUILD_TYPE = f"{DOCUMENT}#build-type-v1"
BUILDER = f"{DOCUMENT}#builder"

Progress = Callable[[int, int], None]


def versions() -> dict[str, str]:
    """Versions of packlight and the installed libraries that affect the bytes."""
    found = {"packlight": __version__}
    of_formats = [name for row in FORMATS.values() for name in row.libraries]
    for name in sorted({*LIBRARIES, *of_formats}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def lock_document(
    checkpoint: Checkpoint,
    inputs: Sequence[Path],
    *,
    thorough: bool,
    progress: Progress = lambda done, total: None,
    small: int = SMALL,
) -> Lock:
    """``plan.json``'s ``lock``: ``versions``; the checkpoint's ``headers`` (hash of its config and
    of all tensors' names, dtypes and offsets) and ``files`` (name → SHA-256); ``inputs`` likewise.

    ``files`` is None where hashing them would take time and is not requested.

    Args:
        checkpoint: opened.
        inputs: other files that the artifacts depend on: calibration texts, an imatrix.
        thorough: hash every file of the checkpoint, even where the Hub's cache names its hash.
        progress: ``progress(done, total)`` in bytes.
        small: total size in bytes up to which files are always hashed.
    """
    files = checkpoint.files()
    # Of a local folder anybody may have made the links, and the names of what they lead to.
    believed = bool(checkpoint.revision) and not thorough
    linked = [path for path in files if believed and path.is_symlink()]
    digests = {path: hub_digest(path) if path in linked else None for path in files}
    unknown = [path for path, digest in digests.items() if digest is None]
    total = sum(path.stat().st_size for path in unknown)
    known = thorough or total <= small
    done = 0
    for path in unknown if known else ():
        size = path.stat().st_size
        digests[path] = sha256_of(path) if size <= small else cached_digest(path)
        done += size
        progress(done, total)
    named: dict[str, Path] = {}  # without folders; ``text.txt#2`` is a second file of that name
    for path in inputs:
        count = sum(name.partition("#")[0] == path.name for name in named)
        named[f"{path.name}#{count + 1}" if count else path.name] = path
    home = checkpoint.path  # shards may lie in folders of it
    hashes = {
        path.relative_to(home).as_posix() if home in path.parents else path.name: digest
        for path, digest in digests.items()
        if digest
    }
    if checkpoint.remote:
        shards = checkpoint.remote.digests(thorough, progress, small)
        known = known and None not in shards.values()
        hashes |= {name: digest for name, digest in shards.items() if digest}
        hashes = dict(sorted(hashes.items()))
    return Lock(
        versions=versions(),
        checkpoint=CheckpointLock(
            headers=headers_digest(checkpoint), files=hashes if known else None
        ),
        inputs={name: sha256_of(path) for name, path in named.items()},
        adapters={
            f"{adapter.label}#{number}" if number > 1 else adapter.label: adapter.files
            for number, adapter in enumerate(checkpoint.adapters, 1)
        },
    )


def files_digest(files: Sequence[Path]) -> str | None:
    """SHA-256 over some files; None without files."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest() if files else None


def headers_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of config and shard headers: cheap, and independent of the folder."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, info in sorted(checkpoint.tensors.items()):
        row = (name, info.dtype, list(info.shape), info.file.name, info.offset, info.nbytes)
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def hub_digest(link: Path) -> str | None:
    """SHA-256 of a file from the Hub's cache, whose snapshots link to ``blobs/<sha256>``; None for
    other files.

    Small files are stored by their git hash, of 40 digits.
    """
    blob = link.resolve()
    known = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if known else None


def cached_digest(path: Path) -> str:
    """SHA-256 of a large file, cached until its size or time changes."""
    real = path.resolve()
    stat = real.stat()
    key = hashlib.sha256(str(real).encode()).hexdigest()[:16]
    entry = cache_folder("hashes") / f"{key}.json"
    facts = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
    found = json_or_empty(entry)
    if {name: found.get(name) for name in facts} == facts and "sha256" in found:
        return str(found["sha256"])
    digest = sha256_of(real)
    with suppress(OSError):  # without a cache entry it is hashed again
        write_whole(entry, json.dumps({**facts, "sha256": digest}))
    return digest


# --- --locked --------------------------------------------------------------------------------


def check_lock(name: str, before: PlanDocument, now: PlanDocument) -> None:
    """``--locked``: refuse a build whose inputs differ from those of an earlier ``plan.json``.

    Args:
        name: of the plan's file.
        before: the earlier ``plan.json``.
        now: this build's ``plan.json``, with its ``lock``.

    Raises:
        UsageError: names the differences, old and new; or the plan has no lock.
    """
    if before.lock is None or not before.lock.checkpoint.files:
        raise UsageError(
            f"{name} does not say which bytes the checkpoint had, so nothing can be held to it",
            hint="build once with --provenance, and lock to the plan.json of that",
        )
    found = list(differences(facts(before), facts(now)))
    if not found:
        return
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    raise UsageError(
        f"--locked: this would not be the build of {name}: {'; '.join(found[:SHOWN])}{more}",
        hint="the same versions, checkpoint and recipe; or leave --locked out",
    )


def facts(plan: PlanDocument) -> dict[str, Any]:
    """The parts of a plan that determine the bytes, with tensors by name."""
    return {
        **plan.model_dump(mode="json", include={"lock", "model", "prune", "quantize"}),
        "targets": {
            name: {
                "type": target.type,
                "settings": target.settings,
                "tensors": {tensor.name: tensor.grid for tensor in target.tensors},
            }
            for name, target in plan.targets.items()
        },
    }


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """A line for each leaf that is changed, removed or added."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            place = f"{where}.{key}" if where else key
            yield from differences(before.get(key), now.get(key), place)
    elif before != now:
        yield f"{where.removeprefix('lock.')} was {show(before)}, is {show(now)}"


def show(value: Any) -> str:
    """A value as text for a sentence; hashes are shortened."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"sha256 {value[:12]}…"
    if value is None:
        return "not there"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


# --- provenance.json -------------------------------------------------------------------------


def provenance(job: Job, lock: Lock, digests: Mapping[str, str]) -> dict[str, Any] | None:
    """The provenance of the written files: an in-toto Statement v1 with a SLSA provenance v1
    predicate; None where the checkpoint's hashes are not known.

    Optional fields that would differ between two builds of the same bytes are left out: times, the
    id of the run, the report (whose speeds are measured). It is not signed: a signer vouches for
    the machine (docs/reproducible.md).

    https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
    https://slsa.dev/spec/v1.0/provenance

    Args:
        job: of the build.
        lock: from ``lock_document``.
        digests: name in the build's folder → SHA-256 of the written files.
    """
    if lock.checkpoint.files is None:
        return None
    words = shlex.split(job.command)
    if words[-2:-1] == ["-o"]:  # the folder's name does not affect the files in it
        del words[-2:]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        # Each target has a folder; documents about them are beside the folders.
        "subject": [resource(name, digests[name]) for name in sorted(digests) if "/" in name],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "command": shlex.join(words),
                    "model": job.checkpoint.source,
                    **({"revision": job.checkpoint.revision} if job.checkpoint.revision else {}),
                    **({"adapters": [*lock.adapters]} if lock.adapters else {}),
                    "recipe": job.recipe.to_dict(),
                },
                "internalParameters": {
                    "system": platform.system(),
                    "processor": platform.machine(),
                },
                "resolvedDependencies": [*dependencies(job, lock)],
            },
            "runDetails": {
                "builder": {
                    "id": BUILDER,
                    "version": {
                        "packlight": lock.versions["packlight"],
                        "python": platform.python_version(),
                    },
                },
                "byproducts": [
                    resource(name, digests[name])
                    for name in sorted(digests)
                    if name == "recipe.yaml" or (name.startswith("plan") and "/" not in name)
                ],
            },
        },
    }


def resource(name: str, sha256: str, uri: str = "") -> dict[str, Any]:
    """An in-toto ResourceDescriptor."""
    return {"name": name, **({"uri": uri} if uri else {}), "digest": {"sha256": sha256}}


def dependencies(job: Job, lock: Lock) -> Iterator[dict[str, Any]]:
    """Yield checkpoint files and other inputs by hash, and libraries by package URL."""
    checkpoint = job.checkpoint
    for name, digest in (lock.checkpoint.files or {}).items():
        uri = ""
        if is_url(checkpoint.source):
            uri = f"{checkpoint.source.rstrip('/')}/{name}"
        elif checkpoint.revision:
            at = f"{checkpoint.source}/resolve/{checkpoint.revision}"
            uri = f"https://huggingface.co/{at}/{name}"
        yield resource(name, digest, uri)
    for adapter in checkpoint.adapters:
        at = f"{adapter.source}/resolve/{adapter.revision}"
        for name, digest in adapter.files.items():
            uri = f"https://huggingface.co/{at}/{name}" if adapter.revision else ""
            yield resource(f"{adapter.source}/{name}", digest, uri)
    for name, digest in lock.inputs.items():
        yield resource(name, digest)
    for name, installed in lock.versions.items():
        if name != "packlight":
            yield {"name": name, "uri": f"pkg:pypi/{name.lower()}@{installed}"}
