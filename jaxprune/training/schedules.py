"""Schedules of sparsity, and of what else changes while a network is pruned.

Each is an `optax.Schedule`: a function from a step, or an array of steps, of any
integer dtype to values, jit-able. `start` is the first step of the ramp and `end` the
step from which the last value holds. The plain ramps are optax's; what is added here is
that pruning moves in steps: with a frequency f the value changes at `start`,
`start` + f, ... only, so that all weights of one round face the same value.

Drop fractions of RigL need nothing of their own: `optax.cosine_decay_schedule`.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxprune.training._hyperparameters import is_whole


def one_shot(sparsity: float, at: int = 0) -> optax.Schedule:
    """Nothing, then everything.

    Args:
        sparsity: fraction removed from step `at` on, in [0, 1].
        at: the step.

    Returns:
        Schedule of sparsities.

    Raises:
        ValueError: if the sparsity is no fraction.

    Example:
        >>> schedule = one_shot(0.5, at=10)
        >>> float(schedule(9)), float(schedule(10))
        (0.0, 0.5)
    """
    _check_fraction("sparsity", sparsity)
    _check_steps(at=at)
    return lambda count: jnp.where(_steps(count) >= at, jnp.float32(sparsity), 0.0)


def linear(
    sparsity: float, *, start: int, end: int, initial: float = 0.0, frequency: int = 1
) -> optax.Schedule:
    """A straight ramp.

    Args:
        sparsity: fraction removed from step `end` on, in [0, 1].
        start: first step of the ramp.
        end: last step of the ramp.
        initial: fraction removed up to `start`, in [0, 1].
        frequency: steps between two changes.

    Returns:
        Schedule of sparsities.

    Raises:
        ValueError: if a fraction or the order of the steps is wrong.

    Example:
        >>> schedule = linear(0.8, start=0, end=100, frequency=25)
        >>> [round(float(schedule(step)), 2) for step in (24, 25, 60, 100)]
        [0.0, 0.2, 0.4, 0.8]
    """
    return _polynomial(sparsity, start, end, initial, frequency, power=1)


def cubic(
    sparsity: float, *, start: int, end: int, initial: float = 0.0, frequency: int = 1
) -> optax.Schedule:
    r"""Fast at first, while there is much to remove, slow at the end.

    .. math::
        s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

    for t in {t0, t0 + frequency, ...}, constant in between.

    Args:
        sparsity: :math:`s_f`, fraction removed from step `end` on, in [0, 1].
        start: :math:`t_0`, first step of the ramp.
        end: :math:`t_1`, last step of the ramp.
        initial: :math:`s_i`, fraction removed up to `start`, in [0, 1].
        frequency: steps between two changes.

    Returns:
        Schedule of sparsities.

    Raises:
        ValueError: if a fraction or the order of the steps is wrong.

    Example:
        >>> schedule = cubic(0.8, start=0, end=100)
        >>> [round(float(schedule(step)), 3) for step in (0, 50, 100, 200)]
        [0.0, 0.7, 0.8, 0.8]

    References:
        Zhu, Gupta, `To Prune, or Not to Prune: Exploring the Efficacy of Pruning for
        Model Compression <https://arxiv.org/abs/1710.01878>`_, 2017
    """
    return _polynomial(sparsity, start, end, initial, frequency, power=3)


def geometric(
    sparsity: float, *, start: int, end: int, initial: float = 0.0, frequency: int = 1
) -> optax.Schedule:
    r"""The same fraction of what is left, every time.

    .. math::
        1 - s_t = (1 - s_i) \left(\frac{1 - s_f}{1 - s_i}\right)^{(t - t_0)/(t_1 - t_0)}

    With n changes from `start` to `end` each removes
    :math:`1 - ((1 - s_f) / (1 - s_i))^{1/n}` of the remaining weights: the rounds of
    iterative magnitude pruning.

    Args:
        sparsity: :math:`s_f`, fraction removed from step `end` on, in [0, 1).
        start: :math:`t_0`, first step of the ramp.
        end: :math:`t_1`, last step of the ramp.
        initial: :math:`s_i`, fraction removed up to `start`, in [0, 1).
        frequency: steps between two changes.

    Returns:
        Schedule of sparsities.

    Raises:
        ValueError: if a fraction or the order of the steps is wrong.

    Example:
        >>> schedule = geometric(0.488, start=0, end=3)  # a fifth of the rest, thrice
        >>> [round(float(schedule(step)), 3) for step in range(4)]
        [0.0, 0.2, 0.36, 0.488]

    References:
        Han, Pool, Tran, Dally, `Learning both Weights and Connections for Efficient
        Neural Networks <https://arxiv.org/abs/1506.02626>`_, 2015
    """
    _check_ramp(sparsity, start, end, initial, frequency)
    if sparsity == 1 or initial == 1:
        raise ValueError("a geometric ramp never removes everything: sparsity below 1")
    ratio = (1 - sparsity) / (1 - initial)

    def schedule(count: ArrayLike) -> jax.Array:
        steps = _staircase(count, start, end, frequency)
        ramp = 1 - (1 - initial) * ratio ** (steps / max(end - start, 1))
        return jnp.where(_steps(count) >= end, jnp.float32(sparsity), ramp)

    return schedule


def narang(
    threshold: float,
    *,
    start: int,
    ramp: int,
    end: int,
    frequency: int = 100,
    steepening: float = 1.5,
) -> optax.Schedule:
    r"""A threshold of two slopes, for weights that still grow while they are pruned.

    .. math::
        \epsilon_t = \begin{cases}
        \theta (t - start + 1) / frequency & t < ramp \\
        (\theta (ramp - start + 1) + \phi (t - ramp + 1)) / frequency & t \ge ramp
        \end{cases} \qquad
        \theta = \frac{2 q \, frequency}{2 (ramp - start) + 3 (end - ramp)}

    at t in {start, start + frequency, ...}, zero before, constant in between and from
    `end` on. With :math:`\phi = 1.5 \theta` the last value is q, apart from the ones
    in the formula: :math:`q (1 + 5 / (2 (ramp - start) + 3 (end - ramp)))`.

    Args:
        threshold: q, the magnitude below which weights are meant to go; the authors
            take the 90th percentile of ``|w|`` in a trained dense model.
        start: first step; the authors start in the second epoch.
        ramp: step from which the slope is steeper; about a quarter of training.
        end: last step; about half of training.
        frequency: steps between two changes.
        steepening: :math:`\phi / \theta`, the second slope in units of the first;
            the authors use 1.5 to 2.

    Returns:
        Schedule of thresholds on ``|w|``, not of sparsities.

    Raises:
        ValueError: if `threshold` or `steepening` is negative or the order of the
            steps is wrong.

    Example:
        >>> schedule = narang(0.1, start=0, ramp=4000, end=8000)
        >>> [round(float(schedule(step)), 3) for step in (4000, 8000, 9000)]
        [0.04, 0.1, 0.1]

    References:
        Narang, Elsen, Diamos, Sengupta, `Exploring Sparsity in Recurrent Neural
        Networks <https://arxiv.org/abs/1704.05119>`_, 2017
    """
    _check_steps(start=start, ramp=ramp, end=end, frequency=frequency)
    if not start <= ramp <= end or start == end or frequency < 1:
        raise ValueError(
            f"steps must be in order and one frequency apart: {start=}, {ramp=}, "
            f"{end=}, {frequency=}"
        )
    _check_not_negative(threshold=threshold, steepening=steepening)
    slope = 2 * threshold / (2 * (ramp - start) + 3 * (end - ramp))

    def schedule(count: ArrayLike) -> jax.Array:
        steps = (_staircase(count, start, end, frequency) + start).astype(jnp.float32)
        flat = slope * (jnp.minimum(steps, ramp) - start + 1)
        steep = slope * steepening * (steps - ramp + 1)
        value = flat + jnp.where(steps >= ramp, steep, 0.0)
        return jnp.where(_steps(count) < start, 0.0, value)

    return schedule


def cyclic(parts: int, *, every: int, rounds: int | None = None) -> optax.Schedule:
    """Takes turns: which of several parts is at work.

    Args:
        parts: how many there are; 1 or more.
        every: steps of one turn.
        rounds: how often all parts have their turn; None for ever.

    Returns:
        Schedule of int32 indices, 0 to `parts` - 1; -1 after the last round.

    Raises:
        ValueError: if a number is below 1.

    Example:
        >>> schedule = cyclic(2, every=10, rounds=1)
        >>> [int(schedule(step)) for step in (0, 9, 10, 20)]
        [0, 0, 1, -1]

    References:
        Ma et al., `Effective Model Sparsification by Scheduled Grow-and-Prune Methods
        <https://arxiv.org/abs/2106.09857>`_, ICLR 2022
    """
    _check_steps(parts=parts, every=every, rounds=1 if rounds is None else rounds)
    if parts < 1 or every < 1 or (rounds is not None and rounds < 1):
        raise ValueError(f"must all be at least 1: {parts=}, {every=}, {rounds=}")

    def schedule(count: ArrayLike) -> jax.Array:
        turn = _steps(count) // every
        if rounds is None:
            return turn % parts
        return jnp.where(turn < rounds * parts, turn % parts, -1)

    return schedule


def inverse_decay(
    rate: float, power: float = 1.0, *, stop: int | None = None
) -> optax.Schedule:
    r"""The probability of a refresh in dynamic network surgery.

    .. math:: p_t = (1 + rate \cdot t)^{-power}

    Args:
        rate: how fast it falls; 0 keeps it at 1.
        power: exponent, 0 or more.
        stop: step from which it is 0; None for never. With the authors' setting for
            LeNet (rate 1e-4, power 1, stop 14000) it is still 0.42 there.

    Returns:
        Schedule of probabilities.

    Raises:
        ValueError: if `rate` or `power` is negative.

    Example:
        >>> schedule = inverse_decay(1e-4, stop=14_000)
        >>> [round(float(schedule(step)), 2) for step in (0, 13_999, 14_000)]
        [1.0, 0.42, 0.0]

    References:
        Guo, Yao, Chen, `Dynamic Network Surgery for Efficient DNNs
        <https://arxiv.org/abs/1608.04493>`_, NIPS 2016
    """
    _check_not_negative(rate=rate, power=power)
    if stop is not None:
        _check_steps(stop=stop)

    def schedule(count: ArrayLike) -> jax.Array:
        steps = _steps(count)
        value = (1 + rate * steps.astype(jnp.float32)) ** (-power)
        return value if stop is None else jnp.where(steps < stop, value, 0.0)

    return schedule


def _polynomial(
    sparsity: float, start: int, end: int, initial: float, frequency: int, power: int
) -> optax.Schedule:
    _check_ramp(sparsity, start, end, initial, frequency)
    ramp = optax.polynomial_schedule(initial, sparsity, power, max(end - start, 1))

    def schedule(count: ArrayLike) -> jax.Array:
        steps = _staircase(count, start, end, frequency)
        # A quotient may round below 1, and the target would be missed by a hair.
        return jnp.where(_steps(count) >= end, jnp.float32(sparsity), ramp(steps))

    return schedule


def _steps(count: ArrayLike) -> jax.Array:
    """As signed integers: differences of small or unsigned counts would wrap around."""
    count = jnp.asarray(count)
    return count.astype(jnp.int64 if count.dtype.itemsize > 4 else jnp.int32)


def _staircase(count: ArrayLike, start: int, end: int, frequency: int) -> jax.Array:
    """Steps since `start`, rounded down to the frequency; `end` is always reached."""
    steps = jnp.maximum(_steps(count) - start, 0)
    return jnp.where(steps >= end - start, end - start, steps // frequency * frequency)


def _check_ramp(
    sparsity: float, start: int, end: int, initial: float, frequency: int
) -> None:
    _check_fraction("sparsity", sparsity)
    _check_fraction("initial", initial)
    _check_steps(start=start, end=end, frequency=frequency)
    if start > end or frequency < 1:
        raise ValueError(
            f"need start <= end and frequency >= 1: {start=}, {end=}, {frequency=}"
        )


def _check_steps(**steps: int) -> None:
    for name, step in steps.items():
        if not is_whole(step):
            raise ValueError(f"{name} must be a whole number, got {step!r}")


def _check_not_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must not be negative, and finite, got {number}")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a fraction in [0, 1], got {value}")
