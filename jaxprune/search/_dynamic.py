"""Dynamic slimmable networks: the width of every example is chosen from its input."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._types import PyTree
from jaxprune.search._slimmable import Slimmable
from jaxprune.training._hyperparameters import check
from jaxprune.training.distillation import label_loss, soft_cross_entropy


def ensemble_bootstrapping(
    logits: Sequence[jax.Array],
    teachers: Sequence[jax.Array],
    labels: jax.Array,
) -> jax.Array:
    r"""The loss of in-place ensemble bootstrapping.

    .. math::
        CE(z_0, y) + \sum_{0 < i < n} S(z_i, \bar z_0)
        + S \Big( z_n, \log \tfrac{1}{n} \sum_{i < n} \mathrm{softmax}(\bar z_i) \Big)

    The widest network learns from the labels, those between from its moving average,
    the narrowest from the ensemble of the moving averages of all wider ones.

    Args:
        logits: ``[batch, classes]`` of every width, the widest first.
        teachers: of the moving average (`jaxprune.training.ema_teacher`) at every
            width but the narrowest; they get no gradient.
        labels: int ``[batch]``, or probabilities ``[batch, classes]``.

    Returns:
        ``[batch]``, the sum over the widths.

    Raises:
        ValueError: if there are not as many teachers as widths but one.

    Example:
        >>> import jax.numpy as jnp
        >>> z = jnp.zeros((1, 2))
        >>> ensemble_bootstrapping([z, z], [z], jnp.array([0]))  # 2 log 2
        Array([1.386...], dtype=float32)

    References:
        Li et al., `Dynamic Slimmable Network <https://arxiv.org/abs/2103.13258>`_, 2021
    """
    if len(logits) < 2 or len(teachers) != len(logits) - 1:
        raise ValueError(
            f"{len(logits)} widths need {max(len(logits) - 1, 1)} teachers, one for "
            f"every width but the narrowest; got {len(teachers)}"
        )
    widest, *between, narrowest = logits
    loss = label_loss(widest, labels)
    for each in between:
        loss = loss + soft_cross_entropy(each, teachers[0])
    ensemble = sum(jax.nn.softmax(each) for each in teachers) / len(teachers)
    return loss + soft_cross_entropy(narrowest, jnp.log(ensemble + 1e-12))


def gumbel_gate(
    key: jax.Array, logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """One width for every example, drawn by Gumbel-softmax, straight through.

    Args:
        key: PRNG key, consumed.
        logits: of the gate, ``[batch, widths]``.
        temperature: above 0.

    Returns:
        One-hot ``[batch, widths]``, with the gradient of the softmax.

    Raises:
        ValueError: if the temperature is not above 0.

    Example:
        >>> gumbel_gate(jax.random.key(0), jnp.array([[0.0, 99.0]]))
        Array([[0., 1.]], dtype=float32)

    References:
        Jang, Gu, Poole, `Categorical Reparameterization with Gumbel-Softmax
        <https://arxiv.org/abs/1611.01144>`_, 2016
    """
    check("temperature", temperature)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    soft = jax.nn.softmax((logits + noise) / temperature)
    hard = jax.nn.one_hot(soft.argmax(-1), logits.shape[-1], dtype=logits.dtype)
    return hard + soft - jax.lax.stop_gradient(soft)


def gate_loss(
    logits: jax.Array,
    choice: jax.Array,
    right: jax.Array,
    costs: jax.Array,
    *,
    strength: float = 0.5,
) -> jax.Array:
    r"""Sandwich gate sparsification: easy examples to the narrowest width.

    .. math:: CE(g, t) + strength \cdot \Big( \sum_i c_i \, costs_i \Big)^2

    with the target t the narrowest width where that classifies the example rightly,
    else the widest.

    Args:
        logits: g, of the gate, ``[batch, widths]``, the widest first.
        choice: c, what `gumbel_gate` drew.
        right: bool ``[batch]``: does the narrowest width classify it rightly?
        costs: of every width, ``[widths]``, such as GFLOPs.
        strength: of the penalty of cost.

    Returns:
        ``[batch]``.

    References:
        Li et al., `DS-Net++ <https://arxiv.org/abs/2109.10060>`_, 2021
    """
    target = jnp.where(right, logits.shape[-1] - 1, 0)
    spent = choice @ costs.astype(choice.dtype)
    return label_loss(logits, target) + strength * jnp.square(spent)


def run_by_width(
    slim: Slimmable, *, least: int = 8
) -> Callable[[PyTree, Any, jax.Array], jax.Array]:
    """Runs every example of a batch at the width chosen for it, and saves the time.

    Under one jit examples of different widths cost as much as the widest. Here the
    examples of a width are gathered on the host into a bucket of their own, padded to
    a power of two, so that few shapes are compiled, and run together.

    Args:
        slim: the network; it maps ``[batch, ...]`` to one array ``[batch, ...]``,
            every example by itself.
        least: the smallest bucket.

    Returns:
        ``(variables, inputs, widths) -> outputs`` for inputs ``[batch, ...]`` and int
        ``[batch]`` numbers of widths; not for jit.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> mlp = lambda params, x: x @ params["w1"] @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 2)), "w2": jnp.ones((2, 1))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> slim = jaxprune.slimmable(mlp, params, [{"w1:1": 2}, {"w1:1": 1}],
        ...                           groups=groups)
        >>> run_by_width(slim)(slim.variables, jnp.ones((3, 1)), [1, 0, 1])
        Array([[1.],
               [2.],
               [1.]], dtype=float32)

    References:
        Li et al., `DS-Net++ <https://arxiv.org/abs/2109.10060>`_, 2021
    """
    runs = [jax.jit(run) for run in slim]

    def run(variables: PyTree, inputs: PyTree, widths: object) -> jax.Array:
        chosen, inputs = np.asarray(widths), np.asarray(inputs)
        if not np.issubdtype(chosen.dtype, np.integer):
            raise TypeError(
                f"widths must be whole numbers of widths, got {chosen.dtype}; the "
                "argmax of a gate's logits, not the logits?"
            )
        if chosen.shape != inputs.shape[:1] or not len(chosen):
            raise ValueError(
                f"widths have shape {chosen.shape}, expected one for each of the "
                f"{len(inputs)} examples"
            )
        rows, parts = [], []
        for number in np.unique(chosen):
            slim[int(number)]  # raises where there is no such width
            own = np.flatnonzero(chosen == number)
            size = max(least, 1 << (len(own) - 1).bit_length())
            padded = np.resize(own, size)
            out = runs[int(number)](variables, inputs[padded])
            rows.append(own)
            parts.append(out[: len(own)])
        back = np.argsort(np.concatenate(rows))
        return jnp.concatenate(parts)[back]

    return run
