"""Recipes: YAML in, a validated ``Recipe`` out. The JSON schema (``recipes/schema.json``) is the
single source of keys, types, defaults and descriptions; editors read the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import recipes
from compress.console import parse_bytes
from compress.errors import RecipeError, did_you_mean

# Keys of one target that others do not have, and why.
ELSEWHERE: dict[str, str] = {
    path: "rotation is for Core ML palettes and channel grids; small groups only lose by it"
    for path in ("targets.gguf.rotate", "targets.onnx.rotate")
}


@dataclass(frozen=True)
class Recipe:
    """A validated recipe, defaults filled in.

    Attributes:
        name: for reports.
        targets: format → settings.
        solver: how codes are chosen.
        fold: ``awq`` scales channels before that, ``none`` does not.
        permute: whether channels may change places before that.
        calibration: ``texts``, ``tokens``, ``sequence_length`` and ``seed``, for solvers that look
            at inputs.
        prune: ``method`` and one amount; empty where nothing is pruned.
        allow_dense: zeros also in formats that store them like other weights.
        windows, sequence_length: how much text is scored; 0 windows: by the model's size.
        gates: metric → limit such as ``"<=0.06"``.
        candidates: grids that a budget chooses among; none: each format's own choice.
        keep: role → the fewest bits that a budget may give it.
        budget: ``weights``, ``memory`` (sizes) and ``device``; empty where there is none.
        document: the whole as plain data; ``to_yaml`` writes it beside the artifacts.
    """

    name: str
    targets: Mapping[str, Mapping[str, Any]]
    solver: str
    windows: int
    sequence_length: int
    gates: Mapping[str, str]
    calibration: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    keep: Mapping[str, int] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    prune: Mapping[str, Any] = field(default_factory=dict)
    allow_dense: bool = False
    fold: str = "none"
    permute: bool = False
    document: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned."""
        return bool(self.prune) and self.prune["method"] != "none"

    @property
    def folds(self) -> bool:
        """Whether ``fold`` or ``permute`` ask for a search before codes are chosen."""
        return self.fold != "none" or self.permute

    @property
    def budget_bytes(self) -> int | None:
        """Bytes of each target's file; None where only memory counts, or nothing does."""
        return parse_bytes(str(self.budget["weights"])) if "weights" in self.budget else None

    def to_yaml(self) -> str:
        """The resolved recipe, as it can be read again."""
        text: str = yaml.safe_dump(dict(self.document), sort_keys=False, allow_unicode=True)
        return text


def load(source: str, overrides: Iterable[str] = (), formats: Iterable[str] = ()) -> Recipe:
    """A recipe by shipped name or file path, with ``--set`` overrides and chosen formats.

    Args:
        source: ``phone-4bit`` or ``./mine.yaml``.
        overrides: ``targets.gguf.type=Q5_K_M`` …; values are YAML.
        formats: keep these targets only; one that the recipe lacks is added with its defaults.

    Raises:
        RecipeError: not found, not YAML, or not valid; the message names the key's path.
    """
    document = parse(read(source), source)
    targets = document.setdefault("targets", {}) if isinstance(document, dict) else {}
    chosen = list(formats)
    if chosen and isinstance(targets, dict):
        document["targets"] = {name: targets.get(name) or {} for name in chosen}
    for override in overrides:
        apply_override(document, override)
    return validate(document, source)


def read(source: str) -> str:
    """The YAML text of a shipped recipe or a file."""
    if source in recipes.names():
        return recipes.read(source)
    path = Path(source)
    if not path.is_file():
        raise RecipeError(
            f"no recipe named {source!r}, and no such file",
            hint=did_you_mean(source, recipes.names(), "shipped"),
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(f"{source} cannot be read: {why}") from error


def parse(
    text: str, source: str, what: str = "a recipe", hint: str = "see `packlight recipes show`"
) -> dict[str, Any]:
    """YAML to a mapping.

    Raises:
        RecipeError: not YAML, or something else than a mapping, which ``what`` is.
    """
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise RecipeError(f"{source}:{where} {problem}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{source}: {what} is a mapping", hint=hint)
    return document


def apply_override(document: dict[str, Any], override: str) -> None:
    """``--set a.b=value``: put ``value`` (YAML) at the path, making the mappings on the way.

    A limit needs no quotes of YAML's (``verify.gates.top1_agreement=>=0.9``).
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override}: write KEY=VALUE", hint="--set targets.gguf.type=Q4_0")
    node = document
    for key in keys[:-1]:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    try:
        node[keys[-1]] = text if text.startswith((">=", "<=")) else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: {text!r} is not a YAML value") from error


def validate(document: Mapping[str, Any], source: str) -> Recipe:
    """Hold a document against the schema and fill in its defaults.

    Raises:
        RecipeError: the first problem, with its path and the nearest known key.
    """
    from jsonschema import Draft202012Validator

    schema = json.loads(recipes.schema_text())
    whole = normalize(document)
    problems = list(Draft202012Validator(schema).iter_errors(whole))
    if problems:
        raise explain(min(problems, key=lambda error: list(map(str, error.absolute_path))), source)
    fill_defaults(whole, schema)
    check_prune(whole.get("prune", {}), source)
    verify = whole["verify"]
    calibration = dict(whole["calibration"])
    named = whole["quantize"].get("candidates", "auto")
    kept = whole["quantize"].get("keep", {})
    # What travels with an artifact names no place of this machine.
    texts = [Path(text).name if Path(text).is_absolute() else text for text in calibration["texts"]]
    whole["calibration"]["texts"] = texts
    return Recipe(
        name=whole.setdefault("name", Path(source).stem),
        targets=whole["targets"],
        solver=whole["quantize"]["solver"],
        windows=0 if verify["windows"] == "auto" else verify["windows"],
        sequence_length=verify["sequence_length"],
        gates={key: str(limit) for key, limit in verify.get("gates", {}).items()},
        calibration=calibration,
        candidates=() if named == "auto" else tuple(named),
        keep={role: int(str(bits).lstrip(">= ")) for role, bits in kept.items()},
        budget=checked_budget(whole.get("budget", {}), source),
        prune=whole.get("prune", {}),
        allow_dense=whole.get("allow_dense", False),
        fold=whole["quantize"]["fold"],
        permute=whole["quantize"]["permute"],
        document=whole,
    )


def checked_budget(budget: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The recipe's budget, its sizes held to be sizes.

    Raises:
        RecipeError: one is not.
    """
    for key in ("weights", "memory"):
        try:
            if key in budget:
                parse_bytes(str(budget[key]))
        except ValueError as error:
            raise RecipeError(f"{source}: budget.{key}: {error}") from error
    return budget


# How much goes, by method: exactly one of these keys.
AMOUNTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "depth": ("ratio", "blocks"),
    "ffn": ("ratio", "width"),
    "heads": ("ratio", "kv_heads"),
}


