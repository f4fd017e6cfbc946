"""The command line: the root of ``compress/commands``, and the exit code of every error.

It and the commands load the table of formats.
"""

from __future__ import annotations

import os

import click

from compress import __version__
from compress.commands import batch, build, doctor, inspect, push, recipes, verify
from compress.console import print_error
from compress.errors import PacklightError, check_utf8, told

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
HELP = """
Compress a Hugging Face checkpoint to about 4 bits per weight, write GGUF, ONNX and Core ML
artifacts, run each in its own runtime, and compare it with the float model.

Exit codes: 0 all gates passed, 1 a gate failed, 2 could not run, 130 interrupted.
"""

cli = click.Group(
    "packlight",
    help=HELP,
    context_settings=CONTEXT,
    commands=[
        build.build,
        build.demo,
        batch.batch,
        verify.verify,
        inspect.inspect,
        inspect.fit,
        push.push,
        recipes.recipes,
        doctor.doctor,
    ],
)
click.version_option(__version__, "-V", "--version", message="packlight %(version)s")(cli)


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
        vars(error)["message"] = told(error.message)
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
        from compress.commands.endings import in_words

        print_error(in_words(error))
        print_notes(error)
        return 2


def print_notes(ending: BaseException, prefix: str = "") -> bool:
    """Say what a build with ``--resume`` left (``compress.output.folder.work_folder`` notes it)."""
    notes = getattr(ending, "__notes__", [])
    for note in notes:
        click.echo(f"{prefix}{note}", err=True)
    return bool(notes)
