"""``packlight doctor``."""

from __future__ import annotations

from typing import Any

import click

from compress.commands.options import make_console, output_options


@click.command()
@output_options
def doctor(**options: Any) -> int:
    """Check versions, runtimes, CPUs, memory and disk. Exit code 2 when something is missing."""
    from compress.commands import doctor_checks as checks

    console = make_console(options)
    return checks.doctor(console)
