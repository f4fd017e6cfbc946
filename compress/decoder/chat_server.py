"""The process that renders chat templates; see ``compress.decoder.chat``. Imports jinja2 alone.

The environment is that of ``transformers.utils.chat_template_utils`` (jinja2's immutable sandbox,
``trim_blocks``, ``lstrip_blocks``, loop controls, ``raise_exception``, ``strftime_now``, ``tojson``
without HTML escapes, the tag ``generation``), but does not need the seconds to import that.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from datetime import datetime
from typing import Any

LONGEST_CHAT = 4_000_000  # characters of a rendered chat
CPU_SECONDS = 10  # for one chat
MEMORY = 1 << 30  # bytes of address space, the interpreter's included
DATE = datetime(2024, 7, 26)
"""The date that ``strftime_now`` returns instead of today, so that builds are reproducible: the
default of Llama 3.1's own template."""


def serve() -> None:
    """Read the template, then one chat per line; write ``[text, error]`` for each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this process
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, tokens, seconds = json.loads(sys.stdin.readline())
    template = None
    for line in sys.stdin:
        messages, add_generation_prompt = json.loads(line)
        allow_seconds(seconds)
        text, error = "", ""
        try:
            random.seed(0)  # for jinja2's filter `random`
            template = template or environment().from_string(source)
            text = template.render(
                messages=messages, tools=None, documents=None,
                add_generation_prompt=add_generation_prompt, **tokens,
            )  # fmt: skip
            text.encode()  # fails for a lone surrogate
            if len(text) > LONGEST_CHAT:
                text, error = "", f"one chat has {len(text):,} characters"
        except MemoryError:
            text, error = "", f"one chat takes more than {MEMORY >> 20} MiB"
        except RecursionError:
            error = "it is nested too deeply"
        except Exception as failure:  # a template may raise anything
            error = " ".join(str(failure).split())[:200] or type(failure).__name__
        print(json.dumps([text, error]), flush=True)


def allow_seconds(seconds: int) -> None:
    """Limit this process to ``CPU_SECONDS`` more seconds of CPU."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def environment() -> Any:
    """The jinja2 environment in which Hugging Face renders chat templates."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """``{% generation %}``, which marks assistant turns: rendered as its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None,
        separators: tuple[str, str] | None = None, sort_keys: bool = False,
    ) -> str:  # fmt: skip
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = DATE.strftime
    return made


if __name__ == "__main__":
    serve()
