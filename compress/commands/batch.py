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
    runtime_python_option,
    settings_of,
)


@click.command(short_help="Build many models with many recipes, one process per job.")
@click.argument("file", metavar="JOBS.yaml", type=click.Path(path_type=Path))
@click.option("-o", "--output", default="", metavar="DIR",
              help="Output tree, a folder or a URL; default: from JOBS.yaml.")  # fmt: skip
@click.option("--only", multiple=True, metavar="PATTERN",
              help="Jobs to run: MODEL, MODEL/RECIPE or a pattern; may be repeated.")  # fmt: skip
@click.option("--retry-failed", is_flag=True,
              help="Also run jobs that failed or were killed before.")  # fmt: skip
@click.option("--keep-going/--fail-fast", default=True, show_default=True,
              help="After a failure: continue, or start no more jobs.")  # fmt: skip
@memory_option("Limit of the predicted memory of all jobs, e.g. 3GB; default: free memory.")
@click.option("--jobs", type=click.IntRange(0), default=0, metavar="N",
              help="Maximum number of concurrent jobs; default: as many as fit.")  # fmt: skip
@click.option("--engine", type=click.Choice(("local", "ray")), default="local",
              show_default=True,
              help="Run jobs on this machine, or on the nodes of a Ray cluster.")  # fmt: skip
@click.option("--address", default="", metavar="HOST:PORT",
              help="The Ray cluster; default: RAY_ADDRESS, or a new local one.")  # fmt: skip
@click.option("--dry-run", is_flag=True,
              help="Print each job with its predicted bytes, memory and time.")  # fmt: skip
@runtime_python_option
@ci_options
@output_options
def batch(file: Path, **options: Any) -> int:
    """Build every model of JOBS.yaml with every recipe, in every format.

    Each job runs in its own process; memory and CPUs limit the number of concurrent jobs.
    Finished jobs are skipped, interrupted jobs are resumed.
    """
    console = make_console(options)
    from compress.batch.pipeline import BatchSettings
    from compress.batch.pipeline import batch as run

    fail_fast = not options["keep_going"]
    settings = settings_of(BatchSettings, options, file=file, fail_fast=fail_fast)
    return run(settings, console)
