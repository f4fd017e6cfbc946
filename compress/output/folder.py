"""The output folder: checked, locked, written as ``.partial``, renamed.

The final name never holds a half-written output, however a build ends.

    OUTPUT.partial/new/      becomes OUTPUT
    OUTPUT.partial/old/      the OUTPUT that is being replaced
    OUTPUT.partial/state/    for ``--resume``: the build's identity, and for each target a ledger
                             (``compress.plan.weights``) and its hidden states

``state/build.json`` is written first and removed last: it distinguishes the folder from a foreign
one of that name, which is never changed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.console import format_bytes
from compress.decoder.config_json import json_or_empty
from compress.errors import (
    ArtifactError,
    DiskFullError,
    OutputExistsError,
    UsageError,
    is_disk_full,
)
from compress.files import file_lock, full_disk, real_path, write_whole
from compress.output.checksums import NAME, read_checksums, sha256_of, unlisted
from compress.plan import weights

STATE, NEW, OLD = "state", "new", "old"
RECORD = "build.json"
CARD = "README.md"
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an existing output, and one that holds files packlight did not make.

    Raises:
        OutputExistsError: it exists and is not empty, without ``overwrite``.
        UsageError: ``overwrite`` of a folder that is not a packlight output, or holds other files;
            of the current folder or a mount point, which cannot be replaced; or a foreign
            ``OUTPUT.partial``.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(output)):  # a Path has one slash of s3://
        raise UsageError(
            f"the output {output} is a URL: a build writes a folder of this machine",
            hint="packlight batch copies its jobs' folders to a URL",
        )
    place = real_path(output)
    if Path.cwd().is_relative_to(place):
        raise UsageError(
            f"the output {output} would replace the folder that you are in",
            hint="name a folder inside it, such as -o out",
        )
    if not is_work_folder(partial_folder(place)):
        raise UsageError(
            f"{partial_folder(place)} was not made by packlight, which would work there and "
            "delete it",
            hint="move it elsewhere, or choose another --output",
        )
    if place.is_symlink():
        raise UsageError(f"{output} is a link that leads to itself", hint="another --output")
    if not place.exists():
        return
    if not place.is_dir():
        raise UsageError(f"{output} is a file, not a folder")
    if place.is_mount():
        raise UsageError(
            f"{output} is a mount point, which cannot be replaced",
            hint=f"name a folder inside it, such as -o {output / 'out'}",
        )
    if not any(place.iterdir()):
        return
    if not overwrite:
        raise OutputExistsError(f"{output} exists", hint="--overwrite, or another --output")
    made = json_or_empty(place / "plan.json").get("tool")
    ours = isinstance(made, dict) and made.get("name") == "packlight"
    if not ours or not (place / NAME).is_file():
        raise UsageError(
            f"{output} was not made by packlight, so it is not overwritten",
            hint="choose another --output",
        )
    if foreign := find_foreign_file(place):
        raise UsageError(
            f"{output} holds {foreign}, which packlight did not make, so it is not overwritten",
            hint="move it elsewhere, or choose another --output",
        )


def find_foreign_file(folder: Path) -> str:
    """The first file of a build's folder that its ``SHA256SUMS`` does not list, or a changed model
    card; ``""`` for none."""
    try:
        listed = read_checksums(folder / NAME)
        found = next(iter(unlisted(folder, listed)), "")
        card = folder / CARD  # people write in it, and the rest is hashed by `verify --checksums`
        if not found and CARD in listed and card.is_file() and sha256_of(card) != listed[CARD]:
            return f"a {CARD} that was changed"
        return found
    except ArtifactError:
        return f"a {NAME} that is damaged"


def check_disk(output: Path, needed: int) -> None:
    """Refuse a disk that is too full, before any work; files of a killed build count as free.

    Raises:
        DiskFullError: fewer bytes free than the artifacts will take.
    """
    folder = real_path(output).parent
    while not folder.exists():
        folder = folder.parent
    # Disk blocks of a killed build's files; holes take none.
    partial = partial_folder(real_path(output))
    left = partial.rglob("*") if is_work_folder(partial) else ()
    free = shutil.disk_usage(folder).free + sum(path.lstat().st_blocks * 512 for path in left)
    if free < needed:
        raise DiskFullError(
            f"not enough room in {folder}: the artifacts take {format_bytes(needed)}, "
            f"{format_bytes(free)} are free",
            hint="free some space, choose another --output, or fewer formats with -f",
        )


def partial_folder(output: Path) -> Path:
    """The work folder of an output (see ``real_path``)."""
    return output.with_name(output.name + ".partial")


def is_work_folder(partial: Path) -> bool:
    """Whether a path is a build's work folder, or free; symbolic links are neither."""
    if partial.is_symlink() or not partial.is_dir():
        return not partial.is_symlink() and not partial.exists()
    inside = list(partial.iterdir())
    known = {STATE, NEW, OLD} >= {path.name for path in inside}
    if not known or any(path.is_symlink() for path in inside):
        return False
    # A build that was killed before it wrote build.json has made nothing else.
    marked = (partial / STATE / RECORD).is_file()
    return marked or all(p.is_dir() or p.name.startswith(RECORD) for p in partial.rglob("*"))


