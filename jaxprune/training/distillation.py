"""Losses of distillation: what a small network learns from a large one.

The teacher never gets a gradient: its side is stopped in every function. Results are
per example, so that they are weighted, masked and averaged as the task's loss is. A
teacher that is an average of the student is `jaxprune.training.ema_teacher`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxprune.core._types import Scalar
from jaxprune.training._hyperparameters import check


def soft_cross_entropy(
    student: jax.Array, teacher: jax.Array, *, temperature: float | jax.Array = 1.0
) -> jax.Array:
    r"""Cross-entropy of the student's logits against the teacher's, softened.

    .. math::
        T^2 \Big(- \sum_c \mathrm{softmax}(z_t / T)_c \,
        \log \mathrm{softmax}(z_s / T)_c \Big)

    :math:`T^2` keeps the size of gradients independent of the temperature. It differs
    from `kl_divergence` by the teacher's entropy, which has no gradient.

    Args:
        student: logits ``[..., classes]``.
        teacher: logits like them; they get no gradient.
        temperature: T, above 0.

    Returns:
        ``[...]``.

    Raises:
        ValueError: if the shapes differ or the temperature is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.zeros((1, 2))
        >>> soft_cross_entropy(logits, logits)  # log 2
        Array([0.693...], dtype=float32)

    References:
        Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network
        <https://arxiv.org/abs/1503.02531>`_, 2015
    """
    soft, logs, square = _softened(student, teacher, temperature)
    return square * -jnp.sum(soft * logs, -1)


def kl_divergence(
    student: jax.Array, teacher: jax.Array, *, temperature: float | jax.Array = 1.0
) -> jax.Array:
    r"""Divergence of the student's softened classes from the teacher's.

    .. math:: T^2 \, KL(\mathrm{softmax}(z_t / T) \, \| \, \mathrm{softmax}(z_s / T))

    Args:
        student: logits ``[..., classes]``.
        teacher: logits like them; they get no gradient.
        temperature: T, above 0.

    Returns:
        ``[...]``, 0 where both agree.

    Raises:
        ValueError: if the shapes differ or the temperature is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[1.0, 2.0]])
        >>> float(kl_divergence(logits, logits, temperature=3.0)[0])
        0.0

    References:
        Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network
        <https://arxiv.org/abs/1503.02531>`_, 2015
    """
    soft, logs, square = _softened(student, teacher, temperature)
    own = _softened(teacher, teacher, temperature)[1]
    return square * jnp.sum(soft * (jax.lax.stop_gradient(own) - logs), -1)


def in_place(
    logits: Sequence[jax.Array],
    labels: jax.Array,
    *,
    alpha: float | jax.Array = 1.0,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    r"""The loss of one network at several widths: the widest one teaches the others.

    .. math::
        CE(z_1, y) + \sum_{i > 1} \big( \alpha \, S_T(z_i, z_1)
        + (1 - \alpha) \, CE(z_i, y) \big)

    with `soft_cross_entropy` :math:`S_T`. The widest network learns from the labels
    alone: as a teacher it gets no gradient.

    Args:
        logits: ``[batch, classes]`` of every width, the widest first.
        labels: int ``[batch]``, or probabilities ``[batch, classes]``.
        alpha: share of the teacher, in [0, 1]. US-Net uses 1, SP-Net 0.9.
        temperature: of the teacher's share, above 0.

    Returns:
        ``[batch]``, the sum over the widths.

    Raises:
        ValueError: if there are no logits, shapes differ, or a number is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> wide, narrow = jnp.array([[4.0, 0.0]]), jnp.array([[0.0, 0.0]])
        >>> in_place([wide, narrow], jnp.array([0]))  # log(1 + exp(-4)) + log(2)
        Array([0.711...], dtype=float32)

    References:
        Yu and Huang, `Universally Slimmable Networks and Improved Training Techniques
        <https://arxiv.org/abs/1903.05134>`_, ICCV 2019
    """
    check("alpha", alpha)
    if not logits:
        raise ValueError("logits must hold one array per width, the widest first")
    widest, *others = logits
    loss = label_loss(widest, labels)
    for narrow in others:
        options = {"alpha": alpha, "temperature": temperature}
        loss = loss + taught(narrow, widest, labels, **options)
    return loss


def taught(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    *,
    alpha: float | jax.Array = 0.9,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    r"""The loss of a network that learns from a teacher and from labels.

    .. math:: \alpha \, S_T(z_s, z_t) + (1 - \alpha) \, CE(z_s, y)

    with `soft_cross_entropy` :math:`S_T`.

    Args:
        student: logits ``[batch, classes]``.
        teacher: logits like them; they get no gradient.
        labels: int ``[batch]``, or probabilities ``[batch, classes]``.
        alpha: share of the teacher, in [0, 1].
        temperature: of the teacher's share, above 0.

    Returns:
        ``[batch]``.

    Raises:
        ValueError: if the shapes differ or a number is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.zeros((1, 2))
        >>> taught(logits, logits, jnp.array([0]))  # log 2, whatever the share
        Array([0.693...], dtype=float32)
    """
    check("alpha", alpha)
    soft = soft_cross_entropy(student, teacher, temperature=temperature)
    return alpha * soft + (1 - alpha) * label_loss(student, labels)


def block_wise(
    student: Sequence[jax.Array],
    teacher: Sequence[jax.Array],
    projections: Sequence[jax.Array | None] | None = None,
) -> jax.Array:
    r"""Mean squared differences of the outputs of blocks, averaged over the blocks.

    .. math::
        \frac{1}{B} \sum_b \mathrm{mean} \big( (a_b M_b - t_b)^2 \big)

    Args:
        student: outputs :math:`a_b` ``[batch, ..., channels]`` of the blocks.
        teacher: outputs :math:`t_b` of the same blocks; they get no gradient.
        projections: :math:`M_b` ``[channels, channels of the teacher]`` of every block,
            linear maps without bias that are trained along; None, or None for a block,
            where the widths agree.

    Returns:
        ``[batch]``. The authors weight it by 20 to 30.

    Raises:
        ValueError: if numbers of blocks or shapes do not fit, naming the block.

    Example:
        >>> import jax.numpy as jnp
        >>> small, large = jnp.ones((1, 1)), jnp.array([[1.0, 3.0]])
        >>> block_wise([small], [large], [jnp.ones((1, 2))])  # (0 + 4) / 2
        Array([2.], dtype=float32)

    References:
        Aflalo et al., `Knapsack Pruning with Inner Distillation
        <https://arxiv.org/abs/2002.08258>`_, 2020
    """
    maps = [None] * len(student) if projections is None else list(projections)
    if not student or not len(student) == len(teacher) == len(maps):
        raise ValueError(
            f"need the same number of blocks, one or more, got {len(student)} of the "
            f"student, {len(teacher)} of the teacher, {len(maps)} projections"
        )
    losses = []
    for block, (a, t, m) in enumerate(zip(student, teacher, maps, strict=True)):
        if m is not None:
            _check_projection(block, a, m)
            a = a @ m
        if a.shape != t.shape:
            raise ValueError(
                f"block {block}: the student gives {a.shape}, the teacher {t.shape}; "
                "do the widths differ (give a projection [channels, channels])?"
            )
        gap = jnp.square(a - jax.lax.stop_gradient(t).astype(a.dtype))
        losses.append(gap.mean(tuple(range(1, gap.ndim))))
    return sum(losses[1:], losses[0]) / len(losses)


def _check_projection(block: int, a: jax.Array, m: jax.Array) -> None:
    if m.ndim != 2 or m.shape[0] != a.shape[-1]:
        raise ValueError(
            f"block {block}: a projection of shape {m.shape} does not map the "
            f"{a.shape[-1]} channels of the student"
        )


def _softened(
    student: jax.Array, teacher: jax.Array, temperature: Scalar
) -> tuple[jax.Array, jax.Array, jax.Array]:
    check("temperature", temperature)
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have shape {student.shape}, the teacher's "
            f"{teacher.shape}; do both see the same batch and classes?"
        )
    t = jnp.asarray(temperature, student.dtype)
    teacher = jax.lax.stop_gradient(teacher).astype(student.dtype)
    return jax.nn.softmax(teacher / t), jax.nn.log_softmax(student / t), t * t


def label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy against labels, or probabilities, of every example.

    Args:
        logits: ``[batch, classes]``.
        labels: int ``[batch]``, or probabilities ``[batch, classes]``.

    Returns:
        ``[batch]``.

    Example:
        >>> import jax.numpy as jnp
        >>> label_loss(jnp.zeros((1, 2)), jnp.array([0]))
        Array([0.693...], dtype=float32)
    """
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.losses.softmax_cross_entropy(logits, labels)
