"""Least squares from moments alone: fit a layer, or choose what it reads.

All functions are pure and take numpy arrays: of inputs x ``[D]`` and outputs y ``[N]``
of a layer the moments E[x xᵀ] and E[x yᵀ], centred where the layer has a bias. What
the samples were no longer matters, which turns loops over them into products.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg

# Below this share of its variance an input counts as a combination of others: moments
# that were taken in float32 know no better.
DEPENDENT = 1e-6


def refit(
    second: np.ndarray,
    cross: np.ndarray,
    kernel: np.ndarray,
    kept: np.ndarray,
    ridge: float = 0.0,
) -> np.ndarray:
    r"""The kernel that gives the outputs best from the inputs that are kept.

    .. math:: \min_{W'} E\|y - W'^T x\|^2 + \lambda \|W' - W\|^2, \quad
        W'_S = (\Sigma_{SS} + \lambda I)^{-1} (E[x_S y^T] + \lambda W_S)

    with W' = 0 outside of S. The ridge draws to the old weights W, not to 0: what the
    data leave open stays as it was. :math:`\lambda` is `ridge` times the mean of the
    diagonal of :math:`\Sigma_{SS}`.

    Args:
        second: ``[D, D]``, moments of the inputs.
        cross: ``[D, N]``, moments of inputs with outputs.
        kernel: ``[D, N]``, the old weights.
        kept: bool ``[D, N]``, True = kept.
        ridge: as a share of the mean variance of a kept input.

    Returns:
        The weights, ``[D, N]``; 0 where not kept.

    Raises:
        ValueError: if `ridge` is 0 and a kept input is constant or a combination of
            others.

    Example:
        >>> second = np.array([[1.0, 0.5], [0.5, 1.0]])  # of two inputs
        >>> kernel = np.array([[1.0], [1.0]])
        >>> refit(second, second @ kernel, kernel, np.array([[True], [False]]))
        array([[1.5],
               [0. ]])

    References:
        Xie et al., `Pruning with Compensation <https://arxiv.org/abs/2108.13728>`_,
        2021 (without the ridge)
    """
    fitted = np.where(kept, kernel, 0.0)
    patterns, which = np.unique(kept, axis=1, return_inverse=True)
    for k in range(patterns.shape[1]):
        own, inputs = np.flatnonzero(which.ravel() == k), np.flatnonzero(patterns[:, k])
        if not inputs.size:
            continue
        gram = second[np.ix_(inputs, inputs)]
        size = ridge * gram.trace() / len(inputs)
        if ridge and not size:
            continue  # no input varies, so nothing can be learned from them
        old = kernel[np.ix_(inputs, own)]
        residual = cross[np.ix_(inputs, own)] - gram @ old
        if not ridge:
            _check_independent(gram, inputs)
        factor = scipy.linalg.cho_factor(gram + size * np.eye(len(inputs)))
        fitted[np.ix_(inputs, own)] = old + scipy.linalg.cho_solve(factor, residual)
    return fitted


def _check_independent(gram: np.ndarray, inputs: np.ndarray) -> None:
    """Refuses inputs that others explain: pivots of a Cholesky factor are what is left.

    Raises:
        ValueError: naming the first.
    """
    # Where the factor cannot go on, the pivot is 0 or below.
    (decompose,) = scipy.linalg.get_lapack_funcs(("potrf",), (gram,))
    factor, failed = decompose(gram, lower=1)
    pivots = np.square(np.diagonal(factor))
    small = pivots <= DEPENDENT * np.diagonal(gram)
    if failed:
        small[failed - 1 :] = True
    for number in inputs[small]:
        raise ValueError(
            f"kept input {number} is constant or a linear combination of others, "
            "so the fit is not unique; a ridge above 0 keeps what the data leave "
            "open close to the old weights"
        )


def matched_spread(
    kernel: np.ndarray, second: np.ndarray, spread: np.ndarray
) -> np.ndarray:
    r"""Scales every output to the variance that it had.

    A least squares fit explains less variance than there was:
    :math:`w'_n \leftarrow w'_n \sqrt{E[y_n^2] / w_n'^T \Sigma w_n'}`.

    Args:
        kernel: ``[D, N]``.
        second: ``[D, D]``.
        spread: ``[N]``, the moments E[y²].

    Example:
        >>> matched_spread(np.ones((1, 1)), np.ones((1, 1)), np.array([4.0]))
        array([[2.]])
    """
    own = np.einsum("dn,de,en->n", kernel, second, kernel, optimize=True)
    some = (own > 0) & (spread > 0)
    return kernel * np.sqrt(np.where(some, spread, 1.0) / np.where(some, own, 1.0))


def unit_moments(
    second: np.ndarray, kernel: np.ndarray, units: np.ndarray, size: int
) -> np.ndarray:
    r"""Moments of what every unit contributes to the outputs: ``[size, size]``.

    :math:`G_{ij} = E[z_i^T z_j]` with :math:`z_i = \sum_{p \in i} x_p W_p`, so the
    squared error of leaving out a set T is :math:`1_T^T G 1_T`.

    Args:
        second: ``[D, D]``.
        kernel: ``[D, N]``.
        units: int ``[D]``, the unit of every input; -1 for none.
        size: how many units there are.

    Example:
        >>> unit_moments(np.eye(2), np.array([[1.0], [2.0]]), np.array([1, 0]), 2)
        array([[4., 0.],
               [0., 1.]])
    """
    member = (units[:, None] == np.arange(size)).astype(np.float64)
    return member.T @ (second * (kernel @ kernel.T)) @ member


def greedy_backward(gram: np.ndarray, keep: int) -> np.ndarray:
    r"""Leaves out, one by one, the unit that the outputs miss least.

    Each is the one that makes :math:`1_T^T G 1_T`, the squared error without T, grow
    least: the picks of the loop over samples, from their moments.

    Args:
        gram: ``[size, size]``, as `unit_moments` gives.
        keep: how many stay.

    Returns:
        bool ``[size]``, True = kept.

    Example:
        >>> greedy_backward(np.array([[4.0, -3.9, 0], [-3.9, 4.0, 0], [0, 0, 1.0]]), 2)
        array([ True,  True, False])

    References:
        Luo et al., `ThiNet: A Filter Level Pruning Method for Deep Neural Network
        Compression <https://arxiv.org/abs/1707.06342>`_, ICCV 2017
    """
    kept, grows = np.ones(len(gram), bool), np.diagonal(gram).copy()
    for _ in range(len(gram) - keep):
        pick = int(np.argmin(np.where(kept, grows, np.inf)))
        kept[pick] = False
        # |sum of what goes|² = sum of all gram[i, j] in it: unit i adds its diagonal
        # and twice its products with those that are gone.
        grows += 2 * gram[pick]
    return kept


def greedy_forward(
    second: np.ndarray, cross: np.ndarray, units: np.ndarray, size: int
) -> np.ndarray:
    r"""Ranks units by how much each, after those before it, explains of the outputs.

    With S chosen, unit t lowers the least squares error by

    .. math:: \operatorname{tr}(Q_t^T R_{tt}^{-1} Q_t), \qquad
        R = \Sigma - \Sigma_{:S} \Sigma_{SS}^{-1} \Sigma_{S:}, \quad
        Q = C - \Sigma_{:S} \Sigma_{SS}^{-1} C_S

    where C = E[x yᵀ] and a unit may be a block of inputs (the taps of a channel). Both
    are updated by the Schur complement of the pick, which is what bordering the inverse
    of :math:`\Sigma_{SS}` gives.

    Args:
        second: ``[D, D]``.
        cross: ``[D, N]``.
        units: int ``[D]``, the unit of every input; -1 for none, which is kept anyway.
        size: how many units there are.

    Returns:
        int ``[size]``, the units, most explaining first; those that explain nothing
        more (constant, or a combination of others) last, in their order.

    Example:
        >>> second = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 0.5]])
        >>> greedy_forward(second, second @ np.ones((3, 1)), np.arange(3), 3)
        array([0, 2, 1])

    References:
        Xie et al., `Pruning with Compensation <https://arxiv.org/abs/2108.13728>`_,
        2021
    """
    return rank_units([Part(second, cross, np.zeros_like(cross), units)], size)


class Part(NamedTuple):
    """The moments of one matrix that reads the units of a group.

    Attributes:
        second: ``[D, D]``, of its inputs.
        cross: ``[D, N]``, of inputs with outputs.
        kernel: ``[D, N]``.
        units: int ``[D]``, the unit of every input; -1 for none.
    """

    second: np.ndarray
    cross: np.ndarray
    kernel: np.ndarray
    units: np.ndarray


def rank_units(parts: Sequence[Part], size: int) -> np.ndarray:
    """`greedy_forward` where several matrices read the units: what they gain adds up.

    Args:
        parts: the moments of each.
        size: how many units there are.

    Returns:
        int ``[size]``, the units, most explaining first.
    """
    remainders = [_Remainder(part, size) for part in parts]
    order = np.arange(size)
    for first in range(size):
        gains = sum(each.gains(first) for each in remainders)
        # Of equal gains the first unit is taken, wherever it lies by now.
        best = first + np.flatnonzero(gains == np.max(gains))
        pick = best[np.argmin(order[best])]
        order[[first, pick]] = order[[pick, first]]
        for each in remainders:
            each.explain(first, pick)
    return order


class _Remainder:
    r"""What the units chosen so far leave unexplained of those that are open.

    Of :math:`R = \Sigma - V V^T`, where V holds what was chosen, only the blocks of
    single units are kept up to date. Of all else a pick needs its own columns alone,
    :math:`\Sigma_{:t} - V V_t^T`: it reads V once and rewrites nothing of D x D.
    Chosen units move to the front, so what is open lies side by side behind them.

    Attributes:
        second: ``[D + 1, D + 1]``, the last row for places without an input.
        table: int ``[size, taps]``, the inputs of every unit; D for none.
        chosen: V, ``[size * taps, D]``, of which `filled` columns are there.
        blocks: R of every unit, ``[size, taps, taps]``.
        missing: of inputs with outputs, ``[size * taps, N]``.
        least: ``[size]``, the variance below which nothing is left to explain.
    """

    def __init__(self, part: Part, size: int) -> None:
        width = len(part.second)
        places = [np.flatnonzero(part.units == unit) for unit in range(size)]
        self.taps = max(1, *map(len, places))
        self.table = np.full((size, self.taps), width)
        for unit, own in enumerate(places):
            self.table[unit, : len(own)] = own
        self.second = np.zeros((width + 1, width + 1))
        self.second[:width, :width] = part.second
        table, cross = self.table, _square(part.cross.astype(np.float64))
        self.blocks = self.second[table[:, :, None], table[:, None, :]]
        self.least = _floor(self.blocks)
        self.missing = np.zeros((table.size, cross.shape[1]))
        self.missing[table.ravel() < width] = cross[table[table < width]]
        fixed = np.flatnonzero(part.units < 0)
        self.chosen, self.filled = np.empty((table.size, len(fixed) + table.size)), 0
        if fixed.size:
            own = part.second[np.ix_(fixed, fixed)].astype(np.float64)[None]
            self._take_out(0, fixed, _roots(own, _floor(own))[0], cross[fixed])

    def gains(self, first: int) -> np.ndarray:
        """By how much each of the units from `first` on would lower the error."""
        roots = _roots(self.blocks[first:], self.least[first:])
        missing = self.missing[first * self.taps :].reshape(*roots.shape[:2], -1)
        if self.taps == 1:
            flat = missing[:, 0]
            return np.einsum("un,un->u", flat, flat) * np.square(roots[:, 0, 0])
        squares = np.matmul(missing, missing.swapaxes(1, 2))
        inverse = np.matmul(roots, roots.swapaxes(1, 2))
        return np.einsum("ust,ust->u", squares, inverse)

    def explain(self, first: int, pick: int) -> None:
        """Puts a unit in front of the open ones, and takes out what it explains."""
        begin, end = first * self.taps, (first + 1) * self.taps
        for each in (self.table, self.blocks, self.least):
            each[[first, pick]] = each[[pick, first]]
        own, other = slice(begin, end), slice(pick * self.taps, (pick + 1) * self.taps)
        for each in (self.chosen[:, : self.filled], self.missing):
            each[own], each[other] = each[other].copy(), each[own].copy()
        root = _roots(self.blocks[first, None], self.least[first, None])[0]
        # The unit's own columns of V stay empty: nothing asks for them again.
        before = self.chosen[own, : self.filled]
        self._take_out(first + 1, self.table[first], root, self.missing[own], before)

    def _take_out(
        self,
        first: int,
        inputs: np.ndarray,
        root: np.ndarray,
        missing: np.ndarray,
        before: np.ndarray | None = None,
    ) -> None:
        """Subtracts what these inputs explain of the units from `first` on."""
        behind, filled = slice(first * self.taps, None), self.filled
        # Rows are gathered, as they lie side by side, and the moments are symmetric.
        columns = self.second[inputs][:, self.table[first:].ravel()].T
        if before is not None:
            columns = columns - self.chosen[behind, :filled] @ before.T
        lines = columns @ root
        self.filled = filled + lines.shape[1]
        self.chosen[behind, filled : self.filled] = lines
        self.missing[behind] -= lines @ (root.T @ missing)
        each = lines.reshape(-1, self.taps, lines.shape[1])
        self.blocks[first:] -= np.matmul(each, each.swapaxes(1, 2))


def _square(cross: np.ndarray) -> np.ndarray:
    """A C of the same C Cᵀ, all that gains see, with no more columns than rows."""
    if cross.shape[1] <= cross.shape[0]:
        return cross
    return np.linalg.qr(cross.T)[1].T


def _floor(blocks: np.ndarray) -> np.ndarray:
    variances = np.diagonal(blocks, axis1=1, axis2=2)
    return DEPENDENT * np.maximum(variances.max(1), 1e-300)


def _roots(blocks: np.ndarray, least: np.ndarray) -> np.ndarray:
    """``[units, taps, taps]``: squares are the inverses of what blocks vary.

    Directions in which a block does not vary, and places without an input, are 0.
    """
    if blocks.shape[1] == 1:
        values, vectors = blocks[:, 0], np.ones_like(blocks)
    else:
        # A block B = V Λ Vᵀ has the pseudo-inverse R Rᵀ with R = V Λ^(-1/2).
        values, vectors = np.linalg.eigh(blocks)
    varies = values > least[:, None]
    inverse = np.where(varies, 1 / np.sqrt(np.where(varies, values, 1)), 0)
    return vectors * inverse[:, None, :]


def lasso(gram: np.ndarray, target: np.ndarray, keep: int) -> np.ndarray:
    r"""Chooses units by an L1 penalty on a factor for each.

    .. math:: \min_\beta \tfrac{1}{2} E\|y - \sum_i \beta_i z_i\|^2
        + \lambda \|\beta\|_1

    with :math:`\lambda` bisected until no more than `keep` factors are not 0; if fewer
    are, the units that enter next are kept too.

    Args:
        gram: ``[size, size]``, E[z_iᵀ z_j] as `unit_moments` gives.
        target: ``[size]``, E[z_iᵀ y].
        keep: how many stay.

    Returns:
        bool ``[size]``, True = kept.

    Example:
        >>> lasso(np.eye(3), np.array([1.0, -3.0, 2.0]), 2)
        array([False,  True,  True])

    References:
        He et al., `Channel Pruning for Accelerating Very Deep Neural Networks
        <https://arxiv.org/abs/1707.06168>`_, ICCV 2017
    """
    low, high = 0.0, float(np.abs(target).max(initial=0.0))
    many, few = soft_factors(gram, target, low), np.zeros(len(gram))
    if np.count_nonzero(many) <= keep:
        few = many
    else:
        for _ in range(50):
            middle = (low + high) / 2
            # Few units stay where the penalty is high: bisection, from a warm start.
            factors = soft_factors(gram, target, middle, many)
            if np.count_nonzero(factors) > keep:
                low, many = middle, factors
            else:
                high, few = middle, factors
            if np.count_nonzero(few) == keep:
                break
    first = np.lexsort((-np.diagonal(gram), -np.abs(many), few == 0))
    kept = np.zeros(len(gram), bool)
    kept[first[:keep]] = True
    return kept


def soft_factors(
    gram: np.ndarray,
    target: np.ndarray,
    penalty: float,
    start: np.ndarray | None = None,
    *,
    tolerance: float = 1e-9,
    turns: int = 10_000,
) -> np.ndarray:
    """The factors of `lasso` for one penalty, by coordinate descent.

    Args:
        gram: ``[size, size]``.
        target: ``[size]``.
        penalty: the multiple of the L1 norm.
        start: factors to start from; None for 0.
        tolerance: ends when no factor moves by more than this share of the largest.
        turns: at most.

    Example:
        >>> soft_factors(np.eye(2), np.array([3.0, 0.5]), 1.0)
        array([2., 0.])
    """
    factors = np.zeros(len(gram)) if start is None else start.copy()
    slope = target - gram @ factors
    for _ in range(turns):
        largest = 0.0
        for i in np.flatnonzero(np.diagonal(gram) > 0):
            own = slope[i] + gram[i, i] * factors[i]
            new = np.sign(own) * max(abs(own) - penalty, 0.0) / gram[i, i]
            if new != factors[i]:
                # `slope` stays target - gram @ factors, at the cost of one row.
                slope -= gram[i] * (new - factors[i])
                largest = max(largest, abs(new - factors[i]))
                factors[i] = new
        if largest <= tolerance * max(np.abs(factors).max(initial=0.0), 1e-300):
            break
    return factors


def unit_factors(gram: np.ndarray, target: np.ndarray, kept: np.ndarray) -> np.ndarray:
    r"""The factor for every kept unit that fits the outputs best; 0 for the others.

    Args:
        gram: ``[size, size]``, E[z_iᵀ z_j].
        target: ``[size]``, E[z_iᵀ y].
        kept: bool ``[size]``, True = kept.

    Example:
        >>> gram = np.array([[1.0, 0.5], [0.5, 1.0]])
        >>> unit_factors(gram, gram.sum(1), np.array([True, False]))
        array([1.5, 0. ])
    """
    factors = np.zeros(len(gram))
    own = np.flatnonzero(kept)
    small = gram[np.ix_(own, own)]
    factors[own] = np.linalg.lstsq(small, target[own], rcond=DEPENDENT)[0]
    return factors
