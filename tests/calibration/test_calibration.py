"""Texts become windows, and the walk's statistics are those of transformers' own model."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
import torch
from hooked import Model, distance, draw_windows, hooked

from compress.calibration import walk as walking
from compress.calibration.statistics import (
    LayerStats,
    Statistics,
    input_names,
    input_of,
    load,
    pack_hessian,
    save,
    unpack_hessian,
)
from compress.calibration.step import collect
from compress.calibration.texts import CalibrationSet
from compress.calibration.walk import Accumulator, held_back, walk
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig
from compress.decoder.tokenizer import Tokenizer
from compress.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made: dict[str, Model] = {}

    def get(family: str) -> Model:
        if family not in made:
            sharing = {"layer_sharing": True} if family == "mobilellm" else {}
            made[family] = Model(family, tmp_path_factory.mktemp(family), **sharing)
        return made[family]

    return get


def gathered(model: Model, windows: list[list[int]], **settings: object) -> dict[str, LayerStats]:
    stats: dict[str, LayerStats] = {}
    for found in walk(model.config, model.read, windows, hessian=True, **settings):
        stats |= found
    return stats


@pytest.mark.parametrize("family", ["llama", "phi3", "phi", "qwen3", "mobilellm", "lfm2"])
def test_statistics_are_those_of_a_plain_hooked_model(models, family):
    model, windows = models(family), draw_windows()
    stats, expected = (
        gathered(model, windows, exact=True),
        hooked(model, tiny.reference(model.folder), windows),
    )
    assert list(stats) == list(input_names(model.config)) == list(expected)
    for key, x in expected.items():
        assert stats[key].count == len(x)
        assert distance(stats[key].importance, (x * x).mean(0)) < 1e-4, key
        assert distance(stats[key].mean, x.mean(0)) < 1e-4, key
        (hessian,) = stats[key].hessian
        assert distance(hessian, x.T @ x / len(x)) < 1e-4, key


def test_states_in_bfloat16_change_little(models):
    model, windows = models("llama"), draw_windows()
    exact, rounded = gathered(model, windows, exact=True), gathered(model, windows)
    errors = [distance(rounded[key].importance, exact[key].importance) for key in exact]
    assert 0 < max(errors) < 0.02


def test_states_in_a_file_change_nothing(models, monkeypatch, tmp_path):
    model, windows = models("llama"), draw_windows()
    kept = gathered(model, windows, work=tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(walking, "available_memory", lambda: 0)
    spilled = gathered(model, windows, work=tmp_path)
    assert (tmp_path / "states.bin").stat().st_size == 2 * 5 * 48 * model.config.hidden_size
    for key, entry in kept.items():
        assert (entry.hessian[0] == spilled[key].hessian[0]).all()


def test_a_wide_hessian_is_its_diagonal_blocks():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 8448), np.float32))
    sums = Accumulator(8448, hessian=True)
    sums.add(x[:4], hold_back=False)
    sums.add(x[4:], hold_back=False)
    first, second = sums.finish().hessian
    assert (first.shape, second.shape) == ((4352, 4352), (4096, 4096))
    for block, part in ((first, x[:, :4352]), (second, x[:, 4352:])):
        np.testing.assert_allclose(block, part.T @ part / 6, rtol=1e-5, atol=1e-6)


def test_some_windows_are_held_back_from_the_hessian(models, tmp_path):
    model, windows = models("llama"), draw_windows(count=33, length=16)
    assert gathered(model, windows[:15])["lm_head"].held_back is None  # too few to leave one out
    held = gathered(model, windows, exact=True)
    expected = hooked(model, tiny.reference(model.folder), windows)
    for key, entry in held.items():
        x = expected[key].reshape(33, 16, -1)
        apart = x[[15, 31]].reshape(32, -1)
        assert entry.held_back.shape == apart.shape
        assert distance(entry.held_back, apart) < 1e-4
        assert distance(entry.importance, (expected[key] ** 2).mean(0)) < 1e-4
        rest = np.delete(x, [15, 31], axis=0).reshape(31 * 16, -1)
        assert distance(entry.hessian[0], rest.T @ rest / len(rest)) < 1e-4
    save(tmp_path / "x.npz", held)
    back = load(tmp_path / "x.npz", "blocks.1.down_proj", hessian=True)
    assert distance(back.held_back, held["blocks.1.down_proj"].held_back) < 1e-3
    light = load(tmp_path / "x.npz", "blocks.1.down_proj", hessian=False)
    assert light.held_back is None


def test_of_long_texts_fewer_windows_are_held_back():
    windows = [[0] * 512 for _ in range(100)]
    assert len(held_back(windows)) == 2  # of 50: a thousand tokens are enough
    assert len(held_back(windows[:17])) == 1 and held_back(windows[:15]) == []


def test_names_of_inputs(models):
    phi3, phi, llama = (models(family).config for family in ("phi3", "phi", "llama"))
    assert input_of(phi3, "blocks.1.qkv_proj.weight") == "blocks.1.q_proj"
    assert input_of(llama, "blocks.1.v_proj.weight") == "blocks.1.q_proj"
    assert input_of(phi3, "blocks.0.gate_up_proj.weight") == "blocks.0.gate_proj"
    assert input_of(phi, "blocks.0.up_proj.weight") == "blocks.0.q_proj"  # parallel: one norm
    assert input_of(llama, "lm_head.weight") == "lm_head"
    for name in ("embed_tokens.weight", "norm.weight", "blocks.0.input_layernorm.weight"):
        assert input_of(llama, name) is None
    assert input_of(phi, "blocks.0.q_proj.bias") is None


def test_linears_of_one_input_get_the_same_object(models, tmp_path):
    config = models("llama").config
    save(tmp_path / "blocks.0.npz", {"blocks.0.q_proj": LayerStats(2, np.ones(4, np.float32))})
    statistics = Statistics.open(config, tmp_path, hessian=True)
    found = [statistics.for_weight(f"blocks.0.{role}.weight") for role in ("q_proj", "v_proj")]
    assert found[0] is found[1] is not None
    assert found[0].mean is None and found[0].hessian is None
    assert statistics.for_weight("embed_tokens.weight") is None
    assert statistics.for_weight("blocks.0.o_proj.weight") is None


def test_a_packed_hessian_is_within_half_a_step(tmp_path):
    draw = np.random.default_rng(0)
    x = (draw.standard_normal((500, 40)) * draw.lognormal(0, 3, 40)).astype(np.float32)
    x[:, 7] = 0  # a dead column
    hessian = x.T @ x / 500
    again = unpack_hessian(*pack_hessian(hessian))
    roots = np.sqrt(np.diagonal(hessian))
    bound = np.outer(roots, roots) * (0.51 / 32767) + 1e-12
    assert (np.abs(again - hessian) <= bound).all()
    assert (again == again.T).all()
    np.testing.assert_allclose(np.diagonal(again), np.diagonal(hessian), rtol=1e-6)
    stats = LayerStats(500, np.diagonal(hessian).copy(), x.mean(0), (hessian[:16, :16], hessian))
    save(tmp_path / "lm_head.npz", {"lm_head": stats})
    loaded = load(tmp_path / "lm_head.npz", "lm_head", hessian=True)
    assert loaded.count == 500 and (loaded.mean == stats.mean).all()
    assert [block.shape for block in loaded.hessian] == [(16, 16), (40, 40)]
    assert (loaded.hessian[1] == again).all()
    assert load(tmp_path / "lm_head.npz", "lm_head", hessian=False).hessian is None


# --- the cache --------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


def calibrated(model: Model, windows: list[list[int]], *, hessian: bool) -> Statistics:
    chosen = CalibrationSet(tuple(map(tuple, windows)), ("test",))
    return collect(model, chosen, hessian=hessian)


def test_statistics_are_kept_and_found_again(models, cache):
    model, windows = models("llama"), draw_windows(2)
    first = calibrated(model, windows, hessian=False).for_weight("blocks.1.o_proj.weight")
    assert first.hessian is None
    before = model.readings
    again = calibrated(model, windows, hessian=False).for_weight("blocks.1.o_proj.weight")
    assert model.readings == before
    assert (again.importance == first.importance).all()

    full = calibrated(model, windows, hessian=True).for_weight("blocks.1.o_proj.weight")
    assert model.readings > before and full.hessian is not None
    before = model.readings
    light = calibrated(model, windows, hessian=False)  # Hessians serve without, too
    assert light.for_weight("blocks.1.o_proj.weight").hessian is None
    assert model.readings == before
    assert len(list(cache.iterdir())) == 1

    calibrated(model, draw_windows(3), hessian=False)  # other windows, other statistics
    assert model.readings > before
    assert len(list(cache.iterdir())) == 2


def test_damaged_statistics_are_made_again(models, cache):
    model, windows = models("llama"), draw_windows(2)
    first = calibrated(model, windows, hessian=True).for_weight("blocks.1.o_proj.weight")
    (folder,) = cache.iterdir()
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:-1000]), lambda p: p.unlink()):
        damage(folder / "blocks.1.npz")
        again = calibrated(model, windows, hessian=True).for_weight("blocks.1.o_proj.weight")
        assert (again.hessian[0] == first.hessian[0]).all()
    raw = bytearray((folder / "blocks.1.npz").read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 64] = bytes(64)
    (folder / "blocks.1.npz").write_bytes(raw)
    found = calibrated(model, windows, hessian=True)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.npz cannot be read") as caught:
        for role in ("q_proj", "o_proj", "gate_proj", "down_proj"):
            found.for_weight(f"blocks.1.{role}.weight")
    assert str(folder) in caught.value.hint


class Interrupted(Stored):
    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        if name.startswith("blocks.1"):
            raise KeyboardInterrupt
        return super().read(name, rows)


def test_an_interrupted_walk_leaves_nothing(models, cache):
    model = models("llama")
    chosen = CalibrationSet(((1, 2, 3, 4),), ("test",))
    with pytest.raises(KeyboardInterrupt):
        collect(Interrupted(model.checkpoint, model.config), chosen, hessian=False)
    assert list(cache.iterdir()) == []


class Mortal(Stored):
    """A source that counts readings, and ends the process at the n-th."""

    def __init__(self, model: Stored, life: int) -> None:
        super().__init__(model.checkpoint, model.config)
        self.left, self.readings = life, 0

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.readings += 1
        return super().read(name, rows)


def test_of_two_that_want_the_same_one_walks_and_the_other_waits(models, cache):
    model = models("llama")
    chosen = CalibrationSet(tuple(map(tuple, draw_windows(2))), ("test",))
    alone = Mortal(model, -1)
    collect(alone, chosen, hessian=False)
    shutil.rmtree(cache)
    walkers = [Mortal(model, -1) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(lambda source: collect(source, chosen, hessian=False), walkers)
    assert sorted(walker.readings for walker in walkers) == [0, alone.readings]
    name = "blocks.1.o_proj.weight"
    assert (one.for_weight(name).importance == two.for_weight(name).importance).all()
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("family", ["phi3", "mobilellm"])
def test_a_walk_goes_on_with_the_block_that_it_was_at(family, cache, tmp_path, monkeypatch):
    options = {"layer_sharing": True} if family == "mobilellm" else {}
    path = tiny.make(family, tmp_path / "model", num_hidden_layers=4, **options)
    checkpoint = Checkpoint.open(path)
    model = Stored(checkpoint, DecoderConfig.from_hf(checkpoint.config))
    chosen = CalibrationSet(tuple(map(tuple, draw_windows(3))), ("test",))
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "whole"))
    alone = Mortal(model, -1)
    whole = collect(alone, chosen, hessian=True)

    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "resumed"))
    if family == "phi3":
        monkeypatch.setattr(walking, "available_memory", lambda: 0)  # states in a file
    total, deaths = 0, 0
    for life in (1, 5, 12, 12, 12, 3, 40, 60, -1):
        mortal = Mortal(model, life)
        try:
            found = collect(mortal, chosen, hessian=True, keep=True)
            break
        except KeyboardInterrupt:
            deaths += 1
        finally:
            total += mortal.readings
    assert deaths >= 5
    for name in input_names(model.config):
        first, second = whole.for_weight(f"{name}.weight"), found.for_weight(f"{name}.weight")
        assert (first.importance == second.importance).all()
        for a, b in zip(first.hessian, second.hessian, strict=True):
            assert (a == b).all()
    assert len(list((tmp_path / "resumed" / "calibration").iterdir())) == 1
    # After each kill the current block, or the embedding, is read again.
    assert total <= alone.readings + deaths * 12


# --- texts ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(models) -> Tokenizer:
    return Tokenizer(models("llama").folder)


def drawn(tokenizer: Tokenizer, *sources: object, **settings: int) -> CalibrationSet:
    wanted = {"tokens": 128, "sequence_length": 32, "seed": 0} | settings
    return CalibrationSet.load(list(map(str, sources)), tokenizer, **wanted)


def test_windows_of_plain_text(tokenizer, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"line {n} of the text\n" for n in range(400)))
    found = drawn(tokenizer, text)
    assert found.tokens == 128 and [len(window) for window in found.windows] == [32] * 4
    assert found.sources == ("a.txt",)
    if tokenizer.adds_bos:
        assert all(window[0] == tokenizer.bos_id for window in found.windows)
    assert drawn(tokenizer, text).digest() == found.digest()
    assert drawn(tokenizer, text, seed=1).digest() != found.digest()
    body = tokenizer.decode(found.windows[0][1:])
    assert re.search(r"line \d+ of the text\nline \d+", body)


def test_sources_give_equal_parts(tokenizer, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 3000)
    found = drawn(tokenizer, tmp_path / "a.txt", tmp_path / "b.txt", tokens=32 * 6)
    text = [tokenizer.decode(window[1:]) for window in found.windows]
    assert ["a" in body for body in text] == [True, False] * 3


def test_a_short_text_gives_what_it_has(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 60)
    assert 1 <= len(drawn(tokenizer, tmp_path / "a.txt", tokens=100_000).windows) < 20


def test_chats_go_through_the_template(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi."}]
    rows = [{"messages": chat}] * 20
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = drawn(tokenizer, path)
    if tokenizer.has_chat_template:
        rendered = tokenizer.render_chat(chat, add_generation_prompt=False)
    else:
        rendered = "User: Hello there\nAssistant: Hi.\n"
    ids = tokenizer.encode(rendered)
    ids = ids[1:] if ids[0] == tokenizer.bos_id else ids
    body = list(found.windows[0][1:] if tokenizer.adds_bos else found.windows[0])
    assert body == (ids * 20)[: len(body)]
    path.write_text(json.dumps({"text": "plain words " * 100}) + "\n\n")
    assert "plain words" in tokenizer.decode(drawn(tokenizer, path).windows[0])


def test_a_chat_that_the_template_refuses_is_named_by_its_line(tmp_path):
    model = tiny.make("qwen2", tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0].content + messages[0].missing }}")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "plain"}\n{"messages": [{"role": "user", "content": "x"}]}\n'
    )
    with pytest.raises(CheckpointError, match=r"a\.jsonl line 2: the chat template failed"):
        drawn(Tokenizer(model), tmp_path / "a.jsonl")


def test_the_built_in_set_fills_the_default(tokenizer):
    found = drawn(tokenizer, "builtin", tokens=16384, sequence_length=512)
    assert found.tokens == 16384 and found.sources == ("builtin",)
    assert len(set(found.windows)) == 32


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("short.txt", "a few words", "short.txt does not fill one window"),
        ("empty.txt", "\n", "empty.txt is empty"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text, see byte 3"),
        ("rows.jsonl", '{"prompt": "x"}\n', "line 1 is not a calibration text"),
        ("rows.jsonl", '{"text": "ok"}\nnot json\n', "line 2 is not a calibration text"),
        ("rows.jsonl", '{"messages": "hello"}\n', "line 1 is not a calibration text"),
        ("rows.jsonl", "[1, 2]\n", "line 1 is not a calibration text"),
        ("rows.jsonl", '{"text": null}\n', "line 1 is not a calibration text"),
        ("rows.jsonl", '{"messages": [{"role": "user", "content": ["x"]}]}\n', "line 1 is not a"),
    ],
)
def test_texts_that_are_refused(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        drawn(tokenizer, path, sequence_length=64)


def test_every_text_must_give_something(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match=r"empty\.txt is empty"):
        drawn(tokenizer, "builtin", tmp_path / "empty.txt")


def test_lines_of_jsonl_end_where_json_says(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one\u2028line of words"}\r\n' * 60)
    assert drawn(tokenizer, tmp_path / "rows.jsonl").tokens == 128


def test_a_folder_is_no_text(tokenizer, tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read: Is a directory$"):
        drawn(tokenizer, tmp_path)


def test_hessians_added_in_tiles_are_symmetric_and_the_sums():
    x = torch.randn(64, 1200, generator=torch.Generator().manual_seed(1))
    sums = Accumulator(1200, hessian=True)
    for part in x.split(32):
        sums.add(part, hold_back=False)
    (found,) = sums.finish().hessian
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found, (x.double().T @ x.double()).numpy() / 64, atol=1e-5)
