"""One target with a budget: its smallest and largest file, and the best mix of grids between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from compress.allocation.choices import Choice, Rules, choices_of
from compress.allocation.costs import CostTable, members
from compress.allocation.solver import Option, solve
from compress.formats import get_format
from compress.plan.job import Job
from compress.plan.shapes import Plan, PlanRequest

__all__ = ["Allocation", "Target"]

ROUNDS = 16  # of correcting the budget for the bytes of graph or header
GOOD = 0.05  # nats per token: a recommended size stays below this ...
MARGIN = 0.8  # ... and below this share of the recipe's gate


@dataclass(frozen=True)
class Allocation:
    """The grids chosen for one target.

    Attributes:
        plan: with its file's bytes and expected divergence.
        options: index of the chosen option of each choice.
    """

    plan: Plan
    options: tuple[int, ...]


class Target:
    """One target of a job and its choices.

    Attributes:
        plan: of the recipe without a budget.
        choices: in the order of the file.

    Args:
        rules: for the choices; None: the recipe's.
    """

    def __init__(self, job: Job, plan: Plan, rules: Rules | None = None) -> None:
        self.plan, self.source = plan, job.source
        self._format = get_format(plan.format)
        rules = rules or Rules(job.recipe.candidates, job.recipe.keep)
        self.choices = choices_of(plan, self.source.config, self._format, rules)

    def grids(self, options: Sequence[int]) -> dict[str, str]:
        """Entry name → grid."""
        return {
            name: choice.options[option].grid
            for choice, option in zip(self.choices, options, strict=True)
            for name in choice.names
        }

    def plan_of(self, options: Sequence[int]) -> Plan:
        """The plan with these options, its file's bytes predicted."""
        choices = self.grids(options)
        request = PlanRequest(self.plan.settings, self.plan.model_name, choices)
        plan = self._format.plan(self.source.config, request)
        return replace(plan, file_bytes=self._format.file_bytes(plan, self.source))

    @cached_property
    def smallest_bytes(self) -> int:
        """Bytes of the smallest file."""
        return self.plan_of([0] * len(self.choices)).file_bytes

    @cached_property
    def largest_bytes(self) -> int:
        """Bytes of the largest file."""
        return self.largest.plan.file_bytes

    @cached_property
    def overhead(self) -> int:
        """Bytes of the smallest file that are not of chosen tensors."""
        return self.smallest_bytes - sum(choice.options[0].nbytes for choice in self.choices)

    def wanted(self) -> Iterator[tuple[str, str]]:
        """Pairs of unfused name and grid that a cost table must have."""
        for choice in self.choices:
            for member in members(self.source.config, choice.name, tied=choice.tied):
                for option in choice.options:
                    yield member, option.grid

    def options(self, choice: Choice, table: CostTable) -> list[Option]:
        """Bytes and cost of each option of a choice."""
        return [
            Option(option.nbytes, table.cost(choice.name, option.grid, tied=choice.tied))
            for option in choice.options
        ]

    @property
    def largest(self) -> Allocation:
        """Every tensor on its largest grid, for a budget that the largest file fits."""
        options = tuple(len(choice.options) - 1 for choice in self.choices)
        return Allocation(self.plan_of(options), options)

    def allocate(self, budget: int, table: CostTable) -> Allocation:
        """The least cost in a file of ``budget`` bytes.

        Args:
            budget: at least ``smallest_bytes``.
            table: with all pairs of ``wanted``.
        """
        options = [self.options(choice, table) for choice in self.choices]
        room = budget - self.overhead
        smallest = sum(choice.options[0].nbytes for choice in self.choices)
        for attempt in range(ROUNDS):
            picked = solve(options, room)
            plan = self.plan_of(picked)
            if plan.file_bytes <= budget:
                break
            # Zero points add nodes to a graph, and large offsets take more bytes: some mixes have a
            # larger graph.
            room = max(room - (plan.file_bytes - budget) - (32 << attempt), smallest)
        cost = sum(choice[i].cost for choice, i in zip(options, picked, strict=True))
        return Allocation(replace(plan, expected_divergence=cost), tuple(picked))

    def recommended_bytes(self, table: CostTable, gates: Mapping[str, str]) -> int:
        """Bytes of the smallest file whose expected KL is within ``GOOD`` and, with a margin, the
        recipe's gate; of the largest file where none is.

        Args:
            table: as for ``allocate``.
            gates: the recipe's.
        """
        goal = GOOD
        if "kl_divergence" in gates:
            goal = min(goal, MARGIN * float(gates["kl_divergence"].lstrip("<= ")))
        options = [self.options(choice, table) for choice in self.choices]
        low, high = self.smallest_bytes - self.overhead, self.largest_bytes - self.overhead
        while high - low > max(4096, high // 500):
            middle = (low + high) // 2
            picked = solve(options, middle)
            cost = sum(choice[i].cost for choice, i in zip(options, picked, strict=True))
            low, high = (low, middle) if cost <= goal else (middle, high)
        return high + self.overhead
