"""``packlight batch``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compress.commands.options import (
    ci_options,
    make_console,
    memory_option,
    output_options,
    settings_of,
)


@click.command(short_help="Build many models with many recipes, each job in its own process.")
@click.argument("file", metavar="JOBS.yaml", type=click.Path(path_type=Path))
@click.option("-o", "--output", default="", metavar="DIR",
              help="The output tree, a folder or a URL; default: as the file says.")  # fmt: skip
@click.option("--only", multiple=True, metavar="PATTERN",
              help="These jobs: MODEL, MODEL/RECIPE or a pattern; may be repeated.")  # fmt: skip
@click.option("--retry-failed", is_flag=True,
              help="Also the jobs that were killed or could not run before.")  # fmt: skip
@click.option("--keep-going/--fail-fast", default=True, show_default=True,
              help="After a failure: go on, or start no more jobs.")  # fmt: skip
@memory_option("Bound what all jobs hold together, by prediction, e.g. 3GB; default: what is free.")
@click.option("--jobs", type=click.IntRange(0), default=0, metavar="N",
              help="Jobs at once, at most; default: as many as fit.")  # fmt: skip
@click.option("--engine", type=click.Choice(("local", "ray")), default="local",
              show_default=True,
              help="Where jobs run: this machine, or the nodes of a Ray cluster.")  # fmt: skip
@click.option("--address", default="", metavar="HOST:PORT",
              help="The Ray cluster; default: RAY_ADDRESS, or one started here.")  # fmt: skip
@click.option("--dry-run", is_flag=True,
              help="Print every job with its predicted bytes, memory and time.")  # fmt: skip
@ci_options
@output_options
def batch(file: Path, **options: Any) -> int:
    """Build every model of JOBS.yaml with every recipe, in every format.

    Each job runs in a process of its own, as many at once as the machine's memory and CPUs allow.
    Jobs that were finished before are left out, half-done ones are continued.
    """
    console = make_console(options)
    from compress.batch.pipeline import BatchSettings
    from compress.batch.pipeline import batch as run

    fail_fast = not options["keep_going"]
    settings = settings_of(BatchSettings, options, file=file, fail_fast=fail_fast)
    return run(settings, console)
