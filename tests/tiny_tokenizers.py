"""Small but real tokenizers for the tiny checkpoints: SentencePiece with byte fallback, and
byte-level BPE with the pre-tokenizer patterns of the published models, trained on TEXT.
"""

from __future__ import annotations

import functools
import io
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

TEXT = """\
A model that runs where the people are must be small. Weights are numbers, and most of them can be
told in four bits without anybody noticing; the art is in finding the few that can not. The train
from Lyon to Zürich leaves at 07:45, costs 129.50 francs and arrives after 5 hours, 13 minutes.

def quantize(weight, bits=4, group_size=32):
    \"\"\"Round every group of a row to the nearest of 2 ** bits levels.\"\"\"
    levels = 2 ** bits - 1
    low, high = weight.min(), weight.max()
    scale = (high - low) / levels or 1.0
    codes = [round((value - low) / scale) for value in weight]
    return codes, scale, low

for index, name in enumerate(["alpha", "beta", "gamma"]):
    if index % 2 == 0 and name != "":
        print(f"{index}: {name!r}")

It isn't enough to say that it works; they've measured it, we'll measure it again, and you'd better
write down what you've seen. "Why?" she asked. "Because what isn't measured isn't known," he said.
Les modèles sont petits, la forêt est grande, où êtes-vous allés cet été? Die Gewichte sind Zahlen,
und größere Zahlen brauchen größere Wörter. Привет, мир! こんにちは世界。 你好世界。 🙂🚀

| format | bits | size (GB) | top-1 |
|--------|-----:|----------:|------:|
| Q4_K_M | 4.85 |     2.397 | 96.1% |
| Q8_0   | 8.50 |     4.061 | 99.4% |

The river goes down to the sea, the sea goes up to the sky, and the sky comes down as rain on the
river. The small model reads the large book, the large book holds the small word, and the word was
written when the model was small. Numbers: 0 1 2 3 4 5 6 7 8 9 10 100 1000 2026 3.14159 -17 +42.
"""

PHI3_TOKENS = (
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>",
    "<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
)  # fmt: skip
PHI3_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] "
    "+ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] "
    "+ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# Patterns of the published tokenizers (their tokenizer.json, field pre_tokenizer).
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
MAJOR = int(version("transformers").split(".")[0])
LLAMA_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}


def save_tokenizer(
    family: str, folder: Path, *, text: str = TEXT, pieces: int = 0
) -> dict[str, Any]:
    """Write the family's tokenizer files; returns the token ids that its config.json carries.

    Args:
        text: what it is trained on.
        pieces: vocabulary before the family's added tokens, or as many as the text gives
            (byte-level) if that is fewer; 0 for what the tiny checkpoints have.
    """
    name = "phi3-longrope" if family == "phi3-longrope" else family.split("-")[0]
    name = "phi4" if family == "phi4-mini" else name
    if name not in KINDS:  # a dense family: its graph is compared, not its tokenizer
        name = "qwen2"
    files, ids = _tokenizer(name, text, pieces)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return dict(ids)


