"""Convolutions: shared, grouped, frozen, detached; pyramids and products."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from zoo import linen, normal
from zoo.structures import (
    IMAGE,
    conv,
    flatten,
    head,
    register,
    relu_conv,
    structure,
)

STEM = {"stem": (3, 3, 3, 6)}

# --- residuals, shared layers, outputs ------------------------------------------------


@structure(
    "residual",
    "right",
    {"stem:3": 6, "inner:3": 5},
    {**STEM, "inner": (3, 3, 6, 5), "outer": (3, 3, 5, 6), "w": (6, 3)},
)
def _(p, x):
    x = relu_conv(x, p["stem"])
    return head(jax.nn.relu(x + conv(relu_conv(x, p["inner"]), p["outer"])), p["w"])


# The stream is the input and the output: only the inner convolution can lose channels.
@structure(
    "residual_with_the_input",
    "crash",
    {"inner:3": 5},
    {"inner": (3, 3, 3, 5), "outer": (3, 3, 5, 3)},
)
def _(p, x):
    return x + conv(relu_conv(x, p["inner"]), p["outer"])


@structure(
    "shared_convolution_twice",
    "right",
    {"stem:3": 6},
    {**STEM, "shared": (3, 3, 6, 6), "w": (6, 3)},
)
def _(p, x):
    x = relu_conv(x, p["stem"])
    return head(relu_conv(relu_conv(x, p["shared"]), p["shared"]), p["w"])


@structure(
    "shared_branch",
    "right",
    {"a:3": 6, "shared:3": 5},
    {"a": (3, 3, 3, 6), "b": (1, 1, 3, 6), "shared": (3, 3, 6, 5), "w": (10, 3)},
)
def _(p, x):
    one = relu_conv(relu_conv(x, p["a"]), p["shared"])
    two = relu_conv(relu_conv(x, p["b"]), p["shared"], stride=2)
    both = jnp.concatenate([one.mean((1, 2)), two.mean((1, 2))], axis=-1)
    return both @ p["w"]


@structure(
    "dict_output",
    "right",
    {"stem:3": 6, "deep:3": 5},
    {**STEM, "deep": (3, 3, 6, 5), "boxes": (6, 4), "classes": (5, 3)},
)
def _(p, x):
    x = relu_conv(x, p["stem"])
    classes = head(relu_conv(x, p["deep"]), p["classes"])
    return {"boxes": head(x, p["boxes"]), "classes": classes}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Detection:
    boxes: Any
    classes: Any


@structure(
    "dataclass_output",
    "crash",
    {"stem:3": 6},
    {**STEM, "boxes": (6, 4), "classes": (6, 3)},
)
def _(p, x):
    x = relu_conv(x, p["stem"])
    return Detection(head(x, p["boxes"]), head(x, p["classes"]))


# Nobody says that the last convolution is the output.
@structure(
    "output_convolution",
    "output",
    {"stem:3": 6},
    {**STEM, "last": (3, 3, 6, 4)},
)
def _(p, x):
    return conv(relu_conv(x, p["stem"]), p["last"])


@structure(
    "fully_convolutional_batch_of_one",
    "right",
    {"stem:3": 6, "deep:3": 5},
    {**STEM, "deep": (3, 3, 6, 5), "w": (1, 1, 5, 2)},
    lambda batch, seed: normal(4, 4, 3)(1, seed),
)
def _(p, x):
    return conv(relu_conv(relu_conv(x, p["stem"]), p["deep"]), p["w"])


# --- groups, depth, transposed --------------------------------------------------------

# A convolution of G groups is G x I/G inputs and G x O/G outputs. It can lose whole
# groups, an input of every group, and an output of every group.


@structure(
    "grouped_convolution",
    "right",
    {"stem:3": 2, "stem:3#2": 4, "grouped:3": 3},
    {"stem": (1, 1, 3, 8), "grouped": (3, 3, 2, 12), "w": (12, 3)},
)
def _(p, x):
    x = relu_conv(x, p["stem"])
    return head(relu_conv(x, p["grouped"], groups=4), p["w"])


@structure(
    "depth_multiplier",
    "crash",
    {"stem:3": 6, "depthwise:3": 2},
    {**STEM, "depthwise": (3, 3, 1, 12), "w": (12, 3)},
)
def _(p, x):
    x = relu_conv(x, p["stem"])
    return head(relu_conv(x, p["depthwise"], groups=6), p["w"])


@structure(
    "depthwise_of_one_channel",
    "thread",
    {"stem:3": 5},
    {"one": (3, 3, 1, 1), "stem": (3, 3, 1, 5), "w": (5, 3)},
    normal(4, 4, 1),
)
def _(p, x):
    return head(relu_conv(conv(x, p["one"]), p["stem"]), p["w"])


# JAX has no grouped lax.conv_transpose: a dilated convolution with groups is one.
@structure(
    "grouped_transposed_convolution",
    "crash",
    {"stem:3": 2, "stem:3#2": 3, "up:3": 4},
    {**STEM, "up": (2, 2, 3, 8), "w": (1, 1, 8, 2)},
)
def _(p, x):
    h = lax.conv_general_dilated(
        relu_conv(x, p["stem"]),
        p["up"],
        (1, 1),
        ((1, 1), (1, 1)),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    return conv(jax.nn.relu(h), p["w"])


class UpAndDown(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, name="down")(x))
        x = nn.relu(nn.ConvTranspose(5, (2, 2), strides=(2, 2), name="up")(x))
        return nn.Conv(2, (1, 1), name="head")(x)


register(
    "transposed_convolution",
    "thread",
    {"params/down/kernel:3": 6, "params/up/kernel:3": 5},
    lambda: linen(UpAndDown(), IMAGE),
)


# --- frozen, detached -----------------------------------------------------------------

# In torch what needs no gradient is no part of the graph that couplings are read from.


@structure(
    "all_parameters_frozen",
    "idle",
    {"deep:2": 6, "deep:3": 5},
    {**STEM, "deep": (3, 3, 6, 5), "w": (5, 2)},
)
def _(p, x):
    p = lax.stop_gradient(p)
    return head(relu_conv(relu_conv(x, p["stem"]), p["deep"]), p["w"])


@structure(
    "first_convolution_frozen",
    "idle",
    {"stem:3": 6, "deep:3": 5},
    {**STEM, "deep": (3, 3, 6, 5), "w": (5, 2)},
)
def _(p, x):
    h = relu_conv(x, lax.stop_gradient(p["stem"]))
    return head(relu_conv(h, p["deep"]), p["w"])


@structure(
    "detached_branch",
    "crash",
    {"stem:3": 6, "side:3": 5},
    {**STEM, "side": (3, 3, 6, 5), "w": (11, 2)},
)
def _(p, x):
    h = relu_conv(x, p["stem"])
    side = relu_conv(lax.stop_gradient(h), p["side"])
    return head(jnp.concatenate([h, lax.stop_gradient(side)], axis=-1), p["w"])


# --- pyramids and products ------------------------------------------------------------


# BiFPN: one scalar weight per input of a fusion node, normalised by their sum.
@structure(
    "bifpn_scalar_weights",
    "idle",
    {"a:3": 6, "fused:3": 5},
    {
        "a": (3, 3, 3, 6),
        "b": (1, 1, 3, 6),
        "share": (2,),
        "fused": (3, 3, 6, 5),
        "w": (5, 2),
    },
    refused={"share:0": "this axis is removed by indexing"},
)
def _(p, x):
    share = jax.nn.relu(p["share"])
    share = share / (share.sum() + 1e-4)
    fine, coarse = conv(x, p["a"]), conv(x, p["b"], stride=2)
    coarse = jax.image.resize(coarse, fine.shape, "nearest")
    h = jax.nn.silu(share[0] * fine + share[1] * coarse)
    return head(relu_conv(h, p["fused"]), p["w"])


# f f^T: both axes of the matrix are the same channels, and so are 36 rows of the head.
@structure("gram_matrix", "hang", {"stem:3": 6}, {**STEM, "w": (36, 2)})
def _(p, x):
    f = relu_conv(x, p["stem"]).reshape(x.shape[0], -1, 6)
    return flatten(jnp.einsum("bsi,bsj->bij", f, f)) @ p["w"]


@structure(
    "outer_product",
    "crash",
    {"a:3": 4, "b:3": 5},
    {"a": (3, 3, 3, 4), "b": (1, 1, 3, 5), "w": (20, 2)},
)
def _(p, x):
    a, b = conv(x, p["a"]).mean((1, 2)), conv(x, p["b"]).mean((1, 2))
    return jax.nn.relu(flatten(a[:, :, None] * b[:, None])) @ p["w"]
