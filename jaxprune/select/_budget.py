"""Budgets: as much score as a cost allows."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxprune.core._checks import finite, number
from jaxprune.core._groups import Groups
from jaxprune.core._limits import Each
from jaxprune.core._types import Array
from jaxprune.costing import Cost
from jaxprune.select import provable
from jaxprune.select._bisection import ends
from jaxprune.select._knapsack import solve_exactly
from jaxprune.select._queue import Queue, State, queues

Method = Literal["lamp", "greedy", "global", "uniform", "sampling", "exact"]

# How much a group may lose where nobody says: more only where the budget asks for it.
FLOORS = (0.8, 0.9, 0.95, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Selection(Mapping[str, np.ndarray]):
    """A decision, as a mapping group name -> bool ``[size]``, and what it costs.

    Attributes:
        keep: group name -> bool ``[size]``, True = kept.
        budget: the cost asked for.
        cost: the cost reached, at most the budget.
        one_more: the cost if the unit (or block) that would come back next were kept
            too: above the budget. None if nothing is gone.
        full: the cost of the whole program.
        score: sum of the scores kept.
        bound: no decision within the budget keeps more score than this, if known.
    """

    keep: Mapping[str, np.ndarray]
    budget: float
    cost: float
    one_more: float | None
    full: float
    score: float
    bound: float | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        return self.keep[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keep)

    def __len__(self) -> int:
        return len(self.keep)

    @property
    def sizes(self) -> dict[str, int]:
        """How many units of every group stay."""
        return {name: int(units.sum()) for name, units in self.keep.items()}

    def __str__(self) -> str:
        more = "nothing is gone"
        if self.one_more is not None:
            more = f"one unit more {self.one_more:.6g}"
        return (
            f"asked {self.budget:.6g}, reached {self.cost:.6g} of {self.full:.6g} "
            f"({self.cost / self.full:.1%}), {more}"
        )


def to_budget(
    groups: Groups,
    scores: Mapping[str, Array],
    cost: Cost,
    *,
    budget: float,
    method: Method = "lamp",
    min_keep: Each[int] = 1,
    multiple_of: Each[int] = 1,
    max_sparsity: Each[float] | None = None,
    only: str | Sequence[str] | None = None,
    time_limit: float = 60.0,
) -> Selection:
    """Removes units until a cost is within a budget, keeping as much score as it can.

    Within a group the lowest scores go first; the methods differ in how groups compete.

    * "lamp": the unit that has the least share in what stays of its group goes next:
      its squared score, divided by the sum of all squares that leave no earlier. Shares
      compare across groups whatever their scores measure, so no group is emptied
      because its numbers are small. Negative scores count as 0.
    * "greedy": the block with the least score per cost that it saves goes next. What a
      block saves is computed anew after every step, in the layers that make the group
      and in those that read it. At the end what still fits comes back, the highest
      score first, until nothing does.
    * "global": the lowest score goes next, whatever it saves; for scores that compare
      across groups.
    * "uniform": every group keeps the same fraction.
    * "sampling": for sensitivities (`scores.empirical_sensitivity`): every group keeps
      the units that sampling with one error for all groups is expected to meet (see
      `provable.allocate`), the most sensitive ones.
    * "exact": the most score that the budget allows, as a mixed-integer programme.
      Every allowed width of a group is a binary variable, and a product of sizes is
      linearised exactly, so the optimum is one for the true, coupled cost. Solved by
      HiGHS; for up to some hundred widths in all, so raise `multiple_of` first.

    The defaults were chosen by what they leave of the accuracy of five nets with three
    scores (``experiments/budget``, 5 seeds, untrained after cuts to 60 % and 35 % of
    the multiply-adds): "lamp" 0.58 on average and 0.27 in the worst of 15 cases,
    "uniform" 0.56 and 0.23, "global" 0.51 and 0.10, "greedy", which cuts some groups to
    nearly nothing, 0.49 and 0.11. Scores computed anew in four rounds keep 0.63 and
    0.29 (``prune(rounds=4)``): nothing is gained with L2, 0.10 with Taylor scores.

    The budget is never exceeded, and is met to one unit: what the method would keep
    next is more than it allows (`Selection.one_more`).

    Args:
        groups: what `trace` returned.
        scores: group name -> float ``[size]``, larger matters more (`group_scores`);
            concrete.
        cost: what is to be spent: ``cost_model(...).multiply_adds`` and the like.
        budget: the highest cost allowed, in the unit of the cost
            (``0.5 * cost.full``).
        method: see above.
        min_keep: how many units every group keeps at least; 1 or more. This and the
            next two may also be given by name or pattern, ``{"conv*": 8}``.
        multiple_of: kept counts are multiples; a group that loses nothing may keep any
            count.
        max_sparsity: no group loses more than this fraction. None for 0.8, or where
            the budget needs more, the least of 0.9, 0.95 and 1.
        only: names, labels or patterns of the groups to prune; None for all.
        time_limit: seconds after which "exact" returns the best it has found.

    Returns:
        The decision, a mapping group name -> bool ``[size]``, True = kept, for the
        selected groups, which also reports the cost asked for and reached.

    Raises:
        ValueError: if the limits do not allow the budget, the cost is of other groups,
            a pattern matches no group, or scores are missing, NaN or
            infinite.
        TypeError: if scores are traced.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, jaxprune
        >>> def mlp(params, x):
        ...     x = jax.nn.relu(x @ params["a"])
        ...     return jax.nn.relu(x @ params["b"]) @ params["c"]
        >>> shapes = {"a": (4, 8), "b": (8, 8), "c": (8, 2)}
        >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 4)))
        >>> model = jaxprune.cost_model(mlp, params, jnp.ones((1, 4)), groups=groups)
        >>> scores = {name: np.arange(8.0) for name in groups}
        >>> keep = to_budget(groups, scores, model.multiply_adds, budget=60)
        >>> print(keep, keep.sizes)
        asked 60, reached 55 of 112 (49.1%), one unit more 62 {'a:1': 5, 'b:1': 5}

    References:
        Aflalo et al., `Knapsack Pruning with Inner Distillation
        <https://arxiv.org/abs/2002.08258>`_, 2020 ("greedy", "exact");
        Liebenwein et al., `Provable Filter Pruning
        <https://arxiv.org/abs/1911.07412>`_, 2020 ("sampling");
        Lee et al., `Layer-adaptive sparsity for the Magnitude-based Pruning
        <https://arxiv.org/abs/2010.07611>`_, 2021 ("lamp", there of weights)
    """
    if method not in _METHODS and method != "exact":
        raise ValueError(
            f"method must be one of {[*_METHODS, 'exact']}, got {method!r}"
        )
    _check_cost(cost)
    budget = finite("budget", budget)
    if math.isnan(number("time_limit", time_limit)) or time_limit <= 0:
        raise ValueError(f"time_limit must be above 0 seconds, got {time_limit}")
    caps: list[Each[float]] = [*FLOORS] if max_sparsity is None else [max_sparsity]
    found, least = {}, {}
    for cap in caps:
        found = queues(groups, scores, cost, only, min_keep, multiple_of, cap)
        least = {name: int(q.widths[-1]) for name, q in found.items()}
        if cost.value(least) <= budget:
            break
    else:
        raise ValueError(
            f"budget={budget:g} cannot be met: with as few units as the limits allow "
            f"the cost is {cost.value(least):g} of {cost.full:g} "
            f"({cost.value(least) / cost.full:.1%})" + _if_fraction(budget, cost)
        )
    state = State(found, cost)
    if method == "exact":
        after = _exact(state, budget, time_limit)
    else:
        after = _METHODS[method](state, budget)
    keep = {name: q.keep(state.sizes[name]) for name, q in found.items()}
    score = sum(float(q.scores[keep[name]].sum()) for name, q in found.items())
    reached, more = state.value(), None
    if after.next is not None:
        state.gone[after.next] -= 1
        more = state.value()
    return Selection(keep, budget, reached, more, cost.full, score, after.bound)


def _check_cost(cost: object) -> None:
    """Raises if it is no function of sizes."""
    if isinstance(cost, Cost):
        return
    named = [n for n, v in getattr(cost, "__dict__", {}).items() if isinstance(v, Cost)]
    several = f", which holds several: give one of them, {', '.join(named)}"
    raise TypeError(
        "cost must be a cost as a function of group sizes, such as "
        f"cost_model(...).flops; got a {type(cost).__name__}{several if named else ''}"
    )


def _if_fraction(budget: float, cost: Cost) -> str:
    if not 0 < budget <= 1:
        return ""
    return f"; for that fraction of the whole give budget={budget:g} * cost.full"


class _After(NamedTuple):
    """What a method says of its decision.

    Attributes:
        next: number of the group of which one more block would be kept next.
        bound: no decision keeps more score than this, if known.
    """

    next: int | None = None
    bound: float | None = None


# --- greedy --------------------------------------------------------------------------


def _greedy(state: State, budget: float) -> _After:
    spent = float(state.value())
    while spent > budget * (1 + 1e-9) or state.value() > budget:
        saved, loss = state.changes(1), state.next_losses()
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.where(saved > 0, loss / saved, np.inf)
        # What saves nothing goes last: a step of a measured cost may lie beyond it.
        best = price.argmin() if np.isfinite(price).any() else loss.argmin()
        state.gone[best] += 1
        spent -= saved[best]
    return _fill(state, budget)


def _fill(state: State, budget: float) -> _After:
    """Takes back what fits, the highest score first, until nothing does."""
    spent = state.value()
    while state.gone.any():
        back = np.where(state.gone > 0, -state.changes(-1), np.inf)
        fits = spent + back <= budget
        if not fits.any():
            return _After(int(back.argmin()))
        best = np.where(fits, state.last_losses(), -np.inf).argmax()
        state.gone[best] -= 1
        spent = state.value()
        if spent > budget:  # by rounding alone: `changes` is a float
            state.gone[best] += 1
            return _After(int(best))
    return _After()


# --- global and uniform --------------------------------------------------------------


def _places(state: State, rating: Callable[[Queue], np.ndarray]) -> list[np.ndarray]:
    """Where every block of every queue stands in one order of all, by their rating."""
    each = list(state.queues.values())
    best = np.concatenate([rating(q) for q in each] or [np.zeros(0)])
    # Equal scores leave in proportion: next is the group that will have lost least.
    lost = np.concatenate([1 - q.widths[1:] / len(q.order) for q in each] or [best])
    places = np.empty(len(best), int)
    places[np.lexsort((lost, best))] = np.arange(len(best))
    return np.split(places, np.cumsum([len(q.best) for q in each])[:-1])


def _global(state: State, budget: float) -> _After:
    return _ranked(state, budget, lambda q: q.best)


def _lamp(state: State, budget: float) -> _After:
    return _ranked(state, budget, _shares)


def _shares(q: Queue) -> np.ndarray:
    """The score of every block's best unit squared, as a share of what stays then."""
    sizes = q.scores[q.order].clip(min=0)
    largest = max(sizes.max(), np.finfo(float).tiny)
    left = np.cumsum(np.square(sizes / largest)[::-1])[::-1]
    best = np.square(q.best.clip(min=0) / largest)
    last = len(q.order) - q.widths[1:] - 1  # the place of every block's last unit
    stays = np.maximum(left[last], best)
    shares = best / np.where(stays > 0, stays, 1.0)
    return np.maximum.accumulate(shares) if len(shares) else shares


