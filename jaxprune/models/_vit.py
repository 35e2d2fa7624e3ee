"""Vision Transformer, pre-norm, with its widths open block by block."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ._layers import (
    as_images,
    at_least_float32,
    check_blocks,
    check_dropout,
    check_positive,
    check_sizes,
    layer_norm,
    scale_width,
)

_init = nn.initializers.truncated_normal(stddev=0.02)
PerBlock = int | Sequence[int]


class ViT(nn.Module):
    """Vision Transformer: patches, learned positions, pre-norm blocks, class token.

    The default is ViT-B/16: 86,567,656 parameters for 224x224 images and 1000 classes.
    `MODELS["vit_tiny"]` is DeiT-Ti, a quarter as wide: 5,717,416. Submodules:
    `patch_embed`, `block0` with `norm1`, `attention` (`query`, `key`, `value`, `out`),
    `norm2`, `mlp1`, `mlp2`; `norm`, `head`; parameters `cls_token`, `pos_embed`.
    Dropout follows the positions, each attention and both dense layers of an MLP.

    Args:
        num_classes: number of logits.
        patch_size: side of a patch; must divide the image's sides.
        width: channels of the residual stream.
        depth: number of blocks.
        num_heads: heads of each attention; an int, or one for each block.
        head_dim: channels of a query and a key in a head; an int, or one per block.
        value_dim: channels of a value in a head, likewise; None is `head_dim`.
        mlp_width: hidden units of each MLP, likewise; None is 4 times the stream.
        attention_scale: factor on the logits of the attention; None is
            `head_dim ** -0.5`. A net cut to fewer query channels needs the old one.
        pool: "cls" reads the class token, "mean" averages the patches without one.
        width_multiplier: factor on stream, heads and MLPs; heads keep their size.
        dropout_rate: probability of dropping an activation; needs the `dropout`
            stream.
        dtype: type of the computation and of the logits; parameters and the softmax
            stay float32.

    Raises:
        ValueError: if lengths do not match or a value is not as above, at construction;
            if patches do not tile the images, when called.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = ViT(patch_size=4, width=8, depth=2, num_heads=2, head_dim=4,
        ...           mlp_width=(16, 12), num_classes=3)
        >>> images = jnp.zeros((1, 8, 8, 1))
        >>> variables = jax.eval_shape(net.init, jax.random.key(0), images)
        >>> variables["params"]["block1"]["mlp1"]["kernel"].shape
        (8, 12)

    References:
        Dosovitskiy et al., `An Image is Worth 16x16 Words
        <https://arxiv.org/abs/2010.11929>`_, 2020, Table 1. Initialisation and DeiT-Ti:
        Touvron et al., `Training data-efficient image transformers
        <https://arxiv.org/abs/2012.12877>`_, 2020.
    """

    num_classes: int = 1000
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    num_heads: PerBlock = 12
    head_dim: PerBlock = 64
    value_dim: PerBlock | None = None
    mlp_width: PerBlock | None = None
    attention_scale: float | None = None
    pool: Literal["cls", "mean"] = "cls"
    width_multiplier: float = 1.0
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        check_sizes(
            self.width_multiplier,
            num_classes=self.num_classes,
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
        )
        for name in ("num_heads", "head_dim", "value_dim", "mlp_width"):
            value = getattr(self, name)
            if value is not None:
                values = _per_block(value, self.depth)
                check_blocks(name, values, self.depth)
                check_positive(name, values)
        check_dropout(self.dropout_rate, 1.0)
        if self.pool not in ("cls", "mean"):
            raise ValueError(f'pool must be "cls" or "mean", got {self.pool!r}')
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits."""
        drop = partial(nn.Dropout, self.dropout_rate, deterministic=not train)
        x = self._embed(as_images(x, self.dtype))
        x = drop()(x)
        for index, sizes in enumerate(self._blocks()):
            block = EncoderBlock(
                *sizes, self.attention_scale, drop, self.dtype, name=f"block{index}"
            )
            x = block(x)
        x = layer_norm(x, name="norm", dtype=self.dtype)
        x = x[:, 0] if self.pool == "cls" else x.mean(axis=1)
        return nn.Dense(
            self.num_classes, kernel_init=_init, dtype=self.dtype, name="head"
        )(x)

    def _embed(self, x: jax.Array) -> jax.Array:
        """Cuts images into patches and adds the class token and the positions."""
        size = self.patch_size
        if x.shape[1] % size or x.shape[2] % size:
            raise ValueError(
                f"patches of {size}x{size} do not tile images of"
                f" {x.shape[1]}x{x.shape[2]}; choose another patch_size"
            )
        width = scale_width(self.width, self.width_multiplier)
        x = nn.Conv(
            width,
            (size, size),
            strides=(size, size),
            padding="VALID",
            kernel_init=_init,
            dtype=self.dtype,
            name="patch_embed",
        )(x)
        x = x.reshape((x.shape[0], -1, width))
        if self.pool == "cls":
            token = self.param("cls_token", _init, (1, 1, width)).astype(self.dtype)
            token = jnp.broadcast_to(token, (x.shape[0], 1, width))
            x = jnp.concatenate([token, x], axis=1)
        positions = self.param("pos_embed", _init, (1, *x.shape[1:]))
        return x + positions.astype(self.dtype)

    def _blocks(self) -> list[tuple[int, int, int, int]]:
        """Lists heads, head size, value size and MLP width of every block."""
        scale = partial(scale_width, multiplier=self.width_multiplier)
        heads = _per_block(self.num_heads, self.depth)
        head_dims = _per_block(self.head_dim, self.depth)
        value_dims = _per_block(self.value_dim or self.head_dim, self.depth)
        mlp_widths = _per_block(self.mlp_width or 4 * self.width, self.depth)
        return list(
            zip(
                map(scale, heads),
                head_dims,
                value_dims,
                map(scale, mlp_widths),
                strict=True,
            )
        )


