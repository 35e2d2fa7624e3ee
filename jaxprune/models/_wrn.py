"""Wide ResNet: few layers, many channels, pre-activation."""

from collections.abc import Callable, Sequence
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
    check_blocks,
    check_dropout,
    check_positive,
    check_sizes,
    check_stages,
    conv,
    dropout,
    he_fan_out,
    scale_width,
)


class WideResNet(nn.Module):
    """Wide ResNet: stages of pre-activation blocks, twice BN, ReLU and convolution.

    `wide_resnet(28, 10)` has 36,479,194 parameters for 10 classes (published 36.5M).
    Submodules: `conv1`, `block0_0` (stage, index) with `bn1`, `conv1`, `bn2`, `conv2`
    and, where the shape changes, a plain 1x1 `shortcut_conv`; `bn1`, `head`. Dropout
    sits between the two convolutions, right after the first, as in Batch Bridgeout.

    Args:
        stage_sizes: blocks in each stage.
        widths: channels of the residual stream in each stage.
        num_classes: number of logits.
        inner_widths: channels between the convolutions of each block, over all stages;
            None is the stream's width.
        strides: stride of the first block of each stage; None is 1, 2, 2, ...
        stem_width: channels of the first convolution.
        strided_conv: which convolution of a block carries the stride, 1 or 2.
        shortcut_from: "activation" feeds the 1x1 shortcut from the first BN and ReLU,
            as the paper's code does, "input" from the block's input.
        width_multiplier: factor on every width but the number of classes.
        use_bias: whether convolutions have a bias.
        dropout_rate: probability of dropping an activation; needs the `dropout`
            stream.
        dropout_target: fraction of the weakest feature maps that may be dropped.
        bn_momentum: share of the old running statistics kept in a training step.
        kernel_init: initialiser of the convolutions.
        dtype: type of the computation and of the logits; parameters stay float32.

    Raises:
        ValueError: if lengths do not match or a value is not as above, at construction.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = WideResNet(stage_sizes=(1, 1), widths=(4, 8), inner_widths=(3, 5))
        >>> images = jnp.zeros((1, 8, 8, 1))
        >>> variables = jax.eval_shape(net.init, jax.random.key(0), images)
        >>> variables["params"]["block1_0"]["conv1"]["kernel"].shape
        (3, 3, 4, 5)

    References:
        Zagoruyko and Komodakis, `Wide Residual Networks
        <https://arxiv.org/abs/1605.07146>`_, 2016, Table 1.
    """

    stage_sizes: Sequence[int] = (4, 4, 4)
    widths: Sequence[int] = (160, 320, 640)
    num_classes: int = 10
    inner_widths: Sequence[int] | None = None
    strides: Sequence[int] | None = None
    stem_width: int = 16
    strided_conv: Literal[1, 2] = 1
    shortcut_from: Literal["activation", "input"] = "activation"
    width_multiplier: float = 1.0
    use_bias: bool = False
    dropout_rate: float = 0.0
    dropout_target: float = 1.0
    bn_momentum: float = 0.9
    kernel_init: Initializer = he_fan_out
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        strides = self.strides or (1,) * len(self.stage_sizes)
        check_stages(self.stage_sizes, widths=self.widths, strides=strides)
        check_blocks("inner_widths", self.inner_widths, sum(self.stage_sizes))
        check_positive("inner_widths", self.inner_widths or ())
        check_sizes(
            self.width_multiplier,
            num_classes=self.num_classes,
            stem_width=self.stem_width,
        )
        check_dropout(self.dropout_rate, self.dropout_target)
        if self.strided_conv not in (1, 2):
            raise ValueError(f"strided_conv must be 1 or 2, got {self.strided_conv}")
        if self.shortcut_from not in ("activation", "input"):
            raise ValueError(
                f'shortcut_from must be "activation" or "input", got'
                f" {self.shortcut_from!r}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits."""
        layer = partial(
            conv,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
        )
        norm = partial(
            batch_norm, train=train, momentum=self.bn_momentum, dtype=self.dtype
        )
        drop = partial(
            dropout, rate=self.dropout_rate, target=self.dropout_target, train=train
        )
        stem_width = scale_width(self.stem_width, self.width_multiplier)
        x = layer(stem_width, 3, name="conv1")(as_images(x, self.dtype))
        for name, width, inner, stride in self._blocks():
            block = WideBlock(
                width,
                inner,
                (stride, 1) if self.strided_conv == 1 else (1, stride),
                self.shortcut_from,
                layer,
                norm,
                drop,
                name=name,
            )
            x = block(x)
        x = nn.relu(norm(x, name="bn1")).mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)

    def _blocks(self) -> list[tuple[str, int, int, int]]:
        """Lists name, width, inner width and stride of every block."""
        scale = partial(scale_width, multiplier=self.width_multiplier)
        strides = self.strides or (1,) + (2,) * (len(self.stage_sizes) - 1)
        blocks = []
        for stage, size in enumerate(self.stage_sizes):
            width = self.widths[stage]
            for index in range(size):
                inner = self.inner_widths[len(blocks)] if self.inner_widths else width
                stride = strides[stage] if index == 0 else 1
                name = f"block{stage}_{index}"
                blocks.append((name, scale(width), scale(inner), stride))
        return blocks


