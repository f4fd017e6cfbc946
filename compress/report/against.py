"""Regressions: limits on how much worse an artifact may be than in an earlier report.

A limit on a regression becomes a gate (``compress.verify.gates.Gate``) on each artifact, so that it
is evaluated, shown and counted like the recipe's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.console import Console, parse_bytes
from compress.errors import ArtifactError, UsageError, did_you_mean
from compress.report.report import ArtifactReport, GateReport, Report
from compress.report.words import short_size
from compress.verify.gates import COMPARE, METRICS, Gate, find

__all__ = ["DEFAULT", "Previous", "Regression", "parse_regressions"]

DEFAULT = "kl=5%,bytes=1%"

SHORT = {
    "kl": "kl_divergence",
    "top1": "top1_agreement",
    "memory": "peak_memory_bytes",
    "bpw": "bits_per_weight",
    "tokens/s": "decode_tokens_per_second",
    "prefill": "prefill_tokens_per_second",
    "load": "load_seconds",
}

MORE_IS_BETTER = {
    "top1_agreement",
    "tokenizer_agreement",
    "generation_consistent",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
}

# Metrics that do not depend on the machine or the text.
OF_THE_FILE = {"bytes", "weights_bytes", "bits_per_weight", "kv_cache_bytes_per_token"}

# Float perplexities of one model on one text differ by less than this, relative, on any machine.
SAME_TEXT = 1e-3


@dataclass(frozen=True)
class Regression:
    """A limit on how much worse a metric may be than before.

    Attributes:
        name: a key of ``gates.METRICS``.
        text: as given: ``5%``, ``0.002``, ``10MB``.
        amount: of the metric's unit, or a share of the value before.
        relative: which of the two.
    """

    name: str
    text: str
    amount: float
    relative: bool

    def gate(self, before: float, artifact: ArtifactReport) -> Gate:
        """Compare an artifact's figure with the value before; a missing figure fails."""
        slack = abs(before) * self.amount if self.relative else self.amount
        operator, sign = (">=", "-") if self.name in MORE_IS_BETTER else ("<=", "+")
        limit = before - slack if sign == "-" else before + slack
        value = find(artifact, self.name)
        passed = value is not None and bool(COMPARE[operator](value, limit))
        limit_text = (
            f"{operator}{self._show(limit)} ({self._show(before)} before, {sign}{self.text})"
        )
        return Gate(f"regression: {self.name}", limit_text, value, passed)

    def _show(self, value: float) -> str:
        if "per" not in self.name and "bytes" in self.name:
            return short_size(value)
        return f"{value:.4g}"


def parse_regressions(texts: Sequence[str]) -> list[Regression]:
    """``--max-regression``: comma-separated ``METRIC=AMOUNT``, each given once.

    Raises:
        UsageError: an unknown metric, or an invalid amount.
    """
    found: dict[str, Regression] = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        word, equals, amount = (piece.strip() for piece in part.partition("="))
        name = SHORT.get(word, word)
        if not equals or not amount:
            raise UsageError(
                f"--max-regression {part!r}: write METRIC=AMOUNT", hint=f"such as {DEFAULT}"
            )
        if name not in METRICS:
            raise UsageError(
                f"--max-regression {word}: unknown metric",
                hint=did_you_mean(word, (*SHORT, *METRICS), "known"),
            )
        if name in found:
            raise UsageError(f"--max-regression gives {name} twice")
        found[name] = Regression(name, amount, *parse_amount(name, amount))
    return list(found.values())


