"""What cannot be cut exactly, and what cannot be cut."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zoo import normal
from zoo.structures import IMAGE, ROW, SEQUENCE, conv, head, relu_conv, structure

STEM = {"stem": (3, 3, 3, 6)}

# --- what cutting changes: not exact --------------------------------------------------


@structure(
    "two_pass_layer_norm",
    "thread",
    {"a:1": 6},
    {"a": (4, 6), "w": (6, 3)},
    ROW,
)
def _(p, x):
    h = x @ p["a"]
    h = h - h.mean(-1, keepdims=True)
    return (h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6)) @ p["w"]


@structure(
    "rms_norm_and_l2_norm",
    "thread",
    {"a:1": 6},
    {"a": (4, 6), "scale": (6,), "w": (6, 3)},
    ROW,
)
def _(p, x):
    h = x @ p["a"]
    h = h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6) * p["scale"][None]
    h = jax.nn.relu(h)
    return (h / jnp.sqrt((h * h).sum(-1, keepdims=True) + 1e-6)) @ p["w"]


# A table that is no parameter writes into masked channels, and the mean sees it.
@structure(
    "position_table_before_a_mean",
    "thread",
    {"a:1": 6},
    {"a": (4, 6), "w": (6, 3)},
    SEQUENCE,
    inexact={"a:1": "a sum runs over"},
)
def _(p, x):
    table = jnp.sin(jnp.arange(30, dtype=jnp.float32)).reshape(1, 5, 6)
    h = x @ p["a"] + table
    return (h * (1.0 + h.mean(-1, keepdims=True))).mean(1) @ p["w"]


@structure(
    "position_table",
    "thread",
    {"a:1": 6},
    {"a": (4, 6), "w": (6, 3)},
    SEQUENCE,
)
def _(p, x):
    table = jnp.sin(jnp.arange(30, dtype=jnp.float32)).reshape(1, 5, 6)
    return jax.nn.relu(x @ p["a"] + table).mean(1) @ p["w"]


@structure(
    "product_over_channels",
    "thread",
    {"a:1": 6},
    {"a": (4, 6), "w": (6, 3)},
    ROW,
    inexact={"a:1": "a product over this axis"},
)
def _(p, x):
    h = x @ p["a"]
    return (h * (1.0 + h.prod(-1, keepdims=True))) @ p["w"]


@structure(
    "running_sum_over_channels",
    "thread",
    {"a:1": 6},
    {"a": (4, 6), "w": (6, 3)},
    ROW,
)
def _(p, x):
    return jnp.cumsum(jax.nn.relu(x @ p["a"]), axis=-1) @ p["w"]


@structure(
    "fourier_over_tokens",
    "thread",
    {"a:1": 6},
    {"a": (4, 6), "w": (6, 3)},
    SEQUENCE,
)
def _(p, x):
    return jnp.fft.fft(x @ p["a"], axis=1).real @ p["w"]


# --- what must be refused, with the reason --------------------------------------------


@structure(
    "fourier_over_channels",
    "thread",
    {},
    {"a": (4, 6), "w": (6, 3)},
    ROW,
    refused={
        "a:1": "a Fourier transform runs along this axis",
        "w:0": "a Fourier transform runs along this axis",
    },
    subject_refused=True,
)
def _(p, x):
    return jnp.fft.fft(x @ p["a"]).real @ p["w"]


@structure(
    "sorted_channels",
    "thread",
    {},
    {"a": (4, 6), "w": (6, 3)},
    ROW,
    refused={
        "a:1": "values are sorted along this axis",
        "w:0": "values are sorted along this axis",
    },
    subject_refused=True,
)
def _(p, x):
    return jnp.sort(x @ p["a"], axis=-1) @ p["w"]


@structure(
    "largest_channels",
    "thread",
    {"w:1": 5},
    {"a": (4, 6), "w": (2, 5), "v": (5, 3)},
    ROW,
    refused={"a:1": "top_k selects positions", "w:0": "top_k selects"},
    subject_refused=True,
)
def _(p, x):
    best, _ = lax.top_k(x @ p["a"], 2)
    return jax.nn.relu(best @ p["w"]) @ p["v"]


@structure(
    "best_channel_as_a_number",
    "thread",
    {"table:1": 5},
    {"a": (4, 6), "table": (6, 5), "v": (5, 3)},
    ROW,
    refused={"a:1": "indices into this axis", "table:0": "indexed by values"},
    subject_refused=True,
)
def _(p, x):
    return jax.nn.relu(p["table"][jnp.argmax(x @ p["a"], axis=-1)]) @ p["v"]


@structure(
    "channels_sliced_by_data",
    "thread",
    {},
    {"a": (4, 6), "w": (2, 3)},
    lambda batch, seed: (*ROW(batch, seed), jnp.int32(seed)),
    refused={"a:1": "is computed at run time", "w:0": "is computed at run time"},
    subject_refused=True,
)
def _(p, x, start):
    return lax.dynamic_slice_in_dim(x @ p["a"], start, 2, axis=1) @ p["w"]


# Local response normalisation: a window slides over the channels.
@structure(
    "window_over_channels",
    "thread",
    {},
    {**STEM, "w": (6, 2)},
    IMAGE,
    refused={"stem:3": "a pooling window", "w:0": "a pooling window"},
    subject_refused=True,
)
def _(p, x):
    h = conv(x, p["stem"])
    window, ones = (1, 1, 1, 3), (1, 1, 1, 1)
    near = lax.reduce_window(h * h, 0.0, lax.add, window, ones, "SAME")
    return head(h * lax.rsqrt(1.0 + near), p["w"])


@structure(
    "channels_as_space",
    "thread",
    {"kernel:3": 4},
    {"a": (4, 6), "kernel": (3, 1, 1, 4), "w": (4, 2)},
    SEQUENCE,
    refused={"a:1": "spatial axis of a convolution kernel"},
    subject_refused=True,
)
def _(p, x):
    h = (x @ p["a"]).transpose(0, 2, 1)[..., None]
    return head(relu_conv(h, p["kernel"]), p["w"])


@structure(
    "inverse_of_a_matrix",
    "thread",
    {},
    {"a": (6, 6), "w": (6, 3)},
    normal(6),
    refused={"a:0": "a factorization", "a:1": "a factorization", "w:0": "a fact"},
    subject_refused=True,
)
def _(p, x):
    return x @ jnp.linalg.inv(p["a"] + 3.0 * jnp.eye(6, dtype=jnp.float32)) @ p["w"]


# 12 channels normed as 3 x 4 and as 4 x 3: no channel can go without all.
@structure(
    "two_grids_on_one_axis",
    "thread",
    {},
    {"a": (4, 12), "w": (12, 3)},
    ROW,
    refused={
        "a:1": "two reshapes factor this axis",
        "w:0": "two reshapes factor this axis",
    },
    subject_refused=True,
)
def _(p, x):
    def normed(h):
        return h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 0.1)

    h = x @ p["a"]
    rows, columns = normed(h.reshape(-1, 3, 4)), normed(h.reshape(-1, 4, 3))
    return (rows.reshape(-1, 12) + columns.reshape(-1, 12)) @ p["w"]


# The upper triangle of a Gram matrix, read by a table of pairs.
@structure(
    "triangle_of_a_gram_matrix",
    "thread",
    {"w:0": 21},
    {"a": (4, 6), "w": (21, 3)},
    SEQUENCE,
    refused={"a:1": "indexed by constants"},
    subject_refused=True,
)
def _(p, x):
    h = x @ p["a"]
    gram = jnp.einsum("bti,btj->bij", h, h)
    row, column = np.triu_indices(6)
    return gram[:, row, column] @ p["w"]
