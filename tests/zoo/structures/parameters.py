"""Parameters that belong to no layer, and tied parameters."""

import jax
import jax.numpy as jnp
from jax import lax

from zoo import normal, tokens
from zoo.structures import ROW, SEQUENCE, head, relu_conv, structure

STEM = {"stem": (3, 3, 3, 6)}

# --- parameters of no layer -----------------------------------------------------------


# torch's F.linear keeps kernels as [out, in].
@structure(
    "own_parameters_linear",
    "idle",
    {"a:0": 6},
    {"a": (6, 4), "b": (6,), "w": (3, 6)},
    ROW,
)
def _(p, x):
    h = lax.dot_general(x, p["a"], (((1,), (1,)), ((), ()))) + p["b"][None]
    return lax.dot_general(jnp.tanh(h), p["w"], (((1,), (1,)), ((), ())))


@structure("own_parameters_einsum", "idle", {"a:0": 6}, {"a": (6, 4), "w": (6, 3)}, ROW)
def _(p, x):
    return jnp.einsum(
        "hb,ho->bo", jax.nn.relu(jnp.einsum("bi,hi->hb", x, p["a"])), p["w"]
    )


@structure(
    "own_parameters_addmm",
    "idle",
    {"b:0": 6},
    {"a": (4, 6), "b": (6,), "w": (6, 3)},
    ROW,
)
def _(p, x):
    h = 0.5 * jnp.broadcast_to(p["b"][None], (x.shape[0], 6)) + 2.0 * (x @ p["a"])
    return jax.nn.relu(h) @ p["w"]


# One parameter with three axes, two of them summed over at once.
@structure(
    "einsum_parameter",
    "crash",
    {"a:1": 2, "a:2": 5, "w:2": 6},
    {"a": (4, 2, 5), "w": (2, 5, 6), "v": (6, 3)},
    ROW,
)
def _(p, x):
    h = jnp.tanh(jnp.einsum("bi,ijk->bjk", x, p["a"]))
    return jnp.tanh(jnp.einsum("bjk,jko->bo", h, p["w"])) @ p["v"]


# A unit is an output with both of its pieces. A whole piece may also go: the maximum over
# the pieces sees the 0 of the masked piece.
@structure(
    "maxout",
    "idle",
    {"a:1": 2, "a:1#2": 5},
    {"a": (4, 10), "w": (5, 3)},
    ROW,
)
def _(p, x):
    return (x @ p["a"]).reshape(-1, 5, 2).max(-1) @ p["w"]


@structure(
    "learned_prompt_tokens",
    "thread",
    {"prompt:0": 2, "prompt:1": 6},  # a whole prompt, or a channel
    {"embed": (4, 6), "prompt": (2, 6), "w": (6, 3)},
    SEQUENCE,
)
def _(p, x):
    prompt = jnp.broadcast_to(p["prompt"][None], (x.shape[0], 2, 6))
    x = jnp.concatenate([prompt, x @ p["embed"]], axis=1)
    return jnp.tanh(x).mean(1) @ p["w"]


@structure(
    "attention_pooling_by_a_query",
    "thread",
    {"key:1": 6, "value:1": 5},
    {"key": (4, 6), "query": (6,), "value": (4, 5), "w": (5, 3)},
    SEQUENCE,
)
def _(p, x):
    weight = jax.nn.softmax(jnp.tanh(x @ p["key"]) @ p["query"], axis=-1)
    return jnp.einsum("bt,btv->bv", weight, x @ p["value"]) @ p["w"]


# The kernel of a layer is computed: from a low-rank update, from codes, from the input.
@structure(
    "low_rank_update",
    "thread",
    {"down:1": 2, "up:1": 6},
    {"down": (4, 2), "up": (2, 6), "a": (4, 6), "w": (6, 3)},
    ROW,
)
def _(p, x):
    return jax.nn.relu(x @ (p["a"] + 0.5 * (p["down"] @ p["up"]))) @ p["w"]


@structure(
    "convolution_mixed_from_kernels",
    "thread",
    {"mix:0": 4, "bank:3": 6, "bank:4": 5},
    {**STEM, "bank": (4, 3, 3, 6, 5), "mix": (4,), "w": (5, 2)},
)
def _(p, x):
    kernel = jnp.einsum("k,khwio->hwio", p["mix"], p["bank"])
    return head(relu_conv(relu_conv(x, p["stem"]), kernel), p["w"])


@structure(
    "kernel_predicted_from_the_input",
    "thread",
    {"hidden:1": 5, "make:1": 6},
    {"hidden": (4, 5), "make": (5, 6), "make2": (5, 18)},
    ROW,
)
def _(p, x):
    code = jnp.tanh(x @ p["hidden"])
    one = (code @ p["make"])[:, None]
    two = (code @ p["make2"]).reshape(-1, 6, 3)
    return jnp.einsum("bki,bio->bko", jnp.tanh(one), two)[:, 0]


# Monarch: two block-diagonal products with a transpose of the grid between them.
@structure(
    "block_diagonal_products",
    "thread",
    {"a:1": 2, "a:1#2": 3, "left:2": 2, "right:2": 4},
    {"a": (4, 6), "left": (3, 2, 2), "right": (2, 3, 4), "w": (8, 3)},
    ROW,
)
def _(p, x):
    h = jnp.tanh(x @ p["a"]).reshape(-1, 3, 2)
    h = jnp.einsum("bki,kij->bjk", h, p["left"])
    h = jnp.einsum("bki,kij->bkj", h, p["right"])
    return jnp.tanh(h.reshape(-1, 8)) @ p["w"]


# Rounded to 7 levels with a scale for every output, the gradient passed straight on.
@structure(
    "rounded_weights",
    "thread",
    {"a:1": 6},
    {"a": (4, 6), "w": (6, 3)},
    ROW,
)
def _(p, x):
    def rounded(kernel):
        scale = jnp.abs(kernel).mean(0, keepdims=True) / 7.0 + 1e-9
        levels = jnp.clip(jnp.round(kernel / scale), -7, 7)
        return kernel + lax.stop_gradient(levels * scale - kernel)

    return jnp.clip(x @ rounded(p["a"]), -1, 6) @ rounded(p["w"])


# --- tied parameters ------------------------------------------------------------------


@structure(
    "tied_head_through_linear",
    "idle",
    {"table:1": 6, "up:1": 5},
    {"table": (9, 6), "up": (6, 5), "down": (5, 6)},
    tokens(4, 9),
    refused={"table:0": "indexed by values"},
)
def _(p, ids):
    x = p["table"][ids]
    x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
    return x @ p["table"].T


@structure(
    "tied_square_kernel",
    "thread",
    {"a:1": 6, "square:1": 6},
    {"a": (4, 6), "square": (6, 6), "w": (6, 3)},
    ROW,
)
def _(p, x):
    h = jax.nn.relu(x @ p["a"])
    return jnp.tanh(jnp.tanh(h @ p["square"]) @ p["square"].T) @ p["w"]


# a b^T a: the rows of b are what it turns the columns of a into.
@structure(
    "tied_autoencoder",
    "thread",
    {"a:1": 6, "b:1": 4},
    {"a": (5, 6), "b": (6, 4)},
    normal(5),
)
def _(p, x):
    z = jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"])
    return jax.nn.relu(z @ p["b"].T) @ p["a"].T
