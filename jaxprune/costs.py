"""Costs: parameters, multiply-adds and activation memory of any JAX function.

Counted from the traced program, so nothing is run or allocated and no layer class has
to be known. The program is a straight line of equations; the ones that hold programs of
their own (jit, scan, cond, ...) are walked into.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from jaxprune.coupling.jaxprs import trace_program
from jaxprune.masks import PyTree, named_leaves, parameter_paths


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one call of a function costs.

    Attributes:
        parameters: entries in the collection ``params``, or in all variables if there
            is no such collection.
        multiply_adds: multiplications (each with one addition) in matrix products and
            convolutions.
        activation_bytes: size of everything the program computes, summed over all
            equations, before any fusion: a measure of memory traffic.
        largest_activation_bytes: size of the largest array the program computes.
    """

    parameters: int
    multiply_adds: int
    activation_bytes: int
    largest_activation_bytes: int

    @property
    def flops(self) -> int:
        """Floating point operations: two per multiply-add."""
        return 2 * self.multiply_adds


def costs(
    apply_fn: Callable[..., Any], variables: PyTree, *args: Any, **kwargs: Any
) -> Costs:
    """Counts what ``apply_fn(variables, *args, **kwargs)`` costs.

    Conventions: matrix products and convolutions are counted, elementwise operations,
    reductions, FFTs and solvers are not. A convolution meets its whole window at every
    output position, padding included; a transposed one at every input position. A scan
    counts as often as it repeats, the body of a while loop once (how often it runs is
    unknown), a cond as its dearest branch, a Pallas kernel once per grid cell and
    without its on-chip arrays, code under shard_map once per device. What does not
    reach an output is not counted. Masks make nothing cheaper: slice first.

    Args:
        apply_fn: the function; every array in its arguments is traced, everything else
            (flags, strings, functions) is passed as it is.
        variables: tree of arrays or ShapeDtypeStructs.
        *args: further arguments, arrays or ShapeDtypeStructs.
        **kwargs: further keyword arguments.

    Returns:
        The counts, as Python integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jax.ShapeDtypeStruct((256, 10), jnp.float32)
        >>> x = jax.ShapeDtypeStruct((1, 256), jnp.float32)
        >>> found = costs(lambda params, x: x @ params["w"], {"w": w}, x)
        >>> found.parameters, found.multiply_adds, found.flops, found.activation_bytes
        (2560, 2560, 5120, 40)
    """
    leaves = named_leaves(variables)
    parameters = parameter_paths(leaves)
    jaxpr = trace_program(apply_fn, variables, *args, **kwargs).jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    count = _count(live)
    return Costs(
        parameters=sum(math.prod(np.shape(leaves[path])) for path in parameters),
        multiply_adds=count.multiply_adds,
        activation_bytes=count.total_bytes,
        largest_activation_bytes=count.largest_bytes,
    )


class _Count(NamedTuple):
    multiply_adds: int = 0
    total_bytes: int = 0
    largest_bytes: int = 0

    def then(self, other: "_Count", times: int = 1) -> "_Count":
        return _Count(
            self.multiply_adds + times * other.multiply_adds,
            self.total_bytes + times * other.total_bytes,
            max(self.largest_bytes, other.largest_bytes),
        )


def _count(jaxpr: Any) -> _Count:
    total = _Count()
    for eqn in jaxpr.eqns:
        total = total.then(_count_equation(eqn))
    return total


def _count_equation(eqn: Any) -> _Count:
    name = eqn.primitive.name
    sizes = [_bytes(var.aval) for var in eqn.outvars]
    own = _Count(0, sum(sizes), max(sizes, default=0))
    if name in _MULTIPLY_ADDS:
        return own._replace(multiply_adds=_MULTIPLY_ADDS[name](eqn))
    if name.startswith(_COMBINERS):
        return own
    bodies = [_count(body) for body in core.jaxprs_in_params(eqn.params)]
    if not bodies:
        return own
    if name == "cond":
        return _Count(*(max(column) for column in zip(*bodies, strict=True)))
    inside = _Count()
    for body in bodies:
        inside = inside.then(body, _repeats(eqn))
    if name == "pallas_call":
        return own._replace(multiply_adds=inside.multiply_adds)
    # The outputs of a call are those of its last equations; scans also stack them.
    return inside._replace(largest_bytes=max(inside.largest_bytes, own.largest_bytes))


# Their programs say how two numbers combine, not what is computed.
_COMBINERS = ("scatter", "reduce", "select_and_scatter")


def _repeats(eqn: Any) -> int:
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        shape = eqn.params["mesh"].shape
        return math.prod(shape[axis] for axis in eqn.params["newly_manual_axes"])
    if eqn.primitive.name == "pallas_call":
        return math.prod(eqn.params["grid_mapping"].grid)
    return 1


def _bytes(aval: Any) -> int:
    # Tokens and references have no shape or no dtype of their own.
    dtype = getattr(aval, "dtype", None)
    return 0 if dtype is None else math.prod(aval.shape) * dtype.itemsize


def _dot_general(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return math.prod(out.shape) * math.prod(lhs.shape[axis] for axis in contracted)


def _ragged_dot_general(eqn: Any) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    products = math.prod(out.shape) * math.prod(lhs.shape[axis] for axis in contracted)
    # With a ragged contraction each group contracts its own part of the axis.
    shared = set(numbers.lhs_ragged_dimensions) & set(contracted)
    return products // eqn.invars[2].aval.shape[-1] if shared else products


def _conv_general_dilated(eqn: Any) -> int:
    lhs, kernel = (var.aval.shape for var in eqn.invars[:2])
    numbers = eqn.params["dimension_numbers"]
    out_channels, in_channels = (kernel[axis] for axis in numbers.rhs_spec[:2])
    window = math.prod(kernel) // max(out_channels * in_channels, 1)
    if any(step > 1 for step in eqn.params["lhs_dilation"]):
        groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
        return math.prod(lhs) * window * out_channels // groups
    return math.prod(eqn.outvars[0].aval.shape) * window * in_channels


_MULTIPLY_ADDS: Mapping[str, Callable[[Any], int]] = {
    "conv_general_dilated": _conv_general_dilated,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
}
