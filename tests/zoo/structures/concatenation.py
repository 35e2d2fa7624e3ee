"""Channels concatenated and flattened."""

import jax
import jax.numpy as jnp

from zoo import normal
from zoo.structures import (
    ROW,
    SEQUENCE,
    conv,
    conv_nchw,
    flatten,
    relu_conv,
    structure,
)

STEM = {"stem": (3, 3, 3, 6)}

# --- concatenate ----------------------------------------------------------------------


@structure(
    "concat_last_axis",
    "right",
    {"a:1": 5, "b:1": 6},
    {"a": (4, 5), "b": (4, 6), "w": (11, 3)},
    ROW,
)
def _(p, x):
    return jnp.concatenate([x @ p["a"], jax.nn.relu(x @ p["b"])], axis=-1) @ p["w"]


@structure(
    "concat_same_tensor_twice", "right", {"stem:3": 6}, {**STEM, "w": (1, 1, 12, 3)}
)
def _(p, x):
    h = relu_conv(x, p["stem"])
    return conv(jnp.concatenate([h, h], axis=-1), p["w"])


@structure(
    "concat_relu_of_both_signs",
    "right",
    {"stem:3": 6},
    {**STEM, "w": (1, 1, 12, 3)},
)
def _(p, x):
    h = conv(x, p["stem"])
    return conv(jax.nn.relu(jnp.concatenate([h, -h], axis=-1)), p["w"])


@structure(
    "wide_and_deep",
    "right",
    {"wide:1": 5, "deep0:1": 6, "deep1:1": 4},
    {"wide": (4, 5), "deep0": (4, 6), "deep1": (6, 4), "w": (9, 2)},
    ROW,
)
def _(p, x):
    deep = jax.nn.relu(jax.nn.relu(x @ p["deep0"]) @ p["deep1"])
    return jnp.concatenate([x @ p["wide"], deep], axis=-1) @ p["w"]


# The rows of the input come first: rows 3..8 of the kernel are the convolution's.
@structure(
    "concat_with_the_input",
    "wrong",
    {"stem:3": 6},
    {**STEM, "w": (1, 1, 9, 3)},
)
def _(p, x):
    return conv(jnp.concatenate([x, relu_conv(x, p["stem"])], axis=-1), p["w"])


@structure(
    "concat_swapped_slices",
    "idle",
    {"stem:3": 6},
    {**STEM, "w": (1, 1, 6, 3)},
)
def _(p, x):
    h = relu_conv(x, p["stem"])
    return conv(jnp.concatenate([h[..., 2:], h[..., :2]], axis=-1), p["w"])


@structure(
    "concat_swapped_slices_linear",
    "idle",
    {"a:1": 6},
    {"a": (4, 6), "w": (6, 3)},
    ROW,
)
def _(p, x):
    h = jnp.tanh(x @ p["a"])
    return jnp.concatenate([h[:, 3:], h[:, :3]], axis=1) @ p["w"]


@structure(
    "concat_on_the_token_axis",
    "thread",
    {"a:1": 6},
    {"a": (4, 6), "b": (4, 6), "w": (6, 3)},
    SEQUENCE,
)
def _(p, x):
    return jnp.concatenate([x @ p["a"], x @ p["b"]], axis=1) @ p["w"]


# "dim=2" of [batch, time, features] written as a positive number.
@structure(
    "concat_on_axis_two",
    "crash",
    {"a:1": 5, "b:1": 6},
    {"a": (4, 5), "b": (4, 6), "w": (11, 3)},
    SEQUENCE,
)
def _(p, x):
    return jax.nn.relu(jnp.concatenate([x @ p["a"], x @ p["b"]], axis=2)) @ p["w"]


@structure(
    "chunk_on_axis_two",
    "crash",
    {"a:1": 5},
    {"a": (4, 10), "w": (5, 3)},
    SEQUENCE,
)
def _(p, x):
    left, right = jnp.split(x @ p["a"], 2, axis=2)
    return (left * jax.nn.sigmoid(right)) @ p["w"]


@structure(
    "stack_and_sum",
    "right",
    {"a:1": 6},
    {"a": (4, 6), "b": (4, 6), "w": (6, 3)},
    ROW,
)
def _(p, x):
    return jnp.stack([x @ p["a"], jax.nn.relu(x @ p["b"])]).sum(0) @ p["w"]


# --- flatten --------------------------------------------------------------------------


@structure(
    "flatten_nchw_4x4",
    "right",
    {"stem:0": 6, "dense:1": 5},
    {"stem": (6, 3, 3, 3), "dense": (96, 5), "w": (5, 3)},
    normal(3, 4, 4),
)
def _(p, x):
    h = flatten(jax.nn.relu(conv_nchw(x, p["stem"])))
    return jax.nn.relu(h @ p["dense"]) @ p["w"]


@structure(
    "flatten_nhwc_of_nchw",
    "wrong",
    {"stem:0": 6},
    {"stem": (6, 3, 3, 3), "w": (96, 3)},
    normal(3, 4, 4),
)
def _(p, x):
    h = jax.nn.relu(conv_nchw(x, p["stem"]))
    return flatten(h.transpose(0, 2, 3, 1)) @ p["w"]


@structure(
    "flatten_two_maps_then_concat",
    "wrong",
    {"stem:3": 6, "deep:3": 5},
    {**STEM, "deep": (3, 3, 6, 5), "w": (96 + 20, 3)},
)
def _(p, x):
    h = relu_conv(x, p["stem"])
    small = relu_conv(h, p["deep"], stride=2)
    return jnp.concatenate([flatten(h), flatten(small)], axis=1) @ p["w"]


@structure(
    "concat_then_flatten",
    "crash",
    {"a:3": 4, "b:3": 5, "dense:1": 6},
    {"a": (3, 3, 3, 4), "b": (1, 1, 3, 5), "dense": (144, 6), "w": (6, 2)},
)
def _(p, x):
    h = jnp.concatenate([conv(x, p["a"]), conv(x, p["b"])], axis=-1)
    return jax.nn.relu(flatten(jax.nn.relu(h)) @ p["dense"]) @ p["w"]


# The batch size and the widths are numbers in the source, as after `x.size()`.
@structure(
    "reshape_with_constants",
    "crash",
    {"stem:3": 6},
    {**STEM, "w": (96, 3)},
)
def _(p, x):
    h = relu_conv(x, p["stem"])
    return h.reshape(-1, 96) @ p["w"]


@structure(
    "reshape_with_constant_heads",
    "crash",
    {"a:1": 2, "a:1#2": 3},
    {"a": (4, 6), "w": (6, 3)},
    SEQUENCE,
)
def _(p, x):
    h = jax.nn.relu(x @ p["a"]).reshape(-1, 5, 2, 3)
    h = h / jnp.sqrt(1e-3 + (h * h).sum(-1, keepdims=True))
    return h.reshape(-1, 5, 6) @ p["w"]
