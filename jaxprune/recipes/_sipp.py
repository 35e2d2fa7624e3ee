"""`sipp`: single weights by their sensitivities, kept or sampled."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxprune.core._leaves import named_leaves
from jaxprune.core._limits import fraction
from jaxprune.core._masks import PyTree
from jaxprune.program._jaxprs import trace_program
from jaxprune.recipes._sparse_gpt import Sparse
from jaxprune.scores import weight_sensitivity
from jaxprune.select.provable import confidence
from jaxprune.statistics._contractions import Contraction, contractions
from jaxprune.statistics._moments import peeked
from jaxprune.statistics._streaming import Batches, twice
from jaxprune.surgery._consumers import put

Method = Literal["deterministic", "random", "hybrid"]


def sipp(
    apply_fn: Callable[..., object],
    variables: PyTree,
    batches: Batches,
    *,
    sparsity: float,
    method: Method = "hybrid",
    key: jax.Array | None = None,
    delta: float = 1e-16,
    constant: float = 3.0,
    progress: bool | None = None,
) -> Sparse:
    """Sparsifies every contraction by the sensitivities of its weights.

    The weights of one output and one sign are a neuron, whose sensitivities add up to
    S. "deterministic" keeps the most sensitive weights of all neurons; "random" draws
    m weights of each with replacement, by their sensitivities, and scales those that
    are drawn, so that outputs are right on average; "hybrid" gives every neuron as many
    and does whichever of the two has the smaller bound (see `sampling_error`). How the
    draws are spread over neurons minimises the mean bound (see `spread_draws`).

    Args:
        apply_fn: ``(variables, batch) -> anything``; is called with batches of one
            example.
        variables: tree of arrays.
        batches: trees of arrays, examples along axis 0; can be iterated again.
        sparsity: fraction of the weights of all contractions to remove; sampling
            removes more, as weights are drawn more than once.
        method: see above.
        key: random key, for the methods that sample.
        delta: the probability that a bound does not hold.
        constant: by how much a sensitivity may exceed the empirical one.
        progress: show a progress bar? None for on a terminal.

    Returns:
        `Sparse`.

    Raises:
        ValueError: if the method is unknown, a key is missing, batches run dry, or the
            sparsity leaves less than one weight for every neuron.

    Example:
        >>> import jax.numpy as jnp
        >>> def linear(params, x):
        ...     return x @ params["w"]
        >>> params = {"w": jnp.array([[1.0], [-2.0], [3.0]])}
        >>> x = jnp.array([[1.0, 1.0, 1.0]])
        >>> sparse = sipp(linear, params, [x], sparsity=1 / 3, method="deterministic")
        >>> sparse.masks["w"].ravel().tolist()
        [False, True, True]

    References:
        Baykal et al., `SiPPing Neural Networks <https://arxiv.org/abs/1910.05422>`_,
        2019
    """
    if method not in ("deterministic", "random", "hybrid"):
        raise ValueError(
            f"method must be 'deterministic', 'random' or 'hybrid', got {method!r}"
        )
    if method == "deterministic":
        seed = []
    elif key is None:
        raise ValueError(f"method={method!r} samples: give key=jax.random.key(...)")
    else:
        seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
    first, batches = peeked(batches)
    batches = twice(batches, "sipp")
    found = contractions(trace_program(apply_fn, variables, first))
    scored = weight_sensitivity(
        apply_fn,
        variables,
        batches,
        reduce="mean" if method == "deterministic" else "max",
        progress=progress,
    )
    neurons = Neurons.of(found, named_leaves(variables), named_leaves(scored))
    budget = int((1 - fraction("sparsity", sparsity)) * len(neurons.weights))
    if method == "deterministic":
        order = np.argsort(-neurons.shares, kind="stable")
        factors = np.zeros(len(order))
        factors[order[:budget]] = 1.0
    else:
        factor = 2 * confidence(delta, 2, constant)
        rng = np.random.default_rng(seed)
        factors = sampled(neurons, budget, rng, factor, constant, method == "hybrid")
    return neurons.written(variables, factors)


def sampling_error(total: object, draws: object, factor: float) -> Any:
    r"""The relative error of a neuron after so many draws.

    .. math:: e(m) = \tfrac12 \left( a + \sqrt{a^2 + 6 a} \right), \quad
        a = \frac{\alpha}{3 m}, \quad \alpha = c S, \quad c = 2 K \log(8 / \delta)

    with the constant K and the probability :math:`\delta` of `sipp`. The published
    logarithm also counts the patches and taps of convolutions; here they count as one.

    Args:
        total: S, the sum of the sensitivities.
        draws: m.
        factor: c.

    Example:
        >>> float(sampling_error(1.0, 2.0, 12.0))
        3.0
    """
    share = factor * np.asarray(total, np.float64) / (3 * np.asarray(draws))
    return (share + np.sqrt(share**2 + 6 * share)) / 2


def spread_draws(
    totals: np.ndarray,
    most: np.ndarray,
    weights: np.ndarray,
    budget: float,
    factor: float,
) -> np.ndarray:
    r"""The draws that make the weighed sum of errors smallest, within a budget.

    .. math:: \min_m \sum_i v_i e_i(m_i), \quad \sum_i m_i \le B, \quad
        1 \le m_i \le M_i

    Errors are convex and fall with m, so for a price :math:`\lambda` of a draw every
    neuron takes draws until :math:`-v_i e_i'(m_i) = \lambda`; the price is bisected.

    Args:
        totals: S of every neuron, ``[neurons]``.
        most: M, how many weights it has.
        weights: v.
        budget: B.
        factor: of `sampling_error`.

    Returns:
        m, float ``[neurons]``.

    Raises:
        ValueError: if the budget is less than one draw a neuron.
    """
    if budget < len(totals):
        raise ValueError(
            f"{int(budget)} weights are fewer than the {len(totals)} neurons (outputs, "
            "by sign), which keep one each; lower the sparsity"
        )
    if most.sum() <= budget:
        return most.astype(np.float64)

    def at(price: float) -> np.ndarray:
        low, high = np.ones(len(totals)), most.astype(np.float64)
        for _ in range(50):
            middle = (low + high) / 2
            more = _slope(totals, middle, factor) * weights > price
            low, high = np.where(more, middle, low), np.where(more, high, middle)
        return low

    few, many = -100.0, 100.0  # log10 of prices: the lower, the more draws
    for _ in range(80):
        middle = (few + many) / 2
        spent = at(10.0**middle).sum()
        few, many = (few, middle) if spent <= budget else (middle, many)
    return at(10.0**many)


def _slope(totals: np.ndarray, draws: np.ndarray, factor: float) -> np.ndarray:
    """By how much the error falls with a draw: -e'(m) = a (1 + (a + 3) / r) / 2m."""
    a = factor * totals / (3 * draws)
    root = np.sqrt(a * a + 6 * a)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0, a * (1 + (a + 3) / root) / (2 * draws), 0.0)


