"""Training of dynamic slimmable networks: first the widths, then the gate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.core._types import PyTree
from jaxprune.search._dynamic import ensemble_bootstrapping, gate_loss, gumbel_gate
from jaxprune.search._joint import Forward, JointState
from jaxprune.search._slimmable import Slimmable
from jaxprune.training._hyperparameters import check
from jaxprune.training._teacher import teacher_params
from jaxprune.training.distillation import label_loss


def bootstrapped_step(
    slim: Slimmable,
    tx: optax.GradientTransformation,
    forward: Forward,
    *,
    labels: Callable[[Any], jax.Array] = lambda batch: batch[1],
    track: bool = True,
) -> Callable[[JointState, Any], tuple[JointState, jax.Array]]:
    """Stage 1 of DS-Net: a training step by in-place ensemble bootstrapping.

    The loss is `ensemble_bootstrapping`: what the moving average of the weights says
    at every width but the narrowest teaches those below the widest.

    Args:
        slim: the network, of two widths or more.
        tx: the optimiser, for the collection ``params``, with
            `jaxprune.training.ema_teacher` as its last link.
        forward: ``(apply_fn, variables, batch) -> (logits, new)``: runs one width in
            training mode; `new` holds new values of collections, ``{}`` for none.
        labels: batch -> int ``[batch]`` or probabilities ``[batch, classes]``.
        track: keep new values of collections?

    Returns:
        ``(state, batch) -> (state, loss)``, pure and jit-able, for the state of
        `joint_state`; the mean loss, summed over the widths.

    Raises:
        ValueError: if there is one width only; in the step, if `tx` has no teacher.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxprune
        >>> from jaxprune import search
        >>> def mlp(v, x):
        ...     return jax.nn.relu(x @ v["params"]["a"]) @ v["params"]["b"]
        >>> params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
        >>> variables, x = {"params": params}, jnp.ones((4, 3))
        >>> groups = jaxprune.trace(mlp, variables, x)
        >>> keeps = search.uniform(groups, (1.0, 0.5, 0.25))
        >>> slim = jaxprune.slimmable(mlp, variables, keeps, groups=groups)
        >>> tx = optax.chain(optax.sgd(0.1), jaxprune.training.ema_teacher())
        >>> step = search.bootstrapped_step(slim, tx, lambda f, v, b: (f(v, b[0]), {}))
        >>> state = search.joint_state(slim, tx, jax.random.key(0))
        >>> state, loss = jax.jit(step)(state, (x, jnp.zeros(4, jnp.int32)))

    References:
        Li et al., `Dynamic Slimmable Network <https://arxiv.org/abs/2103.13258>`_, 2021
    """
    if len(slim) < 2:
        raise ValueError(
            "in-place ensemble bootstrapping needs 2 widths or more, got 1: the "
            "narrowest learns from those above it"
        )

    def step(state: JointState, batch: PyTree) -> tuple[JointState, jax.Array]:
        variables, opt_state, key = state
        average = {**variables, "params": teacher_params(opt_state)}
        teachers = [forward(run, average, batch)[0] for run in list(slim)[:-1]]

        def total(params: PyTree) -> Any:
            held = {**variables, "params": params}
            found = [forward(run, held, batch) for run in slim]
            logits = [each[0] for each in found]
            loss = ensemble_bootstrapping(logits, teachers, labels(batch)).mean()
            return loss, [each[1] for each in found]

        params = variables["params"]
        (loss, new), grads = jax.value_and_grad(total, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        held = variables
        for i, own in enumerate(new if track else ()):
            held = slim.write(held, i, own) if own else held
        held = {**held, "params": optax.apply_updates(params, updates)}
        return JointState(held, opt_state, key), loss

    return step


class GateState(NamedTuple):
    """What the training of a gate carries on.

    Attributes:
        params: of the gate.
        opt_state: of its optimiser.
        key: PRNG key, which draws the widths.
    """

    params: PyTree
    opt_state: Any
    key: jax.Array


def gate_step(
    slim: Slimmable,
    gate: Callable[[PyTree, Any], jax.Array],
    tx: optax.GradientTransformation,
    costs: jax.Array,
    *,
    labels: Callable[[Any], jax.Array] = lambda batch: batch[1],
    inputs: Callable[[Any], Any] = lambda batch: batch[0],
    temperature: float = 1.0,
    strength: float = 0.5,
) -> Callable[[GateState, PyTree, Any], tuple[GateState, jax.Array]]:
    r"""Stage 2 of DS-Net: a training step of the gate that chooses a width.

    Every width runs, with its weights fixed; the gate draws one of them for every
    example by `gumbel_gate`, and learns from

    .. math:: CE \Big( \sum_i c_i z_i, y \Big) + gate\_loss(g, c, right, costs).

    Args:
        slim: the trained network; it maps ``[batch, ...]`` to logits. Its BatchNorm
            statistics are those of inference (see `calibrate`).
        gate: ``(params, inputs) -> logits [batch, widths]``, the widest first.
        tx: the gate's optimiser.
        costs: of every width ``[widths]``, such as GFLOPs; see `gate_loss`.
        labels: batch -> int ``[batch]``.
        inputs: batch -> what the network and the gate take.
        temperature: of the draw, above 0.
        strength: of the penalty of cost.

    Returns:
        ``(state, variables, batch) -> (state, loss)``, pure and jit-able. Run the
        result by ``run_by_width(slim)(variables, x, gate(params, x).argmax(-1))``.

    Raises:
        ValueError: if there is not one cost for every width, or the temperature is out
            of range.

    References:
        Li et al., `DS-Net++ <https://arxiv.org/abs/2109.10060>`_, 2021
    """
    check("temperature", temperature)
    costs = jnp.asarray(costs, jnp.float32)
    if costs.shape != (len(slim),):
        raise ValueError(
            f"costs have shape {costs.shape}, expected one for each of the {len(slim)} "
            "widths, the widest first"
        )

    def loss_fn(params: PyTree, key: jax.Array, logits: jax.Array, batch: Any) -> Any:
        scores, y = gate(params, inputs(batch)), labels(batch)
        choice = gumbel_gate(key, scores, temperature=temperature)
        chosen = jnp.einsum("bw,wbc->bc", choice, logits)
        right = logits[-1].argmax(-1) == y
        spent = gate_loss(scores, choice, right, costs, strength=strength)
        return (label_loss(chosen, y) + spent).mean()

    def step(state: GateState, variables: PyTree, batch: Any) -> Any:
        key, drawn = jax.random.split(state.key)
        logits = jnp.stack([run(variables, inputs(batch)) for run in slim])
        logits = jax.lax.stop_gradient(logits)
        loss, grads = jax.value_and_grad(loss_fn)(state.params, drawn, logits, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return GateState(params, opt_state, key), loss

    return step
