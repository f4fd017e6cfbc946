"""compress.files.check_folder: links of an untrusted folder stay inside, and cycles end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny

from compress.checkpoint.adapter import Adapter
from compress.checkpoint.checkpoint import Checkpoint
from compress.errors import CheckpointError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.mark.parametrize(
    "name",
    ["merges.txt", "config.json", "model.safetensors", "LICENSE", "README.md", "anything.txt"],
)
def test_a_link_leads_nowhere_else(copy: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("TOPSECRET")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=rf"^{name} is a link that leads out"):
        Checkpoint.open(copy)


def test_a_link_into_a_linked_folder_leads_elsewhere_too(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "copy-2").mkdir()  # not inside, although its path has the folder's as a prefix
    (tmp_path / "copy-2" / "merges.txt").write_text("TOPSECRET")
    (copy / "inside").symlink_to(tmp_path / "copy-2")
    (copy / "merges.txt").symlink_to("inside/merges.txt")
    with pytest.raises(CheckpointError, match="leads out"):
        Checkpoint.open(copy)
    (copy / "merges.txt").unlink()
    Checkpoint.open(copy)  # nothing reads a folder
    (copy / "inside").rename(copy / "additional_chat_templates")
    with pytest.raises(CheckpointError, match="leads out"):
        Checkpoint.open(copy)


def test_links_within_and_into_the_hubs_cache(copy: Path, tmp_path: Path) -> None:
    (copy / "weights").mkdir()
    (copy / "model.safetensors").rename(copy / "weights" / "whole")
    (copy / "model.safetensors").symlink_to("weights/whole")
    (copy / ".git").symlink_to(tmp_path)
    (copy / "gone.json").symlink_to(tmp_path / "nothing")
    blobs = tmp_path / "models--acme--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (copy / "config.json").rename(blobs / "abc")
    (copy / "config.json").symlink_to(blobs / "abc")
    link = tmp_path / "link"
    link.symlink_to(copy)  # the user's own, and to the folder itself
    assert Checkpoint.open(link).config == Checkpoint.open(copy).config


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "x"])
def test_a_pipe_is_not_waited_for(copy: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    with pytest.raises(CheckpointError, match=f"{name} is not a plain file"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "tokenizer.model", "merges.txt"])
def test_a_text_without_end_is_not_read(copy: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    (copy / name).touch()
    os.truncate(copy / name, 20 * 10**9)
    with pytest.raises(CheckpointError, match=f"{name} has 20,000,000,000 bytes"):
        Checkpoint.open(copy)


def test_an_adapters_folder_is_a_strangers_too(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "lora" / "adapter_config.json").symlink_to(tmp_path / "adapter_config.json")
    with pytest.raises(CheckpointError, match="leads out"):
        Adapter.open(str(tmp_path / "lora"))


def write_header(folder: Path, header: bytes) -> None:
    data = len(header).to_bytes(8, "little") + header
    (folder / "model.safetensors").write_bytes(data)


def test_a_header_is_bounded(copy: Path) -> None:
    write_header(copy, b'{"a":[' + b"[]," * 3_000_000 + b"1]}")
    with pytest.raises(CheckpointError, match="has a header of 9,000,009 bytes, more than"):
        Checkpoint.open(copy)


@pytest.mark.parametrize(
    "shape", [[1] * 9, [1] * 10**6, [2**63], [10**4000] * 8, [2**63 - 1] * 8, [0, 2**64]]
)
def test_dimensions_are_few_and_small(copy: Path, shape: list[int]) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
    write_header(copy, json.dumps({"a": entry}).encode())
    with pytest.raises(CheckpointError, match=r"damaged header|wrong byte range"):
        Checkpoint.open(copy)
