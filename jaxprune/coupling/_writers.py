"""Writers of a stream that may lose units which the stream keeps.

What writes to a residual stream is added to it. Where a writer is cut it adds 0, so the
stream may keep a position that one of its writers does not write: the position of the
writer lives if that of the stream does and if the writer keeps it,

    writer := stream and own,

with units `own` for this writer alone. The sum has the labels of the stream; `narrow`
puts the smaller writer where its positions are in the stream. By default writers are
tied to their stream: this is for those that are named.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

from jaxprune.coupling._labels import Axis, Column, Units, same_units
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._solution import NEVER, Solution
from jaxprune.program._interpret import LOOPS
from jaxprune.program._jaxprs import scan_counts
from jaxprune.program._types import Atom, Equation

SUMS = frozenset("add sub add_any".split())


class Written(NamedTuple):
    """A writer and the stream that it is added to.

    Attributes:
        own: the units of the writer alone.
        stream: the axis of the stream.
    """

    own: Units
    stream: Axis


class Writers:
    """The writers of one walk that have units of their own.

    Attributes:
        found: those that were met, by the block of their units.
        places: where they are added, as (equation, operand); by block, too.
        refused: those that cannot: block -> why, as a unit of the ledger.
    """

    def __init__(
        self,
        ledger: Ledger,
        leaves: Sequence[Axis],
        free: Sequence[Axis],
        layers: Sequence[Axis] = (),
    ) -> None:
        self.found: dict[int, Written] = {}
        self.places: dict[int, tuple[Any, int]] = {}
        self.refused: dict[int, int] = {}
        self._ledger = ledger
        self._free = [axis[0].units for axis in free if not isinstance(axis, int)]
        self._layers = {id(a[0].units) for a in layers if not isinstance(a, int)}
        self._leaves = {id(a[0].units) for a in leaves if not isinstance(a, int)}
        self._sums: dict[tuple[int, int], Axis] = {}
        self._fed: dict[Any, bool] = {}

    # -- what depends on an input: a bias is added too, but is no writer

    def enter(self, invars: Sequence[Atom], fed: Sequence[bool]) -> None:
        """The inputs of a program, and which depend on an input of the function."""
        self._fed.update(zip(invars, fed, strict=True))

    def enter_inner(self, eqn: Equation, invars: Sequence[Atom]) -> None:
        """The inputs of a program that an equation holds: its last operands."""
        fed = [self.is_fed(var) for var in eqn.invars[len(eqn.invars) - len(invars) :]]
        fed = [True] * (len(invars) - len(fed)) + fed
        if eqn.primitive.name in LOOPS:  # what goes round is fed after a turn
            first, count = self._carried(eqn)
            fed[first : first + count] = [True] * count
        self.enter(invars, fed[: len(invars)])

    def blocks(self) -> dict[int, Written]:
        """`found`, by the blocks that all ties have led to."""
        block, blocks = self._ledger.block, self._ledger.blocks
        return {block(blocks[key]): written for key, written in self.found.items()}

    def _carried(self, eqn: Equation) -> tuple[int, int]:
        if eqn.primitive.name == "scan":
            return scan_counts(eqn.params)
        first = eqn.params["body_nconsts"]
        return first, len(eqn.outvars)

    def leave(self, eqn: Equation) -> None:
        """The results of an equation."""
        fed = any(map(self.is_fed, eqn.invars))
        self._fed.update(dict.fromkeys(eqn.outvars, fed))

    def is_fed(self, var: Atom) -> bool:
        """Does this variable depend on an input that is no parameter?"""
        return not isinstance(var, Literal) and self._fed.get(var, False)

    def is_layered(self, axis: Axis) -> bool:
        """Is it the axis of stacked layers that may go one by one?"""
        return not isinstance(axis, int) and id(axis[0].units) in self._layers

    def keep_one(self, solution: Solution) -> bool:
        """Where a stream cannot be cut, one of two first writers is kept whole.

        If all that writes to an output were cut alike, masks would not say whether the
        output loses these positions or holds 0 there. Is anything kept by this?
        """
        kept = False
        for (first, _), stream in self._sums.items():
            units = [] if isinstance(stream, int) else [stream[0].units]
            for why in [solution.why[solution.classes[each]] for each in units]:
                held = why != NEVER
                if held.any():
                    own = self.found[first].own[held]
                    self._ledger.freezes.append((own, int(why[held][0])))
                    kept = True
        return kept

    # -- sums

    def sums(self, eqn: Equation) -> bool:
        """Is this a sum of two values that depend on inputs?"""
        return eqn.primitive.name in SUMS and all(map(self.is_fed, eqn.invars))

    def join(self, eqn: Equation, a: Axis, b: Axis) -> Axis | None:
        """The labels of a sum along an axis; None where both are to be tied."""
        if isinstance(a, int) and isinstance(b, int):
            return None
        first, second = self._free_block(eqn, a), self._free_block(eqn, b)
        if first == second or same_units(a, b):  # also where none is free
            return None
        if first >= 0 and second >= 0:
            stream = self._sums.get((first, second))
            if stream is None:
                size = len(a[0].units) if not isinstance(a, int) else 0
                stream = (Column(self._ledger.fresh(size), True),)
                self._sums[first, second] = stream
            self._write(first, a, stream, (eqn, 0))
            self._write(second, b, stream, (eqn, 1))
            return stream
        block, writer, stream = (first, a, b) if first >= 0 else (second, b, a)
        if not isinstance(stream, int) and (
            len(stream) != 1 or self._ledger.block(stream[0].units) == block
        ):
            return None  # it is tied to the stream already, as a scale of it is
        self._write(block, writer, stream, (eqn, 0 if first >= 0 else 1))
        return stream

    def _free_block(self, eqn: Equation, axis: Axis) -> int:
        """The block of a writer that may have units of its own; -1 if it is none."""
        if isinstance(axis, int) or len(axis) != 1:
            return -1
        units, zero = axis[0]
        if id(units) not in self._leaves:  # a sum already, that readers are tied to
            return -1
        block = self._ledger.block(units)
        if block < 0 or block not in map(self._ledger.block, self._free):
            return -1
        if zero is True or (zero is not False and np.all(zero)):
            return block
        self.refused.setdefault(block, self._ledger.reason("writer_not_zero", eqn))
        return -1

    def _write(
        self, block: int, writer: Any, stream: Axis, place: tuple[Any, int]
    ) -> None:
        self.places[block] = place
        if isinstance(stream, int):  # it cannot be cut; the writer can
            self.found.setdefault(block, Written(writer[0].units, stream))
            return
        if block not in self.found:
            own = self._ledger.fresh(len(writer[0].units))
            self.found[block] = Written(own, stream)
        matrix = np.stack([stream[0].units, self.found[block].own], axis=1)
        self._ledger.definitions.append((writer[0].units, matrix))


class Labelled:
    """The writers of a walk whose parameters carry the labels of groups.

    A writer has those of its stream and its own, and a sum those that both sides have.
    """

    def is_layered(self, axis: Axis) -> bool:
        """Is it the axis of stacked layers that may go? The groups say so."""
        return not isinstance(axis, int)

    def enter_inner(self, eqn: Equation, invars: Sequence[Atom]) -> None:
        """Nothing has to be known of inputs."""

    def leave(self, eqn: Equation) -> None:
        """Nothing has to be known of results."""

    def sums(self, eqn: Equation) -> bool:
        """Is this a sum?"""
        return eqn.primitive.name in SUMS

    def join(self, eqn: Equation, a: Axis, b: Axis) -> Axis | None:
        """See `Writers.join`."""
        if isinstance(a, int) or isinstance(b, int):
            return a if isinstance(a, int) else b
        shared = tuple([x for x in a if any(_same(x, y) for y in b)])
        if len(shared) == len(a) == len(b) or not shared:
            return None
        return shared


def _same(x: Column, y: Column) -> bool:
    return x.units is y.units or np.array_equal(x.units, y.units)
