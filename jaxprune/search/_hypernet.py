"""Weights that depend on the widths: the supernet of meta-pruning."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.core._checks import whole_number
from jaxprune.core._groups import Groups
from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import apply_masks
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.search._joint import Forward, JointState
from jaxprune.search._sampling import Choices, draw_counts
from jaxprune.search._supernet import side_masks
from jaxprune.training.distillation import label_loss


class Hypernet(NamedTuple):
    """What makes the weights of a network from its widths; made by `hypernet`.

    Attributes:
        init: key -> its own parameters, to be trained.
        params: (its parameters, counts) -> the collection ``params`` of the network;
            jit-able, also with traced counts.
    """

    init: Callable[[jax.Array], PyTree]
    params: Callable[[PyTree, Mapping[str, Any]], PyTree]


def hypernet(groups: Groups, variables: PyTree, *, hidden: int = 32) -> Hypernet:
    r"""Makes every kernel by a small network of the widths of its axes.

    A kernel is a leaf of two axes or more that groups cut. With the shares
    :math:`s \in (0, 1]^k` of units kept of the k groups that cut a kernel W,

    .. math:: W(s) = W_0 + V \, \mathrm{relu}(U s + a),

    where :math:`W_0`, V, U and a are trained; V begins so small that the weights are
    nearly :math:`W_0`, those given. It has `hidden` + 1 times the weights of the
    network. All other leaves are trained as they are.

    Args:
        groups: what `trace` returned.
        variables: the variables that were traced, with a collection ``params``; what
            training starts from.
        hidden: units of each small network.

    Returns:
        A `Hypernet`.

    Raises:
        ValueError: if there is no collection ``params``.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(v, x):
        ...     return jax.nn.relu(x @ v["params"]["a"]) @ v["params"]["b"]
        >>> variables = {"params": {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}}
        >>> groups = jaxprune.trace(mlp, variables, jnp.ones((4, 3)))
        >>> net = hypernet(groups, variables)
        >>> own = net.init(jax.random.key(0))
        >>> net.params(own, {"params/a:1": 4})["a"].shape
        (3, 8)

    References:
        Liu et al., `MetaPruning <https://arxiv.org/abs/1903.10258>`_, 2019

        Shibu et al., `Rewarded meta-pruning <https://arxiv.org/abs/2301.11063>`_, 2023
    """
    whole_number("hidden", hidden)
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(
            "a hypernet makes the collection 'params', which the variables do not "
            "have; wrap them: {'params': ...}"
        )
    leaves = named_leaves({"params": variables["params"]})
    treedef = jax.tree.structure(variables["params"])
    cutting = {
        path: [n for n, g in groups.items() if any(m.path == path for m in g.members)]
        for path, leaf in leaves.items()
        if np.ndim(leaf) > 1
    }

    def made(key: jax.Array, path: str, leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if not cutting.get(path):
            return leaf
        first, second = jax.random.split(key)
        inputs = len(cutting[path])
        spread = 0.01 * jnp.std(leaf) / np.sqrt(hidden).astype(leaf.dtype)
        return {
            "start": leaf,
            "bias": jnp.zeros(hidden, leaf.dtype),
            "in": jax.random.normal(first, (inputs, hidden), leaf.dtype),
            "out": spread * jax.random.normal(second, (hidden, leaf.size), leaf.dtype),
        }

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(leaves))
        pairs = zip(keys, leaves.items(), strict=True)
        return {path: made(k, path, leaf) for k, (path, leaf) in pairs}

    def params(own: PyTree, counts: Mapping[str, Any]) -> PyTree:
        found = []
        for path in leaves:
            part = own[path]
            if cutting.get(path):
                share = jnp.stack(
                    [
                        jnp.asarray(counts.get(n, groups[n].size), part["in"].dtype)
                        / groups[n].size
                        for n in cutting[path]
                    ]
                )
                middle = jax.nn.relu(share @ part["in"] + part["bias"])
                added = (middle @ part["out"]).reshape(part["start"].shape)
                part = part["start"] + added
            found.append(part)
        return treedef.unflatten(found)

    return Hypernet(init, params)


def meta_step(
    apply_fn: ApplyFn,
    groups: Groups,
    net: Hypernet,
    tx: optax.GradientTransformation,
    forward: Forward,
    options: Choices,
    *,
    labels: Callable[[Any], jax.Array] = lambda batch: batch[1],
) -> Callable[[JointState, Any], tuple[JointState, jax.Array]]:
    """A training step of a hypernet: one draw of widths, with the weights made for it.

    Widths are masks, as in `bilateral_step`, and running averages stay as they are.
    A search then judges counts by the weights made for them:
    ``evaluator(apply_fn, groups, {**variables, "params": net.params(own, counts)},
    measure, batches=...)(counts)``, with `pruning_reward` for rewarded meta-pruning.

    Args:
        apply_fn: the function that was traced.
        groups: what `trace` returned.
        net: what makes the weights.
        tx: the optimiser, for the parameters of `net`.
        forward: ``(apply_fn, variables, batch) -> (logits, new)``: runs the function
            in training mode; `new` is not kept.
        options: group name -> counts to draw from, see `choices`.
        labels: batch -> int ``[batch]`` or probabilities ``[batch, classes]``.

    Returns:
        ``(state, batch) -> (state, loss)``, pure and jit-able; `state` is a
        `JointState` of the traced variables with ``params`` those of `net`.

    References:
        Liu et al., `MetaPruning <https://arxiv.org/abs/1903.10258>`_, 2019
    """

    def step(state: JointState, batch: PyTree) -> tuple[JointState, jax.Array]:
        key, drawn = jax.random.split(state.key)
        counts = draw_counts(drawn, options)
        masks = side_masks(groups, counts)

        def loss_of(own: PyTree) -> jax.Array:
            held = {**state.variables, "params": net.params(own, counts)}
            logits, _ = forward(apply_fn, apply_masks(held, masks), batch)
            return label_loss(logits, labels(batch)).mean()

        own = state.variables["params"]
        loss, grads = jax.value_and_grad(loss_of)(own)
        updates, opt_state = tx.update(grads, state.opt_state, own)
        moved = {**state.variables, "params": optax.apply_updates(own, updates)}
        return JointState(moved, opt_state, key), loss

    return step
