"""LeNet-300-100 and LeNet-5, the two nets of the early pruning literature."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ._layers import (
    as_images,
    check_dropout,
    check_positive,
    check_sizes,
    dropout,
    scale_width,
)

# Caffe's "xavier" filler, with which both nets were trained: U(+-sqrt(3 / fan_in)).
_xavier = nn.initializers.lecun_uniform()


class LeNet300(nn.Module):
    """LeNet-300-100: a fully connected net with ReLU hidden layers.

    266,610 parameters for 28x28 grey images and 10 classes. Submodules: `dense1`,
    `dense2`, ..., `head`. Dropout follows each hidden layer.

    Args:
        num_classes: number of logits.
        widths: units of each hidden layer; its length is the depth.
        width_multiplier: factor on every hidden width.
        dropout_rate: probability of dropping a unit; needs the `dropout` stream.
        dropout_target: fraction of the weakest units that may be dropped.
        dtype: type of the computation and of the logits; parameters stay float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((1, 28, 28, 1))
        >>> variables = jax.eval_shape(LeNet300().init, jax.random.key(0), images)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
        266610

    References:
        LeCun et al., `Gradient-based learning applied to document recognition
        <https://doi.org/10.1109/5.726791>`_, 1998, Sec. III-C.
    """

    num_classes: int = 10
    widths: Sequence[int] = (300, 100)
    width_multiplier: float = 1.0
    dropout_rate: float = 0.0
    dropout_target: float = 1.0
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        check_positive("widths", self.widths)
        check_sizes(self.width_multiplier, num_classes=self.num_classes)
        check_dropout(self.dropout_rate, self.dropout_target)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits."""
        x = as_images(x, self.dtype)
        x = x.reshape((x.shape[0], -1))
        return _dense_stack(self, x, self.widths, train=train)


class LeNet5(nn.Module):
    """LeNet-5 in Caffe's version: 5x5 convolutions, max pooling, one ReLU layer.

    431,080 parameters for 28x28 grey images and 10 classes. No padding and, as in
    Caffe, no nonlinearity but the pooling between the convolutions. Submodules:
    `conv1`, `conv2`, `dense1`, `head`. Dropout follows each hidden dense layer.

    Args:
        num_classes: number of logits.
        widths: filters of each convolution; each is followed by 2x2 pooling.
        head_widths: units of each hidden dense layer.
        width_multiplier: factor on every width but the number of classes.
        dropout_rate: probability of dropping a unit; needs the `dropout` stream.
        dropout_target: fraction of the weakest units that may be dropped.
        dtype: type of the computation and of the logits; parameters stay float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((1, 28, 28, 1))
        >>> variables = jax.eval_shape(LeNet5().init, jax.random.key(0), images)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
        431080

    References:
        LeCun et al., `Gradient-based learning applied to document recognition
        <https://doi.org/10.1109/5.726791>`_, 1998; Jia et al., `Caffe
        <https://arxiv.org/abs/1408.5093>`_, 2014.
    """

    num_classes: int = 10
    widths: Sequence[int] = (20, 50)
    head_widths: Sequence[int] = (500,)
    width_multiplier: float = 1.0
    dropout_rate: float = 0.0
    dropout_target: float = 1.0
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        check_positive("widths", self.widths)
        check_positive("head_widths", self.head_widths)
        check_sizes(self.width_multiplier, num_classes=self.num_classes)
        check_dropout(self.dropout_rate, self.dropout_target)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits."""
        x = as_images(x, self.dtype)
        for index, width in enumerate(self.widths, 1):
            if min(x.shape[1:3]) < 6:
                raise ValueError(
                    f"conv{index} of LeNet5 needs at least 6x6 positions for its 5x5"
                    f" window and 2x2 pooling, got {x.shape[1]}x{x.shape[2]}; are the"
                    f" images smaller than 16x16?"
                )
            features = scale_width(width, self.width_multiplier)
            x = nn.Conv(
                features,
                (5, 5),
                padding="VALID",
                kernel_init=_xavier,
                dtype=self.dtype,
                name=f"conv{index}",
            )(x)
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        return _dense_stack(self, x, self.head_widths, train=train)


def _dense_stack(
    net: LeNet300 | LeNet5, x: jax.Array, widths: Sequence[int], *, train: bool
) -> jax.Array:
    """Applies hidden dense layers and the head inside the net's compact method."""
    for index, width in enumerate(widths, 1):
        features = scale_width(width, net.width_multiplier)
        x = nn.Dense(
            features, kernel_init=_xavier, dtype=net.dtype, name=f"dense{index}"
        )(x)
        x = nn.relu(x)
        x = dropout(x, rate=net.dropout_rate, target=net.dropout_target, train=train)
    head = nn.Dense(net.num_classes, kernel_init=_xavier, dtype=net.dtype, name="head")
    return head(x)
