"""Four of the nets in NNX, whose tracing costs less than half of that of Linen.

Linen compares the shape of every parameter with that of its initialiser each time a
module is applied, and evaluates the initialiser abstractly to know it.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx

Layer = Callable[[jax.Array], jax.Array]


class ConvNorm(nnx.Module):
    """A convolution without bias, BatchNorm, an activation."""

    def __init__(
        self,
        inputs: int,
        width: int,
        kernel: int,
        rngs: nnx.Rngs,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: Layer = nnx.relu,
    ) -> None:
        self.conv = _conv(inputs, width, kernel, rngs, stride, groups)
        self.norm = _norm(width, rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activation(self.norm(self.conv(x)))


class NormConv(nnx.Module):
    """BatchNorm, an activation, a convolution without bias."""

    def __init__(self, inputs: int, width: int, kernel: int, rngs: nnx.Rngs) -> None:
        self.norm = _norm(inputs, rngs)
        self.conv = _conv(inputs, width, kernel, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(nnx.relu(self.norm(x)))


class Classifier(nnx.Module):
    """Layers one after another, the mean over positions, a linear layer."""

    def __init__(self, layers: list[Any], width: int, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(layers)
        self.head = nnx.Linear(width, 1000, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(axis=(1, 2)))


class Residual(nnx.Module):
    """``after(branch(x) + shortcut(x))``."""

    def __init__(self, branch: Any, shortcut: Any, after: Layer) -> None:
        self.branch, self.shortcut, self.after = branch, shortcut, after

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.after(self.branch(x) + self.shortcut(x))


class Dense(nnx.Module):
    """``[x, branch(x)]``."""

    def __init__(self, branch: Any) -> None:
        self.branch = branch

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.numpy.concatenate([x, self.branch(x)], axis=-1)


def _conv(
    inputs: int, width: int, kernel: int, rngs: nnx.Rngs, stride: int = 1, groups=1
) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        width,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2,
        use_bias=False,
        feature_group_count=groups,
        rngs=rngs,
    )


def _norm(width: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(width, use_running_average=True, rngs=rngs)


def _same(x: jax.Array) -> jax.Array:
    return x


def _max_pool(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore


def _halve(x: jax.Array) -> jax.Array:
    return nnx.avg_pool(x, (2, 2), (2, 2))


def resnet50(rngs: nnx.Rngs) -> Classifier:
    """ResNet-50: 25,557,032 parameters."""
    layers: list[Any] = [ConvNorm(3, 64, 7, rngs, stride=2), _max_pool]
    inputs = 64
    for inner, size in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(size):
            stride = 2 if inner > 64 and index == 0 else 1
            layers.append(_bottleneck(inputs, inner, stride, rngs))
            inputs = 4 * inner
    return Classifier(layers, inputs, rngs)


def _bottleneck(inputs: int, inner: int, stride: int, rngs: nnx.Rngs) -> Residual:
    width = 4 * inner
    branch = nnx.Sequential(
        ConvNorm(inputs, inner, 1, rngs),
        ConvNorm(inner, inner, 3, rngs, stride=stride),
        ConvNorm(inner, width, 1, rngs, activation=_same),
    )
    if inputs == width:
        return Residual(branch, _same, nnx.relu)
    shortcut = ConvNorm(inputs, width, 1, rngs, stride=stride, activation=_same)
    return Residual(branch, shortcut, nnx.relu)


def mobilenet_v2(rngs: nnx.Rngs) -> Classifier:
    """MobileNetV2: 3,504,872 parameters."""
    layers: list[Any] = [ConvNorm(3, 32, 3, rngs, stride=2, activation=nnx.relu6)]
    layers += _inverted_residuals(rngs)
    layers.append(ConvNorm(320, 1280, 1, rngs, activation=nnx.relu6))
    return Classifier(layers, 1280, rngs)


def _inverted_residuals(rngs: nnx.Rngs) -> Iterator[Any]:
    inputs, widths = 32, (16, 24, 32, 64, 96, 160, 320)
    sizes, strides = (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 2, 1)
    for width, size, stride in zip(widths, sizes, strides, strict=True):
        for step in (stride, *(1,) * (size - 1)):
            inner = inputs if width == 16 else 6 * inputs
            how = {"groups": inner, "stride": step, "activation": nnx.relu6}
            parts = [ConvNorm(inner, inner, 3, rngs, **how)]
            parts.append(ConvNorm(inner, width, 1, rngs, activation=_same))
            if inner != inputs:
                expand = ConvNorm(inputs, inner, 1, rngs, activation=nnx.relu6)
                parts.insert(0, expand)
            branch = nnx.Sequential(*parts)
            joined = step == 1 and inputs == width
            yield Residual(branch, _same, _same) if joined else branch
            inputs = width


def densenet121(rngs: nnx.Rngs) -> Classifier:
    """DenseNet-121: 7,978,856 parameters."""
    layers: list[Any] = [ConvNorm(3, 64, 7, rngs, stride=2), _max_pool]
    width = 64
    for stage, size in enumerate((6, 12, 24, 16)):
        if stage:
            layers += [NormConv(width, width // 2, 1, rngs), _halve]
            width //= 2
        for _ in range(size):
            branch = NormConv(width, 128, 1, rngs), NormConv(128, 32, 3, rngs)
            layers.append(Dense(nnx.Sequential(*branch)))
            width += 32
    return Classifier([*layers, _norm(width, rngs), nnx.relu], width, rngs)


class SelfAttention(nnx.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        size = width // heads
        self.query = nnx.LinearGeneral(width, (heads, size), rngs=rngs)
        self.key = nnx.LinearGeneral(width, (heads, size), rngs=rngs)
        self.value = nnx.LinearGeneral(width, (heads, size), rngs=rngs)
        self.out = nnx.LinearGeneral((heads, size), width, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.out(y)


class Vit(nnx.Module):
    """Patches, a class token, positions, pre-norm blocks."""

    def __init__(
        self, side: int, patch: int, width: int, depth: int, heads: int, rngs: nnx.Rngs
    ) -> None:
        size = patch, patch
        self.embed = nnx.Conv(3, width, size, size, padding="VALID", rngs=rngs)
        self.token = nnx.Param(jax.numpy.zeros((1, 1, width)))
        places = (side // patch) ** 2 + 1
        self.positions = nnx.Param(jax.numpy.zeros((1, places, width)))
        self.blocks = nnx.List(_vit_branches(width, depth, heads, rngs))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 1000, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        x = x.reshape((x.shape[0], -1, x.shape[-1]))
        token = jax.numpy.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[-1]))
        x = jax.numpy.concatenate([token, x], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def _vit_branches(
    width: int, depth: int, heads: int, rngs: nnx.Rngs
) -> Iterator[Residual]:
    for _ in range(depth):
        attention = SelfAttention(width, heads, rngs)
        hidden = nnx.Linear(width, 4 * width, rngs=rngs)
        back = nnx.Linear(4 * width, width, rngs=rngs)
        for branch in ([attention], [hidden, nnx.gelu, back]):
            norm = nnx.LayerNorm(width, rngs=rngs)
            yield Residual(nnx.Sequential(norm, *branch), _same, _same)


def vit_b16(rngs: nnx.Rngs) -> Vit:
    """ViT-B/16: 86,567,656 parameters."""
    return Vit(224, 16, 768, 12, 12, rngs)


NNX_NETS: Mapping[str, Callable[[nnx.Rngs], nnx.Module]] = MappingProxyType(
    {
        "mobilenet_v2": mobilenet_v2,
        "resnet50": resnet50,
        "vit_b16": vit_b16,
        "densenet121": densenet121,
    }
)
