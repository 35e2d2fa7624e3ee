"""dm-haiku: networks of `hk.nets` and recurrent cores."""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from benchmarks.third_party.models import Model, normal, tokens


def _transformed(function: Callable[..., Any], *args: Any, **training: Any) -> Model:
    """A function of Haiku modules, evaluated without randomness.

    `training` are its options when it is initialized: BatchNorm asks for that.
    """
    net = hk.without_apply_rng(hk.transform_with_state(function))
    params, state = net.init(jax.random.key(0), *args, **training)

    def apply_fn(variables: Any, *args: Any) -> Any:
        return net.apply(variables["params"], variables["state"], *args)[0]

    return Model(apply_fn, {"params": params, "state": state}, args)


def resnet(bottleneck: bool, version2: bool) -> Model:
    def net(images: jax.Array, is_training: bool = False) -> jax.Array:
        module = hk.nets.ResNet(
            [1, 1, 1, 1],
            10,
            resnet_v2=version2,
            bottleneck=bottleneck,
            channels_per_group=[16, 16, 32, 32],
            use_projection=[True] * 4,
        )
        return module(images, is_training)

    return _transformed(net, normal(2, 32, 32, 3), is_training=True)


def mobilenet() -> Model:
    def net(images: jax.Array, is_training: bool = False) -> jax.Array:
        module = hk.nets.MobileNetV1(
            strides=(1, 2, 1), channels=(8, 16, 16), num_classes=10
        )
        return module(images, is_training)

    return _transformed(net, normal(2, 16, 16, 3), is_training=True)


def perceptron() -> Model:
    return _transformed(lambda x: hk.nets.MLP([32, 24, 10])(x), normal(4, 12))


def vq_vae() -> Model:
    def net(images: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(hk.Conv2D(16, 4, stride=2)(images))
        codes = hk.nets.VectorQuantizer(8, 16, 0.25)(hk.Conv2D(8, 1)(hidden), False)
        hidden = jax.nn.relu(hk.Conv2D(16, 3)(codes["quantize"]))
        return hk.Conv2DTranspose(3, 4, stride=2)(hidden)

    return _transformed(net, normal(2, 16, 16, 3))


def recurrent(core: Callable[[int], hk.RNNCore]) -> Model:
    def net(words: jax.Array) -> jax.Array:
        x = hk.Embed(40, 16)(words)
        cell = core(24)
        out, _ = hk.dynamic_unroll(
            cell, x, cell.initial_state(x.shape[0]), time_major=False
        )
        return hk.Linear(10)(out)

    return _transformed(net, tokens(2, 6))


def transformer() -> Model:
    def net(words: jax.Array) -> jax.Array:
        x = hk.Embed(40, 16)(words)
        mask = jnp.tril(jnp.ones((1, 1, 6, 6)))
        for _ in range(2):
            h = hk.LayerNorm(-1, True, True)(x)
            attend = hk.MultiHeadAttention(
                4, 8, model_size=16, w_init=hk.initializers.VarianceScaling(1.0)
            )
            x = x + attend(h, h, h, mask=mask)
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.Linear(16)(jax.nn.gelu(hk.Linear(64)(h)))
        return hk.Linear(40)(hk.LayerNorm(-1, True, True)(x))

    return _transformed(net, tokens(2, 6))


MODELS: dict[str, Callable[[], Model]] = {
    "MLP": perceptron,
    "ResNet": lambda: resnet(bottleneck=False, version2=False),
    "ResNet V2, bottlenecks": lambda: resnet(bottleneck=True, version2=True),
    "MobileNetV1": mobilenet,
    "VQ-VAE": vq_vae,
    "LSTM": lambda: recurrent(hk.LSTM),
    "GRU": lambda: recurrent(hk.GRU),
    "transformer": transformer,
}
