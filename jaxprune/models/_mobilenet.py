"""MobileNet V1 and V2: depthwise separable convolutions, inverted residuals."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from ._layers import (
    as_images,
    batch_norm,
    check_blocks,
    check_dropout,
    check_positive,
    check_sizes,
    check_stages,
    conv,
    he_fan_in,
    scale_width,
)


class MobileNetV1(nn.Module):
    """MobileNet V1: depthwise 3x3 and pointwise 1x1 convolutions in turn, BN and ReLU.

    4,231,976 parameters for 1000 classes (published 4.2M; 0.75: 2.6M, 0.5: 1.3M,
    0.25: 0.5M). Submodules: `conv1`, `bn1`, `block0` with `depthwise`, `bn1`,
    `pointwise`, `bn2`, ..., `head`. Dropout precedes the head.

    Args:
        num_classes: number of logits.
        widths: output channels of each block; its length is the depth.
        strides: stride of each block's depthwise convolution.
        stem_width: channels of the first convolution.
        stem_stride: stride of the first convolution; 1 for small images.
        width_multiplier: factor on every width but the number of classes.
        dropout_rate: probability of dropping a feature; needs the `dropout` stream.
        bn_momentum: share of the old running statistics kept in a training step.
        kernel_init: initialiser of the convolutions.
        dtype: type of the computation and of the logits; parameters stay float32.

    Raises:
        ValueError: if lengths do not match or a number is not as above, at
            construction.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = MobileNetV1(widths=(6, 8), strides=(1, 2), stem_width=4)
        >>> images = jnp.zeros((1, 8, 8, 3))
        >>> variables = jax.eval_shape(net.init, jax.random.key(0), images)
        >>> variables["params"]["block1"]["depthwise"]["kernel"].shape
        (3, 3, 1, 6)

    References:
        Howard et al., `MobileNets: Efficient Convolutional Neural Networks for Mobile
        Vision Applications <https://arxiv.org/abs/1704.04861>`_, 2017, Tables 1 and 6.
    """

    num_classes: int = 1000
    widths: Sequence[int] = (64, 128, 128, 256, 256) + (512,) * 6 + (1024, 1024)
    strides: Sequence[int] = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    stem_width: int = 32
    stem_stride: int = 2
    width_multiplier: float = 1.0
    dropout_rate: float = 0.0
    bn_momentum: float = 0.9
    kernel_init: Initializer = he_fan_in
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        check_positive("widths", self.widths)
        check_blocks("strides", self.strides, len(self.widths))
        check_positive("strides", self.strides)
        check_sizes(
            self.width_multiplier,
            num_classes=self.num_classes,
            stem_width=self.stem_width,
            stem_stride=self.stem_stride,
        )
        check_dropout(self.dropout_rate, 1.0)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits."""
        layer, norm = _parts(self, train)
        width = scale_width(self.stem_width, self.width_multiplier)
        x = as_images(x, self.dtype)
        x = layer(width, 3, stride=self.stem_stride, name="conv1")(x)
        x = nn.relu(norm(x, name="bn1"))
        for index, (width, stride) in enumerate(
            zip(self.widths, self.strides, strict=True)
        ):
            width = scale_width(width, self.width_multiplier)
            x = SeparableBlock(width, stride, layer, norm, name=f"block{index}")(x)
        return _head(self, x, train)


