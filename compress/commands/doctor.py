"""``packlight doctor``: checks the installed packages, runtimes, memory and disk."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from compress import __version__
from compress.commands.options import make_console, output_options
from compress.console import format_bytes
from compress.formats import FORMATS, Check
from compress.machine import available_cpus, available_memory


@click.command()
@output_options
def doctor(**options: Any) -> int:
    """Check versions, runtimes, CPUs, memory and disk. Exit code 2 if a check fails."""
    console = make_console(options)
    runtimes = [check for row in FORMATS.values() for check in row.checks()]
    checks = [python(), *packages(), *runtimes, machine(), disk(), hub()]
    if console.mode == "json":
        console.result({"version": __version__, "checks": [asdict(check) for check in checks]})
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok  " if check.ok else "FAIL"
        console.data(f"{mark}  {check.name.ljust(width)}  {check.found}")
        if check.hint and not check.ok:
            console.data(f"      {' ' * width}  hint: {check.hint}")
    return 0 if all(check.ok for check in checks) else 2


def python() -> Check:
    """Check the interpreter."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", found, sys.version_info >= (3, 11), "Python 3.11 or newer")


def packages() -> list[Check]:
    """Check each dependency of the installed distribution against its declared version range."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in requires("packlight") or ()]
    except PackageNotFoundError:
        return [Check("packlight", "not installed, run from a checkout", True)]
    checks = []
    for wanted in declared:
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        hint = f'pip install "{wanted.name}{wanted.specifier}"'
        try:
            found = version(wanted.name)
            fits = wanted.specifier.contains(found, prereleases=True)
            checks.append(Check(wanted.name, found if fits else f"{found}, unfit", fits, hint))
        except PackageNotFoundError:
            checks.append(Check(wanted.name, "missing", False, hint))
    return checks


def machine() -> Check:
    """Check CPUs and memory."""
    memory = available_memory()
    found = f"{available_cpus()} CPUs, {format_bytes(memory)} of memory available"
    return Check("machine", found, memory > 1_000_000_000, "1 GB of free memory")


def disk() -> Check:
    """Check free space in the current folder."""
    free = shutil.disk_usage(Path.cwd()).free
    return Check("disk", f"{format_bytes(free)} free here", free > 1_000_000_000, "free 1 GB")


def hub() -> Check:
    """Show the Hub settings; makes no request."""
    from huggingface_hub import constants

    mode = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else constants.ENDPOINT
    return Check("Hub", f"{mode}, cache in {constants.HF_HUB_CACHE}", True)
