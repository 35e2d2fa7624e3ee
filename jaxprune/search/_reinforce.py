"""Learning from trials: the reward of a cut, and the gradient of its expectation."""

from typing import Literal

import jax
import jax.numpy as jnp

Advantage = Literal["mean", "leave_one_out"]


def reward(
    metric: jax.Array | float,
    kept: jax.Array | int,
    size: int,
    *,
    baseline: jax.Array | float,
    drop_bound: float,
) -> jax.Array:
    r"""What a cut is worth: its accuracy times its savings.

    .. math:: R = \frac{b - (p^* - p)}{b} \; \log \frac{N}{C}

    It is 0 where nothing is cut and where the drop :math:`p^* - p` is the bound b,
    below 0 beyond it (the more is cut, the lower), and above the logarithm where the
    cut is better than the baseline.

    Args:
        metric: p of the smaller net, larger is better.
        kept: C, how many units stay, at least 1.
        size: N, how many units there were.
        baseline: :math:`p^*`.
        drop_bound: b, in the units of the metric, above 0.

    Returns:
        float32, broadcast over `metric` and `kept`.

    Raises:
        ValueError: if `drop_bound` is 0 or below.

    Example:
        >>> float(reward(90.0, 25, 100, baseline=91.0, drop_bound=2.0))  # log(4) / 2
        0.693...

    References:
        Huang et al., `Learning to Prune Filters in Convolutional Neural Networks
        <https://arxiv.org/abs/1801.07365>`_, WACV 2018
    """
    check_drop_bound(drop_bound)
    metric = jnp.asarray(metric, jnp.float32)
    drop = jnp.asarray(baseline, jnp.float32) - metric
    bound = jnp.float32(drop_bound)
    share = jnp.asarray(kept).astype(jnp.float32) / jnp.float32(size)
    return (bound - drop) / bound * -jnp.log(share)


def check_drop_bound(drop_bound: float) -> None:
    """Raises unless a drop is allowed at all."""
    if not drop_bound > 0:
        raise ValueError(
            f"drop_bound must be above 0, got {drop_bound}: it is how much the metric "
            "may fall, in its own units (such as points of accuracy); a bound of 0 "
            "rewards no cut"
        )


def advantages(rewards: jax.Array, form: Advantage = "mean") -> jax.Array:
    r"""Rewards less what is to be expected: float ``[M]``.

    "mean" takes the mean of all M rewards away, as published, which scales the expected
    gradient by (M - 1) / M; "leave_one_out" that of the other M - 1, which does not.

    Raises:
        ValueError: if the form is unknown, or for "leave_one_out" of a single reward.

    Example:
        >>> advantages(jnp.array([1.0, 2.0, 6.0]))
        Array([-2., -1.,  3.], dtype=float32)
        >>> advantages(jnp.array([1.0, 2.0, 6.0]), "leave_one_out")
        Array([-3. , -1.5,  4.5], dtype=float32)
    """
    centred = rewards - rewards.mean()
    if form == "mean":
        return centred
    if form != "leave_one_out":
        raise ValueError(f"advantage must be 'mean' or 'leave_one_out', got {form!r}")
    count = len(rewards)
    if count < 2:
        raise ValueError(
            "advantage='leave_one_out' compares candidates: give 2 or more"
        )
    return centred * (count / (count - 1))


def log_probability(logits: jax.Array, actions: jax.Array) -> jax.Array:
    """Of independent decisions: bool ``[..., units]`` to float ``[...]``."""
    stay, leave = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return jnp.where(actions, stay, leave).sum(-1)


def surrogate(
    logits: jax.Array, actions: jax.Array, rewards: jax.Array, form: Advantage = "mean"
) -> jax.Array:
    r"""A number whose gradient estimates that of the expected reward (REINFORCE).

    .. math:: \frac{1}{M} \sum_j \hat R_j \, \nabla \log \pi(A_j)

    Args:
        logits: log-odds that every unit stays, ``[units]``.
        actions: bool ``[M, units]``, drawn with these odds.
        rewards: ``[M]``.
        form: as for `advantages`.

    References:
        Williams, `Simple Statistical Gradient-Following Algorithms for Connectionist
        Reinforcement Learning <https://doi.org/10.1007/BF00992696>`_, 1992
    """
    weights = jax.lax.stop_gradient(advantages(rewards, form))
    return jnp.mean(weights * log_probability(logits, actions))


def repaired(actions: jax.Array, logits: jax.Array) -> jax.Array:
    """Decisions after which a unit is left: where none is, the likeliest stays.

    Args:
        actions: bool ``[..., units]``.
        logits: ``[units]``.
    """
    likeliest = jnp.arange(logits.shape[0]) == jnp.argmax(logits)
    none = ~actions.any(-1, keepdims=True)
    likeliest = likeliest.reshape((1,) * (actions.ndim - 1) + likeliest.shape)
    return actions | (none & likeliest)
