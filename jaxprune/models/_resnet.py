"""ResNet: CIFAR form, ImageNet form, and the 28-layer net of Batch Bridgeout."""

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

Shortcut = Literal["projection", "zero_pad", "identity"]
InnerWidth = int | Sequence[int]


class ResNet(nn.Module):
    """ResNet: stages of residual blocks, post-activation as in the first paper.

    A basic block is two 3x3 convolutions, a bottleneck 1x1, 3x3 and 1x1; the stride
    sits on the (first) 3x3. `cifar_resnet` and `imagenet_resnet` build the published
    depths. Submodules: `conv1`, `bn1`, `block0_0` (stage, index) with `conv1`, `bn1`,
    `conv2`, `bn2` and, where the shape changes, `shortcut_conv`, `shortcut_bn`, then
    `head`. Dropout follows every convolution of a block (after BN and ReLU, before the
    sum), the baseline of Batch Bridgeout.

    Args:
        stage_sizes: blocks in each stage.
        widths: channels of the residual stream in each stage.
        num_classes: number of logits.
        bottleneck: whether blocks are bottlenecks.
        inner_widths: channels inside each block, over all stages: an int, or for a
            bottleneck also a pair (1x1, 3x3). None is the paper's choice: the stream's
            width, a quarter of it in a bottleneck.
        strides: stride of the first block of each stage; None is 1, 2, 2, ...
        stem: "cifar" is one 3x3 convolution, "imagenet" 7x7 with stride 2 and a 3x3
            max pooling with stride 2.
        stem_width: channels after the stem; None is the first stage's width, a quarter
            of it with bottlenecks.
        shortcut: what joins streams of different shape: "projection" is a 1x1
            convolution with BatchNorm (option B), "zero_pad" subsamples and pads the
            new channels with zeros, half on each side (option A), "identity" allows no
            change of shape.
        width_multiplier: factor on every width but the number of classes.
        use_bias: whether convolutions have a bias.
        dropout_rate: probability of dropping an activation; needs the `dropout`
            stream.
        dropout_target: fraction of the weakest feature maps that may be dropped.
        bn_momentum: share of the old running statistics kept in a training step.
        kernel_init: initialiser of the convolutions.
        dtype: type of the computation and of the logits; parameters stay float32.

    Raises:
        ValueError: if lengths do not match or a value is not as above, at construction;
            if `shortcut` cannot join two streams, when called.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = ResNet(stage_sizes=(1, 1), widths=(4, 8), inner_widths=(3, 5))
        >>> images = jnp.zeros((1, 8, 8, 1))
        >>> variables = jax.eval_shape(net.init, jax.random.key(0), images)
        >>> variables["params"]["block1_0"]["conv1"]["kernel"].shape
        (3, 3, 4, 5)

    References:
        He et al., `Deep Residual Learning for Image Recognition
        <https://arxiv.org/abs/1512.03385>`_, 2015, Table 1 and Sec. 4.2.
    """

    stage_sizes: Sequence[int]
    widths: Sequence[int]
    num_classes: int = 10
    bottleneck: bool = False
    inner_widths: Sequence[InnerWidth] | None = None
    strides: Sequence[int] | None = None
    stem: Literal["cifar", "imagenet"] = "cifar"
    stem_width: int | None = None
    shortcut: Shortcut = "projection"
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
        for index, inner in enumerate(self.inner_widths or ()):
            _check_inner(index, inner, self.bottleneck)
        check_sizes(
            self.width_multiplier,
            num_classes=self.num_classes,
            stem_width=1 if self.stem_width is None else self.stem_width,
        )
        check_dropout(self.dropout_rate, self.dropout_target)
        _check_choice("stem", self.stem, ("cifar", "imagenet"))
        _check_choice("shortcut", self.shortcut, ("projection", "zero_pad", "identity"))
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
        x = self._stem(as_images(x, self.dtype), layer, norm)
        for name, width, inner, stride in self._blocks():
            block = ResidualBlock(
                width, inner, stride, self.shortcut, layer, norm, drop, name=name
            )
            x = block(x)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)

    def _stem(self, x: jax.Array, layer: Callable, norm: Callable) -> jax.Array:
        default = self.widths[0] // 4 if self.bottleneck else self.widths[0]
        width = scale_width(self.stem_width or default, self.width_multiplier)
        if self.stem == "cifar":
            return nn.relu(norm(layer(width, 3, name="conv1")(x), name="bn1"))
        x = nn.relu(norm(layer(width, 7, stride=2, name="conv1")(x), name="bn1"))
        return nn.max_pool(
            x,
            window_shape=(3, 3),
            strides=(2, 2),
            # Flax documents pairs; its annotation knows only the default, a string.
            padding=((1, 1), (1, 1)),  # pyright: ignore[reportArgumentType]
        )

    def _blocks(self) -> list[tuple[str, int, tuple[int, ...], int]]:
        """Lists name, width, inner widths and stride of every block."""
        scale = partial(scale_width, multiplier=self.width_multiplier)
        strides = self.strides or (1,) + (2,) * (len(self.stage_sizes) - 1)
        blocks = []
        for stage, size in enumerate(self.stage_sizes):
            width = self.widths[stage]
            for index in range(size):
                inner = width // 4 if self.bottleneck else width
                if self.inner_widths is not None:
                    inner = self.inner_widths[len(blocks)]
                if isinstance(inner, int):
                    inner = (inner,) * (2 if self.bottleneck else 1)
                stride = strides[stage] if index == 0 else 1
                name = f"block{stage}_{index}"
                blocks.append((name, scale(width), tuple(map(scale, inner)), stride))
        return blocks


