"""A small net with noise on its units, for comparisons with noise on its weights.

The rates may be traced, so that one compiled step serves all of them.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.models._layers import batch_norm, conv, glorot_relu
from jaxprune.training.noise.layers import sparseout


def noisy_units(
    x: jax.Array, key: jax.Array, layer: str, rate: Any, target: Any, q: Any
) -> jax.Array:
    """Sparseout, or dropout: for units that are not negative the member with q = 2."""
    q = q if layer == "sparseout" else jnp.float32(2.0)
    return sparseout(x, key, rate=rate, q=q, target_fraction=target)


def pooled(x: jax.Array) -> jax.Array:
    """2x2 max pooling of even sides, as `nn.max_pool` but for ties in the gradient.

    The gradient of `nn.max_pool` is a scatter; on a CPU this one makes a step of a
    small net take 0.6 of its time.
    """
    n, height, width, channels = x.shape
    blocks = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    return blocks.max((2, 4))


class NoisyVGG(nn.Module):
    """3x3 convolutions, each with BatchNorm, ReLU and noise on its units; one head.

    Submodules: `conv1`, `bn1`, ..., `head`, which has no noise.

    Args:
        num_classes: number of logits.
        widths: filters of each convolution and "M" for a 2x2 max pooling.
        batch_norm: whether each convolution is followed by BatchNorm.
        stem_stride: stride of the first convolution.
        layer: "plain", "sparseout" or "dropout".
        rate: drop probability.
        target: fraction of the weakest feature maps that get noise.
        q: norm of the penalty.
    """

    num_classes: int = 10
    widths: Sequence[int | str] = (8, 8, "M", 16, 16, "M", 32, 32)
    batch_norm: bool = True
    stem_stride: int = 1
    layer: str = "plain"
    rate: Any = 0.0
    target: Any = 1.0
    q: Any = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits."""
        index, noise = 0, (self.layer, self.rate, self.target, self.q)
        for width in self.widths:
            if isinstance(width, str):
                x = pooled(x)
                continue
            index += 1
            stride = self.stem_stride if index == 1 else 1
            layer = conv(
                width, 3, stride=stride, kernel_init=glorot_relu, name=f"conv{index}"
            )
            x, name = layer(x), f"bn{index}"
            if self.batch_norm:
                x = batch_norm(
                    x, name=name, train=train, momentum=0.9, dtype=jnp.float32
                )
            x = nn.relu(x)
            if train and self.layer != "plain":
                x = noisy_units(x, self.make_rng("dropout"), *noise)
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))
