"""Batches as a person gives them: what the loss takes, and the inputs in them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune.core._types import PyTree
from jaxprune.program._jaxprs import is_array


def check_batches(batches: Any) -> None:
    """Raises if one batch was given where several are expected.

    Raises:
        TypeError: naming what was given, and how to wrap it.

    Example:
        >>> check_batches(np.ones((8, 3)))
        Traceback (most recent call last):
            ...
        TypeError: batches is one array of shape (8, 3); expected an iterable of ...
    """
    expected = "expected an iterable of batches: wrap a single batch in a list, [batch]"
    if isinstance(batches, jax.Array | np.ndarray):
        raise TypeError(f"batches is one array of shape {batches.shape}; {expected}")
    if isinstance(batches, Mapping):
        raise TypeError(f"batches is one dict of {sorted(batches)}; {expected}")
    arrays = isinstance(batches, tuple) and all(map(is_array, batches))
    if arrays and len({(x.shape[1:], x.dtype) for x in batches}) > 1:
        shapes = ", ".join(str(x.shape) for x in batches)
        raise TypeError(
            f"batches is a tuple of arrays of the shapes {shapes}, which looks like "
            f"one batch; {expected}"
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; {expected}")


def reread(batches: Iterable[PyTree], passes: int) -> Iterable[Any]:
    """The batches, if they can be read so often.

    Raises:
        ValueError: if they are an iterator that is needed more than once.
    """
    if passes > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"batches are read {passes} times, but are an iterator "
            f"({type(batches).__name__}) that is empty after one pass; pass a list or "
            "an object whose __iter__ starts anew"
        )
    return batches


def inputs_like(args: tuple[PyTree, ...]) -> Callable[[PyTree], tuple[PyTree, ...]]:
    """Finds the positional arguments of a function in a batch.

    An array is the one argument. A tuple starts with the arguments: as many of its
    entries as the example had arrays are taken, if they have their ranks and types.
    What the example had besides arrays is passed as it was.

    Args:
        args: the example arguments.

    Returns:
        ``batch -> args``.
    """

    def inputs(batch: PyTree) -> tuple[Any, ...]:
        entries = list(batch) if isinstance(batch, tuple | list) else [batch]
        found = []
        for example in args:
            if not _has_arrays(example):
                found.append(example)
                continue
            if not entries or not _alike(entries[0], example):
                raise ValueError(_unlike(batch, args))
            found.append(entries.pop(0))
        return tuple(found)

    return inputs


def _has_arrays(tree: PyTree) -> bool:
    return any(map(is_array, jax.tree.leaves(tree)))


def _alike(given: PyTree, example: PyTree) -> bool:
    if jax.tree.structure(given) != jax.tree.structure(example):
        return False
    pairs = zip(jax.tree.leaves(given), jax.tree.leaves(example), strict=True)
    return all(
        np.ndim(a) == len(b.shape) and np.shape(a)[1:] == tuple(b.shape)[1:]
        for a, b in pairs
        if is_array(b)
    )


def _unlike(batch: PyTree, args: tuple[PyTree, ...]) -> str:
    def shapes(tree: PyTree) -> str:
        found = jax.tree.map(lambda leaf: str(np.shape(leaf)), tree)
        return str(found).replace("'", "")

    return (
        f"a batch of the shapes {shapes(batch)} does not start with the arguments of "
        f"the function, which have the shapes {shapes(args)}; say where they are: "
        "inputs=lambda batch: (batch['image'],)"
    )
