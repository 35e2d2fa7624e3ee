"""What the layers of NNX know of their own size, and which of them compute with it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from jaxprune.integrations._nnx_attention import fit_attention

Kept = Mapping[str, tuple[np.ndarray | None, ...]]


@functools.singledispatch
def fit_sizes(layer: Any, kept: Kept) -> None:
    """Sets the sizes that an NNX layer remembers to those of its sliced variables.

    Knows the layers of Flax and does nothing for others. A layer of your own that
    keeps a width as a number registers how to update it.

    Args:
        layer: the new layer; its variables are sliced already. Changed in place.
        kept: attribute -> for each axis of that variable which positions stay, bool
            of the size before slicing, or None where all stay.

    Example:
        >>> from flax import nnx
        >>> from jaxprune.integrations._nnx_layers import fit_sizes
        >>> class Scaled(nnx.Module):
        ...     def __init__(self, width, rngs):
        ...         self.width, self.layer = width, nnx.Linear(3, width, rngs=rngs)
        >>> @fit_sizes.register
        ... def _(layer: Scaled, kept):
        ...     layer.width = layer.layer.kernel.shape[-1]
    """
    del layer, kept


@fit_sizes.register
def _(layer: nnx.Linear, kept: Kept) -> None:
    layer.in_features, layer.out_features = layer.kernel.shape


@fit_sizes.register
def _(layer: nnx.LinearGeneral, kept: Kept) -> None:
    shape = layer.kernel.shape[len(layer.batch_axis) :]
    inputs = len(layer.axis)
    layer.in_features, layer.out_features = shape[:inputs], shape[inputs:]


@fit_sizes.register
def _(layer: nnx.Einsum, kept: Kept) -> None:
    layer.kernel_shape = layer.kernel.shape
    layer.bias_shape = None if layer.bias is None else layer.bias.shape


@fit_sizes.register
def _(layer: nnx.Conv, kept: Kept) -> None:
    groups = _groups_left(kept["kernel"][-1], layer.feature_group_count)
    layer.feature_group_count = groups
    layer.kernel_shape = layer.kernel.shape
    layer.in_features = layer.kernel_shape[-2] * groups
    layer.out_features = layer.kernel_shape[-1]


@fit_sizes.register
def _(layer: nnx.ConvTranspose, kept: Kept) -> None:
    layer.kernel_shape = layer.kernel.shape
    ends = (
        layer.kernel_shape[:-3:-1]
        if layer.transpose_kernel
        else layer.kernel_shape[-2:]
    )
    layer.in_features, layer.out_features = ends


@fit_sizes.register
def _(layer: nnx.Embed, kept: Kept) -> None:
    layer.num_embeddings, layer.features = layer.embedding.shape


@fit_sizes.register
def _(layer: nnx.BatchNorm, kept: Kept) -> None:
    layer.num_features = layer.mean.shape[-1]


@fit_sizes.register
def _(layer: nnx.LayerNorm | nnx.RMSNorm | nnx.InstanceNorm, kept: Kept) -> None:
    for name in kept:  # scale, bias, or neither
        layer.num_features = getattr(layer, name).shape[-1]


@fit_sizes.register
def _(layer: nnx.GroupNorm, kept: Kept) -> None:
    for name, (positions, *_) in kept.items():
        groups = _groups_left(positions, layer.num_groups)
        size = getattr(layer, name).shape[0] // groups
        layer.num_groups, layer.group_size = groups, size
        break


@fit_sizes.register
def _(layer: nnx.MultiHeadAttention, kept: Kept) -> None:
    fit_attention(layer)


@fit_sizes.register
def _(layer: nnx.GRUCell | nnx.OptimizedLSTMCell | nnx.SimpleCell, kept: Kept) -> None:
    layer.in_features = layer.dense_i.kernel.shape[0]
    layer.hidden_features = layer.dense_h.kernel.shape[0]


@fit_sizes.register
def _(layer: nnx.LSTMCell, kept: Kept) -> None:
    layer.in_features = layer.ii.kernel.shape[0]
    layer.hidden_features = layer.hi.kernel.shape[0]


@fit_sizes.register
def _(layer: nnx.LoRA, kept: Kept) -> None:
    layer.in_features = layer.lora_a.shape[0]
    layer.out_features = layer.lora_b.shape[1]


def _groups_left(positions: np.ndarray | None, count: int) -> int:
    """How many of `count` equal groups along an axis keep anything, at least 1."""
    if positions is None:
        return count
    return max(1, int(positions.reshape(count, -1).any(axis=1).sum()))


# Layers that compute with a size of their own, and what to pin to keep it.
_COMPUTED_WITH: dict[type[nnx.Module], tuple[str, Callable, tuple[str, ...]]] = {
    nnx.LayerNorm: ("num_features", lambda layer: layer.num_features, ("*",)),
    nnx.RMSNorm: ("num_features", lambda layer: layer.num_features, ("*",)),
    nnx.GroupNorm: ("group_size", lambda layer: layer.group_size, ("*",)),
    nnx.MultiHeadAttention: (
        "head_dim of query and value",
        lambda layer: (layer.query.kernel.shape[-1], layer.value.kernel.shape[-1]),
        ("query/kernel:2", "value/kernel:2"),
    ),
}


def refusal(cause: str, model: nnx.Module, small: nnx.Module) -> str:
    """Why a smaller module does not compute the pruned function, and what to do.

    Args:
        cause: what was seen.
        model: the original.
        small: the module with sliced variables and fitted sizes.

    Returns:
        The text of an error that names the layers that compute with their own size.
    """
    before = dict(nnx.iter_modules(model))
    causes, pins = [], []
    for path, layer in nnx.iter_modules(small):
        for kind, (size, read, leaves) in _COMPUTED_WITH.items():
            if not isinstance(layer, kind) or read(layer) == read(before[path]):
                continue
            name = "/".join(map(str, path)) or "the module itself"
            causes.append(
                f"{name} ({kind.__name__}) computes with its {size}, {read(layer)} "
                f"instead of {read(before[path])}"
            )
            pins += ["/".join(["params", *map(str, path), leaf]) for leaf in leaves]
    more = f" and {len(causes) - 3} more" if len(causes) > 3 else ""
    pin = f", or prune again with pin={pins}" if pins else ""
    return (
        f"this cut has no module of the same classes: {cause}. Likely cause: "
        f"{'; '.join(causes[:3]) or _written_sizes(small)}{more}. Use narrow instead"
        f"{pin}"
    )


def _written_sizes(small: nnx.Module) -> str:
    """Where a size may be written in code, if no layer of Flax is to blame."""
    own = [type(layer).__name__ for _, layer in nnx.iter_modules(small)]
    names = ", ".join(dict.fromkeys(n for n in own if not hasattr(nnx, n)))
    return (
        f"a width written in the code of {names or 'the caller'} (a pad, a reshape, a "
        "division by it); a layer that keeps it as an attribute can register with "
        "integrations.nnx.fit_sizes"
    )
