"""A contraction as matrix products: inputs ``[K, rows, D]`` times ``[K, D, N]``.

K counts what the equation does side by side: the groups of a convolution, the experts
of a bank. D are the inputs that one output sums over (of a convolution the patch,
channels before window), N the outputs, rows everything that meets the same weights.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.core._leafwise import wide_dtype
from jaxprune.program._types import Equation


def can_read(eqn: Equation, operand: int) -> bool:
    """Is this a contraction whose operand `operand` can be read as matrices?"""
    name = eqn.primitive.name
    if name == "dot_general":
        return True
    whole = eqn.params.get("batch_group_count", 0) == 1
    return name == "conv_general_dilated" and operand == 1 and whole


def as_matrices(eqn: Equation, operand: int, at: np.ndarray) -> np.ndarray:
    """The operand that holds the parameter: ``[K, D, N]``."""
    if eqn.primitive.name == "dot_general":
        batch, summed, free = _axes(eqn, operand)
        shape = [math.prod(at.shape[d] for d in each) for each in (batch, summed, free)]
        return at.transpose(batch + summed + free).reshape(shape)
    groups = eqn.params["feature_group_count"]
    at = at.transpose(eqn.params["dimension_numbers"].rhs_spec)
    return at.reshape(groups, at.shape[0] // groups, -1).transpose(0, 2, 1)


def columns(eqn: Equation, operand: int) -> np.ndarray:
    """For every entry of the result the number ``k * N + n`` of what makes it."""
    out = eqn.outvars[0].aval.shape
    sizes = eqn.invars[operand].aval.shape
    if eqn.primitive.name == "dot_general":
        batch, _, free = _axes(eqn, operand)
        rows = len(out) - len(batch) - len(free)
        own = [sizes[d] for d in free]
        apart = own + [1] * rows if operand == 0 else [1] * rows + own
        shape = [*(sizes[d] for d in batch), *apart]
    else:
        numbers, shape = eqn.params["dimension_numbers"], [1] * len(out)
        shape[numbers.out_spec[1]] = sizes[numbers.rhs_spec[0]]
    return np.broadcast_to(np.arange(math.prod(shape)).reshape(shape), out)


def as_rows(eqn: Equation, operand: int, value: jax.Array) -> jax.Array:
    """The other operand, the activation: ``[K, rows, D]``, in float32 or wider."""
    value = jnp.asarray(value)
    real = jnp.issubdtype(value.dtype, jnp.inexact)
    value = value.astype(wide_dtype(value.dtype) if real else np.float32)
    if eqn.primitive.name == "dot_general":
        batch, summed, free = _axes(eqn, 1 - operand)
        shape = [
            math.prod(value.shape[d] for d in each) for each in (batch, free, summed)
        ]
        return value.transpose(batch + free + summed).reshape(shape)
    return _patches(eqn, value)


def _axes(eqn: Equation, operand: int) -> tuple[list[int], list[int], list[int]]:
    """Batch, summed and free axes of an operand of a dot_general."""
    summed, batch = eqn.params["dimension_numbers"]
    here, along = list(summed[operand]), list(batch[operand])
    rank = len(eqn.invars[operand].aval.shape)
    return along, here, [d for d in range(rank) if d not in {*here, *along}]


def _patches(eqn: Equation, value: jax.Array) -> jax.Array:
    """What each output of a convolution sees: ``[groups, rows, channels * window]``."""
    p = eqn.params
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    window = [eqn.invars[1].aval.shape[d] for d in numbers.rhs_spec[2:]]
    made = [eqn.outvars[0].aval.shape[d] for d in numbers.out_spec[2:]]
    value = value.transpose(numbers.lhs_spec)
    edges = [
        (low, high, step - 1)
        for (low, high), step in zip(p["padding"], p["lhs_dilation"], strict=True)
    ]
    zero = jnp.zeros((), value.dtype)
    value = lax.pad(value, zero, [(0, 0, 0), (0, 0, 0), *edges])
    seen = []
    for place in itertools.product(*map(range, window)):
        start = [k * d for k, d in zip(place, p["rhs_dilation"], strict=True)]
        stop = [
            first + (n - 1) * step + 1
            for first, n, step in zip(start, made, p["window_strides"], strict=True)
        ]
        whole = value.shape[:2]
        strides = (1, 1, *p["window_strides"])
        seen.append(lax.slice(value, (0, 0, *start), (*whole, *stop), strides))
    patches = jnp.stack(seen, axis=2)  # [batch, channels, window, *space]
    batch, channels, size = patches.shape[:3]
    patches = patches.reshape(batch, groups, channels // groups * size, -1)
    return patches.transpose(1, 0, 3, 2).reshape(groups, -1, channels // groups * size)
