"""Training of a supernet whose units serve every width alike: BCNet."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune.core._groups import Groups
from jaxprune.core._masks import apply_masks
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.search._joint import Forward, JointState
from jaxprune.search._sampling import Choices, complementary, draw_counts
from jaxprune.search._supernet import side_masks
from jaxprune.training.distillation import label_loss


def bilateral_step(
    apply_fn: ApplyFn,
    groups: Groups,
    tx: optax.GradientTransformation,
    forward: Forward,
    options: Choices,
    *,
    labels: Callable[[Any], jax.Array] = lambda batch: batch[1],
) -> Callable[[JointState, Any], tuple[JointState, jax.Array]]:
    """A training step of a bilaterally coupled supernet.

    Draws a width for every group and trains the four networks of `complementary`: the
    first units and the last ones at these widths and at what is left of them. Their
    gradients are averaged, then applied once. Widths are masks, so that one program
    serves all of them, and each of the four costs as much as the whole network.

    Running averages stay as they are: those of one width are wrong for all others.
    Judge widths by `evaluator`, which measures them anew, or by `masked_error`.

    Args:
        apply_fn: the function that was traced.
        groups: what `trace` returned.
        tx: the optimiser, for the collection ``params``.
        forward: ``(apply_fn, variables, batch) -> (logits, new)``: runs the function
            in training mode; `new` is not kept.
        options: group name -> counts to draw from, see `choices`.
        labels: batch -> int ``[batch]`` or probabilities ``[batch, classes]``.

    Returns:
        ``(state, batch) -> (state, losses)``, pure and jit-able, with the mean loss of
        each of the four; `state` is a `JointState` of the traced variables.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxprune
        >>> from jaxprune import search
        >>> def mlp(v, x):
        ...     return jax.nn.relu(x @ v["params"]["a"]) @ v["params"]["b"]
        >>> params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
        >>> variables, x = {"params": params}, jnp.ones((4, 3))
        >>> groups = jaxprune.trace(mlp, variables, x)
        >>> tx = optax.sgd(0.1)
        >>> step = search.bilateral_step(
        ...     mlp, groups, tx, lambda f, v, b: (f(v, b[0]), {}),
        ...     search.choices(groups, 4))
        >>> state = search.JointState(variables, tx.init(params), jax.random.key(0))
        >>> state, losses = jax.jit(step)(state, (x, jnp.zeros(4, jnp.int32)))
        >>> losses.shape
        (4,)

    References:
        Su et al., `BCNet: Searching for Network Width with Bilaterally Coupled Network
        <https://arxiv.org/abs/2105.10533>`_, 2021
    """

    def loss_of(params: PyTree, state: JointState, batch: PyTree, masks: Any) -> Any:
        held = apply_masks({**state.variables, "params": params}, masks)
        logits, _ = forward(apply_fn, held, batch)
        return label_loss(logits, labels(batch)).mean()

    def step(state: JointState, batch: PyTree) -> tuple[JointState, jax.Array]:
        key, drawn = jax.random.split(state.key)
        params = state.variables["params"]
        four = complementary(groups, draw_counts(drawn, options))
        losses, grads = [], jax.tree.map(jnp.zeros_like, params)
        for counts, side in four:
            masks = side_masks(groups, counts, side)
            loss, own = jax.value_and_grad(loss_of)(params, state, batch, masks)
            grads = jax.tree.map(lambda a, b: a + b / len(four), grads, own)
            losses.append(loss)
        updates, opt_state = tx.update(grads, state.opt_state, params)
        moved = {**state.variables, "params": optax.apply_updates(params, updates)}
        return JointState(moved, opt_state, key), jnp.stack(losses)

    return step
