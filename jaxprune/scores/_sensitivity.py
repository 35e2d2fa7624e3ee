"""Empirical sensitivity: the largest share that an input has in any output.

An output z = sum of w a is a sum of parts of equal sign once weights and activations
are split into their positive and negative parts; the share of an input is its part of
that sum. It lies in [0, 1], needs no labels, and bounds what sampling inputs by it
does to the outputs (`jaxprune.select.provable`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._groups import Groups
from jaxprune.core._leaves import named_leaves
from jaxprune.core._types import PyTree
from jaxprune.program._jaxprs import trace_program
from jaxprune.scores._activations import ApplyFn
from jaxprune.scores._published import of_units, of_weights
from jaxprune.statistics._contractions import Contraction, contractions
from jaxprune.statistics._moments import inputs, peeked
from jaxprune.statistics._streaming import Batches, shown, singles

Form = Literal["channel", "tap"]
_ENTRIES = 2**22  # of shares that are alive at once


@of_units("outputs")
def empirical_sensitivity(
    groups: Groups,
    apply_fn: ApplyFn,
    variables: PyTree,
    batches: Batches,
    *,
    form: Form = "channel",
    progress: bool | None = None,
) -> dict[str, jax.Array]:
    r"""The largest share that a unit has in any output of the layers that read it.

    .. math:: s_j = \max_{x, i} \frac{\sum_{p \in j} w_{pi} a_p(x)}
        {\sum_p w_{pi} a_p(x)}

    over all outputs i, places (patches, tokens) and examples x, for the positive and
    the negative parts of weights and activations apart. Biases do not count. A unit
    that several layers read has the largest of its sensitivities. Examples are looked
    at one by one, with a running maximum.

    Args:
        groups: what `trace` returned.
        apply_fn: ``(variables, batch) -> anything``; is called with batches of one
            example.
        variables: tree of arrays that `groups` was traced with.
        batches: iterable of batches, examples along axis 0. Some hundred examples are
            enough.
        form: "channel" adds up the window of a convolution, as the proof does; "tap"
            takes the largest share of a single weight, as the authors' code does.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Group name -> float32 or wider ``[size]`` in [0, 1], larger matters more. 1, the
        largest there is, for groups that no contraction reads through a parameter, such
        as positions of queries and keys: nothing is known of them.

    Raises:
        ValueError: if there are no batches, or the form is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, 2.0]]), "w2": jnp.array([[2.0], [3.0]])}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> empirical_sensitivity(groups, mlp, params, [jnp.array([[1.0], [5.0]])])
        {'w1:1': Array([0.25, 0.75], dtype=float32)}

    References:
        Liebenwein et al., `Provable Filter Pruning for Efficient Neural Networks
        <https://arxiv.org/abs/1911.07412>`_, ICLR 2020
    """
    if form not in ("channel", "tap"):
        raise ValueError(f"form must be 'channel' or 'tap', got {form!r}")
    first, batches = peeked(batches)
    readers, tables = [], []
    for one in _found(apply_fn, variables, first).values():
        own = {
            name: _table(units, groups[name].size)
            for name, units in one.units(groups).items()
        }
        if own:
            readers.append(one)
            tables.append(own)
    names = [one.name for one in readers]
    leaves = named_leaves(variables)
    kernels = [one.kernel(jnp.asarray(leaves[one.path])) for one in readers]

    def of_example(variables: PyTree, kernels: Any, tables: Any, example: PyTree):
        found: dict[str, jax.Array] = {}
        rows = inputs(apply_fn, names, variables, example)
        for x, kernel, own in zip(rows, kernels, tables, strict=True):
            for name, table in own.items():
                shares = jax.lax.map(
                    lambda each: unit_shares(each[0], each[1], each[2], form),
                    (x, kernel, table),
                )
                found[name] = jnp.maximum(found.get(name, 0.0), shares.max(0))
        return found

    @jax.jit
    def step(variables: PyTree, kernels: Any, tables: Any, batch: PyTree) -> Any:
        of = functools.partial(of_example, variables, kernels, tables)
        return jax.tree.map(lambda s: s.max(0), jax.lax.map(of, singles(batch)))

    most: dict[str, Any] = {}
    for batch in shown(batches, "empirical_sensitivity", progress):
        new = step(variables, kernels, tables, batch)
        most = {name: jnp.maximum(most.get(name, 0.0), new[name]) for name in new}
    return {
        name: most.get(name, jnp.ones(group.size)) for name, group in groups.items()
    }


def _found(apply_fn: ApplyFn, variables: PyTree, batch: PyTree) -> Any:
    example = jax.tree.map(lambda leaf: leaf[:1], batch)
    return contractions(trace_program(apply_fn, variables, example))


def _table(units: np.ndarray, size: int) -> np.ndarray:
    """The inputs of every unit: int ``[K, size, taps]``, padded with D."""
    blocks = [[np.flatnonzero(row == unit) for unit in range(size)] for row in units]
    taps = max(len(own) for row in blocks for own in row)
    table = np.full((len(units), size, taps), units.shape[1])
    for k, row in enumerate(blocks):
        for unit, own in enumerate(row):
            table[k, unit, : len(own)] = own
    return table


def unit_shares(
    x: jax.Array, kernel: jax.Array, table: jax.Array, form: Form = "channel"
) -> jax.Array:
    """The largest share of every unit in any output of one matrix.

    Args:
        x: ``[rows, D]``.
        kernel: ``[D, N]``.
        table: int ``[size, taps]``, the inputs of every unit; D for none.
        form: see `empirical_sensitivity`.

    Returns:
        ``[size]``.

    Example:
        >>> x, kernel = jnp.array([[1.0, 1.0, 2.0]]), jnp.array([[1.0], [-1.0], [2.0]])
        >>> unit_shares(x, kernel, jnp.array([[0], [1], [2]]))
        Array([0.2, 1. , 0.8], dtype=float32)
    """
    x, kernel = _parts(x, kernel)
    wholes = jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)
    x = jnp.pad(x, ((0, 0), (0, 1)))[:, table]  # [rows, size, taps]
    kernel = jnp.pad(kernel, ((0, 1), (0, 0)))[table]

    def of_output(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, whole = each
        parts = x * weights[None]
        parts = parts.sum(-1) if form == "channel" else parts.max(-1)
        return _share(parts, whole[:, None]).max(0)

    size = int(np.clip(_ENTRIES // max(x.size, 1), 1, wholes.shape[1]))
    outputs = jnp.moveaxis(kernel, 2, 0), wholes.T
    return jax.lax.map(of_output, outputs, batch_size=size).max(0)


def _parts(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positive and negative parts below and beside each other."""
    kernel = kernel.astype(x.dtype)
    rows = jnp.concatenate([jnp.maximum(x, 0), jnp.maximum(-x, 0)])
    return rows, jnp.concatenate([jnp.maximum(kernel, 0), jnp.maximum(-kernel, 0)], 1)


