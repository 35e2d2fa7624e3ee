"""Depth: residual branches as units."""

import numpy as np

from jaxprune.core._groups import Groups
from jaxprune.core._names import listed, nearest


def without_branches(groups: Groups, *names: str) -> dict[str, np.ndarray]:
    """A decision that cuts whole residual branches and keeps everything else.

    The masked branch adds 0, so only its shortcut is left; `narrow` removes what
    computed the branch. Parameters that only rescale the stream inside of a branch (the
    first norm of a transformer's block) have the width of the stream and stay, though
    nothing reads them any more.

    Args:
        groups: what `trace` returned for ``writers="*"``, or for the writers of these
            branches.
        *names: of `Groups.branches`.

    Returns:
        Group name -> bool ``[size]``, all False: for `expand_masks`. Decisions for
        other groups can be added.

    Raises:
        ValueError: if a name is no branch.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def net(params, x):
        ...     h = x @ params["stem"]
        ...     h = h + jax.nn.relu(h @ params["block/up"]) @ params["block/down"]
        ...     return h @ params["head"]
        >>> shapes = {"stem": (2, 4), "block/up": (4, 8), "block/down": (8, 4),
        ...           "head": (4, 1)}
        >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
        >>> x = jnp.ones((1, 2))
        >>> groups = jaxprune.trace(net, params, x, writers="block/down:1")
        >>> dict(groups.branches)
        {'block': ('block/up:1', 'block/down:1')}
        >>> keep = jaxprune.without_branches(groups, "block")
        >>> masks = jaxprune.expand_masks(groups, keep)
        >>> small = jaxprune.slice_params(params, masks)
        >>> sum(leaf.size for leaf in small.values()), params["stem"].size + 4
        (12, 12)
        >>> jaxprune.narrow(net, masks)(small, x) == x @ params["stem"] @ params["head"]
        Array([[ True]], dtype=bool)
    """
    for name in names:
        if name not in groups.branches:
            known = listed(list(groups.branches)) if groups.branches else "none"
            raise ValueError(
                f"{name!r} is not a branch; the branches are {known}"
                f"{nearest(name, list(groups.branches))}; trace with writers='*' finds "
                "those whose value nothing but one sum reads"
            )
    cut = dict.fromkeys(group for name in names for group in groups.branches[name])
    return {group: np.zeros(groups[group].size, bool) for group in cut}
