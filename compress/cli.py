"""The root of the command line; importing it registers the formats."""

from __future__ import annotations

import click

from compress import __version__
from compress.commands import batch, build, doctor, eval, inspect, push, recipes, verify
from compress.errors import UsageError, did_you_mean, printable_line
from compress.formats import FORMATS

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
*TITLES, LAST = [row.title for row in FORMATS.values()]
HELP = f"""
Compress a Hugging Face checkpoint to about 4 bits per weight, write {", ".join(TITLES)} and {LAST}
artifacts, run each in its own runtime, and compare it with the float model.

Exit codes: 0 all gates passed, 1 a gate failed, 2 could not run, 130 interrupted.
"""


@click.command("help", short_help="Show the help of a command.")
@click.argument("command", nargs=-1)
@click.pass_context
def help_command(context: click.Context, command: tuple[str, ...]) -> None:
    """Show the help of a command, as its --help does: packlight help recipes show."""
    assert context.parent is not None
    found: click.Command = cli
    at = context.parent
    for word in command:
        group, found_in = found, None
        if isinstance(group, click.Group):
            found_in = group.get_command(at, word)
        if found_in is None:
            known = group.list_commands(at) if isinstance(group, click.Group) else []
            raise UsageError(
                f"{at.command_path} has no command {printable_line(word)}",
                hint=did_you_mean(word, known) if known else f"{at.command_path} --help",
            )
        found, at = found_in, click.Context(found_in, info_name=word, parent=at)
    click.echo(found.get_help(at))


cli = click.Group(
    "packlight",
    help=HELP,
    context_settings=CONTEXT,
    commands=[
        build.build,
        build.demo,
        batch.batch,
        verify.verify,
        eval.evaluate,
        inspect.inspect,
        inspect.fit,
        push.push,
        recipes.recipes,
        doctor.doctor,
        help_command,
    ],
)
click.version_option(__version__, "-V", "--version", message="packlight %(version)s")(cli)
