"""Every error that a user can get, as a tree.

    PacklightError                exit code 2: could not run
    ├── UsageError                conflicting options, a path that does not exist
    │   └── OutputExistsError     the output exists and --overwrite was not given
    ├── RecipeError               a recipe that does not validate; names the path of the key
    ├── CheckpointError           a file on disk that is damaged, incomplete or unsafe
    ├── UnsupportedModelError     an unsupported architecture or setting, or remote code
    ├── GridError                 a tensor that a number format cannot hold
    ├── RuntimeMissingError       a package that would execute the artifact is not installed
    ├── ArtifactError             an artifact that its runtime refuses or that cannot be read
    ├── PublishError              the Hub cannot be reached, or refuses an upload
    └── DiskFullError             the disk is full, before or while writing

A failed gate is not an error: the work was done and the verdict is "failed" (exit code 1).
Ctrl-C is Python's own KeyboardInterrupt (exit code 130).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = [
    "ArtifactError",
    "CheckpointError",
    "DiskFullError",
    "GridError",
    "OutputExistsError",
    "PacklightError",
    "PublishError",
    "RecipeError",
    "RuntimeMissingError",
    "UnsupportedModelError",
    "UsageError",
    "check_utf8",
    "did_you_mean",
    "first_line",
    "is_disk_full",
    "one_line",
    "printable_line",
    "reading",
    "visible",
    "without_secrets",
]


class PacklightError(Exception):
    """An error for the user: one line on what is wrong and why, and a hint what to type.

    Args:
        message: what and why, one line, no trailing period needed.
        hint: the next step, printed after ``hint:``; empty for none.

    Example:
        >>> import packlight
        >>> try:
        ...     packlight.get_grid("Q4_L")
        ... except packlight.PacklightError as error:
        ...     error.message
        "there is no grid 'Q4_L'"
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = without_secrets(message)
        self.hint = without_secrets(hint)
        super().__init__(self.message)


class UsageError(PacklightError):
    """Conflicting options, or a path that does not exist."""


class OutputExistsError(UsageError):
    """The output exists, and ``overwrite`` was not set."""


class RecipeError(PacklightError):
    """A recipe that does not validate; the message starts with the key's path."""


class CheckpointError(PacklightError):
    """A checkpoint that is damaged, incomplete, unsafe or inconsistent with its config."""


class UnsupportedModelError(PacklightError):
    """An architecture or a setting that packlight does not support."""


class GridError(PacklightError):
    """A tensor whose shape or values a grid cannot hold."""


class RuntimeMissingError(PacklightError):
    """The package that would execute an artifact is not installed."""


class ArtifactError(PacklightError):
    """An artifact that cannot be read, or that its runtime refuses."""


class PublishError(PacklightError):
    """The Hub cannot be reached, or refuses an upload."""


class DiskFullError(PacklightError):
    """The disk is full."""


# --- parts of messages -------------------------------------------------------------------------


def did_you_mean(word: str, known: Iterable[str], listed: str = "one of") -> str:
    """The hint for an unknown word: the nearest known one, or else all of them."""
    import difflib

    words = list(known)
    near = difflib.get_close_matches(word, words, 1)
    return f"did you mean {near[0]}?" if near else f"{listed}: {', '.join(words)}"


