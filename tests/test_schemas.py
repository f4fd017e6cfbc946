"""JSON schemas are generated from the typed documents: the committed files are golden."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import exporters  # noqa: F401 -- fills the table of formats that the schemas list
from compress.batch.jobs_file import jobs_schema
from compress.plan.document import plan_schema
from compress.recipe.model import recipe_schema
from compress.report.report import report_schema

ROOT = Path(__file__).resolve().parents[1]

SCHEMAS = {
    "recipes/schema.json": recipe_schema,
    "compress/batch/schema.json": jobs_schema,
    "compress/plan/plan.schema.json": plan_schema,
    "compress/report/report.schema.json": report_schema,
}


@pytest.mark.parametrize("file", SCHEMAS)
def test_the_schema_is_that_of_the_model(file: str, request: pytest.FixtureRequest) -> None:
    made: Callable[[], str] = SCHEMAS[file]
    path = ROOT / file
    if request.config.getoption("--update-golden"):
        path.write_text(made(), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == made()
    Draft202012Validator.check_schema(json.loads(made()))
