"""Chat templates in their limited process, compared with transformers' own rendering."""

from __future__ import annotations

import pytest
import tiny
from transformers import AutoTokenizer

from compress.decoder.chat import ChatTemplate
from compress.decoder.chat_server import DATE
from compress.errors import CheckpointError

LOOP = "{% for i in range(99999) %}"
MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b>.\n"},
    {"role": "user", "content": " Grüße, 世界 🙂 {{ x }}"},
    {"role": "assistant", "content": "Hello."},
]
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n  {{ m['role'] }}: {{ m.content | trim }}{% endfor %}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ eos_token }}{{ pad_token is defined }}{{ tools is none }}",
    "{% generation %}  {{ messages[0].content }}\n{% endgeneration %}|{{ add_generation_prompt }}",
    "{%- set x = namespace(n=0) -%}{%- for m in messages -%}{%- set x.n = x.n + 1 -%}{%- endfor -%}"
    "{{ x.n }}{{ messages[1:] | map(attribute='role') | join(',') }}",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.make("llama", tmp_path_factory.mktemp("chat") / "m"))


@pytest.mark.parametrize("prompt", [True, False])
def test_a_chat_is_what_transformers_renders(tokenizer, prompt):
    for template in [tokenizer.chat_template, *TEMPLATES]:
        ours = ChatTemplate(template, tokenizer.special_tokens_map)
        theirs = tokenizer.apply_chat_template(
            MESSAGES[1:], chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        assert ours.render(MESSAGES[1:], add_generation_prompt=prompt) == theirs


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 'x' * 10**10 }}", "MiB"),
        ("{% set n = namespace(x='xx') %}" + LOOP + "{% set n.x = n.x ~ n.x %}{% endfor %}", "MiB"),
        ("{{ 'x' * 5000000 }}", "5,000,000 characters"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ cycler.__init__.__globals__.os.popen('true') }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{% for %}", "failed"),
        ("{{ '\\ud800' }}", "surrogates"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nested"),
    ],
)
def test_a_hostile_template_is_one_line(template, why):
    chat = ChatTemplate(template, {})
    with pytest.raises(CheckpointError) as caught:
        chat.render(MESSAGES, add_generation_prompt=False)
    assert why in caught.value.message and len(caught.value.message) < 300


def test_a_template_that_runs_for_ever_is_ended():
    chat = ChatTemplate(LOOP + LOOP + LOOP + 3 * "{% endfor %}", {}, seconds=1)
    with pytest.raises(CheckpointError, match="CPU seconds"):
        chat.render(MESSAGES, add_generation_prompt=False)


def test_a_template_of_megabytes_is_refused():
    with pytest.raises(CheckpointError, match="1,000,001 characters"):
        ChatTemplate("x" * 1_000_001, {})


def test_the_date_is_not_todays():
    chat = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {})
    assert chat.render(MESSAGES, add_generation_prompt=True) == DATE.strftime("%d %b %Y")
