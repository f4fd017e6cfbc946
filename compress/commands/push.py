"""``packlight push``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compress.commands.options import make_console, output_options


@click.command(short_help="Upload a build's folder with its card to the Hugging Face Hub.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private if it is created.")
@click.option("--revision", default="", metavar="BRANCH",
              help="Branch to commit to, created if missing; default: main.")  # fmt: skip
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--card", type=click.Path(path_type=Path), metavar="FILE",
              help="Model card to upload instead of README.md in DIR.")  # fmt: skip
@click.option("-m", "--message", default="", metavar="TEXT", help="Commit message.")
@click.option("--allow-failed", is_flag=True,
              help="Upload even if a gate failed or nothing was verified.")  # fmt: skip
@click.option(
    "--dry-run", is_flag=True, help="Run all checks that need no network; upload nothing."
)
@output_options
def push(folder: Path, repo_id: str, **options: Any) -> int:
    """Upload a build's folder with its card to the Hugging Face Hub, in one commit.

    Uploads the files listed in SHA256SUMS, after checking their sums, and only if all gates
    passed. The token is read from HF_TOKEN or the login of `hf auth login`. Files in the
    repository that are not in DIR are left unchanged.
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
