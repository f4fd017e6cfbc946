"""``packlight verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compress.commands.options import (
    ci_options,
    eval_option,
    gate_option,
    hub_of,
    hub_options,
    make_console,
    output_options,
    progress_option,
    threads_option,
)


@click.command(short_help="Run an artifact in its runtime and compare it with the float model.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--baseline", required=True, metavar="MODEL", help="The float checkpoint.")
@eval_option
@click.option("--task", "tasks", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Multiple-choice questions, one JSON object a line with question, choices and "
                   "answer (an index from 0); may be repeated.")  # fmt: skip
@gate_option
@click.option("--windows", type=click.IntRange(2), default=16, show_default=True,
              help="Windows of text to score.")  # fmt: skip
@click.option("--sequence-length", type=click.IntRange(16), default=512, show_default=True,
              help="Tokens in a window.")  # fmt: skip
@threads_option
@progress_option
@ci_options
@hub_options
@output_options
def verify(artifact: Path, **options: Any) -> int:
    """Run ARTIFACT (a .gguf, an ONNX folder, a .mlpackage, or a build's folder) in its runtime
    and compare it with the float model."""
    console = make_console(
        options["as_json"], options["quiet"], options["verbose"], options["progress_file"]
    )
    console.begin("load libraries")  # takes seconds
    from compress import pipeline
    from compress.ci_files import CiFiles
    from compress.settings import VerifySettings
    from exporters import SHIPYARD

    settings = VerifySettings(
        artifact=artifact,
        baseline=options["baseline"],
        eval_text=options["eval_text"],
        tasks=options["tasks"],
        gates=options["gates"],
        windows=options["windows"],
        sequence_length=options["sequence_length"],
        threads=options["threads"],
        ci_files=CiFiles(options["junit"], options["summary"]),
        hub=hub_of(options),
    )
    return pipeline.verify(settings, SHIPYARD, console)
