"""Layer by layer: how a sparsity is shared among leaves or groups."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune.core._checks import concrete_array
from jaxprune.core._groups import Groups
from jaxprune.core._leaves import named_leaves
from jaxprune.core._limits import Each, fraction, limits_of, selected
from jaxprune.core._types import PyTree
from jaxprune.select._weights import across_leaves


def uniform(
    layers: Groups | PyTree,
    *,
    sparsity: float,
    min_keep: Each[int] = 1,
    max_sparsity: Each[float] = 1.0,
    only: str | Sequence[str] | None = None,
) -> dict[str, float]:
    """The same sparsity everywhere; what limits forbid in one layer, others lose.

    ``per_leaf(scores, sparsity=0.9)`` does the same, up to the last entry: there, every
    leaf rounds alone.

    Args:
        layers: what `trace` returned, or a tree of arrays or shapes, of which the
            leaves with two axes or more count.
        sparsity: fraction of all units or entries to remove, in [0, 1].
        min_keep: how many units or entries every layer keeps at least.
        max_sparsity: no layer loses more than this fraction.
        only: names or patterns (as `fnmatch`) of the layers that lose anything.

    Returns:
        Name -> sparsity, whole counts of units or entries, together
        ``round(sparsity * N)``; for `per_group` and `per_leaf`.

    Raises:
        ValueError: if the limits leave fewer to remove than the budget asks for.

    Example:
        >>> import numpy as np
        >>> layers = {"a": np.zeros((4, 5)), "b": np.zeros((5, 4))}
        >>> uniform(layers, sparsity=0.5, max_sparsity={"a": 0.25})
        {'a': 0.25, 'b': 0.75}
    """
    sizes = {name: size for name, (size, _) in _layers(layers, only).items()}
    most = _most(sizes, min_keep, max_sparsity)
    return _counted(sizes, most, sparsity, dict.fromkeys(sizes, 1.0))


def erk(
    layers: Groups | PyTree,
    *,
    sparsity: float,
    min_keep: Each[int] = 1,
    max_sparsity: Each[float] = 1.0,
    only: str | Sequence[str] | None = None,
) -> dict[str, float]:
    """Erdős-Rényi-Kernel: a layer's density falls with its size.

    The density of a layer whose kernel has the shape ``(..., n_in, n_out)`` is
    proportional to ``sum(shape) / prod(shape)``, capped at 1; what a cap costs, the
    others share. So connections grow with the number of neurons, not of their pairs.

    Args:
        layers: what `trace` returned (the kernel is the first member's), or a tree of
            arrays or shapes, of which the leaves with two axes or more count.
        sparsity: fraction of all units or entries to remove, in [0, 1].
        min_keep: how many units or entries every layer keeps at least.
        max_sparsity: no layer loses more than this fraction.
        only: names or patterns (as `fnmatch`) of the layers that lose anything.

    Returns:
        Name -> sparsity, whole counts of units or entries, together
        ``round(sparsity * N)``; for `per_group` and `per_leaf`.

    Raises:
        ValueError: if the limits leave fewer to remove than the budget asks for.

    Example:
        >>> import numpy as np
        >>> layers = {"a": np.zeros((4, 5)), "b": np.zeros((40, 50))}
        >>> erk(layers, sparsity=0.9)
        {'a': 0.1, 'b': 0.908}

    References:
        Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020;
        Mocanu et al., `Scalable training of artificial neural networks with adaptive
        sparse connectivity <https://arxiv.org/abs/1707.04780>`_, 2018
    """
    found = _layers(layers, only)
    sizes = {name: size for name, (size, _) in found.items()}
    raw = {n: sum(shape) / max(math.prod(shape), 1) for n, (_, shape) in found.items()}
    return _counted(sizes, _most(sizes, min_keep, max_sparsity), sparsity, raw)


def lamp(
    scores: PyTree,
    *,
    sparsity: float,
    min_keep: Each[int] = 1,
    max_sparsity: Each[float] = 1.0,
    only: str | Sequence[str] | None = None,
) -> dict[str, float]:
    """Layer-adaptive sparsity: one threshold on scores relative to what stays.

    An entry with score ``u`` is rated ``u^2 / sum of v^2`` over the entries ``v`` of
    its layer that leave no earlier, and the lowest of all layers go. The order within
    a layer stays as it is, so the result is a sparsity for each.

    Args:
        scores: group name -> float ``[size]`` (`group_scores`), or a tree of floats
            like the parameters (`scores.magnitude`); concrete.
        sparsity: fraction of all units or entries to remove, in [0, 1].
        min_keep: how many units or entries every layer keeps at least.
        max_sparsity: no layer loses more than this fraction.
        only: names or patterns (as `fnmatch`) of the layers that lose anything.

    Returns:
        Name -> sparsity, whole counts of units or entries, together
        ``round(sparsity * N)``; for `per_group` and `per_leaf`.

    Example:
        >>> import numpy as np
        >>> lamp({"a": np.array([1.0, 2.0]), "b": np.array([3.0, 4.0])}, sparsity=0.25)
        {'a': 0.5, 'b': 0.0}

    References:
        Lee et al., `Layer-adaptive sparsity for the Magnitude-based Pruning
        <https://arxiv.org/abs/2010.07611>`_, 2021
    """
    leaves = {
        name: concrete_array(f"scores[{name}]", leaf)
        for name, leaf in named_leaves(scores).items()
    }
    rated = {name: _lamp(leaf.astype(np.float64)) for name, leaf in leaves.items()}
    rated = {name: rated[name] for name in selected(rated, only, "layers")}
    limits = {"min_keep": min_keep, "max_sparsity": max_sparsity}
    masks = across_leaves(rated, sparsity=sparsity, only=list(rated), **limits)
    return {name: float(1 - masks[name].mean()) for name in rated}


def _lamp(scores: np.ndarray) -> np.ndarray:
    order = np.argsort(scores, axis=None, kind="stable")
    squares = np.square(scores.ravel()[order])
    # w² over the sum of the squares that are at least as large, itself included.
    left = np.cumsum(squares[::-1])[::-1]
    rated = np.empty_like(squares)
    rated[order] = squares / np.where(left > 0, left, 1.0)
    return rated.reshape(scores.shape)


# --- sharing -------------------------------------------------------------------------


def _layers(
    layers: Groups | PyTree, only: str | Sequence[str] | None
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Name -> (how many can go, shape of the kernel)."""
    if isinstance(layers, Groups):
        found = {
            name: (group.size, layers.shapes[group.members[0].path])
            for name, group in layers.items()
        }
    else:
        shapes = {name: np.shape(leaf) for name, leaf in named_leaves(layers).items()}
        found = {n: (math.prod(s), s) for n, s in shapes.items() if len(s) >= 2}
    return {name: found[name] for name in selected(found, only, "layers")}


def _most(
    sizes: Mapping[str, int], min_keep: Each[int], max_sparsity: Each[float]
) -> dict[str, int]:
    limits = limits_of(sizes, min_keep, 1, max_sparsity)
    return {name: size - limits[name].least(size) for name, size in sizes.items()}


def _counted(
    sizes: Mapping[str, int],
    most: Mapping[str, int],
    sparsity: float,
    density: Mapping[str, float],
) -> dict[str, float]:
    """Sparsities whose densities are proportional, as whole counts that add up."""
    total = round(fraction("sparsity", sparsity) * sum(sizes.values()))
    if total > sum(most.values()):
        raise ValueError(
            f"sparsity={sparsity} asks for {total} of {sum(sizes.values())}, but the "
            f"limits leave only {sum(most.values())} to remove in {len(sizes)} layers"
        )
    size = np.array([sizes[name] for name in sizes], float)
    least = size - [most[name] for name in sizes]
    raw = np.array([density[name] for name in sizes])
    # kept = clip(scale * density * size): the scale that meets the total.
    below, above = 0.0, 2 / min(raw, default=1.0)
    for _ in range(200):
        scale = (below + above) / 2
        fits = np.clip(scale * raw * size, least, size).sum() <= size.sum() - total
        below, above = (scale, above) if fits else (below, scale)
    kept = np.clip(below * raw * size, least, size)
    gone = np.floor(size - kept + 1e-9).astype(int)
    room = np.array([most[name] for name in sizes]) - gone
    order = np.argsort(-np.where(room > 0, size - kept - gone, -1.0), kind="stable")
    gone[order[: total - gone.sum()]] += 1
    return {
        name: float(n / max(sizes[name], 1))
        for name, n in zip(sizes, gone.tolist(), strict=True)
    }