def _share(parts: jax.Array, whole: jax.Array) -> jax.Array:
    some = whole > jnp.finfo(whole.dtype).tiny
    return jnp.minimum(jnp.where(some, parts / jnp.where(some, whole, 1), 0), 1)


@of_weights("sum")
def weight_sensitivity(
    apply_fn: ApplyFn,
    variables: PyTree,
    batches: Batches,
    *,
    reduce: Literal["max", "mean"] = "max",
    progress: bool | None = None,
) -> PyTree:
    r"""The largest share that a weight has in its output: SiPP's sensitivity.

    .. math:: s_{ij} = \max_x \frac{w_{ij} a_j(x)}{\sum_k w_{ik} a_k(x)}

    for the positive and the negative weights of an output apart, so over a single
    example without further places those of one output and sign add up to 1.

    Args:
        apply_fn: ``(variables, batch) -> anything``; is called with batches of one
            example.
        variables: tree of arrays.
        batches: iterable of batches, examples along axis 0.
        reduce: over the places of an example (patches, tokens); over examples it is
            always the largest.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Tree like `variables` of float32 or wider in [0, 1]; None for what no
        contraction reads.

    Raises:
        ValueError: if there are no batches, or no contraction reads a parameter.

    Example:
        >>> def linear(params, x):
        ...     return x @ params["w"]
        >>> params = {"w": jnp.array([[1.0], [-2.0], [3.0]])}
        >>> weight_sensitivity(linear, params, [jnp.array([[1.0, 1.0, 1.0]])])["w"]
        Array([[0.25],
               [1.  ],
               [0.75]], dtype=float32)

    References:
        Baykal et al., `SiPPing Neural Networks: Sensitivity-informed Provable Pruning
        of Neural Networks <https://arxiv.org/abs/1910.05422>`_, 2019
    """
    if reduce not in ("max", "mean"):
        raise ValueError(f"reduce must be 'max' or 'mean', got {reduce!r}")
    first, batches = peeked(batches)
    found = _found(apply_fn, variables, first)
    if not found:
        raise ValueError(
            "no contraction reads a parameter as it is, so weight_sensitivity has "
            "nothing to score"
        )
    leaves = named_leaves(variables)
    kernels = [one.kernel(jnp.asarray(leaves[one.path])) for one in found.values()]

    def of_example(variables: PyTree, kernels: Any, example: PyTree) -> list[Any]:
        rows = inputs(apply_fn, list(found), variables, example)
        return [
            jax.lax.map(lambda each: weight_shares(each[0], each[1], reduce), both)
            for both in zip(rows, kernels, strict=True)
        ]

    @jax.jit
    def step(variables: PyTree, kernels: object, batch: PyTree) -> list[Any]:
        of = functools.partial(of_example, variables, kernels)
        return jax.tree.map(lambda s: s.max(0), jax.lax.map(of, singles(batch)))

    most: list[Any] = [0.0] * len(found)
    for batch in shown(batches, "weight_sensitivity", progress):
        most = list(map(jnp.maximum, most, step(variables, kernels, batch)))
    return _in_leaves(list(found.values()), most, variables)


