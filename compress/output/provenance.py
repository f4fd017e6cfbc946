"""``provenance.json``: which files were made from which, as an in-toto Statement v1 with a SLSA
provenance v1 predicate.

Specifications: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md and
https://slsa.dev/spec/v1.0/provenance. Of its optional fields there are none that would differ
between two builds of the same bytes: no times, no id of the run, no report (whose speeds are
measured). So the same build has the same statement. It is not signed: whoever signs vouches for the
machine; docs/reproducible.md says how.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from compress.checkpoint.remote import is_url
from compress.plan.job import Job

__all__ = ["NAME", "statement"]

NAME = "provenance.json"
DOCUMENT = "https://github.com/packlight/packlight/blob/main/docs/reproducible.md"
BUILD_TYPE = f"{DOCUMENT}#build-type-v1"
BUILDER = f"{DOCUMENT}#builder"


def statement(
    job: Job, lock: Mapping[str, Any], digests: Mapping[str, str]
) -> dict[str, Any] | None:
    """The statement; None where the checkpoint's hashes are not known.

    Args:
        job: what was built.
        lock: from ``compress.output.lock.lock_document``.
        digests: SHA-256 of the files that were written, by their names in the build's folder.
    """
    if lock["checkpoint"]["files"] is None:
        return None
    return {
        "_type": "https://in-toto.io/Statement/v1",
        # Targets have folders of their own; beside them lies what is told about them.
        "subject": [resource(name, digests[name]) for name in sorted(digests) if "/" in name],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "command": without_output(job.command),
                    "model": job.checkpoint.source,
                    **({"revision": job.checkpoint.revision} if job.checkpoint.revision else {}),
                    "recipe": job.recipe.document,
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
                        "packlight": lock["versions"]["packlight"],
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


def without_output(command: str) -> str:
    """A command line but for the folder's name, which has no part in what is written there."""
    words = shlex.split(command)
    return shlex.join(words[:-2] if words[-2:-1] == ["-o"] else words)


def resource(name: str, sha256: str, uri: str = "") -> dict[str, Any]:
    """A ResourceDescriptor of in-toto."""
    return {"name": name, **({"uri": uri} if uri else {}), "digest": {"sha256": sha256}}


def dependencies(job: Job, lock: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Checkpoint files, texts and the like by hash; libraries by package URL."""
    checkpoint = job.checkpoint
    for name, digest in lock["checkpoint"]["files"].items():
        uri = ""
        if is_url(checkpoint.source):
            uri = f"{checkpoint.source.rstrip('/')}/{name}"
        elif checkpoint.revision:
            at = f"{checkpoint.source}/resolve/{checkpoint.revision}"
            uri = f"https://huggingface.co/{at}/{name}"
        yield resource(name, digest, uri)
    for name, digest in lock["inputs"].items():
        yield resource(name, digest)
    for name, version in lock["versions"].items():
        if name != "packlight":
            yield {"name": name, "uri": f"pkg:pypi/{name.lower()}@{version}"}
