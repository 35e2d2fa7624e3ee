"""Programs by hand: custom gradients, contractions, reparametrised and shared weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from zoo import linen, model, normal, tokens, weights

# --- custom derivatives --------------------------------------------------------------


@jax.custom_jvp
def leaky_step(x):
    return jnp.maximum(x, 0.0)


@leaky_step.defjvp
def _leaky_step_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return leaky_step(x), 7.0 * t * jnp.cos(x)  # not the derivative


@jax.custom_vjp
def scaled_sum(x, w):
    return x * w


def _scaled_forward(x, w):
    return x * w, (x, w)


def _scaled_backward(saved, g):
    x, w = saved
    return 3.0 * g * jnp.sign(w), -2.0 * g * jnp.sin(x)  # not the derivative


scaled_sum.defvjp(_scaled_forward, _scaled_backward)


@model("custom_jvp", {"w1:1": 6})
def _():
    def apply_fn(params, x):
        return leaky_step(x @ params["w1"]) @ params["w2"]

    return apply_fn, weights(w1=(4, 6), w2=(6, 3)), normal(4)


@model("custom_vjp", {"w1:1": 6})
def _():
    def apply_fn(params, x):
        h = x @ params["w1"]
        gate = jnp.broadcast_to(params["gate"][None], h.shape)
        return scaled_sum(h, gate) @ params["w2"]

    return apply_fn, weights(w1=(4, 6), gate=(6,), w2=(6, 3)), normal(4)


@jax.custom_vjp
def straight_through(x):
    return jnp.sign(x) * jnp.mean(jnp.abs(x))


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))


@model("custom_vjp_without_residuals", {"w1:1": 6})
def _():
    def apply_fn(params, x):
        h = jnp.tanh(x @ straight_through(params["w1"]))
        return h @ params["w2"]

    return apply_fn, weights(w1=(4, 6), w2=(6, 3)), normal(4)


@model("custom_gradient_inside_scan", {"w1:1": 6})
def _():
    def apply_fn(params, x):
        def step(h, gate):
            gates = jnp.broadcast_to(jnp.exp(gate)[None], h.shape)
            return scaled_sum(leaky_step(h), gates), None

        h, _ = lax.scan(step, x @ params["w1"], params["gates"])
        return h @ params["w2"]

    return apply_fn, weights(w1=(4, 6), gates=(3, 6), w2=(6, 3)), normal(4)


# --- contractions --------------------------------------------------------------------


@model("einsum_chain", {"a:1": 5, "b:1": 6, "c:1": 7})
def _():
    def apply_fn(params, x):
        return jnp.einsum(
            "bi,ij,jk,kl,lo->bo", x, params["a"], params["b"], params["c"], params["d"]
        )

    return apply_fn, weights(a=(4, 5), b=(5, 6), c=(6, 7), d=(7, 3)), normal(4)


@model("einsum_two_sums", {"a:1": 2, "a:2": 5})
def _():
    def apply_fn(params, x):
        h = jnp.einsum("bi,ijk->bjk", x, params["a"])
        return jnp.einsum("bjk,jko->bo", jax.nn.relu(h), params["b"])

    return apply_fn, weights(a=(4, 2, 5), b=(2, 5, 3)), normal(4)


@model("bilinear", {"left:1": 5, "right:1": 6})
def _():
    def apply_fn(params, x, y):
        a, b = x @ params["left"], y @ params["right"]
        return jnp.einsum("bi,ijo,bj->bo", a, params["core"], b)

    def inputs(batch, seed):
        return (*normal(4)(batch, seed), *normal(3)(batch, seed + 50))

    return apply_fn, weights(left=(4, 5), right=(3, 6), core=(5, 6, 2)), inputs


@model("outer_product_flattened", {"left:1": 3, "right:1": 4})
def _():
    def apply_fn(params, x):
        a, b = x @ params["left"], x @ params["right"]
        outer = (a[:, :, None] * b[:, None, :]).reshape(x.shape[0], -1)
        return outer @ params["head"]

    return apply_fn, weights(left=(5, 3), right=(5, 4), head=(12, 2)), normal(5)


@model("gram_matrix", {"w1:1": 4})
def _():
    def apply_fn(params, x):
        h = x @ params["w1"]
        gram = jnp.einsum("bti,btj->bij", h, h).reshape(x.shape[0], -1)
        return gram @ params["head"]

    return apply_fn, weights(w1=(5, 4), head=(16, 2)), normal(3, 5)


@model("low_rank", {"down:1": 2, "up:1": 6})
def _():
    def apply_fn(params, x):
        kernel = params["w1"] + params["down"] @ params["up"]
        return jax.nn.relu(x @ kernel) @ params["w2"]

    shapes = {"down": (4, 2), "up": (2, 6), "w1": (4, 6), "w2": (6, 3)}
    return apply_fn, weights(**shapes), normal(4)


# --- reparametrised and shared weights -----------------------------------------------


@model("weight_norm", {"v1:1": 6, "v2:1": 5})
def _():
    def layer(v, g, x):
        kernel = v / jnp.sqrt(jnp.sum(v * v, axis=0, keepdims=True) + 1e-6)
        return x @ (kernel * g[None])

    def apply_fn(params, x):
        h = jax.nn.relu(layer(params["v1"], params["g1"], x))
        return jax.nn.relu(layer(params["v2"], params["g2"], h)) @ params["head"]

    shapes = {"v1": (4, 6), "g1": (6,), "v2": (6, 5), "g2": (5,), "head": (5, 3)}
    return apply_fn, weights(**shapes), normal(4)


@model("spectral_norm", {"params/w1:1": 6})
def _():
    # One step of power iteration; the vectors are variables, as in the paper.
    def apply_fn(variables, x):
        p, left = variables["params"], variables["stats"]["left"]
        right = p["w1"] @ left
        right = right / jnp.sqrt(jnp.sum(right * right) + 1e-6)
        left = right @ p["w1"]
        left = left / jnp.sqrt(jnp.sum(left * left) + 1e-6)
        norm = right @ (p["w1"] @ left)
        return jax.nn.relu(x @ (p["w1"] / norm)) @ p["w2"]

    shapes = {"params": {"w1": (4, 6), "w2": (6, 3)}, "stats": {"left": (6,)}}
    return apply_fn, weights(**shapes), normal(4)


class LinenNorms(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.WeightNorm(nn.Dense(6, name="first"), name="wn")(x))
        x = nn.SpectralNorm(nn.Dense(5, name="second"), name="sn")(
            x, update_stats=False
        )
        return nn.Dense(3, name="head")(nn.relu(x))


@model(
    "linen_weight_and_spectral_norm",
    {"params/first/kernel:1": 6, "params/second/kernel:1": 5},
)
def _():
    return linen(LinenNorms(), normal(4))


@model("shared_weights", {"in:1": 5})
def _():
    def apply_fn(params, x):
        h = x @ params["in"]
        for _ in range(3):
            h = jnp.tanh(h @ params["w"] + params["bias"][None])
        return h @ params["in"].T

    return apply_fn, weights(**{"in": (4, 5), "w": (5, 5), "bias": (5,)}), normal(4)


@model("tied_autoencoder", {"w1:1": 6, "w2:1": 4})
def _():
    def apply_fn(params, x):
        h = jax.nn.relu(x @ params["w1"])
        z = jax.nn.relu(h @ params["w2"])
        return jax.nn.relu(z @ params["w2"].T) @ params["w1"].T

    return apply_fn, weights(w1=(5, 6), w2=(6, 4)), normal(5)


@model("tied_embedding", {"embedding:1": 6, "w:1": 5})
def _():
    def apply_fn(params, ids):
        x = params["embedding"][ids].mean(1)
        x = x + jax.nn.relu(x @ params["w"]) @ params["v"]
        return x @ params["embedding"].T

    return apply_fn, weights(embedding=(9, 6), w=(6, 5), v=(5, 6)), tokens(4, 9)


# --- several outputs -----------------------------------------------------------------


@model("dict_outputs", {"w1:1": 6, "w2:1": 5})
def _():
    def apply_fn(params, x):
        h = jax.nn.relu(x @ params["w1"])
        z = jax.nn.relu(h @ params["w2"])
        return {"value": h @ params["v"], "policy": {"logits": z @ params["p"]}}

    shapes = {"w1": (4, 6), "w2": (6, 5), "v": (6, 1), "p": (5, 3)}
    return apply_fn, weights(**shapes), normal(4)


@model("dict_inputs", {"w1:1": 6})
def _():
    def apply_fn(params, batch):
        h = batch["image"] @ params["w1"] + batch["text"] @ params["w2"]
        return jnp.tanh(h) @ params["w3"]

    def inputs(batch, seed):
        (image,), (text,) = normal(4)(batch, seed), normal(3)(batch, seed + 9)
        return ({"image": image, "text": text},)

    return apply_fn, weights(w1=(4, 6), w2=(3, 6), w3=(6, 2)), inputs


@model("uneven_split", {"w1:1": 9})
def _():
    def apply_fn(params, x):
        a, b, c = jnp.split(x @ params["w1"], [2, 5], axis=-1)
        a, b, c = jnp.sin(a), jax.nn.relu(b), jnp.tanh(c)
        return jnp.concatenate([c, a, b], axis=-1) @ params["w2"]

    return apply_fn, weights(w1=(5, 9), w2=(9, 3)), normal(5)


@model("glu_interleaved", {"w1:1": 5})
def _():
    def apply_fn(params, x):
        h = x @ params["w1"]
        return (jax.nn.silu(h[:, ::2]) * h[:, 1::2]) @ params["w2"]

    return apply_fn, weights(w1=(4, 10), w2=(5, 3)), normal(4)


# A unit is both of its pieces; or a single piece of all units.
@model("maxout", {"w1:1": 2, "w1:1#2": 5})
def _():
    def apply_fn(params, x):
        h = (x @ params["w1"]).reshape(x.shape[0], 5, 2)
        return h.max(-1) @ params["w2"]

    return apply_fn, weights(w1=(4, 10), w2=(5, 3)), normal(4)


@model("cumulative_over_time", {"w1:1": 6})
def _():
    def apply_fn(params, x):
        h = jnp.cumsum(x @ params["w1"], axis=1) / jnp.arange(1.0, 5.0)[None, :, None]
        return jnp.flip(h, 1)[:, 0] @ params["w2"]

    return apply_fn, weights(w1=(4, 6), w2=(6, 3)), normal(4, 4)


@model("noise", {"w1:1": 6})
def _():
    def apply_fn(params, x, key):
        h = x @ params["w1"]
        h = h + 0.1 * jax.random.normal(key, h.shape) * params["spread"][None]
        return jax.nn.relu(h) @ params["w2"]

    def inputs(batch, seed):
        return (*normal(4)(batch, seed), jax.random.key(seed))

    return apply_fn, weights(w1=(4, 6), spread=(6,), w2=(6, 3)), inputs