class ResidualBlock(nn.Module):
    """One residual block: basic with one inner width, bottleneck with two.

    Args:
        width: channels that leave the block.
        inner: channels of the convolutions before the last.
        stride: stride of the (first) 3x3 convolution.
        shortcut: how the input joins an output of another shape, see `ResNet`.
        layer: builds a convolution from its width, kernel size, stride and name.
        norm: applies BatchNorm under a name.
        drop: applies dropout.
    """

    width: int
    inner: Sequence[int]
    stride: int
    shortcut: Shortcut
    layer: Callable[..., nn.Conv]
    norm: Callable[..., jax.Array]
    drop: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to the next stream."""
        kernels = (3, 3) if len(self.inner) == 1 else (1, 3, 1)
        strides = [1] * len(kernels)
        strides[kernels.index(3)] = self.stride
        y = x
        for index, features in enumerate((*self.inner, self.width)):
            y = self.layer(
                features,
                kernels[index],
                stride=strides[index],
                name=f"conv{index + 1}",
            )(y)
            y = self.norm(y, name=f"bn{index + 1}")
            y = nn.relu(y) if index < len(self.inner) else y
            y = self.drop(y)
        return nn.relu(y + self._shortcut(x))

    def _shortcut(self, x: jax.Array) -> jax.Array:
        width, stride = self.width, self.stride
        if stride == 1 and x.shape[-1] == width:
            return x
        if self.shortcut == "projection":
            x = self.layer(width, 1, stride=stride, name="shortcut_conv")(x)
            return self.norm(x, name="shortcut_bn")
        missing = width - x.shape[-1]
        if self.shortcut == "identity" or missing < 0:
            raise ValueError(
                f"{self.name}: shortcut {self.shortcut!r} cannot join {x.shape[-1]}"
                f" channels to {width} with stride {stride}; use 'projection'"
            )
        before = missing // 2
        x = x[:, ::stride, ::stride, :]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, missing - before)))


def cifar_resnet(depth: int = 20, **kwargs: Any) -> ResNet:
    """Builds the CIFAR ResNet of 6n + 2 layers: three stages of n basic blocks.

    With the paper's zero-padded shortcuts and 10 classes: ResNet-20 has 269,722
    parameters (published 0.27M), 32: 464,154 (0.46M), 56: 853,018 (0.85M),
    110: 1,727,962 (1.7M).

    Args:
        depth: 8, 14, 20, 32, 44, 56, 110, ...
        **kwargs: fields of `ResNet` but `stage_sizes`; `widths` is (16, 32, 64) and
            `shortcut` "zero_pad" unless given.

    Returns:
        The module.

    Raises:
        ValueError: if depth is not 6n + 2.

    Example:
        >>> cifar_resnet(56).stage_sizes
        (9, 9, 9)

    References:
        He et al., `Deep Residual Learning for Image Recognition
        <https://arxiv.org/abs/1512.03385>`_, 2015, Sec. 4.2.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(
            f"depth of a CIFAR ResNet must be 6n + 2 (8, 20, 32, 56), got {depth}"
        )
    fields: dict[str, Any] = {"widths": (16, 32, 64), "shortcut": "zero_pad"}
    return ResNet(stage_sizes=((depth - 2) // 6,) * 3, **(fields | kwargs))


_IMAGENET_STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def imagenet_resnet(depth: int = 50, **kwargs: Any) -> ResNet:
    """Builds the ImageNet ResNet; from depth 50 on with bottlenecks.

    Parameters for 1000 classes: ResNet-18 11,689,512; 34: 21,797,672; 50: 25,557,032;
    101: 44,549,160; 152: 60,192,808. The stride of a bottleneck sits on its 3x3
    convolution, the form in which today's weights are published.

    Args:
        depth: 18, 34, 50, 101 or 152.
        **kwargs: fields of `ResNet` but `stage_sizes` and `bottleneck`; `widths`,
            `num_classes` (1000) and `stem` ("imagenet") have defaults.

    Returns:
        The module.

    Raises:
        ValueError: if the paper has no net of this depth.

    Example:
        >>> imagenet_resnet(50).widths
        (256, 512, 1024, 2048)

    References:
        He et al., `Deep Residual Learning for Image Recognition
        <https://arxiv.org/abs/1512.03385>`_, 2015, Table 1.
    """
    if depth not in _IMAGENET_STAGES:
        raise ValueError(
            f"depth of an ImageNet ResNet must be one of {sorted(_IMAGENET_STAGES)},"
            f" got {depth}"
        )
    bottleneck = depth >= 50
    widths = (256, 512, 1024, 2048) if bottleneck else (64, 128, 256, 512)
    fields = {"widths": widths, "num_classes": 1000, "stem": "imagenet"}
    return ResNet(
        stage_sizes=_IMAGENET_STAGES[depth],
        bottleneck=bottleneck,
        **(fields | kwargs),
    )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def _check_inner(index: int, inner: InnerWidth, bottleneck: bool) -> None:
    expected = 2 if bottleneck else 1
    widths = (inner,) * expected if isinstance(inner, int) else tuple(inner)
    if len(widths) != expected:
        raise ValueError(
            f"inner_widths[{index}] must be an int or have {expected} entries for a"
            f" {'bottleneck' if bottleneck else 'basic block'}, got {widths}"
        )
    check_positive(f"inner_widths[{index}]", widths)
