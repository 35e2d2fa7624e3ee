"""VGG with BatchNorm: the CIFAR, ImageNet and digits forms."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from ._layers import (
    as_images,
    batch_norm,
    check_dropout,
    check_positive,
    check_sizes,
    conv,
    dropout,
    he_fan_out,
    scale_width,
)

_STAGES = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def vgg_widths(depth: int) -> tuple[int | str, ...]:
    """Lists the filters of each convolution of VGG, "M" where it pools.

    Args:
        depth: 11, 13, 16 or 19, the number of layers with weights in the paper.

    Returns:
        Widths in order, for `VGG(widths=...)`.

    Raises:
        ValueError: if the paper has no net of this depth.

    Example:
        >>> vgg_widths(11)
        (64, 'M', 128, 'M', 256, 256, 'M', 512, 512, 'M', 512, 512, 'M')
    """
    if depth not in _STAGES:
        raise ValueError(f"VGG depth must be one of {sorted(_STAGES)}, got {depth}")
    widths: list[int | str] = []
    for width, repeats in zip((64, 128, 256, 512, 512), _STAGES[depth], strict=True):
        widths += [width] * repeats + ["M"]
    return tuple(widths)


class VGG(nn.Module):
    """VGG: 3x3 convolutions, each followed by BatchNorm and ReLU, and max pooling.

    The default is the CIFAR form of VGG-16: five poolings take 32x32 to 1x1, one dense
    layer follows, 14,728,266 parameters for 10 classes. `imagenet_vgg` has the paper's
    two hidden dense layers on 7x7 positions, 138,365,992 parameters.
    Submodules: `conv1`, `bn1`, ..., `dense1`, ..., `head`. Dropout follows each
    conv-BN-ReLU, the baseline of Batch Bridgeout.

    Args:
        num_classes: number of logits.
        widths: filters of each convolution in order and "M" for a 2x2 max pooling,
            such as `(45, 64, "M", 128)`; `vgg_widths(depth)` gives the paper's.
        head_widths: units of each hidden dense layer.
        pool: "mean" over all positions, or "flatten" them, before the dense layers.
        width_multiplier: factor on every width but the number of classes.
        batch_norm: whether each convolution is followed by BatchNorm.
        use_bias: whether convolutions have a bias, as in the published counts.
        dropout_rate: probability of dropping an activation; needs the `dropout`
            stream.
        dropout_target: fraction of the weakest feature maps that may be dropped.
        head_dropout_rate: ordinary dropout after each hidden dense layer.
        bn_momentum: share of the old running statistics kept in a training step.
        kernel_init: initialiser of the convolutions.
        dtype: type of the computation and of the logits; parameters stay float32.

    Raises:
        ValueError: if a width, a rate or `pool` is not as above, at construction.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = VGG(widths=(4, "M", 6), num_classes=3)
        >>> images = jnp.zeros((1, 8, 8, 1))
        >>> variables = jax.eval_shape(net.init, jax.random.key(0), images)
        >>> variables["params"]["conv2"]["kernel"].shape
        (3, 3, 4, 6)

    References:
        Simonyan and Zisserman, `Very Deep Convolutional Networks for Large-Scale Image
        Recognition <https://arxiv.org/abs/1409.1556>`_, 2014, Table 1.
    """

    num_classes: int = 10
    widths: Sequence[int | str] = vgg_widths(16)
    head_widths: Sequence[int] = ()
    pool: Literal["mean", "flatten"] = "mean"
    width_multiplier: float = 1.0
    batch_norm: bool = True
    use_bias: bool = True
    dropout_rate: float = 0.0
    dropout_target: float = 1.0
    head_dropout_rate: float = 0.0
    bn_momentum: float = 0.9
    kernel_init: Initializer = he_fan_out
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        check_widths(self.widths)
        check_positive("head_widths", self.head_widths)
        check_sizes(self.width_multiplier, num_classes=self.num_classes)
        check_dropout(self.dropout_rate, self.dropout_target)
        check_dropout(self.head_dropout_rate, 1.0)
        if self.pool not in ("mean", "flatten"):
            raise ValueError(f'pool must be "mean" or "flatten", got {self.pool!r}')
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits."""
        x = as_images(x, self.dtype)
        _check_size(x, self.widths)
        x = self._features(x, train=train)
        x = x.mean(axis=(1, 2)) if self.pool == "mean" else x.reshape((x.shape[0], -1))
        for index, width in enumerate(self.head_widths, 1):
            features = scale_width(width, self.width_multiplier)
            x = nn.Dense(features, dtype=self.dtype, name=f"dense{index}")(x)
            x = nn.relu(x)
            x = nn.Dropout(self.head_dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)

    def _features(self, x: jax.Array, *, train: bool) -> jax.Array:
        layer = partial(
            conv,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
        )
        index = 0
        for width in self.widths:
            if isinstance(width, str):
                x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
                continue
            index += 1
            features = scale_width(width, self.width_multiplier)
            x = layer(features, 3, name=f"conv{index}")(x)
            if self.batch_norm:
                x = batch_norm(
                    x,
                    name=f"bn{index}",
                    train=train,
                    momentum=self.bn_momentum,
                    dtype=self.dtype,
                )
            x = nn.relu(x)
            x = dropout(
                x, rate=self.dropout_rate, target=self.dropout_target, train=train
            )
        return x


