"""Options of the command line reach the settings of their names, all of them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from compress.build.decide import BuildSettings, VerifySettings
from compress.cli import CONTEXT
from compress.commands import build, verify
from compress.commands.options import settings_of

# Options that are converted, and options of the console only.
SHAPED = {
    "revision",
    "token",
    "cache_dir",
    "fetch",
    "junit",
    "summary",
    "no_verify",
    "runtime_python",
}
TOLD = {"as_json", "quiet", "verbose", "progress_file", "checksums"}
# The converted settings, and settings without an option.
MADE = {"hub", "ci_files", "verify", "source", "made"}

COMMANDS = [(build.build, BuildSettings), (verify.verify, VerifySettings)]


@pytest.mark.parametrize(("command", "kind"), COMMANDS)
def test_every_option_has_its_setting_and_every_setting_its_option(command, kind):
    options = {option.name for option in command.params}
    names = {field.name for field in fields(kind)}
    assert options - SHAPED - TOLD == names - MADE
    assert {"hub", "ci_files"} <= names


def test_settings_have_what_was_typed():
    words = ["MODEL", "-o", "out", "--gate", "bytes=<=1GB", "--seed", "0", "--max-memory", "2GB"]
    words += [
        "--fetch",
        "streaming",
        "--revision",
        "v1",
        "--junit",
        "gates.xml",
        "--context",
        "64",
        "--no-verify",
    ]
    context = build.build.make_context("build", words, **CONTEXT)  # as the command line does
    found = settings_of(BuildSettings, context.params, verify=not context.params["no_verify"])
    assert isinstance(found, BuildSettings)
    assert (found.model, found.output, found.gates) == ("MODEL", Path("out"), ("bytes=<=1GB",))
    assert (found.seed, found.max_memory, found.context, found.verify) == (0, 2 * 10**9, 64, False)
    hub = {"revision": "v1", "token": None, "cache_dir": None, "fetch": "streaming"}
    assert found.hub == hub
    assert (found.ci_files.junit, found.ci_files.summary) == (Path("gates.xml"), None)
    assert (found.recipe, found.budget, found.plan, found.source) == ("phone-4bit", "", None, "")
