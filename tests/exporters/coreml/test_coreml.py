"""The Core ML program of every family, executed by the MIL evaluator, against the reference.

Tolerances: in float32 mode only the constants are float16, and the reference has the same ones, so
only the order of sums differs: 5e-5 on logits of standard deviation 2 (measured: 2e-5). With
float32 rotary tables in the reference it is 0.03 (0.017). In float16 mode every value between
operations is rounded: KL divergence under 1e-4 nats (2e-5).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
from exported import CONTEXT, Exported, Exports, reference

from compress.errors import ArtifactError, UsageError
from exporters.coreml.evaluator import Evaluator
from exporters.coreml.inspection import list_tensors
from exporters.coreml.mil import read_package
from exporters.coreml.runtime import open_runtime

Array = Any
# Every family, on a grid of each kind in turn.
CASES = [
    (family, ("int4-g32", "lut4-g8", "int8-channel-asym")[i % 3], {})
    for i, family in enumerate(tiny.FAMILIES)
] + [("mobilellm", "lut6-g16", {"layer_sharing": True})]
every_family = pytest.mark.parametrize(("family", "grid", "overrides"), CASES)
TOKENS = np.random.default_rng(5).integers(3, 480, CONTEXT).tolist()


def run(evaluator: Evaluator, tokens: list[int], mask: Array, state: Any) -> Array:
    """One call, as by an app; float32 ``[len(tokens), vocab]``."""
    ids = np.asarray([tokens], np.int32)
    return evaluator.predict({"inputIds": ids, "causalMask": mask}, state)["logits"][0]


def zeros(end: int) -> Array:
    return np.zeros((1, 1, 1, end), np.float16)


def expected_logits(built: Exported, tokens: list[int]) -> Array:
    return reference(built, halves=True).logits(tokens)


def kl_divergence(logits: Array, other: Array) -> float:
    """Mean over positions, in nats."""
    p, q = (x.astype(np.float64) - x.max(1, keepdims=True) for x in (logits, other))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(1).mean())


@every_family
def test_logits_of_every_family(
    exported: Exports, family: str, grid: str, overrides: dict[str, Any]
) -> None:
    built = exported("coreml", family, overrides, grid=grid)
    evaluator = Evaluator(built.artifact.path)
    for length in (1, 12, 31, 33, CONTEXT):  # the windows of mistral and phi3-window are 32
        expected = expected_logits(built, TOKENS[:length])
        found = run(evaluator, TOKENS[:length], zeros(length), evaluator.make_state())
        assert np.abs(found - expected).max() < 5e-5
    rounded = open_runtime(built.artifact.path, context=CONTEXT).logits(TOKENS)
    assert np.isfinite(rounded).all()
    assert kl_divergence(expected, rounded) < 1e-4
    assert (expected.argmax(1) == rounded.argmax(1)).mean() > 0.95


@every_family
def test_greedy_generation_with_the_cache_is_that_without(
    exported: Exports, family: str, grid: str, overrides: dict[str, Any]
) -> None:
    built = exported("coreml", family, overrides, grid=grid)
    evaluator = Evaluator(built.artifact.path)
    cached, tokens = evaluator.make_state(), TOKENS[:20]
    with_cache = [int(run(evaluator, tokens, zeros(20), cached)[-1].argmax())]
    without = list(tokens)
    for step in range(32):
        logits = run(evaluator, without, zeros(len(without)), evaluator.make_state())
        without.append(int(logits[-1].argmax()))
        end = len(tokens) + step + 1
        next_logits = run(evaluator, with_cache[-1:], zeros(end), cached)
        with_cache.append(int(next_logits[-1].argmax()))
    assert with_cache[:32] == without[20:]


def triangle(queries: int, end: int) -> Array:
    """The mask of Apple's article: -inf above the diagonal."""
    mask = np.triu(np.full((queries, end), -np.inf, np.float16), k=end - queries + 1)
    return mask[None, None]


@pytest.mark.parametrize("family", ["llama3", "mistral", "phi"])
def test_both_kinds_of_callers_get_the_same_logits(exported: Exports, family: str) -> None:
    built = exported("coreml", family, grid="int4-g32")
    evaluator = Evaluator(built.artifact.path)
    tokens = TOKENS[:40]
    expected = expected_logits(built, tokens)

    state = evaluator.make_state()  # Apple's article: own triangle, slots 0 … n - 1
    apple = [run(evaluator, tokens[:36], triangle(36, 36), state)]
    apple += [run(evaluator, [tokens[i]], zeros(i + 1), state) for i in range(36, 40)]
    assert np.abs(np.concatenate(apple) - expected).max() < 5e-5

    state = evaluator.make_state()  # swift-transformers 1.3: zeros, one more than there are tokens
    swift = [run(evaluator, tokens[:36], zeros(37), state)]
    swift += [run(evaluator, [tokens[i]], zeros(i + 2), state) for i in range(36, 40)]
    # One slot further: the rotary table's rounding differs, nothing else.
    assert np.abs(np.concatenate(swift) - expected).max() < 2e-2
    assert kl_divergence(expected, np.concatenate(swift)) < 1e-5


def test_a_single_first_token_sees_itself_for_both_kinds_of_callers(exported: Exports) -> None:
    built = exported("coreml", "llama3", grid="int4-g32")
    evaluator = Evaluator(built.artifact.path)
    expected = expected_logits(built, TOKENS[:3])
    for shift in (0, 1):
        state = evaluator.make_state()
        found = [run(evaluator, [t], zeros(i + 1 + shift), state) for i, t in enumerate(TOKENS[:3])]
        assert kl_divergence(expected, np.concatenate(found)) < 1e-5