def check_utf8(name: str) -> None:
    """Refuse a file name that is not UTF-8, which no report can hold.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        readable = name.encode("utf-8", "backslashreplace").decode()
        raise UsageError(
            f"the name {readable} is not UTF-8", hint="give it another name"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name."""
    return (without_secrets(str(error)).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """An exception's whole message on one line of bounded length."""
    return " ".join(without_secrets(str(error)).split())[:200] or type(error).__name__


@contextmanager
def reading(
    what: str, kind: type[PacklightError] = ArtifactError, hint: str = ""
) -> Iterator[None]:
    """Convert a parser's exceptions on an untrusted file to errors that the file is damaged.

    Packlight's and the system's errors are not converted.

    Raises:
        kind: ``what`` is damaged, with the parser's reason, or needs more memory than there is.
    """
    try:
        yield
    except (PacklightError, OSError):
        raise
    except MemoryError as error:
        raise kind(f"{what} takes more memory than there is to read it") from error
    except RecursionError as error:
        raise kind(f"{what} is damaged: nested too deeply", hint) from error
    except Exception as error:  # a library may raise anything
        raise kind(f"{what} is damaged: {type(error).__name__}, {one_line(error)}", hint) from error


def is_disk_full(error: OSError) -> bool:
    """Whether an error means a full disk, an exceeded quota or file size limit."""
    numpys = error.errno is None and "requested and" in str(error)  # ndarray.tofile's
    return numpys or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# --- untrusted names, and locations with passwords ------------------------------------------------

LINE = 400  # most characters of a printed line

# The part of a URL before the host. A secret may have slashes and spaces in it; digits between a
# colon and a slash are a port.
CREDENTIALS = re.compile(
    r"([a-z][a-z0-9+.-]{0,30}://)(?!\[)(?:[^/?#\s@:]{0,300}:(?!\d{1,5}(?:[/?#\s:'\",)]|$))(?=\S)[^\n@]{0,300}@)?"
    r"(?:[^/?#\s@]{0,300}@)*",
    re.IGNORECASE,
)
CONTAINERS = ("abfs://", "abfss://", "wasb://", "wasbs://")  # Azure's: CONTAINER@ACCOUNT
QUERY = re.compile(r"(://(?:(?!://)[^\s?#'\"<>])*)[?#](?:[^\s'\"<>=]*=[^\s'\"<>]*|[^\s'\"<>]{20,})")
# Of a web page all of it; in a store ? may stand for any character of a name.
OPAQUE = re.compile(
    r"(https?://(?:(?!://)[^\s?#'\"<>])*[?#]|://(?:(?!://)[^\s?#'\"<>])*#)[^\s'\"<>]+",
    re.IGNORECASE,
)
PARAMETER = re.compile(
    r"([?&;][\w.-]{0,60}(?:sig|token|passw|secret|credential|delegation|session|key)[\w.-]{0,60}=)"
    r"[^&;\s'\"<>]+",
    re.IGNORECASE,
)
# Stores without ports, so that digits and a slash begin a secret; locations with a typing error in
# the scheme, or without one; tokens of the Hub.
STORES = re.compile(r"\b(s3[an]?://|gs://)[^/?#\s@:]{0,300}:[^\n@]{0,300}@", re.IGNORECASE)
MISTYPED = re.compile(
    r"((?:^|(?<=[\s'\"(=]))(?:[a-z][a-z0-9+.-]{0,30}:[/\\]{1,2}|//)?)[^/\\?#\s@:'\"]{1,300}:[^\s@/]{1,300}@"
    r"(?=[\w-]+\.|\[|localhost|[\w-]+[/\\]|[\w-]+:\d)",
    re.IGNORECASE,
)
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def without_secrets(text: str) -> str:
    """Remove user names, passwords and signed queries from a location, or any text with URLs.

    Applied to every URL that is printed, stored or uploaded: ``Checkpoint.source``, the message of
    a ``PacklightError``, every line of a ``Console``.

    Example:
        >>> without_secrets("s3://KEY:SECRET@bucket/model?X-Amz-Signature=abc")
        's3://bucket/model'
    """
    if "://" in text:
        text = STORES.sub(r"\1", text)
        text = QUERY.sub(r"\1", CREDENTIALS.sub(_without_user, text))
        text = OPAQUE.sub(lambda found: found[1][:-1], text)
    if "@" in text:
        text = MISTYPED.sub(_without_user, text)
    if "hf_" in text:
        text = HUB_TOKEN.sub("hf_\N{HORIZONTAL ELLIPSIS}", text)
    return PARAMETER.sub("\\1\N{HORIZONTAL ELLIPSIS}", text) if "=" in text else text


def _without_user(found: re.Match[str]) -> str:
    """The scheme of a match, with Azure's container."""
    user = found[0][len(found[1]) :]
    return found[0] if found[1].lower() in CONTAINERS and ":" not in user else found[1]


def visible(text: str) -> str:
    """Replace characters that are not visible, except the line feed: terminal escapes, changes of
    writing direction, lone surrogates.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def printable_line(text: str, most: int = LINE) -> str:
    """A text as one visible line of bounded length, without secrets."""
    line = without_secrets(visible(text).replace("\n", " "))
    return line if len(line) <= most else f"{line[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
