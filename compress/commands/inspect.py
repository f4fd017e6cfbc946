"""``packlight inspect`` and ``packlight fit``."""

from __future__ import annotations

from typing import Any

import click

from compress.commands.options import (
    HUB,
    adapter_option,
    device_names,
    format_option,
    hub_options,
    make_console,
    output_options,
    read_size,
    recipe_option,
    set_option,
)


@click.command(short_help="Show what a checkpoint or an artifact holds; no weight is read.")
@click.argument("target", metavar="MODEL|ARTIFACT")
@hub_options
@output_options
def inspect(target: str, **options: Any) -> int:
    """Show what a checkpoint or an artifact holds, without reading its weights."""
    from compress.commands.inspection import print_all
    from compress.plan.facts import describe

    console = make_console(options)
    print_all(describe(target, {key: options[key] for key in HUB}), console)
    return 0


@click.command(short_help="Will it fit on a phone, and how fast can it be: arithmetic.")
@click.argument("target", metavar="MODEL|ARTIFACT")
@adapter_option
@click.option("--device", metavar="NAME", shell_complete=device_names,
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
    from compress.commands.inspection import print_fit
    from compress.plan.fit import fit_rows

    console = make_console(options)
    rows = fit_rows(
        target,
        device=device,
        memory=read_size("--memory", memory) if memory else None,
        context=options["context"],
        recipe=options["recipe"],
        overrides=options["overrides"],
        formats=options["formats"],
        hub={key: options[key] for key in HUB},
        adapters=options["adapters"],
    )
    console.result({"rows": rows})
    print_fit(rows, console)
    return 0 if any(row["verdict"] != "too large" for row in rows) else 1
