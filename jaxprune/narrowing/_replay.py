"""What stays of a walked program when dead units are gone, and how it runs."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun

from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.coupling._labels import Axis, Column, Value, all_zero
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._solve import solve
from jaxprune.coupling._walk import Step, Walked, walk_program
from jaxprune.narrowing._build import build
from jaxprune.narrowing._decide import Alive, decide, narrower, refused_writer
from jaxprune.program._closures import closes_over_tracers
from jaxprune.program._jaxprs import Program, abstract, call, trace_program
from jaxprune.program._types import Atom, Jaxpr


class Part(NamedTuple):
    """What a program is told of an input that may be cut.

    Attributes:
        alive: which positions of every axis live.
        zero: for every axis, is the value 0 at its dead positions?
    """

    alive: list[Alive]
    zero: tuple[bool, ...]


Given: TypeAlias = Part | Value  # the value itself, if it is data


class Kept:
    """What stays of every value of a walked program.

    The rules' `narrow` halves see the program through this object alone.

    Attributes:
        counts_removed: do reductions count what the masked program holds at the dead
            positions?
    """

    def __init__(self, alive_units: np.ndarray, counts_removed: bool = True) -> None:
        self.counts_removed = counts_removed
        self._alive = alive_units
        # By id, together with what has this id, so that it stays its own.
        self._lines: dict[int, tuple[Any, Alive, int]] = {}
        self._shapes: dict[Any, tuple[Any, tuple[int, ...]]] = {}
        self._programs: dict[int, tuple[Walked, Any]] = {}

    def mask(self, axis: Axis) -> Alive:
        """Which positions of an axis live; None if all do."""
        return None if isinstance(axis, int) else self._line(axis)[0]

    def _line(self, axis: tuple[Column, ...]) -> tuple[Alive, int]:
        """`mask` of an axis that may be cut, and how many of its positions live."""
        labels = axis[0].units if len(axis) == 1 else axis
        found = self._lines.get(id(labels))
        if found is None:
            alive = np.logical_and.reduce([self._alive[c.units] for c in axis])
            count = int(np.count_nonzero(alive))
            mask = None if count == len(alive) else alive
            found = self._lines[id(labels)] = labels, mask, count
        return found[1:]

    def positions(self, axis: Axis) -> np.ndarray | None:
        """The living positions of an axis; None if all are."""
        alive = self.mask(axis)
        return None if alive is None else np.flatnonzero(alive)

    def given(self, value: Value) -> Given:
        """What a program that takes this value is told of it."""
        if value.data:
            return value
        zero = tuple([value.is_zero or all_zero(axis) for axis in value.axes])
        return Part([self.mask(axis) for axis in value.axes], zero)

    def shape(self, value: Value) -> tuple[int, ...]:
        """The size of a value when dead positions are gone."""
        key = id(value.axes), value.shape
        found = self._shapes.get(key)
        if found is None:
            axes = zip(value.shape, value.axes, strict=True)
            sizes = [n if isinstance(a, int) else self._line(a)[1] for n, a in axes]
            found = self._shapes[key] = value.axes, tuple(sizes)
        return found[1]

    def cut(self, x: jax.Array, value: Value) -> jax.Array:
        """Drops the dead positions of an array of full size."""
        for d, axis in enumerate(value.axes):
            positions = self.positions(axis)
            if positions is None:
                continue
            if d in value.uniform:
                x = lax.slice_in_dim(x, 0, len(positions), axis=d)
            else:
                x = take_positions(x, positions, d)
        return x

    def take(self, x: jax.Array, positions: np.ndarray, d: int) -> jax.Array:
        """``x`` at these positions of axis `d`; a slice wherever that does it."""
        return take_positions(x, positions, d)

    def dies(self, value: Value, d: int) -> bool:
        """Is any position of this axis dead?"""
        return self.shape(value)[d] < value.shape[d]

    def size(self, value: Value) -> int:
        """How many entries a value has when dead positions are gone."""
        return math.prod(self.shape(value))

    def spread(self, x: jax.Array, value: Value, out: Value) -> Any:
        """`x` at the positions that `out` keeps: 0 where `value` is dead there."""
        for d, (axis, whole) in enumerate(zip(value.axes, out.axes, strict=True)):
            own, every = self.mask(axis), self.mask(whole)
            if own is None or (every is not None and np.array_equal(own, every)):
                continue
            places = np.flatnonzero(own if every is None else own[every])
            size = len(own) if every is None else int(np.count_nonzero(every))
            x = spread_positions(x, places, d, size)
        return x

    def touches(self, *values: Value) -> bool:
        """Is any axis of these values cut?"""
        for value in values:  # noqa: SIM110, the innermost loop of all
            if self.shape(value) != value.shape:
                return True
        return False

    def cuts_inside(self, step: Step) -> bool:
        """Is anything cut in the inner programs of a step?"""
        return any(
            self.touches(*inner.ins, *inner.outs) or self.cuts_inside(inner)
            for sub in step.subs
            for inner in sub.steps
        )

    def program(self, walked: Walked) -> Any:
        """What remains of a program, as a closed jaxpr."""
        found = self._programs.get(id(walked))
        if found is None:
            found = self._programs[id(walked)] = walked, build(self, walked)
        return found[1]

    def replay(self, walked: Walked, args: Sequence[object]) -> list[Atom]:
        """Evaluates what remains of a program, one equation after another."""
        return jaxpr_as_fun(self.program(walked))(*args)

    def narrow_jaxpr(self, jaxpr: Jaxpr, given: Sequence[Given]) -> Any:
        """What remains of a closed jaxpr of whose inputs this is `given`."""
        paths = [f"input {k}" for k in range(len(given))]
        program = Program(jaxpr, paths, [], None)
        run = restrict(program, given, counts_removed=self.counts_removed)
        return run.kept.program(run.walked)

    def narrow_call(
        self, fn: ApplyFn, avals: Any, given: Sequence[Given]
    ) -> "Restricted":
        """`fn(*avals)`, traced at full size, for inputs of which this is `given`."""
        program = trace_program(fn, *avals)
        return restrict(program, given, counts_removed=self.counts_removed)


def spread_positions(x: jax.Array, places: np.ndarray, d: int, size: int) -> Any:
    """An axis of `size` with `x` at these places, 0 elsewhere; padding does mostly."""
    steps = np.unique(np.diff(places))
    zero = np.zeros((), x.dtype)
    if len(steps) <= 1:
        # Evenly spaced places are interior padding; only others need a gather.
        step = int(steps[0]) if len(steps) else 1
        rest = size - 1 - int(places[-1])
        config = [(0, 0, 0)] * x.ndim
        config[d] = (int(places[0]), rest, step - 1)
        return lax.pad(x, zero, config)
    # An index out of range reads `fill_value`: 0 where nothing is placed.
    source = np.full(size, len(places))
    source[places] = np.arange(len(places))
    return jnp.take(x, source, axis=d, mode="fill", fill_value=0)


def take_positions(x: jax.Array, positions: np.ndarray, d: int) -> jax.Array:
    """``x`` at some positions of axis `d`; a slice where they are evenly spaced."""
    steps = np.unique(np.diff(positions))
    if len(positions) == 0:
        return lax.slice_in_dim(x, 0, 0, axis=d)
    if len(steps) == 0 or (len(steps) == 1 and steps[0] > 0):
        stride = int(steps[0]) if len(steps) else 1
        stop = int(positions[-1]) + 1
        return lax.slice_in_dim(x, int(positions[0]), stop, stride, axis=d)
    if isinstance(x, Tracer):
        return jnp.take(x, positions, axis=d, mode="clip")
    with jax.ensure_compile_time_eval():  # a constant stays one
        return jnp.take(x, positions, axis=d, mode="clip")


@dataclasses.dataclass(frozen=True, eq=False)
class Restricted:
    """A program ready to run on smaller inputs; call it like the function traced."""

    program: Program
    walked: Walked
    kept: Kept

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:
        """Runs on arguments of the structure that was traced."""
        return self.flat(jax.tree.leaves((args, kwargs)))

    def flat(self, arrays: Sequence[jax.Array]) -> PyTree:
        """Runs on the array leaves of the arguments."""
        pairs = zip(arrays, self.walked.ins, strict=True)
        operands = [self._operand(x, value) for x, value in pairs]
        if self.lasting:
            outs = call(self.kept.program(self.walked), operands)
        else:  # what holds tracers is no program that jit may keep
            outs = self.kept.replay(self.walked, operands)
        return jax.tree.unflatten(self.program.out_tree, outs)

    @functools.cached_property
    def lasting(self) -> bool:
        """May it be kept, and jitted? Not if it is part of a trace that goes on."""
        program = self.program
        return program.lasting and not closes_over_tracers(program.closed)

    def _operand(self, x: jax.Array, value: Value) -> jax.Array:
        if 0 in np.shape(x):  # its other axes follow whatever they are coupled to
            return jnp.zeros(self.kept.shape(value), x.dtype)
        return x if isinstance(x, jax.Array) else jnp.asarray(x)

    @property
    def out_given(self) -> list[Given]:
        """What a program that takes the output leaves is told of them."""
        return [self.kept.given(value) for value in self.walked.outs]

    @property
    def out_shapes(self) -> Any:
        """Full shapes of the outputs, as a tree."""
        leaves = [abstract(v.aval) for v in self.program.jaxpr.outvars]
        return jax.tree.unflatten(self.program.out_tree, leaves)


def restrict(
    program: Program,
    given: Sequence[Given],
    names: Sequence[str] | None = None,
    *,
    counts_removed: bool = True,
) -> Restricted:
    """Decides every unit of a program from the living positions of its inputs.

    Args:
        program: the traced program.
        given: for the first input leaves what is known of each; nothing of the others
            is cut.
        names: how to call the input leaves in error messages.
        counts_removed: see `Kept`.

    Raises:
        ValueError: if two coupled axes disagree, or a pinned position is cut.
    """
    known = {k: each for k, each in enumerate(given) if isinstance(each, Value)}
    zero = {k: each.zero for k, each in enumerate(given) if isinstance(each, Part)}
    ledger, walked = walk_program(program, len(given), known, zero)
    names = names or [f"input {k}" for k in range(len(given))]
    masks = [[] if isinstance(each, Value) else each.alive for each in given]
    solution = solve(ledger)
    try:
        alive_units = decide(ledger, solution, walked, names, masks)
    except ValueError as disagreement:
        # Perhaps writers of a stream lose units that the stream keeps, or scans layers.
        free = narrower(solution, walked, masks)
        ledger, walked = walk_program(program, len(given), known, zero, free, free)
        alive_units = _with_writers(ledger, walked, names, masks, disagreement)
    return Restricted(program, walked, Kept(alive_units, counts_removed))


def _with_writers(
    ledger: Ledger,
    walked: Walked,
    names: Sequence[str],
    masks: Sequence[Sequence[Alive]],
    disagreement: ValueError,
) -> np.ndarray:
    """Which units live where writers have units of their own."""
    writers = walked.writers
    try:
        return decide(ledger, solve(ledger), walked, names, masks)
    except ValueError:
        if writers is not None and writers.refused:
            disagreement = refused_writer(ledger, writers, walked, names)
        raise disagreement from None
