"""The MIL evaluator: programs as coremltools converts and saves them, against torch."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mil_program import save_program
from torch import nn

from compress.errors import ArtifactError
from exporters.coreml import blockwise
from exporters.coreml.evaluator import Evaluator
from exporters.coreml.mil import read_package

logging.disable(logging.WARNING)  # coremltools and its missing macOS libraries
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types
logging.disable(logging.NOTSET)

VOCABULARY, HIDDEN, HEADS, KV_HEADS, LAYERS, CONTEXT = 128, 64, 4, 2, 2, 48
HEAD = HIDDEN // HEADS


# --- a decoder as torch users write one for Core ML --------------------------------------------


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x[..., : HEAD // 2], x[..., HEAD // 2 :]
    return x * cos + torch.cat([-b, a], -1) * sin


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([Norm(), Norm()])
        self.q, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(HIDDEN, KV_HEADS * HEAD, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(HIDDEN, 2 * HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def heads(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(1, x.shape[1], count, HEAD).transpose(1, 2)


class Decoder(nn.Module):
    """RMSNorm, RoPE, grouped heads, SwiGLU; the caches are buffers updated by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm = Norm()
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        shape = (LAYERS, 1, KV_HEADS, CONTEXT, HEAD)
        self.register_buffer("keyCache", torch.zeros(shape))
        self.register_buffer("valueCache", torch.zeros(shape))
        angles = torch.arange(CONTEXT)[:, None] / 10000 ** (torch.arange(0, HEAD, 2) / HEAD)
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, inputIds: torch.Tensor, causalMask: torch.Tensor) -> torch.Tensor:
        end = causalMask.shape[-1]
        begin = end - inputIds.shape[-1]
        cos, sin = self.cos[begin:end], self.sin[begin:end]
        x = self.embedding(inputIds)
        for i, layer in enumerate(self.layers):
            h = layer.norms[0](x)
            q = rotate(layer.heads(layer.q(h), HEADS), cos, sin)
            self.keyCache[i, :, :, begin:end] = rotate(layer.heads(layer.k(h), KV_HEADS), cos, sin)
            self.valueCache[i, :, :, begin:end] = layer.heads(layer.v(h), KV_HEADS)
            k = self.keyCache[i][:, :, :end].repeat_interleave(HEADS // KV_HEADS, 1)
            v = self.valueCache[i][:, :, :end].repeat_interleave(HEADS // KV_HEADS, 1)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causalMask)
            x = x + layer.o(y.transpose(1, 2).reshape(1, -1, HIDDEN))
            h = layer.norms[1](x)
            x = x + layer.down(nn.functional.silu(layer.gate(h)) * layer.up(h))
        return self.head(self.norm(x))


def convert(decoder: Decoder, half: bool) -> ct.models.MLModel:
    examples = (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, 5))
    traced = torch.jit.trace(decoder, examples, check_trace=False)
    new, seen = (ct.RangeDim(1, CONTEXT, default=n) for n in (3, 5))
    dtype = np.float16 if half else np.float32
    cache = (LAYERS, 1, KV_HEADS, CONTEXT, HEAD)
    return ct.convert(
        traced,
        inputs=[
            ct.TensorType("inputIds", (1, new), dtype=np.int32),
            ct.TensorType("causalMask", (1, 1, new, seen), dtype=dtype),
        ],
        outputs=[ct.TensorType("logits", dtype=dtype)],
        states=[
            ct.StateType(ct.TensorType(shape=cache, dtype=np.float16), name=name)
            for name in ("keyCache", "valueCache")
        ],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
        skip_model_load=True,
    )


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


@pytest.fixture(scope="module")
def package(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder in float16, as coremltools converts it."""
    path = tmp_path_factory.mktemp("traced") / "half.mlpackage"
    convert(decoder, half=True).save(str(path))
    return path


def compare(decoder: Decoder, evaluator: Evaluator, tolerance: float) -> None:
    """Prefill 12 tokens, then 8 one by one: logits and choices as torch's."""
    decoder.keyCache.zero_()
    decoder.valueCache.zero_()
    state = evaluator.make_state()
    tokens = torch.randint(0, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))
    done = 0
    for count in [12] + [1] * 8:
        ids = tokens[:, done : done + count].int()
        mask = torch.full((count, done + count), -1e4).triu(done + 1)[None, None]
        with torch.no_grad():
            expected = decoder(ids, mask).numpy()
        inputs = {"inputIds": ids.numpy(), "causalMask": mask.numpy()}
        logits = evaluator.predict(inputs, state)["logits"]
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, atol=tolerance, rtol=0)
        np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
        done += count


