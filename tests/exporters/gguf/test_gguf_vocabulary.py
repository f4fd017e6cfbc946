"""Token settings in all files of a checkpoint: Hugging Face and llama.cpp tokenize alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from exported import Exported, Exports

from compress.decoder.tokenizer import Tokenizer, has_tokenizer
from compress.decoder.tokenizer_texts import texts_for
from compress.errors import CheckpointError, UnsupportedModelError
from compress.verify.agreement import Agreement, compare, encode_all
from exporters.gguf.runtime import open_runtime

Edit = Callable[[Path], None]
FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"


def change(folder: Path, name: str, edit: Callable[[Any], Any]) -> None:
    path = folder / name
    document = json.loads(path.read_text()) if path.exists() else {}
    edited = edit(document)
    path.write_text(json.dumps(document if edited is None else edited))


def settings(**keys: Any) -> Edit:
    return lambda folder: change(folder, "tokenizer_config.json", lambda c: c.update(keys))


def token(text: str, *places: str, **flags: Any) -> Edit:
    """A token of this text behind all others."""
    row = FLAGS | {"content": text, "special": False} | flags

    def edit(folder: Path) -> None:
        number = max(t["id"] for t in read(folder)["added_tokens"]) + 1
        if "tokenizer.json" in places:
            change(
                folder, "tokenizer.json", lambda t: t["added_tokens"].append(row | {"id": number})
            )
        if "added_tokens_decoder" in places:
            change(
                folder,
                "tokenizer_config.json",
                lambda c: c.setdefault("added_tokens_decoder", {}).update({str(number): row}),
            )
        if "added_tokens.json" in places:
            change(folder, "added_tokens.json", lambda t: t.update({text: number}))
            # Not read if the newer key exists.
            change(
                folder,
                "tokenizer_config.json",
                lambda c: c.pop("added_tokens_decoder", None) and None,
            )

    return edit


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer.json").read_text())


def without(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        if not has_tokenizer(folder):
            pytest.skip("this version of transformers saves tokenizer.json alone")

    return edit


def twice(folder: Path) -> None:
    change(
        folder,
        "tokenizer.json",
        lambda t: t["added_tokens"].append(
            t["added_tokens"][-1] | {"id": t["added_tokens"][-1]["id"] + 1}
        ),
    )


# name → family, what is changed; llama.cpp must tokenize every text as Hugging Face does.
SAME: dict[str, tuple[str, Edit]] = {
    "only in added_tokens_decoder": ("llama", token("<|im_end|>", "added_tokens_decoder")),
    "only in added_tokens.json": ("llama3", token("<|extra|>", "added_tokens.json")),
    "special only in the config": ("qwen2", token("<|x|>", "added_tokens_decoder", special=True)),
    "additional_special_tokens": ("qwen2", settings(additional_special_tokens=["<|tool|>"])),
    "eos that is new": ("llama", settings(eos_token="<|im_end|>")),
    "normalized": ("llama3", token("<norm>", "tokenizer.json", normalized=True)),
    "letters as a token": ("qwen2", token("river", "tokenizer.json")),
    "two rows of one text": ("qwen2", twice),
    "a space as a token": ("llama", token(" ", "tokenizer.json")),
    "no space in front": ("demo", settings(add_prefix_space=False)),
    "no BOS": ("demo", settings(add_bos_token=False)),
    "EOS behind": ("llama", settings(add_eos_token=True)),
    "legacy": ("mobilellm", settings(legacy=True)),
    "a class of its own name": ("llama3", settings(tokenizer_class="PreTrainedTokenizer")),
    "a class that nobody knows": ("llama3", settings(tokenizer_class="NobodysTokenizer")),
    "transformers 5's": (
        "qwen2",
        settings(tokenizer_class="TokenizersBackend", extra_special_tokens=["<|tool|>"]),
    ),
    "no class": ("qwen2", settings(tokenizer_class=None)),
    "no tokenizer_config.json": ("qwen2", without("tokenizer_config.json")),
    "no tokenizer.json": ("qwen2", without("tokenizer.json")),
    "no special_tokens_map.json": ("llama3", without("special_tokens_map.json")),
}

# Refused before any work: llama.cpp would abort.
REFUSED: dict[str, tuple[str, Edit, str]] = {
    "NUL": ("qwen2", token("a\0b", "tokenizer.json"), "cannot hold the token 'a\\x00b'"),
    "a byte": (
        "llama",
        lambda folder: change(
            folder, "tokenizer.json", lambda t: t["model"]["vocab"].pop("<0x80>") and None
        ),
        "has no token <0x80>",
    ),
}

# Not expressible in llama.cpp: the note and the comparison report it.
OTHERWISE: dict[str, tuple[str, Edit, str]] = {
    "lstrip": ("qwen2", token("<l>", "tokenizer.json", lstrip=True), "does not follow lstrip"),
    "rstrip": ("qwen2", token("<r>", "tokenizer.json", rstrip=True), "whitespace behind 1"),
    "all but one rstrip": (
        "demo",
        token("<|im_end|>", "added_tokens_decoder"),
        "whitespace behind 1 special token(s), such as '<|im_end|>'",
    ),
    "single_word": (
        "qwen2",
        token("<w>", "added_tokens_decoder", single_word=True),
        "does not follow single_word",
    ),
    "normalized": (
        "llama",
        token("<norm>", "tokenizer.json", normalized=True),
        "in the text as it is, this tokenizer in the normalized text",
    ),
    "punctuation": (
        "llama",
        lambda folder: change(
            folder,
            "tokenizer.json",
            lambda t: t.update(pre_tokenizer={"type": "Punctuation", "behavior": "Isolated"}),
        ),
        "splits texts (Punctuation) before it merges",
    ),
    "no bytes": (
        "llama",
        lambda folder: change(
            folder, "tokenizer.json", lambda t: t["model"].update(byte_fallback=False)
        ),
        "has no byte_fallback",
    ),
    "a space in front once": (
        "mobilellm",
        settings(legacy=False),
        "llama.cpp puts a space after each special token",
    ),
}


def made_of(exported: Exports, folder: Path, family: str, edit: Edit) -> tuple[Exported, Agreement]:
    """The file of a changed checkpoint, and the agreement of llama.cpp with Hugging Face."""
    more = {"vocab_size": 520} if family == "llama" else {}  # it has no row to spare
    shutil.copytree(exported.checkpoint(family, **more), folder)
    edit(folder)
    made = exported.write("gguf", folder, {"type": "Q8_0"}, folder=folder)
    tokenizer = Tokenizer(folder)
    texts = texts_for(tokenizer)
    runtime = open_runtime(made.path, context=32, threads=1)
    assert runtime.tokenize
    found = encode_all(runtime.tokenize, texts)
    runtime.close()
    return made, compare(texts, encode_all(tokenizer.encode, texts), found)


@pytest.mark.parametrize("case", list(SAME))
def test_one_vocabulary_for_everyone(exported: Exports, tmp_path: Path, case: str) -> None:
    made, agreement = made_of(exported, tmp_path / "m", *SAME[case])
    assert agreement.first is None
    assert agreement.texts > 35
    tokens = gguf.GGUFReader(made.path).fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == len(tokens) == made.config.vocab_size
    if case.startswith("only in"):
        assert {"<|im_end|>", "<|extra|>"} & set(tokens)


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_llama_cpp_would_abort_at_is_refused(
    exported: Exports, tmp_path: Path, case: str
) -> None:
    family, edit, told = REFUSED[case]
    with pytest.raises(UnsupportedModelError) as refusal:
        made_of(exported, tmp_path / "m", family, edit)
    assert told in refusal.value.message and "-f onnx" in refusal.value.hint


@pytest.mark.parametrize("case", list(OTHERWISE))
def test_what_llama_cpp_cannot_express_is_seen(
    exported: Exports, tmp_path: Path, case: str
) -> None:
    family, edit, note = OTHERWISE[case]
    made, agreement = made_of(exported, tmp_path / "m", family, edit)
    assert any(note in line for line in made.plan.notes)
    assert agreement.first is not None and 0 < agreement.share < 1


def templates_as_list(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": CHAT}]
    settings(chat_template=named)(folder)


def templates_as_object(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    settings(chat_template={"tool_use": "T", "default": CHAT})(folder)


def templates_as_files(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHAT)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")


def template_of_a_processor(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    change(folder, "chat_template.json", lambda c: {"chat_template": CHAT})


def template_that_is_none(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    settings(chat_template={"default": {"a": 1}})(folder)


PLACES = (templates_as_list, templates_as_object, templates_as_files, template_of_a_processor)


@pytest.mark.parametrize("place", PLACES)
def test_chat_templates_wherever_they_live(exported: Exports, tmp_path: Path, place: Edit) -> None:
    made, agreement = made_of(exported, tmp_path / "m", "qwen2", place)
    assert agreement.first is None
    fields = gguf.GGUFReader(made.path).fields
    assert fields["tokenizer.chat_template"].contents() == CHAT
    if place is not template_of_a_processor:
        assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]
        assert fields["tokenizer.chat_template.tool_use"].contents() == "T"
    message = [{"role": "user", "content": "Hi"}]
    assert Tokenizer(tmp_path / "m").render_chat(message) == "<|im_start|>Hi<|im_end|>\n"


def test_names_of_templates_that_llama_cpp_cannot_tell_apart(
    exported: Exports, tmp_path: Path
) -> None:
    def named(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        rows = {"default": CHAT, "a b": "1", "a_b": "2", "a.b": "3"}
        settings(chat_template=[{"name": n, "template": t} for n, t in rows.items()])(folder)

    made, _ = made_of(exported, tmp_path / "m", "qwen2", named)
    fields = gguf.GGUFReader(made.path).fields
    names = fields["tokenizer.chat_templates"].contents()
    assert [fields[f"tokenizer.chat_template.{name}"].contents() for name in names] == [*"123"]


def test_a_template_that_is_none_is_one_line(exported: Exports, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a template nor a list of named ones"):
        made_of(exported, tmp_path / "m", "qwen2", template_that_is_none)
