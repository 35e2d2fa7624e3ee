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
    ONE,
    Lengths,
    Monomial,
    Number,
    Sum,
    constant,
    either,
    full_value,
    negative,
    plus,
    times,
)
from jaxprune.coupling._dead import (
    FOLDS,
    NOWHERE,
    REDUCTIONS,
    Dims,
    Part,
    Scope,
    are_even,
    is_zero_at,
    made_by,
    parts,
)
from jaxprune.coupling._labels import Value, same_units
from jaxprune.coupling._registry import RULES
from jaxprune.coupling._walk import Step, Walked
from jaxprune.coupling._writers import SUMS
from jaxprune.program._jaxprs import scan_counts
from jaxprune.program._types import Atom
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


def _together(counts: Sequence[Spent], often: Sum = ONE) -> Spent:
    """All of them, several times."""
    products: dict[Key, list[Sum]] = {}
    for count in counts:
        for inputs, multiply_adds in count.products.items():
            products.setdefault(inputs, []).append(multiply_adds)
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
        # (id of a scope, variable, dimensions) -> when it is computed at dead positions
        self._dead: dict[Any, Sum] = {}

    def program(self, walked: Walked) -> Spent:
        """All equations together."""
        spent = []
        for step in walked.steps:
            spent += [self.step(step), *self._completed(walked.scope, step)]
        return _together(spent)

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
        sizes += self._spread(step)
        own = Spent(plus(*sizes), frozenset(_key(size) for size in sizes))
        products = self._products(step)
        if products:
            return own._replace(products=products)
        if name == "permute":  # a reshape, a transpose and a reshape
            return _together([own], constant(3))
        return self._inside(step, own) if step.subs else own

    def _inside(self, step: Step, own: Spent) -> Spent:
        found = [self.program(sub) for sub in step.subs]
        if step.eqn.primitive.name == "cond":
            return self._most_expensive(found)
        inside = _together(found, self._repeats(step))
        return inside._replace(largest=inside.largest | own.largest)

    def _repeats(self, step: Step) -> Sum:
        """How often what is inside runs: a scan as often as it has layers."""
        if step.eqn.primitive.name == "scan":
            sliced = step.ins[sum(scan_counts(step.eqn.params)) :]
            if sliced:
                return self.lengths.of(sliced[0].axes[0], sliced[0].shape[0])
        return constant(repeats(step.eqn))

    def _most_expensive(self, branches: Sequence[Spent]) -> Spent:
        """The branch that costs most at full size, for every cost."""
        return Spent(
            branches[self._most([b.total_bytes for b in branches])].total_bytes,
            frozenset().union(*(branch.largest for branch in branches)),
            branches[self._most([b.multiply_adds for b in branches])].products,
        )

    def _most(self, sums: Sequence[Sum]) -> int:
        values = [full_value(total, self.sizes) for total in sums]
        most = values.index(max(values))
        self.unsure |= not all(_dominates(sums[most], other) for other in sums)
        return most

    def _products(
        self,
        step: Step,
        dims: Sequence[Dims] = (),
        out: Dims = NOWHERE,
        when: Sum = ONE,
    ) -> Mapping[Key, Sum]:
        """The multiply-adds of one equation, by inputs.

        Args:
            step: the equation.
            dims: for every operand the dimensions at dead positions; () for none.
            out: of the result, likewise.
            when: the condition.
        """
        known, signature = declaration(step.eqn), signature_of(step.eqn)
        if known is None or signature is None or not known.is_product:
            return {}

        def lengths(axes: Sequence[tuple[int, int]]) -> Sum:
            living = [
                (step.outs[0] if k < 0 else step.ins[k], d)
                for k, d in axes
                if d not in (out if k < 0 else dims[k] if dims else NOWHERE)
            ]
            return times(*(self.lengths.of(v.axes[d], v.shape[d]) for v, d in living))

        inputs = lengths(signature.summed())
        return {_key(inputs): times(when, lengths(signature.loops()))}

    def _spread(self, step: Step) -> list[Sum]:
        """The sizes of operands of a sum that are put where the other has positions."""
        if step.eqn.primitive.name not in SUMS:
            return []
        [out], found = step.outs, []
        own = constant(_itemsize(step.eqn.outvars[0]))
        for value in step.ins:
            for d, axis in enumerate(value.axes if value.shape == out.shape else ()):
                if same_units(axis, out.axes[d]):
                    continue
                there = self.lengths.groups(out, d)
                cut = self.lengths.is_cut(value, d, besides=there)
                found.append(times(own, self.lengths.size(out), cut))
        return [size for size in found if size]

    # -- what is added for dead positions, as `jaxprune.narrowing._dead` writes it

    def _completed(self, scope: Scope, step: Step) -> list[Spent]:
        """What a reduction computes of what is at dead positions."""
        if step.eqn.primitive.name not in REDUCTIONS:
            return []
        found = parts(step.eqn, step.ins, NOWHERE, self.lengths.dies)
        if found is None or len(found) == 1:
            return []
        if not are_even(scope, step.eqn, step.ins, found):
            return []
        spent: list[Spent] = []
        self._joined(spent, scope, step, NOWHERE, found[1:], ONE, ONE, varies=True)
        return spent

    def _joined(
        self,
        spent: list[Spent],
        scope: Scope,
        step: Step,
        dims: Dims,
        found: Sequence[Part],
        asked: Sum,
        new: Sum,
        *,
        varies: bool,
    ) -> bool:
        """Adds what the parts of one equation cost; does its result vary?

        Args:
            spent: is added to.
            scope: of the program that the step is of.
            step: the equation.
            dims: of its result, at dead positions.
            found: the parts.
            asked: when the result is asked for.
            new: when it is, and was not asked for before.
            varies: does what the parts are joined to depend on an input?
        """
        eqn, [value] = step.eqn, step.outs
        size = times(
            constant(_itemsize(eqn.outvars[0])), self.lengths.size(value, dims)
        )
        joins = varies
        for part in found:
            axes = part.axes(eqn)
            cut = times(*(self.lengths.is_cut(step.ins[k], d) for k, d in axes))
            when, own = times(asked, cut), times(new, cut)
            each = zip(eqn.invars, step.ins, part.dims, strict=True)
            depends = [self._at_dead(spent, scope, *one, when) for one in each]
            written = times(own, size)
            one = Spent(written, frozenset([_key(written)]))
            if any(depends):
                products = self._products(step, part.dims, dims, own)
                spent.append(one._replace(products=products))
            if part.factors:  # times how often, and joined to what lives
                is_sum = eqn.primitive.name not in FOLDS
                spent += [one] * (is_sum and any(depends))
                spent += [one] * (joins or any(depends))
            joins = joins or any(depends)
        return joins

    def _at_dead(
        self,
        spent: list[Spent],
        scope: Scope,
        var: Atom,
        value: Value,
        dims: Dims,
        when: Sum,
    ) -> bool:
        """Adds what a value at dead positions costs; does it depend on an input?"""
        if value.data or not dims:
            return not value.data
        if is_zero_at(value, dims):
            return False
        above = made_by(scope, var)
        if above is not None:
            return self._at_dead(spent, *above, dims, when)
        key = id(scope), var, dims
        before = self._dead.get(key, {})
        self._dead[key] = either(before, when)
        new = plus(self._dead[key], negative(before))
        step, _ = scope.made[var]
        found = parts(step.eqn, step.ins, dims, self.lengths.dies)
        assert found is not None  # it is even
        return self._joined(spent, scope, step, dims, found, when, new, varies=False)


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


def _itemsize(var: Atom) -> int:
    dtype = getattr(var.aval, "dtype", None)
    return 0 if dtype is None else dtype.itemsize
