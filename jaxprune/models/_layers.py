"""What the reference models share: layers, initialisers, argument checks.

Every convolution pads `kernel_size // 2` on each side instead of XLA's "SAME", which
pads a strided convolution on one side only: published weights are trained that way.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

# He et al. 2015 (arXiv:1502.01852): variance 2 / fan keeps a ReLU layer's scale.
he_fan_in: Initializer = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
he_fan_out: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Glorot's uniform law with gain sqrt(2), the setting of Batch Bridgeout.
glorot_relu: Initializer = nn.initializers.variance_scaling(2.0, "fan_avg", "uniform")


class TargetedDropout(nn.Module):
    """Dropout that may only hit the weakest feature maps of each example.

    In each example the channels are ranked by the L2 norm of their feature map; with
    `n = int(target * channels)`, the elements of the maps whose norm is strictly below
    the n-th smallest (counted from 0) are dropped one by one at `rate` and scaled by
    `1 / (1 - rate)`, all others pass unchanged. `target=1` is ordinary dropout.
    Noise comes from the `dropout` stream; none is asked for when nothing can drop.

    Args:
        rate: probability of dropping an element, in [0, 1].
        target: fraction of the feature maps that may be dropped, in [0, 1].

    Raises:
        ValueError: if either number is outside [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.array([[1.0, 2.0, 3.0, 4.0]])    # the two weakest may be dropped
        >>> layer = TargetedDropout(rate=1.0, target=0.5)
        >>> layer.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
        Array([[0., 0., 3., 4.]], dtype=float32)

    References:
        Gomez et al., `Learning Sparse Networks Using Targeted Dropout
        <https://arxiv.org/abs/1905.13678>`_, 2019. Feature maps as targets: Khan and
        Stavness, `Pruning Convolutional Filters using Batch Bridgeout
        <https://arxiv.org/abs/2009.10893>`_, 2020.
    """

    rate: float
    target: float = 1.0

    def __post_init__(self) -> None:
        check_dropout(self.rate, self.target)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Drops elements of `x`, shape [batch, ..., channels], when `train`."""
        channels = x.shape[-1]
        targeted = int(self.target * channels)
        if not train or self.rate == 0.0 or targeted == 0:
            return x
        dropped = nn.Dropout(self.rate, deterministic=False)(x)
        if targeted == channels:
            return dropped
        # Squares order the maps as norms do; bfloat16 squares would tie too often.
        spatial = tuple(range(1, x.ndim - 1))
        energy = jnp.square(at_least_float32(x)).sum(axis=spatial, keepdims=True)
        threshold = jnp.sort(energy, axis=-1)[..., targeted : targeted + 1]
        return jnp.where(energy < threshold, dropped, x)


def dropout(x: jax.Array, *, rate: float, target: float, train: bool) -> jax.Array:
    """Applies `TargetedDropout` inside a module's compact method."""
    return TargetedDropout(rate, target)(x, train=train)


def conv(features: int, kernel_size: int, *, stride: int = 1, **kwargs: Any) -> nn.Conv:
    """Builds a square convolution with symmetric padding that keeps the size."""
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=kernel_size // 2,
        **kwargs,
    )


def batch_norm(
    x: jax.Array, *, name: str, train: bool, momentum: float, dtype: DTypeLike
) -> jax.Array:
    """Applies BatchNorm in float32 inside a compact method; returns `dtype`."""
    norm = nn.BatchNorm(
        use_running_average=not train,
        momentum=momentum,
        force_float32_reductions=False,
        name=name,
    )
    return norm(at_least_float32(x)).astype(dtype)


def layer_norm(x: jax.Array, *, name: str, dtype: DTypeLike) -> jax.Array:
    """Applies LayerNorm in float32 inside a compact method; returns `dtype`."""
    norm = nn.LayerNorm(epsilon=1e-6, force_float32_reductions=False, name=name)
    return norm(at_least_float32(x)).astype(dtype)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Widens bfloat16 and float16 to float32; keeps float64.

    Flax's norms do this by implicit promotion, which strict promotion forbids, so the
    norms above do it themselves and switch Flax's way off: the numbers are the same.
    """
    return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def scale_width(width: int, multiplier: float) -> int:
    """Multiplies a number of channels, rounded half up, at least 1."""
    return max(1, int(width * multiplier + 0.5))


def as_images(images: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Casts images to the compute type after a look at their shape."""
    if images.ndim != 4:
        raise ValueError(
            f"images must be [batch, height, width, channels], got shape"
            f" {images.shape}; is the batch or the channel axis missing?"
        )
    return jnp.asarray(images, dtype)


def check_dropout(rate: float, target: float) -> None:
    """Raises if a dropout rate or its target fraction is not in [0, 1]."""
    for name, value in (("dropout rate", rate), ("dropout target", target)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def _is_positive_int(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def check_positive(name: str, numbers: Sequence[object]) -> None:
    """Raises if an entry is not a positive int, naming its place."""
    for index, number in enumerate(numbers):
        if not _is_positive_int(number):
            raise ValueError(f"{name}[{index}] must be a positive int, got {number!r}")


def check_sizes(width_multiplier: float, **sizes: int) -> None:
    """Raises if the multiplier is not positive or a size not a positive int."""
    if not width_multiplier > 0:
        raise ValueError(f"width_multiplier must be positive, got {width_multiplier}")
    for name, size in sizes.items():
        if not _is_positive_int(size):
            raise ValueError(f"{name} must be a positive int, got {size!r}")


def check_stages(stage_sizes: Sequence[int], **per_stage: Sequence[int]) -> None:
    """Raises unless every sequence has one positive int for each stage."""
    check_positive("stage_sizes", stage_sizes)
    for name, values in per_stage.items():
        if len(values) != len(stage_sizes):
            raise ValueError(
                f"{name} must have one entry per stage: expected {len(stage_sizes)}"
                f" for stage_sizes={tuple(stage_sizes)}, got {tuple(values)}"
            )
        check_positive(name, values)


def check_blocks(name: str, values: Sequence[object] | None, blocks: int) -> None:
    """Raises unless `values` is None or has one entry for each block."""
    if values is not None and len(values) != blocks:
        raise ValueError(
            f"{name} must have one entry per block: expected {blocks}, got"
            f" {len(values)}: {tuple(values)}"
        )
