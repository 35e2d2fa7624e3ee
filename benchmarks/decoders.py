"""Decoders, known by their shapes: GPT-2 and a Llama-like net in plain JAX, and GPT-2
in Flax Linen.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Gpt:
    """Sizes of GPT-2 small, with a head of its own: 163,037,184 parameters.

    References:
        Radford et al., `Language Models are Unsupervised Multitask Learners`, 2019.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    context: int = 1024


@dataclasses.dataclass(frozen=True)
class Llama:
    """Sizes of Llama 3 70B: 70,553,706,496 parameters. `groups` are kv heads.

    References:
        Grattafiori et al., `The Llama 3 Herd of Models
        <https://arxiv.org/abs/2407.21783>`_, 2024, Table 3.
    """

    layers: int = 80
    width: int = 8192
    heads: int = 64
    groups: int = 8
    head_dim: int = 128
    ffn: int | tuple[int, ...] = 28672
    vocabulary: int = 128256


def gpt_shapes(c: Gpt) -> Any:
    """The parameters of `gpt`."""
    d = c.width
    norm = {"scale": _shape(d), "bias": _shape(d)}
    block = {
        "norm1": norm,
        **{name: _dense(d, d) for name in ("query", "key", "value", "out")},
        "norm2": norm,
        "up": _dense(d, 4 * d),
        "down": _dense(4 * d, d),
    }
    return {
        "tokens": _shape(c.vocabulary, d),
        "positions": _shape(c.context, d),
        "blocks": [block] * c.layers,
        "norm": norm,
        "head": _shape(d, c.vocabulary),
    }


def gpt(c: Gpt, params: Any, tokens: jax.Array) -> jax.Array:
    """Logits [batch, length, vocabulary] of GPT-2."""
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))

    def attend(p: Any, x: jax.Array) -> jax.Array:
        q, k, v = (
            dense(p[name], x).reshape(*x.shape[:2], c.heads, -1)
            for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (c.width // c.heads) ** -0.5
        weights = jax.nn.softmax(jnp.where(causal, logits, -1e30))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return dense(p["out"], y.reshape(x.shape))

    x = params["tokens"][tokens] + params["positions"][:length]
    for p in params["blocks"]:
        x = x + attend(p, layer_norm(p["norm1"], x))
        y = jax.nn.gelu(dense(p["up"], layer_norm(p["norm2"], x)))
        x = x + dense(p["down"], y)
    return layer_norm(params["norm"], x) @ params["head"]


class LinenGpt(nn.Module):
    """What `gpt` computes, of Flax's own layers."""

    config: Gpt = Gpt()

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c, noise = self.config, nn.initializers.normal(0.02)
        positions = self.param("positions", noise, (c.context, c.width))
        x = nn.Embed(c.vocabulary, c.width, name="tokens")(tokens)
        x = x + positions[: tokens.shape[1]]
        causal = nn.make_causal_mask(tokens)
        for _ in range(c.layers):
            attend = nn.MultiHeadDotProductAttention(c.heads)
            x = x + attend(nn.LayerNorm(1e-5)(x), mask=causal)
            y = nn.Dense(4 * c.width)(nn.LayerNorm(1e-5)(x))
            x = x + nn.Dense(c.width)(nn.gelu(y))
        x = nn.LayerNorm(1e-5)(x)
        return nn.Dense(c.vocabulary, use_bias=False, name="head")(x)


def dense(p: Any, x: jax.Array) -> jax.Array:
    """An affine map."""
    return x @ p["kernel"] + p["bias"]


def layer_norm(p: Any, x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def llama_shapes(c: Llama) -> Any:
    """The parameters of `llama`."""
    d, query, group = c.width, c.heads * c.head_dim, c.groups * c.head_dim
    widths = (c.ffn,) * c.layers if isinstance(c.ffn, int) else c.ffn
    layers = [
        {
            "norm1": _shape(d),
            "query": _shape(d, query),
            "key": _shape(d, group),
            "value": _shape(d, group),
            "out": _shape(query, d),
            "norm2": _shape(d),
            "gate": _shape(d, ffn),
            "up": _shape(d, ffn),
            "down": _shape(ffn, d),
        }
        for ffn in widths
    ]
    embedding, head = _shape(c.vocabulary, d), _shape(d, c.vocabulary)
    return {"tokens": embedding, "layers": layers, "norm": _shape(d), "head": head}


def llama(c: Llama, params: Any, tokens: jax.Array) -> jax.Array:
    """Logits [batch, length, vocabulary]: RMSNorm, RoPE, grouped queries, SwiGLU."""
    batch, length = tokens.shape
    angles = jnp.arange(length)[:, None] * _frequencies(c.head_dim)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    causal = jnp.tril(jnp.ones((length, length), bool))

    def rotate(x: jax.Array) -> jax.Array:
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attend(p: Any, x: jax.Array) -> jax.Array:
        heads, group = (batch, length, -1, c.head_dim), (c.groups, c.heads // c.groups)
        q = rotate((x @ p["query"]).reshape(heads))
        k = rotate((x @ p["key"]).reshape(heads))
        v = (x @ p["value"]).reshape(heads)
        q = q.reshape(batch, length, *group, c.head_dim)
        logits = jnp.einsum("bqgnd,bkgd->bgnqk", q, k) * c.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(causal, logits, -1e30))
        y = jnp.einsum("bgnqk,bkgd->bqgnd", weights, v)
        return y.reshape(batch, length, -1) @ p["out"]

    x = params["tokens"][tokens]
    for p in params["layers"]:
        x = x + attend(p, rms_norm(p["norm1"], x))
        y = rms_norm(p["norm2"], x)
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
    return rms_norm(params["norm"], x) @ params["head"]


def rms_norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    """RMSNorm over the last axis."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale


def _frequencies(size: int) -> jax.Array:
    return 500000.0 ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def _dense(rows: int, columns: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {"kernel": _shape(rows, columns), "bias": _shape(columns)}
