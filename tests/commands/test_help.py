"""Golden help text: docs/help.md is what `packlight … --help` prints (`make docs` renews it)."""

from __future__ import annotations

from pathlib import Path

import click

from compress.cli import CONTEXT, cli

GOLDEN = Path(__file__).resolve().parents[2] / "docs" / "help.md"


def commands(group: click.Group, path: str) -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = [(path, group)]
    for name in sorted(group.commands):
        command = group.commands[name]
        if isinstance(command, click.Group):
            found += commands(command, f"{path} {name}")
        else:
            found.append((f"{path} {name}", command))
    return found


def rendered() -> str:
    parts = ["# Help\n\nWhat every command prints with `--help`; renewed by `make docs`.\n"]
    for path, command in commands(cli, "packlight"):
        context = click.Context(command, info_name=path, **{**CONTEXT, "terminal_width": 90})
        parts.append(f"## {path}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def test_help_text_is_the_golden_one(request):
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(rendered(), encoding="utf-8")
    assert GOLDEN.read_text(encoding="utf-8") == rendered()


def test_every_option_and_command_is_explained():
    for path, command in commands(cli, "packlight"):
        assert command.help, path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{path} {parameter.opts}"
