"""`sparse_gpt`: single weights of every layer, one layer after the other."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.core._checks import whole_number
from jaxprune.core._leaves import named_leaves
from jaxprune.core._limits import fraction
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.program._jaxprs import trace_program
from jaxprune.statistics._contractions import Contraction, contractions
from jaxprune.statistics._moments import chosen, observing, peeked, streamed
from jaxprune.statistics._streaming import Batches, twice
from jaxprune.surgery._compensation import Item, waves
from jaxprune.surgery._consumers import put
from jaxprune.surgery._surgeon import brain_surgeon


class Sparse(NamedTuple):
    """Sparse variables.

    Attributes:
        variables: tree like those given, 0 where masked.
        masks: tree of bools like `variables`, True = kept; the scalar True for leaves
            that are whole.
    """

    variables: PyTree
    masks: PyTree


def sparse_gpt(
    apply_fn: ApplyFn,
    variables: PyTree,
    batches: Batches,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    layers: str | Sequence[str] | None = None,
    ridge: float = 0.01,
    block: int = 128,
    progress: bool | None = None,
) -> Sparse:
    r"""Removes weights of every contraction; those that stay make up for them.

    Of every layer the second moment of its inputs is taken in the net as pruned so far,
    and its weights are removed by the optimal brain surgeon, one input after the other:
    the weight w of input d goes where :math:`w^2 / [H_d^{-1}]_{dd}` is lowest, and the
    weights of later inputs e change by :math:`-w [H_d^{-1}]_{de} / [H_d^{-1}]_{dd}`,
    with :math:`H_d` the moments of the inputs from d on.

    Args:
        apply_fn: ``(variables, batch) -> anything``.
        variables: tree of arrays.
        batches: trees of arrays; a list, or an object that can be iterated again.
        sparsity: fraction of the weights of every layer to remove.
        pattern: instead, (n, m): of every m inputs in a row each output keeps n. The
            inputs of a convolution run over the window, then over channels.
        layers: paths of parameters or glob patterns; None for all contractions.
        ridge: added to the moments, as a share of their mean diagonal.
        block: inputs whose weights compete with each other.
        progress: show a progress bar? None for on a terminal.

    Returns:
        `Sparse`.

    Raises:
        ValueError: if neither or both of `sparsity` and `pattern` are given, batches
            run dry, a layer cannot change for one use alone or is not floating, or its
            inputs cannot be divided into runs of m.

    Example:
        >>> import jax.numpy as jnp
        >>> def linear(params, x):
        ...     return x @ params["w"]
        >>> params = {"w": jnp.array([[1.0], [3.0]])}
        >>> x = jnp.array([[1.0, 0.0], [1.0, 0.5]])
        >>> sparse = sparse_gpt(linear, params, [x], sparsity=0.5, ridge=0.0)
        >>> sparse.masks["w"].tolist(), sparse.variables["w"].round(2).tolist()
        ([[False], [True]], [[0.0], [5.0]])

    References:
        Frantar and Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`_, ICML 2023
    """
    if (sparsity is None) == (pattern is None):
        raise ValueError("give either sparsity, or pattern=(n, m)")
    options: dict[str, Any] = {
        "sparsity": 0.0 if sparsity is None else fraction("sparsity", sparsity),
        "pattern": pattern,
        "ridge": ridge,
        "block": whole_number("block", block, 1),
    }
    first, again = peeked(batches)
    found = contractions(trace_program(apply_fn, variables, first))
    some = {one.name: one for one in chosen(found, layers)}
    each = list(waves(_items(some, named_leaves(variables))))
    if len(each) > 1:
        twice(batches, "sparse_gpt, which prunes one layer after the other,")
    leaves = dict(named_leaves(variables))
    kept = {
        one.path: np.ones(np.shape(leaves[one.path]), bool) for one in some.values()
    }
    treedef = jax.tree.structure(variables)
    for wave in each:
        names = list(dict.fromkeys(item.name for item in wave))
        step, title = observing(apply_fn, names), f"sparse_gpt {names[0]}"
        current = treedef.unflatten(leaves.values())
        sums = streamed(step, (current,), again, title, progress)
        known = dict(zip(names, sums, strict=True))
        for item in wave:
            _prune(some[item.name], item, known[item.name], leaves, kept, options)
    masks = [kept.get(path, np.array(True)) for path in leaves]
    return Sparse(treedef.unflatten(leaves.values()), treedef.unflatten(masks))


def _items(found: Mapping[str, Contraction], leaves: Mapping[str, Any]) -> list[Item]:
    items = []
    for name, one in found.items():
        why = one.fixed(leaves[one.path])
        if why:
            raise ValueError(
                f"{one.path} cannot be pruned for one contraction alone: {why}; name "
                "the layers to prune, layers=[...]"
            )
        items += [Item(s.order, name, one.path, s.blocks, s.before) for s in one.stages]
    return sorted(items, key=lambda item: item.order)


def _prune(
    one: Contraction,
    item: Item,
    sums: Any,
    leaves: dict[str, Any],
    kept: Mapping[str, np.ndarray],
    options: Mapping[str, Any],
) -> None:
    """Prunes some matrices of a contraction, in place of the dictionaries."""
    matrices = one.kernel(np.asarray(leaves[one.path])).astype(np.float32)
    new = []
    for k in item.blocks:
        second = sums.scatter[k] / sums.count + np.outer(sums.mean[k], sums.mean[k])
        try:
            weights, own = brain_surgeon(second, matrices[k], **options)
        except ValueError as error:
            raise ValueError(f"{one.name}: {error}") from None
        new.append(weights)
        kept[one.path].reshape(-1)[one.at[k]] = own
    leaves[one.path] = put(leaves[one.path], one.at[item.blocks], np.stack(new))
