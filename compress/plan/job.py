"""A job: the model and a plan for each target, with exact bytes, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.checkpoint.sources import Source
from compress.console import Console
from compress.decoder.config import DecoderConfig, WeightMap
from compress.decoder.families import FAMILIES
from compress.decoder.tokenizer import VOCABULARIES
from compress.decoder.tokenizer_facts import TokenizerFacts
from compress.decoder.tokenizer_texts import check_rows
from compress.errors import (
    CheckpointError,
    GridError,
    PacklightError,
    UnsupportedModelError,
    UsageError,
    without_secrets,
)
from compress.files import read_bounded
from compress.formats import FORMATS, get_format
from compress.machine import available_cpus
from compress.plan.cut import Cut, plan_cut
from compress.plan.shapes import Artifact, Plan, PlanEntry, PlanRequest, mix_name
from compress.plan.transform import Transforms
from compress.recipe import MASK_NEEDS, Recipe, load_yaml, method_of, needs_of

if TYPE_CHECKING:
    from compress.plan.document import PlannedBudget

DEFAULT_CONTEXT = 2048  # positions that memory figures assume by default
# (parameters, windows scored by default from there on). In any runtime a verification costs
# parameters x tokens, so large models get fewer tokens.
WINDOWS = ((3 * 10**9, 4), (10**9, 8), (0, 16))
# Parameters from which on windows are scored until the verdict stands: smaller models take all of
# theirs in seconds.
FEWER_FROM = 50 * 10**6
GENERATED_ROOM = 64  # positions beyond the scored window: prompt and tokens of the greedy sample


@dataclass(frozen=True)
class Job:
    """One checkpoint, a recipe and a plan for each target: known before any weight is read.

    Attributes:
        source: the weights that artifacts are made from.
        config: of the float model that artifacts are compared with, unpruned.
        recipe: validated.
        plans: per target, in the order of the recipe.
        context: positions that KV cache and memory sizes assume.
        command: the command line that repeats the job, without local paths.
        transforms: of each target's weights, by format; most recipes have none.
        cut: the pruned model's shape, or None; plans are for the pruned model.
        budgets: the budget of each target for ``plan.json``; empty without one.
        at_most: budget of each target's file in bytes, until its grids are chosen.
    """

    source: Source
    config: DecoderConfig
    recipe: Recipe
    plans: tuple[Plan, ...]
    context: int
    command: str = ""
    transforms: Transforms = field(default_factory=dict)
    cut: Cut | None = None
    budgets: Mapping[str, PlannedBudget] = field(default_factory=dict)
    at_most: Mapping[str, int] = field(default_factory=dict)

    def bytes_of(self, plan: Plan) -> int:
        """Bytes of a target's weights, or its budget where grids are not chosen yet."""
        return self.at_most.get(plan.format, plan.weights_bytes)

    def on(self, source: Source) -> Job:
        """The same job with another source of weights of the planned shapes."""
        return replace(self, source=source)

    @property
    def checkpoint(self) -> Checkpoint:
        """The float model's checkpoint."""
        return self.source.checkpoint

    @property
    def shape(self) -> DecoderConfig:
        """The config of the decoder in the artifacts: the float model's, or the pruned model's."""
        return self.config if self.cut is None else self.cut.config


class Replan(Protocol):
    """``prepare`` with one command's arguments bound: makes the job with other grids or recipe."""

    def __call__(
        self, *, choices: Mapping[str, Mapping[str, str]] | None = None, recipe: Recipe = ...
    ) -> Job:
        """``choices``: format → entry name → grid."""
        ...


