"""Channels sliced, shuffled, padded, repeated and split."""

import jax
import jax.numpy as jnp

from zoo.structures import (
    IMAGE,
    ROW,
    conv,
    head,
    relu_conv,
    structure,
)

STEM = {"stem": (3, 3, 3, 6)}

# --- slice, stride, flip, roll, repeat, pad -------------------------------------------


@structure(
    "focus_slices",
    "right",
    {"stem:3": 6, "deep:3": 5},
    {**STEM, "deep": (1, 1, 24, 5), "w": (5, 3)},
)
def _(p, x):
    h = relu_conv(x, p["stem"])
    parts = [h[:, i::2, j::2] for j in range(2) for i in range(2)]
    return head(relu_conv(jnp.concatenate(parts, axis=-1), p["deep"]), p["w"])


# Nothing reads the odd channels: they are a group of their own.
@structure(
    "strided_channel_slice",
    "crash",
    {"stem:3": 3, "stem:3#2": 3},
    {**STEM, "w": (1, 1, 3, 3)},
)
def _(p, x):
    return conv(relu_conv(x, p["stem"])[..., ::2], p["w"])


@structure("flip_channels", "wrong", {"stem:3": 6}, {**STEM, "w": (1, 1, 6, 3)})
def _(p, x):
    return conv(jnp.flip(relu_conv(x, p["stem"]), axis=-1), p["w"])


@structure("roll_channels", "thread", {"stem:3": 6}, {**STEM, "w": (1, 1, 6, 3)})
def _(p, x):
    return conv(jnp.roll(relu_conv(x, p["stem"]), 2, axis=-1), p["w"])


@structure(
    "permute_channels_by_constants",
    "thread",
    {"stem:3": 6},
    {**STEM, "w": (1, 1, 6, 3)},
)
def _(p, x):
    order = jnp.array([3, 0, 5, 1, 4, 2])
    return conv(jnp.take(relu_conv(x, p["stem"]), order, axis=-1), p["w"])


# A unit is a channel with both of its copies, or the second copy of every channel.
@structure(
    "channel_repeat",
    "crash",
    {"stem:3": 6, "w:2": 2},
    {**STEM, "w": (1, 1, 12, 3)},
)
def _(p, x):
    return conv(jnp.repeat(relu_conv(x, p["stem"]), 2, axis=-1), p["w"])


@structure("channel_tile", "thread", {"stem:3": 6}, {**STEM, "w": (1, 1, 12, 3)})
def _(p, x):
    return conv(jnp.tile(relu_conv(x, p["stem"]), (1, 1, 1, 2)), p["w"])


# ResNet's option A. The 8 channels after it are 2 padded ones, 4 from before, 2 padded.
@structure(
    "pad_shortcut",
    "crash",
    {"stem:3": 4, "inner:3": 5, "outer:3": 4},
    {
        "stem": (3, 3, 3, 4),
        "inner": (3, 3, 4, 5),
        "outer": (3, 3, 5, 8),
        "w": (8, 3),
    },
)
def _(p, x):
    x = relu_conv(x, p["stem"])
    y = conv(relu_conv(x, p["inner"], stride=2), p["outer"])
    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
    return head(jax.nn.relu(x + y), p["w"])


@structure(
    "slice_assignment",
    "crash",
    {"a:1": 2, "a:1#2": 4},
    {"a": (4, 6), "b": (4, 2), "w": (6, 3)},
    ROW,
)
def _(p, x):
    h = (x @ p["a"]).at[:, :2].set(jnp.tanh(x @ p["b"]))
    return jax.nn.relu(h) @ p["w"]


@structure(
    "slice_assignment_strided",
    "thread",
    {"a:1": 3, "a:1#2": 3},
    {"a": (4, 6), "b": (4, 3), "w": (6, 3)},
    ROW,
)
def _(p, x):
    h = (x @ p["a"]).at[:, ::2].add(jnp.tanh(x @ p["b"]))
    return jax.nn.relu(h) @ p["w"]


# What is written is no unit of its own: the channel that a scatter writes to positions computed at run time stays.
@structure(
    "slice_assignment_of_one_channel",
    "thread",
    {"a:1": 5},
    {"a": (4, 6), "w": (6, 3)},
    ROW,
    refused={
        "a:1": "a scatter writes to positions computed at run time",
        "w:0": "a scatter writes to positions computed at run time",
    },
)
def _(p, x):
    return jnp.tanh((x @ p["a"]).at[:, 3].set(x[:, 0])) @ p["w"]


