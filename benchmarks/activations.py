"""Measures llama.cpp's memory beyond weights and KV cache, for `activation_bytes` of `fit`.

    python benchmarks/activations.py            # a few minutes; writes activations.json and .md

Every model is a GGUF file with the header that packlight writes for that `config.json`, and a
sparse region for the weights (zeros without disk blocks): buffers depend on shapes, not on values.
Most have two blocks: llama.cpp reuses its compute buffer for all blocks, and two are needed because
the last one computes only the rows whose logits are requested. Rows with more blocks show the
memory of each additional block. Each measurement runs in its own process.

Byte-level vocabularies are random, with the published numbers of tokens and merges, because the
tokenizer's tables are part of an app's memory; the others are the demo's with padding.
"""

import argparse
import ctypes
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

# Uses internal names: writes files of zeros, and reads llama.cpp's buffers.
from compress.decoder.config import DecoderConfig
from compress.decoder.tokenizer_facts import facts_from_child
from compress.plan.shapes import PlanRequest
from compress.verify.resources import AnonymousPeak, read_status
from exporters.gguf.planning import plan
from exporters.gguf.runtime import BATCH, LlamaCpp, load_library
from exporters.gguf.tokenizer import CONTROL, NORMAL, Vocabulary, read_vocabulary
from exporters.gguf.writer import ALIGNMENT, write_head

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "compress" / "demo" / "model"
CONTEXTS = (512, 2048)
THREADS = 2  # the fast cores of a phone; llama.cpp has some bytes of scratch for each
OUTPUTS = 5  # n_outputs_max among the 32-bit numbers at the head of llama_context_params
TYPE = "Q4_K_M"

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
_LLAMA3 = _LLAMA | {
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
# Name → (config.json, merges of the published tokenizer: 0 for SentencePiece, which has none).
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "demo": (json.loads((DEMO / "config.json").read_text(encoding="utf-8")), 0),
    "SmolLM2-135M": (
        _LLAMA
        | {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
            "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        48900,
    ),
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6,
            "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0,
            "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
        },
        151387,
    ),
    "Llama-3.2-1B": (
        _LLAMA3
        | {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "head_dim": 64, "max_position_embeddings": 131072, "tie_word_embeddings": True,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
        },
        280147,
    ),
    "Qwen2.5-1.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6,
            "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
            "max_position_embeddings": 32768, "rope_theta": 1000000.0,
            "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
        },
        151387,
    ),
    "phi-2": (
        {
            "architectures": ["PhiForCausalLM"], "model_type": "phi", "layer_norm_eps": 1e-5,
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 51200,
            "max_position_embeddings": 2048, "rope_theta": 10000.0, "partial_rotary_factor": 0.4,
            "hidden_act": "gelu_new", "tie_word_embeddings": False,
            "bos_token_id": 50256, "eos_token_id": 50256,
        },
        50000,
    ),
    "Phi-3-mini": (
        {
            "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rms_norm_eps": 1e-5,
            "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 32000,
        },
        0,
    ),
    "Llama-3-8B": (
        _LLAMA3
        | {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "max_position_embeddings": 8192, "tie_word_embeddings": False,
        },
        280147,
    ),
}  # fmt: skip
# Number of blocks to build, if not two.
BLOCKS = {"demo": (6,), "SmolLM2-135M": (2, 30), "Llama-3.2-1B": (2, 8)}


# --- files without weights ------------------------------------------------------------------------
def write_hollow(path: Path, config: DecoderConfig, merges: int) -> None:
    """A GGUF file whose weights are a sparse region of zeros."""
    made = plan(config, PlanRequest({"type": TYPE}, path.stem))
    own = None if merges else read_vocabulary(facts_from_child(DEMO), config)
    vocabulary = own or byte_level(config, merges)
    write_head(path, made, config, vocabulary)
    with path.open("r+b") as stream:
        size = aligned(path.stat().st_size) + sum(aligned(entry.nbytes) for entry in made.entries)
        stream.truncate(size)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def byte_level(config: DecoderConfig, merges: int) -> Vocabulary:
    """A byte-level vocabulary of the right size: random words of up to 12 characters."""
    chance = random.Random(0)
    tokens = sorted(ByteLevel.alphabet())
    words = [token for token in tokens if token.isascii()]
    known = set(tokens)
    pairs: dict[str, None] = {}
    while len(tokens) < config.vocab_size or len(pairs) < merges:
        left, right = chance.choice(words), chance.choice(words)
        if len(left + right) > 12:
            continue
        if len(pairs) < merges:
            pairs[f"{left} {right}"] = None
        if len(tokens) < config.vocab_size and left + right not in known:
            tokens.append(left + right)
            known.add(left + right)
            words.append(left + right)
    ends = {config.bos_token_id, *config.eos_token_ids}
    return Vocabulary(
        model="gpt2",
        pre="llama-bpe",
        tokens=tokens,
        types=[CONTROL if index in ends else NORMAL for index in range(config.vocab_size)],
        scores=[],
        merges=list(pairs),
        special={"bos": config.bos_token_id or 0, "eos": config.eos_token_ids[0]},
        add_bos=False,
        add_eos=False,
        add_space_prefix=False,
        chat_templates={},
        strips_after_special=False,
        notes=(),
    )


