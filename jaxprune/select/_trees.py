"""Trees of scores: which leaves have any, what they may lose, masks like them."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.core._checks import check_leaves
from jaxprune.core._leaves import kernel_paths, named_leaves
from jaxprune.core._limits import Each, limits_of
from jaxprune.core._placement import readable
from jaxprune.core._types import Array, PyTree
from jaxprune.select._lowest import count_nan


def _is_none(leaf: object) -> bool:
    return leaf is None


def scored(scores: PyTree) -> dict[str, Array]:
    """Path -> scores, for the leaves that have any."""
    check_leaves(scores, "scores")
    return named_leaves(scores)


def default_leaves(
    leaves: Mapping[str, Array], only: str | Sequence[str] | None
) -> str | Sequence[str] | None:
    """What `only` selects where it is None: the kernels; all leaves if there are none.

    Trees without a kernel hold scores of whole units, or what a caller has chosen.
    """
    if only is not None:
        return only
    able = {path: leaf for path, leaf in leaves.items() if not _unscored(leaf)}
    if not able and leaves:
        return None  # for `checked` to name one
    return kernel_paths(able) or list(able) or None


def _unscored(leaf: Array) -> str:
    """Why this leaf has no scores; empty if it has."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "a shape without values; give arrays"
    if not hasattr(leaf, "dtype"):
        return f"a {type(leaf).__name__}, not an array"
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return f"a random key ({leaf.dtype})"
    return ""


def checked(path: str, leaf: Array, nan: bool = True) -> Array:
    """The scores of a leaf as floats; without NaN, where that is known and wanted."""
    if reason := _unscored(leaf):
        raise TypeError(
            f"scores[{path}] is {reason}: it has no score; put None there, or leave it "
            "out of only="
        )
    leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(
            f"scores[{path}] are {leaf.dtype}, which has no order; take jnp.abs first"
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        leaf = leaf.astype(np.float32)
    if isinstance(leaf, Tracer) or not nan:
        return leaf
    found = count_nan(leaf) if readable(leaf) else int(jnp.isnan(leaf).sum())
    if found:
        raise ValueError(f"scores[{path}] is NaN for {found} entries")
    return leaf


def caps(
    leaves: Mapping[str, Array], min_keep: Each[int], max_sparsity: Each[float]
) -> dict[str, int]:
    """How many entries every leaf may lose."""
    limits = limits_of(leaves, min_keep, 1, max_sparsity)
    return {
        path: np.size(leaf) - limits[path].least(np.size(leaf))
        for path, leaf in leaves.items()
    }


def masks_like(scores: PyTree, removed: Mapping[str, Array]) -> PyTree:
    """Masks like the scores, None included: what is not named is kept whole."""
    paths, treedef = jax.tree.flatten(scores, is_leaf=_is_none)
    named = iter(named_leaves(scores))
    masks = []
    for leaf in paths:
        gone = None if leaf is None else removed.get(next(named))
        masks.append(np.array(True) if gone is None else ~gone)
    return treedef.unflatten(masks)
