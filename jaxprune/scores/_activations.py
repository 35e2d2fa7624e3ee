"""Scores from the activations of a network on data.

They take the groups first, then the function that is read: ``score(groups, apply_fn,
variables, batches)`` runs ``apply_fn(variables, batch)`` on every batch and looks at
what products (dense layers, convolutions, attention) take in: the values that carry the
units of a group, after their nonlinearity, wherever they are in the program. A group
that several layers take in, such as a residual stream, is looked at in all of them.
Batches are streamed as for the scores from gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._checks import whole_number
from jaxprune.core._groups import Groups
from jaxprune.core._leafwise import widened
from jaxprune.core._types import PyTree
from jaxprune.program._jaxprs import trace_program
from jaxprune.scores._published import of_units
from jaxprune.statistics._streaming import (
    Batches,
    averaged,
    examples_in,
    shown,
    singles,
)
from jaxprune.statistics.taps._gates import Observe, observe

ApplyFn = Callable[[PyTree, PyTree], PyTree]


@of_units("outputs")
def mean_activation(
    groups: Groups,
    apply_fn: ApplyFn,
    variables: PyTree,
    batches: Batches,
    *,
    progress: bool | None = None,
) -> dict[str, jax.Array]:
    """The mean of ``|a|`` over all activations of a unit.

    Args:
        groups: what `trace` returned.
        apply_fn: ``(variables, batch) -> anything``.
        variables: tree of arrays, those that were traced or their ``params``.
        batches: iterable of batches, examples along axis 0.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Group name -> float32 or wider ``[size]``, larger matters more.

    Raises:
        ValueError: if there are no batches, or no product takes in the units of a
            group.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, -1.0]]), "w2": jnp.ones((2, 1))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> batches = [jnp.array([[1.0], [-1.0]]), jnp.array([[3.0], [4.0]])]
        >>> mean_activation(groups, mlp, params, batches)
        {'w1:1': Array([2.  , 0.25], dtype=float32)}

    References:
        Molchanov et al., `Pruning Convolutional Neural Networks for Resource Efficient
        Inference <https://arxiv.org/abs/1611.06440>`_, 2016
    """
    args = groups, apply_fn, variables, batches
    return _mean(lambda a: jnp.abs(widened(a)), *args, "mean_activation", progress)


@of_units("outputs")
def apoz(
    groups: Groups,
    apply_fn: ApplyFn,
    variables: PyTree,
    batches: Batches,
    *,
    progress: bool | None = None,
) -> dict[str, jax.Array]:
    """One minus the average percentage of zeros (APoZ) of a unit's activations.

    The share of activations that are not 0, so that, as everywhere, larger matters
    more: a ReLU that never fires scores 0.

    Args:
        groups: what `trace` returned.
        apply_fn: ``(variables, batch) -> anything``.
        variables: tree of arrays, those that were traced or their ``params``.
        batches: iterable of batches, examples along axis 0.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Group name -> float32 ``[size]`` in [0, 1], larger matters more.

    Raises:
        ValueError: if there are no batches, or no product takes in the units of a
            group.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, -1.0]]), "w2": jnp.ones((2, 1))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> batches = [jnp.array([[1.0], [-1.0]]), jnp.array([[3.0], [4.0]])]
        >>> apoz(groups, mlp, params, batches)
        {'w1:1': Array([0.75, 0.25], dtype=float32)}

    References:
        Hu et al., `Network Trimming: A Data-Driven Neuron Pruning Approach towards
        Efficient Deep Architectures <https://arxiv.org/abs/1607.03250>`_, 2016
    """
    args = groups, apply_fn, variables, batches
    return _mean(lambda a: (a != 0).astype(jnp.float32), *args, "apoz", progress)


@of_units("outputs")
def entropy(
    groups: Groups,
    apply_fn: ApplyFn,
    variables: PyTree,
    batches: Batches,
    *,
    bins: int = 10,
    progress: bool | None = None,
) -> dict[str, jax.Array]:
    """The entropy of a unit's mean activation over the examples.

    Every example gives a unit one number, its activation averaged over all places. A
    histogram of these, from the least to the largest, has the entropy ``-sum p log
    p``: a unit that says the same of all examples scores 0. Where several layers take
    a unit in, their entropies are averaged.

    Args:
        groups: what `trace` returned.
        apply_fn: ``(variables, batch) -> anything``; is called with batches of one
            example.
        variables: tree of arrays, those that were traced or their ``params``.
        batches: iterable of batches, examples along axis 0. One number per example and
            unit is kept.
        bins: how many bins the histogram has.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Group name -> float32 ``[size]`` in [0, log(bins)], larger matters more.

    Raises:
        ValueError: if there are no batches, bins is below 2, or no product takes in
            the units of a group.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, -1.0]]), "w2": jnp.ones((2, 1))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> entropy(groups, mlp, params, [jnp.array([[1.0], [2.0], [3.0], [4.0]])])
        {'w1:1': Array([1.3862944, 0.       ], dtype=float32)}

    References:
        Luo and Wu, `An Entropy-based Pruning Method for CNN Compression
        <https://arxiv.org/abs/1706.05791>`_, 2017
    """
    bins = whole_number("bins", bins, 2)

    def pooled(variables: PyTree, example: PyTree) -> dict[str, jax.Array]:
        return {
            name: jnp.stack([_share([each]) for each in found])
            for name, found in _observed(
                groups, apply_fn, variables, example, widened
            ).items()
        }

    def of_batch(variables: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        return jax.vmap(pooled, in_axes=(None, 0))(variables, singles(batch))

    compiled = jax.jit(of_batch)
    parts = [compiled(variables, b) for b in shown(batches, "entropy", progress)]
    if not parts:
        raise ValueError("batches is empty, so entropy has nothing to look at")
    return {
        name: _entropies(jnp.concatenate([part[name] for part in parts]), bins).mean(0)
        for name in groups
    }


def _entropies(values: jax.Array, bins: int) -> jax.Array:
    """Entropy along axis 0 of a histogram between its extremes."""
    low, high = values.min(0, keepdims=True), values.max(0, keepdims=True)
    # What differs by rounding alone is constant.
    constant = high - low <= 1e-6 * jnp.maximum(jnp.abs(low), jnp.abs(high))
    width = jnp.where(constant, 1, high - low)
    place = jnp.where(constant, 0, (values - low) / width)
    place = jnp.minimum((place * bins).astype(jnp.int32), bins - 1)
    shares = jnp.stack([(place == b).mean(0, dtype=jnp.float32) for b in range(bins)])
    return -jax.scipy.special.xlogy(shares, shares).sum(0) + 0.0  # not -0


def _mean(
    what: Observe,
    groups: Groups,
    apply_fn: ApplyFn,
    variables: PyTree,
    batches: Batches,
    title: str,
    progress: bool | None,
) -> dict[str, jax.Array]:
    def step(variables: PyTree, batch: PyTree, k: jax.Array) -> dict[str, jax.Array]:
        return {
            name: _share(found) * examples_in(batch)
            for name, found in _observed(
                groups, apply_fn, variables, batch, what
            ).items()
        }

    return averaged(step, variables, batches, title=title, progress=progress)


def _share(found: list[tuple[jax.Array, np.ndarray]]) -> jax.Array:
    """The mean over all entries of all sites."""
    total = jnp.stack([sums for sums, _ in found]).sum(0)
    count = np.maximum(sum(count for _, count in found), 1)
    return total / jnp.asarray(count, total.dtype)


def _observed(
    groups: Groups,
    apply_fn: ApplyFn,
    variables: PyTree,
    batch: PyTree,
    what: Observe,
) -> dict[str, list[tuple[jax.Array, np.ndarray]]]:
    program = trace_program(apply_fn, variables, batch)
    return observe(program, groups, what, (variables, batch))
