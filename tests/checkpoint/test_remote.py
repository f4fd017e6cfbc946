"""Checkpoints and outputs behind URLs, on two real file systems of fsspec: memory and folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from compress.batch.output_tree import publish, read_sums
from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.remote import (
    fetch,
    find,
    fingerprint,
    open_url,
    read_text,
    write_text,
)
from compress.errors import CheckpointError, PacklightError, UnsupportedModelError, UsageError
from compress.files import is_url
from compress.output.checksums import read_checksums, write_checksums


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty folder."""
    if request.param == "file":
        yield f"file://{tmp_path}/store"
        return
    url = "memory://bucket/store"
    yield url
    fs, _ = open_url(url)
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("model") / "tiny-llama")


def upload(folder: Path, url: str) -> None:
    fs, root = open_url(url)
    for path in sorted(folder.iterdir()):
        fs.makedirs(root, exist_ok=True)
        fs.put_file(str(path), f"{root}/{path.name}")


def reads(monkeypatch: pytest.MonkeyPatch, url: str) -> list[str]:
    """The names that are fetched from now on, in order."""
    fs, _ = open_url(url)
    taken: list[str] = []
    plain = type(fs).get_file

    def get_file(self: Any, rpath: str, lpath: str, **options: Any) -> Any:
        taken.append(rpath.rsplit("/", 1)[-1])
        return plain(self, rpath, lpath, **options)

    monkeypatch.setattr(type(fs), "get_file", get_file)
    return taken


def test_a_url_is_no_folder() -> None:
    assert is_url("s3://bucket/model") and is_url("file:///tmp/x")
    assert not is_url("org/model") and not is_url("/tmp/x") and not is_url("C:\\x")