class WideBlock(nn.Module):
    """One pre-activation block.

    Args:
        width: channels that leave the block.
        inner: channels between its two convolutions.
        strides: stride of each convolution.
        shortcut_from: what feeds a 1x1 shortcut, see `WideResNet`.
        layer: builds a convolution from its width, kernel size, stride and name.
        norm: applies BatchNorm under a name.
        drop: applies dropout.
    """

    width: int
    inner: int
    strides: Sequence[int]
    shortcut_from: Literal["activation", "input"]
    layer: Callable[..., nn.Conv]
    norm: Callable[..., jax.Array]
    drop: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to the next stream."""
        first, second = self.strides
        activation = nn.relu(self.norm(x, name="bn1"))
        y = self.layer(self.inner, 3, stride=first, name="conv1")(activation)
        y = nn.relu(self.norm(self.drop(y), name="bn2"))
        y = self.layer(self.width, 3, stride=second, name="conv2")(y)
        stride = first * second
        if stride == 1 and x.shape[-1] == self.width:
            return x + y
        source = activation if self.shortcut_from == "activation" else x
        return y + self.layer(self.width, 1, stride=stride, name="shortcut_conv")(
            source
        )


def wide_resnet(depth: int = 28, widen_factor: float = 10, **kwargs: Any) -> WideResNet:
    """Builds WRN-depth-widen_factor: 6n + 4 layers, stages 16k, 32k and 64k wide.

    Parameters for 10 classes: WRN-28-10 36,479,194 (published 36.5M); WRN-16-8
    10,961,370 (11.0M); WRN-40-4 8,949,210 (8.9M).

    Args:
        depth: 10, 16, 22, 28, 40, ...
        widen_factor: k, the factor on the stages; the stem keeps 16 channels.
        **kwargs: fields of `WideResNet` but `stage_sizes` and `widths`.

    Returns:
        The module.

    Raises:
        ValueError: if depth is not 6n + 4.

    Example:
        >>> wide_resnet(16, 8).widths
        (128, 256, 512)

    References:
        Zagoruyko and Komodakis, `Wide Residual Networks
        <https://arxiv.org/abs/1605.07146>`_, 2016, Table 4.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(
            f"depth of a Wide ResNet must be 6n + 4 (10, 16, 28, 40), got {depth}"
        )
    widths = tuple(scale_width(width, widen_factor) for width in (16, 32, 64))
    return WideResNet(stage_sizes=((depth - 4) // 6,) * 3, widths=widths, **kwargs)
