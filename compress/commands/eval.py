"""``packlight eval``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from compress.commands.options import (
    adapter_option,
    make_console,
    max_memory_option,
    run_options,
    settings_of,
    threads_option,
)
from compress.errors import UsageError


@click.command("eval", short_help="Run lm-evaluation-harness tasks on artifacts and float model.")
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path), metavar="[ARTIFACT]...")
@click.option("--baseline", metavar="MODEL", required=True, help="The float checkpoint.")
@click.option("--tasks", "names", metavar="NAME,…", required=True,
              help="Tasks and groups of the harness (mmlu, arc_*), YAML files of its form, or "
                   ".jsonl files as packlight verify --task takes them.")  # fmt: skip
@click.option("--num-fewshot", type=click.IntRange(0), metavar="N",
              help="Worked examples in each prompt; default: each task's own number.")  # fmt: skip
@click.option("--limit", type=click.FloatRange(0, min_open=True), metavar="N",
              help="Only the first N documents of each task; below 1: their share.")  # fmt: skip
@click.option("--apply-chat-template", is_flag=True,
              help="Render every prompt with the tokenizer's chat template.")  # fmt: skip
@click.option("--confirm-run-unsafe-code", is_flag=True,
              help="Allow tasks that execute the code that the model writes, such as humaneval "
                   "and mbpp: without isolation.")  # fmt: skip
@click.option("--gate", "gates", multiple=True, metavar="TASK.METRIC<=LIMIT",
              help='Limit of a metric, or with _drop of its loss against the float model, e.g. '
                   '"mmlu.acc_drop<=0.01"; may be repeated.')  # fmt: skip
@click.option("--context", type=click.IntRange(16), metavar="N",
              help="Positions that prompt and answer may take; default: what every artifact holds, "
                   "at most 4096.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
              help="Write report.json and report.html into this folder.")  # fmt: skip
@adapter_option
@threads_option
@max_memory_option
@run_options
def evaluate(artifacts: tuple[Path, ...], **options: Any) -> int:
    """Run tasks of EleutherAI's lm-evaluation-harness on each ARTIFACT (a .gguf, an ONNX folder, a
    .mlpackage, or a build's folder), in its runtime, and on the float model; without ARTIFACT on
    the float model alone. Needs packlight[eval]."""
    names = tuple(name.strip() for name in options["names"].split(",") if name.strip())
    if not names:
        raise UsageError("--tasks names no task")
    if (limit := options["limit"]) and limit >= 1 and limit != int(limit):
        raise UsageError(f"--limit {limit}: a whole number, or a share below 1")
    console = make_console(options)
    console.begin("load libraries")  # takes seconds
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars: the console has its own
    from compress.build import evaluation
    from compress.build.decide import EvalSettings
    from compress.report.words import finish

    settings = settings_of(EvalSettings, options, artifacts=artifacts, tasks=names)
    return finish(evaluation.evaluate(settings, console), None, console)
