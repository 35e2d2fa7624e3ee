"""keras 3 on its JAX backend: `keras.applications` and its layers."""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from keras import layers

from benchmarks.third_party.models import Model, normal, tokens


def _stateless(net: keras.Model, *args: Any) -> Model:
    """`stateless_call`, with the variables under their paths."""
    named = lambda variables: {v.path: v.value for v in variables}
    variables = {
        "trainable": named(net.trainable_variables),
        "other": named(net.non_trainable_variables),
    }
    order = {kind: list(leaves) for kind, leaves in variables.items()}

    def apply_fn(variables: Any, *args: Any) -> Any:
        trainable, other = (
            [variables[kind][path] for path in paths] for kind, paths in order.items()
        )
        return net.stateless_call(trainable, other, *args, training=False)[0]

    return Model(apply_fn, variables, args)


def application(build: Callable[..., keras.Model], side: int, **options: Any) -> Model:
    net = build(weights=None, input_shape=(side, side, 3), classes=10, **options)
    return _stateless(net, normal(2, side, side, 3))


def sequence(layer: layers.Layer) -> Model:
    net = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(40, 16),
            layer,
            layers.Dense(5),
        ]
    )
    return _stateless(net, tokens(2, 6))


def transformer() -> Model:
    words = keras.Input((6,), dtype="int32")
    x = layers.Embedding(40, 32)(words)
    for _ in range(2):
        h = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 8)(h, h)])
        h = layers.LayerNormalization()(x)
        h = layers.Dense(64, activation="gelu")(h)
        x = layers.Add()([x, layers.Dense(32)(h)])
    x = layers.GlobalAveragePooling1D()(x)
    return _stateless(keras.Model(words, layers.Dense(5)(x)), tokens(2, 6))


def separable() -> Model:
    images = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(images)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    y = layers.SeparableConv2D(16, 3, padding="same")(x)
    y = layers.ReLU()(layers.BatchNormalization()(y))
    x = layers.Concatenate()([x, y])
    x = layers.Conv2DTranspose(12, 2, strides=2)(layers.MaxPooling2D()(x))
    x = layers.GroupNormalization(4)(layers.UpSampling2D()(x))
    x = layers.GlobalAveragePooling2D()(x)
    return _stateless(keras.Model(images, layers.Dense(5)(x)), normal(2, 16, 16, 3))


MODELS: dict[str, Callable[[], Model]] = {
    "MobileNet": lambda: application(keras.applications.MobileNet, 32, alpha=0.25),
    "separable convolutions": separable,
    "LSTM": lambda: sequence(layers.LSTM(24)),
    "bidirectional GRU": lambda: sequence(layers.Bidirectional(layers.GRU(24))),
    "transformer": transformer,
}
