"""Finds Core ML packages of a build, and says how to run one and what runs it here."""

from __future__ import annotations

import platform
import shlex
from pathlib import Path

from compress.formats import Check, Usage

USAGE = (
    Usage(
        "Compile it (or add the package to an Xcode project), and load it with the Swift package "
        "in `Swift/` beside it, or with `LanguageModel` of "
        "[swift-transformers](https://github.com/huggingface/swift-transformers); for its "
        "`tokenizer:`, `AutoTokenizer.from(modelFolder:)` reads the files beside the package. "
        "iOS 18 or macOS 15 and later.",
        "xcrun coremlcompiler compile {path} .",
        "sh",
        shlex.quote,
        "hf download {repo} --include 'coreml/*' --local-dir .\n"
        "xcrun coremlcompiler compile {path} .",
    ),
)


def find(path: Path) -> list[Path]:
    """The ``.mlpackage`` at a path, or those in a folder or in a build's folder."""
    if path.suffix == ".mlpackage":
        return [path] if path.is_dir() else []
    return sorted((*path.glob("*.mlpackage"), *path.glob("coreml/*.mlpackage")))


def checks() -> list[Check]:
    """Check what executes packages on this system."""
    if platform.system() == "Darwin":
        release = platform.mac_ver()[0]
        fits = int(release.split(".")[0] or 0) >= 15
        return [Check("Core ML", f"macOS {release}", fits, "stateful models need macOS 15")]
    return [Check("Core ML", "packlight's MIL evaluator (no Core ML on this system)", True)]