# --- in a child process ---------------------------------------------------------------------------
def measure(path: Path, context: int, outputs: int) -> dict[str, Any]:
    """Load a file, evaluate one chunk, and return the memory by llama.cpp's log and by the kernel.

    Args:
        path: a GGUF file with sparse weights.
        context: positions of the KV cache.
        outputs: rows of logits for which llama.cpp reserves memory.

    Returns:
        Bytes. ``compute_buffer``, ``output_buffer``, ``kv_cache`` and ``repacked`` (weights in
        another order, a copy that the CPU backend makes) are llama.cpp's own figures, from its log;
        ``heap`` and ``peak`` are anonymous memory of the process above what it had before loading
        (Python, numpy: 20 MB that an app does not have), less the cache and the repacked weights,
        after loading and at the highest moment.
    """
    library = load_library()
    log: list[str] = []
    # The same ctypes class as the runtime's: function types are cached by signature.
    keep = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        lambda level, text, data: log.append((text or b"").decode("utf-8", "replace"))
    )
    library.functions.llama_log_set(keep, None)
    defaults = library.functions.llama_context_default_params

    def with_outputs() -> Any:
        params = defaults()
        ctypes.cast(ctypes.byref(params), ctypes.POINTER(ctypes.c_uint32))[OUTPUTS] = outputs
        return params

    library.functions.llama_context_default_params = with_outputs
    before = read_status("RssAnon")
    with AnonymousPeak() as anonymous:
        runtime = LlamaCpp(path, context=context, threads=THREADS)
        loaded = read_status("RssAnon")
        runtime.feed([5] * BATCH)
    if before is None or loaded is None or anonymous.peak is None:
        raise SystemExit("needs /proc: run it on Linux")
    text = "".join(log)
    if not re.search(rf"n_outputs_max += {outputs}\n", text):
        raise SystemExit("n_outputs_max is elsewhere in this version's llama_context_params")
    cache, repacked = buffer(text, "KV"), buffer(text, "CPU_REPACK model")
    return {
        "compute_buffer": buffer(text, "compute"),
        "output_buffer": buffer(text, "output"),
        "kv_cache": cache,
        "repacked": repacked,
        "heap": loaded - before - cache - repacked,
        "peak": anonymous.peak - before - cache - repacked,
        "runtime": runtime.name,
    }


def buffer(log: str, kind: str) -> int:
    """Bytes that llama.cpp's log gives for a kind of buffer, in hundredths of a MiB there."""
    sizes = re.findall(rf"{kind} buffer size = +([\d.]+) MiB", log)
    return round(sum(float(size) for size in sizes) * 2**20)


# --- the table ------------------------------------------------------------------------------------
def measurements() -> Iterator[dict[str, Any]]:
    """One row per shape, number of blocks and context."""
    for name, (published, merges) in SHAPES.items():
        for blocks in BLOCKS.get(name, (2,)):
            config = DecoderConfig.from_hf(published | {"num_hidden_layers": blocks})
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{name}.gguf"
                write_hollow(path, config, merges)
                for context in CONTEXTS:
                    row = in_child(path, context, 1)
                    every = in_child(path, context, BATCH)["compute_buffer"]
                    yield {
                        "model": name,
                        "blocks": blocks,
                        "context": context,
                        **row,
                        "compute_buffer_all_logits": every,
                    }


def in_child(path: Path, context: int, outputs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--file", path, "--context", context, "--outputs", outputs]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def table(rows: list[dict[str, Any]], runtime: str) -> str:
    """The rows as Markdown, in MB of a million bytes."""
    from compress.decoder.footprint import activation_bytes

    lines = [
        "# What llama.cpp needs beside weights and KV cache",
        "",
        f"{runtime} on the CPU, {TYPE}, {THREADS} threads, one chunk of {BATCH} tokens,",
        "logits of its last position; MB of 10⁶ bytes. Written by `benchmarks/activations.py`; the",
        "formula is `activation_bytes` of `compress/decoder/footprint.py`.",
        "",
        "| model | blocks | context | heap | compute buffer | peak | formula | all logits |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        config = DecoderConfig.from_hf(SHAPES[row["model"]][0])
        sizes = [row["heap"], row["compute_buffer"], row["peak"]]
        sizes += [activation_bytes(config, row["context"]), row["compute_buffer_all_logits"]]
        cells = [row["model"], row["blocks"], row["context"]]
        cells += [f"{size / 1e6:.1f}" for size in sizes]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "- heap: anonymous memory after loading: the tokenizer's tables above all.",
        "- compute buffer: in llama.cpp's own words, with `n_outputs_max` = 1.",
        "- peak: anonymous memory at the highest moment. Heap and peak are without Python, KV",
        "  cache and the weights that the CPU backend repacks. Less than heap + compute buffer",
        "  where pages of the buffer are never touched.",
        f"- all logits: the compute buffer where `n_outputs_max` is left at {BATCH}. On a CPU the",
        "  rows that are not asked for are never touched and cost no memory.",
        "- heap and peak vary by some MB from run to run; the compute buffer does not.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure llama.cpp's buffers.")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, default=CONTEXTS[0], help=argparse.SUPPRESS)
    parser.add_argument("--outputs", type=int, default=1, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.file:
        print(json.dumps(measure(chosen.file, chosen.context, chosen.outputs)))
        return
    rows = []
    for row in measurements():
        rows.append(row)
        print(row["model"], row["blocks"], row["context"], row["peak"], file=sys.stderr)
    runtime = rows[0]["runtime"]
    for row in rows:
        del row["runtime"]
    configs = {name: published for name, (published, _) in SHAPES.items()}
    facts = {"runtime": runtime, "type": TYPE, "threads": THREADS, "chunk": BATCH}
    facts |= {"configs": configs, "rows": rows}
    (HERE / "activations.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (HERE / "activations.md").write_text(table(rows, runtime), encoding="utf-8")


if __name__ == "__main__":
    main()