class SeparableBlock(nn.Module):
    """A depthwise 3x3 and a pointwise 1x1 convolution, each with BN and ReLU.

    Args:
        width: channels that leave the block.
        stride: stride of the depthwise convolution.
        layer: builds a convolution from its width, kernel size, stride and name.
        norm: applies BatchNorm under a name.
    """

    width: int
    stride: int
    layer: Callable[..., nn.Conv]
    norm: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to the next features."""
        x = _depthwise(self.layer, x, self.stride)
        x = nn.relu(self.norm(x, name="bn1"))
        x = self.layer(self.width, 1, name="pointwise")(x)
        return nn.relu(self.norm(x, name="bn2"))


class MobileNetV2(nn.Module):
    """MobileNet V2: inverted residuals with linear bottlenecks, ReLU6.

    3,504,872 parameters for 1000 classes (published 3.4M). Submodules:
    `conv1`, `bn1`, `block0_0` (stage, index) with `expand`, `bn1` (where the block
    expands), `depthwise`, `bn2`, `project`, `bn3`; `conv2`, `bn2`, `head`. The residual
    sum is taken where input and output have the same shape. Dropout precedes the head.

    Args:
        num_classes: number of logits.
        stage_sizes: blocks in each stage.
        widths: channels of the stream in each stage.
        strides: stride of the first block of each stage.
        expansions: in each stage, inner channels over input channels; 1 leaves out the
            expanding convolution.
        inner_widths: inner channels of each block, over all stages; None follows
            `expansions`. Where an expansion is 1 they must equal the block's input to
            leave out the expanding convolution.
        stem_width: channels of the first convolution.
        stem_stride: stride of the first convolution; 1 for small images.
        head_width: channels of the last convolution; a multiplier below 1 leaves it.
        width_multiplier: factor on the widths. Any but 1 rounds them to multiples of
            8 as the paper's code does, `inner_widths` to the nearest int.
        dropout_rate: probability of dropping a feature; needs the `dropout` stream.
        bn_momentum: share of the old running statistics kept in a training step.
        kernel_init: initialiser of the convolutions.
        dtype: type of the computation and of the logits; parameters stay float32.

    Raises:
        ValueError: if lengths do not match or a number is not as above, at
            construction.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = MobileNetV2(
        ...     stage_sizes=(2,), widths=(8,), strides=(1,), expansions=(6,),
        ...     inner_widths=(20, 30), stem_width=8, head_width=16)
        >>> images = jnp.zeros((1, 8, 8, 3))
        >>> variables = jax.eval_shape(net.init, jax.random.key(0), images)
        >>> variables["params"]["block0_1"]["expand"]["kernel"].shape
        (1, 1, 8, 30)

    References:
        Sandler et al., `MobileNetV2: Inverted Residuals and Linear Bottlenecks
        <https://arxiv.org/abs/1801.04381>`_, 2018, Tables 2 and 4.
    """

    num_classes: int = 1000
    stage_sizes: Sequence[int] = (1, 2, 3, 4, 3, 3, 1)
    widths: Sequence[int] = (16, 24, 32, 64, 96, 160, 320)
    strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1)
    expansions: Sequence[int] = (1, 6, 6, 6, 6, 6, 6)
    inner_widths: Sequence[int] | None = None
    stem_width: int = 32
    stem_stride: int = 2
    head_width: int = 1280
    width_multiplier: float = 1.0
    dropout_rate: float = 0.0
    bn_momentum: float = 0.9
    kernel_init: Initializer = he_fan_in
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        check_stages(
            self.stage_sizes,
            widths=self.widths,
            strides=self.strides,
            expansions=self.expansions,
        )
        check_blocks("inner_widths", self.inner_widths, sum(self.stage_sizes))
        check_positive("inner_widths", self.inner_widths or ())
        check_sizes(
            self.width_multiplier,
            num_classes=self.num_classes,
            stem_width=self.stem_width,
            stem_stride=self.stem_stride,
            head_width=self.head_width,
        )
        check_dropout(self.dropout_rate, 1.0)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits."""
        layer, norm = _parts(self, train)
        stem_width = scale_to_eights(self.stem_width, self.width_multiplier)
        x = as_images(x, self.dtype)
        x = layer(stem_width, 3, stride=self.stem_stride, name="conv1")(x)
        x = nn.relu6(norm(x, name="bn1"))
        for name, width, inner, expand, stride in self._blocks(stem_width):
            block = InvertedResidual(
                width, inner, expand, stride, layer, norm, name=name
            )
            x = block(x)
        width = scale_to_eights(self.head_width, max(1.0, self.width_multiplier))
        x = nn.relu6(norm(layer(width, 1, name="conv2")(x), name="bn2"))
        return _head(self, x, train)

    def _blocks(self, width: int) -> list[tuple[str, int, int, bool, int]]:
        """Lists name, width, inner width, whether it expands, stride of each block."""
        blocks = []
        for stage, size in enumerate(self.stage_sizes):
            expansion = self.expansions[stage]
            for index in range(size):
                inner = width * expansion
                if self.inner_widths is not None:
                    explicit = self.inner_widths[len(blocks)]
                    inner = scale_width(explicit, self.width_multiplier)
                expand = expansion != 1 or inner != width
                width = scale_to_eights(self.widths[stage], self.width_multiplier)
                stride = self.strides[stage] if index == 0 else 1
                blocks.append((f"block{stage}_{index}", width, inner, expand, stride))
        return blocks


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter depthwise, project by 1x1 without activation.

    Args:
        width: channels that leave the block.
        inner: channels of the depthwise convolution.
        expand: whether a 1x1 convolution precedes the depthwise one.
        stride: stride of the depthwise convolution.
        layer: builds a convolution from its width, kernel size, stride and name.
        norm: applies BatchNorm under a name.
    """

    width: int
    inner: int
    expand: bool
    stride: int
    layer: Callable[..., nn.Conv]
    norm: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to the next stream."""
        y = x
        if self.expand:
            y = self.layer(self.inner, 1, name="expand")(y)
            y = nn.relu6(self.norm(y, name="bn1"))
        y = _depthwise(self.layer, y, self.stride)
        y = nn.relu6(self.norm(y, name="bn2"))
        y = self.norm(self.layer(self.width, 1, name="project")(y), name="bn3")
        return x + y if x.shape == y.shape else y


def scale_to_eights(width: int, multiplier: float) -> int:
    """Scales a width to the nearest multiple of 8, never below 90% of the product."""
    if multiplier == 1.0:
        return width
    product = width * multiplier
    rounded = max(8, int(product + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * product else rounded + 8


def _depthwise(layer: Callable[..., nn.Conv], x: jax.Array, stride: int) -> jax.Array:
    channels = x.shape[-1]
    return layer(
        channels, 3, stride=stride, feature_group_count=channels, name="depthwise"
    )(x)


def _parts(
    net: MobileNetV1 | MobileNetV2, train: bool
) -> tuple[Callable[..., nn.Conv], Callable[..., jax.Array]]:
    layer = partial(conv, use_bias=False, kernel_init=net.kernel_init, dtype=net.dtype)
    norm = partial(batch_norm, train=train, momentum=net.bn_momentum, dtype=net.dtype)
    return layer, norm


def _head(net: MobileNetV1 | MobileNetV2, x: jax.Array, train: bool) -> jax.Array:
    x = x.mean(axis=(1, 2))
    x = nn.Dropout(net.dropout_rate, deterministic=not train)(x)
    return nn.Dense(net.num_classes, dtype=net.dtype, name="head")(x)
