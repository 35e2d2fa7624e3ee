"""Whole units in proportion, and the widths of a sparse network."""

import math
from collections.abc import Mapping

import numpy as np

from jaxprune.core._checks import concrete_bools, whole_number
from jaxprune.core._groups import Groups
from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import check_broadcast
from jaxprune.core._types import PyTree


def proportional(
    weights: Mapping[str, float],
    total: int,
    *,
    most: Mapping[str, int],
    least: Mapping[str, int] | int = 0,
) -> dict[str, int]:
    """Shares whole units in proportion, within bounds, as closely as can be.

    Minimises ``sum (share_j * total - x_j)^2`` over whole ``x_j`` with
    ``sum x_j = total`` and ``least_j <= x_j <= most_j``, where ``share`` is `weights`
    divided by their sum. What a bound cuts off, all others take equally.

    Args:
        weights: name -> non-negative weight.
        total: how many units to share.
        most: name -> upper bound.
        least: name -> lower bound, or one for all.

    Returns:
        Name -> whole number; ties go to the first.

    Raises:
        ValueError: if the bounds cannot hold `total`, or a weight is negative.

    Example:
        >>> proportional({"a": 6, "b": 3, "c": 1}, 10, most={"a": 4, "b": 9, "c": 9})
        {'a': 4, 'b': 4, 'c': 2}

    References:
        Abbas et al., `Effective pruning of web-scale datasets
        <https://arxiv.org/abs/2401.04578>`_, 2024 (shares clusters of examples so)
    """
    total = whole_number("total", total, 0)
    names = list(weights)
    low = np.array([least if isinstance(least, int) else least[n] for n in names], int)
    high = np.array([most[name] for name in names], int)
    shares = np.array([weights[name] for name in names], float)
    if not (np.isfinite(shares) & (shares >= 0)).all() or (low > high).any():
        raise ValueError(
            "weights must be finite and not negative, and least not above most"
        )
    if not low.sum() <= total <= high.sum():
        raise ValueError(
            f"{total} units do not fit between the bounds, which hold {low.sum()} to "
            f"{high.sum()}"
        )
    target = shares / (shares.sum() or 1.0) * total
    # x = clip(target + shift): the shift that meets the total, by bisection.
    below, above = (low - target).min(), (high - target).max()
    for _ in range(200):
        shift = (below + above) / 2
        fits = np.clip(target + shift, low, high).sum() <= total
        below, above = (shift, above) if fits else (below, shift)
    exact = np.clip(target + below, low, high)
    whole = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(-np.where(whole < high, exact - whole, -1.0), kind="stable")
    whole[order[: total - whole.sum()]] += 1
    return dict(zip(names, whole.tolist(), strict=True))


def widths_from_nonzeros(groups: Groups, masks: PyTree) -> dict[str, int]:
    """Widths of a dense network with as many weights as a sparse one.

    Going through the groups in the order of the program, a group gets as many units
    as the non-zeros of its first kernel fill, given the widths already decided:
    ``nnz / (kernel area * width of the input)``. So the unstructured sparsity of a
    network becomes an architecture.

    Args:
        groups: what `trace` returned.
        masks: masks of the traced variables, True = kept; concrete.

    Returns:
        Group name -> width, at least 1; for `to_sizes`.

    Raises:
        ValueError: if a kernel has no mask, or one of another shape.
        TypeError: if a mask is traced or not boolean.

    Example:
        >>> import jax, numpy as np
        >>> from jaxprune.core._groups import Group, Groups, Member
        >>> hidden = Group("h", 8, (Member("w", 1, np.arange(8)[:, None]),))
        >>> treedef = jax.tree.structure({"w": 0})
        >>> groups = Groups({"h": hidden}, (), {"w": (4, 8)}, treedef)
        >>> mask = np.arange(32).reshape(4, 8) % 4 == 0
        >>> widths_from_nonzeros(groups, {"w": mask})
        {'h': 2}

    References:
        Park & No, `Prune Your Model Before Distill It
        <https://arxiv.org/abs/2109.14960>`_, 2022
    """
    leaves = named_leaves(masks)
    left: dict[tuple[str, int], float] = {}  # (path, axis) -> fraction still there
    widths = {}
    for name, group in groups.items():
        kernel = group.members[0]
        if kernel.path not in leaves:
            raise ValueError(f"masks have no leaf {kernel.path}, where {name} is made")
        shape = groups.shapes[kernel.path]
        others = [
            n * left.get((kernel.path, d), 1.0)
            for d, n in enumerate(shape)
            if d != kernel.axis
        ]
        own = concrete_bools(f"masks[{kernel.path}]", leaves[kernel.path])
        mask = np.broadcast_to(check_broadcast(kernel.path, shape, own), shape)
        share = left.get((kernel.path, kernel.axis), 1.0)
        each = max(math.prod(others) * share * shape[kernel.axis] / group.size, 1.0)
        widths[name] = min(max(round(int(mask.sum()) / each), 1), group.size)
        for member in group.members:
            place = member.path, member.axis
            left[place] = left.get(place, 1.0) * widths[name] / group.size
    return widths
