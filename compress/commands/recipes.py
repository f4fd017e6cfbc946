"""``packlight recipes``: list, show and check recipes, and print their JSON schema."""

from __future__ import annotations

import click

from compress.commands.options import make_console, recipe_names


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List, show and check recipes."""
    if context.invoked_subcommand is None:
        context.invoke(recipes_list)


@recipes.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def recipes_list(as_json: bool = False) -> None:
    """List the recipes that are included in packlight."""
    from compress.recipe import describe_all

    rows = describe_all()
    console = make_console({"as_json": as_json})
    if console.mode == "json":
        console.result([{"name": name, "description": text} for name, text in rows])
        return
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        console.data(f"{name.ljust(width)}  {text}")


@recipes.command("show")
@click.argument("name", shell_complete=recipe_names)
def recipes_show(name: str) -> None:
    """Print the YAML text of a recipe, e.g. to save and edit."""
    from compress.recipe import read

    click.echo(read(name), nl=False)


@recipes.command("check")
@click.argument("file")
def recipes_check(file: str) -> None:
    """Validate a recipe file; exit code 2 if it is not valid."""
    from compress.recipe import load
    from compress.verify.gates import parse

    loaded = load(file)
    parse(loaded.gates)
    click.echo(f"{file}: valid ({', '.join(loaded.targets)})", err=True)


@recipes.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from compress.recipe.model import recipe_schema

    click.echo(recipe_schema(), nl=False)
