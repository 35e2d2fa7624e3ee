"""Attention, mixers and mixtures: transformers of every fashion."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo import linen, model, normal, tokens, weights

# --- Linen ---------------------------------------------------------------------------


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), strides=2, name="patches")(x)
        x = x.reshape(x.shape[0], -1, 6)
        y = nn.LayerNorm(name="norm0")(x).swapaxes(1, 2)
        y = nn.Dense(16, name="tokens_out")(nn.gelu(nn.Dense(5, name="tokens_in")(y)))
        x = x + y.swapaxes(1, 2)
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.Dense(6, name="features_out")(
            nn.gelu(nn.Dense(7, name="features_in")(y))
        )
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(3, name="head")(x.mean(1))


@model(
    "mlp_mixer",
    {
        "params/patches/kernel:3": 6,
        "params/tokens_in/kernel:1": 5,
        "params/features_in/kernel:1": 7,
    },
)
def _():
    return linen(Mixer(), normal(8, 8, 3))


class Block(nn.Module):
    heads: int = 2

    @nn.compact
    def __call__(self, x, memory=None):
        width = x.shape[-1]
        y = nn.LayerNorm(name="norm0")(x)
        attend = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        x = x + attend(y, memory)
        y = nn.gelu(nn.Dense(10, name="up")(nn.LayerNorm(name="norm1")(x)))
        return x + nn.Dense(width, name="down")(y)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), strides=4, name="patches")(x)
        x = x.reshape(x.shape[0], -1, 8)
        first = self.param("cls", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.tile(first, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.zeros, (1, x.shape[1], 8))
        x = Block(name="block")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


def _attention(path: str, heads: int, query_key: int, value: int) -> dict[str, int]:
    """The groups of `nn.MultiHeadDotProductAttention`: heads, qk-dim, v-dim."""
    return {
        f"{path}/query/kernel:1": heads,
        f"{path}/query/kernel:2": query_key,
        f"{path}/value/kernel:2": value,
    }


@model(
    "vit",
    {
        "params/patches/kernel:3": 8,
        **_attention("params/block/attention", 2, 4, 4),
        "params/block/up/kernel:1": 10,
    },
)
def _():
    return linen(ViT(), normal(8, 8, 3))


class EncoderDecoder(nn.Module):
    @nn.compact
    def __call__(self, source, target):
        x = Block(name="encode")(nn.Dense(8, name="embed_source")(source))
        y = Block(name="decode")(nn.Dense(6, name="embed_target")(target), x)
        return nn.Dense(3, name="head")(y)


@model(
    "encoder_decoder",
    {
        "params/embed_source/kernel:1": 8,
        "params/embed_target/kernel:1": 6,
        **_attention("params/encode/attention", 2, 4, 4),
        **_attention("params/decode/attention", 2, 3, 3),
        "params/encode/up/kernel:1": 10,
        "params/decode/up/kernel:1": 10,
    },
)
def _():
    def inputs(batch, seed):
        source, target = normal(5, 4), normal(3, 4)
        return (*source(batch, seed), *target(batch, seed + 100))

    return linen(EncoderDecoder(), inputs)


# --- decoders, by hand ---------------------------------------------------------------


def rms_norm(x, scale):
    return (
        x
        * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        * scale[None, None]
    )


def rope_tables(length: int, width: int):
    positions = jnp.arange(length, dtype=jnp.float32)
    rates = 1.0 / 100.0 ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[:, None] * rates[None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, cos, sin):
    """Rotary positions on ``[batch, time, heads, width]``, halves paired."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def grouped_attention(q, k, v):
    """Grouped queries by one einsum: heads are ``kv_heads x queries``."""
    batch, time, heads, width = q.shape
    q = q.reshape(batch, time, k.shape[2], heads // k.shape[2], width)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / np.sqrt(4).astype(np.float32)
    probabilities = jax.nn.softmax(causal(scores), axis=-1)
    mixed = jnp.einsum("bkgts,bskd->btkgd", probabilities, v)
    return mixed.reshape(batch, time, heads * v.shape[-1])


def repeated_attention(q, k, v):
    """Grouped queries by repeating the keys and values."""
    each = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, each, axis=2), jnp.repeat(v, each, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(4).astype(np.float32)
    probabilities = jax.nn.softmax(causal(scores), axis=-1)
    mixed = jnp.einsum("bhts,bshd->bthd", probabilities, v)
    return mixed.reshape(*q.shape[:2], -1)


def causal(scores):
    *_, time, source = scores.shape
    allowed = jnp.tril(jnp.ones((time, source), bool))
    return jnp.where(
        allowed.reshape((1,) * (scores.ndim - 2) + allowed.shape), scores, -1e9
    )


def decoder(attend, cos_sin, heads=4, kv_heads=2, width=4):
    """RMSNorm, RoPE, grouped queries, GLU from one split kernel, tied embedding."""

    def apply_fn(params, ids):
        x = params["embedding"][ids]
        batch, time, _ = x.shape
        cos, sin = cos_sin(time)
        h = rms_norm(x, params["norm0"])
        q = (h @ params["query"]).reshape(batch, time, heads, width)
        k = (h @ params["key"]).reshape(batch, time, kv_heads, width)
        v = (h @ params["value"]).reshape(batch, time, kv_heads, width)
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + mixed @ params["out"]
        h = rms_norm(x, params["norm1"])
        gate, up = jnp.split(h @ params["glu"], 2, axis=-1)
        x = x + (jax.nn.silu(gate) * up) @ params["down"]
        return rms_norm(x, params["norm"]) @ params["embedding"].T

    params = weights(
        embedding=(11, 6),
        norm0=(6,),
        query=(6, heads * width),
        key=(6, kv_heads * width),
        value=(6, kv_heads * width),
        out=(heads * width, 6),
        norm1=(6,),
        glu=(6, 14),
        down=(7, 6),
        norm=(6,),
    )
    return apply_fn, params, tokens(5, 11)


DECODER = {
    "embedding:1": 6,
    "query:1": 2,  # kv-heads, each with its queries
    "query:1#2": 2,  # queries of every kv-head
    "query:1#3": 2,  # pairs of rotated dimensions
    "value:1": 4,  # dimensions of the value
    "glu:1": 7,
}


@model("decoder_grouped", DECODER)
def _():
    return decoder(grouped_attention, lambda time: rope_tables(time, 4))


@model("decoder_repeated", DECODER)
def _():
    return decoder(repeated_attention, lambda time: rope_tables(time, 4))


@model("decoder_cached_tables", DECODER)
def _():
    cos, sin = (np.asarray(t) for t in rope_tables(16, 4))
    return decoder(
        grouped_attention,
        lambda time: (jnp.asarray(cos[:time]), jnp.asarray(sin[:time])),
    )


@model(
    "kv_cache",
    {"params/query:1": 2, "params/query:2": 3, "params/value:2": 5},
    mutated=True,
)
def _():
    heads = {"query": (6, 2, 3), "key": (6, 2, 3), "value": (6, 2, 5)}
    shapes = {
        "params": {**heads, "out": (2, 5, 6)},
        "cache": {"key": (9, 2, 3), "value": (9, 2, 5)},
    }

    def apply_fn(variables, x, position):
        p, cache = variables["params"], variables["cache"]
        query, key, value = (jnp.einsum("tf,fhd->thd", x, p[name]) for name in heads)
        start = (position, 0, 0)
        keys = jax.lax.dynamic_update_slice(cache["key"], key, start)
        values = jax.lax.dynamic_update_slice(cache["value"], value, start)
        scores = jnp.einsum("thd,shd->hts", query, keys)
        seen = jnp.arange(9)[None] <= position + jnp.arange(x.shape[0])[:, None]
        probabilities = jax.nn.softmax(jnp.where(seen[None], scores, -1e9), axis=-1)
        mixed = jnp.einsum("hts,shd->thd", probabilities, values)
        out = jnp.einsum("thd,hdf->tf", mixed, p["out"])
        return out, {"cache": {"key": keys, "value": values}}

    def inputs(batch, seed):
        return (*normal(6)(batch, seed), np.int32(seed % 3 + 2))

    return apply_fn, weights(**shapes), inputs


@model(
    "fused_qkv",
    {
        # One reshape to [3, heads, width] keeps query, key and value of one width.
        "qkv:1": 2,
        "qkv:1#2": 3,
    },
)
def _():
    def apply_fn(params, x):
        batch, time, _ = x.shape
        qkv = x @ params["qkv"] + params["bias"][None, None]
        q, k, v = jnp.moveaxis(qkv.reshape(batch, time, 3, 2, 3), 2, 0)
        probabilities = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
        mixed = jnp.einsum("bhts,bshd->bthd", probabilities, v)
        return mixed.reshape(batch, time, 6) @ params["out"]

    return apply_fn, weights(qkv=(5, 18), bias=(18,), out=(6, 4)), normal(4, 5)


@model(
    "fused_qkv_heads_first",
    {
        "qkv:1": 2,  # heads
        "qkv:1#2": 3,  # dimensions of query and key
        "qkv:1#3": 3,  # dimensions of the value
    },
)
def _():
    def apply_fn(params, x):
        batch, time, _ = x.shape
        qkv = (x @ params["qkv"]).reshape(batch, time, 2, 9)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        probabilities = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
        mixed = jnp.einsum("bhts,bshd->bthd", probabilities, v)
        return mixed.reshape(batch, time, 6) @ params["out"]

    return apply_fn, weights(qkv=(5, 18), out=(6, 4)), normal(4, 5)


@model("linear_attention", {"query:1": 5, "value:1": 4})
def _():
    def apply_fn(params, x):
        q, k, v = (x @ params[name] for name in ("query", "key", "value"))
        state = jnp.einsum("btd,bte->bde", jax.nn.relu(k), v)
        return jnp.einsum("btd,bde->bte", jax.nn.relu(q), state) @ params["out"]

    shapes = {"query": (6, 5), "key": (6, 5), "value": (6, 4), "out": (4, 3)}
    return apply_fn, weights(**shapes), normal(4, 6)


# --- mixtures ------------------------------------------------------------------------


@model(
    "experts_dense",
    {
        "router:1": 3,  # an expert goes with its column of the router
        "up:2": 5,
    },
)
def _():
    def apply_fn(params, x):
        share = jax.nn.softmax(x @ params["router"], axis=-1)
        hidden = jax.nn.gelu(jnp.einsum("bf,efh->beh", x, params["up"]))
        return jnp.einsum("be,beh,eho->bo", share, hidden, params["down"])

    return apply_fn, weights(router=(6, 3), up=(3, 6, 5), down=(3, 5, 4)), normal(6)


@model("experts_top_k", {"up:2": 5})
def _():
    def apply_fn(params, x):
        logits = x @ params["router"]
        best, which = jax.lax.top_k(logits, 2)
        share = jax.nn.softmax(best, axis=-1)
        up, down = params["up"][which], params["down"][which]
        hidden = jax.nn.gelu(jnp.einsum("bf,bkfh->bkh", x, up))
        return jnp.einsum("bk,bkh,bkho->bo", share, hidden, down)

    return apply_fn, weights(router=(6, 4), up=(4, 6, 5), down=(4, 5, 3)), normal(6)


@model("experts_one_hot", {"stem:1": 6, "up:0": 4, "up:2": 5})
def _():
    def apply_fn(params, x):
        x = jax.nn.relu(x @ params["stem"])
        # The router keeps its classes; one without an expert writes nothing.
        _, which = jax.lax.top_k(x @ params["router"], 3)
        chosen = jax.nn.one_hot(which, 4).sum(1)
        hidden = jax.nn.gelu(jnp.einsum("bf,efh->beh", x, params["up"]))
        return jnp.einsum("be,beh,eho->bo", chosen, hidden, params["down"])

    shapes = {"stem": (4, 6), "router": (6, 4), "up": (4, 6, 5), "down": (4, 5, 3)}
    return apply_fn, weights(**shapes), normal(4)