def _ranked(
    state: State, budget: float, rating: Callable[[Queue], np.ndarray]
) -> _After:
    places = _places(state, rating)
    low, high = 0, sum(len(own) for own in places)
    while low < high:  # the fewest blocks that must go
        middle = (low + high) // 2
        state.gone[:] = [int((own < middle).sum()) for own in places]
        low, high = (low, middle) if state.value() <= budget else (middle + 1, high)
    state.gone[:] = [int((own < low).sum()) for own in places]
    return _After(next((k for k, own in enumerate(places) if low - 1 in own), None))


def _sampling(state: State, budget: float) -> _After:
    def widths(level: float) -> dict[str, int]:
        found = {}
        for name, q in state.queues.items():
            # What is gone already scores below 0, and no draw brings it back.
            wanted = provable.width(q.scores.clip(min=0), 10.0**level)
            fits = q.widths[q.widths >= wanted]
            found[name] = int(fits.min()) if fits.size else int(q.widths[0])
        return found

    return _set(state, *ends(widths, state.cost, budget, *provable.LEVELS))


def _set(state: State, sizes: Mapping[str, int], wider: Mapping[str, int]) -> _After:
    """Goes to these widths."""
    state.gone[:] = [
        int(np.flatnonzero(q.widths == sizes[name])[0])
        for name, q in state.queues.items()
    ]
    waiting = (k for k, name in enumerate(sizes) if sizes[name] < wider[name])
    return _After(next(waiting, None))


def _uniform(state: State, budget: float) -> _After:
    def widths(share: float) -> dict[str, int]:
        return {
            name: int(q.widths[np.abs(q.widths - share * len(q.order)).argmin()])
            for name, q in state.queues.items()
        }

    return _set(state, *ends(widths, state.cost, budget, 0.0, 1.0))


# --- exact ---------------------------------------------------------------------------


def _exact(state: State, budget: float, time_limit: float) -> _After:
    kept = {
        name: q.scores.sum() - np.concatenate([[0.0], np.cumsum(q.losses)])
        for name, q in state.queues.items()
    }
    widths = {name: q.widths for name, q in state.queues.items()}
    gone, bound = solve_exactly(widths, kept, state.cost, budget, time_limit)
    if gone is None:  # no time to find any: the greedy one, with the bound
        return _greedy(state, budget)._replace(bound=bound)
    state.gone[:] = gone
    return _fill(state, budget)._replace(bound=bound)


_METHODS: Mapping[str, Callable[[State, float], _After]] = {
    "lamp": _lamp,
    "greedy": _greedy,
    "global": _global,
    "uniform": _uniform,
    "sampling": _sampling,
}
