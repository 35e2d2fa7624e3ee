"""A contraction with a kernel, as two contractions with its factors.

The kernel is never rebuilt: a dense layer becomes two, a convolution becomes a
convolution and a pointwise one, a column and a row, or the other way about.
"""

import math
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxprune.core._types import Array
from jaxprune.program._types import Equation
from jaxprune.surgery._factor_forms import Form


def contract(
    eqn: Equation, operand: int, form: Form, x: jax.Array, first: Array, second: Array
) -> jax.Array:
    """What the equation makes of `x` and the product of the factors.

    Args:
        eqn: the contraction with the kernel.
        operand: which of its operands that is.
        form: of this kernel, without the axes that scans take apart.
        x: the other operand.
        first: factor.
        second: factor.
    """
    if eqn.primitive.name == "conv_general_dilated":
        return _convolutions(eqn, form, x, first, second)
    if form.kind == "basis":
        return _dots_with_basis(eqn, operand, form, x, first, second)
    (own, theirs), (_, along) = _numbers(eqn, operand)
    front = tuple(range(len(along)))
    # The first factor has the summed axes in the order of the kernel.
    theirs = tuple(theirs[k] for k in np.argsort(own))
    summed = tuple(range(len(front), len(front) + len(theirs)))
    middle = _dot(eqn, x, first, ((theirs, summed), (along, front))).astype(x.dtype)
    here, there = (middle.ndim - 1,), (len(front),)
    if operand == 0:
        return _dot(eqn, second, middle, ((there, here), (front, front)))
    return _dot(eqn, middle, second, ((here, there), (front, front)))


def _numbers(
    eqn: Equation, operand: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """(summed axes, batch axes) of the kernel and of the other operand."""
    summed, batch = eqn.params["dimension_numbers"]
    order = (operand, 1 - operand)
    return tuple(summed[k] for k in order), tuple(batch[k] for k in order)


def _dot(eqn: Equation, lhs: Array, rhs: Array, numbers: tuple) -> jax.Array:
    p = eqn.params
    return lax.dot_general(
        lhs, rhs, numbers,
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )  # fmt: skip


def _dots_with_basis(
    eqn: Equation, operand: int, form: Form, x: jax.Array, first: Array, second: Array
) -> jax.Array:
    """Groups of inputs are projected on the same basis: ``[..., groups, basis]``."""
    (_, (d,)), _ = _numbers(eqn, operand)
    middle = _dot(eqn, _grouped(x, d, form), first, (((d + 1,), (0,)), ((), ())))
    middle = middle.astype(x.dtype)
    here, there = (d, middle.ndim - 1), (0, 1)
    if operand == 0:
        return _dot(eqn, second, middle, ((there, here), ((), ())))
    return _dot(eqn, middle, second, ((here, there), ((), ())))


def _grouped(x: jax.Array, d: int, form: Form) -> jax.Array:
    """`x` with axis `d` split into groups of the basis' size."""
    sizes = dict(form.sizes)
    return x.reshape(*x.shape[:d], sizes["n"], sizes["p"], *x.shape[d + 1 :])


def _convolutions(
    eqn: Equation, form: Form, x: jax.Array, first: Array, second: Array
) -> jax.Array:
    groups = eqn.params["feature_group_count"]
    space = set(range(len(eqn.params["window_strides"])))
    if form.kind == "basis":
        middle = _on_basis(eqn, form, x, first)
        return _convolved(eqn, middle, second, set())
    if form.kind == "channel":
        now, then, later = space, set(), groups
    elif form.kind == "spatial":
        now, then, later = {0}, {1}, groups
    else:
        now, then, later = set(), space, form.count
    middle = _convolved(eqn, x, first, now, groups, last=False)
    return _convolved(eqn, middle, second, then, later)


def _convolved(
    eqn: Equation,
    x: jax.Array,
    kernel: Any,
    axes: Collection[int],
    groups: int = 1,
    last: bool = True,
) -> jax.Array:
    """A convolution like the equation's along these axes of space, pointwise else.

    Unless it is the last one, its result is of the layout and dtype of `x`.
    """
    p = eqn.params
    numbers = p["dimension_numbers"]
    if not last:
        numbers = lax.ConvDimensionNumbers(
            numbers.lhs_spec, numbers.rhs_spec, numbers.lhs_spec
        )

    def only(name: str, plain: object) -> list:
        return [each if d in axes else plain for d, each in enumerate(p[name])]

    made = lax.conv_general_dilated(
        x, kernel,
        window_strides=only("window_strides", 1),
        padding=only("padding", (0, 0)),
        lhs_dilation=only("lhs_dilation", 1),
        rhs_dilation=only("rhs_dilation", 1),
        dimension_numbers=numbers,
        feature_group_count=groups,
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )  # fmt: skip
    return made if last else made.astype(x.dtype)


def _on_basis(eqn: Equation, form: Form, x: jax.Array, first: Array) -> jax.Array:
    """Every group of inputs, convolved with the same basis, side by side."""
    at = eqn.params["dimension_numbers"].lhs_spec[1]
    space = range(len(eqn.params["window_strides"]))

    def one(group: jax.Array) -> jax.Array:
        return _convolved(eqn, group, first, space, last=False)

    made = jax.vmap(one, in_axes=at, out_axes=at)(_grouped(x, at, form))
    groups, channels = made.shape[at : at + 2]
    return made.reshape(*made.shape[:at], groups * channels, *made.shape[at + 2 :])


def multiplications(eqn: Equation, operand: int, form: Form | None) -> int:
    """How many multiplications a contraction takes.

    Args:
        eqn: the contraction with the kernel.
        operand: which of its operands that is.
        form: of this kernel; the count is that of `contract` at rank 1, to which it is
            proportional. None: of the contraction as it is.
    """
    kernel, other = (eqn.invars[k].aval.shape for k in (operand, 1 - operand))
    out = eqn.outvars[0].aval.shape
    if eqn.primitive.name == "dot_general":
        (own, _), (along, _) = _numbers(eqn, operand)
        free = [n for d, n in enumerate(kernel) if d not in {*own, *along}]
        rows = math.prod(out) // math.prod(free)
        if form is None:
            return rows * math.prod(kernel[d] for d in own) * math.prod(free)
        shared = dict(form.sizes).get("n", 1)
        return rows * (shared * form.size(form.rows) + form.size(form.columns))
    numbers = eqn.params["dimension_numbers"]
    before = [other[d] for d in numbers.lhs_spec[2:]]
    after = [out[d] for d in numbers.out_spec[2:]]
    batch = other[numbers.lhs_spec[0]]
    if form is None:
        return batch * math.prod(after) * math.prod(kernel)
    between = {"spatial": [after[0], *before[1:]], "depthwise": before}
    shared = dict(form.sizes)["n"] if form.kind == "basis" else 1
    first = math.prod(between.get(form.kind, after)) * shared * form.size(form.rows)
    second = math.prod(after) * form.size(form.columns)
    return batch * form.count * (first + second)
