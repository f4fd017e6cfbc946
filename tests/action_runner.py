"""A small runner of composite GitHub actions: executes what action.yml uses, refuses the rest.

    Runner(folder, workspace, inputs, environment).run() -> Result

``run:`` steps are executed with ``bash --noprofile --norc -eo pipefail``, as GitHub does where a
step says ``shell: bash``, with the files that ``GITHUB_OUTPUT``, ``GITHUB_PATH`` and
``GITHUB_STEP_SUMMARY`` name.
``uses:`` steps are recorded with their resolved ``with``, and count as successful. Expressions
(``${{ … }}``) may have contexts, strings, ``==``, ``!=``, ``&&``, ``||``, ``!`` and the status
functions; anything else is an error of the test.
Reference: https://docs.github.com/actions/reference/workflows-and-actions/expressions
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}", re.DOTALL)
TOKEN = re.compile(r"('(?:[^']|'')*'|[A-Za-z_][\w.-]*(?:\(\))?|==|!=|&&|\|\||!|\(|\))")
STATUS = {"always()", "success()", "failure()", "cancelled()"}


@dataclass
class Step:
    """The result of a step: ``success``, ``failure`` or ``skipped``."""

    name: str
    outcome: str
    log: str = ""
    uses: str = ""
    given: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    steps: list[Step]
    outputs: dict[str, str]
    summary: str

    @property
    def outcomes(self) -> dict[str, str]:
        return {step.name: step.outcome for step in self.steps}

    @property
    def log(self) -> str:
        return "\n".join(f"--- {step.name}: {step.outcome}\n{step.log}" for step in self.steps)

    def step(self, name: str) -> Step:
        (found,) = [step for step in self.steps if step.name == name]
        return found


class Runner:
    """One use of an action.

    Args:
        folder: with ``action.yml``: ``github.action_path``.
        workspace: where steps run.
        inputs: the ``with:`` of the workflow.
        environment: of the runner.
    """

    def __init__(
        self, folder: Path, workspace: Path, inputs: dict[str, str], environment: dict[str, str]
    ) -> None:
        self.action: dict[str, Any] = yaml.safe_load((folder / "action.yml").read_text("utf-8"))
        declared = self.action["inputs"]
        assert set(inputs) <= set(declared), "inputs that the action does not have"
        needed = {name for name, spec in declared.items() if spec.get("required")}
        assert needed <= set(inputs), "inputs that the action needs"
        defaults = {name: spec.get("default", "") for name, spec in declared.items()}
        self.workspace = workspace
        self.temp = workspace / "_temp"
        self.temp.mkdir()
        self.environment = dict(environment)
        self.steps: list[Step] = []
        self.contexts: dict[str, str] = {
            **{f"inputs.{name}": value for name, value in (defaults | inputs).items()},
            "github.action_path": str(folder),
            "env.HF_TOKEN": environment.get("HF_TOKEN", ""),
            "runner.arch": "X64",
            "runner.os": "Linux",
            "runner.temp": str(self.temp),
        }
        self.ids = {step["id"] for step in self.action["runs"]["steps"] if "id" in step}

    def run(self) -> Result:
        summary = self.temp / "summary.md"
        summary.touch()
        for number, step in enumerate(self.action["runs"]["steps"]):
            self.steps.append(self.run_step(number, step, summary))
            for key, value in self.steps[-1].outputs.items():
                self.contexts[f"steps.{step.get('id')}.outputs.{key}"] = value
        outputs = {
            name: self.resolve(spec["value"]) for name, spec in self.action["outputs"].items()
        }
        return Result(self.steps, outputs, summary.read_text("utf-8"))

    def run_step(self, number: int, step: dict[str, Any], summary: Path) -> Step:
        name = step["name"]
        if not self.wanted(step.get("if", "success()")):
            return Step(name, "skipped")
        if "uses" in step:
            given = {key: self.resolve(str(value)) for key, value in step["with"].items()}
            return Step(name, "success", uses=step["uses"], given=given)
        assert step["shell"] == "bash"
        script = self.temp / f"{number}.sh"
        script.write_text(self.resolve(step["run"]), "utf-8")
        output, path = self.temp / f"{number}.output", self.temp / f"{number}.path"
        output.touch()
        path.touch()
        environment = {key: self.resolve(str(value)) for key, value in step.get("env", {}).items()}
        files = {"GITHUB_OUTPUT": output, "GITHUB_PATH": path, "GITHUB_STEP_SUMMARY": summary}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.workspace,
            env=self.environment | environment | {key: str(file) for key, file in files.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for folder in path.read_text("utf-8").splitlines():
            self.environment["PATH"] = f"{folder}{os.pathsep}{self.environment['PATH']}"
        outputs = dict(line.split("=", 1) for line in output.read_text("utf-8").splitlines())
        outcome = "failure" if done.returncode else "success"
        return Step(name, outcome, done.stdout, outputs=outputs)

    # --- expressions -------------------------------------------------------------------------

    def resolve(self, text: str) -> str:
        """Text with its expressions replaced."""
        return EXPRESSION.sub(lambda match: as_text(self.evaluate(match[1])), text)

    def wanted(self, condition: str) -> bool:
        """``if:``; without a status function, ``success() &&`` stands before it."""
        inner = EXPRESSION.fullmatch(condition.strip())
        expression = inner[1] if inner else condition
        value = bool(self.evaluate(expression))
        return value and (any(word in expression for word in STATUS) or self.status("success()"))

    def evaluate(self, expression: str) -> Any:
        tokens: list[str] = []
        rest = expression.strip()
        while rest:
            match = TOKEN.match(rest)
            assert match, f"cannot read {rest!r}"
            tokens.append(match[1])
            rest = rest[match.end() :].strip()
        value = self.either(tokens)
        assert not tokens, f"cannot read {expression!r}"
        return value

    def either(self, tokens: list[str]) -> Any:
        value = self.both(tokens)
        while tokens and tokens[0] == "||":
            tokens.pop(0)
            other = self.both(tokens)
            value = value or other
        return value

    def both(self, tokens: list[str]) -> Any:
        value = self.equal(tokens)
        while tokens and tokens[0] == "&&":
            tokens.pop(0)
            other = self.equal(tokens)
            value = value and other
        return value

    def equal(self, tokens: list[str]) -> Any:
        value = self.atom(tokens)
        while tokens and tokens[0] in ("==", "!="):
            wanted = tokens.pop(0) == "=="
            value = (value == self.atom(tokens)) == wanted
        return value

    def atom(self, tokens: list[str]) -> Any:
        token = tokens.pop(0)
        if token == "!":
            return not self.atom(tokens)
        if token == "(":
            value = self.either(tokens)
            assert tokens.pop(0) == ")"
            return value
        if token.startswith("'"):
            return token[1:-1].replace("''", "'")
        if token in STATUS:
            return self.status(token)
        if token.startswith("steps."):
            assert token.split(".")[1] in self.ids, token
            return self.contexts.get(token, "")  # a step that was skipped or failed early
        return self.contexts[token]

    def status(self, function: str) -> bool:
        failed = any(step.outcome == "failure" for step in self.steps)
        return {"always()": True, "success()": not failed, "failure()": failed}.get(function, False)


def as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
