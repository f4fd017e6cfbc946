"""The ``packlight`` command, and ``python -m compress``: the exit code of every ending."""

from __future__ import annotations

import os
import sys

from compress import machine


def main() -> None:
    """Exit codes 0, 1 (a gate failed), 2 (could not run), 128 + n (ended by signal n)."""
    machine.own_process()
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # before the command line could catch it
        sys.exit(130)
    finally:
        machine.ignore_signals()


def run(arguments: list[str]) -> int:
    """Run a command line and translate every ending into its exit code."""
    import click

    from compress.cli import cli
    from compress.console import print_error
    from compress.errors import PacklightError

    try:
        code = cli.main(arguments, prog_name="packlight", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except PacklightError as error:
        if os.environ.get("PACKLIGHT_DEBUG"):
            raise
        print_error(error)
        print_notes(error)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort) as ending:
        # Click makes an Abort of a KeyboardInterrupt.
        if not print_notes(ending.__cause__ or ending, "interrupted; "):
            click.echo("interrupted; nothing half-written was left behind", err=True)
        return 130
    except SystemExit as ending:
        print_notes(ending)
        if ending.code != 1:
            raise
        # Click's answer to a closed stdout (`packlight inspect … | head`) is 1, which here says
        # that a gate failed; in shells a closed pipe is 141, 128 + SIGPIPE.
        return 141
    except OSError as error:
        if os.environ.get("PACKLIGHT_DEBUG"):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print_error(PacklightError(f"{where}{error.strerror or error}"))
        print_notes(error)
        return 2
    except Exception as error:
        if os.environ.get("PACKLIGHT_DEBUG"):
            raise
        name = type(error).__name__
        line = (str(error).strip().splitlines() or [""])[0]
        hint = "this is a bug in packlight; PACKLIGHT_DEBUG=1 shows where"
        print_error(PacklightError(f"{name}: {line}", hint))
        print_notes(error)
        return 2


def print_notes(ending: BaseException, prefix: str = "") -> bool:
    """Say what a build with ``--resume`` left (``compress.output.folder.work_folder`` notes it)."""
    import click

    notes = getattr(ending, "__notes__", [])
    for note in notes:
        click.echo(f"{prefix}{note}", err=True)
    return bool(notes)


if __name__ == "__main__":
    main()
