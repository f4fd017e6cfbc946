"""LoRA adapters on tiny checkpoints, made and merged by PEFT itself.

make(base, folder, seed=…, **config) -> Path     an adapter as PEFT saves it
merged(base, *adapters) -> model                 what merge_and_unload makes of them
save(model, base, folder) -> Path                that as a checkpoint, with base's tokenizer
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import tiny

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(base: Path, folder: Path, *, seed: int = 0, dtype: str = "float32", **config: Any) -> Path:
    """Write an adapter with random weights; ``config`` are ``LoraConfig``'s arguments."""
    import peft
    import torch

    keys: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": LINEARS}
    keys |= {"task_type": "CAUSAL_LM"} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny.reference(base), peft.LoraConfig(**keys))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                scale = 0.3 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
                with torch.no_grad():
                    parameter.add_(noise * (scale if "lora_" in name else 0.3 * scale))
        if dtype != "float32":
            model.to(getattr(torch, dtype))
        model.save_pretrained(folder)
    return folder


def merged(base: Path, *adapters: Path) -> Any:
    """transformers' model of the checkpoint, float32, the adapters merged one after the other."""
    import peft

    model = tiny.reference(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter in adapters:
            model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model


def save(model: Any, base: Path, folder: Path) -> Path:
    """A model as a checkpoint, with the tokenizer of another."""
    model.save_pretrained(folder)
    for file in base.iterdir():
        if not (folder / file.name).exists() and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    return folder
