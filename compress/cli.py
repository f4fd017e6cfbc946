"""The command line: the only file that knows both the workshop and the shipyards.

Heavy imports live inside the commands: ``packlight --help`` loads click and nothing more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from compress import __version__
from compress.console import Console, parse_bytes, print_error
from compress.errors import PacklightError, UsageError

F = TypeVar("F", bound=Callable[..., Any])
FORMATS = ("gguf", "onnx", "coreml")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def run(arguments: list[str]) -> int:
    """Run a command line and translate every ending into its exit code."""
    try:
        code = cli.main(arguments, prog_name="packlight", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except PacklightError as error:
        if os.environ.get("PACKLIGHT_DEBUG"):
            raise
        print_error(error)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing half-written was left behind", err=True)
        return 130
    except SystemExit as ending:
        if ending.code != 1:
            raise
        # Click's answer to a closed stdout (`packlight inspect … | head`) is 1, which here says
        # that a gate failed; shells know the reader's going away as 141, 128 + SIGPIPE.
        return 141
    except OSError as error:
        if os.environ.get("PACKLIGHT_DEBUG"):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print_error(PacklightError(f"{where}{error.strerror or error}"))
        return 2
    except Exception as error:
        if os.environ.get("PACKLIGHT_DEBUG"):
            raise
        name = type(error).__name__
        line = (str(error).strip().splitlines() or [""])[0]
        hint = "this is a bug in packlight; PACKLIGHT_DEBUG=1 shows where"
        print_error(PacklightError(f"{name}: {line}", hint))
        return 2


def output_options(command: F) -> F:
    """``--json``, ``-q``, ``-v``: shared by the commands that print results."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Tell more on stderr."),
        click.option("-q", "--quiet", is_flag=True, help="Print paths only."),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    ):
        command = option(command)
    return command


def hub_options(command: F) -> F:
    """Where a Hub id is looked up; ``HF_*`` variables are honoured too."""
    for option in (
        click.option("--cache-dir", metavar="DIR", help="Hub cache; default HF_HUB_CACHE."),
        click.option("--token", help="Hub token; default HF_TOKEN or the stored login."),
        click.option("--revision", help="Branch, tag or commit of a Hub model."),
    ):
        command = option(command)
    return command


def recipe_names(*_: Any) -> list[str]:
    """Shipped recipes, for shell completion."""
    import recipes

    return recipes.names()


def make_console(as_json: bool, quiet: bool, verbose: bool) -> Console:
    if as_json and quiet:
        raise UsageError("--json and --quiet exclude each other")
    return Console("json" if as_json else "quiet" if quiet else "human", verbose)


recipe_option = click.option(
    "-r", "--recipe", default="phone-4bit", show_default=True, metavar="NAME|FILE",
    shell_complete=recipe_names, help="A shipped recipe or a YAML file.",
)  # fmt: skip
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Override a key of the recipe, e.g. targets.gguf.type=Q5_K_M.",
)  # fmt: skip
format_option = click.option(
    "-f", "--format", "formats", multiple=True, type=click.Choice(FORMATS),
    help="Only this target; may be repeated.",
)  # fmt: skip
threads_option = click.option(
    "--threads", type=click.IntRange(0), default=0, metavar="N",
    help="CPU threads; default: what the process may use.",
)  # fmt: skip
eval_option = click.option(
    "--eval-text", type=click.Path(path_type=Path), metavar="FILE",
    help="UTF-8 text to score on; default: a built-in held-out text.",
)  # fmt: skip


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, "-V", "--version", message="packlight %(version)s")
def cli() -> None:
    """Compress a Hugging Face checkpoint to about 4 bits per weight, write GGUF, ONNX and Core ML
    artifacts, run each in its own runtime, and compare it with the float model.

    Exit codes: 0 all gates passed, 1 a gate failed, 2 could not run, 130 interrupted.
    """


@cli.command()
@click.argument("model")
@recipe_option
@format_option
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder to make; default ./MODEL-RECIPE.")  # fmt: skip
@set_option
@click.option("--calibration", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Text or JSONL for solvers that look at inputs; may be repeated; default: the "
                   "recipe's.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), metavar="N",
              help="Of the choice of calibration passages.")  # fmt: skip
@click.option("--imatrix", type=click.Path(path_type=Path), metavar="FILE",
              help="Importance from llama.cpp's imatrix (GGUF) instead of texts.")  # fmt: skip