def parse_amount(name: str, text: str) -> tuple[float, bool]:
    """``5%`` → (0.05, True); ``0.002`` → (0.002, False); ``10MB`` → (1e7, False).

    Raises:
        UsageError: none of these, or below 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", text)
    if match:
        return float(match[1]) / (100 if match[2] else 1), bool(match[2])
    try:
        if "bytes" in name:
            return float(parse_bytes(text)), False
    except ValueError:
        pass
    hint = "a share such as 5%, or an amount such as 0.002"
    if "bytes" in name:
        hint = "a share such as 1%, or a size such as 10MB"
    raise UsageError(f"--max-regression {name}: {text!r} is not an amount", hint=hint)


class Previous:
    """An earlier ``report.json`` and the limits on regressions from it."""

    @classmethod
    def read(
        cls, path: Path | None, limits: Sequence[str], *, runs: bool = True
    ) -> Previous | None:
        """The report of ``--against`` with the limits of ``--max-regression``; None without.

        Args:
            path, limits: as given.
            runs: whether artifacts will be run.

        Raises:
            UsageError: limits without a report, or limits on more than bytes where nothing runs;
                see ``parse_regressions`` and ``Previous``.
        """
        if path is None:
            if limits:
                raise UsageError(
                    "--max-regression needs a report to compare with",
                    hint="--against report.json of the last release",
                )
            return None
        previous = cls(path, parse_regressions(limits or (DEFAULT,)))
        if previous.measures and not runs:
            raise UsageError(
                "--against asks for more than bytes, and --no-verify measures nothing",
                hint="--max-regression bytes=1%",
            )
        return previous

    def __init__(self, path: Path, limits: Sequence[Regression]) -> None:
        """Read the report.

        Raises:
            UsageError: missing, or not a report.
        """
        self.limits = limits
        self.name = path.name
        hint = "--against takes the report.json of an earlier build or of verify --json"
        try:
            self.report = Report.load(path)
        except ArtifactError as error:
            raise UsageError(error.message, hint=hint) from error

    @property
    def measures(self) -> bool:
        """Whether any limit is on a figure that is measured by running the artifact."""
        return any(limit.name not in OF_THE_FILE for limit in self.limits)

    def check_text(
        self, text: str, windows: Sequence[Sequence[int]], *, all_windows: bool = True
    ) -> Mapping[str, int]:
        """Check, before any work, that the same text will be scored.

        Args:
            text: what the report's ``baseline.text`` will be.
            windows: token ids; all but the first of each are scored.
            all_windows: whether all will be; else the first ones, until the verdict stands.

        Returns:
            The windows to score of each format, as many as then.

        Raises:
            UsageError: the report's figures are of another text, or of other windows of it.
        """
        baseline = self.report.baseline
        before = baseline.text, baseline.windows, baseline.tokens
        now = text, len(windows), sum(len(window) - 1 for window in windows)
        if not self.measures or before[1] is None:
            return {}
        fewer = any(artifact.windows for artifact in self.report.artifacts)
        same = before == now
        if fewer and not all_windows and before[1] <= now[1]:  # the first ones of the same
            same = before[0] == now[0] and before[2] == sum(
                len(w) - 1 for w in windows[: before[1]]
            )
        if same:
            return {a.format: a.windows or before[1] for a in self.report.artifacts}
        raise UsageError(
            f"{self.name} scored {before[1]} windows ({before[2]} tokens) of {before[0]}, "
            f"this would score {now[1]} windows ({now[2]} tokens) of {now[0]}",
            hint="--eval-text, --windows and --sequence-length (verify.windows and "
            "verify.sequence_length of a recipe) as then; or limits on bytes alone",
        )

    def apply(self, report: Report, console: Console) -> None:
        """Add the gates and notes to a new report, update its verdict, and print the notes.

        Raises:
            UsageError: see ``judge``.
        """
        judged, notes = self.judge(report)
        for artifact, gates in zip(report.artifacts, judged, strict=True):
            artifact.gates += [GateReport(**asdict(gate)) for gate in gates]
            if not all(gate.passed for gate in gates):
                report.verdict = "failed"
        report.notes += notes
        for note in notes:
            console.warning(note)

    def judge(self, report: Report) -> tuple[list[list[Gate]], list[str]]:
        """Gates for each artifact of a new report, in order, and notes on artifacts without a
        counterpart.

        Raises:
            UsageError: as ``check_text``, detected by the float model's perplexity.
        """
        notes = list(self._compare_models(report))
        judged = []
        for artifact in report.artifacts:
            label = f"{artifact.format} {artifact.type}"
            before = self._find(artifact, report)
            gates = []
            if before is None:
                notes.append(f"{self.name} has no {label}: nothing to compare it with")
            elif before.type != artifact.type:
                notes.append(f"{label} is compared with {before.type} in {self.name}")
            for limit in self.limits if before is not None else ():
                value = find(before, limit.name)
                if value is None:
                    notes.append(f"{self.name} has no {limit.name} of {label}: not compared")
                else:
                    gates.append(limit.gate(value, artifact))
            judged.append(gates)
        there = {artifact.format for artifact in report.artifacts}
        gone = [a for a in self.report.artifacts if a.format not in there]
        notes += [f"{self.name} has {a.format} {a.type}, this build has not" for a in gone]
        return judged, notes

    def _find(self, artifact: ArtifactReport, report: Report) -> ArtifactReport | None:
        """The earlier artifact of the same format and type, or the only one of the format."""

        def of_format(of: Report) -> list[ArtifactReport]:
            return [a for a in of.artifacts if a.format == artifact.format]

        before = of_format(self.report)
        alike = [old for old in before if old.type == artifact.type]
        alone = len(before) == len(of_format(report)) == 1
        return alike[0] if alike else before[0] if alone else None

    def _compare_models(self, report: Report) -> list[str]:
        """Notes where model or machine differ from the earlier report's.

        Raises:
            UsageError: the same model has another perplexity, so the text is another.
        """
        notes = []
        old, new = self.report, report
        same = old.model.whole_source == new.model.whole_source
        if not same:
            was = old.model.whole_source
            notes.append(f"{self.name} is of {was}, this is of {new.model.whole_source}")
        before, now = old.baseline.perplexity, new.baseline.perplexity
        moved = before and now and abs(now / before - 1) > SAME_TEXT
        comparable = old.baseline.windows == new.baseline.windows
        if moved and comparable and same and self.measures:
            raise UsageError(
                f"{self.name} has a perplexity of {before:.5g} for the float model, now it is "
                f"{now:.5g}: another text or another checkpoint of the same name",
                hint="compare reports of one text and one model",
            )
        timed = [x.name for x in self.limits if "second" in x.name or x.name.startswith("peak")]
        if timed and old.machine != new.machine:
            notes.append(f"{', '.join(timed)} of {self.name} were measured on another machine")
        return notes