@functools.cache
def _tokenizer(name: str, text: str, pieces: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of a tokenizer, trained once per process."""
    build = _sentencepiece if name in SENTENCEPIECE else _byte_level
    with tempfile.TemporaryDirectory() as scratch:
        ids = build(name, Path(scratch), text, pieces)
        return {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}, ids


KINDS = (
    "llama", "mistral", "phi3", "phi3-longrope", "mobilellm", "qwen2", "qwen3", "llama3", "phi",
    "phi4",
)  # fmt: skip
SENTENCEPIECE = ("llama", "mistral", "phi3", "phi3-longrope", "mobilellm")


@functools.cache
def _pieces(text: str, vocabulary: int) -> bytes:
    """A SentencePiece BPE model with byte fallback, as Llama 2's."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _sentencepiece(name: str, folder: Path, text: str, pieces: int) -> dict[str, Any]:
    from tokenizers import AddedToken
    from transformers import LlamaTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

    phi3 = name.startswith("phi3")
    model = folder / "tokenizer.model"
    # phi3: 480 + 11 tokens, 21 padding rows
    model.write_bytes(_pieces(text, pieces or (480 if phi3 else 512)))
    if name == "mobilellm":  # published with the slow tokenizer's files only
        if MAJOR == 4:
            LlamaTokenizer(str(model), legacy=True).save_pretrained(folder)
        else:
            keys = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
            keys |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(keys))
        return LLAMA_IDS
    keys: dict[str, Any] = {
        "legacy": False,
        "add_bos_token": name != "phi3-longrope",  # Phi-3-mini adds it, Phi-3.5 does not
        "chat_template": PHI3_CHAT if phi3 else LLAMA2_CHAT,
        **({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"} if phi3 else {}),
    }
    # legacy=True writes the "Prepend ▁" normalizer that the published tokenizer.json files have.
    if MAJOR == 4:
        converted = LlamaTokenizerFast(vocab_file=str(model), legacy=True, add_prefix_space=True)
        converted.backend_tokenizer.save(str(folder / "tokenizer.json"))
        file = str(folder / "tokenizer.json")
        tokenizer = LlamaTokenizerFast(tokenizer_file=file, vocab_file=str(model), **keys)
    else:  # its LlamaTokenizer has no normalizer
        converted = PreTrainedTokenizerFast.from_pretrained(str(folder), legacy=True)
        keys = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | keys
        core = converted.backend_tokenizer
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **keys)
    ids: dict[str, Any] = dict(LLAMA_IDS)
    if phi3:
        tokenizer.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
        added = [
            AddedToken(token, rstrip=token != "<|endoftext|>", normalized=False)
            for token in PHI3_TOKENS
        ]
        tokenizer.add_tokens(added, special_tokens=True)
        end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|assistant|>", "<|end|>"])
        ids |= {"eos_token_id": end, "pad_token_id": end, "stops": stops}
    tokenizer.save_pretrained(folder)
    return ids


def _byte_level(name: str, folder: Path, text: str, pieces: int) -> dict[str, Any]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as pre
    from transformers import (
        CodeGenTokenizerFast,
        GPT2TokenizerFast,
        PreTrainedTokenizerFast,
        Qwen2TokenizerFast,
    )

    end = "<|endoftext|>"
    # name → class, pattern (None: GPT-2's own), special tokens, the keys of tokenizer_config
    chatml = ([end, "<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>", "pad_token": end})
    rows: dict[str, tuple[Any, str | None, list[str], dict[str, Any]]] = {
        "qwen2": (Qwen2TokenizerFast, QWEN2_PATTERN, *chatml),
        "qwen3": (Qwen2TokenizerFast, QWEN2_PATTERN, *chatml),
        "llama3": (
            PreTrainedTokenizerFast,
            LLAMA3_PATTERN,
            ["<|begin_of_text|>", "<|end_of_text|>", *LLAMA3_HEADERS, "<|eot_id|>"],
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ),
        "phi": (CodeGenTokenizerFast, None, [end], {}),
        "phi4": (
            GPT2TokenizerFast,
            O200K_PATTERN,
            [end, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
            {"pad_token": end},
        ),
    }
    kind, pattern, special, keys = rows[name]
    if MAJOR > 4:  # where the classes take no tokenizer_object
        kind = PreTrainedTokenizerFast
    if name.startswith("phi"):
        keys |= {"bos_token": end, "eos_token": end, "unk_token": end}
    templates = {"llama3": LLAMA3_CHAT, "phi4": PHI4_CHAT, "phi": None}

    core = Tokenizer(models.BPE())
    if name.startswith("qwen"):
        core.normalizer = normalizers.NFC()
    split = pre.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre.Sequence([pre.Split(Regex(pattern), "isolated"), split])
    core.pre_tokenizer = split
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=pieces or 480,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    # One very long string would be split at once, which takes gigabytes.
    core.train_from_iterator([text[i : i + 2**16] for i in range(0, len(text), 2**16)], trainer)
    core.add_special_tokens(special)
    if name == "llama3":
        bos = special[0]
        core.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single=f"{bos} $A",
                    pair=f"{bos} $A {bos} $B",
                    special_tokens=[(bos, core.token_to_id(bos))],
                ),
            ]
        )
    tokenizer = kind(tokenizer_object=core, chat_template=templates.get(name, CHATML), **keys)
    tokenizer.save_pretrained(folder)
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id}
    ids |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if name == "phi4":
        ids["stops"] = tokenizer.convert_tokens_to_ids(["<|end|>", end])
    if name == "llama3":
        ids["stops"] = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    return ids
