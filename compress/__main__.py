"""The ``packlight`` command, and ``python -m compress``."""

from __future__ import annotations

import os
import sys
import warnings

from compress import machine


def main() -> None:
    """Exit codes 0, 1 (a gate failed), 2 (could not run), 128 + n (ended by signal n)."""
    own_streams()
    if not os.environ.get("PACKLIGHT_DEBUG"):  # what NumPy says of 0/0 is for programmers
        warnings.filterwarnings("ignore", category=RuntimeWarning)
    machine.own_process()
    try:
        from compress.cli import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # before the command line could catch it
        sys.exit(130)
    finally:
        machine.ignore_signals()


def own_streams() -> None:
    """Standard streams that are open and take every letter.

    A closed one (``2>&-``) leads nowhere: else the next file that is opened, an artifact, would
    have its number, and get what libraries print there. Where the locale has ASCII only, Python
    starts again in its UTF-8 mode: paths and messages have other letters.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    ascii_only = sys.getfilesystemencoding() in ("ascii", "us-ascii")
    if ascii_only and os.environ.get("PYTHONUTF8") != "1" and sys.orig_argv:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    main()
