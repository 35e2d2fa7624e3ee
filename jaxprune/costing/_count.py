"""Costs: parameters, multiply-adds and activation memory of any JAX function.

Counted from the traced program, so nothing is run or allocated and no layer class has
to be known. The program is a straight line of equations; the ones that hold programs of
their own (jit, scan, cond, ...) are walked into.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from jaxprune.core._leaves import named_leaves, parameter_paths
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.costing._polynomial import Product, bit_operations
from jaxprune.program._interpret import (
    HOLDERS,
    Passage,
    inner_jaxprs,
    interpret,
    through,
)
from jaxprune.program._jaxprs import Program, opened, trace_program
from jaxprune.program._types import Aval, Equation, Jaxpr
from jaxprune.program.primitives import declaration
from jaxprune.program.primitives import signature as signature_of


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
        products: multiply-adds by how many inputs each output sums over, sorted.
    """

    parameters: int
    multiply_adds: int
    activation_bytes: int
    largest_activation_bytes: int
    products: tuple[Product, ...] = ()

    @property
    def flops(self) -> int:
        """Floating point operations: two per multiply-add."""
        return 2 * self.multiply_adds

    def bit_operations(
        self,
        weight_bits: float = 32,
        activation_bits: float = 32,
        density: float = 1.0,
    ) -> float:
        """Bit operations (BOPs) of all products and convolutions.

        With m outputs that each sum over n products, of which the fraction f is not
        zero, at b_w bits a weight and b_a bits an activation::

            sum over layers  m n (f b_a b_w + b_a + b_w + log2 n)

        the multiplications, and additions into accumulators of that width; the density
        f spares multiplications alone.

        Args:
            weight_bits: bits of a weight.
            activation_bits: bits of an activation.
            density: fraction of the weights that are not zero.

        References:
            Baskin et al., `UNIQ <https://arxiv.org/abs/1804.10969>`_, 2018;
            Hawks et al., `Ps and Qs: Quantization-aware pruning
            <https://arxiv.org/abs/2102.11289>`_, 2021
        """
        return bit_operations(self.products, weight_bits, activation_bits, density)


