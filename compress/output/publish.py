"""``packlight push``: uploads a finished build's folder to the Hugging Face Hub as one commit.

Uses huggingface_hub's client: ``HF_TOKEN`` or ``hf auth login``, ``HF_ENDPOINT``,
``HF_HUB_OFFLINE``. Uploads ``SHA256SUMS`` and the files that it lists, after checking their
digests. Large files are uploaded first, then all are committed at once: an interruption leaves the
repository unchanged, and the next run uploads only what is missing.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.console import Console, format_bytes
from compress.errors import ArtifactError, PublishError, UsageError, one_line, without_secrets
from compress.files import read_bounded
from compress.formats import hub_path
from compress.output.checksums import NAME, checksum_line, files_in, read_checksums, refuse_links

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

    from compress.report.report import Report

__all__ = ["PushSettings", "push"]

CARD = "README.md"
FINISHED = ("report.json", CARD, "plan.json", NAME)
"""Files of every finished build, written last."""


@dataclass(frozen=True)
class PushSettings:
    """Settings of ``packlight push``: one field for each option of the same name."""

    folder: Path
    repo_id: str
    private: bool = False
    revision: str = ""
    create_pr: bool = False
    card: Path | None = None
    message: str = ""
    allow_failed: bool = False
    dry_run: bool = False


def push(settings: PushSettings, console: Console) -> int:
    """Check the folder, then upload it; returns 0.

    Raises:
        UsageError: not a repository's name, not a finished build, or, without ``allow_failed``, one
            whose gates failed.
        ArtifactError: files that differ from ``SHA256SUMS``, or are symbolic links.
        PublishError: the Hub cannot be reached or refuses the upload.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    check_name(settings.repo_id)
    report = read_report(settings)
    operations = checked_operations(settings, report, console)
    if settings.card is None and "/" not in report.model.source:
        console.warning(
            f"the card's base model is {report.model.source}, a folder's name; "
            "--card uploads another card"
        )
    total = sum(operation.upload_info.size for operation in operations)
    what = f"{len(operations)} files, {format_bytes(total)}"
    url = ""
    if not settings.dry_run:
        if console.mode != "human" or not sys.stderr.isatty():
            disable_progress_bars()
        with warnings.catch_warnings(record=True) as caught:
            url = without_secrets(upload(settings, operations, report))
        for warning in caught:  # among them the Hub's warnings about the card
            console.warning(" ".join(str(warning.message).split()))
    console.result(
        {
            "repo_id": settings.repo_id,
            "verdict": report.verdict,
            "files": [operation.path_in_repo for operation in operations],
            "bytes": total,
            "url": url or None,
        }
    )
    for operation in operations:
        console.detail(f"{operation.path_in_repo}: {format_bytes(operation.upload_info.size)}")
    if settings.dry_run:
        console.data(f"{settings.repo_id}: would get {what}")
    else:
        console.data(f"{url}  ({what})")
        console.path(url)
    return 0