def describe_model(checkpoint: Checkpoint, context: int = 0) -> DecoderConfig:
    """The checkpoint's config, checked against the shard headers. A stored head beside a config
    that ties it is compared with the embedding (``settle_head``).

    Args:
        context: positions that are wanted (``DecoderConfig.from_hf``).

    Raises:
        UnsupportedModelError, CheckpointError: see ``DecoderConfig.from_hf``, ``WeightMap.check``.
    """
    config = DecoderConfig.from_hf(checkpoint.config, checkpoint.generation_config, context)
    if FAMILIES[config.family].prefix:
        from compress.checkpoint.settle import settle_names

        settle_names(config, checkpoint)
    if config.tie_word_embeddings:
        from compress.checkpoint.settle import settle_head

        config = settle_head(config, checkpoint)
    WeightMap(config).check(checkpoint)
    if config.ropes[0].caveat:
        checkpoint.warn(config.ropes[0].caveat)
    return config


def prepare(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    context: int | None = None,
    transforms: Transforms,
    command: str = "",
    choices: Mapping[str, Mapping[str, str]] | None = None,
) -> Job:
    """Make the job: the config and a plan for each target; no weights are read.

    Args:
        checkpoint: opened.
        recipe: validated.
        context: positions of KV caches, over the recipe's; ``longrope`` models get more than their
            original context where this, or a target's own, is larger.
        transforms: of the recipe's targets (``compress.pruning.transforms``).
        command: for the report.
        choices: format → entry name → grid, over the recipe's.

    Raises:
        PacklightError: the build is impossible.
    """
    contexts = (settings.get("context") for settings in recipe.targets.values())
    config = describe_model(checkpoint, max(context or 0, *(n or 0 for n in contexts), 0))
    if config.experts is not None or any(kind.taps for kind in config.kinds):
        check_settings(config, recipe)
    tokenizer = tokenizer_of(checkpoint, recipe)
    notes = []
    rows, ends = config.vocab_size, config.eos_token_ids
    if tokenizer and tokenizer.last_id >= rows:
        notes = check_rows(tokenizer, lambda: checkpoint.tokenizer, rows, ends)
    if context is not None and context > config.max_context:
        raise UsageError(
            f"--context {context} is more than the {config.max_context} positions of this model"
        )
    name = model_name(checkpoint.source)
    cut: Cut | None = None
    if recipe.prunes:
        whole = make_plans(config, name, recipe, context, transforms, tokenizer=tokenizer)
        cut = plan_cut(config, recipe.prune, whole)
    shape = config if cut is None else cut.config
    plans = make_plans(
        shape, name, recipe, context, transforms, choices, whole=config, tokenizer=tokenizer
    )
    if notes:
        plans = tuple(replace(plan, notes=(*plan.notes, *notes)) for plan in plans)
    source = Stored(checkpoint, config)
    positions = context or min(DEFAULT_CONTEXT, config.max_context)
    return Job(source, config, recipe, plans, positions, command, transforms, cut)


def check_settings(config: DecoderConfig, recipe: Recipe) -> None:
    """Refuse what is not supported for mixtures of experts and for layers of convolution.

    Raises:
        UnsupportedModelError: with the setting's name.
    """
    both = {
        "prune": recipe.prunes,
        "quantize.fold": recipe.folds,
        "sparsity": any("sparsity" in target for target in recipe.targets.values()),
    }
    experts = {
        "budget": bool(recipe.budget),
        "calibration.propagate": recipe.calibration.propagate == "quantized",
    }
    what, settings = "models with layers of convolution", both
    supported = "every solver and budgets are supported"
    if config.experts is not None:
        what, settings = "mixtures of experts", both | experts
        supported = "rtn, scale_search and gptq are supported"
    for name, used in settings.items():
        if used:
            raise UnsupportedModelError(
                f"{name} is not supported for {what}", hint=f"leave it out: {supported}"
            )


def tokenizer_of(checkpoint: Checkpoint, recipe: Recipe) -> TokenizerFacts | None:
    """The checkpoint's tokenizer; None where there is none, and no format of the recipe needs one.

    Raises:
        CheckpointError: a format needs one, or it is damaged.
    """
    if checkpoint.has_tokenizer:
        return checkpoint.tokenizer_facts
    for row in map(get_format, recipe.targets):
        if row.tokenizer_inside:
            without = [f"-f {row.name}" for row in FORMATS.values() if not row.tokenizer_inside]
            raise CheckpointError(
                f"no tokenizer in {checkpoint.path}: it is part of a {row.title} file",
                hint=f"one of {', '.join(VOCABULARIES)}; or {' or '.join(without)} with "
                "-r int4-fast --no-verify, which reads no text",
            )
    return None


