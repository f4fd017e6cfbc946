"""Merges LoRA adapters into a checkpoint's weights as they are read; no merged copy is written.

Every weight is ``W + s·B·A``, in float32, as in PEFT's ``merge_and_unload``. The float baseline,
calibration and all formats use the merged model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from compress.checkpoint.adapter import CONFIG, MERGE, Adapter
from compress.checkpoint.checkpoint import Checkpoint, Float32
from compress.checkpoint.safetensors import TensorInfo, check_finite
from compress.checkpoint.settle import settle_head
from compress.checkpoint.terms import BiasTerm, LowRank, Term, TokenRows, same_values
from compress.decoder.config import DecoderConfig, WeightMap
from compress.decoder.config_json import short
from compress.decoder.families import FAMILIES

__all__ = ["Merged", "merge"]


class Merged(Checkpoint):
    """A checkpoint whose tensors have adapters merged into them.

    ``tensors`` are the checkpoint's, except those that an adapter replaces completely; ``config``
    is untied where an adapter has its own head or embedding.
    """

    def __init__(
        self, base: Checkpoint, config: DecoderConfig, adapters: Sequence[Adapter]
    ) -> None:
        """
        Args:
            base: opened.
            config: of the stored tensors (``settle_head``, ``WeightMap.check``).
            adapters: in any order: complete tensors are applied first, then added terms.

        Raises:
            CheckpointError: an adapter that does not fit the model, or two that exclude each other.
        """
        self.__dict__.update(base.__dict__)
        self.adapters = tuple(adapters)
        self.warnings = [*base.warnings]
        self.tensors = dict(base.tensors)
        self.opened = dict(base.opened)
        self._terms: dict[str, list[Term]] = {}
        self._brought: dict[str, Adapter] = {}

        shapes = WeightMap(config)
        self._shapes = shapes.expected()
        self._embedding = shapes.parts("embed_tokens.weight")[0].source
        self._head = f"{FAMILIES[config.family].names['lm_head']}.weight"
        self._shared = config.tie_word_embeddings
        if self._shared:
            self._shapes[self._head] = self._shapes[self._embedding]
            if any(map(self._unties, adapters)):
                self._untie()
                self.tensors[self._head] = self.tensors[self._embedding]
        elif DecoderConfig.from_hf(base.config, base.generation_config).tie_word_embeddings:
            self._untie()  # the checkpoint has its own head, in spite of its config
        for adapter in adapters:
            self._check_base_name(adapter)
            self._place(adapter)
            self.warnings += adapter.warnings
            self.opened |= adapter.opened
        for terms in self._terms.values():  # replaced rows first, then added terms
            terms.sort(key=lambda term: not isinstance(term, TokenRows))

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """See ``Checkpoint.read``."""
        values = super().read(name, rows)
        if terms := self._terms.get(name):
            info = self.tensors[name]
            start, _, _ = (rows or slice(None)).indices(info.shape[0])
            if info.offset < 0:  # the memory of a pickle
                values = values.copy()
            with np.errstate(all="ignore"):
                for term in terms if len(values) else ():
                    term.add(values, start)
            check_finite(name, values)
        return values

    def fingerprint(self) -> str:
        """See ``Checkpoint.fingerprint``; includes the adapters."""
        facts = [super().fingerprint(), *(adapter.fingerprint() for adapter in self.adapters)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    # --- the head ----------------------------------------------------------------------------

    def _unties(self, adapter: Adapter) -> bool:
        """Whether an adapter has a complete head or embedding that was trained untied."""
        if adapter.ties:
            return False
        ends = (self._embedding, self._head)
        return any(
            name in adapter.tensors and adapter.saves_whole(name.removesuffix(".weight"))
            for name in ends
        )

    def _untie(self) -> None:
        """Mark the config as untied: the head has its own tensor."""
        self._shared = False
        self.config = {**self.config, "tie_word_embeddings": False}
        if "share_embedding" in self.config:
            self.config["share_embedding"] = False

    def _weight(self, name: str) -> str:
        """The name on disk of a weight of the model."""
        return self._embedding if self._shared and name == self._head else name

    # --- an adapter's tensors ----------------------------------------------------------------

    def _place(self, adapter: Adapter) -> None:
        """Assign each tensor of an adapter to a weight of the model."""
        pairs: dict[str, dict[str, TensorInfo]] = {}
        unknown = []
        for name, info in adapter.tensors.items():
            module, kind = split_kind(name)
            weight = f"{module}.weight"
            if kind in ("", "base_layer"):
                brought = name.replace(".base_layer.", ".") if kind else name
                if brought in self._shapes:
                    # In base_layer only biases are trained; its weight is a copy of the base's.
                    trained = not name.endswith(".base_layer.weight")
                    self._bring(adapter, brought, info, trained=trained)
                    continue
            elif weight in self._shapes and len(self._shapes[weight]) == 2:
                if kind == "token_adapter.trainable_tokens_delta":
                    self._replace_rows(adapter, module, info)
                    continue
                if kind.startswith("lora_magnitude_vector"):
                    raise adapter.error("DoRA is not supported", MERGE)
                if (kind in EMBEDDING) == (weight == self._embedding) and kind in PAIR:
                    if self._shared and weight == self._head and adapter.ties:
                        continue  # a copy of the embedding's pair, from which the term is computed
                    pairs.setdefault(module, {})[PAIR[kind]] = info
                    continue
                raise adapter.error(f"{short(name)} is of a kind that is not supported", MERGE)
            unknown.append(name)
        if unknown:
            raise adapter.error(
                f"{len(unknown)} tensor(s) match no module of {self.source}, first "
                f"{short(unknown[0])}",
                "the adapter was trained on another model, or on one with another head",
            )
        for module, found in pairs.items():
            self._add_pair(adapter, module, found)
        self._check_complete(adapter, set(pairs))

    def _bring(self, adapter: Adapter, name: str, info: TensorInfo, *, trained: bool) -> None:
        """Replace a checkpoint's tensor by the adapter's complete one."""
        if trained:
            self._need_weight_one(adapter, name)
        check_shape(adapter, info, self._shapes[name], name)
        weight = self._weight(name)
        other = self._brought.setdefault(weight, adapter)
        if other is not adapter and not same_values(self.tensors[weight], info):
            raise adapter.error(f"{name} is brought by {short(other.source)[1:-1]}, too")
        self.tensors[weight] = replace(info, name=weight)

    def _replace_rows(self, adapter: Adapter, module: str, info: TensorInfo) -> None:
        name = f"{module}.weight"
        self._need_weight_one(adapter, name)
        rows, columns = self._shapes[name]
        found = adapter.token_rows(module, rows)
        check_shape(adapter, info, (len(found), columns), name)
        self._terms.setdefault(self._weight(name), []).append(TokenRows(info, found))

    def _need_weight_one(self, adapter: Adapter, name: str) -> None:
        if adapter.weight != 1:
            raise adapter.error(
                f"it brings {name} whole, of which there is no {adapter.weight:g}",
                "give it without a weight",
            )

    def _add_pair(self, adapter: Adapter, module: str, found: dict[str, TensorInfo]) -> None:
        """Add the terms of a module's A and B, and of B's bias."""
        name = f"{module}.weight"
        for part in ("A", "B"):
            if part not in found:
                raise adapter.error(f"{short(module)} has no lora_{part}", "save it again")
        is_embedding = name == self._embedding
        if not adapter.targets(module, is_linear=not is_embedding and name != self._head):
            raise adapter.error(
                f"it has tensors for {module}, which its target_modules do not choose",
                f"{CONFIG} and the weights belong to different adapters",
            )
        rank, (rows, columns) = adapter.rank(module), self._shapes[name]
        if is_embedding:
            rows, columns = columns, rows
        check_shape(adapter, found["A"], (rank, columns), name)
        check_shape(adapter, found["B"], (rows, rank), name)
        scaling = adapter.scaling(module)
        if self._shared and name in (self._head, self._embedding):
            self.warnings.append(
                f"adapter {adapter.source}: the model's head is its embedding, so that what was "
                f"trained on {module} is added to both, as PEFT merges it"
            )
        term = LowRank(found["A"], found["B"], scaling, is_embedding)
        self._terms.setdefault(self._weight(name), []).append(term)
        if "bias" in found:
            bias = f"{module}.bias"
            if not adapter.settings.get("lora_bias") or bias not in self._shapes:
                raise adapter.error(f"lora_B of {module} has a bias, and the model has none there")
            check_shape(adapter, found["bias"], self._shapes[bias], bias)
            self._terms.setdefault(bias, []).append(BiasTerm(found["bias"], scaling))

    def _check_complete(self, adapter: Adapter, adapted: set[str]) -> None:
        """Refuse an adapter whose weights lack modules that its config names."""
        missing = []
        for name, shape in self._shapes.items():
            module, _, kind = name.rpartition(".")
            if adapter.saves_whole(module):
                if name not in adapter.tensors and not (
                    self._shared and self._weight(name) in self._brought
                ):
                    raise adapter.error(f"modules_to_save has {module}, the weights have no {name}")
            elif kind == "weight" and len(shape) == 2 and module not in adapted:
                is_linear = name not in (self._embedding, self._head)
                if adapter.settings.get("target_modules") and adapter.targets(
                    module, is_linear=is_linear
                ):
                    missing.append(module)
        if missing:
            self.warnings.append(
                f"adapter {adapter.source}: no tensors for {len(missing)} module(s) that its "
                f"target_modules choose, first {missing[0]}: they stay as they are"
            )

    def _check_base_name(self, adapter: Adapter) -> None:
        """Warn where the adapter was trained on a model of another name."""
        base: Any = adapter.settings.get("base_model_name_or_path")
        own = (self.source, self.config.get("_name_or_path"), self.path.resolve().name)
        if isinstance(base, str) and base and last_part(base) not in map(last_part, own):
            self.warnings.append(
                f"adapter {adapter.source} was trained on {short(base)}, this is {self.source}"
            )


PAIR = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "bias",
    "lora_embedding_A": "A", "lora_embedding_B": "B",
}  # fmt: skip
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
MARKS = ("lora_", "token_adapter", "base_layer")


def split_kind(name: str) -> tuple[str, str]:
    """``…q_proj.lora_A.weight`` → ``("…q_proj", "lora_A.weight")``; the kind of a complete tensor
    is ``""``, of one below an adapted module ``base_layer``."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.startswith(MARKS):
            kind = ".".join(parts[place:])
            return ".".join(parts[:place]), "base_layer" if part == "base_layer" else kind
    return name.rpartition(".")[0], ""


