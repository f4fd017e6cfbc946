"""The packages of ``iphone-ane``, chained in the MIL evaluator, against the reference decoder.

Tolerances: in float32 mode the constants are float16 in both, so only the order of sums and the
rounded epsilon differ. In float16 mode every value between operations is rounded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from commands import packlight, refused
from exported import Exported, Exports, reference
from test_coreml import kl_divergence
from writing import plan_for

from compress.errors import ArtifactError, GridError, UnsupportedModelError, UsageError
from compress.formats import get_format
from exporters.coreml.ane.planning import HEAD_ROWS, packages
from exporters.coreml.ane.runtime import Chunks, Evaluators
from exporters.coreml.mil import read_package
from exporters.coreml.runtime import open_runtime

ROOT = Path(__file__).resolve().parents[3]
PRESET = "iphone-ane"
CONTEXT = 96  # a prompt of 90 needs two calls
# Every kind of block: partial rotation, LayerNorm, biases, norms of heads, windows with two rotary
# embeddings, capped scores and logits, repeated blocks; palettes and int8.
CASES = (
    ("llama", "lut4-g32", {}),
    ("llama3", "lut6-g16", {}),
    ("phi3", "lut4-g32", {}),
    ("phi4-mini", "int8-channel", {}),
    ("phi", "lut4-g32", {}),
    ("qwen3", "lut6-g32", {}),
    ("gemma3_text", "lut4-g8", {}),
    ("gemma2", "lut4-g32", {}),
    ("starcoder2", "int4-channel-asym", {}),
    ("olmo2", "lut8-g32", {}),
    ("mobilellm", "lut6-g16", {"layer_sharing": True}),
)
TOKENS = np.random.default_rng(5).integers(3, 480, CONTEXT).tolist()


def made(
    exported: Exports, family: str, make: dict[str, Any] | None = None, **settings: Any
) -> Exported:
    settings = {"context": CONTEXT, "chunk": "600KB", **settings}
    return exported("coreml", family, make or {}, preset=PRESET, **settings)


def opened(built: Exported) -> Chunks:
    """In float32."""
    evaluators = Evaluators(fp16=False, threads=0, cache_bytes=1 << 28, count=4)
    return Chunks(built.artifact.path, evaluators.open_function, np.float32)


def run(chunks: Chunks, tokens: list[int], sizes: list[int]) -> Any:
    """Logits of the tokens, given in calls of these sizes."""
    state, found, end = chunks.make_state(), [], 0
    for size in sizes:
        ids = np.array([tokens[end : end + size]], np.int32)
        end += size
        given = {"inputIds": ids, "causalMask": np.zeros((1, 1, 1, end))}
        found.append(chunks.predict(given, state)["logits"][0])
    return np.concatenate(found)


@pytest.mark.parametrize(("family", "grid", "make"), CASES)
def test_the_chained_packages_compute_the_model(
    exported: Exports, family: str, grid: str, make: dict[str, Any]
) -> None:
    built = made(exported, family, make, grid=grid)
    expected = reference(built, halves=True).logits(TOKENS[:90])
    # A whole call, a padded one, and the other function.
    found = run(opened(built), TOKENS, [64, 20, *[1] * 6])
    assert np.abs(found - expected).max() < 1e-3
    runtime = open_runtime(built.artifact.path, context=CONTEXT)
    rounded = runtime.logits(TOKENS[:90])
    assert kl_divergence(expected, rounded) < 1e-4
    assert (expected.argmax(1) == rounded.argmax(1)).mean() > 0.95


def test_a_prompt_in_pieces_and_a_cut_back_cache(exported: Exports) -> None:
    built = made(exported, "qwen3", grid="lut6-g32")
    runtime = open_runtime(built.artifact.path, context=CONTEXT)
    assert runtime.name.startswith("MIL evaluator (packlight ")
    assert runtime.vocab_size == 512
    whole = runtime.logits(TOKENS)
    assert whole.shape == (CONTEXT, 512) and whole.dtype == np.float32
    runtime.reset()
    runtime.feed(TOKENS[:70])
    runtime.feed(TOKENS[3:9])  # then forgotten
    assert runtime.rewind(50) == 50
    last = runtime.feed(TOKENS[50:75])
    assert kl_divergence(whole[74:75], last[None]) < 1e-4
    with pytest.raises(UsageError, match="97 tokens do not fit"):
        runtime.logits([*TOKENS, 3])
    with pytest.raises(UsageError, match="KV cache of 96 positions, 97 are asked for"):
        open_runtime(built.artifact.path, context=97)


# --- what is in the packages --------------------------------------------------------------------


def test_the_functions_are_made_of_what_the_neural_engine_runs(exported: Exports) -> None:
    """Static shapes of rank 5 at most, float16, convolutions; no states, no attention operator."""
    built = made(exported, "gemma3_text", grid="lut4-g8", chunk="80KB")
    document = json.loads((built.artifact.path / "chunks.json").read_text())
    assert [row["kind"] for row in document["packages"]] == [
        "embedding",
        "blocks",
        "blocks",
        "head",
    ]
    assert document["functions"] == {"prefill": 64, "decode": 1}
    assert document["mask_value"] == -40000
    for row in document["packages"]:
        program = read_package(built.artifact.path / row["file"])
        assert set(program.functions) == {"prefill", "decode"}
        for name, function in program.functions.items():
            assert not function.states
            for spec in (*function.inputs.values(), *function.outputs.values()):
                assert None not in spec.shape
            if row["kind"] == "embedding":
                continue  # on the CPU
            kinds = {op.kind for op in function.operations}
            assert "conv" in kinds and not kinds & {
                "linear",
                "cast",
                "scaled_dot_product_attention",
            }
            assert not {kind for kind in kinds if "state" in kind or "tile" in kind}
            for op in function.operations:
                for _, declared in op.outputs:
                    computed = op.kind != "const" and not op.kind.startswith("constexpr")
                    assert not computed or declared.dtype == "fp16", (op.kind, op.name)
                    assert len(declared.shape) <= 5 or op.kind == "const"  # palettes: rank 6
            assert function.inputs["hidden"].shape == (1, 64, 1, document["functions"][name])
        if row["kind"] == "blocks":
            assert row["masks"].keys() <= function.inputs.keys()
            assert list(function.inputs["key_cache"].shape) == row["key_cache"]
            assert list(function.inputs["value_cache"].shape) == row["value_cache"]
    masks = [row["masks"] for row in document["packages"] if "masks" in row]
    assert masks == [{"mask_8": 8}, {"mask": None, "mask_8": 8}]


def test_both_functions_share_their_weights(exported: Exports) -> None:
    built = made(exported, "llama", grid="lut4-g32")
    planned = built.plan.weights_bytes + built.plan.settings["container_bytes"]
    weights = [file.stat().st_size for file in built.artifact.path.rglob("weight.bin")]
    assert 0 <= planned - sum(weights) < 64 * len(weights)  # the padding of each last array
    evaluators = Evaluators(fp16=False, threads=0, cache_bytes=1 << 28, count=4)
    package = built.artifact.path / "blocks_1.mlpackage"
    for name in ("prefill", "decode"):
        evaluators.open_function(package, name)
    first, second = evaluators._of[package]
    assert (
        first._weights is second._weights and len(first._weights) == 3
    )  # of the MLP; the others are small


def test_apple_reads_the_packages(exported: Exports) -> None:
    import coremltools
    from coremltools.converters.mil.frontend.milproto import load

    built = made(exported, "phi", grid="lut4-g32")
    for package in sorted(built.artifact.path.glob("*.mlpackage")):
        model = coremltools.models.MLModel(str(package), skip_model_load=True)
        spec = model.get_spec()
        assert spec.specificationVersion == 9
        assert [f.name for f in spec.description.functions] == ["prefill", "decode"]
        assert spec.description.defaultFunctionName == "prefill"
        program = load.load(spec, 9, str(package / "Data/com.apple.CoreML/weights"))
        assert set(program.functions) == {"prefill", "decode"}
        assert "experimental" in spec.description.metadata.shortDescription


def test_a_large_vocabulary_has_a_head_in_pieces(exported: Exports) -> None:
    make = {"vocab_size": HEAD_ROWS + 288, "num_hidden_layers": 1, "hidden_size": 128}
    built = made(exported, "phi", make, grid="lut4-g32")  # with a bias, which is cut, too
    head = packages(built.plan)[-1]
    assert [(e.name, e.shape) for e in head.entries if "lm_head" in e.name] == [
        ("lm_head.weight.1", (HEAD_ROWS, 128)), ("lm_head.weight.2", (288, 128)),
        ("lm_head.bias.1", (HEAD_ROWS,)), ("lm_head.bias.2", (288,)),
    ]  # fmt: skip
    expected = reference(built, halves=True).logits(TOKENS[:20])
    found = run(opened(built), TOKENS, [20])
    assert found.shape == (20, HEAD_ROWS + 288)
    assert np.abs(found - expected).max() < 1e-3


def test_a_chunk_has_at_most_its_bytes(exported: Exports) -> None:
    config = exported.config("llama", num_hidden_layers=6)
    one = plan_for("coreml", config, {"preset": PRESET})
    assert one.settings["chunks"] == [[0, 6]]
    some = plan_for("coreml", config, {"preset": PRESET, "chunk": "800KB"})
    assert some.settings["chunks"] == [[0, 2], [2, 4], [4, 6]]
    repeated = exported.config("mobilellm", layer_sharing=True)
    some = plan_for("coreml", repeated, {"preset": PRESET, "chunk": "500KB"})
    assert some.settings["chunks"] == [[0, 2], [2, 4]]
    with pytest.raises(UsageError, match=r"block 0 has .*, a chunk 100\.00 kB"):
        plan_for("coreml", config, {"preset": PRESET, "chunk": "100KB"})


def test_two_writes_give_the_same_bytes(exported: Exports, tmp_path: Path) -> None:
    built = made(exported, "llama3", grid="lut6-g16")
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
import exporters
from exported import Exports
settings = dict(preset="iphone-ane", grid="lut6-g16", context={CONTEXT}, chunk="500KB")
folder, source = Path({str(tmp_path)!r}), Path({str(built.checkpoint.path)!r})
Exports(Path()).write("coreml", source, settings, name="llama3", folder=folder)
"""
    environment = os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    first = sorted(path for path in built.artifact.path.rglob("*") if path.is_file())
    assert len(first) == 1 + 3 * 4  # chunks.json and three files of each package
    for path in first:
        again = tmp_path / "llama3-ane" / path.relative_to(built.artifact.path)
        assert path.read_bytes() == again.read_bytes(), path


