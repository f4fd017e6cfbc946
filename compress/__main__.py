"""The ``packlight`` command and ``python -m compress``: runs a command and sets the exit code."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING

from compress import machine

if TYPE_CHECKING:
    import click


def main(arguments: list[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: default: those of the process; then its streams, signals and allocator are
            configured for the command.

    Returns:
        0 (all gates passed), 1 (a gate failed), 2 (could not run), 128 + n (ended by signal n).
    """
    own = arguments is None
    if own:
        own_streams()
        if not os.environ.get("PACKLIGHT_DEBUG"):  # NumPy's warnings of 0/0 are of no use to users
            warnings.filterwarnings("ignore", category=RuntimeWarning)
        machine.own_process()
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    try:
        import click

        from compress.cli import cli
        from compress.commands.endings import in_words  # imported early: memory may be short later
        from compress.console import print_error, print_json_error
        from compress.errors import PacklightError, check_utf8, printable_line
    except KeyboardInterrupt:  # raised before the command line can catch it
        return 130
    try:
        for argument in words:
            check_utf8(argument)
        code = cli.main(words, prog_name="packlight", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except PacklightError as error:
        if os.environ.get("PACKLIGHT_DEBUG"):
            raise
        print_error(error, as_json)
        print_notes(error)
        return error.exit_code
    except click.ClickException as error:
        vars(error)["message"] = printable_line(error.message)
        error.show()
        if as_json:
            print_json_error(PacklightError(error.format_message(), usage_hint(error)))
        return 2
    except (KeyboardInterrupt, click.Abort) as ending:
        # Click converts a KeyboardInterrupt to Abort.
        if not print_notes(ending.__cause__ or ending, "interrupted; "):
            click.echo("interrupted; nothing half-written was left behind", err=True)
        if as_json:
            print_json_error(PacklightError("interrupted"))
        return 130
    except SystemExit as ending:
        print_notes(ending)
        if ending.code != 1:
            raise
        # Click exits with 1 for a closed stdout (`packlight inspect … | head`), but here 1 means a
        # failed gate; shells report a closed pipe as 141, 128 + SIGPIPE.
        return 141
    except Exception as error:
        if os.environ.get("PACKLIGHT_DEBUG"):
            raise
        print_error(in_words(error), as_json)
        print_notes(error)
        return 2
    finally:
        if own:
            machine.ignore_signals()


def usage_hint(error: click.ClickException) -> str:
    """The hint of click's usage errors: the command that prints the help."""
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context else ""


def print_notes(ending: BaseException, prefix: str = "") -> bool:
    """Print the notes of an exception, such as the folder that ``--resume`` can continue from."""
    import click

    notes = getattr(ending, "__notes__", [])
    for note in notes:
        click.echo(f"{prefix}{note}", err=True)
    return bool(notes)


def own_streams() -> None:
    """Ensure that the standard streams are open and accept any character.

    A closed stream (``2>&-``) is opened on the null device: otherwise the next opened file, perhaps
    an artifact, would get its descriptor and receive what libraries print. In an ASCII locale
    Python is restarted in UTF-8 mode.
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
    sys.exit(main())
