"""Gates, norms and reparametrised kernels of convolutions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from zoo import linen, normal
from zoo.structures import (
    IMAGE,
    conv,
    conv_nchw,
    head,
    register,
    relu_conv,
    structure,
)

STEM = {"stem": (3, 3, 3, 6)}

# --- gates ----------------------------------------------------------------------------


@structure(
    "squeeze_excite",
    "right",
    {"stem:3": 6, "squeeze:1": 3},
    {**STEM, "squeeze": (6, 3), "excite": (3, 6), "w": (6, 2)},
)
def _(p, x):
    x = relu_conv(x, p["stem"])
    gate = jax.nn.sigmoid(jax.nn.relu(head(x, p["squeeze"])) @ p["excite"])
    return head(x * gate[:, None, None], p["w"])


# A softmax over the channels divides by a sum in which exp(0) = 1 counts for a masked
# channel: the narrowed program adds it.
@structure(
    "channel_softmax_gate",
    "right",
    {"stem:3": 6},
    {**STEM, "gate": (6, 6), "w": (6, 2)},
)
def _(p, x):
    x = relu_conv(x, p["stem"])
    gate = jax.nn.softmax(head(x, p["gate"]), axis=-1)
    return head(x * gate[:, None, None], p["w"])


@structure(
    "spatial_gate_of_one_channel",
    "idle",
    {"stem:3": 6},
    {**STEM, "gate": (3, 3, 6, 1), "w": (6, 2)},
)
def _(p, x):
    x = relu_conv(x, p["stem"])
    return head(x * jax.nn.sigmoid(conv(x, p["gate"])), p["w"])


# CBAM: a maximum sees the 0 of a masked channel: the narrowed program compares with it.
@structure(
    "cbam_mean_and_max_over_channels",
    "idle",
    {"stem:3": 6},
    {**STEM, "gate": (3, 3, 2, 1), "w": (6, 2)},
)
def _(p, x):
    x = conv(x, p["stem"])
    pair = [x.mean(-1, keepdims=True), x.max(-1, keepdims=True)]
    gate = jax.nn.sigmoid(conv(jnp.concatenate(pair, axis=-1), p["gate"]))
    return head(x * gate, p["w"])


@structure(
    "mean_over_channels",
    "thread",
    {"stem:3": 6},
    {**STEM, "gate": (3, 3, 1, 1), "w": (6, 2)},
)
def _(p, x):
    x = conv(x, p["stem"])
    return head(x * conv(x.mean(-1, keepdims=True), p["gate"]), p["w"])


# --- norms, buffers, weights ----------------------------------------------------------


class GroupNormNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        x = nn.relu(nn.GroupNorm(num_groups=4, name="norm")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


# A unit is a whole group of the norm, or one channel of every group.
register(
    "group_norm",
    "right",
    {"params/stem/kernel:3": 2, "params/stem/kernel:3#2": 4},
    lambda: linen(GroupNormNet(), IMAGE),
)


@structure(
    "scale_of_every_channel",
    "right",
    {"stem:3": 6},
    {**STEM, "scale": (1, 1, 1, 6), "w": (6, 2)},
)
def _(p, x):
    return head(relu_conv(x, p["stem"]) * p["scale"], p["w"])


@structure(
    "bias_of_every_pixel",
    "idle",
    {"stem:0": 6},
    {"stem": (6, 3, 3, 3), "bias": (1, 6, 4, 4), "w": (6, 2)},
    normal(3, 4, 4),
)
def _(p, x):
    return jax.nn.relu(conv_nchw(x, p["stem"]) + p["bias"]).mean((2, 3)) @ p["w"]


# A constant per channel that is no parameter: the program keeps the rows it needs.
@structure("channel_buffer", "crash", {"stem:3": 6}, {**STEM, "w": (6, 2)})
def _(p, x):
    buffer = jnp.linspace(0.5, 2.0, 6, dtype=jnp.float32)
    return head(relu_conv(x, p["stem"]) * buffer[None, None, None], p["w"])


@structure(
    "weight_norm",
    "crash",
    {"stem:3": 6, "deep:3": 5},
    {**STEM, "g": (1, 1, 1, 6), "deep": (3, 3, 6, 5), "g2": (1, 1, 1, 5), "w": (5, 2)},
)
def _(p, x):
    def normed(kernel, gain):
        power = (kernel * kernel).sum((0, 1, 2), keepdims=True)
        return kernel * (gain * lax.rsqrt(power + 1e-12))

    x = relu_conv(x, normed(p["stem"], p["g"]))
    return head(relu_conv(x, normed(p["deep"], p["g2"])), p["w"])


# The norm of a masked filter is 0, and 0 / 0 is no number: cutting is what works.
@structure(
    "weight_norm_without_epsilon",
    "thread",
    {"stem:3": 6},
    {**STEM, "g": (1, 1, 1, 6), "w": (6, 2)},
    inexact={"stem:3": "the result is not finite"},
)
def _(p, x):
    norm = jnp.sqrt((p["stem"] * p["stem"]).sum((0, 1, 2), keepdims=True))
    return head(relu_conv(x, p["stem"] * (p["g"] / norm)), p["w"])


# Every mean over the inputs of a filter counts those that were masked: the difference
# w - mean is not 0 where the channel is dead, but the same in all of them.
@structure(
    "weight_standardisation",
    "thread",
    {"stem:3": 6, "deep:3": 5},
    {**STEM, "deep": (3, 3, 6, 5), "w": (5, 2)},
)
def _(p, x):
    def standard(kernel):
        kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
        power = (kernel * kernel).mean((0, 1, 2), keepdims=True)
        return kernel * lax.rsqrt(power + 1e-5)

    x = relu_conv(x, standard(p["stem"]))
    return head(relu_conv(x, standard(p["deep"])), p["w"])
