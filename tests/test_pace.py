"""The steps that a phase of writing is foretold to have, in the order and bytes of writers."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
import tiny

from compress import pace
from compress.calibration.propagation import PropagatedWeights
from compress.checkpoint.checkpoint import Checkpoint
from compress.machine import worker_threads
from compress.pace import expected_steps
from compress.plan.job import prepare
from compress.plan.shapes import Weights
from compress.recipe import load
from compress.solvers import get_solver
from exporters import SHIPYARD


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    checkpoint = Checkpoint.open(str(tiny.make("llama", tmp_path_factory.mktemp("pace") / "m")))
    return prepare(checkpoint, load("int4-fast", [], []), SHIPYARD.get_exporter)


def test_little_is_not_foreseen(job):
    plan = job.plans[0]
    assert expected_steps([plan], [Weights(job.source, get_solver("rtn"))], "rtn") == []


def test_steps_of_one_target_are_its_tensors_in_order(job, monkeypatch):
    monkeypatch.setattr(pace, "SMALLEST", 0)
    for plan in job.plans:
        steps = expected_steps([plan], [Weights(job.source, get_solver("rtn"))], "rtn")
        assert [step.units for step in steps] == [entry.nbytes for entry in plan.entries]
        assert all(step.cost > 0 for step in steps)


def test_targets_together_go_part_by_part(job, monkeypatch):
    monkeypatch.setattr(pace, "SMALLEST", 0)
    weights = [Weights(job.source, get_solver("rtn")) for _ in job.plans]
    steps = expected_steps(job.plans, weights, "rtn")
    assert sum(step.units for step in steps) == sum(plan.weights_bytes for plan in job.plans)
    formats = [step.kind.split()[0] for step in steps if step.kind != "float"]
    turns = 1 + sum(mine != other for mine, other in pairwise(formats))
    assert turns >= len(job.plans) * job.config.num_hidden_layers


def test_costs_are_those_of_the_solver(job, monkeypatch):
    monkeypatch.setattr(pace, "SMALLEST", 0)
    plan, rtn = job.plans[0], get_solver("rtn")

    def slow(weight, grid, name):
        until = time.process_time() + 0.05 * ("embed" in name)
        while time.process_time() < until:
            pass
        return rtn(weight, grid, name)

    steps = expected_steps([plan], [Weights(job.source, slow)], "rtn")
    embedding = next(i for i, entry in enumerate(plan.entries) if "embed" in entry.name)
    tried = min(np.prod(plan.entries[embedding].shape), pace.TRIED)
    cost = steps[embedding].cost * steps[embedding].units
    assert cost >= 0.05 / worker_threads() * np.prod(plan.entries[embedding].shape) / tried


def test_blocks_that_are_solved_at_once_are_paid_for_at_their_first_matrix(job, monkeypatch):
    monkeypatch.setattr(pace, "SMALLEST", 0)
    plan = job.plans[0]
    weights = PropagatedWeights(job.source, plan, "scale_search", [[1] * 16] * 4)
    steps = expected_steps([plan], [weights], "scale_search")
    paid = [plan.entries[i].name for i, step in enumerate(steps) if step.paid_first]
    assert len(paid) == job.config.num_hidden_layers
    assert all(name.endswith("q_proj.weight") for name in paid)


def test_what_a_build_that_was_cut_off_has_written_costs_nothing(job, monkeypatch, tmp_path):
    monkeypatch.setattr(pace, "SMALLEST", 0)
    plan, weights = job.plans[0], Weights(job.source, get_solver("rtn"))
    first = plan.entries[0]
    weights.ledger.add(first.target_name, tmp_path / "file", first.nbytes, weight=first.name)
    steps = expected_steps([plan], [weights], "rtn")
    assert [step.kind for step in steps if step.cost == 0] == ["written"]
    assert steps[0].units == first.nbytes
