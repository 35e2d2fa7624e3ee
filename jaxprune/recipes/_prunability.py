"""`prunability`: how few parameters a trained net needs for its training loss."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxprune import scores, select
from jaxprune.core._checks import number, whole_number
from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import PyTree, apply_masks
from jaxprune.select._trees import default_leaves


def prunability(
    loss: Callable[[PyTree], Any],
    params: PyTree,
    *,
    cut: Callable[[PyTree, float], PyTree] | None = None,
    tolerance: float = 0.1,
    slack: float = 0.0,
    step: float = 0.05,
    refine: int = 4,
) -> float:
    r"""The smallest fraction of the parameters that keeps the training loss.

    .. math:: \min \{ \beta : L(f_\beta) \le (1 + \text{tolerance}) L(f) +
        \text{slack} \}

    with :math:`f_\beta` the net of which a fraction :math:`\beta` is kept, without
    further training. Fractions are tried from the whole net down and the first that
    costs too much ends the search, so that it does not take the loss to be monotone;
    between that and the one before it the limit is bisected. A small fraction goes
    with a small generalisation gap, says the paper.

    Args:
        loss: ``params -> scalar``, the loss on the training data.
        params: tree of arrays.
        cut: ``(params, fraction kept) -> params``; None keeps the weights of the
            largest magnitude in all leaves together.
        tolerance: by which share the loss may grow.
        slack: by how much more, for losses close to 0.
        step: between the fractions that are tried.
        refine: how many times the last step is halved.

    Returns:
        The fraction, in (0, 1]; up to ``step / 2**refine`` above the true limit.

    Raises:
        ValueError: if tolerance or slack are negative, `step` is not in (0, 1), or the
            loss is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.array([3.0, 2.0, 0.01, 0.01])}
        >>> def loss(params):
        ...     return 1 + jnp.square(params["w"].sum() - 5.02)
        >>> prunability(loss, params, step=0.25, refine=0)
        0.5

    References:
        Kuhn et al., `Robustness to Pruning Predicts Generalization in Deep Neural
        Networks <https://arxiv.org/abs/2103.06002>`_, 2021
    """
    for name, given in (("tolerance", tolerance), ("slack", slack)):
        if not number(name, given) >= 0:
            raise ValueError(f"{name} must be at least 0, got {given}")
    if not 0 < number("step", step) < 1:
        raise ValueError(f"step must be between 0 and 1, got {step}")
    cut, whole = cut or _largest, float(loss(params))
    most = (1 + tolerance) * whole + slack
    if not most < float("inf"):
        raise ValueError(f"the loss of the whole network must be finite, got {whole}")

    def is_good(share: float) -> bool:
        return float(loss(cut(params, share))) <= most

    good, bad = 1.0, 0.0
    for k in range(1, round(1 / step)):
        share = 1 - k * step
        if not is_good(share):
            bad = share
            break
        good = share
    for _ in range(whole_number("refine", refine, 0)):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if is_good(middle) else (good, middle)
    return good


def _largest(params: PyTree, share: float) -> PyTree:
    each = scores.magnitude(params)
    leaves = named_leaves(each)
    paths = default_leaves(leaves, None) or list(leaves)
    sizes = [int(np.size(leaves[path])) for path in paths]
    # Every leaf keeps a weight, or nothing would pass.
    most = 1 - len(sizes) / sum(sizes)
    masks = select.across_leaves(each, sparsity=min(1 - share, most))
    return apply_masks(params, masks)
