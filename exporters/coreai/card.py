"""Finds Core AI bundles of a build, and says how to run one and what runs it here."""

from __future__ import annotations

from pathlib import Path

from compress.decoder.config_json import json_or_empty
from compress.errors import RuntimeMissingError
from compress.formats import Check, Usage, get_format

SWIFT = """\
import CoreAILanguageModels
import FoundationModels

let model = try await CoreAILanguageModel(resourcesAt: URL(filePath: {path}))
let session = LanguageModelSession(model: model)
print(try await session.respond(to: "Once upon a time").content)"""

USAGE = (
    Usage(
        "In Swift, with Apple's runner (github.com/apple/coreai-models): add the folder to the "
        "app's resources. iOS 27 or macOS 27 and later. `Swift/CoreAI` in the folder is a package "
        "that opens it, measures it and checks `parity.json`.",
        SWIFT,
        "swift",
        lambda path: '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"',
        "hf download {repo} --include 'coreai/*' --local-dir .",
    ),
)


def find(path: Path) -> list[Path]:
    """The bundle at a path (its folder, or the program in it), or that of a build's folder."""
    if path.suffix == ".aimodel":
        path = path.parent
    return [place for place in (path, path / "coreai") if is_bundle(place)][:1]


def is_bundle(folder: Path) -> bool:
    """Whether a folder is the bundle of a language model."""
    file = folder / "metadata.json"
    return file.is_file() and "metadata_version" in json_or_empty(file)


def check_runtime() -> None:
    """Check that coreai-core is here, which writes bundles, too.

    Raises:
        RuntimeMissingError: it is not.
    """
    if not get_format("coreai").installed:
        raise RuntimeMissingError(
            "a Core AI bundle needs coreai-core", hint="pip install 'packlight[coreai]'"
        )


def checks() -> list[Check]:
    """Whether coreai-core is here."""
    here = get_format("coreai").installed
    found = (
        "coreai-core is installed" if here else "not installed (pip install 'packlight[coreai]')"
    )
    return [Check("Core AI", found, True)]