def remove(partial: Path) -> None:
    """Remove a work folder, ``build.json`` last, because the removal may be interrupted."""
    if is_work_folder(partial):
        with suppress(OSError):
            clear(partial, {partial / STATE / RECORD})
        shutil.rmtree(partial, ignore_errors=True)


def baseline_folder(output: Path) -> Path:
    """The folder of a build's baseline, reused by ``--resume``."""
    return partial_folder(real_path(output)) / STATE / "baseline"


def state_folder(folder: Path) -> Path:
    """The state folder of the build that works in ``folder`` (see ``work_folder``)."""
    return folder.parent / STATE


@dataclass(frozen=True)
class Resume:
    """How a build uses the state of an interrupted one.

    Attributes:
        identity: the settings that determine its bytes; only an equal build is continued.
        wanted: continue the state that is there, and keep this build's state if it is interrupted.
        afresh: without ``wanted``: remove a state that could be continued, without an error.
    """

    identity: Mapping[str, Any]
    wanted: bool
    afresh: bool = False

    def continues(self, partial: Path) -> bool:
        """Whether this build continues the work folder, which then has only what it can use.

        Raises:
            UsageError: another build's is there, or one that should be continued.
        """
        record = partial / STATE / RECORD
        known = json_or_empty(record)
        if self.wanted and known and known != self.identity:
            raise UsageError(
                f"{partial.name} is of another build: {difference(known, self.identity)}",
                hint="the same options again, or leave --resume out to begin afresh",
            )
        ledgers = list((partial / STATE).glob("*.ledger"))
        finished = any(weights.has_finished(path) for path in ledgers)
        if not self.wanted and not self.afresh and known == self.identity and finished:
            raise UsageError(
                f"{partial.name} holds what an interrupted build has finished",
                hint="--resume to continue it, --overwrite to begin afresh",
            )
        if self.wanted and known:
            states = [path.with_suffix(".states") for path in ledgers]
            baseline = partial / STATE / "baseline"
            clear(partial, {record, baseline, partial / NEW, *ledgers, *states})
            clear(partial / NEW, {partial / NEW / path.stem for path in ledgers})
            return True
        return False


def clear(folder: Path, exempt: Collection[Path]) -> None:
    """Remove everything in a folder except the exempt paths and their contents."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path in exempt:
            continue
        if any(path in other.parents for other in exempt):
            clear(path, exempt)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def difference(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """A text on the first key in which two builds' identities differ."""
    for key in (*wanted, *known):
        then, now = known.get(key), wanted.get(key)
        if then != now and isinstance(then, Mapping) and isinstance(now, Mapping):
            return f"{key}.{difference(then, now)}"
        if then != now:
            return f"{key} is {brief(now)}, was {brief(then)}"
    return ""