# --- refusals -----------------------------------------------------------------------------------


def test_what_the_neural_engine_does_not_run_is_refused_by_name(exported: Exports) -> None:
    config = exported.config("phi")
    refusals: tuple[tuple[Any, dict[str, Any], str, type[Exception]], ...] = (
        (
            replace(config, head_dim=80),
            {},
            r"heads of 80 \(phi\) are not for",
            UnsupportedModelError,
        ),
        (config, {"grid": "int4-g32"}, "grid: int4-g32 is not for the Neural Engine", GridError),
        (config, {"embedding": "int8-g64"}, "embedding: int8-g64 is not for", GridError),
        (config, {"context": 100}, "context of 100 is not a multiple of 32", UsageError),
        (config, {"sparsity": "2of4"}, "sparse weights make packages", UsageError),
    )
    for model, settings, told, kind in refusals:
        with pytest.raises(kind, match=told) as caught:
            plan_for("coreml", model, {"preset": PRESET} | settings)
        assert caught.value.hint
    with pytest.raises(GridError, match=r"blocks\.0\.q_proj\.weight: int4-g32 is not for"):
        choices = {"blocks.0.q_proj.weight": "int4-g32"}
        plan_for("coreml", config, {"preset": PRESET}, choices=choices)
    for entry in plan_for("coreml", config, {"preset": PRESET}).entries:
        grids = {
            c.grid
            for c in get_format("coreml").candidates(entry, {"preset": PRESET, "grid": "F16"})
        }
        assert not {grid for grid in grids if grid.startswith("int4-g")}


