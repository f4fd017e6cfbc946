"""Writes the files beside the weights: ``config.json`` with ``quantization``, and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.side_files import hf_config, write_side_files
from compress.decoder.config import DecoderConfig
from compress.decoder.config_json import write_json
from compress.grids import get_grid
from compress.plan.shapes import Plan, PlanEntry
from exporters.mlx.planning import FLOATS, MXFP4


def write_folder(plan: Plan, config: DecoderConfig, checkpoint: Checkpoint, folder: Path) -> None:
    """Write all files except the safetensors."""
    write_side_files(config, checkpoint, folder)
    quantized = quantization(plan)
    keys = mlx_config(config) | {"quantization": quantized, "quantization_config": quantized}
    write_json(folder / "config.json", keys, sort_keys=True)


def without_quantization(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the float model in a folder's ``config.json``."""
    return {key: v for key, v in keys.items() if key not in ("quantization", "quantization_config")}


def quantization(plan: Plan) -> dict[str, Any]:
    """``quantization`` of ``config.json``: bits and group of the settings, and of each module that
    differs from them, under its name."""
    common = {key: plan.settings[key] for key in ("bits", "group_size", "mode")}
    if common["mode"] == MXFP4:
        common |= {"bits": 4, "group_size": 32}  # its only ones
    found: dict[str, Any] = dict(common)
    for entry in plan.entries:
        if entry.grid not in FLOATS.values() and (own := entry_quantization(entry)) != common:
            if own["mode"] == common["mode"]:
                del own["mode"]
            found[entry.target_name.removesuffix(".weight")] = own
    return found


def entry_quantization(entry: PlanEntry) -> dict[str, Any]:
    """Bits, group and mode of one tensor."""
    grid = get_grid(entry.grid)
    mode = MXFP4 if entry.grid == MXFP4 else "affine"
    return {"bits": grid.bits, "group_size": grid.group_size, "mode": mode}


def exaone_pattern(config: DecoderConfig) -> str | None:
    """``LLLG``: which blocks have a window and rotate; None where all blocks are alike."""
    rotates = [config.kinds[kind].rope is not None for kind in config.layers]
    return None if all(rotates) else "".join("L" if rotated else "G" for rotated in rotates)


def mlx_config(config: DecoderConfig) -> dict[str, Any]:
    """``config.json`` as mlx-lm's classes read it: rotary settings as transformers 4 writes them;
    of longrope the factors of short prompts, since mlx-lm takes the long ones at any length."""
    keys = hf_config(config)
    match config.family:
        case "granitemoehybrid":  # dense: mlx-lm reads this key, not shared_intermediate_size
            keys["intermediate_size"] = config.intermediate_size
        case "gpt2":
            keys.setdefault("n_ctx", config.max_position_embeddings)
        case "exaone4":  # mlx-lm has no defaults, and reads the pattern, not layer_types
            keys |= {"head_dim": config.head_dim, "sliding_window_pattern": exaone_pattern(config)}
            keys = {"rope_scaling": None, "sliding_window": None} | keys
        case "lfm2":  # mlx-lm has no defaults
            keys |= {
                "block_dim": config.hidden_size,
                "block_multiple_of": 1,
                "block_ffn_dim_multiplier": 1.0,
                "conv_bias": False,
                "conv_L_cache": max(kind.taps for kind in config.kinds),
                "norm_eps": config.norm_eps,
                "rope_theta": config.ropes[0].theta,
            }
    nested = keys.get("rope_parameters")
    if isinstance(nested, dict) and "rope_theta" in nested:
        keys.setdefault("rope_theta", nested["rope_theta"])
        if nested.get("rope_type", "default") != "default":
            keys.setdefault("rope_scaling", nested)
    scaling = keys.get("rope_scaling")
    if isinstance(scaling, dict) and "short_factor" in scaling:
        keys["rope_scaling"] = scaling | {"long_factor": scaling["short_factor"]}
    return keys