def check_prune(prune: Mapping[str, Any], source: str) -> None:
    """Refuse a method without its amount, or with another's, and healing of nothing.

    Raises:
        RecipeError: with the keys that would do.
    """
    method = prune.get("method", "none")
    keys = AMOUNTS[method]
    given = [key for key in ("ratio", "blocks", "width", "kv_heads") if key in prune]
    if strange := [key for key in given if key not in keys]:
        raise RecipeError(
            f"{source}: prune.{strange[0]} has no meaning with method {method}",
            hint=f"known here: {', '.join(keys)}" if keys else "set prune.method too",
        )
    if not keys and "heal" in prune:
        raise RecipeError(
            f"{source}: prune.heal has no effect: nothing is pruned",
            hint="--prune ffn:25%, or prune.method and an amount",
        )
    if keys and len(given) != 1:
        raise RecipeError(
            f"{source}: prune.method {method} needs one of {' and '.join(keys)}, "
            f"{'both are' if given else 'none is'} given",
            hint=f"--set prune.{keys[0]}=0.1",
        )


def normalize(document: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in canonical spelling: ``gguf:`` alone means its defaults, ``q4_k_m`` is Q4_K_M."""
    whole = deepcopy(dict(document))
    targets = whole.get("targets")
    if isinstance(targets, dict):
        for name, settings in targets.items():
            targets[name] = {} if settings is None else settings
        gguf = targets.get("gguf")
        if isinstance(gguf, dict) and isinstance(gguf.get("type"), str):
            gguf["type"] = gguf["type"].upper()
    return whole


def explain(error: Any, source: str) -> RecipeError:
    """One line from a schema error: the path, what is wrong, what would be right."""
    path = ".".join(map(str, error.absolute_path))
    where = f"{source}: {path}" if path else source
    known = sorted(error.schema.get("properties", {}))
    if error.validator == "additionalProperties":
        unknown = sorted(set(error.instance) - set(known))[0]
        dotted = f"{path}.{unknown}" if path else unknown
        hint = ELSEWHERE.get(dotted) or did_you_mean(unknown, known, "known keys")
        return RecipeError(f"{source}: unknown key {dotted}", hint=hint)
    if error.validator == "enum":
        hint = did_you_mean(str(error.instance).upper(), map(str, error.validator_value))
        return RecipeError(f"{where}: {error.instance!r} is not allowed", hint=hint)
    if error.validator == "const":
        return RecipeError(f"{where}: must be {error.validator_value}, not {error.instance!r}")
    if error.validator == "pattern":
        hint = "such as int4-g32, int8-channel, lut4-g8"
        if path.endswith("name"):
            hint = "letters, digits, . _ -"
        elif path == "verify.windows":
            hint = "a number of windows, or auto"
        elif path.startswith("quantize.keep"):
            hint = 'the fewest bits, such as ">=6"'
        return RecipeError(f"{where}: {error.instance!r} is not allowed", hint=hint)
    if error.validator == "maxProperties":
        return RecipeError(f"{where}: name only one of {', '.join(known)}")
    if error.validator == "minProperties":
        return RecipeError(f"{where}: name at least one of {', '.join(known)}")
    return RecipeError(f"{where}: {error.message}")


def fill_defaults(node: dict[str, Any], schema: Mapping[str, Any]) -> None:
    """Defaults of the schema, into mappings that are there, and sections that have defaults."""
    for key, rule in schema.get("properties", {}).items():
        if "default" in rule:
            node.setdefault(key, deepcopy(rule["default"]))
        elif key in ("calibration", "quantize", "verify"):
            node.setdefault(key, {})
        if isinstance(node.get(key), dict):
            fill_defaults(node[key], rule)


def describe_all() -> list[tuple[str, str]]:
    """Name and one-line description of each shipped recipe."""
    return [
        (name, parse(recipes.read(name), name).get("description", "")) for name in recipes.names()
    ]
