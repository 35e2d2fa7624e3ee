"""Runs a walked program at the sizes that remain when dead units are gone."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import Literal

from jaxprune.coupling.jaxprs import Program, abstract, bind, trace_program
from jaxprune.coupling.labels import Axis, Value
from jaxprune.coupling.ledger import Ledger
from jaxprune.coupling.registry import RULES
from jaxprune.coupling.solve import NEVER, NONE, Solution, solve
from jaxprune.coupling.walk import Step, Walk, Walked

Alive = np.ndarray | None  # bool[n] for one axis; None = every position lives
SILENT = np.zeros(0, bool)  # in place of a mask: follow the axes it is coupled to


class Kept:
    """What stays of every value of a walked program.

    The rules' `narrow` halves see the program through this object alone.
    """

    def __init__(self, alive_units: np.ndarray) -> None:
        self._alive = alive_units
        self._seen: dict[int, tuple[Axis, Alive]] = {}

    def mask(self, axis: Axis) -> Alive:
        """Which positions of an axis live; None if all do."""
        if isinstance(axis, int):
            return None
        if id(axis) not in self._seen:
            alive = np.logical_and.reduce([self._alive[c.units] for c in axis])
            self._seen[id(axis)] = (axis, None if alive.all() else alive)
        return self._seen[id(axis)][1]

    def positions(self, axis: Axis) -> np.ndarray | None:
        """The living positions of an axis; None if all are."""
        alive = self.mask(axis)
        return None if alive is None else np.flatnonzero(alive)

    def alive(self, value: Value) -> list[Alive]:
        """`mask` of every axis."""
        return [self.mask(axis) for axis in value.axes]

    def shape(self, value: Value) -> tuple[int, ...]:
        """The size of a value when dead positions are gone."""
        masks = zip(self.alive(value), value.shape, strict=True)
        return tuple(n if alive is None else int(alive.sum()) for alive, n in masks)

    def cut(self, x: Any, value: Value) -> Any:
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

    def take(self, x: Any, positions: np.ndarray, d: int) -> Any:
        """``x`` at these positions of axis `d`; a slice wherever that does it."""
        return take_positions(x, positions, d)

    def touches(self, *values: Value) -> bool:
        """Is any axis of these values cut?"""
        return any(
            axis.__class__ is not int and self.mask(axis) is not None
            for value in values
            for axis in value.axes
        )

    def replay(self, walked: Walked, args: Sequence[Any]) -> list[Any]:
        """Evaluates a walked program on operands without dead positions."""
        env: dict[Any, Any] = dict(zip(walked.jaxpr.invars, args, strict=True))
        env.update(zip(walked.jaxpr.constvars, walked.consts, strict=True))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, Literal) else env[var]

        for step in walked.steps:
            operands = [
                self.cut(read(var), value) if value.data else read(var)
                for var, value in zip(step.eqn.invars, step.ins, strict=True)
            ]
            outs = self._run(step, operands)
            env.update(zip(step.eqn.outvars, outs, strict=True))
        return [
            (self.cut(read(v), value) if value.data else read(v))
            if isinstance(v, Literal) or v in env
            else None
            for v, value in zip(walked.jaxpr.outvars, walked.outs, strict=True)
        ]

    def _run(self, step: Step, operands: list[Any]) -> list[Any]:
        eqn = step.eqn
        if not self.touches(*step.ins, *step.outs) and not self._inside(step):
            return bind(eqn, *operands)
        shapes = [self.shape(value) for value in step.outs]
        if shapes and all(0 in shape for shape in shapes):
            return [
                jnp.zeros(shape, v.aval.dtype)
                for shape, v in zip(shapes, eqn.outvars, strict=True)
            ]
        narrow = RULES[eqn.primitive.name].narrow
        if narrow is None:
            return bind(eqn, *operands)
        outs = narrow(self, step, *operands)
        return list(outs) if isinstance(outs, (list, tuple)) else [outs]

    def _inside(self, step: Step) -> bool:
        """Is anything cut in the inner programs of a step?"""
        return any(
            self.touches(*inner.ins, *inner.outs) or self._inside(inner)
            for sub in step.subs
            for inner in sub.steps
        )

    def narrow_call(
        self, fn: Callable[..., Any], avals: Any, alive: Sequence[list[Alive]]
    ) -> "Restricted":
        """`fn(*avals)`, traced at full size, for inputs of which `alive` stay."""
        program = trace_program(fn, *avals)
        return restrict(program, alive)


def take_positions(x: Any, positions: np.ndarray, d: int) -> Any:
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs on arguments of the structure that was traced."""
        return self.flat(jax.tree.leaves((args, kwargs)))

    def flat(self, arrays: Sequence[Any]) -> Any:
        """Runs on the array leaves of the arguments."""
        arrays = [
            jnp.zeros(self.kept.shape(value), x.dtype) if 0 in x.shape else x
            for x, value in zip(arrays, self.walked.ins, strict=True)
        ]
        outs = self.kept.replay(self.walked, arrays)
        return jax.tree.unflatten(self.program.out_tree, outs)

    @property
    def out_alive(self) -> list[list[Alive]]:
        """Which positions of every output leaf live."""
        return [self.kept.alive(value) for value in self.walked.outs]

    @property
    def out_shapes(self) -> Any:
        """Full shapes of the outputs, as a tree."""
        leaves = [abstract(v.aval) for v in self.program.jaxpr.outvars]
        return jax.tree.unflatten(self.program.out_tree, leaves)


