"""Provable pruning: how many units an error allows, and sampling them.

Units are drawn by their sensitivity s (`jaxprune.scores.empirical_sensitivity`), m
times with replacement; whoever reads a unit that was drawn n times reads it times
n / (m p). That is what the layer made on average, and with m draws enough its outputs
are within a relative error with high probability. So one error for the whole network
says how many units every group keeps: few where few matter.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.core._checks import concrete_array, finite
from jaxprune.core._groups import Groups
from jaxprune.costing import Cost
from jaxprune.select._bisection import ends
from jaxprune.select._units import to_sizes

# Bounds of log10 of draws per sensitivity: from one draw to every unit, however rare.
LEVELS = (-6.0, 30.0)
_MOST = 2**62  # draws; a unit that is rarer is never met


def distribution(sensitivities: object) -> np.ndarray:
    """The probabilities of sampling: sensitivities over their sum.

    Args:
        sensitivities: ``[size]``, not negative. If all are 0, all are alike.

    Returns:
        float64 ``[size]``, adding up to 1.

    Raises:
        ValueError: if one is negative or not finite.

    Example:
        >>> distribution([0.5, 0.5, 1.0])
        array([0.25, 0.25, 0.5 ])
    """
    found = np.asarray(sensitivities, np.float64)
    if not np.isfinite(found).all() or (found < 0).any():
        raise ValueError(f"sensitivities must be finite and not negative, got {found}")
    total = found.sum()
    return found / total if total else np.full(found.shape, 1 / found.size)


def sample_complexity(
    total: float,
    error: float,
    *,
    delta: float = 1e-16,
    outputs: int = 1,
    constant: float = 3.0,
) -> int:
    r"""How many draws keep the relative error of every output below a bound.

    .. math:: m = \lceil (6 + 2 \epsilon) S K \log(4 \eta / \delta) / \epsilon^2 \rceil

    Args:
        total: S, the sum of the sensitivities of a group.
        error: the relative error, above 0.
        delta: the probability that some output is further off.
        outputs: how many outputs, over all examples, the bound is to hold for.
        constant: K, by how much a sensitivity on new examples may exceed the empirical
            one; 1 for the examples that it was taken on.

    Example:
        >>> sample_complexity(11.2, 0.5, delta=0.05, outputs=320, constant=1.0)
        3184

    References:
        Liebenwein et al., `Provable Filter Pruning
        <https://arxiv.org/abs/1911.07412>`_, ICLR 2020
    """
    if not error > 0:
        raise ValueError(f"error must be above 0, got {error}")
    factor = confidence(delta, outputs, constant)
    return max(1, math.ceil((6 + 2 * error) * total * factor / error**2))


def error_bound(
    total: float,
    draws: float,
    *,
    delta: float = 1e-16,
    outputs: int = 1,
    constant: float = 3.0,
) -> float:
    r"""The inverse of `sample_complexity`: the relative error after so many draws.

    .. math:: \epsilon = \frac{A + \sqrt{A^2 + 6 A m}}{m}, \quad
        A = S K \log(4 \eta / \delta)

    Args:
        total: S, the sum of the sensitivities of a group.
        draws: m.
        delta: the probability that some output is further off.
        outputs: see `sample_complexity`.
        constant: see `sample_complexity`.

    Example:
        >>> settings = {"delta": 0.05, "outputs": 320, "constant": 1.0}
        >>> round(error_bound(11.2, 3184, **settings), 4)
        0.4999
    """
    a = total * confidence(delta, outputs, constant)
    return (a + math.sqrt(a * a + 6 * a * draws)) / draws


def confidence(delta: float, outputs: int = 1, constant: float = 3.0) -> float:
    """What a probability of failure costs: K log(4 outputs / delta).

    Example:
        >>> round(confidence(0.05, 320, 1.0), 2)
        10.15
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must be a probability between 0 and 1, got {delta}")
    return constant * math.log(4 * outputs / delta)


def expected_unique(probabilities: object, draws: float) -> float:
    """How many different units so many draws meet on average: sum of 1 - (1 - p)^m.

    Example:
        >>> expected_unique([0.5, 0.5], 2)
        1.5
    """
    p = np.asarray(probabilities, np.float64)
    with np.errstate(divide="ignore"):
        # 1 - (1 - p)^m = -expm1(m log1p(-p)): no digits are lost where p is small.
        return float(-np.expm1(draws * np.log1p(-np.minimum(p, 1.0))).sum())


def draws_for(probabilities: object, unique: int) -> int:
    """The fewest draws that are expected to meet so many units, rounded up.

    Units of probability 0 are never met, so there are at most as many as others.

    Example:
        >>> draws_for([0.5, 0.5], 2)
        2
    """
    p = np.asarray(probabilities, np.float64)
    wanted = min(unique, int((p > 0).sum()))
    high = 1
    while _unique(p, high) < wanted and high < _MOST:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _unique(p, middle) >= wanted else (middle, high)
    return high


def _unique(p: np.ndarray, draws: float) -> int:
    # Rounding must not count one unit more than there are.
    return math.ceil(expected_unique(p, draws) - 1e-9)


def width(sensitivities: Any, density: float) -> int:
    """How many units stay if `density` times the sum of sensitivities are drawn."""
    p = distribution(sensitivities)
    draws = max(1.0, np.ceil(density * float(np.sum(sensitivities))))
    return min(max(1, _unique(p, draws)), len(p))


class Allocation(NamedTuple):
    """How many units every group keeps.

    Attributes:
        sizes: group name -> how many units stay.
        draws: group name -> how many draws that is.
        error: the relative error that is guaranteed to every group.
    """

    sizes: dict[str, int]
    draws: dict[str, int]
    error: float


