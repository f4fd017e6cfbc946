"""The command line: the root of ``compress/commands``, and the exit code of every error.

It and the commands load the table of formats.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import click

from compress import __version__
from compress.commands import batch, build, doctor, inspect, push, recipes, verify
from compress.console import print_error
from compress.errors import (
    DiskFullError,
    PacklightError,
    check_utf8,
    first_line,
    is_disk_full,
    told,
)
from compress.files import full_disk

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def run(arguments: list[str]) -> int:
    """Run a command line and translate every ending into its exit code."""
    try:
        for argument in arguments:
            check_utf8(argument)
        code = cli.main(arguments, prog_name="packlight", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except PacklightError as error:
        if os.environ.get("PACKLIGHT_DEBUG"):
            raise
        print_error(error)
        print_notes(error)
        return error.exit_code
    except click.ClickException as error:
        error.message = told(error.message)
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
    except Exception as error:
        if os.environ.get("PACKLIGHT_DEBUG"):
            raise
        print_error(in_words(error))
        print_notes(error)
        return 2


# What libraries say where the system gives no more memory, or no more threads.
NO_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "unable to allocate", "bad_alloc",
    "failed to map segment", "can't start new thread",
)  # fmt: skip


def in_words(error: Exception) -> PacklightError:
    """The one line of what packlight does not foresee, or what the system refused."""
    said = first_line(error)
    code = error.errno if isinstance(error, OSError) else None
    no_memory = isinstance(error, MemoryError) or code == errno.ENOMEM
    if no_memory or any(words in said.lower() for words in NO_MEMORY):
        what = "" if said == type(error).__name__ else f": {said}"
        hint = "fewer --threads, a smaller --max-memory, or a higher limit (ulimit -v, -u)"
        return PacklightError(f"the system gives no more memory{what}", hint)
    if code in (errno.EMFILE, errno.ENFILE):
        return PacklightError("the system opens no more files", "a higher limit: ulimit -n 1024")
    if isinstance(error, OSError) and is_disk_full(error):
        full, hint = full_disk(Path.cwd())
        return DiskFullError(f"the disk of {full} ran full ({error.strerror or said})", hint)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return PacklightError(f"{where}{error.strerror or error}")
    if isinstance(error, UnicodeError):
        return PacklightError(f"a name or a text is not UTF-8: {said}")
    hint = "this is a bug in packlight; PACKLIGHT_DEBUG=1 shows where"
    return PacklightError(f"{type(error).__name__}: {said}", hint)


def print_notes(ending: BaseException, prefix: str = "") -> bool:
    """Say what a build with ``--resume`` left (``compress.output.folder.work_folder`` notes it)."""
    notes = getattr(ending, "__notes__", [])
    for note in notes:
        click.echo(f"{prefix}{note}", err=True)
    return bool(notes)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, "-V", "--version", message="packlight %(version)s")
def cli() -> None:
    """Compress a Hugging Face checkpoint to about 4 bits per weight, write GGUF, ONNX and Core ML
    artifacts, run each in its own runtime, and compare it with the float model.

    Exit codes: 0 all gates passed, 1 a gate failed, 2 could not run, 130 interrupted.
    """


for command in (
    build.build,
    build.demo,
    batch.batch,
    verify.verify,
    inspect.inspect,
    inspect.fit,
    push.push,
    recipes.recipes,
    doctor.doctor,
):
    cli.add_command(command)
