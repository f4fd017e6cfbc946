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


@click.command(short_help="Show the contents of a checkpoint or an artifact; reads no weights.")
@click.argument("target", metavar="MODEL|ARTIFACT")
@hub_options
@output_options
def inspect(target: str, **options: Any) -> int:
    """Show the contents of a checkpoint or an artifact, without reading its weights."""
    from compress.commands.inspection import print_all
    from compress.plan.facts import describe

    console = make_console(options)
    print_all(describe(target, {key: options[key] for key in HUB}), console)
    return 0


@click.command(short_help="Estimate memory and maximum speed on phones; runs nothing.")
@click.argument("target", metavar="MODEL|ARTIFACT")
@adapter_option
@click.option("--device", metavar="NAME", shell_complete=device_names,
              help="Show one device, e.g. iphone-14; default: all devices.")  # fmt: skip
@click.option("--memory", metavar="SIZE", help="Memory limit instead of a device's, e.g. 3GiB.")
@click.option("--context", type=click.IntRange(1), metavar="N",
              help="Positions in the KV cache; default: 2048 or the model's limit.")  # fmt: skip
@recipe_option
@set_option
@format_option
@hub_options
@output_options
def fit(target: str, device: str | None, memory: str | None, **options: Any) -> int:
    """Estimate memory and maximum speed on phones; runs nothing.

    Memory is the sum of weights, KV cache and an allowance for activations; the speeds are the
    upper bound given by memory bandwidth, and what is likely. Exit code 1 if nothing fits.
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