def restrict(
    program: Program, alive: Sequence[list[Alive]], names: Sequence[str] | None = None
) -> Restricted:
    """Decides every unit of a program from the living positions of its inputs.

    Args:
        program: the traced program.
        alive: for every input leaf, which positions of each axis live.
        names: how to call the input leaves in error messages.

    Raises:
        ValueError: if two coupled axes disagree, or a pinned position is cut.
    """
    ledger = Ledger()
    inputs = [
        Value(v.aval.shape, tuple(ledger.fresh_axis(n) for n in v.aval.shape))
        for v in program.jaxpr.invars
    ]
    walked = Walk(ledger).run(program.closed, inputs)
    solution = solve(ledger)
    decide = _Decisions(ledger, solution)
    for k, (value, masks) in enumerate(zip(inputs, alive, strict=True)):
        name = names[k] if names else f"input {k}"
        for d, (axis, mask) in enumerate(zip(value.axes, masks, strict=True)):
            if mask is not SILENT:
                decide.add(f"{name} axis {d}", axis, mask)
    return Restricted(program, walked, Kept(decide.settle()))


class _Told(NamedTuple):
    """What the mask of one axis says."""

    name: str
    units: np.ndarray
    keep: np.ndarray
    columns: list[np.ndarray]  # the classes that decide each position, see `atoms`


class _Decisions:
    """Collects what the masks say about every class, and checks that they agree.

    A position that is kept keeps every class that it needs; one that is cut only says
    that some class is dead, which may be another than the one in question. So a class
    lives if any kept position needs it, and dies if only cut positions do.
    """

    def __init__(self, ledger: Ledger, solution: Solution) -> None:
        self.ledger, self.solution = ledger, solution
        self.axes: list[_Told] = []
        self.seen = np.zeros(len(solution.why), bool)
        self.kept_by = np.full(len(solution.why), NONE)  # number of an axis

    def add(self, name: str, axis: Axis, mask: Alive) -> None:
        """Takes in the mask of one axis."""
        if isinstance(axis, int):
            if mask is not None and not mask.all():
                self._refuse(name, mask, axis)
            return
        units = axis[0].units
        keep = np.ones(len(units), bool) if mask is None else mask
        told = _Told(name, units, keep, self.solution.atoms(units))
        for column in told.columns:
            rows = column >= 0
            self.seen[column[rows]] = True
            self.kept_by[column[rows & keep]] = len(self.axes)
        self.axes.append(told)

    def settle(self) -> np.ndarray:
        """For every unit: does it live?"""
        alive = (self.kept_by != NONE) | ~self.seen
        for told in self.axes:
            implied = np.ones(len(told.units), bool)
            for column in told.columns:
                implied &= np.where(column >= 0, alive[column], True)
            wrong = np.flatnonzero(implied != told.keep)
            if len(wrong):
                self._explain_mismatch(told, wrong)
        return self._all_units(alive)

    def _explain_mismatch(self, told: _Told, wrong: np.ndarray) -> None:
        why = self.solution.why[self.solution.classes[told.units[wrong]]]
        frozen = why != NEVER
        if frozen.any():
            self._refuse(told.name, told.keep, int(why[frozen][0]))
        classes = told.columns[0][wrong]
        if len(told.columns) == 1:
            other = self.axes[self.kept_by[classes[0]]]
            raise ValueError(
                f"{told.name} and {other.name} are coupled but the masks keep "
                f"{int(told.keep.sum())} positions of one and {int(other.keep.sum())} "
                f"of the other (or not the same ones): {len(np.unique(classes))} units "
                "are kept in one and cut in the other; build masks with expand_masks"
            )
        raise ValueError(
            f"{told.name}: the kept positions {np.flatnonzero(told.keep)[:8].tolist()}"
            "... do not form a product of its factors (heads x features, groups x "
            "channels), so no smaller program computes them; cut whole units of its "
            "groups"
        )

    def _refuse(self, name: str, mask: np.ndarray, why: int) -> None:
        from jaxprune.coupling.collect import explain

        raise ValueError(
            f"{name}: the mask cuts {int((~mask).sum())} of {len(mask)} positions, "
            f"but this axis cannot be cut: {explain(self.ledger, why)}"
        )

    def _all_units(self, alive: np.ndarray) -> np.ndarray:
        """From classes to units; a conjunction lives if all of its factors do."""
        factors = self.solution.factors
        rows = np.flatnonzero(factors[:, 0] >= 0)
        before = None
        while before is None or (alive[rows] != before).any():
            before = alive[rows]
            inner = np.where(factors[rows] >= 0, alive[factors[rows]], True)
            alive[rows] = inner.all(axis=1)
        return alive[self.solution.classes]