def make_plans(
    config: DecoderConfig,
    name: str,
    recipe: Recipe,
    context: int | None,
    transforms: Transforms,
    choices: Mapping[str, Mapping[str, str]] | None = None,
    *,
    whole: DecoderConfig | None = None,
    tokenizer: TokenizerFacts | None = None,
) -> tuple[Plan, ...]:
    """A plan for each target of the recipe; nothing is read.

    Args:
        config: of the weights that are written.
        name: of the model.
        choices: format → entry name → grid, over the recipe's.
        whole: the float model, where ``config`` may be pruned: names of mixes use its size.
        tokenizer: the checkpoint's, for the formats that hold it.

    Raises:
        GridError, UnsupportedModelError, UsageError: see ``compress.formats``.
    """
    plans = []
    for target, settings in recipe.targets.items():
        grids = (choices or {}).get(target, {})
        importance = needs_of(recipe.solver) is not None
        request = PlanRequest(settings, name, grids, context, importance, tokenizer)
        try:
            plan = get_format(target).plan(config, request)
        except (GridError, UnsupportedModelError) as error:
            others = {
                other: replace(request, settings=theirs, choices=(choices or {}).get(other, {}))
                for other, theirs in recipe.targets.items()
                if other != target
            }
            raise without(target, plannable(config, others), error) from error
        if grids and whole:
            plan = replace(plan, type_name=mix_name(plan.entries, whole))
        for change in transforms.get(target, ()):
            plan = change.planned(plan)
        plans.append(plan)
    return tuple(plans)


def plannable(config: DecoderConfig, requests: Mapping[str, PlanRequest]) -> list[str]:
    """The formats that do not refuse the model."""
    found = []
    for name, request in requests.items():
        with suppress(PacklightError):
            get_format(name).plan(config, request)
            found.append(name)
    return found


def without(target: str, targets: Sequence[str], error: PacklightError) -> PacklightError:
    """An error of one target, with a hint how to build the other targets where there are others."""
    others = " ".join(f"-f {name}" for name in targets if name != target)
    if not others or "-f " in error.hint:
        return error
    hint = f"{error.hint}; or " if error.hint else ""
    return type(error)(error.message, f"{hint}{others} builds without {target}")


def model_name(source: str) -> str:
    """The base of file names: the last part of the Hub id or folder, safe on every file system."""
    last = without_secrets(source).rstrip("/").rsplit("/", 1)[-1]
    safe = "".join(char if char.isalnum() or char in "._-" else "-" for char in last).strip(".-")
    return safe or "model"


def looks_at_inputs(recipe: Recipe) -> bool:
    """Whether any step of a build uses calibration texts."""
    methods = {method_of(settings) for settings in recipe.targets.values()}
    masks = bool(methods & set(MASK_NEEDS))
    return bool(needs_of(recipe.solver)) or recipe.prunes or bool(recipe.budget) or masks


def window_length(config: DecoderConfig, plans: Sequence[Plan], wanted: int) -> int:
    """Tokens in a scored window: the recipe's number, or the shortest artifact's context."""
    limits = [plan.max_context for plan in plans if plan.max_context]
    return min(wanted, config.max_context, *limits)


def window_count(config: DecoderConfig, wanted: int) -> int:
    """Windows to score: ``wanted``, or for 0 the number for the model's parameters (``WINDOWS``).

    It depends on nothing else, no machine's speed: one checkpoint has the same figures anywhere.
    """
    return wanted or next(count for least, count in WINDOWS if config.num_parameters >= least)


def scores_all(config: DecoderConfig, wanted: int) -> bool:
    """Whether all windows are scored: a stated number, or those of a small model."""
    return wanted > 0 or config.num_parameters < FEWER_FROM