def test_traced_decoder_with_half_weights(decoder: Decoder, package: Path) -> None:
    evaluator = Evaluator(package)
    assert evaluator.inputs["inputIds"].dtype == "int32"
    assert evaluator.inputs["causalMask"].ranges[2:] == ((1, CONTEXT), (1, CONTEXT))
    assert evaluator.states["keyCache"].shape == (LAYERS, 1, KV_HEADS, CONTEXT, HEAD)
    assert list(evaluator.outputs) == ["logits"]
    compare(decoder, evaluator, 2e-3)


def test_traced_decoder_rounded_to_half(decoder: Decoder, package: Path) -> None:
    evaluator = Evaluator(package, fp16=True)
    assert evaluator.make_state()["keyCache"].dtype == torch.float16
    compare(decoder, evaluator, 4e-3)


def test_traced_decoder_in_float32(decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "single.mlpackage"
    convert(decoder, half=False).save(str(path))
    compare(decoder, Evaluator(path), 1e-5)


def test_compressed_decoder_equals_its_decompressed_self(package: Path, tmp_path: Path) -> None:
    """Cached or streamed, a compressed package gives the results of the one that Apple decodes."""
    model = ct.models.MLModel(str(package), skip_model_load=True)
    blocks = cto.OpLinearQuantizerConfig(
        dtype="int4", granularity="per_block", block_size=32, weight_threshold=1
    )
    palette = cto.OpPalettizerConfig(
        mode="uniform", nbits=6, granularity="per_grouped_channel", group_size=16
    )
    model = cto.linear_quantize_weights(
        model, cto.OptimizationConfig(op_type_configs={"linear": blocks})
    )
    model = cto.palettize_weights(
        model, cto.OptimizationConfig(op_type_configs={"gather": palette})
    )
    model.save(str(tmp_path / "small.mlpackage"))
    cto.decompress_weights(model).save(str(tmp_path / "dense.mlpackage"))
    kinds = [o.kind for o in read_package(tmp_path / "small.mlpackage").function("main").operations]
    assert kinds.count("constexpr_blockwise_shift_scale") == 7 * LAYERS + 1
    assert kinds.count("constexpr_lut_to_dense") == 1  # the embedding
    inputs = {
        "inputIds": np.array([[5, 3, 127, 0, 3]], np.int32),
        "causalMask": np.triu(np.full((1, 1, 5, 5), -1e4, np.float32), 1),
    }

    def logits(name: str, cache_bytes: int) -> np.ndarray:
        # small: so that these weights count as large
        evaluator = Evaluator(tmp_path / name, cache_bytes=cache_bytes, small=1024)
        evaluator.predict(inputs, evaluator.make_state())
        return evaluator.predict(inputs, evaluator.make_state())["logits"]  # now from the cache

    expected = logits("dense.mlpackage", 0)
    assert np.ptp(expected) > 1
    for cache_bytes in (0, 100_000, 200_000, 1 << 30):  # none, some, all as halves, as singles
        found = logits("small.mlpackage", cache_bytes)
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_states_are_updated_in_place_and_separate(package: Path) -> None:
    evaluator = Evaluator(package)
    state, other = evaluator.make_state(), evaluator.make_state()
    keys = state["keyCache"]
    inputs = {
        "inputIds": np.array([[7, 8]], np.int32),
        "causalMask": np.zeros((1, 1, 2, 2), np.float32),
    }
    first = evaluator.predict(inputs, state)
    assert state["keyCache"] is keys  # updated in place, not copied for each layer
    assert keys[:, :, :, :2].abs().min() > 0 and keys[:, :, :, 2:].abs().max() == 0
    assert other["keyCache"].abs().max() == 0
    np.testing.assert_array_equal(evaluator.predict(inputs, other)["logits"], first["logits"])


def test_several_calls_at_once_are_each_alone_and_decode_a_constant_once(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ct.models.MLModel(str(package), skip_model_load=True)
    blocks = cto.OpLinearQuantizerConfig(
        dtype="int4", granularity="per_block", block_size=32, weight_threshold=1
    )
    model = cto.linear_quantize_weights(
        model, cto.OptimizationConfig(op_type_configs={"linear": blocks})
    )
    model.save(str(tmp_path / "small.mlpackage"))
    evaluator = Evaluator(tmp_path / "small.mlpackage", fp16=True, cache_bytes=0, small=1024)
    draw = np.random.default_rng(2)
    calls = []
    for length in (12, 1, 30):
        mask = np.triu(np.full((1, 1, length, length), -1e4, np.float32), 1)
        ids = draw.integers(0, VOCABULARY, (1, length), dtype=np.int32)
        calls.append(({"inputIds": ids, "causalMask": mask}, evaluator.make_state()))
    alone = [(evaluator.make_state(), inputs) for inputs, _ in calls]
    expected = [evaluator.predict(inputs, state)["logits"] for state, inputs in alone]

    decoded: list[int] = []
    decode = blockwise.decode_blocks
    monkeypatch.setattr(blockwise, "decode_blocks", lambda c: decoded.append(1) or decode(c))
    found = evaluator.predict_each(calls)
    assert len(decoded) == 7 * LAYERS + 1
    for outputs, logits, (_, state), (other, _) in zip(found, expected, calls, alone, strict=True):
        np.testing.assert_allclose(outputs["logits"], logits, atol=2e-3, rtol=0)
        for name, cache in state.items():
            np.testing.assert_allclose(cache.numpy(), other[name].numpy(), atol=2e-3, rtol=0)
    assert np.ptp(expected[2]) > 1


# --- programs and packages -----------------------------------------------------------------------


def save(path: Path, body: Callable[..., object], states: tuple[str, ...] = ()) -> Path:
    """A program of ``body(x, *states)``: x and the states are fp16 ``[4]``."""
    specs = [mb.TensorSpec(shape=(4,), dtype=types.fp16)]
    specs += [mb.StateTensorSpec((4,), dtype=types.fp16) for _ in states]
    names = ", ".join(("x", *states))
    scope = {"body": body}
    exec(f"def program({names}):\n    return body({names})", scope)  # names become input names
    program = mb.program(input_specs=specs, opset_version=ct.target.iOS18)(scope["program"])
    save_program(program, path)
    return path


ONES = np.ones(4, np.float32)


def test_a_state_read_before_a_write_keeps_its_value(tmp_path: Path) -> None:
    def body(x: object, memory: object) -> tuple[object, ...]:
        before = mb.read_state(input=memory)
        head = mb.slice_by_index(x=before, begin=[0], end=[2])  # a view of the state's memory
        updated = mb.slice_update(x=before, update=x, begin=[0], end=[4])
        mb.coreml_update_state(state=memory, value=updated)
        after = mb.read_state(input=memory)
        return mb.identity(x=before), mb.identity(x=head), mb.add(x=after, y=after)

    evaluator = Evaluator(save(tmp_path / "state.mlpackage", body, ("memory",)))
    state = evaluator.make_state()
    for call in range(3):
        before, head, doubled = evaluator.predict({"x": ONES * (call + 1)}, state).values()
        np.testing.assert_array_equal(before, ONES * call)
        np.testing.assert_array_equal(head, ONES[:2] * call)
        np.testing.assert_array_equal(doubled, ONES * 2 * (call + 1))


def test_half_mode_rounds_every_value(tmp_path: Path) -> None:
    def body(x: object) -> object:
        return mb.sub(x=mb.add(x=x, y=np.float16(1024.0)), y=np.float16(1024.0))

    path = save(tmp_path / "round.mlpackage", body)
    x = np.array([0.125, 0.5, 0.75, 3.0], np.float32)
    exact, rounded = (Evaluator(path, fp16=half).predict({"x": x}) for half in (False, True))
    np.testing.assert_array_equal(next(iter(exact.values())), x)
    expected = (x.astype(np.float16) + np.float16(1024)) - np.float16(1024)
    np.testing.assert_array_equal(next(iter(rounded.values())), expected)


def test_an_overflow_of_float16_is_refused_by_name(tmp_path: Path) -> None:
    """Core ML would go on with infinity; one that is given, as in masks, is none."""
    path = save(tmp_path / "wide.mlpackage", lambda x: mb.mul(x=x, y=np.float16(4), name="wide"))
    inputs = {"x": 30000 * ONES}
    with pytest.raises(ArtifactError, match=r"'wide': 120,000 is more than float16"):
        Evaluator(path, fp16=True).predict(inputs)
    infinite = {"x": -np.inf * ONES}
    assert np.isinf(Evaluator(path, fp16=True).predict(infinite)["wide"]).all()


def test_unknown_operation_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "sinh.mlpackage", lambda x: mb.sinh(x=x, name="strange"))
    with pytest.raises(ArtifactError, match=r"unknown op 'sinh' \('strange'\)"):
        Evaluator(path)


def edited(package: Path, target: Path, edit: Callable[[object], None]) -> Path:
    """A copy of a package with its model changed."""
    shutil.copytree(package, target)
    model_file = target / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = ct.proto.Model_pb2.Model()
    model.ParseFromString(model_file.read_bytes())
    edit(model.mlProgram.functions["main"].block_specializations["CoreML8"])
    model_file.write_bytes(model.SerializeToString())
    return target


def test_unknown_input_of_an_operation_is_named(package: Path, tmp_path: Path) -> None:
    def edit(block: object) -> None:
        operation = next(o for o in block.operations if o.type == "silu")
        operation.inputs["beta"].CopyFrom(operation.inputs["x"])

    with pytest.raises(ArtifactError, match=r"silu.*unknown input 'beta'"):
        Evaluator(edited(package, tmp_path / "edited.mlpackage", edit))


def test_declared_shapes_are_checked(package: Path, tmp_path: Path) -> None:
    def edit(block: object) -> None:
        operation = next(o for o in block.operations if o.type == "silu")
        operation.outputs[0].type.tensorType.dimensions[2].constant.size = 3

    evaluator = Evaluator(edited(package, tmp_path / "edited.mlpackage", edit))
    inputs = {"inputIds": np.zeros((1, 1), np.int32), "causalMask": np.zeros((1, 1, 1, 1))}
    with pytest.raises(ArtifactError, match=r"silu.*declared is \[1, '\?', 3\]"):
        evaluator.predict(inputs, evaluator.make_state())


def test_truncated_weights(package: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mlpackage"
    shutil.copytree(package, broken)
    weights = broken / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    weights.write_bytes(weights.read_bytes()[:-4096])
    with pytest.raises(ArtifactError, match="truncated"):
        Evaluator(broken)
    weights.write_bytes(b"\0" * weights.stat().st_size)
    with pytest.raises(ArtifactError, match="no weight record"):
        Evaluator(broken)
    weights.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        Evaluator(broken)


def test_not_a_package(package: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"not an \.mlpackage"):
        Evaluator(tmp_path)
    broken = tmp_path / "broken.mlpackage"
    shutil.copytree(package, broken)
    (broken / "Data" / "com.apple.CoreML" / "model.mlmodel").write_bytes(b"\xff" * 64)
    with pytest.raises(ArtifactError, match="not a Core ML model"):
        Evaluator(broken)
    with pytest.raises(ArtifactError, match="no function 'prefill'"):
        Evaluator(package, function="prefill")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputIds": np.zeros((1, CONTEXT + 1), np.int32)}, r"takes \[1, 1..48\]"),
        ({"inputIds": np.zeros((2, 1), np.int32)}, "'inputIds' has shape"),
        ({"inputIds": np.zeros(1, np.int32)}, "'inputIds' has shape"),
        ({"inputIds": np.zeros((1, 1), np.float32)}, "takes int32"),
        ({"inputIds": np.full((1, 1), VOCABULARY, np.int32)}, "'gather'.*index"),
        ({"tokens": np.zeros((1, 1), np.int32)}, "no input 'tokens'"),
    ],
)
def test_wrong_inputs(package: Path, change: dict, message: str) -> None:
    evaluator = Evaluator(package)
    inputs = {"inputIds": np.zeros((1, 1), np.int32), "causalMask": np.zeros((1, 1, 1, 1))}
    with pytest.raises(ArtifactError, match=message):
        evaluator.predict(inputs | change, evaluator.make_state())


def test_missing_input_and_state(package: Path) -> None:
    evaluator = Evaluator(package)
    with pytest.raises(ArtifactError, match="'causalMask' is missing"):
        evaluator.predict({"inputIds": np.zeros((1, 1), np.int32)}, evaluator.make_state())
    inputs = {"inputIds": np.zeros((1, 1), np.int32), "causalMask": np.zeros((1, 1, 1, 1))}
    with pytest.raises(ArtifactError, match="make_state"):
        evaluator.predict(inputs)


def test_reading_a_package_does_not_import_coremltools(package: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from exporters.coreml.mil import read_package\n"
        f"read_package(Path({str(package)!r})).function('main')\n"
        "assert 'coremltools' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[3]
    )
