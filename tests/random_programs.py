"""Random programs for the contract: small, deterministic, and of every kind of move.

`random_program` writes a program of some ten steps over values ``[batch, ...]``: split
and merged axes, parameters broadcast along some axes, elementwise functions, reductions
along axes that can be cut, contractions, concatenations, slices, loops. A step is a
function of the parameters and of all values before it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BATCH = 3
SIZES = (2, 3, 4, 6)
MOST = 96  # entries of one value per example


class Program(NamedTuple):
    """A random program.

    Attributes:
        apply_fn: ``(params, x) -> y``.
        params: float64 arrays.
        x: ``[BATCH, 4]``.
        text: the steps, to read.
    """

    apply_fn: Callable[..., Any]
    params: dict[str, np.ndarray]
    x: np.ndarray
    text: list[str]


def random_program(seed: int, steps: int = 9) -> Program:
    """The program of a seed; the same on every machine."""
    writer = _Writer(np.random.default_rng(seed))
    writer.dense()
    for _ in range(steps):
        writer.step()
    writer.close()
    return Program(writer.apply, writer.params, writer.draw(BATCH, 4), writer.text)


class _Writer:
    """A program being written: the shapes of its values (without the batch)."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.params: dict[str, np.ndarray] = {}
        self.shapes: list[tuple[int, ...]] = [(4,)]
        self.run: list[Callable[..., Any]] = []
        self.text: list[str] = []

    def apply(self, params: Any, x: Any) -> Any:
        """Runs the program."""
        values = [x]
        for fn in self.run:
            values.append(fn(params, values))
        return values[-1]

    # --- tools -----------------------------------------------------------------------

    def draw(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape)

    def parameter(self, *shape: int) -> str:
        name = f"w{len(self.params)}"
        fan_in = max(1.0, math.prod(shape[:-1]))
        self.params[name] = self.draw(*shape) / np.sqrt(fan_in)
        return name

    def pick(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def add(self, text: str, shape: tuple[int, ...], fn: Callable[..., Any]) -> bool:
        self.shapes.append(tuple(shape))
        self.run.append(fn)
        self.text.append(f"v{len(self.run)}{list(shape)} = {text}")
        return True

    def on_last(self, text: str, shape: Any, fn: Callable[[Any], Any]) -> bool:
        return self.add(text, tuple(shape), lambda p, vs: fn(vs[-1]))

    def step(self) -> None:
        """Writes one step of a kind that fits the last value."""
        while not getattr(self, self.pick(KINDS))():
            pass

    # --- kinds of steps; False where one does not fit --------------------------------

    def dense(self) -> bool:
        """A contraction of the last axis, or of the last two."""
        shape, size = self.shapes[-1], self.pick(SIZES)
        many = 2 if len(shape) > 1 and self.rng.random() < 0.4 else 1
        name = self.parameter(*shape[-many:], size)
        kept = shape[:-many]

        def fn(p: Any, vs: Any) -> Any:
            return jnp.tensordot(vs[-1], p[name], many)

        return self.add(f"tensordot(last, {name}, {many})", (*kept, size), fn)

    def split(self) -> bool:
        """Heads: one axis becomes two."""
        shape = self.shapes[-1]
        options = [
            (d, n)
            for d, size in enumerate(shape)
            for n in (2, 3)
            if size % n == 0 and size > n
        ]
        if not options:
            return False
        d, n = self.pick(options)
        new = (*shape[:d], n, shape[d] // n, *shape[d + 1 :])
        return self.on_last(f"reshape {new}", new, lambda h: h.reshape(-1, *new))

    def widen(self) -> bool:
        """A projection to heads x features."""
        shape = self.shapes[-1]
        heads, size = self.pick(SIZES), self.pick(SIZES)
        if math.prod(shape[:-1]) * heads * size > MOST:
            return False
        name = self.parameter(shape[-1], heads * size)
        new = (*shape[:-1], heads, size)
        return self.add(
            f"(last @ {name}).reshape {new}",
            new,
            lambda p, vs: (vs[-1] @ p[name]).reshape(-1, *new),
        )

    def merge(self) -> bool:
        """Two neighbouring axes become one."""
        shape = self.shapes[-1]
        if len(shape) < 2:
            return False
        d = int(self.rng.integers(len(shape) - 1))
        new = (*shape[:d], shape[d] * shape[d + 1], *shape[d + 2 :])
        return self.on_last(f"reshape {new}", new, lambda h: h.reshape(-1, *new))

    def turn(self) -> bool:
        shape = self.shapes[-1]
        if len(shape) < 2:
            return False
        order = tuple(int(k) for k in self.rng.permutation(len(shape)))
        new = [shape[k] for k in order]
        axes = (0, *(k + 1 for k in order))
        return self.on_last(f"transpose {order}", new, lambda h: h.transpose(axes))

    def broadcast(self) -> bool:
        """A parameter that misses some axes is added or multiplied."""
        shape = self.shapes[-1]
        own = tuple(n if self.rng.random() < 0.6 else 1 for n in shape)
        start = int(self.rng.integers(len(shape))) if self.rng.random() < 0.4 else 0
        name = self.parameter(*own[start:])
        symbol, op = self.pick([("+", jnp.add), ("*", jnp.multiply)])
        lead = tuple(range(start + 1))
        return self.add(
            f"last {symbol} {name}{list(own[start:])}",
            shape,
            lambda p, vs: op(vs[-1], jnp.expand_dims(p[name], lead)),
        )

    def elementwise(self) -> bool:
        name = self.pick(list(ELEMENTWISE))
        return self.on_last(name, self.shapes[-1], ELEMENTWISE[name])

    def reduce(self) -> bool:
        shape = self.shapes[-1]
        if len(shape) < 2:
            return False
        d, name = int(self.rng.integers(len(shape))), self.pick(list(REDUCTIONS))
        new = (*shape[:d], *shape[d + 1 :])
        fn = functools.partial(REDUCTIONS[name], axis=d + 1)
        return self.on_last(f"{name} of axis {d}", new, fn)

    def along(self) -> bool:
        """Something that mixes the positions of one axis."""
        shape = self.shapes[-1]
        d, name = int(self.rng.integers(len(shape))), self.pick(list(ALONG))
        fn = functools.partial(ALONG[name], axis=d + 1)
        return self.on_last(f"{name} along {d}", shape, fn)

    def combine(self) -> bool:
        """With an earlier value of the same shape."""
        same = [k for k, s in enumerate(self.shapes[:-1]) if s == self.shapes[-1]]
        if not same:
            return False
        k = self.pick(same)
        symbol, op = self.pick([("+", jnp.add), ("*", jnp.multiply)])
        return self.add(
            f"last {symbol} v{k}", self.shapes[-1], lambda p, vs: op(vs[-1], vs[k])
        )

    def concatenate(self) -> bool:
        """With an earlier value that differs in one axis at most."""
        shape = self.shapes[-1]
        options = [
            (k, d)
            for k, other in enumerate(self.shapes)
            for d in range(len(shape))
            if len(other) == len(shape)
            and (*other[:d], *other[d + 1 :]) == (*shape[:d], *shape[d + 1 :])
        ]
        k, d = self.pick(options)
        size = shape[d] + self.shapes[k][d]
        new = (*shape[:d], size, *shape[d + 1 :])
        if math.prod(new) > MOST:
            return False
        return self.add(
            f"concatenate(last, v{k}) along {d}",
            new,
            lambda p, vs: jnp.concatenate([vs[-1], vs[k]], d + 1),
        )

    def part(self) -> bool:
        """A slice of one axis."""
        shape = self.shapes[-1]
        options = [d for d, n in enumerate(shape) if n > 3]
        if not options:
            return False
        d = self.pick(options)
        start, stride = int(self.rng.integers(2)), int(self.rng.integers(1, 3))
        span = slice(start, shape[d] - int(self.rng.integers(2)), stride)
        new = (*shape[:d], len(range(shape[d])[span]), *shape[d + 1 :])
        at = (slice(None),) * (d + 1) + (span,)
        return self.on_last(f"{span} of axis {d}", new, lambda h: h[at])

    def gather(self) -> bool:
        """Positions of one axis by a constant table."""
        shape = self.shapes[-1]
        d = int(self.rng.integers(len(shape)))
        table = self.rng.integers(shape[d], size=self.pick(SIZES))
        new = (*shape[:d], len(table), *shape[d + 1 :])
        if math.prod(new) > MOST:
            return False
        return self.on_last(
            f"take {table.tolist()} of axis {d}",
            new,
            lambda h: jnp.take(h, table, d + 1),
        )

    def pad(self) -> bool:
        shape = self.shapes[-1]
        d = int(self.rng.integers(len(shape)))
        new = (*shape[:d], shape[d] + 1, *shape[d + 1 :])
        if math.prod(new) > MOST:
            return False
        fill = self.pick((0.0, 1.0))
        width = [(0, 0)] * (len(shape) + 1)
        width[d + 1] = (1, 0)
        return self.on_last(
            f"pad axis {d} with {fill}",
            new,
            lambda h: jnp.pad(h, width, constant_values=fill),
        )

    def outer(self) -> bool:
        """A new axis: the outer product with a parameter."""
        shape, size = self.shapes[-1], self.pick(SIZES)
        if math.prod(shape) * size > MOST or len(shape) > 3:
            return False
        name = self.parameter(size)
        return self.add(
            f"last[..., None] * {name}",
            (*shape, size),
            lambda p, vs: vs[-1][..., None] * _row(p[name], len(shape) + 1),
        )

    def gram(self) -> bool:
        """Products of all pairs along one axis, as in attention."""
        shape = self.shapes[-1]
        if len(shape) != 2 or shape[0] ** 2 > MOST:
            return False
        name = self.parameter(shape[1], shape[1])
        return self.add(
            f"einsum(bik,bjk->bij) of last and last @ {name}",
            (shape[0], shape[0]),
            lambda p, vs: jnp.einsum("bik,bjk->bij", vs[-1], vs[-1] @ p[name]),
        )

    def loop(self) -> bool:
        """A recurrence of two steps with its own weights."""
        shape = self.shapes[-1]
        name, bias = self.parameter(shape[-1], shape[-1]), self.parameter(shape[-1])

        def fn(p: Any, vs: Any) -> Any:
            def body(h: Any, _: Any) -> Any:
                return jnp.tanh(h @ p[name] + _row(p[bias], len(shape))), None

            return lax.scan(body, vs[-1], None, length=2)[0]

        return self.add(f"scan(tanh(h @ {name} + {bias}))", shape, fn)

    def inner(self) -> bool:
        """A residual block under jit, remat or vmap."""
        shape, size = self.shapes[-1], self.pick(SIZES)
        up, down = self.parameter(shape[-1], size), self.parameter(size, shape[-1])
        name = self.pick(list(WRAPPERS))

        def fn(p: Any, vs: Any) -> Any:
            def block(h: Any, up: Any, down: Any) -> Any:
                return h + jax.nn.relu(h @ up) @ down

            return WRAPPERS[name](block)(vs[-1], p[up], p[down])

        return self.add(f"{name}(h + relu(h @ {up}) @ {down})", shape, fn)

    def close(self) -> None:
        """Two numbers for every example."""
        shape = self.shapes[-1]
        name = self.parameter(math.prod(shape), 2)
        self.add(
            f"flat(last) @ {name}",
            (2,),
            lambda p, vs: vs[-1].reshape(-1, math.prod(shape)) @ p[name],
        )


def _row(x: Any, axes: int) -> Any:
    """A vector along the last axis of values with so many axes and a batch."""
    return jnp.expand_dims(x, tuple(range(axes)))


ELEMENTWISE = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "x / (1 + x^2)": lambda h: h / (1.0 + h * h),
    "1 / (1 + x^2)": lambda h: 1.0 / (1.0 + h * h),
    "x > 0": lambda h: (h > 0).astype(h.dtype),
    "where(x > 0, x, 1)": lambda h: jnp.where(h > 0, h, 1.0),
    "clip to [0.1, 1]": lambda h: jnp.clip(h, 0.1, 1.0),
    "2 x": lambda h: 2.0 * h,
    "x + 1": lambda h: h + 1.0,
}
REDUCTIONS = {
    "sum": jnp.sum,
    "mean": jnp.mean,
    "max": jnp.max,
    "min": jnp.min,
    "norm": lambda h, axis: jnp.sqrt(jnp.sum(h * h, axis) + 1e-3),
    "logsumexp": jax.nn.logsumexp,
}
ALONG = {
    "softmax": jax.nn.softmax,
    "cumsum": jnp.cumsum,
    "flip": jnp.flip,
    "roll": lambda h, axis: jnp.roll(h, 1, axis),
    "rms norm": lambda h, axis: (
        h / jnp.sqrt(jnp.mean(h * h, axis, keepdims=True) + 1e-3)
    ),
    "standardize": lambda h, axis: (
        (h - jnp.mean(h, axis, keepdims=True)) / (jnp.std(h, axis, keepdims=True) + 0.1)
    ),
    "sort": jnp.sort,
}
WRAPPERS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap": lambda fn: jax.vmap(fn, in_axes=(0, None, None)),
    "plain": lambda fn: fn,
}
KINDS = (
    ["widen", "split", "merge", "broadcast", "elementwise"] * 3
    + ["dense", "reduce", "turn", "combine"] * 2
    + ["along", "concatenate", "part", "gather", "pad", "outer", "gram"]
    + ["loop", "inner"]
)
