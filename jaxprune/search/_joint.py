"""Joint training: one step for several widths of a slimmable network."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.core._checks import whole_number
from jaxprune.core._types import PyTree
from jaxprune.search._slimmable import Slimmable
from jaxprune.statistics._recalibration import recalibrate
from jaxprune.training._hyperparameters import check
from jaxprune.training.distillation import label_loss, taught

# (apply_fn, variables, batch) -> (logits, new values of collections)
Forward = Callable[[Callable[..., Any], PyTree, Any], tuple[jax.Array, Mapping]]


class JointState(NamedTuple):
    """What joint training carries on.

    Attributes:
        variables: of all widths, as `Slimmable.variables`.
        opt_state: of the optimiser, for their collection ``params``.
        key: PRNG key, which draws the widths of a step.
    """

    variables: PyTree
    opt_state: optax.OptState
    key: jax.Array


def joint_step(
    slim: Slimmable,
    tx: optax.GradientTransformation,
    forward: Forward,
    *,
    labels: Callable[[Any], jax.Array] = lambda batch: batch[1],
    alpha: float = 0.0,
    temperature: float = 1.0,
    sample: int | None = None,
    track: bool = True,
) -> Callable[[JointState, Any], tuple[JointState, jax.Array]]:
    r"""A training step of all widths: their gradients are summed, then applied once.

    .. math::
        L = CE(z_0, y) + \sum_{i > 0} \big( \alpha \, S_T(z_i, z_0)
        + (1 - \alpha) \, CE(z_i, y) \big)

    with the logits :math:`z_i` of width i; the teacher :math:`z_0` gets no gradient
    from the others. The published methods are settings of it:

    * S-Net: ``alpha=0``, with all of BatchNorm private.
    * US-Net: ``alpha=1``, ``sample=4`` (the sandwich rule) and ``track=False``; after
      training `calibrate` measures the statistics of every width.
    * SP-Net: ``alpha=0.9``, with statistics private and scales shared, and the L1
      penalty of scales in `tx`: ``bridge_penalty(1e-5, mask=...)``.

    Args:
        slim: the network.
        tx: the optimiser, for the collection ``params`` of `slim.variables`.
        forward: ``(apply_fn, variables, batch) -> (logits, new)``: runs one width in
            training mode; `new` holds new values of collections, ``{}`` for none.
        labels: batch -> int ``[batch]`` or probabilities ``[batch, classes]``.
        alpha: share of the teacher in the loss of the narrower widths, in [0, 1].
        temperature: of the teacher's share, above 0.
        sample: how many widths a step trains: the widest, the narrowest, and others
            drawn with replacement from those between. None for every width.
        track: keep new values of collections?

    Returns:
        ``(state, batch) -> (state, losses)``, pure and jit-able; `losses` is the mean
        loss of every width trained, the widest first, then (with `sample`) the
        narrowest.

    Raises:
        ValueError: if a number is out of range, or there are too few widths to draw
            from.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxprune
        >>> from jaxprune import search
        >>> def mlp(v, x):
        ...     return jax.nn.relu(x @ v["params"]["a"]) @ v["params"]["b"]
        >>> key = jax.random.key(0)
        >>> a, b = jax.random.normal(key, (3, 8)), jax.random.normal(key, (8, 2))
        >>> variables, x = {"params": {"a": a, "b": b}}, jnp.ones((4, 3))
        >>> groups = jaxprune.trace(mlp, variables, x)
        >>> keeps = search.uniform(groups, (1.0, 0.5))
        >>> slim = jaxprune.slimmable(mlp, variables, keeps, groups=groups)
        >>> tx = optax.sgd(0.1)
        >>> step = search.joint_step(slim, tx, lambda f, v, b: (f(v, b[0]), {}))
        >>> state = search.joint_state(slim, tx, key)
        >>> state, losses = jax.jit(step)(state, (x, jnp.zeros(4, jnp.int32)))
        >>> losses.shape
        (2,)

    References:
        Yu et al., `Slimmable Neural Networks <https://arxiv.org/abs/1812.08928>`_, 2018

        Yu and Huang, `Universally Slimmable Networks and Improved Training Techniques
        <https://arxiv.org/abs/1903.05134>`_, 2019

        Kuratsu and Nakamura, `Slimmable Pruned Neural Networks
        <https://arxiv.org/abs/2212.03415>`_, 2022
    """
    check("alpha", alpha)
    check("temperature", temperature)
    middle = _check_sample(slim, sample)
    train = _WidthTrainer(slim, forward, labels, (alpha, temperature), track)

    def step(state: JointState, batch: PyTree) -> tuple[JointState, jax.Array]:
        variables, opt_state, key = state
        params = variables["params"]
        grads, held, teacher, loss = train.widest(variables, batch)
        losses = [loss]
        numbers: list[Any] = list(range(1, len(slim)))
        if sample is not None:
            key, drawn = jax.random.split(key)
            chosen = jax.random.randint(drawn, (middle,), 1, len(slim) - 1)
            numbers = [len(slim) - 1, *chosen]
        for i in numbers:
            # One width after the other: where programs are scheduled for memory, one
            # width at a time has its activations there.
            grads, held = jax.lax.optimization_barrier((grads, held))
            # Gradients at the parameters before the step, statistics one by one.
            own, held, loss = train.narrower(i, held, batch, teacher)
            grads = jax.tree.map(jnp.add, grads, own)
            losses.append(loss)
        updates, opt_state = tx.update(grads, opt_state, params)
        held = {**held, "params": optax.apply_updates(params, updates)}
        return JointState(held, opt_state, key), jnp.stack(losses)

    return step


def joint_state(
    slim: Slimmable, tx: optax.GradientTransformation, key: jax.Array
) -> JointState:
    """The state that joint training starts with.

    Args:
        slim: the network; its variables have a collection ``params``.
        tx: the optimiser.
        key: PRNG key, carried on.

    Raises:
        ValueError: if there is no collection ``params``.
    """
    if not isinstance(slim.variables, Mapping) or "params" not in slim.variables:
        raise ValueError(
            "joint training differentiates the collection 'params', which the "
            "variables do not have; wrap them: {'params': ...}"
        )
    # Copies: donating the state must not delete slim.variables.
    variables = jax.tree.map(jnp.array, dict(slim.variables))
    return JointState(variables, tx.init(variables["params"]), key)


def calibrate(
    slim: Slimmable,
    variables: PyTree,
    batches: Iterable[PyTree],
    *,
    collection: str = "batch_stats",
    **kwargs: PyTree,
) -> PyTree:
    """Measures the BatchNorm statistics of every width anew.

    Args:
        slim: the network, with the leaves of `collection` private.
        variables: of all widths.
        batches: inputs, see `jaxprune.recalibrate`; read once for every width.
        collection: where the running averages live.
        **kwargs: for `jaxprune.recalibrate`: how the function is called in training.

    Returns:
        Variables of all widths with new statistics.

    Raises:
        ValueError: if there are no statistics, or widths share them.

    References:
        Yu and Huang, `Universally Slimmable Networks and Improved Training Techniques
        <https://arxiv.org/abs/1903.05134>`_, 2019, Sec. 4.2
    """
    paths = [p for p in slim.groups.shapes if p.startswith(f"{collection}/")]
    shared = [path for path in paths if path not in slim.private]
    if shared or not paths:
        cause = f"all widths share {shared[0]}" if shared else "there are none"
        raise ValueError(
            f"every width needs statistics of its own in {collection!r}, but {cause}; "
            f"slimmable(..., private='{collection}/*')"
        )
    batches = list(batches)
    for i in range(len(slim)):
        alone = slim.at(i, variables)
        found = recalibrate(
            alone.apply_fn, alone.variables, batches, collection=collection, **kwargs
        )
        variables = slim.write(variables, i, {collection: found[collection]})
    return variables


class _WidthTrainer:
    """Gradients, new variables and loss of single widths."""

    def __init__(
        self,
        slim: Slimmable,
        forward: Forward,
        labels: Callable[[Any], jax.Array],
        teaching: tuple[float, float],
        track: bool,
    ) -> None:
        self._slim, self._forward, self._labels = slim, forward, labels
        self._teaching, self._track = teaching, track

    def widest(self, variables: PyTree, batch: PyTree) -> Any:
        """Of width 0, and its logits, which teach the others."""
        loss = lambda logits: label_loss(logits, self._labels(batch))  # noqa: E731
        grads, held, value, logits = self._of(0, variables, batch, loss)
        return grads, held, jax.lax.stop_gradient(logits), value

    def narrower(self, i: Any, variables: PyTree, batch: PyTree, teacher: Any) -> Any:
        """Of width i, which may be traced."""
        alpha, temperature = self._teaching

        def loss(logits: jax.Array) -> jax.Array:
            options = {"alpha": alpha, "temperature": temperature}
            return taught(logits, teacher, self._labels(batch), **options)

        def of(number: int) -> Callable[[PyTree], Any]:
            return lambda variables: self._of(number, variables, batch, loss)[:3]

        if isinstance(i, int):
            return of(i)(variables)
        between = [of(k) for k in range(1, len(self._slim) - 1)]
        return jax.lax.switch(i - 1, between, variables)

    def _of(
        self, i: int, variables: PyTree, batch: PyTree, loss: Callable[..., jax.Array]
    ) -> Any:
        def total(params: PyTree) -> Any:
            held = {**variables, "params": params}
            logits, new = self._forward(self._slim[i], held, batch)
            return loss(logits).mean(), (logits, new)

        (value, (logits, new)), grads = jax.value_and_grad(total, has_aux=True)(
            variables["params"]
        )
        if self._track and new:
            variables = self._slim.write(variables, i, new)
        return grads, variables, value, logits


def _check_sample(slim: Slimmable, sample: int | None) -> int:
    """How many widths between the widest and the narrowest a step draws."""
    if sample is None:
        return 0
    whole_number("sample", sample)
    if sample < 2 or (sample > 2 and len(slim) < 3):
        raise ValueError(
            f"sample={sample} of {len(slim)} widths: the sandwich rule trains the "
            "widest, the narrowest and others between; give 2 or more, and 3 widths or "
            "more to draw from"
        )
    return sample - 2