# --- shuffles -------------------------------------------------------------------------


@structure("channel_shuffle", "wrong", {"stem:3": 6}, {**STEM, "w": (3, 3, 6, 3)})
def _(p, x):
    h = relu_conv(x, p["stem"])
    b, rows, columns, c = h.shape
    h = h.reshape(b, rows, columns, 2, c // 2).swapaxes(3, 4)
    return conv(h.reshape(b, rows, columns, c), p["w"])


@structure(
    "shufflenet_unit",
    "crash",
    {"stem:3": 3, "stem:3#2": 3, "first:3": 3, "last:3": 3},
    {
        **STEM,
        "first": (1, 1, 3, 3),
        "depthwise": (3, 3, 1, 3),
        "last": (1, 1, 3, 3),
        "w": (6, 3),
    },
)
def _(p, x):
    left, right = jnp.split(relu_conv(x, p["stem"]), 2, axis=-1)
    y = conv(relu_conv(right, p["first"]), p["depthwise"], groups=3)
    h = jnp.concatenate([left, relu_conv(y, p["last"])], axis=-1)
    b, rows, columns, c = h.shape
    h = h.reshape(b, rows, columns, 2, c // 2).swapaxes(3, 4)
    return head(jax.nn.relu(h.reshape(b, rows, columns, c)), p["w"])


# 4 c channels become c channels on a grid twice as fine: a unit is one of the c.
@structure(
    "pixel_shuffle",
    "crash",
    {"stem:3": 6, "widen:3": 3},
    {**STEM, "widen": (1, 1, 6, 12), "w": (3, 3, 3, 2)},
)
def _(p, x):
    h = conv(relu_conv(x, p["stem"]), p["widen"])
    b, rows, columns, _ = h.shape
    h = h.reshape(b, rows, columns, 3, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return conv(jax.nn.relu(h.reshape(b, 2 * rows, 2 * columns, 3)), p["w"])


@structure(
    "space_to_depth",
    "crash",
    {"stem:3": 6, "deep:3": 5},
    {**STEM, "deep": (1, 1, 24, 5), "w": (5, 3)},
)
def _(p, x):
    h = relu_conv(x, p["stem"])
    b, rows, columns, c = h.shape
    h = h.reshape(b, rows // 2, 2, columns // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    h = h.reshape(b, rows // 2, columns // 2, 4 * c)
    return head(relu_conv(h, p["deep"]), p["w"])


# --- splits ---------------------------------------------------------------------------


@structure(
    "csp_split",
    "crash",
    {"stem:3": 3, "stem:3#2": 3, "inner:3": 4, "outer:3": 3},
    {**STEM, "inner": (3, 3, 3, 4), "outer": (1, 1, 4, 3), "w": (1, 1, 6, 3)},
)
def _(p, x):
    left, right = jnp.split(relu_conv(x, p["stem"]), 2, axis=-1)
    right = relu_conv(relu_conv(right, p["inner"]), p["outer"])
    return conv(jnp.concatenate([right, left], axis=-1), p["w"])


# YOLOv8's block: both halves and the output of every bottleneck are concatenated.
@structure(
    "c2f",
    "crash",
    {
        "stem:3": 3,  # the half that is only passed on
        "stem:3#2": 3,  # the half that the bottlenecks add to
        "in0:3": 4,
        "in1:3": 5,
        "w:3": 5,
    },
    {
        **STEM,
        "in0": (3, 3, 3, 4),
        "out0": (3, 3, 4, 3),
        "in1": (3, 3, 3, 5),
        "out1": (3, 3, 5, 3),
        "w": (1, 1, 12, 5),
        "head": (5, 2),
    },
    IMAGE,
)
def _(p, x):
    parts = jnp.split(jax.nn.silu(conv(x, p["stem"])), 2, axis=-1)
    for k in range(2):
        y = jax.nn.silu(conv(parts[-1], p[f"in{k}"]))
        parts.append(parts[-1] + jax.nn.silu(conv(y, p[f"out{k}"])))
    return head(conv(jnp.concatenate(parts, axis=-1), p["w"]), p["head"])
