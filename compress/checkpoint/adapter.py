"""LoRA adapters as PEFT saves them: ``adapter_config.json`` and ``adapter_model.safetensors``.

Opening one reads its config and header, and refuses an adapter that cannot be merged as by PEFT.
Keys and names are those of PEFT 0.21 (``peft/tuners/lora/config.py``, ``layer.py``;
``peft/utils/save_and_load.py``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.checkpoint.hub import download_adapter, page_of
from compress.checkpoint.safetensors import scan_safetensors
from compress.decoder.config_json import LARGEST, read_json, short
from compress.errors import CheckpointError, UsageError
from compress.files import check_folder, is_url, stamps

__all__ = ["Adapter", "split_weight"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST_CONFIG = 10_000_000  # bytes; the patterns of a few thousand modules are some 100 kB
MOST_PATTERNS = 4096
LONGEST_PATTERN = 2000  # characters; target_modules of vision models take a few hundred
PATIENCE = 1.0  # seconds for one match: a pattern may take exponential time
MOST_MATCHING = 20.0  # seconds of CPU for all matches

MERGE = "merge it with PEFT (merge_and_unload, then save_pretrained), and build that folder"
# Config keys that change the meaning of A and B.
VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "activated LoRA (it works from some tokens on, and has no merge)",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on parameters (target_parameters)",
    "megatron_config": "LoRA on Megatron's layers",
}
# Initializations that also change the base model: A and B are relative to the changed one.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Keys that are read here, or do not affect merging.
KNOWN = {
    *VARIANTS, "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "trainable_token_indices", "use_rslora", "velora_config",
}  # fmt: skip


class Adapter:
    """One opened LoRA adapter: its header is read, no weights.

    Attributes:
        folder: with the two files.
        source: a Hub id, or the folder's name, as given by the user.
        revision: commit of a Hub adapter, or ``""``.
        weight: factor of all its terms.
        settings: ``adapter_config.json``.
        file: with the weights.
        opened: size and time of both files when opened (``compress.files.stamps``).
        tensors: name without ``base_model.model.`` → TensorInfo.
        warnings: lines for the user.
    """

    def __init__(self, folder: Path, source: str, revision: str = "", weight: float = 1.0) -> None:
        """
        Raises:
            CheckpointError: the files are missing, damaged, or not a LoRA that can be merged.
        """
        self.folder, self.source, self.revision, self.weight = folder, source, revision, weight
        check_folder(folder)
        self.warnings: list[str] = []
        self._patterns: dict[str, Any] = {}  # compiled
        self._matching = 0.0  # seconds spent in matches
        self.file = folder / WEIGHTS
        self.opened = stamps([folder / CONFIG, self.file])
        if not (folder / CONFIG).is_file():
            is_model = (folder / "config.json").is_file()
            hint = "it is a checkpoint: give it as MODEL" if is_model else "PEFT writes it"
            raise self.error(f"no {CONFIG} in {folder}", hint)
        if (folder / CONFIG).stat().st_size > LARGEST_CONFIG:
            raise self.error(f"{CONFIG} has more than {LARGEST_CONFIG:,} bytes", "another file?")
        self.settings: Mapping[str, Any] = read_json(folder / CONFIG)
        self._check_settings()
        if not self.file.is_file():
            hint = "PEFT writes it; an adapter in several files is not supported"
            if (folder / "adapter_model.bin").is_file():
                hint = (
                    "adapter_model.bin is a pickle, which is not read: open it where you trust it "
                    "with PeftModel.from_pretrained, and save_pretrained writes safetensors"
                )
            raise self.error(f"no {WEIGHTS} in {folder}", hint)
        found = scan_safetensors(self.file)
        self.tensors = {name.removeprefix(PREFIX): info for name, info in found.items()}
        if len(self.tensors) < len(found):
            raise self.error(f"{WEIGHTS} has two tensors of one name", "save it again with PEFT")
        if not found:
            raise self.error(f"{WEIGHTS} holds no tensors", "was it saved before its weights were?")

    @classmethod
    def open(cls, text: str, *, token: str | None = None, cache_dir: str | None = None) -> Adapter:
        """Open a local folder, or fetch a Hub id.

        Args:
            text: ``PATH``, ``PATH=WEIGHT``; a Hub id may end in ``@REVISION``.

        Raises:
            UsageError: neither a folder nor something that can be a Hub id.
            CheckpointError: see ``Adapter``, or the Hub refused.
        """
        name, weight = split_weight(text)
        folder = Path(os.path.expanduser(name))
        if folder.is_dir():
            return cls(folder, folder.resolve().name, weight=weight)
        hub_id, linked = page_of(name) or (name, "")
        revision = linked
        if not linked and not is_url(hub_id):  # in a URL, what is before the @ is a secret
            hub_id, _, revision = hub_id.partition("@")
        looks_local = hub_id.startswith((".", "/", "~")) or hub_id.count("/") != 1
        if is_url(hub_id) or looks_local or folder.exists():
            raise UsageError(
                f"--adapter {name} is not a folder with an adapter",
                hint=f"a folder with {CONFIG} and {WEIGHTS}, or a Hub id such as someone/my-lora",
            )
        found = download_adapter(
            hub_id, (CONFIG, WEIGHTS), revision=revision or None, token=token, cache_dir=cache_dir
        )
        return cls(found, hub_id, found.name, weight)  # snapshots are named after the commit

    @property
    def label(self) -> str:
        """The adapter as an argument, without local paths: ``someone/my-lora@1a2b…=0.5``."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.source}{revision}" + (f"={self.weight:g}" if self.weight != 1 else "")

    @cached_property
    def files(self) -> dict[str, str]:
        """Name → SHA-256 of the two files."""
        digests = {}
        for name in (CONFIG, WEIGHTS):
            with (self.folder / name).open("rb") as stream:
                digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return digests

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights' file."""
        return self.files[WEIGHTS]

    def fingerprint(self) -> str:
        """A text that identifies the adapter: it changes with its files and its weight."""
        return json.dumps([self.weight, self.files])

    def error(self, what: str, hint: str = "") -> CheckpointError:
        """An error that names the adapter."""
        return CheckpointError(f"adapter {short(self.source)[1:-1]}: {what}", hint=hint)

    # --- adapter_config.json -----------------------------------------------------------------

    def _check_settings(self) -> None:
        given = self.settings
        kind = given.get("peft_type")
        if kind != "LORA":
            what = f"{short(kind)[:40]} of PEFT, not LoRA" if kind else f"{CONFIG} has no peft_type"
            raise self.error(what, MERGE if kind else "is it an adapter of PEFT?")
        for key, variant in VARIANTS.items():
            if given.get(key):
                raise self.error(f"{variant} is not supported", MERGE)
        start = given.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
            raise self.error(
                f"init_lora_weights {short(start)} changed the base model, too",
                "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA",
            )
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = given.get(key) or {}
            if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
                raise self.error(f"{key} is not a table of at most {MOST_PATTERNS} patterns")
        for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = given.get(key)
            names = [] if value is None else [value] if isinstance(value, str) else value
            fits = isinstance(names, list) and len(names) <= MOST_PATTERNS
            if not fits or not all(isinstance(name, str) for name in names):
                raise self.error(f"{key} is not a list of at most {MOST_PATTERNS} names")
        layers = given.get("layers_to_transform")
        layers = layers if isinstance(layers, list) else [layers or 0]
        if not all(isinstance(layer, int) for layer in layers):
            raise self.error("layers_to_transform is not a list of whole numbers")
        unknown = sorted(key for key in given.keys() - KNOWN if given[key])
        if unknown:
            self.warnings.append(
                f"adapter {self.source}: {CONFIG} has keys that packlight does not know, first "
                f"{short(unknown[0])}"
            )

    def rank(self, module: str) -> int:
        """The rank of a module, from the config."""
        value = self._of_pattern("rank_pattern", "r", 8, module)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if not is_number or not 1 <= value <= LARGEST:
            raise self.error(f"the rank of {short(module)} is {short(value)}, not a whole number")
        return int(value)

    def scaling(self, module: str) -> float:
        """The factor of ``B·A`` of a module, including the adapter's weight."""
        value = self._of_pattern("alpha_pattern", "lora_alpha", 8, module)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < 1e9:
            raise self.error(f"lora_alpha of {short(module)} is {short(value)}, not a number")
        rank = self.rank(module)
        divisor = math.sqrt(rank) if self.settings.get("use_rslora") else rank
        return self.weight * float(value / divisor)

    def targets(self, module: str, *, is_linear: bool) -> bool:
        """Whether ``target_modules`` and related keys select a module (as PEFT's
        ``check_target_module_exists``).

        Args:
            module: name in the model.
            is_linear: whether it is a linear of a block, as ``all-linear`` selects.
        """
        given = self.settings
        excluded, targets = given.get("exclude_modules") or [], given.get("target_modules")
        if isinstance(excluded, str):
            if self._matches(excluded, module):
                return False
        elif ends_with_one(module, excluded):
            return False
        if targets is None:
            return True  # PEFT's default for the family, which it resolves when it saves
        if targets == "all-linear":
            return is_linear
        if isinstance(targets, str):
            return self._matches(targets, module)
        if module in targets:
            return True
        return ends_with_one(module, targets) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        """Whether ``layers_to_transform`` includes a module."""
        layers = self.settings.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.settings.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            lead = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
            found = self._search(rf"{lead}(?:{pattern})\.(?P<layer>\d+)\.", module, "match")
            if found:
                number = int(found.group("layer"))
                return number in layers if isinstance(layers, list) else number == layers
        return False

    def _of_pattern(self, patterns: str, default: str, otherwise: int, module: str) -> Any:
        """The value of the first pattern that a module's name ends with, else the default."""
        for pattern, value in (self.settings.get(patterns) or {}).items():
            if self._search(rf"(.*\.)?({pattern})$", module, "match"):
                return value
        return self.settings.get(default, otherwise)

    def _matches(self, pattern: str, module: str) -> bool:
        return self._search(pattern, module, "fullmatch") is not None

    def _search(self, pattern: str, text: str, how: str) -> Any:
        """Match an untrusted pattern, within ``PATIENCE`` seconds."""
        import regex  # has a timeout, which re lacks

        began = time.thread_time()
        try:
            if pattern not in self._patterns:
                if len(pattern) > LONGEST_PATTERN:
                    raise regex.error("too long")
                self._patterns[pattern] = regex.compile(pattern)
            if self._matching > MOST_MATCHING:
                raise TimeoutError
            return getattr(self._patterns[pattern], how)(text, timeout=PATIENCE)
        except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
            why = "takes too long" if isinstance(error, TimeoutError) else "is not valid"
            raise self.error(f"the pattern {short(pattern)} of {CONFIG} {why}") from error
        finally:
            self._matching += time.thread_time() - began

    @property
    def ties(self) -> bool:
        """Whether it was trained with a tied head, where the model's is tied."""
        return bool(self.settings.get("ensure_weight_tying"))

    @property
    def modules_to_save(self) -> Sequence[str]:
        """Names, or name suffixes, of modules that the adapter replaces completely."""
        names = self.settings.get("modules_to_save") or []
        return [names] if isinstance(names, str) else names

    def saves_whole(self, module: str) -> bool:
        """Whether a module is one of ``modules_to_save``, or part of one."""
        parts = module.split(".")
        above = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(name.endswith(end) for end in self.modules_to_save for name in above)

    def token_rows(self, module: str, vocabulary: int) -> list[int]:
        """The rows of a module's trained tokens, from ``trainable_token_indices``.

        Raises:
            CheckpointError: not a list of rows.
        """
        rows = self.settings.get("trainable_token_indices")
        if isinstance(rows, dict):
            rows = next((rows[end] for end in rows if module.endswith(end)), None)
        found = rows if isinstance(rows, list) else []
        fits = all(isinstance(row, int) and 0 <= row < vocabulary for row in found)
        if not fits or not found or len(set(found)) < len(found):
            raise self.error(f"trainable_token_indices of {short(module)} are not ids of tokens")
        return found


def ends_with_one(module: str, ends: Sequence[str]) -> bool:
    """Whether a module's name equals one of ``ends``, or ends with ``.`` and one of them."""
    return any(module == end or module.endswith(f".{end}") for end in ends)


def split_weight(text: str) -> tuple[str, float]:
    """``PATH=0.5`` → ``("PATH", 0.5)``; the weight is 1 without ``=``, or where that folder exists.

    Raises:
        UsageError: empty, or the weight is not a finite number.
    """
    name, sign, tail = text.rpartition("=")
    weight = 1.0
    if not sign or Path(os.path.expanduser(text)).is_dir():
        name = text
    else:
        try:
            weight = float(tail)
        except ValueError:
            weight = math.nan
    if not name or not math.isfinite(weight):
        raise UsageError(
            f"--adapter {text} is not PATH or PATH=WEIGHT", hint="for example --adapter my-lora=0.5"
        )
    return name, weight
