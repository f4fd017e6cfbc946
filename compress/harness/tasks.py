"""Loads tasks of the harness and evaluates a model on them.

A task is a name that the harness knows (``mmlu``, ``arc_*``), a YAML file of its form, or a
``.jsonl`` file of multiple-choice questions as ``packlight verify --task`` takes it.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import (
    PacklightError,
    RuntimeMissingError,
    UsageError,
    did_you_mean,
    first_line,
)
from compress.verify.tasks import read_task

if TYPE_CHECKING:
    from compress.harness.language_model import RuntimeLM

SEEDS = {"random": 0, "numpy": 1234, "fewshot": 1234}  # the harness's own
HUB = "data sets are fetched from the Hub once; offline, only what is in its cache (HF_HOME)"


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run: one field for each option of ``packlight eval`` of the same name."""

    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False


@dataclass(frozen=True)
class Figure:
    """One metric of a task or group for one model.

    Attributes:
        task, metric, filter: its name in the harness; most tasks have the filter ``none``.
        value: as the harness computes it.
        parts: what it is computed from: one entry for a task, several for a group.
        higher_is_better: whether more is better.
        shots: worked examples in each prompt.
        version: of the task.
        top: whether its task was asked for by name, not as a part of a group.
    """

    task: str
    metric: str
    filter: str
    value: float
    parts: tuple[Part, ...]
    higher_is_better: bool
    shots: int
    version: str
    top: bool


@dataclass(frozen=True)
class Part:
    """Scores of one task's documents.

    Attributes:
        scores: by document.
        aggregate: scores → the metric.
        weight: in the group's mean.
    """

    scores: Mapping[int, Any] = field(repr=False)
    aggregate: Callable[[list[Any]], float]
    weight: float


