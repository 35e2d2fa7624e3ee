"""Convolutional networks, in Flax Linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo import linen, model, normal

IMAGE = normal(8, 8, 3)


def _bn(x: Any, name: str, train: bool = False) -> Any:
    return nn.BatchNorm(use_running_average=not train, name=name)(x)


class Chain(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        for k, width in enumerate((6, 10, 8)):
            x = nn.Conv(width, (3, 3), name=f"conv{k}")(x)
            x = nn.relu(_bn(x, f"bn{k}", self.train))
            if k == 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


CHAIN = {
    "params/conv0/kernel:3": 6,
    "params/conv1/kernel:3": 10,
    "params/conv2/kernel:3": 8,
}


@model("chain", CHAIN)
def _():
    return linen(Chain(), IMAGE)


@model("chain_train_batchnorm", CHAIN, mutated=True)
def _():
    module = Chain(train=True)
    return linen(module, IMAGE, mutable=["batch_stats"])


class DropoutChain(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(12, name="dense")(x))
        x = nn.Dropout(0.25, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x)


@model("dropout_train", {"params/conv/kernel:3": 6, "params/dense/kernel:1": 12})
def _():
    _, variables, inputs = linen(DropoutChain(), IMAGE)

    def apply_fn(variables, x, key):
        return DropoutChain().apply(variables, x, rngs={"dropout": key})

    def with_key(batch, seed):
        return (*inputs(batch, seed), jax.random.key(seed))

    return apply_fn, variables, with_key


class Residual(nn.Module):
    """Three stages; `shortcut` is how the stream changes its width."""

    shortcut: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(_bn(nn.Conv(4, (3, 3), name="stem")(x), "stem_bn"))
        for k, (width, stride) in enumerate(((4, 1), (8, 2))):
            y = nn.Conv(6 + k, (3, 3), strides=stride, name=f"in{k}")(x)
            y = nn.relu(_bn(y, f"in_bn{k}"))
            y = _bn(nn.Conv(width, (3, 3), name=f"out{k}")(y), f"out_bn{k}")
            x = nn.relu(self.join(x, width, stride, k) + y)
        return nn.Dense(3, name="head")(x.mean((1, 2)))

    def join(self, x, width, stride, k):
        if x.shape[-1] == width and stride == 1:
            return x
        if self.shortcut == "projection":
            x = nn.Conv(width, (1, 1), strides=stride, name=f"shortcut{k}")(x)
            return _bn(x, f"shortcut_bn{k}")
        extra = (width - x.shape[-1]) // 2
        x = x[:, ::stride, ::stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra, extra)))


@model(
    "resnet_projection",
    {
        "params/stem/kernel:3": 4,
        "params/in0/kernel:3": 6,
        "params/in1/kernel:3": 7,
        "params/out1/kernel:3": 8,
    },
)
def _():
    return linen(Residual("projection"), IMAGE)


@model(
    "resnet_zero_pad",
    {
        # Of the 8 channels of the second stage, 4 are those of the first.
        "params/stem/kernel:3": 4,
        "params/in0/kernel:3": 6,
        "params/in1/kernel:3": 7,
        "params/out1/kernel:3": 4,
    },
)
def _():
    return linen(Residual("zero_pad"), IMAGE)


class Identity(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(5, (3, 3), name="stem")(x)
        for k in range(2):
            y = nn.relu(_bn(x, f"bn{k}"))
            y = nn.Conv(5, (3, 3), name=f"conv{k}")(y)
            x = x + y
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@model("resnet_identity", {"params/stem/kernel:3": 5})
def _():
    return linen(Identity(), IMAGE)


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for k in range(3):
            y = nn.relu(_bn(x, f"bn{k}"))
            y = nn.relu(nn.Conv(6, (1, 1), name=f"squeeze{k}")(y))
            x = jnp.concatenate([x, nn.Conv(3, (3, 3), name=f"grow{k}")(y)], axis=-1)
        x = nn.Conv(7, (1, 1), name="transition")(nn.relu(_bn(x, "bn")))
        with jax.numpy_dtype_promotion("standard"):  # avg_pool divides by an integer
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@model(
    "densenet",
    {
        "params/stem/kernel:3": 4,
        **{f"params/squeeze{k}/kernel:3": 6 for k in range(3)},
        **{f"params/grow{k}/kernel:3": 3 for k in range(3)},
        "params/transition/kernel:3": 7,
    },
)
def _():
    return linen(DenseNet(), IMAGE)


class Inception(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(3, (1, 1), name="one")(x))
        b = nn.relu(
            nn.Conv(4, (3, 3), name="three")(nn.Conv(5, (1, 1), name="thin")(x))
        )
        c = nn.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")
        c = nn.relu(nn.Conv(6, (1, 1), name="pool")(c))
        x = jnp.concatenate([a, b, c], axis=-1)
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(9, name="dense")(x)))


@model(
    "inception_flatten",
    {
        "params/one/kernel:3": 3,
        "params/thin/kernel:3": 5,
        "params/three/kernel:3": 4,
        "params/pool/kernel:3": 6,
        "params/dense/kernel:1": 9,
    },
)
def _():
    return linen(Inception(), normal(4, 4, 3))


class Depthwise(nn.Module):
    """An inverted bottleneck; `multiplier` outputs for each input channel."""

    multiplier: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        y = nn.relu6(_bn(nn.Conv(6, (1, 1), name="expand")(x), "expand_bn"))
        wide = 6 * self.multiplier
        y = nn.Conv(wide, (3, 3), feature_group_count=6, name="depthwise")(y)
        y = nn.relu6(_bn(y, "depthwise_bn"))
        x = x + _bn(nn.Conv(4, (1, 1), name="project")(y), "project_bn")
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@model("depthwise", {"params/stem/kernel:3": 4, "params/expand/kernel:3": 6})
def _():
    return linen(Depthwise(1), IMAGE)


@model(
    "depthwise_multiplier",
    {
        # A channel dies with both of its filters; a filter index dies in all groups.
        "params/stem/kernel:3": 4,
        "params/expand/kernel:3": 6,
        "params/depthwise/kernel:3": 2,
    },
)
def _():
    return linen(Depthwise(2), IMAGE)


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (1, 1), name="before")(x))
        x = nn.Conv(12, (3, 3), feature_group_count=4, name="grouped")(x)
        x = nn.relu(_bn(x, "bn"))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@model(
    "grouped_convolution",
    {
        # 4 groups of 2 inputs and 3 outputs: an input of every group, a whole group,
        # an output of every group.
        "params/before/kernel:3": 2,
        "params/before/kernel:3#2": 4,
        "params/grouped/kernel:3": 3,
    },
)
def _():
    return linen(Grouped(), IMAGE)


class SqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Conv(6, (3, 3), name="conv")(x))
        s = x.mean((1, 2), keepdims=True)
        s = nn.silu(nn.Conv(3, (1, 1), name="reduce")(s))
        x = x * nn.sigmoid(nn.Conv(6, (1, 1), name="expand")(s))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@model("squeeze_excite", {"params/conv/kernel:3": 6, "params/reduce/kernel:3": 3})
def _():
    return linen(SqueezeExcite(), IMAGE)


class Flatten(nn.Module):
    channels_first: bool

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, name="conv")(x))
        if self.channels_first:
            x = x.transpose(0, 3, 1, 2)
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(10, name="dense")(x)))


for order in (False, True):

    @model(
        "flatten_" + ("nchw" if order else "nhwc"),
        {"params/conv/kernel:3": 6, "params/dense/kernel:1": 10},
    )
    def _(order=order):
        return linen(Flatten(order), IMAGE)


@model("convolution_nchw", {"w1:0": 6, "w2:0": 5})
def _():
    from zoo import weights

    params = weights(w1=(6, 3, 3, 3), b1=(6,), w2=(5, 6, 3, 3), head=(5, 3))
    layout = ("NCHW", "OIHW", "NCHW")

    def apply_fn(p, x):
        x = jax.lax.conv_general_dilated(x, p["w1"], (1, 1), "SAME", None, None, layout)
        x = jax.nn.relu(x + p["b1"][None, :, None, None])
        x = jax.lax.conv_general_dilated(x, p["w2"], (2, 2), "SAME", None, None, layout)
        return jax.nn.relu(x).mean((2, 3)) @ p["head"]

    return apply_fn, params, normal(3, 8, 8)


class ShuffleUnit(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        for k in range(2):
            left, right = jnp.split(x, 2, axis=-1)
            y = nn.relu(nn.Conv(4, (1, 1), name=f"first{k}")(right))
            y = nn.Conv(4, (3, 3), feature_group_count=4, name=f"depthwise{k}")(y)
            y = nn.relu(nn.Conv(4, (1, 1), name=f"last{k}")(y))
            x = jnp.concatenate([left, y], axis=-1)
            b, h, w, c = x.shape
            x = x.reshape(b, h, w, 2, c // 2).swapaxes(3, 4).reshape(b, h, w, c)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@model(
    "shufflenet",
    {
        # A shuffle moves channels and ties none: 0 and 1 stay in the left half twice,
        # 2 and 3 reach the second branch, the right half is read by the first. Then
        # the same for what the branches write.
        "params/stem/kernel:3": 2,
        "params/stem/kernel:3#2": 2,
        "params/stem/kernel:3#3": 4,
        "params/first0/kernel:3": 4,
        "params/last0/kernel:3": 2,
        "params/last0/kernel:3#2": 2,
        "params/first1/kernel:3": 4,
        "params/last1/kernel:3": 4,
    },
)
def _():
    return linen(ShuffleUnit(), IMAGE)


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        skips = []
        for k, width in enumerate((4, 6)):
            x = nn.relu(nn.Conv(width, (3, 3), name=f"down{k}")(x))
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(8, (3, 3), name="middle")(x))
        x = nn.ConvTranspose(5, (2, 2), strides=(2, 2), name="up1")(x)
        x = jnp.concatenate([x, skips[1]], axis=-1)
        x = nn.relu(nn.Conv(7, (3, 3), name="merge1")(x))
        b, h, w, c = x.shape
        x = jax.image.resize(x, (b, 2 * h, 2 * w, c), "bilinear")
        x = jnp.concatenate([x, skips[0]], axis=-1)
        return nn.Conv(2, (1, 1), name="head")(x)


@model(
    "unet",
    {
        "params/down0/kernel:3": 4,
        "params/down1/kernel:3": 6,
        "params/middle/kernel:3": 8,
        "params/up1/kernel:3": 5,
        "params/merge1/kernel:3": 7,
    },
)
def _():
    return linen(UNet(), IMAGE)


class PixelShuffle(nn.Module):
    """Space to depth, then back: two reshapes that mix channels with space."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 3), name="stem")(x))
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, h // 2, w // 2, 4 * c)
        x = nn.relu(nn.Conv(6, (3, 3), name="deep")(x))
        x = nn.Conv(4 * 3, (3, 3), name="widen")(x)
        b, h, w, _ = x.shape
        x = x.reshape(b, h, w, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, 2 * h, 2 * w, 3)
        return nn.Conv(2, (3, 3), name="head")(nn.relu(x))


@model(
    "pixel_shuffle",
    {
        "params/stem/kernel:3": 5,
        "params/deep/kernel:3": 6,
        "params/widen/kernel:3": 3,
    },
)
def _():
    return linen(PixelShuffle(), IMAGE)


class GroupNormNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.relu(nn.GroupNorm(num_groups=4, name="norm")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@model("group_norm", {"params/conv/kernel:3": 2, "params/conv/kernel:3#2": 4})
def _():
    return linen(GroupNormNet(), IMAGE)
