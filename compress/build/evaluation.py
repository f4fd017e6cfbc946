"""``packlight eval``: tasks of lm-evaluation-harness on artifacts and on the float model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.build.decide import EvalSettings
from compress.build.pipeline import make_report
from compress.build.verification import adopt_all
from compress.console import Console
from compress.errors import ArtifactError, PacklightError, RuntimeMissingError, UsageError
from compress.files import check_place, check_unchanged, scratch_folder
from compress.harness.compare import Compared, alone, compare, judge, parse_gate
from compress.harness.tasks import Figure, Harness, TaskOptions
from compress.machine import bounded
from compress.plan.job import Job, choose_threads, window_length
from compress.plan.shapes import Artifact
from compress.recipe import Recipe
from compress.report.pages import render
from compress.report.report import GateReport, HarnessFacts, HarnessFigure, Report
from compress.verify import Outcome

__all__ = ["evaluate"]

CONTEXT = 4096  # most positions that prompts and answers take, unless --context is given


def evaluate(settings: EvalSettings, console: Console) -> Report:
    """Run the tasks on the float model and on every artifact, each in its runtime.

    Returns:
        The report, also written to ``settings.output``; of several artifacts, some may have failed
        to run.

    Raises:
        UsageError: see ``Harness``; or no such artifact, gate or context.
        PacklightError: the float model or the only artifact cannot be run.
    """
    with bounded(settings.threads, settings.max_memory), scratch_folder() as scratch:
        console.begin("read headers")
        if settings.ci_files:
            settings.ci_files.check(settings.output)
        if settings.output:
            check_place("--output", settings.output, folder=True)
        recipe = Recipe.verification({}).model_copy(update={"name": "eval"})
        job, artifacts = adopt_all(settings.artifacts, settings, recipe, console)
        length = context_of(job, settings.context)
        console.begin("load the tasks")
        options = TaskOptions(
            settings.num_fewshot,
            settings.limit,
            settings.apply_chat_template,
            settings.confirm_run_unsafe_code,
        )
        harness = Harness(settings.tasks, options, scratch)
        metrics = harness.metrics()
        limits = [parse_gate(gate, metrics) for gate in settings.gates]
        if settings.apply_chat_template and not job.checkpoint.tokenizer.has_chat_template:
            raise UsageError("--apply-chat-template: the tokenizer has no chat template")
        asked = Evaluation(job, harness, length, settings, scratch, console)
        theirs = asked.of_float()
        outcomes = [asked.of_artifact(each, theirs, only=len(artifacts) == 1) for each in artifacts]
        check_unchanged(job.checkpoint.opened)
        report = asked.report(artifacts, outcomes, theirs)
        for entry, outcome in zip(report.artifacts, outcomes, strict=True):
            if not isinstance(outcome, PacklightError):
                entry.gates = [GateReport(**asdict(gate)) for gate in judge(limits, outcome)]
        bad = any(found.failure for found in report.artifacts)
        bad |= any(not gate.passed for found in report.artifacts for gate in found.gates)
        report.verdict = "failed" if bad else "passed"
        if settings.output:
            settings.output.mkdir(parents=True, exist_ok=True)
            report.save(settings.output / "report.json")
            (settings.output / "report.html").write_text(render(report), encoding="utf-8")
        if settings.ci_files:
            settings.ci_files.write(report)
        return report


def context_of(job: Job, wanted: int | None) -> int:
    """Positions that prompts and answers may take, in every artifact and in the float model.

    Raises:
        UsageError: more are wanted than one of them holds.
    """
    most = window_length(job.config, job.plans, job.config.max_context)
    if wanted is not None and wanted > most:
        raise UsageError(f"--context {wanted}: the models hold {most} positions")
    return wanted or min(most, CONTEXT)


class Evaluation:
    """One set of tasks, run on one model after another.

    Attributes:
        runtimes: of the artifacts that were run, by path.
        notes: lines for the report.
    """

    def __init__(
        self,
        job: Job,
        harness: Harness,
        length: int,
        settings: EvalSettings,
        scratch: Path,
        console: Console,
    ) -> None:
        self._job, self._harness, self._length = job, harness, length
        self._settings, self._scratch, self._console = settings, scratch, console
        self._threads = choose_threads(settings.threads, job.config)
        self._float_runtime = ""
        self.runtimes: dict[Path, str] = {}
        self.notes: list[str] = []

    def of_float(self) -> list[Figure]:
        """The float model's figures."""
        from compress.checkpoint.checkpoint import Stored
        from compress.harness.models import FloatModel

        stored = Stored(self._job.checkpoint, self._job.config)
        model = FloatModel(stored, self._threads, self._console)
        self._float_runtime = model.runtime
        return self._run(model, notes=True)

    def of_artifact(
        self, artifact: Artifact, theirs: Sequence[Figure], *, only: bool
    ) -> list[Compared] | PacklightError:
        """An artifact's figures beside the float model's, or why it could not be run.

        Args:
            artifact: to run.
            theirs: the float model's figures.
            only: raise the error instead.
        """
        from compress.harness.models import ArtifactModel

        job = self._job
        model = ArtifactModel(
            artifact,
            job.config.vocab_size,
            job.checkpoint.path,
            self._scratch,
            self._threads,
            self._console,
        )
        try:
            found = self._run(model)
        except (ArtifactError, RuntimeMissingError) as error:
            if only:
                raise
            return error
        self.runtimes[artifact.path] = model.runtime
        return compare(found, theirs)

    def _run(self, model: Any, *, notes: bool = False) -> list[Figure]:
        from compress.harness.language_model import RuntimeLM

        checkpoint = self._job.checkpoint
        ends = checkpoint.generation_config.get("eos_token_id")
        lm = RuntimeLM(
            model,
            checkpoint.tokenizer,
            self._length,
            ends if isinstance(ends, list) else [] if ends is None else [ends],
        )
        found = self._harness.run(lm)
        if notes and lm.truncated:
            self.notes.append(
                f"The beginning of {lm.truncated:,} prompts was cut off: more than {self._length} "
                "tokens."
            )
        return found

    def report(
        self,
        artifacts: Sequence[Artifact],
        outcomes: Sequence[list[Compared] | PacklightError],
        theirs: Sequence[Figure],
    ) -> Report:
        """The report, without gates."""
        settings, failures = self._settings, list[Outcome]()
        for outcome in outcomes:
            failures.append(outcome if isinstance(outcome, PacklightError) else None)
        folders = [artifact.path.resolve().parent for artifact in artifacts]
        folder = Path(os.path.commonpath(folders)) if folders else Path.cwd()
        report = make_report(self._job, artifacts, failures, None, (), folder, None)
        report.baseline.runtime, report.baseline.text = self._float_runtime, ""
        report.notes += self.notes
        report.harness = HarnessFacts(
            version=self._harness.version,
            tasks=list(settings.tasks),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
            context=self._length,
            figures=[describe(each) for each in alone(theirs)],
        )
        for entry, artifact, outcome in zip(report.artifacts, artifacts, outcomes, strict=True):
            if not isinstance(outcome, PacklightError):
                entry.runtime = self.runtimes[artifact.path]
                entry.harness = [describe(each) for each in outcome]
        return report


def describe(each: Compared) -> HarnessFigure:
    """The report's form of one metric."""
    figure, baseline, difference = each.figure, each.baseline, each.difference
    return HarnessFigure(
        task=figure.task,
        metric=figure.metric,
        filter=figure.filter,
        items=each.items,
        num_fewshot=figure.shots,
        version=figure.version,
        higher_is_better=figure.higher_is_better,
        group=figure.top,
        value=each.value.value,
        value_se=each.value.se,
        baseline=baseline and baseline.value,
        baseline_se=baseline and baseline.se,
        difference=difference and difference.value,
        difference_se=difference and difference.se,
    )
