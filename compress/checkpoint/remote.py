"""Reads and writes folders at URLs with fsspec: ``s3://``, ``gs://``, ``file://`` and others.

A checkpoint is copied to a local cache before it is read. Protocols need fsspec's packages
(``pip install s3fs gcsfs adlfs``).
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from compress.checkpoint.hub import SMALL_FILES, WEIGHTS, weight_files
from compress.checkpoint.not_a_checkpoint import read_config
from compress.decoder.families import find_family
from compress.errors import (
    CheckpointError,
    DiskFullError,
    PacklightError,
    UsageError,
    is_disk_full,
    one_line,
    without_secrets,
)
from compress.files import file_lock, write_whole

INDEX = ".fetched.json"  # name → version tag of the local copy


def open_url(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the folder's path in it.

    Raises:
        UsageError: a protocol that fsspec does not know, or whose package is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = url.split("://")[0]
        hint = f"install fsspec's package for {protocol}://, such as s3fs, gcsfs or adlfs"
        if protocol in ("http", "https"):
            named = [part for part in url.split("/")[3:] if part != "models"]  # ModelScope's pages
            page = "/".join(named[:2])
            hint = f"of a page of the Hub give the Hub id: {page or 'OWNER/MODEL'} instead"
        raise UsageError(f"{url}: {one_line(error)}", hint=hint) from error
    except Exception as error:  # of what a chained URL opens: a damaged archive, a folder
        raise UsageError(f"{url} cannot be opened: {one_line(error)}") from error
    return fs, root.rstrip("/")


@contextmanager
def at_store(what: str, kind: type[PacklightError] = CheckpointError) -> Iterator[None]:
    """Convert what the clients of stores raise, many of which have exceptions of their own.

    Raises:
        kind: ``cannot WHAT``, with the client's reason.
        DiskFullError: the disk is full.
    """
    try:
        yield
    except PacklightError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and is_disk_full(error):
            raise DiskFullError(f"no room left to {what}") from error
        raise kind(
            f"cannot {what}: {one_line(error)}", hint="check the URL and its credentials"
        ) from error


def fingerprint_text(text: str) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def find(pattern: str) -> list[str]:
    """URLs of the folders that match a pattern and hold a ``config.json``, sorted.

    Raises:
        CheckpointError: the store cannot be listed.
        UsageError: see ``open_url``.
    """
    fs, root = open_url(pattern)
    with at_store(f"list {pattern}"):
        fs.invalidate_cache()
        found = [path for path in fs.glob(root) if fs.isfile(f"{path}/config.json")]
    return [str(fs.unstrip_protocol(path)) for path in sorted(found)]


def fetch(url: str, cache: Path) -> Path:
    """Copy the checkpoint at a URL into a local folder; unchanged files are not copied again.

    A file is fetched again when its tag (ETag or checksum, else size and time) has changed. Small
    files come first: a model that packlight does not support is refused before its gigabytes.
    Processes that fetch the same URL wait for each other.

    Args:
        url: a folder with ``config.json`` in it.
        cache: folder of the copies, one for each URL.

    Raises:
        CheckpointError: missing or not readable; the reason in one line.
        UnsupportedModelError: its ``config.json`` names a model that packlight does not support.
        DiskFullError: the disk is full.
        UsageError: see ``open_url``.
    """
    fs, root = open_url(url)
    folder = folder_of(url, root, cache)
    with copying(url, folder):
        found = listing(fs, root)
        copy_small(url, fs, found, folder)
        for single in WEIGHTS:
            if copy(fs, found, list(map(glob.escape, weight_files(folder, single))), folder):
                break
    return folder


def fetch_small(url: str, cache: Path) -> tuple[Path, Any, dict[str, dict[str, Any]]]:
    """Copy the small files of the checkpoint at a URL into a local folder.

    Returns:
        The folder; the file system of the URL; and ``listing`` of its files.

    Raises:
        PacklightError: see ``fetch``.
    """
    fs, root = open_url(url)
    folder = folder_of(url, root, cache)
    with copying(url, folder):
        found = listing(fs, root)
        copy_small(url, fs, found, folder)
        return folder, fs, found


def folder_of(url: str, root: str, cache: Path) -> Path:
    """The folder in the cache for the files at a URL."""
    name = PurePosixPath(without_secrets(root)).name  # for https:// the root is the whole URL
    return cache / f"{name}-{fingerprint_text(url)[:12]}" / name


@contextmanager
def copying(url: str, folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, and convert errors of the store and of the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    with at_store(f"fetch {url}"), file_lock(folder.parent / ".lock"):
        yield


def copy_small(url: str, fs: Any, found: dict[str, Any], folder: Path) -> None:
    """Copy the small files, and refuse a model that packlight does not support.

    Raises:
        UnsupportedModelError: by its ``config.json``.
    """
    copy(fs, found, SMALL_FILES, folder)
    find_family(read_config(folder, url))


def listing(fs: Any, root: str) -> dict[str, dict[str, Any]]:
    """File name → the store's current facts on it, not a cached listing."""
    fs.invalidate_cache()
    return {PurePosixPath(row["name"]).name: row for row in fs.ls(root, detail=True)}


