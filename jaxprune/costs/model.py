"""Cost models: what a program costs as polynomials of its group sizes.

The program is walked once, every axis of every parameter labelled by the groups that
cut it. So the length of every axis of every value is known as a polynomial of group
sizes, and with it what each equation costs.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax

from jaxprune.costs.count import (
    Count,
    count_equation,
    is_transposed,
    live_program,
    repeats,
)
from jaxprune.costs.lengths import (
    Lengths,
    Monomial,
    Number,
    Sum,
    Units,
    constant,
    plus,
    times,
    value_at,
)
from jaxprune.costs.polynomial import (
    BitOperations,
    Largest,
    Polynomial,
    Product,
    Term,
)
from jaxprune.coupling.groups import Groups
from jaxprune.coupling.jaxprs import is_array, keystr, trace_program
from jaxprune.coupling.labels import ALIVE, Value
from jaxprune.coupling.ledger import Ledger
from jaxprune.coupling.registry import RULES
from jaxprune.coupling.solve import solve
from jaxprune.coupling.trace import trace
from jaxprune.coupling.walk import Step, Walk, Walked
from jaxprune.masks import PyTree, named_leaves, parameter_paths


@dataclasses.dataclass(frozen=True, eq=False)
class CostModel:
    """What one call costs, as functions of how many units of each group stay.

    Attributes:
        sizes: group name -> full size.
        parameters: entries in the collection ``params``, or in all variables.
        multiply_adds: of matrix products and convolutions.
        activation_bytes: size of everything the program computes from its inputs.
        largest_activation_bytes: size of the largest array it computes.
        products: multiply-adds by how many inputs each output sums over.
        exact: the values equal what the narrowed program costs, whichever units stay.
        why: what is not, if not exact.
    """

    sizes: Mapping[str, int]
    parameters: Polynomial
    multiply_adds: Polynomial
    activation_bytes: Polynomial
    largest_activation_bytes: Largest
    products: tuple[Product, ...]
    exact: bool = True
    why: str = ""

    @property
    def flops(self) -> Polynomial:
        """Floating point operations: two per multiply-add."""
        doubled = (Term(2 * t.coefficient, t.powers) for t in self.multiply_adds.terms)
        return Polynomial(self.sizes, tuple(doubled))

    def bit_operations(
        self,
        weight_bits: float = 32,
        activation_bits: float = 32,
        density: float = 1.0,
    ) -> BitOperations:
        """Bit operations, by the formula of `Costs.bit_operations`."""
        return BitOperations(
            self.sizes, self.products, weight_bits, activation_bits, density
        )


def cost_model(
    apply_fn: Callable[..., Any],
    variables: PyTree,
    *args: Any,
    groups: Groups | None = None,
    **kwargs: Any,
) -> CostModel:
    """Derives what ``apply_fn(variables, *args, **kwargs)`` costs at every width.

    Each cost is a polynomial of group sizes: linear in every group, unless a group
    meets itself in a product (a recurrent kernel, a Gram matrix). At the sizes that
    masks leave, parameters and multiply-adds equal `costs` of the sliced variables
    and the narrowed function; so do activation bytes, where `narrow` runs the same
    equations (it may add a step to pick scattered positions).

    The conventions are those of `costs`. Nothing is run or allocated.

    Args:
        apply_fn: the function; its first argument is the variables.
        variables: tree of arrays or ShapeDtypeStructs.
        *args: further arguments, arrays or ShapeDtypeStructs.
        groups: what `trace` returned for the same arguments; None to trace here.
        **kwargs: further keyword arguments.

    Returns:
        The costs; each has ``value(sizes)``, ``gradient(sizes)`` (both may be traced),
        ``without_one(name, sizes)`` and ``full``.

    Raises:
        ValueError: if `groups` are of another program.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))}
        >>> model = cost_model(mlp, params, jnp.ones((5, 3)))
        >>> print(model.parameters, "|", model.multiply_adds)
        5 w1:1 | 25 w1:1
        >>> model.multiply_adds.value({"w1:1": 4}), model.parameters.without_one("w1:1")
        (100, 5)
    """
    if groups is None:
        groups = trace(apply_fn, variables, *args, **kwargs)
    program = live_program(trace_program(apply_fn, variables, *args, **kwargs))
    ledger = Ledger()
    units = Units(groups, ledger)
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    paths = [keystr(path) for path, leaf in leaves if is_array(leaf)]
    ins = []
    for k, var in enumerate(program.jaxpr.invars):
        shape = var.aval.shape
        named = k < len(paths)
        frozen = Value(shape, (ALIVE,) * len(shape))
        ins.append(units.label(paths[k], shape) if named else frozen)
    walked = Walk(ledger).run(program.closed, ins)
    lengths = Lengths(units, solve(ledger))
    tally = _Tally(lengths, [len(own) for own in units.units])
    count = tally.program(walked)
    held = parameter_paths(named_leaves(variables))
    own = [lengths.size(v) for v, path in zip(ins, paths, strict=False) if path in held]
    return _model(groups, count, plus(*own), tally)


def _model(
    groups: Groups, count: "_Count", parameters: Sum, tally: "_Tally"
) -> CostModel:
    names, blocks = list(groups), [group.blocks for group in groups.values()]
    sizes = {name: group.size for name, group in groups.items()}

    def each_block(monomial: Monomial) -> Number:
        """From the units of one block to those of all."""
        scale = math.prod(blocks[g] ** power for g, power in monomial)
        return 1 if scale == 1 else Fraction(1, scale)

    def made(total: Sum) -> Polynomial:
        terms = [
            Term(c * each_block(monomial), tuple((names[g], p) for g, p in monomial))
            for monomial, c in sorted(total.items())
        ]
        return Polynomial(sizes, tuple(terms))

    why = [
        f"the units of {names[g]} hold unequal shares of some axis"
        for g in sorted(tally.lengths.uneven)
    ]
    why += ["another branch of a cond may become the dearest"] * tally.unsure
    return CostModel(
        sizes,
        made(parameters),
        made(count.multiply_adds),
        made(count.total_bytes),
        Largest(sizes, tuple(map(made, map(dict, count.largest)))),
        tuple(
            Product(made(dict(inputs)), made(multiply_adds))
            for inputs, multiply_adds in count.products.items()
        ),
        not why,
        "; ".join(why),
    )


Key: TypeAlias = frozenset[tuple[Monomial, Number]]  # a `Sum` that can be looked up


class _Count(NamedTuple):
    """What a part of a program costs.

    Attributes:
        total_bytes: of all values.
        largest: the sizes in bytes of which one may be the largest.
        products: inputs -> multiply-adds.
    """

    total_bytes: Sum = MappingProxyType({})
    largest: frozenset[Key] = frozenset()
    products: Mapping[Key, Sum] = MappingProxyType({})

    @property
    def multiply_adds(self) -> Sum:
        return plus(*self.products.values())


def _together(counts: Sequence[_Count], repeats: int = 1) -> _Count:
    """All of them, several times."""
    products: dict[Key, list[Sum]] = {}
    for count in counts:
        for inputs, multiply_adds in count.products.items():
            products.setdefault(inputs, []).append(multiply_adds)
    often = constant(repeats)
    return _Count(
        times(often, plus(*(count.total_bytes for count in counts))),
        _undominated(frozenset().union(*(count.largest for count in counts))),
        {inputs: times(often, plus(*found)) for inputs, found in products.items()},
    )


class _Tally:
    """Adds up what the equations of a walked program cost, as `costs` does."""

    def __init__(self, lengths: Lengths, sizes: Sequence[int]) -> None:
        self.lengths, self.sizes = lengths, sizes
        self.unsure = False  # could another branch of a cond become the dearest?

    def program(self, walked: Walked) -> _Count:
        return _together([self.step(step) for step in walked.steps])

    def step(self, step: Step) -> _Count:
        eqn, name = step.eqn, step.eqn.primitive.name
        if all(value.data for value in step.ins):
            return _Count()
        if name not in RULES:
            return _fixed(count_equation(eqn, [True] * len(eqn.invars))[0])
        sizes = [
            times(constant(_itemsize(var)), self.lengths.size(value))
            for var, value in zip(eqn.outvars, step.outs, strict=True)
            if not value.data
        ]
        own = _Count(plus(*sizes), frozenset(_key(size) for size in sizes))
        if name in _PRODUCTS:
            summed, all_axes = _PRODUCTS[name](step)
            inputs = self._length(summed)
            products = {_key(inputs): times(inputs, self._length(all_axes))}
            return own._replace(products=products)
        if name == "permute":  # a reshape, a transpose and a reshape
            return _together([own], 3)
        return self._inside(step, own) if step.subs else own

    def _inside(self, step: Step, own: _Count) -> _Count:
        found = [self.program(sub) for sub in step.subs]
        if step.eqn.primitive.name == "cond":
            return self._dearest(found)
        inside = _together(found, repeats(step.eqn))
        return inside._replace(largest=inside.largest | own.largest)

    def _dearest(self, branches: Sequence[_Count]) -> _Count:
        """The branch that costs most at full size, for every cost."""
        return _Count(
            branches[self._most([b.total_bytes for b in branches])].total_bytes,
            frozenset().union(*(branch.largest for branch in branches)),
            branches[self._most([b.multiply_adds for b in branches])].products,
        )

    def _most(self, sums: Sequence[Sum]) -> int:
        values = [value_at(total, self.sizes) for total in sums]
        most = values.index(max(values))
        self.unsure |= not all(_dominates(sums[most], other) for other in sums)
        return most

    def _length(self, axes: Sequence[tuple[Value, int]]) -> Sum:
        return times(*(self.lengths.of(v.axes[d], v.shape[d]) for v, d in axes))


def _fixed(count: Count) -> _Count:
    """What does not depend on any group."""
    products = {
        _key(constant(inputs)): constant(multiply_adds)
        for inputs, multiply_adds in count.products.items()
    }
    largest = frozenset({_key(constant(count.largest_bytes))})
    return _Count(constant(count.total_bytes), largest, products)


def _key(total: Sum) -> Key:
    return frozenset(total.items())


def _dominates(a: Sum, b: Sum) -> bool:
    """Is a at least b, whatever the sizes? A sufficient condition."""
    return all(a.get(monomial, 0) >= c for monomial, c in b.items()) and all(
        c >= 0 for monomial, c in a.items() if monomial not in b
    )


def _undominated(keys: frozenset[Key]) -> frozenset[Key]:
    """Without those that another is at least, whatever the sizes."""
    left: list[Key] = []
    for key in sorted(keys, key=len, reverse=True):
        mine = dict(key)
        if not any(_dominates(dict(other), mine) for other in left):
            left = [other for other in left if not _dominates(mine, dict(other))]
            left.append(key)
    return frozenset(left)


def _itemsize(var: Any) -> int:
    dtype = getattr(var.aval, "dtype", None)
    return 0 if dtype is None else dtype.itemsize


# --- products: the axes summed over, and all axes of the result ----------------------

_Axes: TypeAlias = list[tuple[Value, int]]


def _every(value: Value) -> _Axes:
    return [(value, d) for d in range(len(value.shape))]


def _dot_general(step: Step) -> tuple[_Axes, _Axes]:
    (contracted, _), _ = step.eqn.params["dimension_numbers"]
    return [(step.ins[0], d) for d in contracted], _every(step.outs[0])


def _ragged_dot_general(step: Step) -> tuple[_Axes, _Axes]:
    numbers = step.eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    # With a ragged contraction each group contracts its own part: one row of the axis
    # of groups that the result has.
    shared = set(numbers.lhs_ragged_dimensions) & set(contracted)
    out = _every(step.outs[0])
    return [(step.ins[0], d) for d in contracted], out[1:] if shared else out


def _conv_general_dilated(step: Step) -> tuple[_Axes, _Axes]:
    lhs, kernel = step.ins[:2]
    out, numbers = step.outs[0], step.eqn.params["dimension_numbers"]
    summed = [(kernel, d) for d in numbers.rhs_spec[1:]]
    if not is_transposed(step.eqn):
        return summed, _every(out)
    positions = [(lhs, d) for d in numbers.lhs_spec[2:]]
    return summed, positions + [(out, d) for d in numbers.out_spec[:2]]


_PRODUCTS: Mapping[str, Callable[[Step], tuple[_Axes, _Axes]]] = {
    "conv_general_dilated": _conv_general_dilated,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
}
