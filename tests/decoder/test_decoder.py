"""The reference decoder against transformers, for every family, at all relevant lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig, WeightMap
from compress.decoder.decoder import Decoder, reader
from compress.decoder.kv_cache import Past
from compress.decoder.layers import visible
from compress.errors import UsageError
from compress.plan.shapes import Runtime

TOLERANCE = 1e-4
WINDOW = 32
VARIANTS = {
    **{family: (family, {}) for family in tiny.FAMILIES},
    "mobilellm-ls": ("mobilellm", {"layer_sharing": True}),
    "phi3-longrope-window": ("phi3-longrope", {"sliding_window": WINDOW}),
    "llama-linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic-rope": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "qwen3-yarn": ("qwen3", {"rope_scaling": tiny.YARN}),
    "phi-yarn": ("phi", {"rope_scaling": tiny.YARN | {"attention_factor": 0.9, "beta_fast": 8.0}}),
    "qwen3-biased": ("qwen3", {"attention_bias": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Decoder, Path]]:
    made: dict[str, Path] = {}

    def open_(variant: str) -> tuple[Decoder, Path]:
        if variant not in made:
            family, overrides = VARIANTS[variant]
            folder = tmp_path_factory.mktemp(variant)
            made[variant] = tiny.make(family, folder, tokenizer=False, **overrides)
        return decoder_of(made[variant]), made[variant]

    return open_


def decoder_of(folder: Path, *, resident: bool = False, context: int = 0) -> Decoder:
    checkpoint = Checkpoint.open(folder)
    config = DecoderConfig.from_hf(checkpoint.config, checkpoint.generation_config, context)
    WeightMap(config).check(checkpoint)
    return Decoder(config, Stored(checkpoint, config).read, resident=resident)


def tokens(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 512, length)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, opened: Callable[..., tuple[Decoder, Path]]):
    decoder, folder = opened(variant)
    model = tiny.reference(folder)
    # Windows of 32; 256 is longrope's original context, where transformers changes the factors.
    for length in (1, 12, WINDOW - 1, WINDOW, WINDOW + 1, 100, 256):
        ids = tokens(length, seed=length)
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        found = decoder.logits(ids)
        assert found.dtype == np.float32
        assert found.shape == (length, decoder.vocab_size)
        assert np.abs(found - expected).max() <= TOLERANCE, length
        assert expected.std() > 1  # without this the comparison would pass with any result


def test_the_window_and_the_longrope_factors_matter(tmp_path: Path):
    """Each setting changes the logits of the tiny models, so the tests above depend on it."""
    ids = tokens(100)
    windowed, whole = (
        decoder_of(tiny.make(family, tmp_path / family, tokenizer=False)).logits(ids)
        for family in ("phi3-window", "phi3")
    )
    assert np.abs(windowed[:WINDOW] - whole[:WINDOW]).max() <= TOLERANCE
    assert np.abs(windowed[WINDOW:] - whole[WINDOW:]).max() > 0.1
    scaled = decoder_of(tiny.make("phi3-longrope", tmp_path / "long", tokenizer=False))
    assert np.abs(scaled.logits(ids) - whole).max() > 0.1


@pytest.mark.parametrize("variant", ["phi3-longrope", "phi3-longrope-window", "phi4-mini"])
def test_beyond_longropes_original_context(
    variant: str, opened: Callable[..., tuple[Decoder, Path]]
):
    folder = opened(variant)[1]
    decoder, model = decoder_of(folder, context=400), tiny.reference(folder)
    texts = [tokens(length, seed=length) for length in (255, 256, 257, 40, 400)]
    # Together, so that texts of both kinds go through one walk.
    for ids, found in zip(texts, decoder.stream_logits(texts), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(found - expected).max() <= TOLERANCE, len(ids)
    short = decoder_of(folder)
    assert np.abs(decoder.logits(texts[1]) - short.logits(texts[1])).max() == 0
    with pytest.raises(UsageError, match="401 tokens, but the model is verified up to 400"):
        decoder.logits(tokens(401))


def test_generation_across_longropes_switch(opened: Callable[..., tuple[Decoder, Path]]):
    folder = opened("phi3-longrope")[1]
    decoder, model = decoder_of(folder, context=400), tiny.reference(folder)
    prompt = tokens(250, seed=5)
    made: list[int] = []
    for _ in range(20):  # generate() of transformers 4.57.6 has a cache of both kinds for a while
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *made]]), use_cache=False).logits[0, -1]
        made.append(int(logits.argmax()))
    last, found = decoder.feed(prompt), []
    for _ in range(20):
        found.append(int(last.argmax()))
        last = decoder.feed(found[-1:])
    assert found == made
    whole = decoder_of(folder, context=400).logits([*prompt, *found])
    assert np.abs(last - whole[-1]).max() <= TOLERANCE
    assert decoder.rewind(260) == 260
    assert np.abs(decoder.extend(found[10:]) - whole[260:]).max() <= TOLERANCE
    assert decoder.rewind(100) == 0  # its keys have the long factors
    again = decoder.feed([*prompt, *found][:256])
    expected = decoder_of(folder).logits([*prompt, *found][:256])[-1]
    assert np.abs(again - expected).max() <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("resident", [False, True])
def test_cached_feed_equals_uncached_logits(
    variant: str, resident: bool, opened: Callable[..., tuple[Decoder, Path]]
):
    _, folder = opened(variant)
    runtime: Runtime = decoder_of(folder, resident=resident)
    ids = tokens(70, seed=3)
    expected = runtime.logits(ids)
    # A prompt, a chunk that crosses the window, then one token at a time.
    position = 0
    for count in (5, 30, 1, 1, 1, 20, *[1] * 12):
        position += count
        last = runtime.feed(ids[position - count : position])
        assert last.shape == (512,)
        assert np.abs(last - expected[position - 1]).max() <= TOLERANCE, position
    assert position == 70
    runtime.reset()
    assert np.abs(runtime.feed(ids[:9]) - expected[8]).max() <= TOLERANCE
    runtime.close()
    runtime.close()


def test_many_windows_stream_through_each_weight_once(tmp_path: Path):
    folder = tiny.make("phi4-mini", tmp_path / "model", tokenizer=False)
    decoder = decoder_of(folder)
    reads: list[str] = []
    read = decoder._read
    decoder._read = lambda name: (reads.append(name), read(name))[1]
    windows = [tokens(length, seed=length) for length in (40, 7, 1, 33)]
    steps: list[tuple[int, int]] = []
    found = list(decoder.stream_logits(windows, progress=lambda *step: steps.append(step)))
    # Tied: the table is read once to embed and once as the head.
    assert sorted(reads) == sorted([*set(reads), "embed_tokens.weight"])
    assert reads.index("blocks.0.down_proj.weight") < reads.index("blocks.1.q_proj.weight")
    for ids, logits in zip(windows, found, strict=True):
        assert np.abs(logits - decoder_of(folder).logits(ids)).max() <= 1e-5
    assert steps == [(done, 6) for done in range(7)]


def test_streaming_holds_one_block_and_resident_reads_once(tmp_path: Path):
    folder = tiny.make("phi", tmp_path / "model", tokenizer=False)
    for resident, times in ((False, 2), (True, 1)):
        decoder = decoder_of(folder, resident=resident)
        reads: list[str] = []
        read = decoder._read
        decoder._read = lambda name, reads=reads, read=read: (reads.append(name), read(name))[1]
        first, second = decoder.logits(tokens(5)), decoder.logits(tokens(5))
        assert (first == second).all()
        assert {reads.count(name) for name in reads} == {times}
        assert bool(decoder._blocks) == resident


@pytest.mark.parametrize("variant", ["phi3", "phi", "qwen3"])
def test_on_input_sees_what_each_linear_multiplies(
    variant: str, opened: Callable[..., tuple[Decoder, Path]]
):
    decoder, folder = opened(variant)
    ids = tokens(12)
    seen: dict[str, torch.Tensor] = {}
    list(decoder.walk([ids], on_input=lambda name, x: seen.update({name: x.clone()})))
    config = decoder.config
    assert set(seen) == {
        f"blocks.{block}.{role}.weight"
        for block in range(config.num_hidden_layers)
        for role in config.linear_roles
    }
    # Oracle: forward hooks on transformers' own modules.
    model = tiny.reference(folder)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, args, __, name=name: inputs.update({f"{name}.weight": args[0][0]})
            )
    with torch.inference_mode():
        model(torch.tensor([ids]))
    weights = WeightMap(config)
    for name, x in seen.items():
        (part,) = weights.parts(name)
        assert torch.allclose(x, inputs[part.source], atol=TOLERANCE), name


@pytest.mark.parametrize("variant", ["phi3", "phi4-mini", "qwen2", "phi"])
def test_reader_takes_fused_and_unfused_names(
    variant: str, opened: Callable[..., tuple[Decoder, Path]]
):
    decoder, _ = opened(variant)
    config, read = decoder.config, decoder._read
    expected = decoder.logits(tokens(9))
    fused_roles = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}
    fused: dict[str, np.ndarray] = {}
    for name in WeightMap(config).names():
        role = name.split(".")[-2]
        if role in ("k_proj", "v_proj") or (role == "up_proj" and config.gated_mlp):
            continue
        for whole, first in fused_roles.items():
            if role == first:
                name = name.replace(first, whole)
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            fused[name] = read(name)
    unfused = {name: read(name) for name in WeightMap(config).names()}
    for weights in (fused, unfused):
        again = Decoder(config, reader(config, weights)).logits(tokens(9))
        assert (again == expected).all()
    with pytest.raises(KeyError, match=r"norm\.weight"):
        reader(config, {})("norm.weight")


def test_read_only_weights_are_not_written_to(opened: Callable[..., tuple[Decoder, Path]]):
    decoder, _ = opened("llama")
    frozen = {name: decoder._read(name) for name in WeightMap(decoder.config).names()}
    for values in frozen.values():
        values.flags.writeable = False
    again = Decoder(decoder.config, frozen.__getitem__)
    assert (again.logits(tokens(4)) == decoder.logits(tokens(4))).all()


def test_refuses_what_it_cannot_answer_for(opened: Callable[..., tuple[Decoder, Path]]):
    decoder, _ = opened("phi3-longrope")
    for ids in ([], [512], [-1]):
        with pytest.raises(UsageError, match="token ids"):
            decoder.logits(ids)
    with pytest.raises(UsageError, match="257 tokens, but the model is verified up to 256"):
        decoder.logits(tokens(257))
    decoder.feed(tokens(256))
    with pytest.raises(UsageError, match="257 tokens"):
        decoder.feed([1])


def test_visible_against_the_definition():
    for count, start, window in (
        (1, 0, 4),
        (3, 0, None),
        (6, 0, 4),
        (1, 9, 4),
        (3, 5, 4),
        (1, 5, 9),
    ):
        mask = visible(count, start, window)
        expected = torch.tensor(
            [
                [key <= query and (window is None or query - key < window)
                 for key in range(start + count)]
                for query in range(start, start + count)
            ]
        )  # fmt: skip
        plain = torch.ones(count, start + count).tril(start).bool()
        assert torch.equal(plain if mask is None else mask, expected)


def test_past_keeps_every_position_while_it_grows():
    past = Past()
    random = torch.Generator().manual_seed(0)
    chunks = [torch.randn(2, count, 4, generator=random) for count in (3, 1, 200, 1, 90)]
    for chunk in chunks:
        keys, values = past.append(chunk, -chunk)
    assert torch.equal(keys, torch.cat(chunks, dim=1))
    assert torch.equal(values, -keys)