def brief(value: Any) -> str:
    """A value as text; a long one (a digest, a list of grids) is cut."""
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


@contextmanager
def work_folder(
    output: Path, resume: Resume | None = None, *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield ``OUTPUT.partial/new``; rename it to ``OUTPUT`` on success, delete it on failure.

    Args:
        output: to make.
        resume: on a failure the folder is kept where ``resume.wanted``.
        overwrite: replace an output of packlight's, even one made in the meantime.

    Raises:
        DiskFullError: the disk became full.
        UsageError: another build writes to the same output, or the place is not writable; see
            ``check_output`` and ``Resume.continues``.
    """
    place = real_path(output)
    partial = partial_folder(place)
    begun = resume or Resume({}, wanted=False, afresh=True)
    keeps = begun.wanted
    with locked(place):
        bring_back(place)
        check_output(output, overwrite=overwrite)  # another build may have ended since
        continued = begun.continues(partial)
        try:  # from here on all of it is this build's
            if not continued:
                remove(partial)
                (partial / STATE).mkdir(parents=True)
                write_whole(partial / STATE / RECORD, json.dumps(begun.identity))
            (partial / NEW).mkdir(parents=True, exist_ok=True)
            yield partial / NEW
            try:
                replace(place, partial, overwrite=overwrite)
            except (
                UsageError
            ):  # the build is complete, but another one created the output folder meanwhile
                keeps = resume is not None
                raise
            keeps = False
        except BaseException as error:
            if keeps:
                error.add_note(f"what is finished stays in {partial.name}: --resume continues it")
            if isinstance(error, OSError) and is_disk_full(error):
                left = "what is finished stays" if keeps else "nothing was left behind"
                full, hint = full_disk(place.parent)
                raise DiskFullError(
                    f"the disk of {full} ran full ({error.strerror or error})",
                    hint=f"{left}; {hint}, and run it again",
                ) from error
            raise
        finally:
            if not keeps and (place.exists() or not (partial / OLD).exists()):
                remove(partial)


def bring_back(output: Path) -> None:
    """Restore the old output, where a build was killed while it replaced it."""
    old = partial_folder(output) / OLD
    if old.is_dir() and not output.exists() and is_work_folder(partial_folder(output)):
        old.rename(output)


def replace(output: Path, partial: Path, *, overwrite: bool) -> None:
    """Rename the finished work folder to the output.

    Replaces only an empty folder or, with ``overwrite``, an output of packlight's, which is
    restored on a failure.

    Raises:
        UsageError: something else is there now (``check_output``).
    """
    try:
        (partial / NEW).rename(output)
        return
    except OSError as error:
        if error.errno not in TAKEN:
            raise
    check_output(output, overwrite=overwrite)
    try:
        output.rename(partial / OLD)
        (partial / NEW).rename(output)
    except BaseException:  # including Ctrl-C between the two
        bring_back(output)
        raise


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold ``OUTPUT.lock``, which the kernel releases with the process, even after kill -9.

    Missing parent folders are created, and removed again if they are empty at the end.

    Raises:
        UsageError: another process holds it, or the folder is not writable.
    """
    missing = [folder for folder in output.parents if not folder.exists()]
    with ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            for folder in reversed(missing):
                stack.callback(remove_if_empty, folder)
            stack.enter_context(file_lock(output.with_name(output.name + ".lock"), wait=False))
        except BlockingIOError as error:
            raise UsageError(
                f"another build is writing to {output}", hint="wait for it, or another --output"
            ) from error
        except OSError as error:
            lock = output.with_name(f"{output.name}.lock")
            there = os.path.lexists(lock) and error.errno != errno.EROFS
            raise UsageError(
                f"{lock} cannot be locked: {error.strerror}"
                if there
                else f"cannot write to {output.parent}: {error.strerror}",
                hint="move it elsewhere, or choose another --output" if there else "",
            ) from error
        yield


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing."""
    with suppress(OSError):
        folder.rmdir()
