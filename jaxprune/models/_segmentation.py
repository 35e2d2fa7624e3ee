"""Nets that label every pixel: SegNet and fully convolutional networks."""

from collections.abc import Sequence

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
    he_fan_out,
    scale_width,
)
from ._vgg import check_widths, vgg_widths

Stages = Sequence[Sequence[int]]
_VGG16: Stages = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)


class SegNet(nn.Module):
    """SegNet: a decoder that puts values back where max pooling took them from.

    The encoder is VGG: 3x3 convolutions with BatchNorm and ReLU, 2x2 max pooling after
    each stage. The decoder mirrors it; a stage begins by *unpooling*: every value goes
    to the position of the maximum of the encoder's window, all other positions are 0.
    The default is the paper's net, on the 13 convolutions of VGG-16.
    Submodules: `encoder1_conv1`, `encoder1_bn1`, ..., `decoder1_conv2`, `head`; the
    number is that of the stage, 1 at full resolution.

    Args:
        num_classes: labels of a pixel.
        stages: filters of each convolution of the encoder, stage by stage.
        decoder: the same of the decoder, the deepest stage first, without `head`; None
            for the mirror image. A stage ends with as many filters as the encoder's
            stage above it, whose positions it is unpooled to.
        width_multiplier: factor on every width but the number of classes.
        use_bias: whether convolutions have a bias.
        dropout_rate: probability of dropping an activation after each stage; needs the
            `dropout` stream.
        bn_momentum: share of the old running statistics kept in a training step.
        kernel_init: initialiser of the convolutions.
        dtype: type of the computation and of the logits; parameters stay float32.

    Raises:
        ValueError: if a width is no positive int, or the decoder does not fit the
            encoder, at construction; if a side of the images is not divisible by 2 to
            the number of stages.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = SegNet(num_classes=5, stages=((4,), (6,)))
        >>> images = jnp.zeros((1, 8, 8, 3))
        >>> variables = net.init(jax.random.key(0), images)
        >>> net.apply(variables, images).shape
        (1, 8, 8, 5)

    References:
        Badrinarayanan, Kendall and Cipolla, `SegNet: A Deep Convolutional
        Encoder-Decoder Architecture for Image Segmentation
        <https://arxiv.org/abs/1511.00561>`_, 2017
    """

    num_classes: int = 12
    stages: Stages = _VGG16
    decoder: Stages | None = None
    width_multiplier: float = 1.0
    use_bias: bool = True
    dropout_rate: float = 0.0
    bn_momentum: float = 0.9
    kernel_init: Initializer = he_fan_out
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        for index, widths in enumerate(self.stages):
            check_positive(f"stages[{index}]", widths)
        check_sizes(self.width_multiplier, num_classes=self.num_classes)
        check_dropout(self.dropout_rate, 1.0)
        if self.decoder is not None:
            _check_decoder(self.stages, self.decoder)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits of every pixel."""
        x = as_images(x, self.dtype)
        _check_sides(x, len(self.stages))
        decoder = mirrored(self.stages) if self.decoder is None else self.decoder
        places = []
        for number, widths in enumerate(self.stages, 1):
            x = self._stage(f"encoder{number}", x, widths, train)
            places.append(where_largest(x))
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        for number, widths in zip(range(len(decoder), 0, -1), decoder, strict=True):
            x = unpool(x, places[number - 1])
            x = self._stage(f"decoder{number}", x, widths, train)
        return self._conv(self.num_classes, "head")(x)

    def _stage(
        self, name: str, x: jax.Array, widths: Sequence[int], train: bool
    ) -> jax.Array:
        for number, width in enumerate(widths, 1):
            features = scale_width(width, self.width_multiplier)
            x = self._conv(features, f"{name}_conv{number}")(x)
            x = batch_norm(
                x,
                name=f"{name}_bn{number}",
                train=train,
                momentum=self.bn_momentum,
                dtype=self.dtype,
            )
            x = nn.relu(x)
        return nn.Dropout(self.dropout_rate, deterministic=not train)(x)

    def _conv(self, features: int, name: str) -> nn.Conv:
        return conv(
            features,
            3,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name=name,
        )


class FCN(nn.Module):
    """A fully convolutional network: VGG whose dense layers are convolutions.

    Scores of the last feature map are brought to the size of the images by bilinear
    interpolation, the initial value of the paper's upsampling, here fixed. Scores of
    earlier poolings are added on the way where `skips` asks for it. Feature maps keep
    their size (the paper pads images by 100 pixels and crops). The default is FCN-32s
    on VGG-16, 134,346,581 parameters for 21 classes.
    Submodules: `conv1`, `bn1`, ..., `dense1`, ..., `head`, `skip1`, ...

    Args:
        num_classes: labels of a pixel.
        widths: filters of each convolution and "M" for a 2x2 max pooling.
        head_widths: filters of the convolutions that the dense layers have become.
        head_window: size of the first of them; the others are 1x1.
        skips: how many poolings before the last one are scored too: 0, 1 and 2 are
            FCN-32s, -16s and -8s.
        width_multiplier: factor on every width but the number of classes.
        batch_norm: whether each convolution of `widths` is followed by BatchNorm.
        dropout_rate: dropout after those of `head_widths`; the paper's is 0.5.
        bn_momentum: share of the old running statistics kept in a training step.
        kernel_init: initialiser of the convolutions; that of `skip1`, ... is 0.
        dtype: type of the computation and of the logits; parameters stay float32.

    Raises:
        ValueError: if a width, a rate or `skips` is not as above, at construction; if a
            side of the images is not divisible by 2 to the number of poolings.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = FCN(5, widths=(4, "M", 6, "M"), head_widths=(8,), head_window=3)
        >>> images = jnp.zeros((1, 8, 8, 3))
        >>> variables = net.init(jax.random.key(0), images)
        >>> net.apply(variables, images).shape
        (1, 8, 8, 5)

    References:
        Long, Shelhamer and Darrell, `Fully Convolutional Networks for Semantic
        Segmentation <https://arxiv.org/abs/1411.4038>`_, 2015
    """

    num_classes: int = 21
    widths: Sequence[int | str] = vgg_widths(16)
    head_widths: Sequence[int] = (4096, 4096)
    head_window: int = 7
    skips: int = 0
    width_multiplier: float = 1.0
    batch_norm: bool = False
    dropout_rate: float = 0.0
    bn_momentum: float = 0.9
    kernel_init: Initializer = he_fan_out
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        check_widths(self.widths)
        check_positive("head_widths", self.head_widths)
        sizes = {"num_classes": self.num_classes, "head_window": self.head_window}
        check_sizes(self.width_multiplier, **sizes)
        check_dropout(self.dropout_rate, 1.0)
        poolings = list(self.widths).count("M")
        if not 0 <= self.skips < max(poolings, 1):
            raise ValueError(
                f"skips must be at least 0 and below the {poolings} poolings of widths,"
                f" got {self.skips}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits of every pixel."""
        x = as_images(x, self.dtype)
        _check_sides(x, list(self.widths).count("M"))
        size = x.shape[1:3]
        *earlier, x = self._pooled(x, train)
        for number, width in enumerate(self.head_widths, 1):
            window = self.head_window if number == 1 else 1
            x = nn.relu(self._conv(width, window, name=f"dense{number}")(x))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = self._scores("head", self.kernel_init)(x)
        for number in range(1, self.skips + 1):
            before = earlier[-number]
            zeros = nn.initializers.zeros_init()
            x = resized(x, before.shape[1:3])
            x = x + self._scores(f"skip{number}", zeros)(before)
        return resized(x, size)

    def _pooled(self, x: jax.Array, train: bool) -> list[jax.Array]:
        """What every pooling returns, and the last feature map if it is not pooled."""
        found, number = [], 0
        for width in self.widths:
            if isinstance(width, str):
                x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
                found.append(x)
                continue
            number += 1
            x = self._conv(width, 3, name=f"conv{number}")(x)
            if self.batch_norm:
                x = batch_norm(
                    x,
                    name=f"bn{number}",
                    train=train,
                    momentum=self.bn_momentum,
                    dtype=self.dtype,
                )
            x = nn.relu(x)
        return found if self.widths[-1:] == ("M",) else [*found, x]

    def _conv(self, width: int, window: int, name: str) -> nn.Conv:
        features = scale_width(width, self.width_multiplier)
        init = self.kernel_init
        return conv(features, window, kernel_init=init, dtype=self.dtype, name=name)

    def _scores(self, name: str, init: Initializer) -> nn.Conv:
        return conv(self.num_classes, 1, kernel_init=init, dtype=self.dtype, name=name)


