"""Checkpoints whose shards stay on a server: same bytes, one shard's room, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from range_hub import COMMIT, RangeHub, Served
from safetensors.numpy import save_file

from compress.checkpoint import ranges
from compress.checkpoint.blocks import Block, BlockCache, cut
from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.merged import merge
from compress.checkpoint.ranges import HubFile, RemoteFile, StoreFile, Traffic
from compress.checkpoint.remote import open_url
from compress.checkpoint.safetensors import scan_safetensors
from compress.checkpoint.streaming import HEAD, RemoteShards
from compress.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_for_this_test_only"
MODEL = "someone/phi3"
NORM = "model.norm.weight"
BLOCK = 1 << 15
MOST = 10 * BLOCK

# Each line of stdin is a function of ``packlight`` and its arguments; each line of stdout what
# became of it. The blocks are small, so that a tiny model has many.
CHILD = f"""
import json, sys
from functools import partial
import packlight
from compress.checkpoint import streaming
streaming.RemoteShards = partial(streaming.RemoteShards, block={BLOCK}, most={MOST})
for line in sys.stdin:
    verb, arguments, room = json.loads(line)
    streaming.ROOM = room
    try:
        found = getattr(packlight, verb)(**arguments)
        found = [found.verdict, found.notes] if verb == "build" else "read"
    except packlight.PacklightError as error:
        found = [type(error).__name__, error.message, error.hint]
    print(json.dumps(found), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two shards, larger than the blocks of it that are kept."""
    place = tmp_path_factory.mktemp("model") / "phi3"
    return tiny.make("phi3", place, shards=2, num_hidden_layers=4)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeHub]:
    hub = RangeHub()
    hub.add(MODEL, folder)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    hub.close()


class Child:
    """A process that uses the hub.

    Attributes:
        largest: bytes that it had on disk at any request, at most.
        blocks: those of them in files without a name.
    """

    def __init__(self, hub: RangeHub, home: Path, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD], env=environment_of(hub, home) | environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._home, self.largest, self.blocks = home, 0, 0
        hub.on_range = self._measure

    def run(self, verb: str, *, room: float = 0, **arguments: Any) -> Any:
        """Call a function of ``packlight``.

        Args:
            room: times the weights that the disk must have for ``auto`` to download them.
        """
        process = self._process
        assert process.stdin and process.stdout
        print(json.dumps([verb, arguments, room]), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def named(self) -> int:
        """Bytes of the files below its home."""
        total = 0
        for path in self._home.rglob("*"):
            with suppress(OSError):  # it has just been removed
                total += path.lstat().st_size if path.is_file() else 0
        return total

    def _measure(self) -> None:
        unnamed = 0
        for handle in Path("/proc").glob(f"{self._process.pid}/fd/*"):
            with suppress(OSError):  # it has just been closed
                deleted = os.readlink(handle).endswith("(deleted)")
                unnamed += handle.stat().st_blocks * 512 if deleted else 0
        self.blocks = max(self.blocks, unnamed)
        self.largest = max(self.largest, self.named() + unnamed)


def environment_of(hub: RangeHub, home: Path) -> dict[str, str]:
    """Environment of a process that uses the hub, with its caches in ``home``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return (
        kept
        | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PACKLIGHT_CACHE": str(home / "cache")}
    )


def artifacts(folder: Path) -> dict[str, bytes]:
    names = sorted(path for path in folder.glob("*/*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.mark.slow  # builds of two solvers, each twice
def test_a_build_of_ranges_has_the_same_bytes_within_the_room_of_a_few_blocks(
    hub: RangeHub, folder: Path, tmp_path: Path
) -> None:
    weights, tensors = Checkpoint.open(folder).nbytes, Checkpoint.open(folder).tensors
    shards = sorted(folder.glob("*.safetensors"))
    hub.token = TOKEN
    home, local = tmp_path / "home", tmp_path / "local"
    child = Child(hub, home, HF_TOKEN=TOKEN)
    given = {"recipe": "int4-fast", "formats": ["gguf", "onnx"]}
    solver = {"quantize.solver": "gptq", "calibration.tokens": 512}
    solver |= {"calibration.sequence_length": 64, "verify.windows": 2, "verify.sequence_length": 32}
    # The first pass: every weight once, for two formats.
    _, notes = child.run(
        "build", model=MODEL, fetch="streaming", verify=False, output=str(home / "rtn"), **given
    )
    heads = sum(min(HEAD, shard.stat().st_size) for shard in shards)
    assert hub.fetched == heads + weights
    # What it leaves, and the largest layer with a few blocks: at no request there was more.
    layer = sum(info.nbytes for name, info in tensors.items() if name.startswith("model.layers.0."))
    room = layer + 8 * BLOCK
    assert child.largest <= child.named() + room
    if Path("/proc/self/fd").is_dir():
        assert 0 < child.blocks <= room < weights / 3
    assert all(stop - start <= max(BLOCK, HEAD) for _, start, stop in hub.ranges)
    told = [note for note in notes if "in ranges" in note]
    assert len(told) == 1
    assert f"{len(hub.ranges)} requests" in told[0]
    # Calibration, codes, the float model's answers: at most three more.
    before = hub.fetched
    verdict, _ = child.run(
        "build",
        model=MODEL,
        fetch="streaming",
        overrides=solver,
        output=str(home / "gptq"),
        **given,
    )
    assert verdict in ("passed", "failed")  # it ran
    assert heads + 2 * weights < hub.fetched - before <= heads + 4 * weights
    assert not list(home.rglob("*.safetensors"))
    assert not hub.leaked  # the token stays with the Hub
    assert not [
        path for path in home.rglob("*") if path.is_file()
        and any(secret in path.read_bytes() for secret in (TOKEN.encode(), b"X-Amz", b"secret-"))
    ]  # fmt: skip

    # The same of the Hub's cache: an ordinary folder of shards.
    for name, more in (("rtn", {"verify": False}), ("gptq", {"overrides": solver})):
        child.run(
            "build", model=MODEL, fetch="download", cache_dir=str(local / "hub"),
            output=str(local / name), **given, **more,
        )  # fmt: skip
        assert artifacts(home / name) == artifacts(local / name)
        plans = [json.loads((place / name / "plan.json").read_text()) for place in (home, local)]
        assert plans[0] == plans[1]  # the lock's hashes, too
    child.close()


def test_plans_need_headers_only_and_auto_downloads_where_there_is_room(
    hub: RangeHub, folder: Path, tmp_path: Path
) -> None:
    child = Child(hub, tmp_path)
    sizes = [shard.stat().st_size for shard in folder.glob("*.safetensors")]
    for verb, more in (("plan", {"model": MODEL}), ("inspect", {"target": MODEL}),
                       ("fit", {"target": MODEL})):  # fmt: skip
        hub.ranges.clear()
        child.run(verb, room=1, **more)
        assert hub.fetched == sum(min(HEAD, size) for size in sizes), verb
    assert not list(tmp_path.rglob("*.safetensors"))
    given = {"model": MODEL, "recipe": "int4-fast", "formats": ["gguf"], "verify": False}
    hub.ranges.clear()
    _, notes = child.run("build", room=1e12, output=str(tmp_path / "streamed"), **given)
    assert len(hub.ranges) > len(sizes)
    assert any("less than twice the" in note and "not downloaded" in note for note in notes)
    hub.ranges.clear()
    _, notes = child.run("build", room=1, output=str(tmp_path / "out"), **given)
    assert not any("in ranges" in note for note in notes)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(sizes)
    assert artifacts(tmp_path / "out") == artifacts(tmp_path / "streamed")
    # What is there is used, whatever is asked for.
    hub.ranges.clear()
    child.run("build", fetch="streaming", output=str(tmp_path / "again"), **given)
    assert hub.ranges == []
    # Pickles cannot be read in parts.
    files = hub.repositories[MODEL]
    hub.repositories["a/pickle"] = {
        "pytorch_model.bin" if name.endswith(".index.json") else name: Served(b"\x80\x02")
        if name.endswith(".index.json") else file
        for name, file in files.items() if not name.endswith(".safetensors")
    }  # fmt: skip
    refused = child.run("inspect", target="a/pickle", fetch="streaming")
    assert refused[1] == (
        "a/pickle has no weights of safetensors, which alone can be read in parts"
    )
    assert refused[2] == "--fetch download"
    child.close()


@pytest.mark.slow  # builds in a process for each job
def test_a_batch_reads_ranges_where_its_options_say_so(hub: RangeHub, tmp_path: Path) -> None:
    entries = {"a": {"fetch": "streaming"}, "b": {"fetch": "download"}}
    jobs = {
        "schema": 1,
        "models": [{"model": MODEL, "name": n, "options": o} for n, o in entries.items()],
        "recipes": ["int4-fast"],
        "formats": ["gguf"],
        "options": {"verify": False},
    }
    (tmp_path / "jobs.yaml").write_text(json.dumps(jobs))
    for name, streams in (("a", True), ("b", False)):
        hub.ranges.clear()
        subprocess.run(
            [sys.executable, "-P", "-m", "compress", "batch", "jobs.yaml", "--only", name],
            env=environment_of(hub, tmp_path), cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
        assert bool(hub.ranges) == streams
        assert bool(list(tmp_path.rglob("*.safetensors"))) != streams
    tree = tmp_path / "jobs"
    assert artifacts(tree / "a/int4-fast") == artifacts(tree / "b/int4-fast")


# --- what goes wrong on the way -------------------------------------------------------------------


def shard_of(hub: RangeHub, pause: float = 0) -> HubFile:
    (name, *_) = (file for file in hub.repositories[MODEL] if file.endswith(".safetensors"))
    url = f"{hub.endpoint}/{MODEL}/resolve/{COMMIT}/{name}"
    return HubFile(name, MODEL, url, TOKEN, Traffic(), pause)


def bytes_of(file: RemoteFile, start: int, stop: int) -> bytes:
    found = bytearray()

    def keep(offset: int, data: bytes) -> None:
        assert offset == start + len(found)
        found.extend(data)

    file.read(start, stop, keep)
    return bytes(found)


@pytest.mark.parametrize(
    "faults",
    [["truncated"], ["truncated"] * 9, ["reset"], [500, 429, 503], ["reset", "truncated", 502]],
)
def test_a_broken_transfer_goes_on_where_it_broke_off(hub: RangeHub, faults: list[Any]) -> None:
    file = shard_of(hub)
    hub.faults = list(faults)
    data = hub.repositories[MODEL][file.name]
    assert bytes_of(file, 100, 90_000) == data.read(100, 90_000)
    starts = [start for _, start, _ in hub.ranges]
    assert starts == sorted(starts)
    assert len(set(starts)) == 1 + faults.count("truncated")
    assert hub.faults == []


def test_a_link_that_expires_is_renewed(hub: RangeHub) -> None:
    hub.lasts = 2
    file = shard_of(hub)
    data = hub.repositories[MODEL][file.name]
    for start in range(0, 10_000, 1000):
        assert bytes_of(file, start, start + 1000) == data.read(start, start + 1000)
    assert hub.refused == [403] * 4
    assert len(hub.heads) == 5  # one link for two requests
    assert not hub.leaked


@pytest.mark.parametrize(
    ("fault", "said", "hint"),
    [
        ("whole", "does not send parts of", "--fetch download"),
        ("other", "sent other bytes of", "--fetch download"),
        ("reset", "cannot fetch", "--resume"),
        (503, "the server answers HTTP 503", "--resume"),
        (403, "the store refuses the link to it (HTTP 403)", "--resume"),
        (400, "HTTP 400", ""),
        (404, "has changed since it was opened (it is gone)", "begin again"),
    ],
)
def test_a_server_that_stays_so_is_told_in_one_line(
    hub: RangeHub, fault: str | int, said: str, hint: str
) -> None:
    file = shard_of(hub)
    hub.faults, hub.always = [fault], True
    with pytest.raises(CheckpointError) as caught:
        bytes_of(file, 0, 1000)
    message = caught.value.message
    assert said in message
    assert f"{file.name} of {MODEL}" in message or "the server of" in message
    assert hint in caught.value.hint
    for secret in (TOKEN, "secret-", "X-Amz", "\n"):
        assert secret not in message + caught.value.hint + str(caught.value.__cause__)
    if fault in ("reset", 503, 403):
        assert file.traffic.requests == ranges.TRIES


@pytest.mark.parametrize("change", ["longer", "other", "etag", "gone", "none"])
def test_a_shard_that_changes_on_the_way_is_refused(hub: RangeHub, change: str) -> None:
    hub.lasts = 1
    file = shard_of(hub)
    before = hub.repositories[MODEL][file.name]
    bytes_of(file, 0, 1000)
    data = before.read(0, before.size)
    if change == "gone":
        del hub.repositories[MODEL][file.name]
        hub.repositories[MODEL]["other.safetensors"] = before
    else:
        hub.repositories[MODEL][file.name] = Served(
            data + b"x" if change == "longer" else data[::-1] if change == "other" else data,
            etag="another" if change == "etag" else "",
        )
    if change == "none":
        assert bytes_of(file, 1000, 2000) == data[1000:2000]
        return
    with pytest.raises(CheckpointError, match="changed since it was opened") as caught:
        bytes_of(file, 1000, 2000)
    assert "begin again" in caught.value.hint


def test_the_hash_of_a_whole_shard_is_held_to_what_the_hub_states(
    hub: RangeHub, folder: Path
) -> None:
    file = shard_of(hub)
    shards = RemoteShards({file.name: file})
    assert shards.digests(False, lambda done, total: None, 0) == {file.name: file.sha256}
    assert hub.ranges == []
    assert shards.digests(True, lambda done, total: None, 0) == {file.name: file.sha256}
    assert hub.fetched == file.size
    served = hub.repositories[MODEL][file.name]
    hub.repositories[MODEL][file.name] = Served(b"\0" * served.size, etag=served.etag)
    with pytest.raises(CheckpointError, match="is not what the Hub states: SHA-256"):
        shards.digests(True, lambda done, total: None, 0)


# --- URLs -----------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[str]:
    """The checkpoint at a URL of fsspec."""
    base = "memory://bucket" if request.param == "memory" else f"local-copy::file://{tmp_path}"
    base = base.removeprefix("local-copy::")
    fs, root = open_url(f"{base}/phi3")
    fs.makedirs(root, exist_ok=True)
    for path in folder.iterdir():
        fs.put_file(str(path), f"{root}/{path.name}")
    yield f"{base}/phi3"
    if request.param == "memory":
        fs.store.clear()
        fs.pseudo_dirs[:] = [""]


def test_a_url_is_read_in_ranges_and_refused_when_it_changes(
    url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, root = open_url(url)
    shards = {
        path.name: StoreFile(path.name, url, fs, f"{root}/{path.name}", Traffic(), 0)
        for path in folder.glob("*.safetensors")
    }
    small = small_copy(folder, tmp_path)
    found = Checkpoint(small, url, remote=RemoteShards(shards, block=BLOCK))
    local = Checkpoint.open(folder)
    assert {name: info.shape for name, info in found.tensors.items()} == {
        name: info.shape for name, info in local.tensors.items()
    }
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.gate_up_proj.weight"):
        assert np.array_equal(found.read(name), local.read(name))
        assert np.array_equal(found.read(name, slice(3, 9)), local.read(name, slice(3, 9)))
    again = Checkpoint(small, url, remote=RemoteShards(shards))
    assert found.fingerprint() == again.fingerprint()
    for path in folder.glob("*.safetensors"):
        fs.pipe_file(f"{root}/{path.name}", path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        found.read("lm_head.weight")


def small_copy(folder: Path, place: Path) -> Path:
    """A checkpoint without its shards."""
    copy = place / "small"
    copy.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_memory_urls_stream_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    fs, root = open_url("memory://streamed/phi3")
    for path in folder.iterdir():
        fs.pipe_file(f"{root}/{path.name}", path.read_bytes())
    try:
        streamed = Checkpoint.open("memory://streamed/phi3", fetch="streaming")
        assert streamed.remote is not None
        assert not list(tmp_path.rglob("*.safetensors"))
        copied = Checkpoint.open("memory://streamed/phi3", fetch="download")
        for name in copied.tensors:
            assert np.array_equal(copied.read(name), streamed.read(name))
        # With an adapter, whose file is on this disk.
        lora = tmp_path / "lora"
        lora.mkdir()
        config = {"peft_type": "LORA", "target_modules": [], "modules_to_save": ["model.norm"]}
        (lora / "adapter_config.json").write_text(json.dumps(config))
        norm = {"base_model.model.model.norm.weight": np.full(copied.tensors[NORM].shape, 3, "f4")}
        save_file(norm, lora / "adapter_model.safetensors")
        merged = Checkpoint.open("memory://streamed/phi3", adapters=str(lora), fetch="streaming")
        assert merged.remote is None  # it has been copied by now
        merged = merge(streamed, str(lora), token=None, cache_dir=None)
        assert (merged.read(NORM) == 3).all()
        assert np.array_equal(merged.read("lm_head.weight"), copied.read("lm_head.weight"))
        assert merged.fingerprint() != streamed.fingerprint()
        assert not [file for file in merged.files() if file.suffix == ".safetensors"]
        # What has been copied is used.
        assert Checkpoint.open("memory://streamed/phi3", fetch="streaming").remote is None
    finally:
        fs.store.clear()
        fs.pseudo_dirs[:] = [""]


# --- blocks ---------------------------------------------------------------------------------------


class Counted(RemoteFile):
    """A file in memory that notes what is read of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.name, "here", Traffic(), 0)
        self.data = path.read_bytes()
        self.size, self.tag = len(self.data), "1"
        self.taken: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def _transfer(self, start: int, stop: int) -> Iterator[bytes]:
        with self._lock:
            self.taken.append((start, stop))
        yield self.data[start:stop]


def test_blocks_are_the_tensors_in_the_order_of_layers(folder: Path) -> None:
    files = {path.name: Counted(path) for path in folder.glob("*.safetensors")}
    tensors = [i for path in folder.glob("*.safetensors") for i in scan_safetensors(path).values()]
    blocks = cut(files, tensors, BLOCK)
    assert sum(one.stop - one.start for one in blocks) == sum(info.nbytes for info in tensors)
    assert max(one.stop - one.start for one in blocks) <= BLOCK
    layers = [one.layer for one in blocks]
    assert layers == sorted(layers)
    assert layers[0] == (0, 0, "model.embed_tokens.weight")
    assert layers[-1][0] == 2
    spans = sorted((one.file.name, one.start, one.stop) for one in blocks)
    for (file, _, stop), (other, start, _) in pairwise(spans):
        assert file != other or stop <= start


def read_pass(cache: BlockCache, blocks: Sequence[Block]) -> None:
    for block in blocks:
        with cache.open(Path(block.file.name)) as stream:
            stream.seek(block.start)
            assert (
                stream.read(block.stop - block.start) == block.file.data[block.start : block.stop]
            )


def test_a_second_pass_fetches_what_is_not_kept(folder: Path, tmp_path: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    file = Counted(path)
    # Layers of two blocks.
    blocks = [
        Block(file, number * 1000, number * 1000 + 1000, (1, number // 2, ""))
        for number in range(20)
    ]
    cache = BlockCache(blocks, tmp_path, block=1024, most=14 * 1024)
    read_pass(cache, blocks)
    assert sorted(file.taken) == [(one.start, one.stop) for one in blocks]
    read_pass(cache, blocks)
    again = file.traffic.bytes - 20_000
    assert (
        6000 <= again <= 10_000
    )  # of 20 blocks 14 fit; one that is least recently used keeps none
    assert list(tmp_path.iterdir()) == []  # without a name


def test_threads_may_read_more_blocks_than_there_is_room_for(folder: Path, tmp_path: Path) -> None:
    file = Counted(next(folder.glob("*.safetensors")))
    blocks = [Block(file, n * 100, n * 100 + 100, (1, n, "")) for n in range(64)]
    cache = BlockCache(blocks, tmp_path, block=128, most=0)
    failed: list[BaseException] = []

    def work(own: Sequence[Block]) -> None:
        try:
            for _ in range(5):
                read_pass(cache, own)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(blocks[n::12],)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_block_that_cannot_be_fetched_is_tried_again(folder: Path, tmp_path: Path) -> None:
    class Failing(Counted):
        failures = 1

        def _transfer(self, start: int, stop: int) -> Iterator[bytes]:
            if self.failures:
                self.failures -= 1
                raise CheckpointError("gone")
            return super()._transfer(start, stop)

    file = Failing(next(folder.glob("*.safetensors")))
    blocks = [Block(file, 0, 100, (1, 0, ""))]
    cache = BlockCache(blocks, tmp_path, block=128)
    with pytest.raises(CheckpointError, match="gone"):
        read_pass(cache, blocks)
    read_pass(cache, blocks)