def last_part(name: Any) -> str:
    """The last part of a path or a Hub id, in lower case."""
    return str(name).rstrip("/").rsplit("/", 1)[-1].lower()


def check_shape(adapter: Adapter, info: TensorInfo, shape: Sequence[int], name: str) -> None:
    """Check a tensor's shape against that of model and config.

    Raises:
        CheckpointError: it differs.
    """
    if info.shape != tuple(shape):
        hint = "the adapter was trained on another model, or its config is of another adapter"
        if info.shape[1:] == tuple(shape)[1:] and "embed" in name + info.name:
            hint = (
                "trained with another number of tokens: resize the model's embeddings "
                "(resize_token_embeddings), save it, and give that as MODEL"
            )
        raise adapter.error(
            f"{short(info.name)[1:-1]} has shape {short(list(info.shape))}, {name} of this model "
            f"needs {list(shape)}",
            hint,
        )


def merge(
    base: Checkpoint, adapters: str | Sequence[str], *, token: str | None, cache_dir: str | None
) -> Merged:
    """Open adapters and merge them into a checkpoint.

    Args:
        base: opened.
        adapters: as ``Adapter.open`` takes them.
        token, cache_dir: for Hub ids.

    Raises:
        UsageError, CheckpointError: see ``Adapter.open``, ``Merged``.
        UnsupportedModelError: see ``DecoderConfig.from_hf``.
    """
    config = DecoderConfig.from_hf(base.config, base.generation_config)
    if config.tie_word_embeddings:
        config = settle_head(config, base)
    WeightMap(config).check(base)
    texts = [adapters] if isinstance(adapters, str) else adapters
    opened = [Adapter.open(str(text), token=token, cache_dir=cache_dir) for text in texts]
    return Merged(base, config, opened)