class Neurons(NamedTuple):
    """The weights of all contractions, sorted by neuron: an output and a sign.

    Attributes:
        found: the contractions.
        weights: ``[weights]``.
        shares: ``[weights]``, their sensitivities.
        starts: ``[neurons]``, where each begins.
        layer_sizes: ``[neurons]``, how many neurons its layer has.
        places: ``[weights]``, where each is in the order of the contractions.
    """

    found: list[Contraction]
    weights: np.ndarray
    shares: np.ndarray
    starts: np.ndarray
    layer_sizes: np.ndarray
    places: np.ndarray

    @classmethod
    def of(
        cls,
        found: Mapping[str, Contraction],
        leaves: Mapping[str, Any],
        shares: Mapping[str, object],
    ) -> "Neurons":
        kernels, each, ids, start = [], [], [], 0
        for one in found.values():
            why = one.fixed(leaves[one.path])
            if why:
                raise ValueError(f"{one.path} cannot be pruned: {why}")
            kernel = one.kernel(np.asarray(leaves[one.path], np.float64))
            number = np.arange(len(kernel) * kernel.shape[2])
            number = 2 * number.reshape(len(kernel), 1, -1) + (kernel < 0)
            kernels.append(kernel.ravel())
            each.append(one.kernel(np.asarray(shares[one.path], np.float64)).ravel())
            ids.append((start + number).ravel())
            start += 2 * len(kernel) * kernel.shape[2]
        ids = np.concatenate(ids)
        places = np.argsort(ids, kind="stable")
        _, starts = np.unique(ids[places], return_index=True)
        ends = np.cumsum([len(k) for k in kernels])
        layer = np.searchsorted(ends, places[starts], side="right")
        return cls(
            list(found.values()),
            np.concatenate(kernels)[places],
            np.concatenate(each)[places],
            starts,
            np.bincount(layer)[layer],
            places,
        )

    def written(self, variables: PyTree, factors: np.ndarray) -> Sparse:
        """The variables with weights times factors, and what of them is not 0."""
        flat, kept = np.zeros(len(factors)), np.zeros(len(factors), bool)
        flat[self.places], kept[self.places] = self.weights * factors, factors > 0
        leaves, start = dict(named_leaves(variables)), 0
        masks = {path: np.array(True) for path in leaves}
        for one in self.found:
            own = slice(start, start := start + one.at.size)
            at = one.at.reshape(-1)
            leaves[one.path] = put(leaves[one.path], at, flat[own])
            if not masks[one.path].ndim:
                masks[one.path] = np.ones(np.shape(leaves[one.path]), bool)
            masks[one.path].reshape(-1)[at] = kept[own]
        treedef = jax.tree.structure(variables)
        return Sparse(
            treedef.unflatten(leaves.values()), treedef.unflatten(masks.values())
        )


def sampled(
    neurons: Neurons,
    budget: float,
    rng: np.random.Generator,
    factor: float,
    constant: float,
    hybrid: bool,
) -> np.ndarray:
    """What every weight is multiplied with: 0 where it goes.

    Args:
        neurons: the weights.
        budget: how many may stay.
        rng: of the draws.
        factor: of `sampling_error`.
        constant: of the bound for keeping the most sensitive: times what is dropped.
        hybrid: keep the most sensitive where that has the smaller bound?
    """
    ends = np.append(neurons.starts[1:], len(neurons.weights))
    totals = np.add.reduceat(neurons.shares, neurons.starts)
    share = 1 / neurons.layer_sizes
    draws = spread_draws(totals, ends - neurons.starts, share, budget, factor)
    factors = np.zeros(len(neurons.weights))
    for k, (start, end) in enumerate(zip(neurons.starts, ends, strict=True)):
        s, m = neurons.shares[start:end], int(draws[k])
        order = np.argsort(-s, kind="stable")
        dropped = constant * s[order[m:]].sum()
        if m >= end - start or (
            hybrid and dropped <= sampling_error(totals[k], m, factor)
        ):
            factors[start:end][order[:m]] = 1.0
        elif totals[k]:
            p = s / totals[k]
            drawn = rng.multinomial(m, p)
            factors[start:end] = drawn / np.where(p > 0, m * p, 1)
    return factors
