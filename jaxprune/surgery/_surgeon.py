"""The optimal brain surgeon, one input after the other, from second moments."""

import numpy as np
import scipy.linalg

# So many inputs are updated one by one; larger steps are products of matrices.
INNER = 16


def brain_surgeon(
    second: np.ndarray,
    kernel: np.ndarray,
    *,
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
    ridge: float = 0.01,
    block: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Removes single weights of a layer; the weights after each make up for it.

    Inputs are visited in order. Of a block of them the weights with the lowest

    .. math:: w_{dn}^2 / [H_d^{-1}]_{dd}, \qquad H = E[x x^T] + \lambda I

    go, with :math:`H_d` the Hessian of the inputs from d on, and each removal is the
    brain surgeon's: :math:`w_{e} \mathrel{-}= w_{d} [H_d^{-1}]_{de} / [H_d^{-1}]_{dd}`
    for all inputs e after d. The inverses are the rows of one Cholesky factor.

    Args:
        second: ``[D, D]``, moments E[x xᵀ] of the inputs.
        kernel: ``[D, N]``, in float32 or float64: the precision of the updates.
        sparsity: fraction of every block of inputs that is removed.
        pattern: (n, m): of every m inputs in a row every output keeps n, instead.
        ridge: lambda, as a share of the mean of the diagonal.
        block: inputs between two choices of what is removed.

    Returns:
        The weights, 0 where removed, and bool ``[D, N]``, True = kept.

    Raises:
        ValueError: if D is no multiple of m, or the moments are not finite, or of lower
            rank and there is no ridge.

    Example:
        >>> second = np.array([[1.0, 0.9], [0.9, 1.0]])
        >>> kernel, kept = brain_surgeon(second, np.array([[1.0], [2.0]]), ridge=0.0)
        >>> kernel.round(2).tolist(), kept.tolist()
        ([[0.0], [2.9]], [[False], [True]])

    References:
        Frantar and Alistarh, `SparseGPT: Massive Language Models Can Be Accurately
        Pruned in One-Shot <https://arxiv.org/abs/2301.00774>`_, 2023; Hassibi and
        Stork, `Second Order Derivatives for Network Pruning: Optimal Brain Surgeon
        <https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html>`_,
        1992
    """
    width = len(second)
    if not np.isfinite(second).all():
        raise ValueError("the moments are not finite")
    if pattern is not None and width % pattern[1]:
        raise ValueError(
            f"{width} inputs cannot be divided into runs of {pattern[1]}; choose an m "
            "that divides them"
        )
    factor = inverse_factor(second, ridge).astype(kernel.dtype)
    weights, kept = kernel.copy(), np.ones(kernel.shape, bool)
    # Patterns are chosen run by run; what they do beyond a block waits for its end.
    step = block if pattern is None else max(block // pattern[1], 1) * pattern[1]
    run = step if pattern is None else pattern[1]
    inner = INNER if pattern is None else max(INNER // run, 1) * run
    for first in range(0, width, step):
        own = slice(first, min(first + step, width))
        errors = np.zeros_like(weights[own])
        for d in range(own.start, own.stop):
            if (d - first) % run == 0:
                rows = slice(d, min(d + run, own.stop))
                saliency = np.square(weights[rows] / np.diagonal(factor)[rows, None])
                kept[rows] = _chosen(saliency, sparsity, pattern)
            errors[d - first] = np.where(kept[d], 0, weights[d]) / factor[d, d]
            begin = d - (d - first) % inner
            end = min(begin + inner, own.stop)
            weights[d:end] -= np.outer(factor[d, d:end], errors[d - first])
            if d + 1 == end:  # the rest of the block, by all of these at once
                later = factor[begin:end, end : own.stop].T
                weights[end : own.stop] -= later @ errors[begin - first : end - first]
        # So is what lies beyond the block, by all of it.
        weights[own.stop :] -= factor[own, own.stop :].T @ errors
    return np.where(kept, weights, 0), kept


def inverse_factor(second: np.ndarray, ridge: float) -> np.ndarray:
    """Upper triangular U with Uᵀ U the inverse of the moments.

    Row d, times its first entry, is the first row of the inverse for the inputs from d
    on.

    Raises:
        ValueError: if the moments have no inverse.
    """
    whole = second.astype(np.float64)
    places = np.arange(len(second))
    # Inputs that are always 0 say nothing; any variance keeps their weights apart.
    whole[places, places] += np.where(np.diagonal(second) > 0, 0.0, 1.0)
    whole[places, places] += ridge * second.trace() / len(second)
    try:
        # The reversed factor of a matrix is that of its inverse, inverted.
        lower = np.linalg.cholesky(whole[::-1, ::-1])
    except np.linalg.LinAlgError:
        raise ValueError(
            "the inputs are linear combinations of each other on these batches, so "
            "their moments have no inverse; give more rows, or a ridge"
        ) from None
    (invert,) = scipy.linalg.get_lapack_funcs(("trtri",), (lower,))
    inverse, failed = invert(lower[::-1, ::-1], lower=0)
    assert not failed  # a factor has no 0 on its diagonal
    return inverse


def _chosen(
    saliency: np.ndarray, sparsity: float, pattern: tuple[int, int] | None
) -> np.ndarray:
    if pattern is not None:
        # The inverse of a sorting permutation is the rank of every entry.
        ranks = np.argsort(np.argsort(-saliency, axis=0, kind="stable"), axis=0)
        return ranks < pattern[0]
    kept, count = np.ones(saliency.size, bool), round(sparsity * saliency.size)
    if count:
        kept[np.argpartition(saliency, count - 1, axis=None)[:count]] = False
    return kept.reshape(saliency.shape)
