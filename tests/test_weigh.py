"""Pruning against lower bits within a budget: against exhaustive evaluation, and whole builds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from commands import packlight, refused
from torch.nn.functional import cosine_similarity

from compress.allocation import effort, ladder
from compress.allocation.budget import Target
from compress.allocation.ladder import Ladder, check_budget, settings_of
from compress.allocation.weigh import AtAGlance, Thorough, weigh, weighed_note
from compress.calibration.step import CalibrationStep, Importance
from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.sources import Source
from compress.console import Console
from compress.decoder.decoder import Decoder
from compress.decoder.footprint import activation_bytes
from compress.demo import model_path
from compress.plan.job import Job, prepare
from compress.pruning.depth import model_divergence
from compress.pruning.pruned import Narrower, Shallower
from compress.pruning.step import prune, pruning_divergence
from compress.recipe import Recipe, load
from compress.verify.baseline import log_softmax
from exporters import SHIPYARD

QUIET = Console("quiet", False)
GRIDS = "quantize.candidates=[int4-g32, int4-g128, int8-g32, Q3_K, Q8_0]"
SETTINGS = (
    GRIDS, "prune={method: auto}", "quantize.solver=rtn", "calibration.tokens=256",
    "calibration.sequence_length=32",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))


class Case:
    """A tiny model and a budget for one format, as the pipeline has them."""

    def __init__(self, model: Path, format: str, budget: int) -> None:
        self.checkpoint = Checkpoint.open(model)
        (model / "texts.txt").write_text(tiny.TEXT * 4, encoding="utf-8")
        texts = f"calibration.texts=[{model / 'texts.txt'}]"
        changes = (*SETTINGS, f"budget.weights={budget}", texts)
        self.recipe = load("phone-4bit", changes, [format])
        self.job = self.prepare()
        check_budget(self.job, SHIPYARD.get_exporter, self.prepare)
        self.calibration = CalibrationStep(self.job, Importance(), SHIPYARD, QUIET, 1)
        (plan,) = self.job.plans
        self.ladder = Ladder(self.job, plan, SHIPYARD.get_exporter, self.prepare)

    def prepare(
        self, choices: Mapping[str, Mapping[str, str]] | None = None, recipe: Recipe | None = None
    ) -> Job:
        wanted = recipe or self.recipe
        return prepare(self.checkpoint, wanted, SHIPYARD.get_exporter, choices=choices)

    def weigh(self) -> tuple[Job, list[Any]]:
        return weigh(self.calibration, SHIPYARD.get_exporter, self.prepare)

    def exhaustive(self) -> dict[str, float]:
        """Every rung that fits → its total."""
        found = {}
        rungs = [self.ladder.unpruned, *(rung for chain in self.ladder.chains() for rung in chain)]
        for rung in rungs:
            if rung.fits:
                scale = Thorough(self.calibration, SHIPYARD.get_exporter)
                found[rung.what] = scale.outcome(rung, scale.pruning(rung)).total
        return found


def sizes(model: Path, format: str) -> Target:
    """The unpruned target, for its smallest and largest bytes."""
    return Case(model, format, 1 << 40).ladder.unpruned.target


def loud_mlps(model: Path, idle: float = 0.0) -> None:
    """Make MLPs count, except a share of their channels, as in trained models."""
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    tensors = load_file(path)
    for name, values in tensors.items():
        if name.endswith("down_proj.weight"):
            values *= 8
            values[:, : int(idle * values.shape[1])] *= 1e-4
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("idle", "share", "prunes"), [(0.0, -0.1, True), (0.3, 0.05, True), (0.0, 0.95, False)]
)
def test_the_choice_is_that_of_exhaustive_evaluation(
    tmp_path: Path, idle: float, share: float, prunes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``share``: of the way from the smallest unpruned file to the largest."""
    monkeypatch.setattr(ladder, "SHARES", (0.1, 0.3, 0.5) if prunes else (0.45, 0.5))
    model = tiny.make("llama", tmp_path / "m")
    loud_mlps(model, idle)
    target = sizes(model, "onnx")
    low, high = target.smallest_bytes, target.largest_bytes
    budget = round(low + share * (high - low))
    case = Case(model, "onnx", budget)
    job, (budgeted,) = case.weigh()
    totals = case.exhaustive()
    best = min(totals, key=totals.__getitem__)
    chosen = [row for row in budgeted.weighed if row["outcome"] == "chosen"]
    assert [row["what"] for row in chosen] == [best]
    (plan,) = job.plans
    assert plan.expected_divergence == pytest.approx(totals[best], rel=1e-6)
    assert plan.file_bytes <= budget
    assert ("nothing" in totals) == (share > 0)
    assert bool(job.cuts) == (best != "nothing") == prunes
    for row in budgeted.weighed:  # what is told is what was found
        if "expected_kl_divergence" in row:
            assert row["expected_kl_divergence"] == pytest.approx(totals[row["what"]], rel=1e-3)
    if not prunes:
        skipped = [row for row in budgeted.weighed if row["outcome"].startswith("cannot win")]
        assert skipped  # and the chains behind them were never measured
        assert len(budgeted.weighed) < len(totals)