def test_a_damaged_folder_is_named(exported: Exports, tmp_path: Path) -> None:
    built = made(exported, "llama", grid="lut4-g32")
    folder = tmp_path / "again-ane"
    shutil.copytree(built.artifact.path, folder)
    document = json.loads((folder / "chunks.json").read_text())
    for change in ({"format_version": 2}, {"packages": []}, {"context": "many"}):
        (folder / "chunks.json").write_text(json.dumps(document | change))
        with pytest.raises(ArtifactError, match="chunks"):
            open_runtime(folder, context=8)
    document["packages"][1]["file"] = "../elsewhere.mlpackage"
    (folder / "chunks.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="files outside of its folder"):
        open_runtime(folder, context=8)


# --- commands -----------------------------------------------------------------------------------


def test_a_build_is_verified_inspected_and_verified_again(tmp_path: Path) -> None:
    tiny.make("qwen3", tmp_path / "m")
    (tmp_path / "text.txt").write_text(tiny.TEXT * 3)
    done = packlight(
        "build", "m", "-f", "coreml", "-r", "int4-fast", "-o", "out", "--json",
        "--eval-text", "text.txt",
        "--set", "targets.coreml={preset: iphone-ane, grid: lut6-g32, context: 64}",
        "--set", "verify={windows: 2, sequence_length: 32, gates: {}}",
        cwd=tmp_path, env={"PACKLIGHT_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (artifact,) = json.loads(done.stdout)["artifacts"]
    assert (
        artifact["runtime"].startswith("MIL evaluator") and artifact["kl_divergence"]["mean"] < 0.1
    )
    assert "never ran it on a phone" in " ".join(artifact["notes"])
    folder = tmp_path / "out" / "coreml"
    assert artifact["path"] == "coreml/m-ane"
    assert artifact["bytes"] == artifact.get("planned_bytes", artifact["bytes"])
    model = json.loads((folder / "model.json").read_text())
    assert model["package"] == "m-ane" and model["states"] == []
    assert json.loads((folder / "parity.json").read_text())["logits"]
    assert not (folder / "Swift").exists()  # it runs one package with states
    shown = packlight("inspect", "out", "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    facts = json.loads(shown.stdout)
    assert facts["context"] == 64 and facts["bytes"] == artifact["bytes"]
    grids = {tensor["name"]: (tensor["grid"], tensor["shape"]) for tensor in facts["tensors"]}
    assert grids["block_1_up_proj_weight"] == ("lut6-g32", [512, 256])
    assert grids["norm_weight"] == ("F16", [256])
    again = packlight(
        "verify", "out/coreml/m-ane", "--baseline", "m", "--eval-text", "text.txt", "--windows", 2,
        "--sequence-length", 32, "--json", cwd=tmp_path,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr


def test_palettes_without_calibration_are_refused(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "m")
    wanted = ("build", "m", "-r", "int4-fast", "-f", "coreml", "-o", "out", "--dry-run", "--set")
    told = refused(packlight(*wanted, "targets.coreml={preset: iphone-ane}", cwd=tmp_path))
    assert "coreml: lut4-g32 by rtn, without calibration," in told
