"""``packlight push``: a finished build's folder becomes a commit on the Hugging Face Hub.

Through huggingface_hub's own client: ``HF_TOKEN`` or ``hf auth login``, ``HF_ENDPOINT``,
``HF_HUB_OFFLINE``. What is uploaded are the files that ``SHA256SUMS`` lists, each with the digest
that stands there, and ``SHA256SUMS``. Large files go first, and then all appear in one commit: after
an interruption the repository is as before, and the next run uploads only what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checksums import NAME, files_in, read_checksums
from compress.config_json import read_json
from compress.console import Console, format_bytes
from compress.errors import ArtifactError, PacklightError, PublishError, UsageError, one_line

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

__all__ = ["PushSettings", "push"]

FINISHED = ("report.json", "README.md", "plan.json", NAME)
"""What a folder without its last step, or another folder, does not have."""


@dataclass(frozen=True)
class PushSettings:
    """What ``packlight push`` was asked for; the options of the same names."""

    folder: Path
    repo_id: str
    private: bool = False
    revision: str = ""
    create_pr: bool = False
    message: str = ""
    allow_failed: bool = False
    dry_run: bool = False


def push(settings: PushSettings, console: Console) -> int:
    """Check the folder, then upload it; 0, or an exception.

    Raises:
        UsageError: not a finished build, or one whose gates failed, without ``allow_failed``.
        ArtifactError: files that are not as ``SHA256SUMS`` has them.
        PublishError: the Hub cannot be reached or does not take it.
    """
    report = read_report(settings)
    operations = checked_operations(settings.folder, console)
    total = sum(operation.upload_info.size for operation in operations)
    what = f"{len(operations)} files, {format_bytes(total)}"
    url = ""
    if not settings.dry_run:
        url = upload(settings, operations, report)
    console.result(
        {
            "repo_id": settings.repo_id,
            "verdict": report["verdict"],
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


def read_report(settings: PushSettings) -> Mapping[str, Any]:
    """The report of a folder that may be published.

    Raises:
        UsageError: see ``push``.
    """
    folder = settings.folder
    for name in FINISHED:
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} is not a finished build: it has no {name}",
                hint="the folder that packlight build -o made",
            )
    report = read_json(folder / "report.json")
    verdict = report.get("verdict")
    if verdict != "passed" and not settings.allow_failed:
        what = "was not verified" if verdict == "not verified" else "failed its gates"
        raise UsageError(f"{folder} {what}, so it is not pushed", hint="--allow-failed")
    return report


def checked_operations(folder: Path, console: Console) -> list[CommitOperationAdd]:
    """An addition for each file of a build; each is read once, for its digest.

    Raises:
        ArtifactError: a file is missing, or has other bytes than ``SHA256SUMS`` says.
    """
    from huggingface_hub import CommitOperationAdd

    listed = read_checksums(folder / NAME)
    for name in files_in(folder):
        if name not in listed:
            console.warning(f"{name} is not in {NAME}, so it is not pushed")
    sizes = {name: (folder / name).stat().st_size for name in listed if (folder / name).is_file()}
    if missing := sorted(set(listed) - set(sizes)):
        raise ArtifactError(f"{folder} is damaged: {missing[0]} is missing", hint="build it again")
    operations = []
    done, total = 0, sum(sizes.values())
    with console.progress("read checksums") as update:
        for name, digest in listed.items():
            operation = CommitOperationAdd(name, folder / name)
            if operation.upload_info.sha256.hex() != digest:
                raise ArtifactError(
                    f"{folder} is damaged: {name} is not as {NAME} has it",
                    hint=f"packlight verify {folder} --checksums; or build it again",
                )
            operations.append(operation)
            done += sizes[name]
            update(done, total)
    return [*operations, CommitOperationAdd(NAME, folder / NAME)]


def upload(
    settings: PushSettings, operations: Sequence[CommitOperationAdd], report: Mapping[str, Any]
) -> str:
    """Make the repository if there is none, and commit; the URL of the commit or pull request.

    Raises:
        PublishError: the Hub cannot be reached or does not take it.
    """
    import requests
    from huggingface_hub import HfApi, errors

    api = HfApi(library_name="packlight", library_version=report["tool"]["version"])
    try:
        return commit(api, settings, operations, report)
    # What the client raises: HTTP errors, a name that is none or a card that the Hub refuses
    # (ValueError), a large file that did not get through (RuntimeError around an HTTP error).
    except (requests.RequestException, errors.OfflineModeIsEnabled, ValueError, RuntimeError) as error:
        raise explain(error, settings) from error


def commit(
    api: HfApi,
    settings: PushSettings,
    operations: Sequence[CommitOperationAdd],
    report: Mapping[str, Any],
) -> str:
    """The requests of ``upload``."""
    repo_id = settings.repo_id
    api.create_repo(repo_id, private=settings.private or None, exist_ok=True)
    if settings.revision and not settings.revision.startswith("refs/"):
        api.create_branch(repo_id, branch=settings.revision, exist_ok=True)
    formats = ", ".join(f"{found['format']} {found['type']}" for found in report["artifacts"])
    done = api.create_commit(
        repo_id,
        operations,
        commit_message=settings.message or f"{formats} ({report['recipe']['name']})",
        commit_description=f"Written by packlight {report['tool']['version']}.",
        revision=settings.revision or None,
        create_pr=settings.create_pr,
    )
    return done.pr_url or str(done.commit_url)


def explain(error: Exception, settings: PushSettings) -> PacklightError:
    """One clear line for what the client raised."""
    import requests
    from huggingface_hub import errors, get_token

    where = settings.repo_id
    cause = error.__cause__ if isinstance(error, RuntimeError) else error
    if isinstance(error, errors.OfflineModeIsEnabled) or is_offline():
        return PublishError(f"cannot push to {where}: HF_HUB_OFFLINE is set", hint="unset it")
    if isinstance(cause, requests.ConnectionError | requests.Timeout):
        return PublishError(
            f"cannot push to {where}: no connection to the Hub",
            hint="run it again; what was uploaded is not uploaded twice",
        )
    response = getattr(cause, "response", None)
    if response is None:
        return PublishError(f"cannot push to {where}: {one_line(error)}")
    status = response.status_code
    if status == 401:
        known = "the Hub does not accept the token" if get_token() else "no token was found"
        return PublishError(f"cannot push to {where}: {known}", hint="set HF_TOKEN, or hf auth login")
    if status == 403:
        return PublishError(
            f"cannot push to {where}: the token may not write there",
            hint="a token with write access to that account",
        )
    if status == 404:
        revision = f" or no branch {settings.revision}" if settings.revision else ""
        return PublishError(
            f"cannot push to {where}: the Hub has no such account or repository{revision}",
            hint="check the name; USER/NAME or ORGANIZATION/NAME",
        )
    if status >= 500 or status == 429:
        file = f" ({error})" if error is not cause else ""
        return PublishError(
            f"cannot push to {where}: the Hub answered {status}{file}",
            hint="run it again; what was uploaded is not uploaded twice",
        )
    return PublishError(f"cannot push to {where}: {one_line(cause or error)}")


def is_offline() -> bool:
    """Whether the user forbade the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
