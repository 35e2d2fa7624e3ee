"""Sums over batches: one compiled step, running sums in float32, a progress bar."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import KeyPath

from jaxprune.core._checks import check_leaves
from jaxprune.core._leafwise import is_float, widened
from jaxprune.core._leaves import keystr, named_leaves
from jaxprune.core._progress import tracked
from jaxprune.core._types import Array, PyTree

LossFn = Callable[[PyTree, Any], jax.Array]
Batches = Iterable[PyTree]


def summed(
    step: Callable[..., PyTree],
    params: PyTree,
    batches: Batches,
    *extra: PyTree,
    title: str,
    progress: bool | None,
) -> tuple[PyTree, int]:
    """Adds up ``step(params, batch, k, *extra)`` over the batches.

    The step is compiled once for all batches of a shape, and never holds more than
    one batch and two running sums.

    Args:
        step: pure function of the parameters, a batch, its number (a traced int) and
            `extra`; returns the *sum* over the examples of the batch.
        params: what it reads.
        batches: trees of arrays, examples along axis 0.
        *extra: further arguments of the step.
        title: of the progress bar.
        progress: show it? None for on a terminal.

    Returns:
        The sum, in float32 or wider, and how many examples went into it.

    Raises:
        ValueError: if there are no batches, or one has no leading axis.
    """
    check_leaves(params)
    arrays, static = _parted(params)

    def sums(
        arrays: PyTree, batch: PyTree, k: jax.Array, extra: tuple[PyTree, ...]
    ) -> PyTree:
        return step(joined(arrays, static), batch, k, *extra)

    def accumulate(
        total: PyTree,
        arrays: PyTree,
        batch: PyTree,
        k: jax.Array,
        extra: tuple[PyTree, ...],
    ):
        part = jax.tree.map(widened, sums(arrays, batch, k, extra))
        return jax.tree.map(jnp.add, total, part)

    compiled = jax.jit(accumulate, donate_argnums=0)
    total, count = None, 0
    for k, batch in enumerate(shown(batches, title, progress)):
        count += examples_in(batch)
        if total is None:
            total = _zeros(jax.eval_shape(sums, arrays, batch, k, extra), params)
        total = compiled(total, arrays, batch, k, extra)
    if total is None:
        raise ValueError(f"batches is empty, so {title} has nothing to look at")
    return total, count


def _parted(params: PyTree) -> tuple[PyTree, PyTree]:
    """The arrays, None elsewhere; and what is no array (functions), None elsewhere."""
    is_data = lambda leaf: hasattr(leaf, "dtype")  # noqa: E731
    return (
        jax.tree.map(lambda leaf: leaf if is_data(leaf) else None, params),
        jax.tree.map(lambda leaf: None if is_data(leaf) else leaf, params),
    )


def _zeros(part: PyTree, params: PyTree) -> PyTree:
    """Where the sums start; sharded like the parameters that they belong to."""
    known = named_leaves(params)

    def start(path: KeyPath, leaf: Array) -> jax.Array:
        twin = known.get(keystr(path))
        concrete = isinstance(twin, jax.Array) and not isinstance(twin, Tracer)
        same = concrete and getattr(twin, "shape", None) == leaf.shape
        sharding = getattr(twin, "sharding", None) if same else None
        dtype = jax.eval_shape(widened, leaf).dtype
        return jnp.zeros(leaf.shape, dtype, device=sharding)

    return jax.tree_util.tree_map_with_path(start, part)


def averaged(
    step: Callable[..., PyTree],
    params: PyTree,
    batches: Batches,
    *extra: PyTree,
    title: str,
    progress: bool | None,
) -> PyTree:
    """`summed`, divided by the number of examples."""
    options: dict[str, Any] = {"title": title, "progress": progress}
    total, count = summed(step, params, batches, *extra, **options)
    return jax.tree.map(lambda leaf: leaf / count, total)


def examples_in(batch: PyTree) -> int:
    """How many examples a batch holds: the size of axis 0 of its arrays."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "the arrays of a batch must have the examples along axis 0, as many in "
            f"each; got the shapes {', '.join(map(str, shapes)) or '(no array)'}"
        )
    return shapes[0][0]


def singles(batch: PyTree) -> PyTree:
    """The batch as a stack of batches of one example, for `jax.vmap`."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[:, None], batch)


def gradient(loss_fn: LossFn) -> Callable[[PyTree, PyTree], PyTree]:
    """The gradient of a loss by the floating leaves; None for the others."""

    def grad(params: PyTree, batch: PyTree) -> PyTree:
        def loss(floats: PyTree) -> jax.Array:
            return loss_fn(joined(floats, params), batch)

        return jax.grad(loss)(floating(params))

    return grad


def floating(params: PyTree) -> PyTree:
    """The floating leaves; None for the others."""
    return jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, params)


def joined(floats: PyTree, params: PyTree) -> PyTree:
    """The parameters, with other values in their floating leaves."""
    return jax.tree.map(
        lambda new, old: old if new is None else new,
        floats,
        params,
        is_leaf=lambda node: node is None,
    )


def twice(batches: Batches, why: str) -> Batches:
    """The batches, if they can be read more than once.

    Raises:
        ValueError: if they are an iterator.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{why} reads the batches twice, but batches is an iterator "
            f"({type(batches).__name__}) that is empty after one pass; pass a list or "
            "an object whose __iter__ starts anew"
        )
    return batches


def shown(batches: Batches, title: str, progress: bool | None) -> Iterator[PyTree]:
    """The batches, under a progress bar that leaves a terminal when they end."""
    return tracked(batches, title, progress)
