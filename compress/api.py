"""The library API: the commands as functions that return their results.

Nothing is printed, unless a ``Console`` is given; warnings go to the logger ``packlight``. Failures
raise a ``PacklightError``, whose ``message`` is one line and whose ``hint`` says what would help.
Functions may run in several threads at a time, and leave no process-wide setting changed. Users
import them from ``packlight``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import exporters  # noqa: F401 -- fills the table of formats
from compress.console import Console
from compress.errors import UsageError
from compress.progress import Callback

if TYPE_CHECKING:
    from compress.plan.shapes import Plan
    from compress.recipe import Recipe
    from compress.report.report import Report

__all__ = ["Progress", "build", "fit", "inspect", "plan", "verify"]

PathLike = str | Path
Adapters = PathLike | Sequence[PathLike] | Mapping[PathLike, float]
Progress = Callable[[str, int, int, str], object]
"""``progress(phase, done, total, unit)``: ``done`` of ``total`` bytes, tokens, windows … (``unit``)
of a phase; both are 0 when it begins. An exception that it raises ends the work without leaving
half-written files."""


def build(
    model: PathLike,
    recipe: str | Path | Recipe = "phone-4bit",
    *,
    adapters: Adapters = (),
    formats: Sequence[str] = (),
    output: PathLike | None = None,
    overrides: Mapping[str, Any] | None = None,
    budget: str | int | None = None,
    budget_memory: str | int | None = None,
    device: str | None = None,
    prune: str | None = None,
    calibration: Sequence[PathLike] = (),
    imatrix: PathLike | None = None,
    save_imatrix: PathLike | None = None,
    save_checkpoint: PathLike | None = None,
    plan: PathLike | None = None,
    force: bool = False,
    locked: bool = False,
    provenance: bool = False,
    verify: bool = True,
    eval_text: PathLike | None = None,
    gates: Mapping[str, str] | None = None,
    against: PathLike | None = None,
    max_regression: Sequence[str] = (),
    keep_baseline: PathLike | None = None,
    context: int | None = None,
    hub_id: str | None = None,
    threads: int = 0,
    max_memory: str | int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    fetch: str = "auto",
    progress: Progress | None = None,
    console: Console | None = None,
) -> Report:
    """Write the artifacts of a recipe, run each in its runtime, and compare it with the float
    model.

    Args:
        model: a checkpoint's folder, a Hub id or a URL.
        recipe: a shipped name, a YAML file, or a ``Recipe``.
        adapters: PEFT LoRA adapters to merge into the model: a folder or Hub id, several, or a
            dict of them with their weights.
        formats: only these targets: ``gguf``, ``onnx``, ``coreml``; default: the recipe's.
        output: folder to make; default ``./MODEL-RECIPE``.
        overrides: keys of the recipe with other values: ``{"targets.gguf.type": "Q4_0"}``.
        budget: bytes of each target's file, or a size: ``1.8GiB``; grids are then chosen by
            measurement.
        budget_memory: the same for memory: file, KV cache at ``context``, activations.
        device: the memory budget that one app has on it, e.g. ``iphone-14``.
        prune: ``depth:3``, ``ffn:10%``, ``heads:2`` …; see docs/pruning.md.
        calibration: texts or JSONL for solvers that need calibration; default: the recipe's.
        imatrix: importance of inputs from this file instead of texts.
        save_imatrix: write the importance to this file.
        save_checkpoint: write the pruned model to this folder, too.
        plan: grids as in an earlier build's ``plan.json``.
        force: build palettes without calibration, which are refused otherwise.
        locked: refuse unless versions, checkpoint and recipe are those of the plan.
        provenance: hash every file of the checkpoint, however large.
        verify: run the artifacts; False: write only.
        eval_text: UTF-8 text to score on; default: a built-in held-out text.
        gates: metric → limit, over the recipe's: ``{"kl_divergence": "<=0.05"}``.
        against: an earlier ``report.json`` to compare with, by gates.
        max_regression: allowed regressions from it: ``kl=5%``, ``bytes=10MB``.
        keep_baseline: folder for the float model's logits, for other builds of the same model.
        context: positions of the KV cache that memory sizes assume.
        hub_id: name of a local model on the Hub, for apps.
        threads: CPU threads; 0: what the process may use.
        max_memory: memory limit of this process: bytes, or a size.
        overwrite: replace an output that packlight made.
        resume: continue this build where it was interrupted, and keep its state if it is again.
        revision, token, cache_dir: for a Hub id.
        fetch: the weights of a Hub id or URL: ``download`` them; ``streaming``: read them from
            the server in ranges; ``auto``: download where the disk has twice their size.
        progress: is called during the work; see ``Progress``.
        console: prints progress and messages as the command line does, instead.

    Returns:
        The report, also written as ``report.json``. An artifact that could not be run
        (``failure``) or that failed a gate is an entry of it, not an error.

        Raises:
            PacklightError: the build failed; the output folder is not made or changed.

    Example:
        >>> import packlight, tempfile
        >>> from compress.demo import model_path  # the bundled checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = packlight.build(
        ...         model_path(), "int4-fast", formats=["gguf"], output=f"{folder}/out",
        ...         verify=False)
        >>> report["gguf"].type, report.verdict
        ('Q4_K_M', 'not verified')
    """
    from compress.build import pipeline
    from compress.build.arguments import build_settings

    settings = build_settings(
        model, recipe, adapters=adapters, formats=formats, output=output,
        overrides=overrides, budget=budget, budget_memory=budget_memory, device=device,
        prune=prune, calibration=calibration,
        imatrix=imatrix, save_imatrix=save_imatrix, save_checkpoint=save_checkpoint, plan=plan,
        force=force, locked=locked, provenance=provenance, verify=verify, eval_text=eval_text,
        gates=gates, against=against, max_regression=max_regression, keep_baseline=keep_baseline,
        context=context, hub_id=hub_id, threads=threads, max_memory=max_memory,
        overwrite=overwrite,
        resume=resume, revision=revision, token=token, cache_dir=cache_dir, fetch=fetch,
    )  # fmt: skip
    return pipeline.build(settings, quiet_console(progress, console)).report


def plan(
    model: PathLike,
    recipe: str | Path | Recipe = "phone-4bit",
    *,
    adapters: Adapters = (),
    formats: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    budget: str | int | None = None,
    budget_memory: str | int | None = None,
    device: str | None = None,
    prune: str | None = None,
    plan: PathLike | None = None,
    force: bool = False,
    context: int | None = None,
    threads: int = 0,
    max_memory: str | int | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    fetch: str = "auto",
    progress: Progress | None = None,
    console: Console | None = None,
) -> dict[str, Plan]:
    """Plan the grid and bytes of each tensor; nothing is written.

    No weights are read, unless a budget needs grids to be chosen by measurement.

    Args:
        model, recipe, adapters, formats, overrides, budget, budget_memory, device, prune, plan,
            force, context, …: as for ``build``.

    Returns:
        Format → Plan: ``entries`` (name, shape, grid and ``nbytes`` of each tensor),
        ``weights_bytes`` (of them all) and ``file_bytes`` (of the model files, exactly).

    Raises:
        PacklightError: the build is impossible.

    Example:
        >>> import packlight
        >>> from compress.demo import model_path
        >>> plans = packlight.plan(model_path(), "int4-fast", formats=["gguf"])
        >>> plans["gguf"].type_name, plans["gguf"].weights_bytes, plans["gguf"].entries[0].grid
        ('Q4_K_M', 3816448, 'Q4_K')
    """
    from compress.build import pipeline
    from compress.build.arguments import build_settings
    from compress.formats import get_format

    settings = build_settings(
        model, recipe, adapters=adapters, formats=formats, overrides=overrides, budget=budget,
        budget_memory=budget_memory, device=device, prune=prune, plan=plan, force=force,
        context=context, threads=threads, max_memory=max_memory, verify=False, dry_run=True,
        revision=revision, token=token, cache_dir=cache_dir, fetch=fetch,
    )  # fmt: skip
    decision, ready = pipeline.rehearse(settings, quiet_console(progress, console))
    job = ready.job if ready else decision.job
    found = {}
    for made in job.plans:
        nbytes = get_format(made.format).file_bytes(made, job.source)
        found[made.format] = replace(made, file_bytes=nbytes)
    return found


def verify(
    artifact: PathLike,
    baseline: PathLike,
    gates: Mapping[str, str] | None = None,
    *,
    adapters: Adapters = (),
    tasks: Sequence[PathLike] = (),
    eval_text: PathLike | None = None,
    against: PathLike | None = None,
    max_regression: Sequence[str] = (),
    windows: int = 0,
    sequence_length: int = 512,
    threads: int = 0,
    max_memory: str | int | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    fetch: str = "auto",
    progress: Progress | None = None,
    console: Console | None = None,
) -> Report:
    """Run an artifact, of any origin, in its runtime, and compare it with the float model.

    Args:
        artifact: a ``.gguf`` file, an ONNX folder, an ``.mlpackage``, or the folder of a build.
        baseline: the float checkpoint: a folder, a Hub id or a URL.
        gates: metric → limit: ``{"kl_divergence": "<=0.1"}``; default: it is only measured.
        adapters: merged into the baseline, as for ``build``.
        tasks: files of multiple-choice questions, one JSON object a line with ``question``,
            ``choices`` and ``answer`` (an index from 0).
        windows: of text to score; 0: 16, 8 or 4 by the model's size.
        sequence_length: tokens in a window.
        eval_text, against, max_regression, threads, max_memory, revision, token, cache_dir, fetch,
            progress, console: as for ``build``.

    Returns:
        The report. Writes nothing.

    Raises:
        PacklightError: there is no artifact, or it cannot be run; of several, one that cannot be
            run is an entry with its ``failure``.

    Example:
        >>> import packlight, tempfile
        >>> from compress.demo import model_path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = f"{folder}/out"
        ...     _ = packlight.build(
        ...         model_path(), "int4-fast", formats=["onnx"], output=out, verify=False)
        ...     report = packlight.verify(
        ...         out, model_path(), {"kl_divergence": "<=0.2"}, windows=2, sequence_length=64)
        >>> report.passed, report["onnx"].gates[0].name
        (True, 'kl_divergence')
    """
    from compress.build import verification
    from compress.build.arguments import adapter_texts, limits, path, paths, size
    from compress.build.decide import VerifySettings

    settings = VerifySettings(
        artifact=Path(artifact),
        baseline=str(baseline),
        adapters=adapter_texts(adapters),
        gates=limits(gates),
        tasks=paths(tasks),
        eval_text=path(eval_text),
        against=path(against),
        max_regression=tuple(max_regression),
        windows=windows,
        sequence_length=sequence_length,
        threads=threads,
        max_memory=size("max_memory", max_memory),
        hub={"revision": revision, "token": token, "cache_dir": cache_dir, "fetch": fetch},
    )
    return verification.verify(settings, quiet_console(progress, console))


def inspect(
    target: PathLike,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    fetch: str = "auto",
) -> list[dict[str, Any]]:
    """Describe artifacts or a checkpoint; reads no weights.

    Args:
        target: an artifact, the folder of a build, a checkpoint's folder, a Hub id or a URL.
        revision, token, cache_dir, fetch: as for ``build``; ``auto`` downloads no weights.

    Returns:
        One dict for each artifact, or one for the checkpoint: ``format`` (or ``checkpoint``),
        ``name``, ``architecture``, ``parameters`` (None where unknown), ``bytes``,
        ``bits_per_weight``, ``metadata`` (str → printable) and ``tensors`` (dicts of ``name``,
        ``shape``, ``grid`` and ``bytes``); see ``compress.formats`` for more of artifacts.

    Raises:
        PacklightError: it cannot be read.

    Example:
        >>> import packlight
        >>> from compress.demo import model_path
        >>> facts, = packlight.inspect(model_path())
        >>> facts["architecture"], facts["parameters"], facts["tensors"][0]["grid"]
        ('Phi3ForCausalLM', 6163712, 'BF16')
    """
    from compress.plan.facts import describe

    return describe(
        target, {"revision": revision, "token": token, "cache_dir": cache_dir, "fetch": fetch}
    )


def fit(
    target: PathLike,
    device: str | None = None,
    *,
    memory: str | int | None = None,
    context: int | None = None,
    recipe: str | Path | Recipe = "phone-4bit",
    adapters: Adapters = (),
    formats: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    fetch: str = "auto",
) -> list[dict[str, Any]]:
    """Compare weights, KV cache and activations with the memory of devices; nothing is run.

    Args:
        target: an artifact, the folder of a build, or a checkpoint (for the artifacts that
            ``recipe`` would make).
        device: one device, e.g. ``iphone-14``; default: all known devices.
        memory: bytes or a size (``3GiB``), instead of devices.
        context: positions of the KV cache; default 2048 or the model's limit.
        recipe, adapters, formats, overrides, revision, token, cache_dir, fetch: as for ``build``;
            ``auto`` downloads no weights.

    Returns:
        One dict for each artifact and device: ``artifact``, ``device``, ``context``,
        ``weights_bytes``, ``kv_cache_bytes``, ``activation_bytes``, ``total_bytes``,
        ``limit_bytes``, ``largest_context`` (positions that would fit), ``verdict`` (``fits``,
        ``too large`` …) and, for devices, ``tokens_per_second_bound`` (by memory bandwidth),
        ``tokens_per_second_realistic`` (from, to), ``limits_measured`` and ``limits_source``.

    Raises:
        PacklightError: no such device, or a target that cannot be read.

    Example:
        >>> import packlight
        >>> from compress.demo import model_path
        >>> row, = packlight.fit(model_path(), "iphone-14", formats=["gguf"])
        >>> row["artifact"], row["verdict"]
        ('gguf Q4_K_M', 'fits')
    """
    from compress.build.arguments import adapter_texts, settings_of, size
    from compress.plan.fit import fit_rows

    return fit_rows(
        target,
        device=device,
        memory=size("memory", memory),
        context=context,
        recipe=recipe,
        overrides=settings_of(overrides),
        formats=formats,
        hub={"revision": revision, "token": token, "cache_dir": cache_dir, "fetch": fetch},
        adapters=adapter_texts(adapters),
    )


def quiet_console(progress: Progress | None, console: Console | None) -> Console:
    """The given console, or one that prints nothing and calls ``progress``."""
    if console is not None and progress is not None:
        raise UsageError("progress and console exclude each other")
    return console or Console("silent", listener=Callback(progress) if progress else None)
