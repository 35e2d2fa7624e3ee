"""Random programs: a list of moves, each a few primitives on ``[batch, time, width]``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zoo import normal, weights

WIDTH = 6  # of the input; every move keeps the width a multiple of 2
MOVES: dict[str, Callable[..., Any]] = {}


def move(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Registers ``(h, new) -> h``; ``new(*shape)`` is the next parameter."""
    MOVES[fn.__name__] = fn
    return fn


@move
def dense(h, new):
    return h @ new(h.shape[-1], 4) + new(4)[None, None]


@move
def wide(h, new):
    return h @ new(h.shape[-1], 8)


@move
def relu(h, new):
    return jax.nn.relu(h)


@move
def gelu(h, new):
    return jax.nn.gelu(h)


@move
def exponential(h, new):
    return jnp.exp(jnp.tanh(h))


@move
def shifted(h, new):
    return h + 0.5


@move
def squashed(h, new):
    return jax.jit(jnp.tanh)(h)


@move
def scaled(h, new):
    return h * new(h.shape[-1])[None, None]


@move
def positions(h, new):
    return h + new(h.shape[1], h.shape[-1])[None]


@move
def table(h, new):
    return h * jnp.cos(jnp.arange(h.shape[-1], dtype=jnp.float32))[None, None]


@move
def rms_norm(h, new):
    size = lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-3)
    return h * size * new(h.shape[-1])[None, None]


@move
def layer_norm(h, new):
    mean = jnp.mean(h, axis=-1, keepdims=True)
    variance = jnp.mean(h * h, axis=-1, keepdims=True) - mean * mean
    scale, shift = new(h.shape[-1]), new(h.shape[-1])
    h = (h - mean) * lax.rsqrt(jnp.abs(variance) + 1e-3)
    return h * scale[None, None] + shift[None, None]


@move
def group_norm(h, new):
    grid = h.reshape(*h.shape[:2], 2, -1)
    size = lax.rsqrt(jnp.mean(grid * grid, axis=-1, keepdims=True) + 1e-3)
    return (grid * size).reshape(h.shape) * new(h.shape[-1])[None, None]


@move
def softmax(h, new):
    return jax.nn.softmax(h, axis=-1)


@move
def softmax_over_time(h, new):
    return jax.nn.softmax(h, axis=1)


@move
def residual(h, new):
    y = jax.nn.relu(h @ new(h.shape[-1], 4))
    return h + y @ new(4, h.shape[-1])


@move
def gated(h, new):
    return h * jax.nn.sigmoid(h @ new(h.shape[-1], h.shape[-1]))


@move
def glu(h, new):
    gate, up = jnp.split(h @ new(h.shape[-1], 8), 2, axis=-1)
    return jax.nn.silu(gate) * up


@move
def swapped_halves(h, new):
    a, b = jnp.split(h, 2, axis=-1)
    return jnp.concatenate([jnp.sin(b), a], axis=-1)


@move
def widened(h, new):
    return jnp.concatenate([h, h @ new(h.shape[-1], 2)], axis=-1)


@move
def interleaved(h, new):
    even, odd = h[..., ::2], h[..., 1::2]
    return jnp.stack([odd, even], axis=-1).reshape(h.shape)


@move
def shuffled(h, new):
    grid = h.reshape(*h.shape[:2], 2, -1)
    return grid.swapaxes(2, 3).reshape(h.shape)


@move
def flipped(h, new):
    return jnp.flip(h, -1)


@move
def rolled(h, new):
    return jnp.roll(h, 1, axis=-1)


@move
def permuted(h, new):
    return jnp.take(h, np.random.default_rng(0).permutation(h.shape[-1]), axis=-1)


@move
def padded(h, new):
    return jnp.pad(h, ((0, 0), (0, 0), (1, 1)))


@move
def repeated(h, new):
    return jnp.repeat(h[..., : h.shape[-1] // 2], 2, axis=-1)


@move
def heads(h, new):
    grid = h.reshape(*h.shape[:2], 2, -1)
    grid = jnp.einsum("bthd,hde->bthe", grid, new(2, grid.shape[-1], 3))
    return jnp.tanh(grid).reshape(*h.shape[:2], 6)


@move
def attention(h, new):
    q, k, v = ((h @ new(h.shape[-1], 6)).reshape(*h.shape[:2], 2, 3) for _ in range(3))
    mixed = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", mixed, v).reshape(*h.shape[:2], 6)


@move
def mixed_tokens(h, new):
    return jnp.einsum("btd,ts->bsd", h, new(h.shape[1], h.shape[1]))


@move
def convolved(h, new):
    layout = ("NWC", "WIO", "NWC")
    kernel = new(3, h.shape[-1] // 2, 4)
    return lax.conv_general_dilated(
        h, kernel, (1,), "SAME", None, None, layout, feature_group_count=2
    )


@move
def largest_of_two(h, new):
    grid = (h @ new(h.shape[-1], 8)).reshape(*h.shape[:2], 4, 2)
    return grid.max(-1)


@move
def running_sum(h, new):
    return jnp.cumsum(h, axis=1)


@move
def centred(h, new):
    return h - 0.5 * h.mean(1, keepdims=True)


@move
def recurrence(h, new):
    kernel = new(h.shape[-1], h.shape[-1])

    def step(state, x):
        state = jnp.tanh(state @ kernel + x)
        return state, state

    _, out = lax.scan(step, jnp.zeros_like(h[:, 0]), h.swapaxes(0, 1))
    return out.swapaxes(0, 1)


@move
def rematerialised(h, new):
    kernel = new(h.shape[-1], 4)
    return jax.checkpoint(lambda h, kernel: jax.nn.relu(h @ kernel))(h, kernel)


@move
def branched(h, new):
    scale = new(h.shape[-1])
    flag = h[0, 0, 0] > 0
    return lax.cond(flag, jnp.sin, lambda h: h * scale[None, None], h)


@move
def squeezed(h, new):
    small = jax.nn.relu(h.mean(1) @ new(h.shape[-1], 2))
    return h * jax.nn.sigmoid(small @ new(2, h.shape[-1]))[:, None]


@move
def low_rank(h, new):
    return h @ (new(h.shape[-1], 2) @ new(2, 6))


def compose(moves: list[str]) -> tuple:
    """``(apply_fn, variables, inputs)`` of the moves, between two dense layers."""

    def run(h, new):
        h = h @ new(h.shape[-1], WIDTH)
        for name in moves:
            h = MOVES[name](h, new)
        return h @ new(h.shape[-1], 3)

    shapes: dict[str, tuple[int, ...]] = {}

    def record(*shape: int) -> Any:
        shapes[f"p{len(shapes):02d}"] = shape
        return jnp.zeros(shape)

    inputs = normal(4, 5)
    jax.eval_shape(lambda x: run(x, record), *inputs(2, 0))

    def apply_fn(params, x):
        names = iter(shapes)
        return run(x, lambda *shape: params[next(names)])

    return apply_fn, weights(**shapes), inputs