class Harness:
    """The tasks of one evaluation, loaded once for all models."""

    def __init__(self, names: Sequence[str], options: TaskOptions, scratch: Path) -> None:
        """Load the tasks and their data sets.

        Args:
            names: see the module.
            options: for all of them.
            scratch: folder for data of ``.jsonl`` files, until the last ``run``.

        Raises:
            RuntimeMissingError: the harness is not installed.
            UsageError: an unknown task, one that executes code and was not confirmed, or a data set
                that cannot be loaded.
        """
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise RuntimeMissingError(
                f"lm-evaluation-harness is not installed: {first_line(error)}",
                hint="pip install 'packlight[eval]'",
            ) from error
        for name in ("lm_eval", "datasets", "evaluate"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.version = str(lm_eval.__version__)
        self._options = options
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        built_in = any(not Path(name).suffix for name in names)  # thousands of YAML files
        manager = TaskManager(include_defaults=built_in)
        specs = [spec for name in names for spec in specs_of(name, manager, scratch)]
        if not options.confirm_run_unsafe_code:
            refuse_code(specs, manager)
        with in_words("the tasks cannot be loaded"):
            self._loaded = manager.load(specs)
        self._tasks: dict[str, Any] = self._loaded["tasks"]
        self._groups: dict[str, Any] = self._loaded["groups"]
        inside = {name for group in self._groups.values() for name in group.child_names}
        self.top = [name for name in (*self._groups, *self._tasks) if name not in inside]
        for task in self._tasks.values():
            self._prepare(task)

    def _prepare(self, task: Any) -> None:
        """The number of worked examples and their seed, as the harness's command line sets them."""
        if getattr(task, "UNSAFE_CODE", False) and not self._options.confirm_run_unsafe_code:
            raise runs_code(task.task_name)
        default, wanted = task.get_config("num_fewshot"), self._options.num_fewshot
        if default is None or (wanted is not None and default != 0):
            task.set_config(key="num_fewshot", value=wanted or 0)

    def metrics(self) -> dict[str, list[str]]:
        """Task or group → the metrics that it has, before anything is run."""
        found = {name: sorted(task.aggregation()) for name, task in self._tasks.items()}
        for name, group in self._groups.items():
            found[name] = sorted(each.metric for each in group.aggregate_metric_list or ())
        return found

    def run(self, lm: RuntimeLM) -> list[Figure]:
        """Evaluate a model on all tasks.

        Raises:
            PacklightError: from the model, or of a task.
        """
        from lm_eval.evaluator import evaluate

        options = self._options
        for task in self._tasks.values():
            task.set_fewshot_seed(seed=SEEDS["fewshot"])
        with in_words("the tasks cannot be evaluated"):
            results = evaluate(
                lm,
                self._loaded,
                limit=options.limit,
                bootstrap_iters=0,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.apply_chat_template,
                confirm_run_unsafe_code=options.confirm_run_unsafe_code,
            )
        return list(self._figures(results))

    def _figures(self, results: Mapping[str, Any]) -> Iterator[Figure]:
        scores: dict[tuple[str, str, str], dict[int, Any]] = {}
        for name, samples in results["samples"].items():
            for sample in samples:
                for metric in sample["metrics"]:
                    key = name, metric, sample["filter"]
                    scores.setdefault(key, {})[sample["doc_id"]] = sample[metric]
        for name, row in results["results"].items():
            for key, value in row.items():
                metric, comma, filter_name = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                parts = tuple(self._parts(name, metric, filter_name, scores))
                if parts:
                    higher = results["higher_is_better"].get(name, {}).get(metric)
                    yield Figure(
                        task=name,
                        metric=metric,
                        filter=filter_name,
                        value=float(value),
                        parts=parts,
                        higher_is_better=higher is not False,
                        shots=results["n-shot"].get(name) or 0,
                        version=str(results["versions"].get(name)),
                        top=name in self.top,
                    )

    def _parts(
        self, name: str, metric: str, filter_name: str, scores: Mapping[Any, dict[int, Any]]
    ) -> Iterator[Part]:
        """A task's scores, or those of all tasks of a group with their weights in it."""
        group = self._groups.get(name)
        by_size = group is None or any(
            each.metric == metric and each.weight_by_size
            for each in group.aggregate_metric_list or ()
        )
        tasks = group.get_all_tasks() if group else [self._tasks[name]]
        for task in tasks:
            if found := scores.get((task.task_name, metric, filter_name)):
                weight = len(found) if by_size else 1
                yield Part(found, task.aggregation()[metric], weight)


def specs_of(name: str, manager: Any, scratch: Path) -> list[Any]:
    """What the harness loads for one entry of ``--tasks``.

    Raises:
        UsageError: there is no such task.
    """
    path = Path(name)
    if path.suffix == ".jsonl":
        return [local_task(path, scratch)]
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UsageError(f"{path} does not exist", hint="--tasks takes names and YAML files")
        return [str(path)]
    found: list[str] = manager.match_tasks([name])
    if not found:
        raise UsageError(
            f"the harness has no task {name!r}", hint=did_you_mean(name, manager.all_tasks, "known")
        )
    return found


def local_task(path: Path, scratch: Path) -> dict[str, Any]:
    """The harness's configuration of a ``.jsonl`` file of multiple-choice questions."""
    task = read_task(path)
    rows = [{"question": i.question, "choices": i.choices, "answer": i.answer} for i in task.items]
    data = scratch / f"{task.name}.json"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True}
               for name in ("acc", "acc_norm", "acc_bytes")]  # fmt: skip
    return {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": metrics,
    }


def refuse_code(specs: Sequence[Any], manager: Any) -> None:
    """Refuse tasks that execute generated code before their own code is loaded.

    Raises:
        UsageError: there is one.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    for spec in specs:
        if isinstance(spec, str):
            entry = manager.task_index.get(spec)
            path = Path(spec) if entry is None else entry.yaml_path
            if path and load_yaml(path, resolve_func=False, recursive=True).get("unsafe_code"):
                raise runs_code(spec)


def runs_code(name: str) -> UsageError:
    """The error for a task that executes what the model writes."""
    return UsageError(
        f"the task {name} executes code that the model writes",
        hint="--confirm-run-unsafe-code, in a container or a virtual machine",
    )


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """Turn exceptions of the harness and of ``datasets`` into a ``UsageError``."""
    try:
        yield
    except (PacklightError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"{what}: {first_line(error)}", hint=HUB) from error
