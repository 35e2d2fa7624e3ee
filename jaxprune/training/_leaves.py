"""Which leaves of the parameters a regulariser acts on."""

import math
from collections.abc import Callable
from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxprune.core._leaves import NOT_KERNELS, keystr, named_leaves
from jaxprune.core._types import PyTree, Scalar

# One bool per leaf, True = chosen: tree like the parameters or a prefix of it, or a
# function from them to one; None for the default.
MaskOrFn: TypeAlias = PyTree | Callable[[optax.Params], PyTree] | None


def select_leaves(
    params: optax.Params, mask: MaskOrFn = None, min_ndim: int = 0, gets: str = "noise"
) -> dict[str, None]:
    """Paths of the chosen leaves, as the keys of a dict of None.

    Such a dict is tree structure: it can sit in a state and is known while tracing.

    Args:
        params: tree of arrays.
        mask: tree of bool like `params` or a prefix of it, or a function from `params`
            to one; None chooses floating leaves of two axes or more that are not named
            bias, b, scale or offset.
        min_ndim: axes that a chosen leaf must have.
        gets: what the chosen leaves get, for the messages.
    """
    leaves = named_leaves(params)
    if not leaves:
        # optax.tree.map_params calls init on an empty stand-in for the parameters; a
        # single leaf there matches the dict of any real state.
        return cast(dict[str, None], jnp.zeros((), bool))
    chosen = _default_mask(params) if mask is None else _as_mask(mask, params, gets)
    selected = {name: None for name in leaves if chosen[name]}
    if not selected:
        shown = [
            f"{name} of {jnp.result_type(leaf)}"
            for name, leaf in list(leaves.items())[:5]
        ]
        raise ValueError(
            f"none of the {len(leaves)} leaves ({', '.join(shown)}, ...) gets {gets}; "
            "give a mask that is True for some leaf (the default takes kernels of "
            "floats, of two axes or more)"
        )
    for name in selected:
        shape, dtype = leaves[name].shape, leaves[name].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"mask selects {name!r} of dtype {dtype}, expected floats")
        if len(shape) < min_ndim:
            raise ValueError(
                f"target_fraction ranks the inputs of each output filter, but {name!r} "
                f"has shape {shape}; leave it out of the mask"
            )
    return selected


def reaches(inputs: int, target_fraction: Scalar) -> bool:
    """Whether targeting leaves anything to noise; True where that is not known yet."""
    if isinstance(target_fraction, Tracer):
        return True
    # The margin of `lowest`.
    return math.floor(inputs * float(target_fraction) * (1 + 1e-6)) >= 1


def _default_mask(params: optax.Params) -> dict[str, bool]:
    return {
        name: np.ndim(w) >= 2
        and jnp.issubdtype(w.dtype, jnp.floating)
        and name.rsplit("/", 1)[-1] not in NOT_KERNELS
        for name, w in named_leaves(params).items()
    }


def _as_mask(mask: MaskOrFn, params: optax.Params, gets: str) -> dict[str, bool]:
    tree = mask(params) if callable(mask) else mask
    for path, flag in jax.tree.leaves_with_path(tree):
        if np.shape(flag) != () or np.asarray(flag).dtype.kind != "b":
            raise TypeError(
                f"mask[{keystr(path)!r}] is {flag!r}, expected one bool per leaf "
                f"(True = gets {gets}); elementwise pruning masks go elsewhere"
            )
    try:
        full = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), tree, params)
    except ValueError as error:
        raise ValueError(f"mask is not a tree prefix of params: {error}") from error
    return {name: bool(flag) for name, flag in named_leaves(full).items()}