def cifar_vgg(depth: int = 16, **kwargs: Any) -> VGG:
    """Builds VGG for 32x32 images: mean pooling and one dense layer, 10 classes.

    With 10 classes VGG-11 has 9,231,114 parameters, 13: 9,416,010, 16: 14,728,266,
    19: 20,040,522.

    Args:
        depth: 11, 13, 16 or 19.
        **kwargs: fields of `VGG` but `widths`.

    Returns:
        The module.

    Raises:
        ValueError: if the paper has no net of this depth.

    Example:
        >>> cifar_vgg(16, num_classes=100).widths[:6]
        (64, 64, 'M', 128, 128, 'M')
    """
    return VGG(widths=vgg_widths(depth), **kwargs)


def imagenet_vgg(depth: int = 16, **kwargs: Any) -> VGG:
    """Builds VGG for 224x224 images: two hidden dense layers on 7x7 positions.

    With 1000 classes and BatchNorm VGG-16 has 138,365,992 parameters, VGG-19
    143,678,248; without it 138,357,544 and 143,667,240 (published 138M, 144M).

    Args:
        depth: 11, 13, 16 or 19.
        **kwargs: fields of `VGG` but `widths`; `num_classes` is 1000, `head_widths`
            (4096, 4096) and `pool` "flatten" unless given. The paper trained with
            `head_dropout_rate` 0.5.

    Returns:
        The module.

    Raises:
        ValueError: if the paper has no net of this depth.

    Example:
        >>> imagenet_vgg(16).head_widths
        (4096, 4096)
    """
    fields: dict[str, Any] = {
        "num_classes": 1000,
        "head_widths": (4096, 4096),
        "pool": "flatten",
    }
    return VGG(widths=vgg_widths(depth), **(fields | kwargs))


def check_widths(widths: Sequence[int | str]) -> None:
    """Raises unless every entry is a positive int or "M"."""
    for index, width in enumerate(widths):
        if isinstance(width, str) and width != "M":
            raise ValueError(
                f'widths[{index}] must be a positive int or "M", got {width!r}'
            )
    check_positive("widths", [1 if width == "M" else width for width in widths])


def _check_size(x: jax.Array, widths: Sequence[int | str]) -> None:
    poolings = sum(width == "M" for width in widths)
    if min(x.shape[1:3]) < 2**poolings:
        raise ValueError(
            f"{poolings} poolings need images of at least {2**poolings}x{2**poolings},"
            f" got {x.shape[1]}x{x.shape[2]}; give widths with fewer 'M'"
        )
