"""Checks of what is handed in: leaves that are arrays, numbers that are numbers.

Each names what was given and what was expected. They run on static values and on
dtypes, never on the numbers of an array that may be traced.
"""

import contextlib
import math
from collections.abc import Iterator
from numbers import Number, Real
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.errors import ConcretizationTypeError, TracerArrayConversionError
from jax.typing import ArrayLike

from jaxprune.core._types import PyTree


def check_leaves(tree: PyTree, what: str = "params") -> None:
    """Refuses leaves that look like data but are no arrays.

    A leaf that is neither an array, a number nor text (an activation function in an
    Equinox module) is configuration, as is a number or a text that is an attribute of
    a module. Everywhere else a number or a text is an array that somebody forgot.
    NumPy's arrays of texts and objects are none of JAX's.

    Raises:
        TypeError: naming the path and the type.

    Example:
        >>> check_leaves({"w": np.ones(2), "activation": jax.nn.relu})
        >>> check_leaves({"w": [1.0, 2.0]})
        Traceback (most recent call last):
        TypeError: params[w/0] is a float, not an array; ...
    """
    if all(_is_fine(leaf) for leaf in jax.tree.leaves(tree)):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        attribute = any(isinstance(key, jax.tree_util.GetAttrKey) for key in path)
        if not _is_fine(leaf) and not attribute:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"{what}[{name}] is a {_kind(leaf)}, not an array; convert "
                "numbers and lists of numbers with jnp.asarray, and put None where a "
                "leaf is not a parameter"
            )


def _kind(leaf: object) -> str:
    dtype, name = getattr(leaf, "dtype", None), type(leaf).__name__
    return name if dtype is None else f"{name} of {dtype}"


def _is_fine(leaf: object) -> bool:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return not isinstance(leaf, Number | str | bytes)
    return getattr(dtype, "kind", "f") not in "USOMm"


def whole_number(what: str, value: object, least: int = 1) -> int:
    """A static whole number, no less than `least`.

    Raises:
        TypeError: if it is traced or no number.
        ValueError: if it is NaN, infinite, fractional or too small.

    Example:
        >>> whole_number("min_keep", np.int64(3)), whole_number("min_keep", 2.0)
        (3, 2)
        >>> whole_number("min_keep", float("nan"))
        Traceback (most recent call last):
        ValueError: min_keep must be a whole number of at least 1, got nan
    """
    real = number(what, value)
    if not math.isfinite(real) or real != int(real) or real < least:
        raise ValueError(
            f"{what} must be a whole number of at least {least}, got {real}"
        )
    return int(real)


def finite(what: str, value: object) -> float:
    """A static finite number.

    Raises:
        TypeError: if it is traced or no number.
        ValueError: if it is NaN or infinite.

    Example:
        >>> finite("budget", np.float32(2.0))
        2.0
        >>> finite("budget", float("inf"))
        Traceback (most recent call last):
        ValueError: budget must be a finite number, got inf
    """
    real = number(what, value)
    if not math.isfinite(real):
        raise ValueError(f"{what} must be a finite number, got {real}")
    return float(real)


def number(what: str, value: object) -> Any:
    """A static real number, perhaps as an array of no axes.

    Raises:
        TypeError: if it is traced or no real number.
    """
    if isinstance(value, Tracer):
        raise TypeError(
            f"{what} is traced, but its value decides shapes or counts: pass a Python "
            "number (static_argnums, or a closure) instead of an argument of jit"
        )
    if isinstance(value, np.ndarray | np.generic | jax.Array) and not value.ndim:
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{what} must be a number, got {value!r}")
    return value


def concrete_array(what: str, values: ArrayLike) -> np.ndarray:
    """The values as a numpy array.

    Raises:
        TypeError: if they are traced, because they decide shapes or counts.
    """
    if isinstance(values, Tracer):
        raise TypeError(
            f"{what} is traced, but its values decide shapes or counts: call this "
            "outside of jit, grad and vmap, or close over concrete values"
        )
    return np.asarray(values)


def concrete_bools(what: str, values: ArrayLike) -> np.ndarray:
    """`concrete_array` of bools, True = kept.

    Raises:
        TypeError: if they are traced or of another dtype.
    """
    values = concrete_array(what, values)
    if values.dtype != np.bool_:
        raise TypeError(f"{what} must be boolean (True = kept), got {values.dtype}")
    return values


def refuse_traced(function: str, **arguments: PyTree) -> None:
    """Refuses traced leaves among the arguments of a function that reads values.

    Raises:
        TypeError: naming the argument and the path of its first traced leaf.

    Example:
        >>> refuse_traced("save", state={"w": np.ones(2)})
        >>> jax.jit(lambda x: refuse_traced("save", state={"w": x}))(1.0)
        Traceback (most recent call last):
        TypeError: save reads values, but state[w] is traced: call it ...
    """
    for argument, tree in arguments.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if isinstance(leaf, Tracer):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise TypeError(
                    f"{function} reads values, but {argument}"
                    f"{f'[{name}]' if path else ''} is traced: call it outside of jit, "
                    "grad and vmap, or close over concrete arrays"
                )


@contextlib.contextmanager
def naming_traced(function: str, **arguments: PyTree) -> Iterator[None]:
    """`refuse_traced`, once a value is read: for functions that may not read any.

    Raises:
        TypeError: naming the argument and the path of its first traced leaf.
    """
    try:
        yield
    except (ConcretizationTypeError, TracerArrayConversionError):
        refuse_traced(function, **arguments)
        raise
