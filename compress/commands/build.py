"""``packlight build``, and ``packlight demo``, a build of the bundled checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from compress.commands.options import (
    adapter_option,
    device_names,
    eval_option,
    format_option,
    gate_option,
    imatrix_titles,
    make_console,
    max_memory_option,
    output_options,
    recipe_option,
    regression_options,
    run_options,
    set_option,
    settings_of,
    threads_option,
)
from compress.console import Console
from compress.formats import FORMATS

if TYPE_CHECKING:
    from compress.build.decide import Decision
    from compress.build.pipeline import Ready


@click.command()
@click.argument("model")
@adapter_option
@recipe_option
@format_option
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
              help="Output folder; default: ./MODEL-RECIPE.")  # fmt: skip
@set_option
@click.option("--calibration", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Calibration text or JSONL, for solvers that use input statistics; may be "
                   "repeated; default: from the recipe.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), metavar="N",
              help="Seed of the choice of calibration passages.")  # fmt: skip
@click.option("--imatrix", type=click.Path(path_type=Path), metavar="FILE",
              help=f"Read importance from an imatrix file ({imatrix_titles()}) instead of "
                   "computing it from texts.")  # fmt: skip
@click.option("--save-imatrix", type=click.Path(path_type=Path), metavar="FILE",
              help="Also write the importance to an imatrix file.")  # fmt: skip
@click.option("--prune", default="", metavar="METHOD:AMOUNT",
              help="Prune before quantizing: depth:3 removes three blocks, ffn:10% a tenth of the "
                   "channels of every MLP, ffn:2048 all but 2048 of them, heads:25% a quarter of "
                   "the key-value heads.")  # fmt: skip
@click.option("--save-checkpoint", type=click.Path(path_type=Path), metavar="DIR",
              help="Also write the pruned model as a Hugging Face checkpoint.")  # fmt: skip
@click.option("--allow-dense", is_flag=True,
              help="Allow sparsity in formats that store zeros like other weights.")  # fmt: skip
@click.option("--force", is_flag=True,
              help="Build what is refused otherwise: palettes of few bits whose codes are chosen "
                   "without calibration, or in packages for a GPU.")  # fmt: skip
@eval_option
@gate_option
@click.option("--budget", default="", metavar="SIZE",
              help="Maximum size of each target's file, e.g. 1.8GiB or 1.8GB; the grid of each "
                   "tensor is chosen to minimize the model's error within it.")  # fmt: skip
@click.option("--budget-memory", default="", metavar="SIZE",
              help="Maximum memory: file, KV cache at --context, activations.")  # fmt: skip
@click.option("--device", default="", metavar="NAME", shell_complete=device_names,
              help="Budget: the memory limit of one app on a device, e.g. iphone-14.")  # fmt: skip
@click.option("--plan", type=click.Path(path_type=Path), metavar="FILE",
              help="Use the grids of this plan.json of an earlier build.")  # fmt: skip
@click.option("--locked", is_flag=True,
              help="Fail unless versions, checkpoint and recipe match the plan: --plan, or "
                   "plan.json in the output folder; with the recipe.yaml beside it, unless -r "
                   "names another.")  # fmt: skip
@click.option("--provenance", is_flag=True,
              help="Hash all files of the checkpoint, also large ones, for provenance.json and "
                   "--locked.")  # fmt: skip
@click.option("--context", type=click.IntRange(32), metavar="N",
              help="Positions of the KV cache for memory figures and budgets; of longrope models, "
                   "for which artifacts are made.")  # fmt: skip
@click.option("--hub-id", default="", metavar="ID",
              help="Name of a local model on the Hub, for apps: swift-transformers gets the "
                   "tokenizer by it.")  # fmt: skip
@regression_options
@threads_option
@max_memory_option
@click.option("--dry-run", is_flag=True, help="Print the plan and its bytes; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an output folder that packlight made.")
@click.option("--resume", is_flag=True,
              help="Resume this build after an interruption, and keep its files if it is "
                   "interrupted again.")  # fmt: skip
@click.option("--no-verify", is_flag=True, help="Write artifacts without running them.")
@click.option("--keep-baseline", type=click.Path(path_type=Path), metavar="DIR",
              help="Cache the float model's log-probabilities in this folder, for other builds "
                   "of the same model.")  # fmt: skip
@run_options
def build(model: str, output: Path | None, **options: Any) -> int:
    """Build verified artifacts from MODEL, a local folder, a Hub id or a URL.

    \b
    packlight build ./my-checkpoint -o out
    packlight build microsoft/Phi-3-mini-4k-instruct -f gguf --set targets.gguf.type=Q4_0
    """
    console = make_console(options)
    console.begin("load libraries")  # takes seconds
    from compress.build import pipeline
    from compress.build.decide import BuildSettings, plan_of
    from compress.report.words import finish

    plan = options["plan"]
    if options["locked"]:
        plan = plan or plan_of(output)
        named = click.get_current_context().get_parameter_source("recipe")
        if named is ParameterSource.DEFAULT and (plan.parent / "recipe.yaml").is_file():
            options["recipe"] = str(plan.parent / "recipe.yaml")
    settings = settings_of(
        BuildSettings, options, model=model, output=output, plan=plan,
        verify=not options["no_verify"],
    )  # fmt: skip
    if settings.dry_run:
        print_dry_run(*pipeline.rehearse(settings, console), console)
        return 0
    built = pipeline.build(settings, console)
    return finish(built.report, built.folder, console)


def print_dry_run(decision: Decision, ready: Ready | None, console: Console) -> None:
    """Print the plan with its bytes, the choices for a budget, and the planned verification."""
    from compress.plan.document import print_plan
    from compress.verify.scorer import describe_verification

    job = ready.job if ready else decision.job
    print_plan(job, console)
    if ready and ready.budgeted:
        from compress.allocation.explain import print_budgets

        print_budgets(ready.budgeted, console)
    if decision.settings.verify:
        console.data(describe_verification(decision.job, job.plans))


@click.command(short_help="Build and verify every format from the bundled checkpoint.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("packlight-demo"),
              show_default=True, metavar="DIR", help="Output folder.")  # fmt: skip
@format_option
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace the output folder of an earlier demo.")
@output_options
def demo(output: Path, **options: Any) -> int:
    """Build and verify every format whose libraries are installed, from the small bundled
    checkpoint."""
    console = make_console(options)
    console.begin("load libraries")  # takes seconds
    from compress.build.decide import BuildSettings
    from compress.demo import model_path
    from compress.report.words import finish

    settings = BuildSettings(
        model=str(model_path()),
        source="packlight-demo",
        output=output,
        formats=options["formats"] or tuple(n for n, row in FORMATS.items() if row.installed),
        threads=options["threads"],
        overwrite=options["overwrite"],
    )
    from compress.build import pipeline

    built = pipeline.build(settings, console)
    return finish(built.report, built.folder, console)
