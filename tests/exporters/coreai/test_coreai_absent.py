"""Without the extra a build is refused before any work, and a demo leaves Core AI out."""

from __future__ import annotations

import sys

import pytest
from exported import Exports

from compress.errors import RuntimeMissingError
from compress.formats import get_format
from compress.plan.shapes import PlanRequest


def test_a_plan_says_what_to_install(exported: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coreai", None)
    row = get_format("coreai")
    with pytest.raises(RuntimeMissingError, match="needs coreai-core") as caught:
        row.plan(exported.config("llama3"), PlanRequest())
    assert caught.value.hint == "pip install 'packlight[coreai]'"
    assert not row.installed
    (check,) = row.checks()
    assert check.ok and "not installed" in check.found
