"""What every export shares: any batch size, random inputs, and the comparison."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxprune.core import named_leaves
from jaxprune.core._types import PyTree

# Relative to the largest entry of an output, by the bits of its mantissa and more.
_TOLERANCE = {2: 3e-2, 4: 2e-5, 8: 2e-5}


@contextlib.contextmanager
def without_folders() -> Iterator[None]:
    """Programs exported inside name source files without the folders they lie in.

    JAX writes the line of the source beside every operation: its whole path would tell
    whoever gets the model about the machine it was made on.
    """
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, r".*[/\\]")
    try:
        yield
    finally:
        jax.config.update(option, before)


def each_example(apply_fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """``(variables, *args)``, computed for every example of a batch by itself.

    The function is traced for a batch of one and mapped, so whatever it does
    (`jaxprune.narrow` included) meets concrete shapes only. A program that was exported
    before cannot be mapped; it takes batches of any size by itself, or refuses.
    """

    def mapped(variables: PyTree, *args: PyTree) -> PyTree:
        def one(*example: PyTree) -> PyTree:
            batch_of_one = jax.tree.map(lambda x: x[None], example)
            return jax.tree.map(lambda y: y[0], apply_fn(variables, *batch_of_one))

        try:
            return jax.vmap(one)(*args)
        except NotImplementedError as error:
            if "call_exported" not in str(error):
                raise
        return apply_fn(variables, *args)

    return mapped


def shapes_of(tree: PyTree) -> PyTree:
    """Shapes and dtypes alone."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


def batch_size(args: Sequence[PyTree]) -> int:
    """The common leading axis of all arguments.

    Raises:
        ValueError: if an argument has none, or their sizes differ.
    """
    sizes = {}
    for name, leaf in named_leaves(tuple(args)).items():
        if np.ndim(leaf) == 0:
            raise ValueError(
                f"args/{name} has no axes, but its leading one must be the batch; "
                "close over what is not batched"
            )
        sizes[name] = np.shape(leaf)[0]
    if not sizes:
        raise ValueError("an export needs example arguments")
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"args/{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"the leading axis of all arguments is the batch, but {told}")
    return next(iter(sizes.values()))


def with_batch(args: Sequence[PyTree], batch: PyTree) -> tuple[Any, ...]:
    """Shapes of the arguments at another batch size, a symbol perhaps."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), tuple(args)
    )


def random_batch(args: Sequence[PyTree], batch: int, seed: int) -> tuple[Any, ...]:
    """Normal numbers of the arguments' shapes; other dtypes draw from the example."""
    rng = np.random.default_rng(seed)

    def draw(leaf: PyTree) -> np.ndarray:
        shape = (batch, *leaf.shape[1:])
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            pair = rng.standard_normal((2, *shape))
            return (pair[0] + 1j * pair[1]).astype(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return rng.standard_normal(shape).astype(leaf.dtype)
        if isinstance(leaf, jax.ShapeDtypeStruct) or not leaf.size:
            return np.zeros(shape, leaf.dtype)
        return rng.choice(np.asarray(leaf).ravel(), shape)

    return jax.tree.map(draw, tuple(args))


def on_device(leaf: PyTree) -> Any:
    """A JAX array, unless that would make it narrower."""
    if isinstance(leaf, np.ndarray):
        dtype = leaf.dtype
        return (
            leaf if jax.dtypes.canonicalize_dtype(dtype) != dtype else jnp.array(leaf)
        )
    return leaf


def check_agreement(
    what: str, expected: PyTree, found: Sequence[object], tolerance: float | None
) -> float:
    """The largest difference, relative to the largest entry of each output.

    Args:
        what: the exported thing, for the error.
        expected: the outputs of the function.
        found: the leaves of what the exported program returns.
        tolerance: what is allowed; by default what the dtype of an output allows.

    Raises:
        ValueError: if they differ by more, naming the output.
    """
    worst = 0.0
    outputs = named_leaves(expected)
    if len(found) != len(outputs):
        raise ValueError(f"{what} has {len(found)} outputs, not {len(outputs)}")
    for (name, wanted), other in zip(outputs.items(), found, strict=True):
        allowed = _allowed(wanted.dtype) if tolerance is None else tolerance
        gap = _gap(np.asarray(wanted), np.asarray(other))
        if not gap <= allowed:
            raise ValueError(
                f"{what} differs from the function it was made from by {gap:.1e} of "
                f"the largest entry of output {name or 'itself'}, allowed "
                f"{allowed:.1e}; nothing was written. Does an example's output depend "
                "on the rest of the batch?"
            )
        worst = max(worst, gap)
    return worst


def _allowed(dtype: DTypeLike) -> float:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0
    return _TOLERANCE.get(jnp.finfo(dtype).bits // 8, 3e-2)


def _gap(wanted: np.ndarray, found: np.ndarray) -> float:
    if wanted.shape != found.shape:
        return float("inf")
    if not jnp.issubdtype(wanted.dtype, jnp.inexact):
        return float(np.mean(wanted != found)) if wanted.size else 0.0
    wide = complex if jnp.issubdtype(wanted.dtype, jnp.complexfloating) else float
    a, b = wanted.astype(wide), found.astype(wide)
    same = (a == b) | (np.isnan(a) & np.isnan(b))  # infinities too
    if same.all():
        return 0.0
    finite = np.abs(a[np.isfinite(a)])
    scale = max(float(finite.max(initial=0.0)), 1e-30)
    gap = np.max(np.abs(a[~same] - b[~same])) / scale
    return float(gap) if np.isfinite(gap) else float("inf")
