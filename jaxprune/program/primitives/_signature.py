"""What indexes the axes of an equation, like the letters of an einsum.

Every axis of every operand and result lists its factors (the word of Shardy's op
sharding rules): equal factor, same index. ``dot_general`` of ``[b, m, k]`` and
``[b, k, n]`` has the factors b, k, m, n; k is on no result, so it is summed over. An
axis may consist of several factors, row-major: the channels of a grouped convolution
are ``(group, channel)``, and a reshape only regroups factors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np

from jaxprune.program._types import Atom, Equation

Factors: TypeAlias = tuple[int, ...]  # of one axis
Shape: TypeAlias = tuple[int, ...]
Positions: TypeAlias = Mapping[tuple[int, int], np.ndarray]
Constants: TypeAlias = Callable[[int], np.ndarray | None]


class Signature(NamedTuple):
    """The factors of one equation.

    An axis without factors is not indexed: it has size 1 and is broadcast or dropped,
    or positions on it are mixed, or chosen by data.

    Attributes:
        sizes: of the factors, by number.
        ins: for every operand the factors of every axis.
        outs: for every result the factors of every axis.
        mixed: factors along which positions depend on each other (a running sum).
        at: (operand, factor) -> int positions of the factor that the operand holds, in
            its order; it holds all of them if not given. An operand without an axis of
            this factor holds one position.
        taken: (result, factor) -> int positions of the factor that the result holds,
            -1 where it holds something else (padding); likewise.
        deciding: operands that say where something goes (indices, predicates, keys),
            not what.
        feeds: for every result the operands it is computed from; None: from all.
        fixed: factors that keep their size: the primitive sees which position is which.
        slides: (operand, axis) or, as operand -1, axes of the first result: for each
            position of them a convolution runs over its whole window.
    """

    sizes: Shape
    ins: tuple[tuple[Factors, ...], ...]
    outs: tuple[tuple[Factors, ...], ...]
    mixed: frozenset[int] = frozenset()
    at: Positions = MappingProxyType({})
    taken: Positions = MappingProxyType({})
    deciding: frozenset[int] = frozenset()
    feeds: tuple[Sequence[int], ...] | None = None
    fixed: frozenset[int] = frozenset()
    slides: tuple[tuple[int, int], ...] = ()

    @property
    def contracted(self) -> frozenset[int]:
        """The factors that are on operands and on no result: reduced over."""
        gone: set[int] = set()
        for k, axes in enumerate(self.ins):
            if k not in self.deciding:
                gone.update(*axes)
        for axes in self.outs:
            gone.difference_update(*axes)
        return frozenset(gone.difference([f for _, f in self.taken]))

    def contracted_axes(self, operand: int) -> tuple[int, ...]:
        """The axes of an operand that the equation reduces over, wholly or in part."""
        gone = self.contracted
        axes = enumerate(self.ins[operand])
        return tuple([d for d, factors in axes if not gone.isdisjoint(factors)])

    def feeding(self, result: int) -> list[int]:
        """The operands that a result is computed from."""
        if self.feeds is not None:
            return list(self.feeds[result])
        return list(range(len(self.ins)))

    def sources(self, result: int) -> list[list[tuple[int, int]]]:
        """For every axis of a result the (operand, axis) that share a factor with it.

        Operands that only decide are left out.
        """
        operands = [k for k in self.feeding(result) if k not in self.deciding]
        return [
            [
                (k, d)
                for k in operands
                for d, own in enumerate(self.ins[k])
                if not set(own).isdisjoint(factors)
            ]
            for factors in self.outs[result]
        ]

    def summed(self) -> list[tuple[int, int]]:
        """(operand, axis) of one axis for every contracted factor: what is summed over.

        Their sizes multiply to how many inputs each output sums over. Of the axes of a
        factor one that holds nothing else is taken, of the last operand that has one.
        """
        alone = dict(self.alone())
        return [alone[f] for f in sorted(self.contracted)]

    def alone(self) -> list[tuple[int, tuple[int, int]]]:
        """(factor, (operand, axis)) of every operand axis of one factor."""
        return [
            (factors[0], (k, d))
            for k, axes in enumerate(self.ins)
            for d, factors in enumerate(axes)
            if len(factors) == 1
        ]

    def loops(self) -> list[tuple[int, int]]:
        """(operand, axis), or (-1, axis) for the result: what a product loops over.

        The sizes of these axes multiply to its number of multiply-adds.
        """
        made = [(-1, d) for d, factors in enumerate(self.outs[0]) if factors]
        return [*made, *self.slides, *self.summed()]


class Builder:
    """Hands out factors by size while a signature is written down."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def new(self, size: int) -> int:
        """A factor of its own."""
        self.sizes.append(int(size))
        return len(self.sizes) - 1

    def axes(self, shape: Shape) -> list[Factors]:
        """A factor for every axis of a shape."""
        return [(self.new(n),) for n in shape]


def shape_of(var: Atom) -> Shape:
    """The shape of a variable; () for what has none."""
    return tuple(getattr(var.aval, "shape", ()))


def shapes_of(eqn: Equation) -> tuple[list[Shape], list[Shape]]:
    """The shapes of all operands and all results."""
    return [shape_of(v) for v in eqn.invars], [shape_of(v) for v in eqn.outvars]


def unindexed(shapes: Sequence[Shape]) -> tuple[tuple[Factors, ...], ...]:
    """Axes without factors."""
    return tuple([((),) * len(shape) for shape in shapes])


def no_constants(operand: int) -> np.ndarray | None:
    """No operand is a constant."""
    del operand
    return None


def refined(a: Shape, b: Shape) -> Iterator[tuple[int, int, int]]:
    """The factors that a row-major reshape regroups: (size, axis of a, axis of b).

    Where the axes of `a` and `b` have no common factors nothing is said of them.

    >>> list(refined((8, 6), (2, 4, 6)))
    [(2, 0, 0), (4, 0, 1), (6, 1, 2)]
    """
    for run_a, run_b in segments(a, b):
        ends_a = np.cumprod([a[d] for d in run_a]).tolist()
        ends_b = np.cumprod([b[d] for d in run_b]).tolist()
        ends = sorted({*ends_a, *ends_b})
        before = [1, *ends[:-1]]
        if any(end % start for start, end in zip(before, ends, strict=True)):
            continue
        for start, end in zip(before, ends, strict=True):
            i = sum(start >= stop for stop in ends_a)
            j = sum(start >= stop for stop in ends_b)
            yield end // start, run_a[i], run_b[j]


def segments(a: Shape, b: Shape) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of `a` and `b` with equal products.

    Dimensions of size 1 belong to no run: they carry no position.

    >>> segments((8, 4, 6), (32, 2, 3))
    [([0, 1], [0]), ([2], [1, 2])]
    """
    left = [d for d, n in enumerate(a) if n != 1]
    right = [d for d, n in enumerate(b) if n != 1]
    runs, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        run_a, run_b = [left[i]], [right[j]]
        size_a, size_b = a[left[i]], b[right[j]]
        i, j = i + 1, j + 1
        while size_a != size_b:
            if size_a < size_b:
                run_a.append(left[i])
                size_a, i = size_a * a[left[i]], i + 1
            else:
                run_b.append(right[j])
                size_b, j = size_b * b[right[j]], j + 1
        runs.append((run_a, run_b))
    return runs
