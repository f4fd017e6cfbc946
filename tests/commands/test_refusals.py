"""Bad checkpoints on the command line: one clear line, exit code 2, nothing left behind.

The commands run in this process; `tests/commands/test_cli.py` runs some as processes of their own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_bfloat16
from safetensors.torch import save_file as save_bfloat16

from compress import __main__ as cli


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("sound") / "model", dtype="float32")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("sharded") / "model", shards=3)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def rename(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.mlp.experts.weight"] = tensors["model.norm.weight"]


def poison(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    return change


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)


def damage_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(10)
        stream.write(b"\xff\xff{{{")


def remote_code(folder: Path) -> None:
    edit_config(
        folder, architectures=["PirateForCausalLM"], model_type="pirate",
        auto_map={"AutoModelForCausalLM": "modeling_pirate.PirateForCausalLM"},
    )  # fmt: skip
    (folder / "modeling_pirate.py").write_text("raise SystemExit('remote code was executed')")


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight")),
        "missing",
    ),
    "unexpected tensor": (lambda f: edit_tensors(f, rename), "experts"),
    "unknown architecture": (lambda f: edit_config(f, architectures=["BertModel"]), "BertModel"),
    "remote code": (remote_code, "never execute"),
    "NaN": (lambda f: edit_tensors(f, poison(np.nan)), "NaN or Inf"),
    "Inf": (lambda f: edit_tensors(f, poison(-np.inf)), "NaN or Inf"),
    "truncated": (cut, "truncated"),
    "damaged header": (damage_header, "model.safetensors"),
    "another shape": (lambda f: edit_config(f, intermediate_size=768), "shape"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "an end that is none": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": ["2"]}'),
        "generation_config.json: eos_token_id",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "rope of another kind": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "mrope", "factor": 2.0}),
        "mrope",
    ),
}


def run(folder: Path, output: Path, *more: str) -> int:
    return cli.main(
        ["build", str(folder), "-o", str(output), "--no-verify", "-r", "int4-fast", *more]
    )


def assert_one_line(talk: str) -> None:
    lines = talk.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [lines[0]], talk
    assert all(line.startswith(("error: ", "hint: ")) for line in lines), talk


@pytest.mark.parametrize("case", CASES)
def test_a_bad_checkpoint(case, sound, tmp_path, capsys):
    change, says = CASES[case]
    model = tmp_path / "model"
    shutil.copytree(sound, model)
    change(model)
    assert run(model, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""
    assert_one_line(captured.err)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/outside.safetensors"])
def test_an_index_that_points_outside(place, sharded, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(sharded, model)
    index = model / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    shard = next(iter(document["weight_map"].values()))
    shutil.copy(model / shard, tmp_path / "outside.safetensors")
    for name, file in document["weight_map"].items():
        document["weight_map"][name] = place if file == shard else file
    index.write_text(json.dumps(document))
    assert run(model, tmp_path / "out") == 2
    talk = capsys.readouterr().err
    assert_one_line(talk)
    assert "outside" in talk
    assert not (tmp_path / "out").exists()


def test_an_architecture_is_refused_by_its_name_before_its_dtypes(sound, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(sound, model)
    edit_config(model, architectures=["BertModel"])
    edit_tensors(model, lambda t: t.update({"pooler.ids": np.zeros(3, np.int16)}))
    assert run(model, tmp_path / "out") == 2
    assert "error: unknown architecture: BertModel" in capsys.readouterr().err
    edit_config(model, architectures=["LlamaForCausalLM"])
    assert run(model, tmp_path / "out") == 2
    assert "I16" in capsys.readouterr().err


def test_a_missing_shard(sharded, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(sharded, model)
    sorted(model.glob("*.safetensors"))[1].unlink()
    assert run(model, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err)


def test_rows_that_no_grid_can_hold(tmp_path, capsys):
    """Rows of 272 = 17 × 16 columns: not a multiple of the 32 that the recipe asks for."""
    model = tiny.make(
        "llama", tmp_path / "model", hidden_size=272, num_attention_heads=4, head_dim=64,
        num_key_value_heads=4,
    )  # fmt: skip
    assert run(model, tmp_path / "out", "-f", "onnx") == 2
    talk = capsys.readouterr().err
    assert_one_line(talk)
    assert "272" in talk and "16" in talk
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_refusal_of_one_target_names_the_command_for_the_others(tmp_path, capsys):
    model = tiny.make("llama", tmp_path / "model", partial_rotary_factor=0.5)
    assert run(model, tmp_path / "out") == 2
    talk = capsys.readouterr().err
    assert_one_line(talk)
    assert "hint: -f onnx -f coreml builds without gguf" in talk
    assert run(model, tmp_path / "out", "-f", "gguf") == 2
    assert "-f " not in capsys.readouterr().err  # there is no other target
    assert run(model, tmp_path / "out", "-f", "onnx", "-f", "coreml", "--dry-run") == 0
    mixture = tiny.make("phimoe", tmp_path / "mixture")  # of experts, which Core ML refuses, too
    assert run(mixture, tmp_path / "out") == 2
    assert "hint: -f onnx builds without gguf" in capsys.readouterr().err


def test_a_weight_beyond_float16_is_named(sound, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(sound, model)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(model, lambda t: t.update({name: t[name] * 1e9}))
    assert run(model, tmp_path / "out", "-f", "gguf", "--set", "targets.gguf.type=Q8_0") == 2
    assert "error: blocks.1.up_proj.weight: Q8_0: a weight is" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["grid", "embedding"])
def test_palettes_without_calibration_are_refused(key, sound, tmp_path, capsys):
    out = tmp_path / "out"
    palettes = ["-f", "coreml", "--set", f"targets.coreml.{key}=lut4-g8"]
    for more in ([], ["--dry-run"]):
        assert run(sound, out, *palettes, *more) == 2
        talk = capsys.readouterr().err
        assert_one_line(talk)
        assert "error: coreml: lut4-g8 by rtn, without calibration," in talk
        assert "hint: --set quantize.solver=gptq" in talk and "--force" in talk
        assert list(tmp_path.iterdir()) == []
    assert run(sound, out, *palettes, "--force") == 0
    assert "--force" in json.loads((out / "report.json").read_text())["tool"]["command"]
    # A plan file is no way around it.
    plan = ["-f", "coreml", "--plan", str(out / "plan.json")]
    assert run(sound, tmp_path / "again", *plan) == 2
    assert "without calibration" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["grid", "embedding", "value"])
def test_palettes_in_a_package_for_the_gpu_are_refused(key, sound, tmp_path, capsys):
    """Calibrated ones, and those of six bits, too."""
    for grid, solver in (("lut4-g8", "gptq"), ("lut6-g8", "rtn")):
        wanted = ["-f", "coreml", "--set", f"targets.coreml.{key}={grid}"]
        wanted += ["--set", f"quantize.solver={solver}", "--dry-run"]
        assert run(sound, tmp_path / "out", *wanted) == 2
        talk = capsys.readouterr().err
        assert_one_line(talk)
        assert f"error: coreml: {key} {grid}: palettes are for the Neural Engine, which" in talk
        assert "on the GPU int4-g32 loses less\nhint: --force builds it anyway" in talk
        assert run(sound, tmp_path / "out", *wanted, "--force") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--no-verify", "--keep-baseline", "b"], "--keep-baseline has no effect: --no-verify"),
        (["--dry-run", "--resume"], "--resume has no effect: --dry-run"),
        (["--dry-run", "--seed", "3"], "--seed has no effect"),
        (["--dry-run", "--allow-dense"], "--allow-dense has no effect"),
    ],
)
def test_options_that_change_nothing_are_told(options, told, sound, tmp_path, capsys):
    line = ["build", str(sound), "-o", str(tmp_path / "out"), "-r", "int4-fast", "-f", "gguf"]
    assert cli.main([*line, *options]) == 0
    assert f"warning: {told}" in capsys.readouterr().err
    assert cli.main([*line, "--dry-run"]) == 0
    assert "no effect" not in capsys.readouterr().err


def test_a_revision_of_what_is_not_on_the_hub_is_refused(sound, tmp_path, capsys):
    for model in (str(sound), f"file://{sound}"):
        assert run(model, tmp_path / "out", "--revision", "v1") == 2
        talk = capsys.readouterr().err
        assert_one_line(talk)
        assert "--revision v1" in talk


def test_notes_of_an_artifact_stand_under_the_table(sound, tmp_path, capsys):
    model = tiny.make("mistral", tmp_path / "model")
    assert run(model, tmp_path / "out", "-f", "gguf") == 0
    told = "note (gguf): llama.cpp ignores the sliding window of 32"
    assert told in capsys.readouterr().out
    assert run(model, tmp_path / "out", "-f", "gguf", "--dry-run") == 0
    assert told in capsys.readouterr().out


def test_a_head_of_its_own_reaches_the_file_and_the_report(tmp_path, capsys):
    model = tiny.make("mobilellm", tmp_path / "model")
    weights = load_bfloat16(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_bfloat16(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert run(model, tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "lm_head.weight differs" in captured.err
    file = gguf.GGUFReader(next((tmp_path / "out" / "gguf").iterdir()))
    names = [tensor.name for tensor in file.tensors]
    assert "output.weight" in names
    for format in ("onnx", "coreml"):
        side = json.loads((tmp_path / "out" / format / "config.json").read_text())
        assert side["tie_word_embeddings"] is False
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "lm_head.weight differs" in report["notes"][0]


def test_a_pickle_is_read_as_weights_only_with_a_warning(tmp_path, capsys):
    model = tiny.make("llama", tmp_path / "model", safetensors=False)
    assert run(model, tmp_path / "out", "-f", "gguf") == 0
    assert "warning: " in capsys.readouterr().err
    assert list((tmp_path / "out" / "gguf").glob("*.gguf"))


def test_a_pickle_that_holds_code_is_refused(tmp_path, capsys):
    import torch

    model = tiny.make("llama", tmp_path / "model", safetensors=False)
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (marker,))

    torch.save({"model.norm.weight": Payload()}, model / "pytorch_model.bin")
    assert run(model, tmp_path / "out", "-f", "gguf") == 2
    assert not marker.exists()
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("format", ["gguf", "onnx", "coreml"])
def test_a_file_size_limit_in_the_middle_of_writing(format, sound, tmp_path, capsys):
    """A real short write: the system refuses bytes beyond 200 kB, as a full disk would."""
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))
    try:
        code = run(sound, tmp_path / "out", "-f", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, before)
    assert code == 2
    talk = capsys.readouterr().err
    assert_one_line(talk)
    assert "ran full" in talk or "could not be written" in talk
    assert list(tmp_path.iterdir()) == []
