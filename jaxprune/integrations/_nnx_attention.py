"""NNX attention whose heads have lost dimensions.

`nnx.MultiHeadAttention` divides its logits by the square root of the dimensions that it
finds in its queries, and its function takes queries, keys and values of one size. The
masked model divides by the square root of d, the dimensions before the cut. A module
with d' of them computes the same once its queries carry the rest:

    (c q) k / sqrt(d') = q k / sqrt(d),    c = sqrt(d' / d),

exact up to rounding. Queries and values that keep different numbers of dimensions are
padded with zeros to one size, which changes no product of them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class PaddedAttention:
    """An attention function for values of another size than the queries'.

    Attributes:
        attention_fn: as `nnx.dot_product_attention`, for queries, keys and values of
            one size.
    """

    attention_fn: Callable[..., jax.Array]

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, *args: Any, **kwargs
    ) -> jax.Array:
        """The attention function, on arrays padded with zeros to the larger size."""
        size = max(query.shape[-1], value.shape[-1])
        padded = (_padded(array, size) for array in (query, key, value))
        return self.attention_fn(*padded, *args, **kwargs)[..., : value.shape[-1]]


def _padded(array: jax.Array, size: int) -> jax.Array:
    before = [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, [*before, (0, size - array.shape[-1])])


def fit_attention(layer: nnx.MultiHeadAttention) -> None:
    """Sets what attention remembers of the sizes of its sliced variables, in place."""
    layer.in_features, layer.num_heads, layer.head_dim = layer.query.kernel.shape
    layer.in_kv_features, layer.num_kv_heads, _ = layer.key.kernel.shape
    layer.qkv_features = layer.num_heads * layer.head_dim
    layer.out_features = layer.out.kernel.shape[-1]
    plain = getattr(layer.attention_fn, "attention_fn", layer.attention_fn)
    # With dropout Flax's own function takes both sizes.
    takes_both = plain is nnx.dot_product_attention and layer.dropout_rate > 0
    alike = layer.head_dim == layer.value.kernel.shape[-1]
    layer.attention_fn = plain if alike or takes_both else PaddedAttention(plain)


def scale_queries(before: nnx.Module, small: nnx.Module, *, undo: bool = False) -> None:
    """Makes the queries of `small` carry the scale of `before`, in place.

    Args:
        before: the module before the cut.
        small: the smaller one, its variables sliced and its sizes fitted.
        undo: takes the scale off again.

    Raises:
        ValueError: if a scale is needed and the variables are abstract.
    """
    originals, scaled = dict(nnx.iter_modules(before)), set()
    for path, layer in nnx.iter_modules(small):
        if not isinstance(layer, nnx.MultiHeadAttention):
            continue
        factor = math.sqrt(_scaled_by(layer) / _scaled_by(originals[path]))
        factor = 1 / factor if undo else factor
        for variable in (layer.query.kernel, layer.query.bias):
            if factor == 1 or variable is None or id(variable) in scaled:
                continue
            scaled.add(id(variable))  # layers may share it
            value = variable.get_value()
            if isinstance(value, jax.ShapeDtypeStruct):
                raise ValueError(
                    f"{'/'.join(map(str, path)) or 'the module'} loses dimensions of "
                    f"its heads, so its queries are multiplied by {factor:.3g}, but "
                    "they are abstract; give a module with arrays"
                )
            variable.set_value(value * factor)


def _scaled_by(layer: Any) -> int:
    """The dimensions by whose square root the logits are divided."""
    query, value = layer.query.kernel.shape[-1], layer.value.kernel.shape[-1]
    padded = isinstance(layer.attention_fn, PaddedAttention)
    return max(query, value, 1) if padded else max(query, 1)
