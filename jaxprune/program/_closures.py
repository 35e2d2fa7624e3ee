"""Arrays that the derivatives of custom_jvp and custom_vjp close over.

A derivative is Python code that runs when somebody differentiates. What it closes over
is no constant of the program, so it is looked for where Python keeps it.
"""

import collections
import functools
import types
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr

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
    """The tracers that functions hold: in closures, defaults, objects, globals."""
    left, seen = list(roots), set[int]()
    while left:
        here = left.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        if isinstance(here, Tracer):
            yield here
        left += _held(here)


def _held(x: Any) -> Iterable[Any]:
    if isinstance(x, types.FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or () if _is_full(cell)]
        defaults = [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
        return [*cells, *defaults, *_held(vars(x)), *_globals(x)]
    if isinstance(x, types.MethodType):
        return [x.__func__, x.__self__]
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if _is_wrapped(x):
        return [x.f, *(arg for _, args in x.transforms for arg in args)]
    if isinstance(x, Mapping):
        return x.values()
    if isinstance(x, (list, tuple, Set, collections.deque)):
        return x
    if isinstance(x, (jax.custom_jvp, jax.custom_vjp)):
        return vars(x).values()
    if isinstance(x, ClosedJaxpr):
        return opened(x)[1]
    if _is_of_library(type(x)):  # perhaps a jitted function
        return [getattr(x, "__wrapped__", None)]
    return _attributes(x)


def _globals(fn: types.FunctionType) -> Iterator[Any]:
    """The global variables that a function of the user names."""
    codes = [] if _is_of_library(fn) else [fn.__code__]
    while codes:
        code = codes.pop()
        codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
        names = [name for name in code.co_names if name in fn.__globals__]
        yield from (fn.__globals__[name] for name in names)


def _attributes(x: Any) -> list[Any]:
    """What an object of a class of the user holds, in a dictionary or in slots."""
    slots = [
        descriptor
        for base in type(x).__mro__
        for descriptor in vars(base).values()
        if isinstance(descriptor, types.MemberDescriptorType)
    ]
    own = [slot.__get__(x) for slot in slots if _is_set(slot, x)]
    return [*own, *getattr(x, "__dict__", {}).values()]


def _is_set(slot: types.MemberDescriptorType, x: Any) -> bool:
    try:
        slot.__get__(x)
    except AttributeError:
        return False
    return True


# Neither their objects nor the globals of their functions hold what a user computes.
_LIBRARIES = frozenset("builtins jax jaxlib numpy types typing functools".split())


def _is_of_library(x: Any) -> bool:
    """Is this class or function one of Python's, JAX's or NumPy's own?"""
    return str(x.__module__).partition(".")[0] in _LIBRARIES


def _is_full(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return False
    return True


def _is_wrapped(x: Any) -> bool:
    """Is it a `linear_util.WrappedFun`, as JAX stores derivatives?"""
    return hasattr(x, "f") and hasattr(x, "transforms")
