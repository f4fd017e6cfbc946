"""Makes the checkpoints of ``saved_by_4/`` and ``saved_by_5/``: seeded, one block, under 300 kB.

    python tests/data/save.py    in an environment with transformers 4, then in one with 5

Version 4 makes them; version 5 loads those and saves them again, as after further training.

llama    SentencePiece's pieces, no BOS in front, LlamaTokenizer
llama3   byte-level, a class of no model, additional special tokens; rope scaling, tied head
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import tiny  # noqa: E402
from tiny_tokenizers import LLAMA2_CHAT, MAJOR, _pieces, save_tokenizer  # noqa: E402

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 20000.0},
    "llama3": {
        "vocab_size": 320,
        "bos_token_id": 300,
        "eos_token_id": 304,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": tiny.CONFIGS["llama3"]["rope_scaling"]
        | {"original_max_position_embeddings": 64},
    },
}


def llama(folder: Path) -> Any:
    model = folder / "tokenizer.model"
    model.write_bytes(_pieces(tiny.TEXT, 400))
    make = transformers.LlamaTokenizerFast
    converted = make(vocab_file=str(model), legacy=False, add_prefix_space=True)
    file = folder / "tokenizer.json"
    converted.backend_tokenizer.save(str(file))
    keys = {"legacy": False, "add_bos_token": False, "chat_template": LLAMA2_CHAT}
    return make(tokenizer_file=str(file), vocab_file=str(model), **keys)


def llama3(folder: Path) -> Any:
    save_tokenizer("llama3", folder, pieces=300)
    made = AutoTokenizer.from_pretrained(folder)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        bos_token=made.bos_token,
        eos_token=made.eos_token,
        additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>"],
        chat_template=made.chat_template,
    )


def main() -> None:
    for name, keys in MODELS.items():
        folder = HERE / f"saved_by_{MAJOR}" / name
        if MAJOR == 4:
            with tempfile.TemporaryDirectory() as scratch:
                tokenizer = {"llama": llama, "llama3": llama3}[name](Path(scratch))
                tokenizer.save_pretrained(folder)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON | keys))
            tiny._fill(model, seed=0)
            model.to(torch.bfloat16).save_pretrained(folder)
        else:
            older = HERE / "saved_by_4" / name
            AutoTokenizer.from_pretrained(older).save_pretrained(folder)
            AutoModelForCausalLM.from_pretrained(older, dtype="auto").save_pretrained(folder)


main()