def check_name(repo_id: str) -> None:
    """Check the name of a repository.

    Raises:
        UsageError: the name is invalid.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id, re.ASCII):
        raise UsageError(f"{repo_id} is no repository of the Hub", hint="write USER/NAME")


def read_report(settings: PushSettings) -> Report:
    """The report of a folder that may be published.

    Raises:
        UsageError, ArtifactError: see ``push``.
    """
    from compress.report.report import Report

    folder = settings.folder
    for name in FINISHED:
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} is not a finished build: it has no {name}",
                hint="the folder that packlight build -o made",
            )
    report = Report.load(folder / "report.json")
    verdict = report.verdict
    if verdict != "passed" and not settings.allow_failed:
        what = "was not verified" if verdict == "not verified" else "failed its gates"
        raise UsageError(f"{folder} {what}, so it is not pushed", hint="--allow-failed")
    return report


def checked_operations(
    settings: PushSettings, report: Report, console: Console
) -> list[CommitOperationAdd]:
    """A commit operation for each file of a build, after checking its digest.

    Files have the places in which loaders look for them by a repository's id (``hub_path``); the
    card names the repository, and ``SHA256SUMS`` has these places and the card's digest.

    Raises:
        ArtifactError: a file is missing, or differs from ``SHA256SUMS``.
        UsageError: ``--card`` cannot be read.
    """
    from huggingface_hub import CommitOperationAdd

    folder = settings.folder
    listed = read_checksums(folder / NAME)
    if unlisted := sorted({*FINISHED} - {NAME, *listed}):
        raise ArtifactError(f"{folder} is damaged: {unlisted[0]} is not in {NAME}")
    refuse_links(folder, [*listed, NAME])
    for name in files_in(folder):
        if name not in listed:
            console.warning(f"{name} is not in {NAME}, so it is not pushed")
    sizes = {name: (folder / name).stat().st_size for name in listed if (folder / name).is_file()}
    if missing := sorted(set(listed) - set(sizes)):
        raise ArtifactError(f"{folder} is damaged: {missing[0]} is missing", hint="build it again")
    card = CommitOperationAdd(CARD, card_text(settings, report))
    operations = []
    done, total = 0, sum(sizes.values())
    with console.progress("read checksums") as update:
        for name, digest in listed.items():
            operation = CommitOperationAdd(hub_path(name), folder / name)
            if operation.upload_info.sha256.hex() != digest:
                raise ArtifactError(
                    f"{folder} is damaged: {name} is not as {NAME} has it",
                    hint=f"packlight verify {folder} --checksums; or build it again",
                )
            operations.append(card if name == CARD else operation)
            done += sizes[name]
            update(done, total)
    operations.sort(key=lambda operation: operation.path_in_repo)
    sums = "".join(
        checksum_line(operation.path_in_repo, operation.upload_info.sha256.hex())
        for operation in operations
    )
    return [*operations, CommitOperationAdd(NAME, sums.encode())]


def card_text(settings: PushSettings, report: Report) -> bytes:
    """The repository's ``README.md``: the given card, or the build's with the repository's id.

    Raises:
        UsageError: the given card cannot be read.
    """
    from compress.report.pages import model_card

    if settings.card is None:
        return model_card(report, settings.repo_id).encode()
    try:
        return read_bounded(settings.card)
    except OSError as error:
        raise UsageError(f"--card {settings.card}: {error.strerror}") from error


def upload(settings: PushSettings, operations: Sequence[CommitOperationAdd], report: Report) -> str:
    """Create the repository if needed, and commit; returns the URL of the commit or pull request.

    Raises:
        PublishError: the Hub cannot be reached or refuses the upload.
    """
    from huggingface_hub import HfApi, errors

    # Large files: of huggingface_hub 0.x. HTTPError: of requests, httpx or httpx2, by its version.
    also = (getattr(errors, "HTTPError", OSError), getattr(errors, "XetError", OSError))
    api = HfApi(library_name="packlight", library_version=report.tool.version)
    try:
        return commit(api, settings, operations, report)
    # Errors of the client: HTTP and connection errors, an invalid name or a card that the Hub
    # refuses (ValueError), a failed upload of a large file (RuntimeError around an HTTP error, or
    # XetError).
    except (OSError, ValueError, RuntimeError, *also) as error:
        raise explain(error, settings) from error


def commit(
    api: HfApi,
    settings: PushSettings,
    operations: Sequence[CommitOperationAdd],
    report: Report,
) -> str:
    """Send the requests of ``upload``."""
    repo_id = settings.repo_id
    api.create_repo(repo_id, private=settings.private or None, exist_ok=True)
    if settings.revision and not settings.revision.startswith("refs/"):
        api.create_branch(repo_id, branch=settings.revision, exist_ok=True)
    formats = ", ".join(f"{found.format} {found.type}" for found in report.artifacts)
    done = api.create_commit(
        repo_id,
        operations,
        commit_message=settings.message or f"{formats} ({report.recipe['name']})",
        commit_description=f"Written by packlight {report.tool.version}.",
        revision=settings.revision or None,
        create_pr=settings.create_pr,
    )
    return done.pr_url or str(done.commit_url)


# HTTP status → its meaning on the Hub, and a hint.
ANSWERS = {
    401: ("the Hub does not accept the token", "set HF_TOKEN, or hf auth login"),
    403: ("the token may not write there", "a token with write access to that account"),
    404: ("the Hub has no such account, repository or branch", "check the name"),
}
AGAIN = "run it again; what was uploaded is not uploaded twice"


def explain(error: Exception, settings: PushSettings) -> PublishError:
    """The error to raise for an exception of the client."""
    from huggingface_hub import errors, get_token

    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    kinds = {kind.__name__ for kind in type(cause).__mro__}
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.OfflineModeIsEnabled):
        why, hint = "HF_HUB_OFFLINE is set", "unset it"
    elif kinds & {"ConnectionError", "Timeout", "TransportError"}:  # of requests, or of httpx
        why, hint = "no connection to the Hub", AGAIN
    elif (
        error is not cause
    ):  # from the large-file store, whose responses do not depend on the token
        why, hint = f"{one_line(error)} ({status or type(cause).__name__})", AGAIN
    elif status == 401 and not get_token():
        why, hint = "the Hub wants to know who you are", ANSWERS[401][1]
    elif status in ANSWERS:
        why, hint = ANSWERS[status]
    elif status is not None and (status >= 500 or status == 429):
        why, hint = f"the Hub answered {status}", AGAIN
    else:
        why, hint = one_line(cause), ""
    return PublishError(f"cannot push to {settings.repo_id}: {why}", hint=hint)