def weight_shares(
    x: jax.Array, kernel: jax.Array, reduce: Literal["max", "mean"] = "max"
) -> jax.Array:
    """The share of every weight in its output, over rows: ``[D, N]``.

    Args:
        x: ``[rows, D]``.
        kernel: ``[D, N]``.
        reduce: over the rows.
    """
    rows = len(x)
    x, both = _parts(x, kernel)
    wholes = jnp.matmul(x, both, precision=jax.lax.Precision.HIGHEST)
    over: Callable[..., Any] = jnp.max if reduce == "max" else jnp.mean

    def of_output(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, whole = each
        shares = _share(x * weights[None], whole[:, None])
        return over(jnp.maximum(shares[:rows], shares[rows:]), axis=0)

    size = int(np.clip(_ENTRIES // max(x.size, 1), 1, both.shape[1]))
    found = jax.lax.map(of_output, (both.T, wholes.T), batch_size=size)
    positive, negative = jnp.split(found.T, 2, axis=1)
    return jnp.maximum(positive, negative)


def _in_leaves(
    found: Sequence[Contraction], shares: Sequence[jax.Array], variables: PyTree
) -> PyTree:
    flat: dict[str, jax.Array] = {}
    leaves = named_leaves(variables)
    for one, each in zip(found, shares, strict=True):
        start = jnp.zeros(np.size(leaves[one.path]), each.dtype)
        flat[one.path] = flat.get(one.path, start).at[one.at].max(each)
    shaped = [
        flat[path].reshape(np.shape(leaf)) if path in flat else None
        for path, leaf in leaves.items()
    ]
    return jax.tree.structure(variables).unflatten(shaped)