def test_where_every_tensor_has_its_largest_grid_nothing_is_tried(tmp_path: Path) -> None:
    model = tiny.make("llama", tmp_path / "m")
    case = Case(model, "onnx", 1 << 30)
    job, (budgeted,) = case.weigh()
    assert [row["what"] for row in budgeted.weighed] == ["nothing"]
    assert not job.cuts
    assert not list((tmp_path / "cache").glob("**/pruning/*"))
    assert "every tensor has its largest grid" in job.plans[0].notes[-1]


def test_divergence_is_that_of_the_whole_models(tmp_path: Path) -> None:
    model = tiny.make("phi", tmp_path / "m")
    case = Case(model, "onnx", 1 << 30)
    for chain in case.ladder.chains():
        rung = next(chain)
        pruned = prune(rung.job, QUIET, 1)
        assert pruned is not None
        windows = [list(range(3, 35)), list(range(40, 72))]
        source, other = rung.job.source, pruned.source
        found = []
        for logits, others in zip(
            Decoder(source.config, source.read).stream_logits(windows),
            Decoder(other.config, other.read).stream_logits(windows),
            strict=True,
        ):
            log_p, log_q = log_softmax(logits), log_softmax(others)
            found.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
        expected = float(np.concatenate(found).mean())
        assert model_divergence(source, other, windows) == pytest.approx(expected, rel=1e-4)
        measured = pruning_divergence(rung.job, QUIET, 1)
        assert measured > 0
        assert pruning_divergence(rung.job, QUIET, 1) == measured  # from the cache