def where_largest(x: jax.Array) -> jax.Array:
    """Where 2x2 max pooling takes its values from.

    Args:
        x: [batch, height, width, channels], both sides even.

    Returns:
        [batch, height / 2, 2, width / 2, 2, channels] of the same type: 1 at the first
        maximum of every window, row by row, and 0 elsewhere.
    """
    n, height, width, channels = x.shape
    windows = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    # Comparisons of two values each, so that exactly one position is picked whatever
    # XLA rounds: a maximum that it computes twice need not equal itself.
    left = windows[..., 0, :] >= windows[..., 1, :]
    rows = windows.max(4)
    upper = rows[:, :, 0] >= rows[:, :, 1]
    a, c = upper & left[:, :, 0], ~upper & left[:, :, 1]
    first = jnp.stack([a, upper & ~a, c, ~upper & ~c], 3)
    first = first.reshape(n, height // 2, width // 2, 2, 2, channels)
    return first.transpose(0, 1, 3, 2, 4, 5).astype(x.dtype)


def unpool(x: jax.Array, places: jax.Array) -> jax.Array:
    """Puts every value back to its place in a 2x2 window; the others are 0.

    Args:
        x: [batch, height, width, channels].
        places: as `where_largest` returns it.

    Returns:
        [batch, 2 * height, 2 * width, channels].
    """
    n, height, width, channels = x.shape
    spread = x[:, :, None, :, None] * places
    return spread.reshape(n, 2 * height, 2 * width, channels)


def resized(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Bilinear interpolation to `size`, both sides."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear")


def mirrored(stages: Stages) -> Stages:
    """The decoder of an encoder: its convolutions in reverse, the deepest stage first.

    Example:
        >>> mirrored(((64, 64), (128, 128), (256, 256, 256)))
        ((256, 256, 128), (128, 64), (64,))
    """
    above = [(), *[(widths[-1],) for widths in stages[:-1]]]
    pairs = zip(stages, above, strict=True)
    return tuple((*widths[:-1][::-1], *last) for widths, last in reversed(list(pairs)))


def _check_decoder(stages: Stages, decoder: Stages) -> None:
    if len(decoder) != len(stages):
        raise ValueError(
            f"decoder must have a stage for each of the {len(stages)} of the encoder,"
            f" got {len(decoder)}"
        )
    for index, widths in enumerate(decoder):
        check_positive(f"decoder[{index}]", widths)
    for index, (widths, above) in enumerate(zip(decoder, stages[-2::-1], strict=False)):
        if not widths or widths[-1] != above[-1]:
            raise ValueError(
                f"decoder[{index}] must end with the {above[-1]} filters of the"
                f" encoder's stage above it, got {tuple(widths)}"
            )


def _check_sides(x: jax.Array, poolings: int) -> None:
    if any(side % 2**poolings for side in x.shape[1:3]):
        raise ValueError(
            f"{poolings} poolings need images whose sides are divisible by"
            f" {2**poolings}, got {x.shape[1]}x{x.shape[2]}"
        )
