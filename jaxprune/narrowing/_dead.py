"""Completes reductions with what the masked program holds at dead positions.

Which values are known there is decided in `jaxprune.coupling._dead`. Here they are
computed, only where a reduction needs one that is not 0: by the equations that made the
value, on slices of size 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from jaxprune.coupling._dead import (
    NOWHERE,
    Dims,
    Part,
    Scope,
    are_even,
    is_zero_at,
    made_by,
    parts,
)
from jaxprune.coupling._labels import Value
from jaxprune.coupling._walk import Step
from jaxprune.program._types import Atom

_FOLDS = {"reduce_max": lax.max, "reduce_min": lax.min}
_SIZES = {"broadcast_in_dim": "shape", "reshape": "new_sizes"}  # parameters of a shape


def complete(emitter: Any, scope: Scope, step: Step, results: list[Any]) -> list[Atom]:
    """The results of a reduction as they are in the masked program.

    Args:
        emitter: what writes the smaller program (`jaxprune.narrowing._build`).
        scope: of the program that the step is of.
        step: a reduction or contraction.
        results: over what lives.
    """
    found = parts(step.eqn, step.ins, NOWHERE, emitter.kept.dies)
    if found is None or len(found) == 1 or 0 in results[0].aval.shape:
        return results
    if not are_even(scope, step.eqn, step.ins, found):
        return results  # the group is not exact, and says so
    return [_joined(emitter, scope, step, NOWHERE, found, results[0])]


def _dead(emitter: Any, scope: Scope, var: Atom, value: Value, dims: Dims) -> Any:
    """The variable of a value where these dimensions are at dead positions.

    It has size 1 along them. What lives is there already: it was written before.
    """
    if value.data:
        return _dead_data(emitter, scope, var, value, dims)
    if not dims:
        return emitter.envs[id(scope)][var]
    key = id(scope), var, dims
    if key in emitter.dead:
        return emitter.dead[key]
    shape = _shape(emitter, value, dims)
    above = made_by(scope, var)
    if is_zero_at(value, dims):
        [made] = emitter.traced(lambda: jnp.zeros(shape, var.aval.dtype), [])
    elif above is not None:
        if id(above[0]) not in emitter.envs:
            _write_call(emitter, scope, scope.made[var][0])
        made = _dead(emitter, *above, dims)
    else:
        step, _ = scope.made[var]
        found = parts(step.eqn, step.ins, dims, emitter.kept.dies)
        assert found is not None  # it is even
        made = _joined(emitter, scope, step, dims, found)
    emitter.dead[key] = made
    return made


def _write_call(emitter: Any, scope: Scope, step: Step) -> None:
    """Writes a call that was not: nothing of its results lives, but some is dead."""
    env = emitter.envs[id(scope)]
    invars = step.eqn.invars
    operands = [var if isinstance(var, Literal) else env[var] for var in invars]
    emitter.write(step.subs[0], operands)


def _dead_data(emitter: Any, scope: Scope, var: Atom, value: Value, dims: Dims) -> Any:
    """Data that is constant along these dimensions, cut along the others."""
    if isinstance(var, Literal):
        return var
    axes = [0 if d in dims else axis for d, axis in enumerate(value.axes)]
    rest = value._replace(axes=tuple(axes))

    def cut(x: jax.Array) -> list[Atom]:
        for d in dims:
            x = lax.slice_in_dim(x, 0, 1, axis=d)
        return [emitter.kept.cut(x, rest)]

    [made] = emitter.traced(cut, [emitter.envs[id(scope)][var]])
    return made


def _shape(emitter: Any, value: Value, dims: Dims) -> tuple[int, ...]:
    """The shape of a value where these dimensions are at dead positions."""
    shape = emitter.kept.shape(value)
    return tuple([1 if d in dims else n for d, n in enumerate(shape)])


def _joined(
    emitter: Any,
    scope: Scope,
    step: Step,
    dims: Dims,
    found: Sequence[Part],
    living: Any = None,
) -> Any:
    """The result of a step from all parts of the positions that it runs over.

    Args:
        emitter: what writes the smaller program.
        scope: of the program that the step is of.
        step: the step.
        dims: of its result, at dead positions.
        found: the parts.
        living: the first part, if it is written already.
    """
    eqn, [value] = step.eqn, step.outs
    shape = _shape(emitter, value, dims)
    terms, counts = [], []  # None: that lives
    for part in found:
        pairs = list(zip(step.ins, part.dims, strict=True))
        if any(0 in _shape(emitter, x, at) for x, at in pairs):
            continue  # over nothing
        if part.factors or living is None:
            operands = [
                _dead(emitter, scope, var, x, at)
                for var, (x, at) in zip(eqn.invars, pairs, strict=True)
            ]
            sizes = _SIZES.get(eqn.primitive.name)
            params = {**eqn.params, sizes: shape} if sizes else eqn.params
            [term] = emitter.copied(eqn, operands, [shape], params)
        else:
            term = living
        terms.append(term)
        counts.append(_count(emitter, step, part) if part.factors else None)
    dtype = eqn.outvars[0].aval.dtype
    if not terms:
        [made] = emitter.traced(lambda: jnp.zeros(shape, dtype), [])
        return made
    if len(terms) == 1 and counts == [None]:
        return terms[0]

    def join(*xs: Any) -> Any:
        fold = _FOLDS.get(eqn.primitive.name)
        total = None
        for x, count in zip(xs, counts, strict=True):
            if fold is None and count is not None:
                x = lax.mul(x, lax.full_like(x, np.asarray(count).astype(dtype)))
            total = x if total is None else (fold or lax.add)(total, x)
        return total

    [made] = emitter.traced(join, terms)
    return made


def _count(emitter: Any, step: Step, part: Part) -> int:
    """How many combinations of dead positions a part stands for."""
    return math.prod(
        step.ins[k].shape[d] - emitter.kept.shape(step.ins[k])[d]
        for k, d in part.axes(step.eqn)
    )
