"""``packlight verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compress.commands.options import (
    adapter_option,
    eval_option,
    gate_option,
    make_console,
    max_memory_option,
    regression_options,
    run_options,
    settings_of,
    threads_option,
)
from compress.errors import UsageError

# Options that need a verification: refused with --checksums alone.
JUDGING = {
    "adapters": "--adapter", "gates": "--gate", "against": "--against",
    "max_regression": "--max-regression", "tasks": "--task", "junit": "--junit",
    "summary": "--summary",
}  # fmt: skip


@click.command(short_help="Run an artifact in its runtime and compare it with the float model.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--baseline", metavar="MODEL", help="The float checkpoint.")
@adapter_option
@eval_option
@click.option("--task", "tasks", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Multiple-choice questions, one JSON object per line with question, choices and "
                   "answer (an index from 0); may be repeated.")  # fmt: skip
@gate_option
@regression_options
@click.option("--checksums", is_flag=True,
              help="Compare all files of the folder ARTIFACT with its SHA256SUMS; without "
                   "--baseline, do nothing else.")  # fmt: skip
@click.option("--windows", type=click.IntRange(1), metavar="N",
              help="Number of windows of text to score; default: 16; 8 from one billion parameters "
                   "on, 4 from three billion on; from 50 million on fewer once the verdict is "
                   "certain. With 1 there are no standard errors.")  # fmt: skip
@click.option("--sequence-length", type=click.IntRange(16), default=512, show_default=True,
              metavar="N",
              help="Tokens in a window.")  # fmt: skip
@threads_option
@max_memory_option
@run_options
def verify(artifact: Path, **options: Any) -> int:
    """Run ARTIFACT (a .gguf, an ONNX folder, a .mlpackage, or a build's folder) in its runtime
    and compare it with the float model."""
    console = make_console(options)
    if options["checksums"]:
        from compress.output import checksums

        if not options["baseline"] and (judging := [key for key in JUDGING if options[key]]):
            name = JUDGING[judging[0]]
            raise UsageError(
                f"{name} needs --baseline: --checksums alone looks at the files and runs nothing"
            )
        whole = checksums.verify(artifact, console, alone=not options["baseline"])
        if not whole or not options["baseline"]:
            return 0 if whole else 1
    if not options["baseline"]:
        raise UsageError(
            "--baseline is missing: the checkpoint that ARTIFACT was made from",
            hint="or --checksums, which only looks at the files",
        )
    console.begin("load libraries")  # takes seconds
    from compress.build import verification
    from compress.build.decide import VerifySettings
    from compress.report.words import finish

    windows = options["windows"] or 0
    settings = settings_of(VerifySettings, options, artifact=artifact, windows=windows)
    return finish(verification.verify(settings, console), None, console)
