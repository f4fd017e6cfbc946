"""Finds Core ML packages of a build, and says how to run one and what runs it here."""

from __future__ import annotations

import platform
import shlex
from pathlib import Path

from compress.formats import Check, Usage

CHUNKS = "chunks.json"  # in a folder of packages (``exporters.coreml.ane``)

USAGE = (
    Usage(
        "Compile it (or add the package to an Xcode project), and load it with the Swift package "
        "in `Swift/` beside it, or with `LanguageModel` of "
        "[swift-transformers](https://github.com/huggingface/swift-transformers); for its "
        "`tokenizer:`, `AutoTokenizer.from(modelFolder:)` reads the files beside the package. "
        "iOS 18 or macOS 15 and later. (`preset: iphone-ane` makes a folder of packages: "
        "`chunks.json` in it says how they follow each other.)",
        "xcrun coremlcompiler compile {path} .",
        "sh",
        shlex.quote,
        "hf download {repo} --include 'coreml/*' --local-dir .\n"
        "xcrun coremlcompiler compile {path} .",
    ),
)


def find(path: Path) -> list[Path]:
    """The ``.mlpackage`` at a path, or those in a folder or in a build's folder; likewise a folder
    of packages for the Neural Engine, by its ``chunks.json``."""
    if (path / CHUNKS).is_file():
        return [path]
    if path.suffix == ".mlpackage":
        return [path] if path.is_dir() else []
    places = ("*.mlpackage", f"*/{CHUNKS}", "coreml/*.mlpackage", f"coreml/*/{CHUNKS}")
    found = (file for place in places for file in path.glob(place))
    return sorted(file.parent if file.name == CHUNKS else file for file in found)


def checks() -> list[Check]:
    """Check what executes packages on this system."""
    if platform.system() == "Darwin":
        release = platform.mac_ver()[0]
        fits = int(release.split(".")[0] or 0) >= 15
        return [Check("Core ML", f"macOS {release}", fits, "stateful models need macOS 15")]
    return [Check("Core ML", "packlight's MIL evaluator (no Core ML on this system)", True)]
