"""A checkpoint's folder before anything of it is read: it is a stranger's.

What the folder leads to is read, copied into artifacts and published. So links lead into the folder
itself or into the blobs of the Hub's cache, files are plain files, and those that are read whole
are of bounded size.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from compress.errors import CheckpointError
from compress.files import LARGEST_TEXT

__all__ = ["check_folder"]

# Read whole, by packlight or transformers.
TEXTS = re.compile(
    r".*\.(json|jinja|model|bpe|tiktoken)|(merges|vocab)\.txt|README\.md|LICENSE.*", re.IGNORECASE
)
TEMPLATES = "additional_chat_templates"  # the one folder inside that transformers looks into


def check_folder(folder: Path) -> None:
    """Refuse links that lead elsewhere, what is no plain file, and texts that are too large.

    Hidden files and folders inside are not looked at: nothing reads them.

    Raises:
        CheckpointError: the first file that is refused.
    """
    home = os.path.realpath(folder)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name, place = entry.name, os.path.realpath(entry.path)
        try:
            found = os.stat(place)
        except FileNotFoundError:  # a link that leads nowhere: as if it were not there
            continue
        except OSError as error:  # links that lead to each other, among others
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
        is_folder = stat.S_ISDIR(found.st_mode)
        if name.startswith(".") or (is_folder and name != TEMPLATES):
            continue
        if entry.is_symlink() and not (place.startswith(f"{home}/") or is_blob(home, place)):
            raise CheckpointError(
                f"{name} is a link that leads out of the checkpoint's folder",
                hint="packlight would publish what it leads to; put the file itself there",
            )
        if is_folder:
            check_folder(folder / name)
        elif not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{name} is not a plain file", hint="a pipe, or a device?")
        elif found.st_size > LARGEST_TEXT and TEXTS.fullmatch(name):
            raise CheckpointError(
                f"{name} has {found.st_size:,} bytes, more than the {LARGEST_TEXT:,} that it may"
            )


def is_blob(home: str, place: str) -> bool:
    """Whether a link leads into the Hub's cache, where snapshots/COMMIT/NAME leads to
    blobs/DIGEST: that of the same repository, or any from a folder of links.
    """
    above, blobs = os.path.split(os.path.dirname(place))
    snapshots = os.path.dirname(home) == os.path.join(above, "snapshots")
    return blobs == "blobs" and (snapshots or os.path.basename(above).startswith("models--"))