def costs(
    apply_fn: ApplyFn, variables: PyTree, *args: PyTree, **kwargs: PyTree
) -> Costs:
    """Counts what ``apply_fn(variables, *args, **kwargs)`` costs.

    Conventions: matrix products and convolutions are counted, elementwise operations,
    reductions, FFTs and solvers are not. A convolution meets its whole window at every
    output position, padding included; a transposed one at every input position. A scan
    counts as often as it repeats, the body of a while loop once (how often it runs is
    unknown), a cond as its most expensive branch, a Pallas kernel once per grid cell
    and without its on-chip arrays, code under shard_map once per device. What does not
    reach an output is not counted, nor what depends on no input. Masks make nothing
    cheaper: slice first.

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
    live = live_program(trace_program(apply_fn, variables, *args, **kwargs))
    count, _ = count_program(live.jaxpr, [True] * len(live.jaxpr.invars))
    return Costs(
        parameters=sum(math.prod(np.shape(leaves[path])) for path in parameters),
        multiply_adds=count.multiply_adds,
        activation_bytes=count.total_bytes,
        largest_activation_bytes=count.largest_bytes,
        products=tuple(sorted(Product(*pair) for pair in count.products.items())),
    )


def live_program(program: Program) -> Program:
    """The program without what reaches no output, at any depth."""
    jaxpr = program.jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), True)
    _, consts = opened(program.closed)
    return dataclasses.replace(program, closed=core.ClosedJaxpr(live, consts))


class Count(NamedTuple):
    """What a part of a program costs."""

    total_bytes: int = 0
    largest_bytes: int = 0
    products: Mapping[int, int] = MappingProxyType({})  # inputs -> multiply-adds

    def then(self, other: "Count", times: int = 1) -> "Count":
        """Both, the second several times."""
        products = dict(self.products)
        for inputs, multiply_adds in other.products.items():
            products[inputs] = products.get(inputs, 0) + times * multiply_adds
        return Count(
            self.total_bytes + times * other.total_bytes,
            max(self.largest_bytes, other.largest_bytes),
            products,
        )

    @property
    def multiply_adds(self) -> int:
        """All of them."""
        return sum(self.products.values())


def count_program(jaxpr: Jaxpr, varies: Sequence[bool]) -> tuple[Count, list[bool]]:
    """Counts the equations that depend on an input; says which outputs do."""
    total = Count()

    def step(number: int, eqn: Equation, flags: list[bool]) -> list[bool]:
        nonlocal total
        if not any(flags):
            return [False] * len(eqn.outvars)
        found, outs = count_equation(eqn, flags)
        total = total.then(found)
        return outs

    outs = interpret(opened(jaxpr)[0], varies, step, lambda var: False)
    return total, outs


def count_equation(eqn: Equation, varies: Sequence[bool]) -> tuple[Count, list[bool]]:
    """Counts one equation, given which operands depend on an input."""
    name = eqn.primitive.name
    sizes = [size_in_bytes(var.aval) for var in eqn.outvars]
    own, all_vary = Count(sum(sizes), max(sizes, default=0)), [True] * len(sizes)
    known, signature = declaration(eqn), signature_of(eqn)
    if known is not None and signature is not None and known.is_product:
        inputs = math.prod(_size(eqn, *axis) for axis in signature.summed())
        multiply_adds = math.prod(_size(eqn, *axis) for axis in signature.loops())
        return own._replace(products={inputs: multiply_adds}), all_vary
    bodies = list(core.jaxprs_in_params(eqn.params))
    if name.startswith(_COMBINERS) or not bodies:
        return own, all_vary
    found, outs = _inside(eqn, varies, bodies)
    if name == "cond":
        return _most_expensive(found), all_vary
    inside = Count()
    for count in found:
        inside = inside.then(count, repeats(eqn))
    if name == "pallas_call":
        return own._replace(products=inside.products), all_vary
    # The outputs of a call are those of its last equations; scans also stack them.
    largest = max(
        inside.largest_bytes,
        *(size for size, free in zip(sizes, outs, strict=True) if free),
        0,
    )
    return inside._replace(largest_bytes=largest), outs


def _inside(
    eqn: Equation, varies: Sequence[bool], bodies: Sequence[Any]
) -> tuple[list[Count], list[bool]]:
    """What the inner programs of an equation cost, and which results vary."""
    if eqn.primitive.name not in HOLDERS:
        counted = [count_program(body, [True] * len(body.invars)) for body in bodies]
        return [count for count, _ in counted], [True] * len(eqn.outvars)
    programs, found = inner_jaxprs(eqn), {}

    def run(number: int, flags: list[bool]) -> list[bool]:
        found[number], outs = count_program(programs[number], flags)
        return outs

    def always(flag: bool) -> bool:  # what differs from turn to turn
        return True

    loop = Passage(run, operator.or_, carried=always, unstacked=always, stacked=always)
    outs = through(eqn, varies, loop)
    return [found[number] for number in range(len(programs))], outs


def _size(eqn: Equation, operand: int, axis: int) -> int:
    """The size of an axis of an operand; of the result, for operand -1."""
    var = eqn.outvars[0] if operand < 0 else eqn.invars[operand]
    return var.aval.shape[axis]


def _most_expensive(branches: Sequence[Count]) -> Count:
    most = max(branches, key=lambda count: count.multiply_adds)
    return Count(
        max(count.total_bytes for count in branches),
        max(count.largest_bytes for count in branches),
        most.products,
    )


# Their programs say how two numbers combine, not what is computed.
_COMBINERS = ("scatter", "reduce", "select_and_scatter")


def repeats(eqn: Equation) -> int:
    """How often an equation runs its inner programs."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        shape = eqn.params["mesh"].shape
        return math.prod(shape[axis] for axis in eqn.params["newly_manual_axes"])
    if eqn.primitive.name == "pallas_call":
        return math.prod(eqn.params["grid_mapping"].grid)
    return 1


def size_in_bytes(aval: Aval) -> int:
    """Size of a value; tokens and references have none."""
    dtype = getattr(aval, "dtype", None)
    return 0 if dtype is None else math.prod(aval.shape) * dtype.itemsize
