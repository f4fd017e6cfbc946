"""Errors for files and folders that are not a checkpoint: each names what was found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.decoder.config_json import json_or_empty, read_json, short
from compress.errors import CheckpointError, PacklightError, UsageError
from compress.files import open_plain

__all__ = ["explain_folder", "not_a_weight", "other_file", "read_config"]


UNFINISHED = (".incomplete", ".aria2", ".part", ".partial", ".crdownload", ".download")
# Files that trainers write beside weights.
OTHERS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")


def read_config(folder: Path, name: str = "", listed: Sequence[str] = ()) -> dict[str, Any]:
    """Read a checkpoint's ``config.json``.

    Args:
        folder: of the checkpoint.
        name: the checkpoint as the user typed it; default: the folder's path.
        listed: names of all files at the folder's origin.

    Raises:
        CheckpointError: missing (the error names what is there instead), or not readable.
    """
    try:
        return read_json(folder / "config.json")
    except CheckpointError as error:
        if (folder / "config.json").exists():
            raise
        raise explain_folder(folder, error, name, listed) from error


def explain_folder(
    folder: Path, otherwise: PacklightError, name: str = "", listed: Sequence[str] = ()
) -> PacklightError:
    """The error for a folder that is no checkpoint, by the files in it.

    Args:
        folder: without ``config.json``, or without weights of known names.
        otherwise: the error where no file is recognized.
        name: the folder as the user typed it; default: its path.
        listed: names of all files at the folder's origin.
    """
    name = name or str(folder)
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    graphs = [f"onnx/{graph.name}" for graph in folder.glob("onnx/*.onnx")]
    files = sorted({*(file.name for file in there if file.is_file()), *graphs, *listed})
    if any(re.match(r"adapter_(config\.json|model\.)", file) for file in files):
        return adapter_error(name, json_or_empty(folder / "adapter_config.json"))
    if {"report.json", "plan.json"} <= set(files):
        return CheckpointError(
            f"{name} is a build of packlight: quantized weights, not a checkpoint",
            hint="give the checkpoint that it was made from; packlight verify FOLDER --baseline "
            "MODEL runs it",
        )
    package = any(path.suffix == ".mlpackage" for path in (folder, *there))
    if package or "model_index.json" in files:
        what = "a Core ML package" if package else "a pipeline of diffusers"
        return CheckpointError(f"{name} is {what}, not a language model's checkpoint")
    if parts := [file for file in files if file.endswith(UNFINISHED)]:
        return CheckpointError(
            otherwise.message, hint=f"{short(parts[0])} is an unfinished download: finish it"
        )
    configured = (folder / "config.json").is_file()
    if not configured and "params.json" in files:
        return CheckpointError(
            f"{name} is in the layout of the model's makers (params.json), not Hugging Face's",
            hint="give the same model's folder with config.json and *.safetensors",
        )
    files = [file for file in files if not OTHERS.fullmatch(file)]
    for pattern, explain in (
        (r"\.(safetensors|bin)$", shards_error if configured else None),
        (r"\.(pth?|ckpt|pkl)$", pickle_error),
        (r"\.gguf$", lambda name, files: gguf_error(f"{name} holds {short(files[0])}, which")),
        (r"\.(h5|msgpack|onnx)$", library_error),
    ):
        found = [file for file in files if re.search(pattern, file)]
        if found and explain:
            return explain(name, found)
    if inside := folders_inside(there):
        last = short(inside[-1].relative_to(folder).as_posix())
        return CheckpointError(otherwise.message, hint=f"it holds a checkpoint's folder: {last}")
    return otherwise


def folders_inside(there: Iterable[Path]) -> list[Path]:
    """Folders with a ``config.json`` inside those of a Trainer (``checkpoint-500``), of the Hub's
    cache (``snapshots/COMMIT``) or of the user; of numbered ones the last is last."""
    below = [inner for path in there if path.name == "snapshots" for inner in path.glob("*")]
    found = [path for path in (*there, *below) if (path / "config.json").is_file()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def pickle_error(name: str, files: Sequence[str]) -> PacklightError:
    """The error for a pickle saved by a training loop."""
    return CheckpointError(
        f"{name} has its weights in {short(files[0])}, a pickle of another layout",
        hint="save the model with transformers: model.save_pretrained(FOLDER)",
    )


def library_error(name: str, files: Sequence[str]) -> PacklightError:
    """The error for weights of TensorFlow, JAX or a runtime."""
    return CheckpointError(
        f"{name} has its weights in {short(files[0])}, which PyTorch does not read",
        hint="the same model with *.safetensors, or load it with transformers (from_tf, from_flax) "
        "and save it",
    )


def adapter_error(name: str, config: Mapping[str, Any]) -> PacklightError:
    """The error for a PEFT adapter."""
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    named = isinstance(base, str) and re.fullmatch(r"[\w./~-]{1,100}", base)
    plain = isinstance(kind, str) and kind.isalnum() and len(kind) < 20
    label = "PEFT" if not plain else "LoRA" if kind == "LORA" else kind
    return CheckpointError(
        f"{name} is a {label} adapter{f' of {base}' if named else ''}, not a model",
        hint=f"packlight build {base if named else 'BASE'} --adapter {name}",
    )


def shards_error(name: str, files: Sequence[str]) -> PacklightError:
    """The error for shards without an index.

    Args:
        name: of the folder.
        files: the shards.
    """
    first = files[0]
    whole = "pytorch_model.bin" if first.endswith(".bin") else "model.safetensors"
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    numbered = re.search(r"-of-0*([0-9]+)\.", first)
    if numbered is None or numbered[1] == "1":
        hint = f"rename it to {whole}, if it holds the whole model"
    else:
        hint = f"download {whole}.index.json, too; the shards are {numbered[1]}"
    what = "its index is missing" if numbered else f"not {whole} or {whole}.index.json"
    return CheckpointError(f"{name} holds {short(first)}{more}, but {what}", hint=hint)


def gguf_error(what: str) -> PacklightError:
    """The error for a GGUF file where a checkpoint is expected."""
    return UsageError(
        f"{what} is a GGUF file: quantized weights, not a checkpoint",
        hint="give the Hugging Face checkpoint that it was made from; packlight inspect FILE shows "
        "what a GGUF file holds, packlight verify FILE --baseline MODEL runs it",
    )


def other_file(path: Path) -> PacklightError:
    """The error for a single file given as MODEL."""
    try:
        with open_plain(path) as stream:
            head = stream.read(9)
    except OSError as error:
        return UsageError(f"{path} cannot be read: {error.strerror}")
    folder = path.parent
    if head[:4] == b"GGUF":
        return gguf_error(str(path))
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return UsageError(
            f"{path} is a pickle: weights alone, without config.json and tokenizer",
            hint=f"give the folder that holds all of them, such as {folder}",
        )
    if path.name.endswith((".safetensors", ".index.json")) or path.name == "config.json":
        return UsageError(
            f"{path} is not a folder, but one file of a checkpoint",
            hint=f"give its folder: {folder}",
        )
    return UsageError(
        f"{path} is not a folder with a checkpoint",
        hint="a folder holds config.json, *.safetensors and the tokenizer's files",
    )


def not_a_weight(file: str, name: str, dtype: str) -> CheckpointError:
    """The error for a tensor that is not float32, float16 or bfloat16."""
    message = f"{file}: {short(name)} has dtype {short(dtype)}, not F32, F16 or BF16"
    if dtype == "F64":
        return CheckpointError(message, hint="store it as float32: model.float().save_pretrained()")
    if dtype in ("BOOL", "I64", "U64", "I16", "U16"):
        return CheckpointError(
            message,
            hint="it is a buffer (a mask, a counter), no weight: remove it from the file",
        )
    return CheckpointError(
        message, hint="packlight starts from float checkpoints, not from quantized ones"
    )