def test_a_mask_of_the_caller_is_added(exported: Exports) -> None:
    built = exported("coreml", "llama3", grid="int4-g32")
    evaluator = Evaluator(built.artifact.path)
    mask = zeros(12)
    mask[..., 4] = -np.inf
    hidden = run(evaluator, TOKENS[:12], mask, evaluator.make_state())
    plain = run(evaluator, TOKENS[:12], zeros(12), evaluator.make_state())
    assert np.array_equal(hidden[:4], plain[:4])
    other = [*TOKENS[:4], TOKENS[4] + 1, *TOKENS[5:12]]
    elsewhere = run(evaluator, other, mask, evaluator.make_state())
    assert np.abs(elsewhere[5:] - hidden[5:]).max() < 1e-5  # what is hidden does not matter
    assert np.abs(plain[5:] - hidden[5:]).max() > 0.1


@pytest.mark.parametrize(
    ("family", "make"),
    [("phi3-longrope", {}), ("phi", {}), ("qwen3", {}), ("mobilellm", {}),
     ("qwen3", {"rope_scaling": tiny.YARN})],
)  # fmt: skip
def test_logits_are_those_of_transformers(
    exported: Exports, family: str, make: dict[str, Any]
) -> None:
    """With float16 weights; float16 rotary tables are what differs."""
    import torch

    built = exported("coreml", family, make, grid="F16")
    evaluator = Evaluator(built.artifact.path)
    found = run(evaluator, TOKENS, zeros(CONTEXT), evaluator.make_state())
    with torch.no_grad():
        model = tiny.reference(built.checkpoint.path)
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(found - expected).max() < 0.03
    assert kl_divergence(expected, found) < 1e-5


# --- massive activations --------------------------------------------------------------------


def test_norms_survive_a_residual_whose_square_is_beyond_float16(
    exported: Exports, tmp_path: Any
) -> None:
    from safetensors.numpy import load_file, save_file

    path = tiny.make("llama", tmp_path, dtype="float16")
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 7] = 3000.0  # 3000² is 137 times float16's largest
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    built = exported.write("coreml", path, {"grid": "F16"})
    expected = expected_logits(built, TOKENS)
    rounded = open_runtime(built.artifact.path, context=CONTEXT).logits(TOKENS)
    assert np.isfinite(rounded).all()
    assert kl_divergence(expected, rounded) < 5e-3


# --- sharing --------------------------------------------------------------------------------


def constants(built: Exported) -> dict[str, dict[str, Any]]:
    function = read_package(built.artifact.path).function("main")
    return {tensor["name"]: tensor for tensor in list_tensors(function)}


def test_tied_embeddings_and_repeated_blocks_are_stored_once(exported: Exports) -> None:
    tied = exported("coreml", "llama3", grid="int4-g32")
    assert not [name for name in constants(tied) if "lm_head" in name]
    shared = exported("coreml", "mobilellm", {"layer_sharing": True}, grid="lut6-g16")
    assert shared.config.num_hidden_layers == 4
    assert len([name for name in constants(shared) if name.endswith("q_proj_weight")]) == 2
    function = read_package(shared.artifact.path).function("main")
    uses = [op for op in function.operations if op.kind == "linear"]
    assert len(uses) == 4 * 7 + 1
    assert shared.artifact.kv_cache_bytes_per_token == 4 * 2 * 2 * 64 * 2


# --- the runtime ----------------------------------------------------------------------------


def test_runtime_feeds_prompts_in_pieces(exported: Exports) -> None:
    built = exported("coreml", "phi3-window", grid="int8-channel-asym")
    runtime = open_runtime(built.artifact.path, context=CONTEXT)
    assert runtime.name.startswith("MIL evaluator (packlight ")
    assert runtime.vocab_size == 512
    whole = runtime.logits(TOKENS)
    runtime = open_runtime(built.artifact.path, context=CONTEXT, batch=7)
    pieces = runtime.logits(TOKENS)
    assert whole.dtype == np.float32
    assert whole.shape == (CONTEXT, 512)
    assert kl_divergence(whole, pieces) < 1e-4
    runtime.reset()
    runtime.feed(TOKENS[:10])
    last = runtime.feed(TOKENS[10:11])
    assert kl_divergence(whole[10:11], last[None]) < 1e-4
    assert np.array_equal(runtime.logits(TOKENS), pieces)  # clears the cache


def test_runtime_refusals(exported: Exports, tmp_path: Any) -> None:
    built = exported("coreml", "llama3", grid="int4-g32")
    with pytest.raises(UsageError, match="64 positions, 65 are asked for"):
        open_runtime(built.artifact.path, context=65)
    with pytest.raises(ArtifactError, match=r"not an \.mlpackage"):
        open_runtime(tmp_path, context=8)
    runtime = open_runtime(built.artifact.path, context=CONTEXT)
    runtime.feed(TOKENS[:60])
    with pytest.raises(UsageError, match="65 tokens do not fit: the runtime has room for 64"):
        runtime.feed(TOKENS[:5])
    with pytest.raises(UsageError):
        runtime.logits([])
    runtime.close()
    runtime.close()
    with pytest.raises(UsageError, match="closed"):
        runtime.logits(TOKENS)
