"""GGUF files of models with layers that convolve: types, keys, and what is read back."""

from __future__ import annotations

import gguf
from exported import Exports, config_of
from writing import plan_for

from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config import DecoderConfig
from compress.decoder.footprint import footprint
from exporters.gguf.inspection import describe
from exporters.gguf.runtime import open_runtime

ATTENDING = (2, 5, 8, 10, 12, 14)
LFM2: dict[str, object] = {
    "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "vocab_size": 65536,
    "hidden_size": 2048, "block_ff_dim": 12288, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 128_000,
    "full_attn_idxs": list(ATTENDING),
}  # fmt: skip


def test_names_and_keys_are_those_of_gguf_py(exported: Exports) -> None:
    made = exported("gguf", "lfm2", type="Q8_0")
    reader = gguf.GGUFReader(made.path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LFM2, 4)
    expected = set()
    for name in made.checkpoint.tensors:
        stem, _, kind = name.rpartition(".")
        expected.add(f"{names.get_name(stem)}.{kind}")
    assert {tensor.name for tensor in reader.tensors} == expected
    fields = reader.fields
    assert fields["lfm2.attention.head_count_kv"].contents() == [0, 0, 2, 0]
    assert fields["lfm2.shortconv.l_cache"].contents() == 3
    assert fields["lfm2.feed_forward_length"].contents() == 96


def test_the_file_says_what_memory_it_needs(exported: Exports) -> None:
    made = exported("gguf", "lfm2", type="Q8_0")
    read = DecoderConfig.from_hf(describe(made.path)["config"])
    own = config_of(Checkpoint.open(made.checkpoint.path))
    assert read.layers == own.layers == (1, 1, 0, 1)
    assert [kind.taps for kind in read.kinds] == [kind.taps for kind in own.kinds] == [0, 3]
    assert footprint(read, 1, 0, 50) == footprint(own, 1, 0, 50)


def test_presets_count_the_layers_that_attend() -> None:
    """llama.cpp counts value projections as it meets them, and finds no heads in layer 0."""
    config = DecoderConfig.from_hf(LFM2)

    def types(kind: str, part: str) -> dict[int, str]:
        entries = plan_for("gguf", config, {"type": kind}).entries
        return {
            int(entry.name.split(".")[1]): entry.grid
            for entry in entries
            if f".{part}.weight" in entry.name
        }

    # More bits: the last eighth (rounded up), and each third from the second on.
    values = dict(zip(ATTENDING, ["Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K"], strict=True))
    assert types("Q4_K_M", "v_proj") == values
    assert list(types("Q3_K_M", "v_proj").values()) == ["Q5_K"] * 2 + ["Q4_K"] * 4
    assert set(types("Q2_K", "v_proj").values()) == {"Q3_K"}
    assert set(types("Q4_K_M", "in_proj").values()) == {"Q4_K"}
    assert set(types("Q4_K_M", "conv").values()) == {"F32"}
    assert len(types("Q4_K_M", "out_proj")) == 10


def test_llama_cpp_drops_a_state_that_it_cannot_cut(exported: Exports) -> None:
    made = exported("gguf", "lfm2", type="Q8_0")
    ids = made.tokens(30)
    runtime = open_runtime(made.path, context=64, threads=1)
    wanted = runtime.logits(ids)
    assert runtime.rewind(10) in (0, 10)
    kept = runtime._used
    found = runtime.extend(ids[kept:])
    assert abs(found - wanted[kept:]).max() < 0.05
    runtime.close()