def allocate(
    groups: Groups,
    sensitivities: Mapping[str, Any],
    cost: Cost,
    *,
    budget: float,
    delta: float = 1e-16,
    outputs: int = 1,
    constant: float = 3.0,
) -> Allocation:
    """The smallest error, one for all groups, whose widths are within a budget.

    Every group keeps the units that as many draws as the error needs are expected to
    meet. The error is found by bisection; more of it leaves fewer units everywhere.

    Args:
        groups: what `trace` returned.
        sensitivities: group name -> float ``[size]`` in [0, 1]; groups that are not
            named stay whole.
        cost: what is to be spent: ``cost_model(...).flops`` and the like.
        budget: the highest cost allowed.
        delta: see `sample_complexity`; with the next two it changes the error that is
            reported, not the widths.
        outputs: see `sample_complexity`.
        constant: see `sample_complexity`.

    Returns:
        `Allocation`. ``select.to_sizes(groups, sensitivities, sizes)`` keeps the most
        sensitive units, `draw` samples them.

    Raises:
        ValueError: if the budget is below what one unit of every group costs.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["b"]).sum()
        >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 8))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 4)))
        >>> cost = jaxprune.cost_model(mlp, params, jnp.ones((1, 4)), groups=groups)
        >>> s = {"a:1": np.r_[1.0, np.full(7, 0.01)], "b:1": np.ones(8)}
        >>> found = allocate(groups, s, cost.parameters, budget=48)
        >>> found.sizes
        {'a:1': 4, 'b:1': 8}

    References:
        Liebenwein et al., `Provable Filter Pruning
        <https://arxiv.org/abs/1911.07412>`_, ICLR 2020, Sec. 5
    """
    known = {
        name: concrete_array(f"sensitivities[{name}]", own)
        for name, own in sensitivities.items()
    }

    def widths(level: float) -> dict[str, int]:
        return {
            name: _in_blocks(width(own, 10.0**level), groups[name].blocks)
            for name, own in known.items()
        }

    sizes = ends(widths, cost, finite("budget", budget), *LEVELS)[0]
    # Of what a group keeps follows what was drawn; the fewest per sensitivity tell.
    draws = {n: draws_for(distribution(known[n]), size) for n, size in sizes.items()}
    factor = {"delta": delta, "outputs": outputs, "constant": constant}
    errors = [
        error_bound(float(known[n].sum()), draws[n], **factor)
        for n in sizes
        if sizes[n] < len(known[n]) and known[n].any()
    ]
    return Allocation(sizes, draws, max(errors, default=0.0))


def _in_blocks(count: int, blocks: int) -> int:
    return -(-count // blocks) * blocks


class Draw(NamedTuple):
    """Units that were sampled.

    Attributes:
        keep: group name -> bool ``[size]``, True = kept.
        factors: group name -> float64 ``[size]``, what those that read a unit are to be
            multiplied with (`jaxprune.surgery.scale_units`); 0 where it is gone.
    """

    keep: dict[str, np.ndarray]
    factors: dict[str, np.ndarray]


def draw(
    groups: Groups,
    sensitivities: Mapping[str, Any],
    sizes: Mapping[str, int],
    key: jax.Array,
    *,
    partly: bool = False,
) -> Draw:
    """Samples units by their sensitivities; on average the layers make what they made.

    As many draws are made as are expected to meet `sizes` different units, so the
    number of units that stay varies.

    Args:
        groups: what `trace` returned.
        sensitivities: group name -> float ``[size]``, not negative.
        sizes: group name -> how many units to keep on average; 1 to the group's size.
        key: random key, consumed.
        partly: keep those that are expected to be drawn at least once for certain, and
            sample the others alone.

    Returns:
        `Draw`.

    Raises:
        ValueError: if a group does not exist or comes in blocks, or a width is out of
            range.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 3)))
        >>> found = draw(groups, {"w1:1": np.ones(4)}, {"w1:1": 2}, jax.random.key(0))
        >>> bool(((found.factors["w1:1"] > 0) == found.keep["w1:1"]).all())
        True

    References:
        Liebenwein et al., `Provable Filter Pruning
        <https://arxiv.org/abs/1911.07412>`_, ICLR 2020, App. B (partly derandomised)
    """
    certain = to_sizes(groups, sensitivities, sizes)  # also checks what is given
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    factors = {}
    for name, kept in certain.items():
        if groups[name].blocks > 1:
            raise ValueError(
                f"group {name} has {groups[name].blocks} blocks that must lose the "
                "same number of units, which sampling does not ensure; keep the most "
                "sensitive units with select.to_sizes"
            )
        own = np.asarray(sensitivities[name], np.float64)
        factors[name] = _drawn(rng, distribution(own), np.asarray(kept), partly)
    return Draw({name: each > 0 for name, each in factors.items()}, factors)


def _drawn(
    rng: np.random.Generator, p: np.ndarray, kept: np.ndarray, partly: bool
) -> np.ndarray:
    """The factors of the units of one group."""
    unique, factors = int(kept.sum()), np.zeros(len(p))
    rest = np.ones(len(p), bool)
    if partly:
        rest = ~(kept & (p * draws_for(p, unique) >= 1))
        factors[~rest] = 1.0
        unique -= int((~rest).sum())
    if unique and p[rest].any():
        own = p[rest] / p[rest].sum()
        draws = draws_for(own, unique)
        factors[rest] = rng.multinomial(draws, own) / np.where(own > 0, draws * own, 1)
    return factors
