"""Whole blocks of convolutional networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zoo import normal
from zoo.structures import (
    IMAGE,
    ROW,
    conv,
    flatten,
    head,
    relu_conv,
    structure,
)

STEM = {"stem": (3, 3, 3, 6)}


# Every layer reads all before it: the rival's time grows with depth^3 to depth^4.
DEPTH = 12


@structure(
    "densely_connected",
    "thread",
    {"stem:3": 6, **{f"grow{k}:3": 2 for k in range(DEPTH)}},
    {
        **STEM,
        **{f"scale{k}": (1, 1, 1, 6 + 2 * k) for k in range(DEPTH)},
        **{f"grow{k}": (1, 1, 6 + 2 * k, 2) for k in range(DEPTH)},
        "w": (6 + 2 * DEPTH, 2),
    },
)
def _(p, x):
    x = conv(x, p["stem"])
    for k in range(DEPTH):
        y = conv(jax.nn.relu(x * p[f"scale{k}"]), p[f"grow{k}"])
        x = jnp.concatenate([x, y], axis=-1)
    return head(x, p["w"])


# Res2Net: each quarter of the channels reads the quarter before it.
@structure(
    "hierarchical_split",
    "thread",
    {"stem:3": 2, "stem:3#2": 2, "stem:3#3": 2, "stem:3#4": 2, "k2:3": 2},
    {
        "stem": (3, 3, 3, 8),
        **{f"k{k}": (3, 3, 2, 2) for k in range(3)},
        "w": (8, 2),
    },
)
def _(p, x):
    first, *parts = jnp.split(relu_conv(x, p["stem"]), 4, axis=-1)
    outs, y = [first], 0.0
    for k, part in enumerate(parts):
        y = relu_conv(part + y, p[f"k{k}"])
        outs.append(y)
    return head(jnp.concatenate(outs, axis=-1), p["w"])


# SKNet: a softmax over two branches, for every channel.
@structure(
    "selective_kernels",
    "thread",
    {"a:3": 6, "squeeze:1": 4},
    {
        "a": (3, 3, 3, 6),
        "b": (1, 1, 3, 6),
        "squeeze": (6, 4),
        "select": (4, 12),
        "w": (6, 2),
    },
)
def _(p, x):
    a, b = relu_conv(x, p["a"]), relu_conv(x, p["b"])
    code = jax.nn.relu(head(a + b, p["squeeze"])) @ p["select"]
    share = jax.nn.softmax(code.reshape(-1, 2, 6), axis=1)
    mixed = a * share[:, 0, None, None] + b * share[:, 1, None, None]
    return head(mixed, p["w"])


# FPN and HRNet: coarse maps resized and added to fine ones, at two levels.
@structure(
    "feature_pyramid",
    "thread",
    {"c1:3": 4, "c2:3": 6, "l2:3": 5, "out1:3": 3, "out2:3": 3},
    {
        "c1": (3, 3, 3, 4),
        "c2": (3, 3, 4, 6),
        "l1": (1, 1, 4, 5),
        "l2": (1, 1, 6, 5),
        "out1": (3, 3, 5, 3),
        "out2": (3, 3, 5, 3),
        "w1": (3, 2),
        "w2": (3, 2),
    },
)
def _(p, x):
    c1 = relu_conv(x, p["c1"])
    c2 = relu_conv(c1, p["c2"], stride=2)
    p2 = conv(c2, p["l2"])
    p1 = conv(c1, p["l1"]) + jax.image.resize(p2, (*c1.shape[:3], 5), "bilinear")
    one, two = relu_conv(p1, p["out1"]), relu_conv(p2, p["out2"])
    return {"fine": head(one, p["w1"]), "coarse": head(two, p["w2"])}


# GhostNet: half of the channels are cheap depthwise copies of the others.
@structure(
    "ghost_channels",
    "thread",
    {"stem:3": 6},
    {**STEM, "cheap": (3, 3, 1, 6), "w": (12, 2)},
)
def _(p, x):
    x = relu_conv(x, p["stem"])
    return head(jnp.concatenate([x, relu_conv(x, p["cheap"], groups=6)], -1), p["w"])


# CoordConv: coordinates, which are no parameters, join the channels.
@structure(
    "coordinate_channels",
    "thread",
    {"stem:3": 6, "deep:2": 2, "deep:3": 5},  # a coordinate can go, too
    {**STEM, "deep": (3, 3, 8, 5), "w": (5, 2)},
)
def _(p, x):
    x = relu_conv(x, p["stem"])
    line = jnp.linspace(-1.0, 1.0, 4, dtype=jnp.float32)
    grid = jnp.stack(jnp.meshgrid(line, line), axis=-1)
    grid = jnp.broadcast_to(grid[None], (x.shape[0], 4, 4, 2))
    return head(relu_conv(jnp.concatenate([x, grid], axis=-1), p["deep"]), p["w"])


# Blur pooling: a depthwise kernel that is no parameter.
@structure(
    "blur_pooling",
    "thread",
    {"stem:3": 6},
    {**STEM, "w": (6, 2)},
)
def _(p, x):
    line = np.array([1.0, 2.0, 1.0], np.float32) / 4.0
    kernel = np.tile((line[:, None] * line[None])[:, :, None, None], (1, 1, 1, 6))
    return head(conv(relu_conv(x, p["stem"]), kernel, stride=2, groups=6), p["w"])


# SPPF: pooled three times, all concatenated.
@structure(
    "pyramid_pooling",
    "thread",
    {"stem:3": 6, "deep:3": 5},
    {**STEM, "deep": (1, 1, 24, 5), "w": (5, 2)},
)
def _(p, x):
    parts = [relu_conv(x, p["stem"])]
    for _ in range(3):
        parts.append(nn.max_pool(parts[-1], (3, 3), padding="SAME"))
    return head(relu_conv(jnp.concatenate(parts, axis=-1), p["deep"]), p["w"])


# FiLM: a condition scales and shifts every channel.
@structure(
    "feature_modulation",
    "thread",
    {"code:1": 5, "film:1": 6},
    {**STEM, "code": (3, 5), "film": (5, 12), "w": (6, 2)},
    lambda batch, seed: (*IMAGE(batch, seed), *normal(3)(batch, seed + 50)),
)
def _(p, x, condition):
    film = jax.nn.relu(condition @ p["code"]) @ p["film"]
    scale, shift = jnp.split(film[:, None, None], 2, axis=-1)
    return head(jax.nn.relu(conv(x, p["stem"]) * scale + shift), p["w"])


# Bilinear pooling with its signed square root, then a norm over all products.
@structure(
    "bilinear_pooling",
    "thread",
    {"a:3": 4, "b:3": 5},
    {"a": (3, 3, 3, 4), "b": (1, 1, 3, 5), "w": (20, 2)},
)
def _(p, x):
    a, b = relu_conv(x, p["a"]), relu_conv(x, p["b"])
    h = flatten(jnp.einsum("bhwi,bhwj->bij", a, b))
    h = jnp.sign(h) * jnp.sqrt(jnp.abs(h))
    return (h / jnp.sqrt((h * h).sum(-1, keepdims=True) + 1e-6)) @ p["w"]


# StyleGAN2: a kernel for every sample, run as one convolution with a group for each.
@structure(
    "modulated_convolution",
    "thread",
    {"stem:3": 6, "kernel:3": 5},
    {**STEM, "style": (3, 6), "kernel": (3, 3, 6, 5), "w": (5, 2)},
)
def _(p, x):
    h, style = conv(x, p["stem"]), x.mean((1, 2)) @ p["style"]
    kernel = p["kernel"][None] * style[:, None, None, :, None]
    power = (kernel * kernel).sum((1, 2, 3), keepdims=True)
    kernel = kernel * lax.rsqrt(power + 1e-6)
    b = x.shape[0]
    h = h.transpose(1, 2, 0, 3).reshape(1, 4, 4, b * 6)
    kernel = kernel.transpose(1, 2, 3, 0, 4).reshape(3, 3, 6, b * 5)
    h = conv(h, kernel, groups=b).reshape(4, 4, b, 5).transpose(2, 0, 1, 3)
    return head(jax.nn.relu(h), p["w"])


# Non-local block: every pixel attends to every pixel, then a residual.
@structure(
    "non_local_block",
    "thread",
    {"stem:3": 6, "theta:1": 4, "g:1": 5},
    {**STEM, "theta": (6, 4), "phi": (6, 4), "g": (6, 5), "out": (5, 6), "w": (6, 2)},
)
def _(p, x):
    x = conv(x, p["stem"])
    theta, phi, g = (x.reshape(-1, 16, 6) @ p[name] for name in ("theta", "phi", "g"))
    weight = jax.nn.softmax(jnp.einsum("bsc,btc->bst", theta, phi), axis=-1)
    y = jnp.einsum("bst,btc->bsc", weight, g) @ p["out"]
    return head(x + y.reshape(x.shape), p["w"])


# An ensemble under vmap: every member loses the same units.
@structure(
    "vmapped_ensemble",
    "thread",
    {"a:2": 6},
    {"a": (3, 4, 6), "b": (3, 6), "w": (3, 6, 2)},
    ROW,
)
def _(p, x):
    def member(p, x):
        return jnp.tanh(x @ p["a"] + p["b"][None]) @ p["w"]

    return jax.vmap(member, (0, None))(p, x)
