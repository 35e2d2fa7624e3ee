"""What every equation of a walked program costs, as polynomials of group sizes."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from jaxprune.costing._count import (
    Count,
    count_equation,
    repeats,
)
from jaxprune.costing._lengths import (
    Lengths,
    Monomial,
    Number,
    Sum,
    constant,
    plus,
    times,
    value_at,
)
from jaxprune.coupling._registry import RULES
from jaxprune.coupling._walk import Step, Walked
from jaxprune.program.primitives import declaration
from jaxprune.program.primitives import signature as signature_of

Key: TypeAlias = frozenset[tuple[Monomial, Number]]  # a `Sum` that can be looked up


class Spent(NamedTuple):
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
        """Of all products."""
        return plus(*self.products.values())


def _together(counts: Sequence[Spent], repeats: int = 1) -> Spent:
    """All of them, several times."""
    products: dict[Key, list[Sum]] = {}
    for count in counts:
        for inputs, multiply_adds in count.products.items():
            products.setdefault(inputs, []).append(multiply_adds)
    often = constant(repeats)
    return Spent(
        times(often, plus(*(count.total_bytes for count in counts))),
        _undominated(frozenset().union(*(count.largest for count in counts))),
        {inputs: times(often, plus(*found)) for inputs, found in products.items()},
    )


class Tally:
    """Adds up what the equations of a walked program cost, as `costs` does."""

    def __init__(self, lengths: Lengths, sizes: Sequence[int]) -> None:
        self.lengths, self.sizes = lengths, sizes
        self.unsure = False  # could another branch of a cond become the most expensive?

    def program(self, walked: Walked) -> Spent:
        """All equations together."""
        return _together([self.step(step) for step in walked.steps])

    def step(self, step: Step) -> Spent:
        """One equation, with what is inside it."""
        eqn, name = step.eqn, step.eqn.primitive.name
        if all(value.data for value in step.ins):
            return Spent()
        if name not in RULES:
            return _fixed(count_equation(eqn, [True] * len(eqn.invars))[0])
        sizes = [
            times(constant(_itemsize(var)), self.lengths.size(value))
            for var, value in zip(eqn.outvars, step.outs, strict=True)
            if not value.data
        ]
        own = Spent(plus(*sizes), frozenset(_key(size) for size in sizes))
        known, signature = declaration(eqn), signature_of(eqn)
        if known is not None and signature is not None and known.is_product:
            inputs = self._lengths(step, signature.summed())
            products = {_key(inputs): self._lengths(step, signature.loops())}
            return own._replace(products=products)
        if name == "permute":  # a reshape, a transpose and a reshape
            return _together([own], 3)
        return self._inside(step, own) if step.subs else own

    def _inside(self, step: Step, own: Spent) -> Spent:
        found = [self.program(sub) for sub in step.subs]
        if step.eqn.primitive.name == "cond":
            return self._most_expensive(found)
        inside = _together(found, repeats(step.eqn))
        return inside._replace(largest=inside.largest | own.largest)

    def _most_expensive(self, branches: Sequence[Spent]) -> Spent:
        """The branch that costs most at full size, for every cost."""
        return Spent(
            branches[self._most([b.total_bytes for b in branches])].total_bytes,
            frozenset().union(*(branch.largest for branch in branches)),
            branches[self._most([b.multiply_adds for b in branches])].products,
        )

    def _most(self, sums: Sequence[Sum]) -> int:
        values = [value_at(total, self.sizes) for total in sums]
        most = values.index(max(values))
        self.unsure |= not all(_dominates(sums[most], other) for other in sums)
        return most

    def _lengths(self, step: Step, axes: Sequence[tuple[int, int]]) -> Sum:
        """The product of the lengths of axes, as `Signature.loops` lists them."""
        values = [(step.outs[0] if k < 0 else step.ins[k], d) for k, d in axes]
        return times(*(self.lengths.of(v.axes[d], v.shape[d]) for v, d in values))


def _fixed(count: Count) -> Spent:
    """What does not depend on any group."""
    products = {
        _key(constant(inputs)): constant(multiply_adds)
        for inputs, multiply_adds in count.products.items()
    }
    largest = frozenset({_key(constant(count.largest_bytes))})
    return Spent(constant(count.total_bytes), largest, products)


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
