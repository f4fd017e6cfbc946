"""``SHA256SUMS``: one flipped byte in any file is reported, as by GNU's sha256sum."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from commands import packlight, refused

from compress.errors import ArtifactError, PacklightError, UsageError
from compress.output import checksums
from compress.output.checksums import (
    check_folder,
    folder_digests,
    read_checksums,
    refuse_links,
    write_checksums,
)

FILES = {
    "report.json": b'{"schema_version": 1}\n',
    "gguf/model-Q4_K_M.gguf": bytes(range(256)) * 40,
    "onnx/onnx/model.onnx": b"\x08\x07",
    "onnx/onnx/model.onnx.data": b"\0" * 5000,
    "coreml/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin": b"weights" * 99,
    "empty.txt": b"",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "out"
    for name, content in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    write_checksums(place)
    return place


def flip(path: Path, position: int, mask: int = 0x01) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)


def test_a_folder_as_it_was_written_is_whole(folder: Path) -> None:
    (folder / "gguf" / ".DS_Store").write_text("macOS was here")
    findings = check_folder(folder)
    assert findings.whole and findings.files == len(FILES)


def test_large_files_are_hashed_beside_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many small ones are between them."""
    large = sorted(FILES, key=lambda name: len(FILES[name]))[-2:]
    both = threading.Barrier(2, timeout=600)
    real = checksums.sha256_of

    def sha256_of(path: Path) -> str:
        if path.relative_to(folder).as_posix() in large:
            both.wait()
        return real(path)

    monkeypatch.setattr(checksums, "sha256_of", sha256_of)
    monkeypatch.setattr(checksums, "worker_threads", lambda: 2)
    assert checksums.folder_digests(folder) == read_checksums(folder / "SHA256SUMS")


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
@pytest.mark.parametrize("position", [0, -1])
def test_one_flipped_byte_in_any_file_is_told(folder: Path, name: str, position: int) -> None:
    flip(folder / name, position)
    findings = check_folder(folder)
    assert (findings.changed, findings.missing, findings.extra) == ((name,), (), ())


@pytest.mark.parametrize("mask", [0x01, 0x0A, 0x20, 0x80])
def test_one_flipped_byte_anywhere_in_the_checksums_is_told(folder: Path, mask: int) -> None:
    """0x20 makes a digit's letter upper case, 0x0A a space an asterisk: valid for sha256sum."""
    for name in list(FILES)[2:]:
        (folder / name).unlink()
    write_checksums(folder)
    sums = folder / "SHA256SUMS"
    good = sums.read_bytes()
    for position in range(len(good)):
        flip(sums, position, mask)
        try:
            assert not check_folder(folder).whole, position
        except ArtifactError as error:
            assert "is damaged" in str(error)
        sums.write_bytes(good)


def test_missing_and_extra_files_are_told(folder: Path) -> None:
    (folder / "report.json").rename(folder / "gguf" / "report.json")
    findings = check_folder(folder)
    assert findings.missing == ("report.json",) and findings.extra == ("gguf/report.json",)
    assert findings.lines()[0] == "report.json: missing"


def test_names_that_gnu_escapes(tmp_path: Path) -> None:
    for name in ("back\\slash", "new\nline", "plain"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    assert set(read_checksums(tmp_path / "SHA256SUMS")) == {"back\\slash", "new\nline", "plain"}
    assert check_folder(tmp_path).whole


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs GNU coreutils")
@pytest.mark.parametrize("kind", ["--text", "--binary"])
def test_gnus_own_checksums_are_read(folder: Path, kind: str) -> None:
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder).returncode == 0
    (folder / "new\nline").write_text("x")
    names = [*FILES, "new\nline"]
    done = subprocess.run(["sha256sum", kind, *names], cwd=folder, capture_output=True, check=True)
    (folder / "SHA256SUMS").write_bytes(done.stdout)
    assert check_folder(folder).whole


@pytest.mark.parametrize(
    "line",
    ["", "short  a", f"{'0' * 64}  /etc/passwd", f"{'0' * 64}  ../a", f"\\{'0' * 64}  a\\b"],
)
def test_lines_that_are_none_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  fine\n{line}\n")
    with pytest.raises(ArtifactError, match="is damaged: line 2"):
        check_folder(tmp_path)


def test_a_folder_without_checksums_is_no_build(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        check_folder(tmp_path)
    assert isinstance(caught.value, PacklightError) and "folder of a build" in caught.value.hint


def test_the_command(folder: Path) -> None:
    done = packlight("verify", "--checksums", folder)
    assert done.returncode == 0 and "6 files" in done.stderr, done.stderr
    flip(folder / "onnx/onnx/model.onnx", 0)
    done = packlight("verify", "--checksums", folder, "--json")
    assert done.returncode == 1
    assert "1 not as in" in packlight("verify", "--checksums", folder).stderr
    assert json.loads(done.stdout)["changed"] == ["onnx/onnx/model.onnx"]
    assert "--baseline is missing" in refused(packlight("verify", folder))


@pytest.mark.parametrize("option", [["--gate", "bytes<=1"], ["--against", "last.json"]])
def test_a_gate_is_not_passed_by_checksums_alone(folder: Path, option: list[str]) -> None:
    told = refused(packlight("verify", "--checksums", folder, *option))
    assert f"{option[0]} needs --baseline" in told


@pytest.mark.parametrize("name", ["report.json", "onnx", "onnx/onnx/model.onnx"])
def test_a_link_is_not_read(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")  # to the very same bytes
    found = check_folder(folder)
    assert not found.whole and found.links and not found.changed
    assert all(link.startswith(name) for link in found.links)
    with pytest.raises(ArtifactError, match="is a link"):
        refuse_links(folder, FILES)


def test_a_link_is_not_hashed_into_a_build(tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("TOPSECRET")
    out = tmp_path / "out"
    out.mkdir()
    (out / "merges.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(ArtifactError, match=r"merges\.txt is a link"):
        folder_digests(out)
