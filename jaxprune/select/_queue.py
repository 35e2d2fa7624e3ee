"""Queues: for every group, the blocks of units in the order in which they leave."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from jax.core import Tracer

from jaxprune.core._groups import Groups
from jaxprune.core._limits import Each, Limits, limits_of, selected
from jaxprune.core._types import Array
from jaxprune.costing import Cost
from jaxprune.select._ranking import best_up_to, leaving_order, unit_scores


@dataclasses.dataclass(frozen=True, eq=False)
class Queue:
    """The units of one group, lowest score first, in blocks.

    Attributes:
        scores: ``[size]``.
        order: ``[size]``, the units in the order in which they leave.
        widths: ``[1 + blocks]``, how many units stay when so many blocks are gone.
        losses: ``[blocks]``, the sum of the scores in each block.
        best: ``[blocks]``, the score of each block's best unit.
    """

    scores: np.ndarray
    order: np.ndarray
    widths: np.ndarray
    losses: np.ndarray
    best: np.ndarray

    def keep(self, width: int) -> np.ndarray:
        """The mask that leaves so many units."""
        kept = np.ones(len(self.order), bool)
        kept[self.order[: len(self.order) - width]] = False
        return kept


def queue(scores: np.ndarray, limits: Limits) -> Queue:
    """The queue of a group with these scores; of equal ones the last leaves first."""
    order = cast(np.ndarray, leaving_order(scores, limits.parts))
    widths = limits.widths(len(scores))
    ends = len(scores) - widths
    best = cast(np.ndarray, best_up_to(scores[order], ends[1:], limits.parts))
    losses = [scores[order[a:b]].sum() for a, b in itertools.pairwise(ends)]
    return Queue(scores, order, widths, np.array(losses), best)


def queues(
    groups: Groups,
    scores: Mapping[str, Array],
    cost: Cost,
    only: str | Sequence[str] | None,
    min_keep: Each[int],
    multiple_of: Each[int],
    max_sparsity: Each[float],
) -> dict[str, Queue]:
    """The queues of the selected groups, in order."""
    limits = limits_of(groups, min_keep, multiple_of, max_sparsity)
    found = {}
    for name in selected(groups, only):
        size = groups[name].size
        if cost.sizes.get(name) != size:
            raise ValueError(
                f"the cost knows {cost.sizes.get(name)} units of the group {name}, "
                f"which has {size}; were both made from the same trace?"
            )
        values = unit_scores(name, size, scores)
        if isinstance(values, Tracer):
            raise TypeError(
                f"scores[{name}] is traced, but a budget is met outside of jit"
            )
        found[name] = queue(cast(np.ndarray, values), limits[name])
    return found


class State:
    """How many blocks of every queue are gone, and what that costs."""

    def __init__(self, found: Mapping[str, Queue], cost: Cost) -> None:
        self.queues, self.cost = dict(found), cost
        names = list(cost.sizes)
        self.at = np.array([names.index(name) for name in found], int)
        self.gone = np.zeros(len(found), int)
        self.full = np.array(list(cost.sizes.values()))
        length = max((len(q.widths) for q in found.values()), default=0) + 1
        # Padded with -1: one gather gives the next or the last width of all groups.
        self.widths = np.full((len(found), length), -1)
        self.losses = np.full((len(found), length), np.inf)
        for k, q in enumerate(found.values()):
            self.widths[k, : len(q.widths)] = q.widths
            self.losses[k, : len(q.losses)] = q.losses

    @property
    def now(self) -> np.ndarray:
        """The width of every queue."""
        return self.widths[np.arange(len(self.gone)), self.gone]

    @property
    def sizes(self) -> dict[str, int]:
        """The width of every queue, by name."""
        return dict(zip(self.queues, self.now.tolist(), strict=True))

    def value(self) -> float:
        """The exact cost."""
        return self.cost.value(self.sizes)

    def next_losses(self) -> np.ndarray:
        """The score that leaves with the next block; inf where none may."""
        return self.losses[np.arange(len(self.gone)), self.gone]

    def last_losses(self) -> np.ndarray:
        """The score that comes back with the last block; -inf where none is gone."""
        rows = np.arange(len(self.gone))
        return np.where(self.gone > 0, self.losses[rows, self.gone - 1], -np.inf)

    def changes(self, blocks: int) -> np.ndarray:
        """What the cost falls by when each queue alone loses one block, or gains one.

        Args:
            blocks: 1 to lose one, -1 to gain one.
        """
        rows = np.arange(len(self.gone))
        target = np.clip(self.gone + blocks, 0, None)
        after = self.widths[rows, target]
        after = np.where(after < 0, self.now, after)
        sizes, steps = self.full.copy(), np.zeros_like(self.full)
        sizes[self.at], steps[self.at] = self.now, self.now - after
        return self.cost.savings(sizes, steps)[self.at]
