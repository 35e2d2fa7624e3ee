"""Channel shuffle: reshape, transpose and reshape, which together permute one axis.

Seen one by one, the reshapes only allow cuts that leave a grid of groups x channels,
and a network of shuffles and splits ties its channels to each other until hardly one is
free. Seen as one, they move positions, and any position may go.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from jaxprune.coupling._registry import register_label
from jaxprune.coupling._types import Liveness, Narrowed, Step
from jaxprune.coupling.rules._factors import by_factors
from jaxprune.coupling.rules._pieces import narrow_take
from jaxprune.program._types import Atom, Equation
from jaxprune.program.primitives._moves import moved_order


class _Permute:
    """Stands in for the primitive that JAX does not have."""

    name = "permute"
    multiple_results = False

    def get_bind_params(self, params: dict[str, Any]) -> dict[str, Any]:
        return params

    def bind(
        self, x: jax.Array, *, axis: int, sizes: tuple[int, ...], order: tuple[int, ...]
    ) -> Any:
        """Reads one axis as a grid of `sizes`, transposes the grid, and flattens it."""
        split = (*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
        return x.reshape(split).transpose(_around(x.ndim, axis, order)).reshape(x.shape)


_PERMUTE = _Permute()


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Permutation:
    """The equation that replaces the three; looks like one of a jaxpr."""

    invars: list[Atom]
    outvars: Sequence[Atom]
    params: dict[str, Any]
    ctx: Any
    source_info: Any
    effects: Any
    primitive: Any = _PERMUTE


def join_shuffles(eqns: Sequence[Equation], outvars: Sequence[Atom]) -> Sequence[Any]:
    """The equations, with every channel shuffle as one `Permutation`."""
    if len(eqns) < 3:
        return eqns
    moves = {eqn.outvars[0]: eqn for eqn in eqns if _is_move(eqn)}
    joined: dict[int, Permutation | None] = {}
    for last in moves.values():
        turn = _before(moves, last, "transpose") if _is(last, "reshape") else None
        first = _before(moves, turn, "reshape") if turn is not None else None
        found = _shuffle(first, turn, last) if first is not None else None
        if found is None or _read_elsewhere((first, turn), eqns, outvars):
            continue
        joined[id(first)] = joined[id(turn)] = None
        joined[id(last)] = found
    if not joined:
        return eqns
    replaced = (joined.get(id(eqn), eqn) for eqn in eqns)
    return [eqn for eqn in replaced if eqn is not None]


def _is_move(eqn: Equation) -> bool:
    """A transpose, or a reshape that is not also one."""
    return _is(eqn, "transpose") or (
        _is(eqn, "reshape") and eqn.params.get("dimensions") is None
    )


def _is(eqn: Equation, name: str) -> bool:
    return eqn.primitive.name == name


def _before(moves: dict[Any, Any], eqn: Equation, name: str) -> Any | None:
    """The equation that makes the operand of `eqn`, if it is of this kind."""
    operand = eqn.invars[0]
    found = None if isinstance(operand, Literal) else moves.get(operand)
    return found if found is not None and _is(found, name) else None


def _shuffle(first: Any, turn: Any, last: Any) -> Permutation | None:
    """The permutation of one axis that three equations make, if they make one."""
    source = first.invars[0].aval.shape
    if source != last.outvars[0].aval.shape:
        return None
    grid, order = first.outvars[0].aval.shape, turn.params["permutation"]
    more = len(grid) - len(source)
    for d, n in enumerate(source):
        sizes = grid[d : d + more + 1]
        inner = tuple(k - d for k in order[d : d + more + 1])
        same = (*source[:d], *sizes, *source[d + 1 :]) == grid
        alone = sorted(inner) == list(range(more + 1))
        alone = alone and order == _around(len(source), d, inner)
        if more > 0 and same and alone and math.prod(sizes) == n:
            params = {"axis": d, "sizes": sizes, "order": inner}
            return Permutation(
                [first.invars[0]],
                list(last.outvars),
                params,
                last.ctx,
                last.source_info,
                last.effects,
            )
    return None


def _around(ndim: int, axis: int, order: tuple[int, ...]) -> tuple[int, ...]:
    """A transpose of the grid that stands where `axis` was; the rest stays."""
    rest = range(axis + len(order), ndim + len(order) - 1)
    return (*range(axis), *(axis + k for k in order), *rest)


def _read_elsewhere(
    inner: tuple[Any, ...], eqns: Sequence[Equation], outvars: Sequence[Atom]
) -> bool:
    """Does anything but the next of the three read these results?"""
    own = {id(eqn.outvars[0]) for eqn in inner}
    uses = [id(var) for eqn in eqns for var in eqn.invars] + [id(v) for v in outvars]
    return sum(use in own for use in uses) > len(inner)


def _narrow_permute(kept: Liveness, step: Step, x: jax.Array) -> Narrowed:
    params = step.eqn.params
    d, sizes = params["axis"], params["sizes"]
    before, after = step.ins[0].axes[d], step.outs[0].axes[d]
    grid = np.ones(sizes, bool)
    alive = kept.mask(before)
    if alive is not None:
        grid = alive.reshape(sizes)
    every = range(len(sizes))
    lines = [grid.any(axis=tuple(k for k in every if k != line)) for line in every]
    if (grid == functools.reduce(np.logical_and.outer, lines)).all():  # still a grid
        smaller = tuple(int(line.sum()) for line in lines)
        return step.eqn.primitive.bind(x, **{**params, "sizes": smaller})
    chosen = moved_order(params)
    if kept.mask(after) is not None:
        chosen = chosen[kept.mask(after)]
    return narrow_take(kept, x, d, before, chosen)


register_label(by_factors, "permute", narrow=_narrow_permute)
