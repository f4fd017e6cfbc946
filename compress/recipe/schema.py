"""Shared by the typed documents (recipe, jobs file, plan, report): base models, errors on one line
with the key's path, and JSON schemas generated from the models.

pydantic takes a tenth of a second to load: import this where a document is read, not before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    StringConstraints,
    ValidationError,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from compress.errors import RecipeError, did_you_mean

__all__ = ["Name", "Part", "Section", "Text", "Unique", "explain", "json_schema", "refusal"]

# JSON's names of types, which readers of YAML know.
TYPES = {
    "int_type": "integer", "int_from_float": "integer", "string_type": "string",
    "bool_type": "boolean", "float_type": "number", "list_type": "array", "dict_type": "object",
    "model_type": "object", "model_attributes_type": "object",
}  # fmt: skip
UNKNOWN = ("extra_forbidden", "invalid_key")  # keys that no section has; of YAML, so 5 may be one
RANGES = {
    "greater_than_equal": ("ge", "less than the minimum of"),
    "less_than_equal": ("le", "greater than the maximum of"),
    "greater_than": ("gt", "less than or equal to the minimum of"),
    "less_than": ("lt", "greater than or equal to the maximum of"),
}


class Section(BaseModel):
    """A mapping of a user's document: only known keys, values of exact type, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Part(BaseModel):
    """A mapping of a document that packlight writes: only known keys, values of exact type."""

    model_config = ConfigDict(extra="forbid", strict=True)


def refusal(message: str, hint: str = "") -> PydanticCustomError:
    """An error for validators whose message is shown without the path before it."""
    return PydanticCustomError("refusal", "{message}", {"message": message, "hint": hint})


def unlike(values: list[str]) -> list[str]:
    if len(set(values)) < len(values):
        raise PydanticCustomError("twice", "{values} has non-unique elements", {"values": values})
    return values


Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Unique = AfterValidator(unlike)
"""A list without duplicates."""


def explain(
    error: ValidationError,
    source: str,
    document: Any,
    model: type[BaseModel] | None = None,
    hint_of: Callable[[str, str], str] | None = None,
) -> RecipeError:
    """The first error by path, as one line; a section's unknown keys come before its other errors.

    Args:
        error: of pydantic.
        source: the document's name, with which the line begins.
        document: that was validated.
        model: of the document, to suggest the nearest key for an unknown one.
        hint_of: path and kind of an error → the model's hint for it, or ``""``.
    """
    found: list[tuple[list[str], str | None, ErrorDetails]] = []
    for detail in error.errors():
        place: Sequence[int | str] = detail["loc"]
        key: str | None = None
        if model is not None and detail["type"] in UNKNOWN:
            key = str(detail["input"] if detail["type"] == "invalid_key" else place[-1])
            place = place[:-1]
        found.append((key_path(place, document), key, detail))
    path, key, first = min(found, key=lambda each: (each[0], each[1] is None, each[1] or ""))
    if model is not None and key is not None:
        dotted = ".".join([*path, key])
        own = hint_of(dotted, "unknown_key") if hint_of else ""
        hint = own or did_you_mean(key, known_keys(model, path), "known keys")
        return RecipeError(f"{source}: unknown key {dotted}", hint=hint)
    dotted = ".".join(path)
    where = f"{source}: {dotted}" if path and first["type"] != "refusal" else source
    message, hint = words(first)
    kinds = [TYPES.get(detail["type"], "") for of, _, detail in found if of == path]
    if len(kinds) > 1 and all(kinds):  # of the branches of a union
        message = f"{first['input']!r} is not of type {', '.join(map(repr, kinds))}"
    own = hint_of(dotted, first["type"]) if hint_of else ""
    return RecipeError(f"{where}: {message}", hint=own or hint)


def known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys of the section at a path, sorted."""
    for key in path:
        for name, field in model.model_fields.items():
            if key == (field.alias or name):
                inner = [field.annotation]
                while inner:  # the model within optional ones, lists and unions
                    kind = inner.pop()
                    inner += get_args(kind)
                    if isinstance(kind, type) and issubclass(kind, BaseModel):
                        model = kind
    return sorted(field.alias or name for name, field in model.model_fields.items())


def key_path(location: Sequence[int | str], document: Any) -> list[str]:
    """The parts of an error's location that are keys of the document: without names of union
    branches, and without a missing key."""
    path, node = [], document
    for part in location:
        inside = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if inside or (isinstance(node, Mapping) and part in node):
            path.append(str(part))
            node = node[part]
    return path


def words(detail: ErrorDetails) -> tuple[str, str]:
    """Message and hint of one error of pydantic's."""
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "missing":
        return f"{detail['loc'][-1]!r} is a required property", ""
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'|(\d+)", context["expected"])
        known = [word or number for word, number in allowed]
        if len(known) == 1:
            return f"must be {known[0]}, not {given!r}", ""
        return f"{given!r} is not allowed", did_you_mean(str(given).upper(), known)
    if kind == "unknown_value":
        return f"{given!r} is not allowed", did_you_mean(str(given).upper(), context["known"])
    if kind in TYPES:
        return f"{given!r} is not of type {TYPES[kind]!r}", ""
    if kind in RANGES:
        key, text = RANGES[kind]
        return f"{given!r} is {text} {context[key]:.15g}", ""
    if kind in ("too_short", "string_too_short"):
        return f"{given!r} should be non-empty", ""
    if kind == "string_pattern_mismatch":
        return f"{given!r} is not allowed", ""
    if kind == "refusal":
        return context["message"], context["hint"]
    if kind == "value_error":
        return str(context["error"]), ""
    return detail["msg"], ""


def json_schema(model: type[BaseModel], title: str, mode: str = "validation") -> str:
    """The JSON schema (draft 2020-12) of a model, as a text for editors.

    Args:
        model: of the document.
        title: of the schema.
        mode: ``serialization`` for documents that packlight writes: keys with defaults are always
            there.
    """
    document = model.model_json_schema(mode=mode)  # type: ignore[arg-type]
    definitions = document.pop("$defs", {})
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **plain(document),
        "$defs": plain(definitions),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def plain(node: Any) -> Any:
    """A schema without the titles that repeat the names of keys and without defaults of null;
    descriptions are the first paragraph, on one line."""
    if isinstance(node, list):
        return [plain(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    found = {}
    for key, inner in node.items():
        if key == "description" and isinstance(inner, str):
            found[key] = " ".join(inner.partition("\n\n")[0].split())
        elif (key, type(inner)) != ("title", str) and (key, inner) != ("default", None):
            found[key] = plain(inner)
    return found
