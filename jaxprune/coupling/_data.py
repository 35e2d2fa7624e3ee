"""Data: values that depend on no input, such as masks, position tables and indices.

They carry no labels. The program computes them whole, and every use takes the positions
that it keeps, so that layers that share a table are not coupled by it.

The limits of a clip and the indices of gathers, scatters and dynamic slices are usually
constants that went through a few equations (convert, wrap negative ones, broadcast).
Knowing them turns "indexed by data" into an exact map of positions; `concrete` computes
them, in numpy, only when asked.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from jaxprune.core._types import PyTree
from jaxprune.coupling._labels import ALIVE, Value
from jaxprune.program._interpret import CALLS, inner_jaxprs, interpret
from jaxprune.program._jaxprs import opened
from jaxprune.program._types import Atom, Equation
from jaxprune.program.primitives import declaration
from jaxprune.program.primitives._moves import order_of_reshape

LIMIT = 1 << 20  # larger index arrays are treated as data


class Known(NamedTuple):
    """An array that is there."""

    array: PyTree


class Derived(NamedTuple):
    """Result `k` of an equation on operands that are constants themselves."""

    eqn: Equation
    k: int
    operands: tuple[Value, ...]


def constant(array: PyTree) -> Value:
    """A literal or a closed-over array."""
    shape = np.shape(array)
    if not shape:
        number = _number(array)
        if number is None:
            return Value((), (), False, True)
        return Value((), (), bool(number == 0), True, Known(number))
    index = _is_index(getattr(array, "dtype", None) or np.result_type(array))
    origin = Known(array) if index and np.size(array) <= LIMIT else None
    return Value(shape, (ALIVE,) * len(shape), False, True, origin)


def literal(var: Atom) -> Value:
    """A number that stands in the program itself."""
    return constant(cast(Literal, var).val)


def _number(array: PyTree) -> np.ndarray | None:
    """A scalar as NumPy knows it; None if it is no number that is there.

    What is traced is not there, nor what other processes hold. Keys are no numbers, and
    neither is the tangent of an integer (float0). A comparison by JAX would be traced
    itself inside of jit.
    """
    if isinstance(array, Tracer):
        return None
    if isinstance(array, jax.Array):
        here = array.is_fully_addressable or array.is_fully_replicated
        if not here or jnp.issubdtype(array.dtype, jax.dtypes.extended):
            return None
    number = np.asarray(array)
    return None if number.dtype == jax.dtypes.float0 else number


def derive(eqn: Equation, operands: tuple[Value, ...]) -> tuple[Value, ...]:
    """The results of an equation all of whose operands are data."""
    if eqn.primitive.name in CALLS:
        return _derive_call(eqn, operands)
    return tuple(_derive(eqn, k, var, operands) for k, var in enumerate(eqn.outvars))


def _derive_call(eqn: Equation, operands: tuple[Value, ...]) -> tuple[Value, ...]:
    """The results of a call, through the equations of its program."""
    jaxpr, consts = opened(inner_jaxprs(eqn)[0])
    known = dict(zip(jaxpr.constvars, consts, strict=True))

    def step(number: int, inner: Equation, values: list[Value]) -> tuple[Value, ...]:
        return derive(inner, tuple(values))

    def given(var: Atom) -> Value:
        return literal(var) if isinstance(var, Literal) else constant(known[var])

    return tuple(interpret(jaxpr, operands, step, given))


def _derive(eqn: Equation, k: int, var: Atom, operands: tuple[Value, ...]) -> Value:
    shape = getattr(var.aval, "shape", ())
    name = eqn.primitive.name
    known = declaration(eqn)
    moves = known is not None and known.moves
    is_zero = moves and all(value.is_zero for value in operands)
    origin = None
    if name in _NUMPY and all(v.origin is not None for v in operands):
        small = math.prod(shape) <= LIMIT
        number = not shape and name in _ON_NUMBERS
        if number or (small and _is_index(var.aval.dtype)):
            origin = Derived(eqn, k, operands)
    axes = (ALIVE,) * len(shape)
    return Value(shape, axes, is_zero, True, origin, _uniform(eqn, shape, operands))


def _uniform(
    eqn: Equation, shape: tuple[int, ...], operands: tuple[Value, ...]
) -> frozenset[int]:
    """Along which axes the result is surely constant."""
    if eqn.primitive.name == "broadcast_in_dim":
        source = eqn.params["broadcast_dimensions"]
        (value, *_) = operands
        varies = {
            d
            for k, d in enumerate(source)
            if value.shape[k] == shape[d] and k not in value.uniform
        }
        return frozenset(range(len(shape))) - varies
    if eqn.primitive.name == "transpose":
        order = eqn.params["permutation"]
        return frozenset(d for d, k in enumerate(order) if k in operands[0].uniform)
    full = [v for v in operands if v.shape]
    same = all(len(v.shape) == len(shape) for v in full)  # size 1 is repeated
    known = declaration(eqn)
    if known is None or not known.elementwise or not same:
        return frozenset()
    constant = ({k for k, n in enumerate(v.shape) if n == 1} | v.uniform for v in full)
    return frozenset(range(len(shape))).intersection(*constant)


def concrete(value: Value) -> np.ndarray | None:
    """The array behind a value, or None if it depends on an input."""
    origin = value.origin
    if isinstance(origin, Derived):
        operands = [concrete(v) for v in origin.operands]
        if any(x is None for x in operands):
            return None
        return np.asarray(_NUMPY[origin.eqn.primitive.name](origin.eqn, *operands))
    if isinstance(origin, Known) and not isinstance(origin.array, Tracer):
        return np.asarray(origin.array)
    return None


def _is_index(dtype: np.dtype) -> bool:
    return getattr(dtype, "kind", "") in "iub"


def _cast(eqn: Equation, result: object) -> np.ndarray:
    return np.asarray(result).astype(eqn.outvars[0].aval.dtype)


def _ufunc(function: Callable[..., object]) -> Callable[..., np.ndarray]:
    return lambda eqn, *xs: _cast(eqn, function(*xs))


def _broadcast(eqn: Equation, x: np.ndarray) -> np.ndarray:
    shape = eqn.params["shape"]
    full = [1] * len(shape)
    for size, d in zip(x.shape, eqn.params["broadcast_dimensions"], strict=True):
        full[d] = size
    return np.broadcast_to(x.reshape(full), shape)


def _reshape(eqn: Equation, x: np.ndarray) -> np.ndarray:
    return x.transpose(order_of_reshape(eqn)).reshape(eqn.params["new_sizes"])


def _iota(eqn: Equation) -> np.ndarray:
    shape, d = eqn.params["shape"], eqn.params["dimension"]
    line = np.arange(shape[d]).reshape([-1 if k == d else 1 for k in range(len(shape))])
    return _cast(eqn, np.broadcast_to(line, shape))


def _slice(eqn: Equation, x: np.ndarray) -> np.ndarray:
    p = eqn.params
    steps = p["strides"] or (1,) * x.ndim
    spans = zip(p["start_indices"], p["limit_indices"], steps, strict=True)
    return x[tuple(slice(a, b, s) for a, b, s in spans)]


_NUMPY: dict[str, Callable[..., Any]] = {
    "add": _ufunc(np.add),
    "sub": _ufunc(np.subtract),
    "mul": _ufunc(np.multiply),
    "div": _ufunc(lambda a, b: np.fix(a / b)),
    "rem": _ufunc(np.fmod),
    "max": _ufunc(np.maximum),
    "min": _ufunc(np.minimum),
    "neg": _ufunc(np.negative),
    "lt": _ufunc(np.less),
    "le": _ufunc(np.less_equal),
    "gt": _ufunc(np.greater),
    "ge": _ufunc(np.greater_equal),
    "eq": _ufunc(np.equal),
    "ne": _ufunc(np.not_equal),
    "and": _ufunc(np.bitwise_and),
    "or": _ufunc(np.bitwise_or),
    "clamp": _ufunc(lambda low, x, high: np.clip(x, low, high)),
    "select_n": _ufunc(lambda which, *cases: np.choose(which.astype(int), cases)),
    "convert_element_type": _ufunc(lambda x: x),
    "broadcast_in_dim": _broadcast,
    "iota": _iota,
    "reshape": _reshape,
    "squeeze": lambda eqn, x: np.squeeze(x, eqn.params["dimensions"]),
    "transpose": lambda eqn, x: np.transpose(x, eqn.params["permutation"]),
    "concatenate": lambda eqn, *xs: np.concatenate(xs, eqn.params["dimension"]),
    "rev": lambda eqn, x: np.flip(x, eqn.params["dimensions"]),
    "slice": _slice,
    "copy": lambda eqn, x: x,
}
_ON_NUMBERS = frozenset("convert_element_type add sub mul".split())  # floats too
