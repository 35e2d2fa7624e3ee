"""A program whose scans over some stacked inputs are written out, layer by layer.

The layers of such an input come one by one, so that each may have a shape of its own.
They are kept apart up to the scan that iterates over them; whatever else reads them
gets them stacked.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from jaxprune.program._interpret import CALLS, REMATS, inner_jaxprs, interpret
from jaxprune.program._jaxprs import bind, opened, scan_counts
from jaxprune.program._types import Equation


class Layers(NamedTuple):
    """The layers of a stacked array.

    Attributes:
        each: the arrays, without the axis of the layers.
        axis: where that axis is in the stacked array.
    """

    each: tuple[jax.Array, ...]
    axis: int


Operand: TypeAlias = jax.Array | Layers

_ALIKE = frozenset("convert_element_type copy copy_p name reduce_precision".split())


def unrolled(jaxpr: Any, operands: Sequence[Operand]) -> list[Any]:
    """The results of a closed jaxpr, of which some inputs come layer by layer."""
    return list(map(stacked, _run(jaxpr, operands)))


def stacked(value: Operand) -> Any:
    """The array itself."""
    return jnp.stack(value.each, value.axis) if isinstance(value, Layers) else value


def _run(jaxpr: Any, operands: Sequence[Operand]) -> list[Operand]:
    program, consts = opened(jaxpr)
    known = dict(zip(program.constvars, consts, strict=True))

    def step(number: int, eqn: Equation, values: list[Operand]) -> Sequence[Operand]:
        if any(isinstance(value, Layers) for value in values):
            return _of_layers(eqn, values)
        return bind(eqn, *map(stacked, values))

    def constant(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else known[var]

    return interpret(program, operands, step, constant)


def _of_layers(eqn: Equation, values: list[Operand]) -> Sequence[Operand]:
    """The results of an equation of which some operands come layer by layer."""
    name, first = eqn.primitive.name, values[0]
    if name in CALLS:
        return _run(inner_jaxprs(eqn)[0], values)
    if name in REMATS:
        run = functools.partial(_run, inner_jaxprs(eqn)[0])
        options = {n: eqn.params[n] for n in ("prevent_cse", "policy")}
        return jax.checkpoint(lambda *xs: list(map(stacked, run(xs))), **options)(
            *values
        )
    if name == "scan":
        return _turns(eqn, values)
    if isinstance(first, Layers) and name in _ALIKE:
        return [Layers(tuple([bind(eqn, x)[0] for x in first.each]), first.axis)]
    if isinstance(first, Layers) and name == "transpose":
        order = eqn.params["permutation"]
        own = [d - (d > first.axis) for d in order if d != first.axis]
        turned = tuple([jnp.transpose(x, own) for x in first.each])
        return [Layers(turned, order.index(first.axis))]
    return bind(eqn, *map(stacked, values))


def _turns(eqn: Equation, values: list[Operand]) -> Sequence[Any]:
    """A scan, one turn after the other."""
    n_consts, n_carry = scan_counts(eqn.params)
    consts, carry = values[:n_consts], values[n_consts : n_consts + n_carry]
    sliced = values[n_consts + n_carry :]
    if not any(isinstance(x, Layers) and x.axis == 0 for x in sliced):
        return bind(eqn, *map(stacked, values))
    body, made = inner_jaxprs(eqn)[0], []
    turns = range(eqn.params["length"])
    for turn in turns[::-1] if eqn.params["reverse"] else turns:
        outs = _run(body, [*consts, *carry, *[_layer(x, turn) for x in sliced]])
        carry = outs[:n_carry]
        made.append(list(map(stacked, outs[n_carry:])))
    if eqn.params["reverse"]:
        made.reverse()
    return [*carry, *map(jnp.stack, zip(*made, strict=True))]


def _layer(value: Operand, turn: int) -> jax.Array:
    if isinstance(value, Layers) and value.axis == 0:
        return value.each[turn]
    return lax.index_in_dim(stacked(value), turn, keepdims=False)
