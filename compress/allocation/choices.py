"""The choices of a target: tensors, and their candidate grids with bytes in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compress.decoder.config import FUSED, DecoderConfig, split_name, stored_block
from compress.errors import GridError
from compress.formats import Format
from compress.grids import get_grid
from compress.plan.shapes import Candidate, Plan

__all__ = ["Choice", "Rules", "choices_of"]


@dataclass(frozen=True)
class Rules:
    """The recipe's limits on the choices (``quantize``).

    Attributes:
        candidates: names of grids; empty: each format's default.
        keep: role (``lm_head``, ``down_proj``; a fused tensor counts for its parts) → its fewest
            bits.
    """

    candidates: tuple[str, ...] = ()
    keep: Mapping[str, int] = field(default_factory=dict)

    def floor(self, roles: Sequence[str]) -> int:
        """The fewest bits of a tensor with these roles; 0 without a limit."""
        return max((self.keep.get(role, 0) for role in roles), default=0)


@dataclass(frozen=True)
class Choice:
    """The choice of one tensor's grid.

    Attributes:
        names: entries of the plan that get the same grid: one, or the copies of a shared block.
        roles: unfused; a tied embedding is ``embed_tokens`` and ``lm_head``.
        shape: ``[rows, columns]`` of each.
        options: grids with the bytes of all entries together, smallest first.
        floor: fewest bits, from the recipe; options below it are left out.
    """

    names: tuple[str, ...]
    roles: tuple[str, ...]
    shape: tuple[int, int]
    options: tuple[Candidate, ...]
    floor: int = 0

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def tied(self) -> bool:
        """Whether it is an embedding that is also the head."""
        return self.roles == ("embed_tokens", "lm_head")


def choices_of(plan: Plan, config: DecoderConfig, exporter: Format, rules: Rules) -> list[Choice]:
    """The choices of a target, in the order of its file.

    Args:
        plan: of the target; its grids do not matter.
        config: the model.
        exporter: of the plan's format.
        rules: the recipe's. Candidates of other formats are ignored; where none is of this
            format, the format's defaults are used.

        Raises:
            GridError: the rules leave a tensor no option, or name a grid that no format has.
    """
    for name in rules.candidates:
        get_grid(name)
    known = set(exporter.GRIDS)
    wanted = tuple(name for name in rules.candidates if name in known)
    groups: dict[str, list[str]] = {}
    entries = {entry.name: entry for entry in plan.entries}
    for entry in plan.entries:
        if exporter.candidates(entry, plan.settings):
            groups.setdefault(stored_name(config, entry.name), []).append(entry.name)
    head = any(split_name(name)[1] == "lm_head" for name in groups)
    found = []
    for names in groups.values():
        first = entries[names[0]]
        roles = roles_of(first.name, tied=not head)
        floor = rules.floor(roles)
        options = tuple(
            Candidate(option.grid, option.nbytes * len(names))
            for option in exporter.candidates(first, plan.settings, wanted)
            if get_grid(option.grid).bits >= floor
        )
        if not options:
            raise GridError(
                f"{plan.format}: no grid is left for {first.name} "
                f"(rows of {first.shape[1]}, at least {floor} bits)",
                hint="quantize.candidates and quantize.keep say what is left",
            )
        shape = (first.shape[0], first.shape[1])
        found.append(Choice(tuple(names), roles, shape, options, floor))
    return found


def stored_name(config: DecoderConfig, name: str) -> str:
    """The weight's name in the first of the blocks that share it."""
    block, role, kind = split_name(name)
    return name if block is None else f"blocks.{stored_block(config, block)}.{role}.{kind}"


def roles_of(name: str, *, tied: bool) -> tuple[str, ...]:
    """The unfused roles of a tensor."""
    _, role, _ = split_name(name)
    if role == "embed_tokens" and tied:
        return ("embed_tokens", "lm_head")
    return FUSED.get(role, (role,))
