"""Arrays that the derivatives of custom_jvp and custom_vjp close over.

A derivative is Python code that runs when somebody differentiates. What it closes over
is no constant of the program, so it is looked for where Python keeps it.
"""

import functools
import types
from collections.abc import Iterator
from typing import Any

import jax
from jax.core import Tracer

from jaxprune.program._interpret import CUSTOM, inner_jaxprs
from jaxprune.program._jaxprs import opened
from jaxprune.program._types import Jaxpr


def closes_over_tracers(jaxpr: Jaxpr) -> bool:
    """Does a derivative in a program close over a tracer whose trace goes on?

    Such a program is part of that trace: kept by jit, it would outlive it.
    """
    for eqn in opened(jaxpr)[0].eqns:
        if eqn.primitive.name in CUSTOM:
            rules = [x for x in eqn.params.values() if callable(x) or _is_wrapped(x)]
            if any(not has_ended(tracer) for tracer in _tracers(rules)):
                return True
        if any(closes_over_tracers(inner) for inner in inner_jaxprs(eqn)):
            return True
    return False


def has_ended(x: Any) -> bool:
    """Is it the result of an equation whose trace is over, which has none any more?"""
    frame = getattr(getattr(x, "_trace", None), "frame", None)
    made = getattr(x, "parent", None) is not None
    return made and frame is not None and not frame.tracing_eqns


def _tracers(roots: list[Any]) -> Iterator[Tracer]:
    """The tracers that functions hold: in closures, defaults, bound arguments."""
    left, seen = list(roots), set[int]()
    while left:
        here = left.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        if isinstance(here, Tracer):
            yield here
        left += _held(here)


def _held(x: Any) -> list[Any]:
    if isinstance(x, types.FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or () if _is_full(cell)]
        return [*cells, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
    if isinstance(x, types.MethodType):
        return [x.__func__, x.__self__]
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if _is_wrapped(x):
        return [x.f, *(arg for _, args in x.transforms for arg in args)]
    if isinstance(x, (jax.custom_jvp, jax.custom_vjp)):
        return list(vars(x).values())
    return [] if jax.tree_util.all_leaves([x]) else jax.tree.leaves(x)


def _is_full(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return False
    return True


def _is_wrapped(x: Any) -> bool:
    """Is it a `linear_util.WrappedFun`, as JAX stores derivatives?"""
    return hasattr(x, "f") and hasattr(x, "transforms")
