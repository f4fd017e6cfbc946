"""Writes and verifies ``SHA256SUMS``.

The format is that of GNU ``sha256sum``: 64 hexadecimal digits, a space, a space or ``*`` (binary),
and the name; in a line that begins with a backslash, line ends and backslashes of the name are
escaped.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from compress.console import Console
from compress.errors import ArtifactError, UsageError
from compress.files import open_plain, read_bounded
from compress.machine import worker_threads

__all__ = [
    "NAME",
    "Findings",
    "check_folder",
    "checksum_line",
    "folder_digests",
    "parse_checksums",
    "read_checksums",
    "refuse_links",
    "sha256_of",
    "unlisted",
    "verify",
    "write_checksums",
]

NAME = "SHA256SUMS"
HARMLESS = ".DS_Store"  # macOS writes it into folders that were opened
ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


@dataclass(frozen=True)
class Findings:
    """The differences of a folder from its ``SHA256SUMS``; names relative to it, sorted.

    Attributes:
        files: number of listed files.
        changed: listed, with another SHA-256.
        missing: listed, but not in the folder.
        extra: in the folder, but not listed.
        links: listed, but a symbolic link or below one; its target is not read.
    """

    files: int
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    links: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the folder matches its ``SHA256SUMS``."""
        return not (self.changed or self.missing or self.extra or self.links)

    def lines(self) -> list[str]:
        """A line for each difference."""
        return [
            *(f"{name}: its bytes are not those that were written" for name in self.changed),
            *(f"{name}: a link, not the file that was written" for name in self.links),
            *(f"{name}: missing" for name in self.missing),
            *(f"{name}: not in {NAME}" for name in self.extra),
        ]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits; reads it in pieces."""
    with open_plain(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 by name of every file below a folder except its ``SHA256SUMS``.

    Raises:
        ArtifactError: one is a symbolic link.
    """
    names = files_in(folder)
    refuse_links(folder, names)
    largest_first = sorted(names, key=lambda name: -(folder / name).stat().st_size)
    with ThreadPoolExecutor(worker_threads()) as pool:
        digests = pool.map(sha256_of, [folder / name for name in largest_first])
        found = dict(zip(largest_first, digests, strict=True))
    return {name: found[name] for name in names}


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write ``SHA256SUMS`` of every file except itself, sorted, as ``sha256sum -c`` reads it.

    Args:
        folder: of a build.
        known: digests of files that are already hashed.
    """
    lines = []
    for name in files_in(folder):
        digest = (known or {}).get(name) or sha256_of(folder / name)
        lines.append(checksum_line(name, digest))
    (folder / NAME).write_text("".join(lines), encoding="utf-8", newline="")


def checksum_line(name: str, digest: str) -> str:
    """A line of ``SHA256SUMS``."""
    escaped = "".join(ESCAPES.get(char, char) for char in name)
    mark = "\\" if escaped != name else ""
    return f"{mark}{digest}  {escaped}\n"


def files_in(folder: Path) -> list[str]:
    """Names of the files below a folder except its ``SHA256SUMS``, in the order of their paths."""
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path.relative_to(folder).as_posix() for path in paths if path != folder / NAME]


def links_in(folder: Path, names: Iterable[str]) -> list[str]:
    """Those names that are symbolic links, or below one: they are not files of the folder."""
    home = os.path.realpath(folder)
    return [
        name
        for name in names
        if "\0" not in name
        and os.path.realpath(folder / name) != os.path.normpath(os.path.join(home, name))
    ]


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse symbolic links, so that only files of the folder are hashed or published.

    Raises:
        ArtifactError: one of the names is a link, or below one.
    """
    if found := links_in(folder, names):
        raise ArtifactError(
            f"{folder} is damaged: {found[0]} is a link, and packlight writes none",
            hint="build it again",
        )


def unlisted(folder: Path, listed: Collection[str]) -> list[str]:
    """Names of the files below a folder that its ``SHA256SUMS`` does not list."""
    there = [name for name in files_in(folder) if PurePosixPath(name).name != HARMLESS]
    return [name for name in there if name not in listed]


def read_checksums(file: Path) -> dict[str, str]:
    """Name → digest, in the order of the file.

    Raises:
        UsageError: missing or not readable.
        ArtifactError: see ``parse_checksums``.
    """
    try:
        return parse_checksums(read_bounded(file), str(file))
    except OSError as error:
        raise UsageError(
            f"{file}: {error.strerror}", hint="--checksums takes the folder of a build"
        ) from error


def parse_checksums(content: bytes, file: str) -> dict[str, str]:
    """Name → digest, in the order of the lines.

    Args:
        content: of a ``SHA256SUMS``.
        file: names it in errors.

    Raises:
        ArtifactError: damaged: an invalid line, a name outside the folder, or a duplicate.
    """
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{file} is damaged: byte {error.start} is not UTF-8") from error
    if lines.pop() or not lines:
        raise ArtifactError(f"{file} is damaged: it does not end with a line")
    found: dict[str, str] = {}
    marks = set()
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"(\\?)([0-9a-f]{64}) ([ *])(.+)", line)
        name = unescape(match[4]) if match and match[1] else match[4] if match else ""
        place = PurePosixPath(name)
        if not match or not name or place.is_absolute() or ".." in place.parts or name in found:
            raise ArtifactError(f"{file} is damaged: line {number}")
        marks.add(match[3])
        found[name] = match[2]
    if len(marks) > 1:  # sha256sum writes one kind; this detects a flipped byte
        raise ArtifactError(f"{file} is damaged: text and binary lines")
    return found


def unescape(text: str) -> str:
    """A name without escapes; empty for a stray backslash."""
    if not re.fullmatch(r"(?:[^\\]|\\[\\nr])*", text):
        return ""
    back = {escaped: char for char, escaped in ESCAPES.items()}
    return re.sub(r"\\[\\nr]", lambda match: back[match[0]], text)


def verify(folder: Path, console: Console, *, alone: bool = True) -> bool:
    """``packlight verify --checksums``: print the differences; returns whether there are none.

    Args:
        folder: of a build.
        console: for the differences.
        alone: whether nothing else is verified, so that the result is this command's document.

    Raises:
        UsageError, ArtifactError: see ``read_checksums``.
    """
    with console.progress("read checksums") as update:
        findings = check_folder(folder, update)
    if alone or not findings.whole:
        console.result({**asdict(findings), "verdict": "passed" if findings.whole else "failed"})
    for line in findings.lines():
        console.warning(line)
    count = len(findings.lines())
    outcome = f"{findings.files} files as in" if not count else f"{count} not as in"
    console.verdict(findings.whole, f"{outcome} {folder / NAME}")
    return findings.whole


def check_folder(
    folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Findings:
    """Compare every file of a folder with its ``SHA256SUMS``.

    Args:
        folder: of a build.
        progress: ``progress(done, total)`` in bytes.

    Raises:
        UsageError, ArtifactError: see ``read_checksums``.
    """
    listed = read_checksums(folder / NAME)
    links = links_in(folder, listed)
    present = [name for name in listed if name not in links and (folder / name).is_file()]
    total = sum((folder / name).stat().st_size for name in present)
    changed, done = [], 0
    for name in present:
        if sha256_of(folder / name) != listed[name]:
            changed.append(name)
        done += (folder / name).stat().st_size
        progress(done, total)
    return Findings(
        files=len(listed),
        changed=tuple(sorted(changed)),
        missing=tuple(sorted(set(listed) - set(present) - set(links))),
        extra=tuple(sorted(unlisted(folder, listed))),
        links=tuple(sorted(links)),
    )