class EncoderBlock(nn.Module):
    """Attention and MLP, each on a normalised copy of the stream and added to it.

    Args:
        num_heads: heads of the attention.
        head_dim: channels of a query and a key in a head.
        value_dim: channels of a value in a head.
        mlp_width: hidden units of the MLP.
        scale: factor on the attention's logits; None is `head_dim ** -0.5`.
        drop: builds a dropout layer.
        dtype: type of the computation.
    """

    num_heads: int
    head_dim: int
    value_dim: int
    mlp_width: int
    scale: float | None
    drop: Callable[[], nn.Dropout]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [batch, length, width] to tokens."""
        dense = partial(nn.Dense, kernel_init=_init, dtype=self.dtype)
        attention = SelfAttention(
            self.num_heads,
            self.head_dim,
            self.value_dim,
            self.scale,
            self.dtype,
            name="attention",
        )
        y = attention(layer_norm(x, name="norm1", dtype=self.dtype))
        x = x + self.drop()(y)
        y = layer_norm(x, name="norm2", dtype=self.dtype)
        y = nn.gelu(dense(self.mlp_width, name="mlp1")(y), approximate=False)
        y = dense(x.shape[-1], name="mlp2")(self.drop()(y))
        return x + self.drop()(y)


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself; values may differ in size.

    Args:
        num_heads: number of heads.
        head_dim: channels of a query and a key in a head.
        value_dim: channels of a value in a head.
        scale: factor on the logits; None is `head_dim ** -0.5`.
        dtype: type of the computation; the softmax is at least float32.
    """

    num_heads: int
    head_dim: int
    value_dim: int
    scale: float | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [batch, length, width] to tokens."""
        project = partial(nn.DenseGeneral, kernel_init=_init, dtype=self.dtype)
        query = project((self.num_heads, self.head_dim), name="query")(x)
        key = project((self.num_heads, self.head_dim), name="key")(x)
        value = project((self.num_heads, self.value_dim), name="value")(x)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key)
        weights = nn.softmax(at_least_float32(logits)).astype(self.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return project(x.shape[-1], axis=(-2, -1), name="out")(y)


def _per_block(value: PerBlock, depth: int) -> tuple[int, ...]:
    return (value,) * depth if isinstance(value, int) else tuple(value)