def baseline_bytes(job: Job) -> int:
    """Disk bytes of the float model's logits during verification: two bytes per logit."""
    length = window_length(job.config, job.plans, job.recipe.sequence_length)
    count = window_count(job.config, job.recipe.windows)
    return 2 * count * length * job.config.vocab_size


def find_artifacts(path: Path) -> list[tuple[str, Path]]:
    """Format and path of the artifacts at a path: one, or those in a build's folder.

    Raises:
        UsageError: nothing is there.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    return [(name, found) for name, row in FORMATS.items() for found in row.find(path)]


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip


def adopt(name: str, path: Path, config: DecoderConfig, console: Console) -> Artifact:
    """An existing file as an ``Artifact``, with a plan made from its own metadata.

    Raises:
        UsageError: its vocabulary is not that of the float model, so nothing can be compared.
        ArtifactError: see ``compress.formats``.
    """
    facts = get_format(name).inspect(path)
    for key in SIZES:
        stated, expected = facts["config"].get(key), getattr(config, key)
        if isinstance(stated, int) and stated != expected:
            what = f"{path.name} has a {key} of {stated}, the float model {expected}"
            if key == "vocab_size":
                hint = "--baseline is the checkpoint that the artifact was made from"
                raise UsageError(what, hint=hint)
            console.warning(f"{what}: pruned, or another model?")
    entries = tuple(
        PlanEntry("", row["name"], row["grid"], tuple(row["shape"]), row["bytes"])
        for row in facts["tensors"]
    )
    plan = Plan(
        format=name,
        type_name=facts.get("type") or prevailing_grid(facts["tensors"]),
        model_name=facts["name"],
        entries=entries,
        max_context=min(config.max_context, facts["context"] or config.max_context),
        kv_bytes_per_value=facts["kv_bytes_per_value"],
    )
    # A pruned model has fewer or smaller blocks.
    sizes = {key: facts["config"].get(key) for key in ("num_hidden_layers", "num_key_value_heads")}
    known: dict[str, Any] = {k: n for k, n in sizes.items() if isinstance(n, int) and n > 0}
    shape = replace(config, **known)
    cache = shape.kv_cache_bytes_per_token(plan.kv_bytes_per_value)
    return Artifact(name, plan.type_name, path, facts["bytes"], plan.weights_bytes, cache, plan)


def prevailing_grid(tensors: Sequence[Mapping[str, Any]]) -> str:
    """The grid that holds most of an artifact's bytes."""
    sizes: dict[str, int] = {}
    for row in tensors:
        sizes[row["grid"]] = sizes.get(row["grid"], 0) + row["bytes"]
    return max(sizes, key=lambda grid: sizes[grid], default="unknown")


def read_card(checkpoint: Checkpoint) -> dict[Any, Any]:
    """The YAML head of the checkpoint's own model card; empty where it is missing or damaged."""
    import yaml

    try:
        text = read_bounded(checkpoint.path / "README.md").decode("utf-8")
        lines = text.splitlines()
        end = lines.index("---", 1) if lines[:1] == ["---"] else 0
        plain = "\n".join([*lines[1:end], ""]).replace("\t", "  ")
        head = load_yaml(plain.replace("- no\n", '- "no"\n'))  # Norwegian, not false
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return {}
    return head if isinstance(head, dict) else {}


def read_license(checkpoint: Checkpoint) -> str | None:
    """The licence that the checkpoint's own model card names in its YAML head, if any."""
    name = read_card(checkpoint).get("license")
    return name if isinstance(name, str) else None


# A decoder smaller than this is slower on two threads than on one: synchronizing them takes longer
# than its matrix products.
ONE_THREAD = 100_000_000


def choose_threads(wanted: int, config: DecoderConfig) -> int:
    """Threads for every runtime and for the float model alike, so that their speeds compare."""
    if wanted:  # more threads than CPUs are never faster; hundreds need minutes to synchronize
        return min(wanted, available_cpus())
    if config.num_parameters < ONE_THREAD:
        return 1
    return available_cpus()
