"""``README.md`` beside the artifacts: a Hugging Face model card, made from ``report.json``.

The template is ``card.md.j2``. Metadata keys: https://huggingface.co/docs/hub/model-cards. Strings
from a checkpoint are escaped for where they stand: YAML, a table cell, a sentence, a fenced block.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import yaml

from compress.console import format_bytes
from compress.errors import visible
from compress.formats import get_format
from compress.report.report import Report
from compress.report.words import fenced, figure, label, sentence

HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def model_card(report: Report) -> str:
    """The card, Markdown with a YAML head that the Hub reads; what is not known is left out of it.

    Args:
        report: of a build.
    """
    import jinja2

    model, artifacts = report.model, report.artifacts
    formats = list(dict.fromkeys(artifact.format for artifact in artifacts))
    head: dict[str, Any] = {}
    # A local folder's name stands in for the Hub id that the folder is uploaded to.
    if HUB_ID.fullmatch(model.source):
        head |= {"base_model": model.source, "base_model_relation": "quantized"}
    if model.license:
        head["license"] = " ".join(model.license.split())  # no line may look like the end
    if formats:
        head["library_name"] = formats[0]
    head |= {"pipeline_tag": "text-generation", "tags": [*formats, "quantized", "packlight"]}
    # No autoescape, which is of HTML: the filters escape for Markdown.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "fenced": fenced,
        "figure": figure,
        "label": label,
        "sentence": sentence,
        "size": format_bytes,
    }
    text = files("compress.report").joinpath("card.md.j2").read_text("utf-8")
    gates = [(artifact, gate) for artifact in artifacts for gate in artifact.gates]
    card = environment.from_string(text).render(
        report=report,
        artifacts=artifacts,
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000),
        gates=len(gates),
        failed=[f"{label(artifact)}: {gate.name}" for artifact, gate in gates if not gate.passed],
        get_format=get_format,
    )
    return visible(card)