@pytest.mark.parametrize("method", ["ffn", "depth"])
def test_a_large_model_is_weighed_without_being_pruned(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is seen of a shape is what the model without those channels or blocks says, its table
    is the whole model's, and nothing is pruned for it.
    """
    monkeypatch.setattr(effort, "LARGE", 0)
    model = tiny.make("llama", tmp_path / "m", num_hidden_layers=3)
    loud_mlps(model, idle=0.3)
    case = Case(model, "onnx", round(0.93 * sizes(model, "onnx").smallest_bytes))
    scale = AtAGlance(case.calibration, SHIPYARD.get_exporter)
    rungs = [rung for chain in case.ladder.chains() for rung in chain if rung.fits]
    rung = next(rung for rung in rungs if rung.job.cut and rung.job.cut.method == method)
    assert rung.job.cut is not None
    source, config = rung.job.source, rung.job.cut.config
    windows = case.calibration.windows()[:8]  # 256 tokens
    seen = scale.glance(rung)
    if method == "depth":
        other: Source = Shallower(source, config, seen.kept)
        walks = list(Decoder(source.config, source.read).walk(windows))
        turns = [
            np.mean([float(1 - cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs])
            for pairs in (zip(x, y, strict=True) for x, y in pairwise(walks))
        ]
        assert set(range(3)) - set(seen.kept) == {int(np.argmin(turns))}
    else:
        (statistics, _, _) = case.calibration.for_costs(source, 256)
        kept = {}
        for block in range(3):
            name = f"blocks.{block}.down_proj.weight"
            stats = statistics.for_weight(name)
            assert stats is not None
            carried = (source.read(name) ** 2).sum(axis=0) * stats.importance
            channels = np.sort(np.argsort(-carried)[: rung.job.cut.kept])
            kept[block] = {role: channels for role in ("gate_proj", "up_proj")}
        other = Narrower(source, config, None, kept, "")
        assert seen.kept == (0, 1, 2)
    assert seen.kl == pytest.approx(model_divergence(source, other, windows), rel=1e-5)
    outcome = scale.outcome(rung, seen.kl)
    assert outcome.total > seen.kl
    table = outcome.budgeted.table
    assert not table.missing(outcome.step.targets[0].wanted())
    first = seen.kept[0]
    measured = scale.table("onnx")
    for role in ("q_proj", "down_proj"):
        own, old = f"blocks.0.{role}.weight", f"blocks.{first}.{role}.weight"
        assert table.errors[own] == measured.errors[old]
        assert table.sensitivities[own] == measured.sensitivities[old]
    assert not list((tmp_path / "cache").glob("pruning/*/found.json"))
    job, (budgeted,) = case.weigh()
    assert job.cuts and job.plans[0].file_bytes <= budgeted.limit.nbytes


def test_chains_go_from_little_to_much(tmp_path: Path) -> None:
    case = Case(tiny.make("llama", tmp_path / "m", num_hidden_layers=5), "onnx", 1 << 30)
    (plan,) = case.job.plans
    ffn, depth = settings_of(case.job.config, plan)
    widths = [settings["width"] for settings in ffn]
    assert widths == sorted(set(widths), reverse=True)
    assert all(width % 32 == 0 and 256 <= width < 512 for width in widths)
    assert [settings["blocks"] for settings in depth] == [1, 2]


def test_what_a_file_may_have_at_most_counts_what_a_smaller_model_leaves_to_it(
    tmp_path: Path,
) -> None:
    """Memory that the cache and the activations of pruned shapes do not take; of all of them."""
    case = Case(tiny.make("llama", tmp_path / "m", num_hidden_layers=4), "gguf", 1 << 40)
    (plan,) = case.job.plans
    config, context = case.job.config, case.job.context
    cache = context * config.kv_cache_bytes_per_token(plan.kv_bytes_per_value)
    tight = sizes(tmp_path / "m", "gguf").smallest_bytes + 4096
    memory = tight + cache + activation_bytes(config, context)

    def at_most(method: str) -> dict[str, int]:
        changes = (*SETTINGS, f"prune={{method: {method}}}", f"budget.memory={memory}")
        case.recipe = load("phone-4bit", changes, ["gguf"])
        case.job = case.prepare()
        return check_budget(case.job, SHIPYARD.get_exporter, case.prepare)

    assert at_most("none") == {"gguf": tight}
    found = at_most("auto")
    ladder = Ladder(case.job, plan, SHIPYARD.get_exporter, case.prepare)
    limits = [rung.limit.nbytes for chain in ladder.chains() for rung in chain]
    assert found == {"gguf": max(limits)}
    assert max(limits) >= tight + cache // 2  # half of the blocks


def test_which_won_is_told() -> None:
    whole = {"what": "nothing", "outcome": "loses", "expected_kl_divergence": 0.2}
    pruned = {
        "what": "1 of 6 blocks", "outcome": "chosen", "pruning_kl_divergence": 0.03,
        "expected_kl_divergence": 0.1,
    }  # fmt: skip
    assert weighed_note([whole, pruned]) == (
        "Pruning won against lower bits alone: 1 of 6 blocks go, with an expected KL of 0.1000, "
        "0.0300 of it by pruning; unpruned, 0.2000 was expected"
    )
    told = weighed_note([{"what": "nothing", "outcome": "does not fit"}, pruned])
    assert told.startswith("Pruned because nothing else fits: 1 of 6 blocks go")
    told = weighed_note([whole | {"outcome": "chosen"}, pruned | {"outcome": "loses"}])
    assert told.endswith("expected KL of 0.2000; without 1 of 6 blocks 0.1000 was expected")


# --- the command ---------------------------------------------------------------------------------

FEW = (
    "--set", GRIDS, "--set", "quantize.solver=rtn", "--set", "calibration.tokens=512",
    "--set", "calibration.sequence_length=32",
)  # fmt: skip
DEMO = model_path()


def build(*options: object, model: Path = DEMO) -> Any:
    return packlight("build", model, *FEW, *options)


def test_a_target_below_its_floor_is_pruned_alone_and_its_plan_is_taken_back(
    tmp_path: Path,
) -> None:
    model = tiny.make("llama", tmp_path / "m")
    loud_mlps(model)
    budget = round(0.93 * sizes(model, "onnx").smallest_bytes)
    (tmp_path / "text.txt").write_text(tiny.TEXT * 4, encoding="utf-8")
    options = (
        "-f", "onnx", "-f", "gguf", "--eval-text", tmp_path / "text.txt",
        "--set", "verify={windows: 2, sequence_length: 32, gates: {}}",
        "--calibration", tmp_path / "text.txt",
    )  # fmt: skip
    run = partial(build, *options, model=model)
    done = run("--budget", budget, "--prune", "auto", "-o", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    by_format = {artifact["format"]: artifact for artifact in report["artifacts"]}
    for name, artifact in by_format.items():
        assert artifact["bytes"] == plan["targets"][name]["file_bytes"] <= budget
        assert math.isfinite(artifact["kl_divergence"]["mean"])  # it ran
    assert plan["targets"]["onnx"]["prune"]["method"] in ("ffn", "depth")
    told = " ".join(by_format["onnx"]["notes"])
    assert "Pruned because nothing else fits" in told
    for name, target in plan["targets"].items():
        assert ("prune" in target) == ("Pruned" in " ".join(by_format[name]["notes"])) or (
            "Pruning won" in " ".join(by_format[name]["notes"])
        )
    assert any(note.startswith("onnx: Pruned") for note in report["notes"])
    again = run("--plan", tmp_path / "a" / "plan.json", "-o", tmp_path / "b")
    assert again.returncode == 0, again.stderr
    written = [p for p in sorted((tmp_path / "a").rglob("*.*")) if p.is_file()]
    names = [p.relative_to(tmp_path / "a") for p in written if p.suffix not in (".html", ".md")]
    same = [name for name in names if "report" not in name.name and "recipe" not in name.name]
    taken = json.loads((tmp_path / "b" / "plan.json").read_text())
    assert taken["targets"] == plan["targets"]
    # Provenance tells the command, and this one is another.
    same = [name for name in same if name.name not in ("plan.json", "provenance.json")]
    assert {"model_q4.onnx", "model_q4.onnx_data"} <= {name.name for name in same}
    for name in same:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    told = refused(
        run("--plan", tmp_path / "a" / "plan.json", "--prune", "depth:1", "-o", tmp_path / "c")
    )
    assert ", and the recipe prunes too" in told


def test_refusals(tmp_path: Path) -> None:
    out = ("-o", tmp_path / "x")
    told = refused(build("-f", "onnx", "--budget", "3MB", *out))
    assert "no choice of grids fits in 3.00 MB" in told
    assert "--prune auto would make it fit" in told
    told = refused(build("-f", "onnx", "--budget", "1MB", *out))
    assert "prune auto" not in told
    told = refused(build("-f", "onnx", "--budget", "1MB", "--prune", "auto", *out))
    assert "onnx does not fit with half of its MLPs or blocks either" in told
    told = refused(build("-f", "onnx", "--prune", "auto", *out))
    assert "prune.method auto weighs pruning within a budget, and there is none" in told
    weighed = ("--set", "budget.weights=3MB", "--prune", "auto", "-f", "onnx", *out)
    assert "exclude each other" in refused(build(*weighed, "--sweep", "auto"))
    told = refused(build(*weighed, "--save-checkpoint", tmp_path / "saved"))
    assert "each target has its own shape" in told
    assert list(tmp_path.iterdir()) == []