def test_fetch_gives_the_same_checkpoint(store: str, checkpoint: Path, tmp_path: Path) -> None:
    upload(checkpoint, f"{store}/tiny-llama")
    folder = fetch(f"{store}/tiny-llama", tmp_path / "cache")
    assert folder.name == "tiny-llama"  # outputs are named after it
    fetched, original = Checkpoint.open(str(folder)), Checkpoint.open(str(checkpoint))
    assert fetched.tensors.keys() == original.tensors.keys()
    for path in checkpoint.glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_only_what_changed_is_fetched_again(
    store: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{store}/tiny-llama"
    upload(checkpoint, url)
    taken = reads(monkeypatch, url)
    fetch(url, tmp_path / "cache")
    assert taken[0] != "model.safetensors"  # the small files come first
    assert "model.safetensors" in taken
    taken.clear()
    fetch(url, tmp_path / "cache")
    assert taken == []
    fs, root = open_url(url)
    fs.pipe_file(f"{root}/config.json", (checkpoint / "config.json").read_bytes() + b"\n")
    fetch(url, tmp_path / "cache")
    assert taken == ["config.json"]


def test_an_unknown_family_is_refused_before_its_weights(
    store: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{store}/mamba"
    upload(checkpoint, url)
    fs, root = open_url(url)
    fs.pipe_file(f"{root}/config.json", b'{"model_type": "mamba2"}')
    taken = reads(monkeypatch, url)
    with pytest.raises(UnsupportedModelError):
        fetch(url, tmp_path / "cache")
    assert "model.safetensors" not in taken


def test_nothing_there_is_one_clear_line(store: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        fetch(f"{store}/nothing", tmp_path / "cache")
    assert caught.value.message.startswith(f"cannot fetch {store}/nothing")
    assert "\n" not in caught.value.message


class OfItsOwn(Exception):
    """As those of botocore, which are no OSErrors."""


@pytest.mark.parametrize(
    "use",
    [
        lambda url, folder: fetch(url, folder / "cache"),
        lambda url, folder: find(f"{url}/*"),
        lambda url, folder: fingerprint(url),
        lambda url, folder: read_text(url, "x.txt"),
        lambda url, folder: write_text(url, "x.txt", "x"),
        lambda url, folder: publish(make_output(folder / "out", a=b"1"), url),
    ],
)
def test_errors_of_a_stores_client_are_one_line(
    use: Callable[[str, Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _ = open_url("memory://bucket/store")

    def fail(*_: object, **__: object) -> None:
        raise OfItsOwn("no credentials\nat all")

    for name in ("ls", "glob", "cat_file", "makedirs", "pipe_file"):
        monkeypatch.setattr(type(fs), name, fail)
    with pytest.raises(PacklightError, match=r"^cannot .*: no credentials at all$") as caught:
        use("memory://bucket/store", tmp_path)
    assert "credentials" in caught.value.hint


@pytest.mark.parametrize("archive", [b"no archive", None])
def test_a_chained_url_that_cannot_be_opened(archive: bytes | None, tmp_path: Path) -> None:
    if archive is None:
        (tmp_path / "a.zip").mkdir()
    else:
        (tmp_path / "a.zip").write_bytes(archive)
    with pytest.raises(UsageError, match="cannot be opened"):
        fetch(f"zip://m::file://{tmp_path}/a.zip", tmp_path / "cache")


def test_a_protocol_nobody_knows_names_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        fetch("gopher9://host/model", tmp_path / "cache")
    assert "gopher9" in caught.value.message
    assert "install" in str(caught.value.hint)


def test_a_page_of_another_hub_names_the_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        fetch("https://modelscope.cn/models/Owner/Model/summary", tmp_path / "cache")
    assert caught.value.hint == "of a page of the Hub give the Hub id: Owner/Model instead"


def make_output(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_checksums(folder)
    return folder


def test_publish_is_whole_when_its_checksums_are_there(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{store}/out"
    output = make_output(tmp_path / "out", report=b"{}", gguf__a=b"1", gguf__b=b"2")
    fs, _ = open_url(url)
    plain, put = type(fs).put_file, []

    def put_file(self: Any, lpath: str, rpath: str, **options: Any) -> Any:
        if len(put) == 2:
            raise OSError("connection lost")
        put.append(rpath)
        return plain(self, lpath, rpath, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(fs), "put_file", put_file)
        with pytest.raises(UsageError, match="connection lost"):
            publish(output, url)
    assert read_sums(url) is None  # half of it exists, and it does not count as an output
    publish(output, url)
    assert read_sums(url) == read_checksums(output / "SHA256SUMS")
    assert read_text(url, "gguf/b") == "2"


def test_publish_replaces_what_packlight_made_and_nothing_else(store: str, tmp_path: Path) -> None:
    url = f"{store}/out"
    publish(make_output(tmp_path / "old", gguf__a=b"1", gguf__gone=b"2"), url)
    fs, root = open_url(url)
    fs.pipe_file(f"{root}/notes.txt", b"mine")
    new = make_output(tmp_path / "new", gguf__a=b"3")
    publish(new, url)
    assert read_text(url, "gguf/a") == "3"
    assert read_text(url, "gguf/gone") is None
    assert read_text(url, "notes.txt") == "mine"
    assert list(read_sums(url) or ()) == ["gguf/a"]


def test_publish_again_writes_nothing(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{store}/out"
    output = make_output(tmp_path / "out", gguf__a=b"1")
    publish(output, url)
    before = fingerprint(url)
    fs, _ = open_url(url)
    monkeypatch.setattr(type(fs), "put_file", None)
    publish(output, url)
    assert fingerprint(url) == before


def test_a_fingerprint_changes_with_any_file(store: str, checkpoint: Path) -> None:
    url = f"{store}/tiny-llama"
    upload(checkpoint, url)
    before = fingerprint(url)
    assert fingerprint(url) == before
    fs, root = open_url(url)
    fs.pipe_file(f"{root}/tokenizer_config.json", b"{}")
    assert fingerprint(url) != before
