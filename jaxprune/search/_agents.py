"""Agents that read the weights of a group and say how likely each unit is to stay."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.core._checks import whole_number
from jaxprune.core._groups import Group
from jaxprune.core._leaves import kernel_paths, parameter_paths
from jaxprune.core._members import in_front

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Agent:
    """The network of an agent: weights ``[units, entries]`` to a number per unit.

    The matrix is an image of one channel. Where its rows are longer than `short`, four
    convolutions, each followed by ReLU and max pooling, come first; two dense layers
    follow. The number of channels and of hidden units is not published: these are
    those of reimplementations.

    Attributes:
        channels: of the convolutions.
        window: of the convolutions, on both sides.
        short: rows no longer than this go to the dense layers at once.
        hidden: units of the first dense layer.
        initial: probability to keep a unit before the first update, in (0, 1). Not
            published either. From 1/2 the first cuts are so deep that agents learn to
            keep everything, useless units with the rest.

    Raises:
        ValueError: if a size is below 1 or `initial` is outside of (0, 1).
    """

    channels: Sequence[int] = (32, 64, 64, 64)
    window: int = 7
    short: int = 24
    hidden: int = 32
    initial: float = 0.8

    def __post_init__(self) -> None:
        for name in ("window", "hidden"):
            whole_number(name, getattr(self, name))
        for width in self.channels:
            whole_number("channels", width)
        if not 0 < self.initial < 1:
            raise ValueError(f"initial must be in (0, 1), got {self.initial}")

    def init(self, key: jax.Array, matrix: jax.Array) -> Params:
        """The first weights of an agent; the key is consumed.

        Args:
            key: random key.
            matrix: what it is to read, ``[units, entries]``, or its shape.
        """
        units, entries = matrix.shape
        keys = iter(jax.random.split(key, len(self.channels) + 2))
        params: Params = {"convolutions": []}
        before = 1
        if entries > self.short:
            for width in self.channels:
                shape = (self.window, self.window, before, width)
                params["convolutions"].append(_layer(next(keys), shape))
                units, entries, before = _half(units), _half(entries), width
        first = _layer(next(keys), (units * entries * before, self.hidden))
        last = _layer(next(keys), (self.hidden, matrix.shape[0]))
        odds = math.log(self.initial / (1 - self.initial))
        params["dense"] = [first, {**last, "bias": last["bias"] + jnp.float32(odds)}]
        return params

    def __call__(self, params: Params, matrix: jax.Array) -> jax.Array:
        """Log-odds that every unit stays, float32 ``[units]``."""
        x = matrix.astype(jnp.float32)
        # Kernels differ in scale by orders of magnitude; agents should not.
        x = x / (jnp.sqrt(jnp.mean(jnp.square(x))) + 1e-8)
        x = x[None, :, :, None]
        for layer in params["convolutions"]:
            x = lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            x = jax.nn.relu(x + layer["bias"][None, None, None])
            window = (1, 2, 2, 1)
            x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "SAME")
        first, last = params["dense"]
        x = jax.nn.relu(x.reshape(-1) @ first["kernel"] + first["bias"])
        return x @ last["kernel"] + last["bias"]


def _layer(key: jax.Array, shape: tuple[int, ...]) -> Params:
    scale = math.sqrt(1 / math.prod(shape[:-1]))
    kernel = scale * jax.random.normal(key, shape, jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(shape[-1], jnp.float32)}


def _half(size: int) -> int:
    return (size + 1) // 2


def unit_weights(group: Group, leaves: dict[str, Any]) -> jax.Array:
    """What an agent reads: the weights of every unit, float32 ``[units, entries]``.

    Those of the kernels that make the units, which for a layer is its kernel with one
    row a filter; of all parameters, where no kernel makes them or roles are unknown.

    Args:
        group: the units.
        leaves: path -> leaf of the variables.

    Raises:
        ValueError: if the group has no parameters.
    """
    trained = parameter_paths(leaves)
    members = [m for m in group.members if m.path in trained]
    kernels = set(kernel_paths({m.path: leaves[m.path] for m in members}))
    making = [m for m in members if m.role == "producer" and m.path in kernels]
    chosen = making or members
    if not chosen:
        raise ValueError(f"group {group.name} has no parameters that an agent can read")
    rows = []
    for member in chosen:
        first = in_front(leaves[member.path], member)
        rows.append(first[member.index].reshape(group.size, -1).astype(jnp.float32))
    return jnp.concatenate(rows, 1)
