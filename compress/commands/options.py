"""Options shared by several commands, and their conversion to settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import exporters  # noqa: F401 -- fills the table of formats
from compress.console import Console, parse_bytes
from compress.errors import UsageError
from compress.formats import FORMATS
from compress.progress import ProgressFile

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound="DataclassInstance")


def output_options(command: F) -> F:
    """Decorator: ``--json``, ``-q``, ``-v``, for commands that print results."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Print details on stderr."),
        click.option("-q", "--quiet", is_flag=True, help="Print paths only."),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    ):
        command = option(command)
    return command


def ci_options(command: F) -> F:
    """Decorator: ``--junit`` and ``--summary``, files for a CI job."""
    for option in (
        click.option("--summary", type=click.Path(path_type=Path), metavar="FILE",
                     help="Append the table and the verdict as Markdown, e.g. to "
                          "$GITHUB_STEP_SUMMARY."),
        click.option("--junit", type=click.Path(path_type=Path), metavar="FILE",
                     help="Write the gates as JUnit XML."),
    ):  # fmt: skip
        command = option(command)
    return command


def hub_options(command: F) -> F:
    """Decorator: options of Hub downloads, in addition to the ``HF_*`` variables."""
    for option in (
        click.option("--fetch", type=click.Choice(["auto", "download", "streaming"]),
                     default="auto", show_default=True,
                     help="Weights of a Hub id or URL: download them; read them from the server "
                          "in ranges, on a disk that does not hold them; auto: download where "
                          "the disk has twice their size."),
        click.option("--cache-dir", metavar="DIR", help="Hub cache; default: HF_HUB_CACHE."),
        click.option("--token", help="Hub token; default: HF_TOKEN or the stored login."),
        click.option("--revision", help="Branch, tag or commit of a Hub model."),
    ):  # fmt: skip
        command = option(command)
    return command


RUNTIME_PYTHON = "PACKLIGHT_MLX_PYTHON"  # for children, too: exporters/mlx/card.py reads it
HUB = ("revision", "token", "cache_dir", "fetch")  # names of ``hub_options``


def recipe_names(*_: Any) -> list[str]:
    """Names of shipped recipes, for shell completion."""
    import recipes

    return recipes.names()


def device_names(*_: Any) -> list[str]:
    """Names of devices, for shell completion."""
    from compress.decoder.footprint import devices

    return list(devices())


def imatrix_titles() -> str:
    """The titles of formats with importance files (imatrix)."""
    return ", ".join(row.title for row in FORMATS.values() if row.imatrix)


def read_size(option: str, text: str) -> int:
    """Bytes from the text of a size option.

    Raises:
        UsageError: not a size.
    """
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


def make_console(options: Mapping[str, Any]) -> Console:
    """The console for ``output_options`` and ``progress_option``, closed when the command ends.

    Raises:
        UsageError: two modes at once, or a file that cannot be written.
    """
    as_json, quiet = options["as_json"], options.get("quiet", False)
    if as_json and quiet:
        raise UsageError("--json and --quiet exclude each other")
    mode = "json" if as_json else "quiet" if quiet else "human"
    file = options.get("progress_file")
    console = Console(mode, options.get("verbose", False), ProgressFile(file) if file else None)
    click.get_current_context().call_on_close(console.abandon)
    return console


def settings_of(kind: type[S], options: Mapping[str, Any], **more: Any) -> S:
    """Settings of a command from its options, with ``hub_options`` and ``ci_options`` grouped.

    Args:
        kind: a class of ``compress.build.decide``.
        options: from click.
        more: values that replace or add to them.
    """
    given = {**options, "hub": {key: options.get(key) for key in HUB}, "ci_files": None, **more}
    if options["junit"] or options["summary"]:
        from compress.report.ci import CiFiles

        given["ci_files"] = CiFiles(options["junit"], options["summary"])
    return kind(**{each.name: given[each.name] for each in fields(kind) if each.name in given})


def run_options(command: F) -> F:
    """Decorator: options of output, Hub, CI files and progress, for commands that run artifacts."""
    for add in (output_options, hub_options, ci_options, progress_option, runtime_python_option):
        command = add(command)
    return command


def regression_options(command: F) -> F:
    """Decorator: ``--against`` and ``--max-regression``."""
    return against_option(regression_option(command))


def memory_option(text: str) -> Callable[[F], F]:
    """Decorator: ``--max-memory``, in bytes, with this help text."""
    return click.option(
        "--max-memory", metavar="SIZE", help=text,
        callback=lambda _context, _option, size: read_size("--max-memory", size) if size else None,
    )  # fmt: skip


recipe_option = click.option(
    "-r", "--recipe", default="phone-4bit", show_default=True, metavar="NAME|FILE",
    shell_complete=recipe_names, help="A shipped recipe or a YAML file.",
)  # fmt: skip
adapter_option = click.option(
    "--adapter", "adapters", multiple=True, metavar="LORA[=WEIGHT]",
    help="A PEFT LoRA adapter to merge into MODEL, a folder or a Hub id, with an optional weight: "
         "my-lora=0.5; may be repeated.",
)  # fmt: skip
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Override a key of the recipe, e.g. quantize.solver=gptq; may be repeated.",
)  # fmt: skip
format_option = click.option(
    "-f", "--format", "formats", multiple=True, type=click.Choice(list(FORMATS)),
    help="Build only this format; may be repeated.",
)  # fmt: skip
gate_option = click.option(
    "--gate", "gates", multiple=True, metavar="KEY=VALUE",
    help='Limit of a metric, e.g. kl_divergence="<=0.06"; may be repeated.',
)  # fmt: skip
threads_option = click.option(
    "--threads", type=click.IntRange(0), default=0, metavar="N",
    help="Number of CPU threads; default: all CPUs that the process may use.",
)  # fmt: skip
against_option = click.option(
    "--against", type=click.Path(path_type=Path), metavar="REPORT",
    help="An earlier report.json to compare with; regressions fail the gate.",
)  # fmt: skip
regression_option = click.option(
    "--max-regression", multiple=True, metavar="METRIC=AMOUNT,…",
    help="With --against, the largest allowed regression: a share (kl=5%) or an amount "
         "(bytes=10MB); default: kl=5%,bytes=1%.",
)  # fmt: skip
eval_option = click.option(
    "--eval-text", type=click.Path(path_type=Path), metavar="FILE",
    help="UTF-8 text to score; default: a built-in held-out text.",
)  # fmt: skip
progress_option = click.option(
    "--progress-file", type=click.Path(path_type=Path), metavar="FILE",
    help="Append progress as JSON lines, for other programs.",
)  # fmt: skip
runtime_python_option = click.option(
    "--runtime-python", expose_value=False, metavar="PATH",
    callback=lambda _context, _option, path: path and os.environ.update({RUNTIME_PYTHON: path}),
    help="Python of another environment, whose libraries run what this one's cannot; default: "
         "$PACKLIGHT_MLX_PYTHON, else this one.",
)  # fmt: skip
max_memory_option = memory_option(
    "Memory limit of this process, e.g. 2GiB; default: the cgroup's limit or free memory."
)
