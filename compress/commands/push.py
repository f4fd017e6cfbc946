"""``packlight push``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compress.commands.options import make_console, output_options


@click.command(short_help="Upload a build's folder with its card to the Hugging Face Hub.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make a repository that is not there yet private.")
@click.option("--revision", default="", metavar="BRANCH",
              help="Branch to commit to, made if it is not there; default main.")  # fmt: skip
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--card", type=click.Path(path_type=Path), metavar="FILE",
              help="Model card to upload in place of DIR's README.md.")  # fmt: skip
@click.option("-m", "--message", default="", metavar="TEXT", help="Of the commit.")
@click.option("--allow-failed", is_flag=True,
              help="Although a gate failed, or nothing was verified.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check everything that needs no network; no upload.")
@output_options
def push(folder: Path, repo_id: str, **options: Any) -> int:
    """Upload a build's folder with its card to the Hugging Face Hub, in one commit.

    Only files that SHA256SUMS lists, if they are as it says, and only if all gates passed. The
    token is HF_TOKEN's or that of `hf auth login`. Files that DIR does not have stay in the
    repository.
    """
    from compress.output import publish

    console = make_console(options)
    settings = publish.PushSettings(
        folder=folder,
        repo_id=repo_id,
        private=options["private"],
        revision=options["revision"],
        create_pr=options["create_pr"],
        card=options["card"],
        message=options["message"],
        allow_failed=options["allow_failed"],
        dry_run=options["dry_run"],
    )
    return publish.push(settings, console)
