"""Texts to compare tokenizers on, and the check of a tokenizer against the embedding's rows.

``texts_for`` returns the texts on which two forms of one tokenizer are compared: text of many
kinds, every added token, every chat template. They are in Unicode's composed form, the usual one:
llama.cpp does not normalize (the plan has a note where a tokenizer does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

from compress.decoder.config_json import short
from compress.decoder.tokenizer import Messages, Tokenizer
from compress.decoder.tokenizer_facts import Parsed, TokenizerFacts, parse
from compress.errors import CheckpointError

TEXTS = (
    "Hello world",
    " leading space",
    "trailing space ",
    "two  spaces   three    four",
    " ",
    "line\nbreak\n\n\ntwo more\n",
    "windows\r\nline\r\n",
    "\ttab\tbed\n\t\tindented\n    four spaces",
    "def f(x):\n    return x ** 2  # squared\n",
    "if (a[0] != b->c) { return !d && e::f; }",
    "SELECT * FROM t WHERE id=42; -- comment",
    '<div class="a">text</div>\n\n<!-- no -->',
    "0 12 345 6789 1234567890 3.14159 1,000,000",
    "2026-11-30T14:05:09Z +49 (30) 1234-567 v1.2.3",
    "It's they've we'll I'D YOU'RE 'twas don’t",
    "CamelCase snake_case kebab-case SHOUTING mIxEd",
    "https://example.org/a?b=c&d=%20#e me@example.org",
    "a<b>c</b> <not|special> <0x41> [INST] <<SYS>>",
    "$x^2 + \\frac{1}{2} = \\sqrt{y}$ ± 5 % §3 ©",
    "naïve café, größere Wörter, ÅNGSTRÖM",
    "Привет, мир! Ελληνικά κείμενα.",
    "你好世界。こんにちは、カタカナ。안녕하세요 세계",
    "مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "🙂🚀 emoji 👩‍👩‍👧 family 🇨🇭",
    "\u00a0no-break\u2003em\u200bzero",
    "x" * 70 + " " * 70 + "y",
    '!!!??... ---___*** "quoted" (brackets) [x] {y}',
    "a\n \n  \n b",
    "word1word 2nd 10km x86_64 1st2nd",
)
"""About thirty texts of many kinds."""

FEW = 256  # up to this many added tokens each gets a text of its own

CHATS: tuple[Messages, ...] = (
    (
        {"role": "user", "content": "What is 2 + 2?\n\n  Explain."},
        {"role": "assistant", "content": "4, because it isn't 5."},
        {"role": "user", "content": " Sure? "},
    ),
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ),
)


def texts_for(tokenizer: Tokenizer) -> list[str]:
    """``TEXTS``, each added token alone and inside text, and the rendered chat templates.

    Tokens without a row of the embedding are left out: the model cannot use them.
    """
    texts = list(TEXTS)
    found = sorted(tokenizer.hf.get_added_vocab().items(), key=lambda item: item[1])
    added = [text for text, index in found if tokenizer.rows is None or index < tokenizer.rows]
    size = 1 if len(added) <= FEW else 32  # fewer texts: llama.cpp searches each for every token
    for start in range(0, len(added), size):
        some = added[start : start + size]
        inside = (f"a {text} b{text}c\n{text}\nd{text}{text} Hi" for text in some)
        texts += [*some, " ".join(inside)]
    return list(dict.fromkeys([*texts, *rendered_chats(tokenizer)]))


def rendered_chats(tokenizer: Tokenizer) -> list[str]:
    """``CHATS`` rendered by every template that accepts them: some refuse a system prompt, others
    need tools."""
    found = []
    for template, chat in product(tokenizer.chat_templates.values(), CHATS):
        try:
            found.append(tokenizer.render_chat(chat, template=template))
        except CheckpointError:
            continue
    return found


def check_rows(
    facts: TokenizerFacts, load: Callable[[], Tokenizer], rows: int, ends: Sequence[int]
) -> list[str]:
    """Check that every id of a tokenizer that texts need has a row of the embedding.

    Args:
        load: loads the tokenizer; called only where there are ids beyond the embedding.
        rows: of the embedding.
        ends: ids that end generation, by the model's config.

    Returns:
        A note where there are ids beyond the embedding, none of which is needed.

    Raises:
        CheckpointError: an end, a chat template or ordinary text needs one of them.
    """
    parsed = parse(facts.text)
    beyond = {index: text for text, index in parsed.ids.items() if index >= rows}
    if not beyond:
        return []
    first = min(beyond)
    count = f"{len(beyond)} token" + ("s" if len(beyond) > 1 else "")
    found = (
        f"the tokenizer has {count} beyond the {rows} rows of the embedding, "
        f"first {short(beyond[first])} ({first})"
    )
    for what, ids in needed(facts, parsed, load(), beyond, ends):
        if missing := [index for index in ids if index in beyond]:
            raise CheckpointError(
                f"{found}; {what} needs {short(beyond[missing[0]])} ({missing[0]})",
                hint="model.resize_token_embeddings(len(tokenizer)) in transformers makes the rows",
            )
    return [f"{found}: these are left out"]


def needed(
    facts: TokenizerFacts,
    parsed: Parsed,
    tokenizer: Tokenizer,
    beyond: Mapping[int, str],
    ends: Sequence[int],
) -> Iterator[tuple[str, list[int]]]:
    """Yield each use of ids (end of generation, chat template, text) with the ids it needs."""

    def encoded(texts: Sequence[str]) -> list[int]:
        return [index for text in texts for index in tokenizer.encode_all(text, True)]

    templates = facts.chat_templates.values()
    written = [
        index
        for index, text in beyond.items()
        if index in parsed.added and any(text in template for template in templates)
    ]
    end = parsed.ids.get(facts.special.get("eos_token", ""))
    yield "the end of generation", [*ends, *([] if end is None else [end])]
    yield "the chat template", written
    yield "the chat template", encoded(rendered_chats(tokenizer))
    yield "ordinary text", encoded(TEXTS)
