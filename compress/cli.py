"""The root of the command line; importing it registers the formats."""

from __future__ import annotations

import click

from compress import __version__
from compress.commands import batch, build, doctor, inspect, push, recipes, verify
from compress.formats import FORMATS

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
*TITLES, LAST = [row.title for row in FORMATS.values()]
HELP = f"""
Compress a Hugging Face checkpoint to about 4 bits per weight, write {", ".join(TITLES)} and {LAST}
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