@click.option("--save-imatrix", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the importance as llama.cpp reads it.")  # fmt: skip
@click.option("--prune", default="", metavar="METHOD:AMOUNT|auto",
              help="Before quantizing: depth:3 drops three blocks, ffn:10% a tenth of every MLP, "
                   "ffn:2048 narrows it to 2048, heads:25% drops key-value heads; auto: as a "
                   "budget needs.")  # fmt: skip
@click.option("--save-checkpoint", type=click.Path(path_type=Path), metavar="DIR",
              help="Write the pruned model as a Hugging Face checkpoint, too.")  # fmt: skip
@click.option("--allow-dense", is_flag=True,
              help="Sparsity also in formats that store zeros like other weights.")  # fmt: skip
@eval_option
@click.option("--budget", default="", metavar="SIZE",
              help="Bytes of each target's file, e.g. 1.8GiB or 1.8GB: every tensor gets the grid "
                   "that serves the model best within them.")  # fmt: skip
@click.option("--budget-memory", default="", metavar="SIZE",
              help="The same for memory: file, KV cache at --context, activations.")  # fmt: skip
@click.option("--device", default="", metavar="NAME", shell_complete=lambda *_: _device_names(),
              help="The memory budget that one app has on a device, e.g. iphone-14.")  # fmt: skip
@click.option("--sweep", default="", metavar="SIZES|auto",
              help="Several budgets at once, e.g. 1.6GiB,1.8GiB,2.0GiB: a curve of size and "
                   "quality, its ends built.")  # fmt: skip
@click.option("--plan", type=click.Path(path_type=Path), metavar="FILE",
              help="Grids as in an earlier build's plan.json; nothing is measured.")  # fmt: skip
@click.option("--context", type=click.IntRange(32), metavar="N",
              help="Positions of the KV cache that memory is told for.")  # fmt: skip
@threads_option
@click.option("--dry-run", is_flag=True, help="Print the plan and its bytes; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an output that packlight made.")
@click.option("--no-verify", is_flag=True, help="Write only; no runtime is started.")
@hub_options
@output_options
def build(model: str, output: Path | None, **options: Any) -> int:
    """Make verified artifacts from MODEL, a local folder or a Hub id.

    \b
    packlight build ./my-checkpoint -o out
    packlight build microsoft/Phi-3-mini-4k-instruct -f gguf --set targets.gguf.type=Q4_0
    """
    from compress import pipeline
    from compress.settings import BuildSettings
    from exporters import SHIPYARD

    console = make_console(options["as_json"], options["quiet"], options["verbose"])
    budget = any(options[key] for key in ("budget", "budget_memory", "device"))
    if sum((budget, bool(options["sweep"]), options["plan"] is not None)) > 1:
        raise UsageError("a budget, --sweep and --plan exclude each other")
    settings = BuildSettings(
        model=model,
        output=output,
        recipe=options["recipe"],
        overrides=options["overrides"],
        formats=options["formats"],
        eval_text=options["eval_text"],
        calibration=options["calibration"],
        seed=options["seed"],
        imatrix=options["imatrix"],
        save_imatrix=options["save_imatrix"],
        budget=options["budget"],
        budget_memory=options["budget_memory"],
        device=options["device"],
        sweep=options["sweep"],
        plan=options["plan"],
        prune=options["prune"],
        save_checkpoint=options["save_checkpoint"],
        allow_dense=options["allow_dense"],
        context=options["context"],
        threads=options["threads"],
        dry_run=options["dry_run"],
        overwrite=options["overwrite"],
        verify=not options["no_verify"],
        hub={key: options[key] for key in ("revision", "token", "cache_dir")},
    )
    return pipeline.build(settings, SHIPYARD, console)


@cli.command(short_help="Build and verify all three formats from the bundled checkpoint.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("packlight-demo"),
              show_default=True, metavar="DIR", help="Folder to make.")  # fmt: skip
@format_option
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo.")
@output_options
def demo(output: Path, **options: Any) -> int:
    """Build and verify all three formats from the small bundled checkpoint."""
    from compress import pipeline
    from compress.demo import model_path
    from compress.settings import BuildSettings
    from exporters import SHIPYARD

    console = make_console(options["as_json"], options["quiet"], options["verbose"])
    settings = BuildSettings(
        model=str(model_path()),
        source="packlight-demo",
        output=output,
        formats=options["formats"],
        threads=options["threads"],
        overwrite=options["overwrite"],
    )
    return pipeline.build(settings, SHIPYARD, console)


@cli.command(short_help="Run an artifact in its runtime and compare it with the float model.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--baseline", required=True, metavar="MODEL", help="The float checkpoint.")
@eval_option
@click.option("--task", "tasks", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Multiple-choice questions, one JSON object a line with question, choices and "
                   "answer (an index from 0); may be repeated.")  # fmt: skip
@click.option("--gate", "gates", multiple=True, metavar="KEY=VALUE",
              help='A limit, e.g. kl_divergence="<=0.06"; may be repeated.')  # fmt: skip
@click.option("--windows", type=click.IntRange(2), default=16, show_default=True,
              help="Windows of text to score.")  # fmt: skip
@click.option("--sequence-length", type=click.IntRange(16), default=512, show_default=True,
              help="Tokens in a window.")  # fmt: skip
@threads_option
@hub_options
@output_options
def verify(artifact: Path, **options: Any) -> int:
    """Run ARTIFACT (a .gguf, an ONNX folder, a .mlpackage, or a build's folder) in its runtime
    and compare it with the float model."""
    from compress import pipeline
    from compress.settings import VerifySettings
    from exporters import SHIPYARD

    console = make_console(options["as_json"], options["quiet"], options["verbose"])
    settings = VerifySettings(
        artifact=artifact,
        baseline=options["baseline"],
        eval_text=options["eval_text"],
        tasks=options["tasks"],
        gates=options["gates"],
        windows=options["windows"],
        sequence_length=options["sequence_length"],
        threads=options["threads"],
        hub={key: options[key] for key in ("revision", "token", "cache_dir")},
    )
    return pipeline.verify(settings, SHIPYARD, console)


@cli.command(short_help="Show what a checkpoint or an artifact holds; no weight is read.")
@click.argument("target", metavar="MODEL|ARTIFACT")
@hub_options
@output_options
def inspect(target: str, **options: Any) -> int:
    """Show what a checkpoint or an artifact holds, without reading its weights."""
    from compress import inspection
    from exporters import get_exporter

    console = make_console(options["as_json"], options["quiet"], options["verbose"])
    hub = {key: options[key] for key in ("revision", "token", "cache_dir")}
    return inspection.inspect(target, get_exporter, hub, console)


@cli.command(short_help="Will it fit on a phone, and how fast can it be: arithmetic.")
@click.argument("target", metavar="MODEL|ARTIFACT")
@click.option("--device", metavar="NAME", shell_complete=lambda *_: _device_names(),
              help="One device, e.g. iphone-14; default: the whole table.")  # fmt: skip
@click.option("--memory", metavar="SIZE", help="Any other limit, e.g. 3GiB.")
@click.option("--context", type=click.IntRange(1), metavar="N",
              help="Positions in the KV cache; default 2048 or the model's limit.")  # fmt: skip
@recipe_option
@set_option
@format_option
@hub_options
@output_options
def fit(target: str, device: str | None, memory: str | None, **options: Any) -> int:
    """Will it fit on a phone, and how fast can it be: arithmetic, nothing is run.

    Counts weights, KV cache and an allowance for activations; the speed is the bound that memory
    bandwidth sets. Exit code 1 when nothing fits.
    """
    from compress import inspection
    from exporters import get_exporter

    if device and memory:
        raise UsageError("--device and --memory exclude each other")
    console = make_console(options["as_json"], options["quiet"], options["verbose"])
    try:
        limit = parse_bytes(memory) if memory else None
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from error
    return inspection.fit(
        target,
        get_exporter,
        console,
        device=device,
        memory=limit,
        context=options["context"],
        recipe=options["recipe"],
        overrides=options["overrides"],
        formats=options["formats"],
        hub={key: options[key] for key in ("revision", "token", "cache_dir")},
    )


def _device_names() -> list[str]:
    from compress.footprint import devices

    return list(devices())


@cli.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List, show and check recipes."""
    if context.invoked_subcommand is None:
        context.invoke(recipes_list)


@recipes.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def recipes_list(as_json: bool = False) -> None:
    """The recipes that ship with packlight."""
    from compress.recipe import describe_all

    rows = describe_all()
    console = make_console(as_json, False, False)
    if console.mode == "json":
        console.result([{"name": name, "description": text} for name, text in rows])
        return
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        console.data(f"{name.ljust(width)}  {text}")


@recipes.command("show")
@click.argument("name", shell_complete=recipe_names)
def recipes_show(name: str) -> None:
    """Print a recipe, ready to be saved and changed."""
    from compress.recipe import read

    click.echo(read(name), nl=False)


@recipes.command("check")
@click.argument("file")
def recipes_check(file: str) -> None:
    """Validate a recipe file; exit code 2 when it is not valid."""
    from compress.recipe import load
    from compress.verify.gates import parse

    loaded = load(file)
    parse(loaded.gates)
    click.echo(f"{file}: valid ({', '.join(loaded.targets)})", err=True)


@recipes.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import recipes as shipped

    click.echo(shipped.schema_text(), nl=False)


@cli.command()
@output_options
def doctor(**options: Any) -> int:
    """Check versions, runtimes, CPUs, memory and disk. Exit code 2 when something is missing."""
    from compress import doctor as checks

    console = make_console(options["as_json"], options["quiet"], options["verbose"])
    return checks.doctor(console)