def fingerprint(url: str) -> str:
    """A hash of the names and version tags at a URL: it changes with any file.

    Raises:
        CheckpointError: nothing is there, or it cannot be listed.
        UsageError: see ``open_url``.
    """
    fs, root = open_url(url)
    with at_store(f"list {url}"):
        rows = sorted((name, version_tag(row)) for name, row in listing(fs, root).items())
    return fingerprint_text(json.dumps(rows))


def copy(fs: Any, found: dict[str, Any], patterns: Sequence[str], folder: Path) -> int:
    """Fetch the files that match some patterns, except unchanged ones; returns how many match."""
    index_path = folder.parent / INDEX
    index = copied(folder)
    names = [n for n in sorted(found) if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]
    for name in names:
        if is_copied(name, found[name], folder):
            continue
        partial = folder.parent / f"{name}.partial"
        fs.get_file(found[name]["name"], str(partial))
        partial.replace(folder / name)
        index[name] = version_tag(found[name])
        write_whole(index_path, json.dumps(index))
    for stale in set(index) - set(found):  # e.g. shards of an earlier version
        (folder / stale).unlink(missing_ok=True)
    return len(names)


def copied(folder: Path) -> dict[str, str]:
    """Name → version tag of the files that have been copied into a folder."""
    index = folder.parent / INDEX
    return json.loads(index.read_text("utf-8")) if index.is_file() else {}


def is_copied(name: str, row: dict[str, Any], folder: Path) -> bool:
    """Whether a folder has the store's current version of a file."""
    return copied(folder).get(name) == version_tag(row) and (folder / name).is_file()


def version_tag(row: dict[str, Any]) -> str:
    """A file's version tag in its store: ETag or checksum, else size and time."""
    for key in ("ETag", "etag", "md5Hash", "checksum", "content_hash"):
        if row.get(key):
            return str(row[key])
    changed = row.get("mtime") or row.get("LastModified") or row.get("last_modified") or ""
    return f"{row.get('size')}-{changed or row.get('created', '')}"


def write_text(url: str, name: str, text: str) -> None:
    """Write a small UTF-8 file into the folder at a URL.

    Raises:
        UsageError: cannot be written; the reason in one line.
    """
    fs, root = open_url(url)
    with at_store(f"write to {url}", UsageError):
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(f"{root}/{name}", text.encode())


def read_text(url: str, name: str) -> str | None:
    """A small UTF-8 file of a folder behind a URL, or None where there is none.

    Raises:
        UsageError: not readable; or see ``open_url``.
    """
    fs, root = open_url(url)
    with at_store(f"read {name} at {url}", UsageError):
        fs.invalidate_cache()
        try:
            return bytes(fs.cat_file(f"{root}/{name}")).decode("utf-8")
        except FileNotFoundError:
            return None
