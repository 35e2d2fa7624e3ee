"""Follows kernels through a program to the contractions that read them."""

import abc
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.program._interpret import CALLS, REMATS, inner_jaxprs, interpret
from jaxprune.program._jaxprs import (
    Program,
    live_equations,
    opened,
    scan_counts,
    source_line,
    variable_path,
)
from jaxprune.program._types import Atom, Equation, Jaxpr
from jaxprune.program.primitives import declaration
from jaxprune.statistics._layout import can_read
from jaxprune.statistics._moved import moved


class Held(NamedTuple):
    """A kernel, or one layer of it.

    Attributes:
        path: of the leaf.
        shape: of the layer.
        at: positions in the layer, as an array of what the program made of it.
        lead: sizes of the axes that scans have taken apart.
        atoms: both factors, where the program is written anew.
    """

    path: str
    shape: tuple[int, ...]
    at: np.ndarray
    lead: tuple[int, ...] = ()
    atoms: tuple[Atom, ...] = ()

    @property
    def whole(self) -> bool:
        """Is every position where it was?"""
        in_order = np.arange(self.at.size, dtype=self.at.dtype)
        return self.at.shape == self.shape and np.array_equal(self.at.ravel(), in_order)

    @property
    def complete(self) -> bool:
        """Is every position there, once?"""
        seen = np.zeros(math.prod(self.shape), bool)
        seen[self.at] = True
        return self.at.size == seen.size and bool(seen.all())

    def layer(self) -> "Held":
        """What one step of a scan reads."""
        count, *shape = self.shape
        return held(self.path, tuple(shape), (*self.lead, count))


def held(path: str, shape: tuple[int, ...], lead: tuple[int, ...] = ()) -> Held:
    """A kernel as it is."""
    size = math.prod(shape)
    small = np.int32 if size < 2**31 else np.int64
    return Held(path, shape, np.arange(size, dtype=small).reshape(shape), lead)


class Use(NamedTuple):
    """A contraction that reads a kernel.

    Attributes:
        eqn: the equation.
        operand: which of its operands the kernel is.
        at: positions in the kernel, or in a layer of it, as the equation reads it.
        lead: sizes of the axes that scans take apart.
        steps: how often the equation runs.
    """

    eqn: Equation
    operand: int
    at: np.ndarray
    lead: tuple[int, ...]
    steps: int


class Follower(abc.ABC):
    """Carries kernels through the equations of a program; other values pass by."""

    def run(self, jaxpr: Jaxpr, ins: Sequence[Any]) -> list[Any]:
        """The results of a program."""
        jaxpr, consts = opened(jaxpr)
        arrays = dict(zip(jaxpr.constvars, consts, strict=True))

        def step(number: int, eqn: Equation, values: list[Any]) -> Sequence[Any]:
            del number
            return self.equation(eqn, values)

        def constant(var: Any) -> Any:
            return self.constant(var, arrays)

        return interpret(jaxpr, ins, step, constant, live_equations(jaxpr))

    def equation(self, eqn: Equation, values: list[Any]) -> Sequence[Any]:
        """The results of an equation."""
        where = [k for k, value in enumerate(values) if isinstance(value, Held)]
        if not where:
            return self.other(eqn, values)
        name = eqn.primitive.name
        if name in CALLS:
            return self.run(inner_jaxprs(eqn)[0], values)
        if name in REMATS:
            return self.remat(eqn, values)
        if name == "scan":
            return self._scan(eqn, values)
        own: Held = values[where[0]]
        if len(where) == 1 and _is_contraction(eqn, where[0]):
            if not own.complete:
                return self._refused(eqn, values, "read in part or repeatedly by")
            return self.product(eqn, where[0], own, values[1 - where[0]])
        outs = moved(eqn, own.at) if where == [0] else None
        if outs is not None and len(outs) == 1 and name != "reduce_precision":
            return [self.move(eqn, own, outs[0])]
        return self._refused(eqn, values, "read by")

    def _scan(self, eqn: Equation, values: list[Any]) -> Sequence[Any]:
        consts, carries = scan_counts(eqn.params)
        carry, stacked = values[consts : consts + carries], values[consts + carries :]
        if any(isinstance(value, Held) for value in carry):
            return self._refused(eqn, carry, "carried by")
        if any(isinstance(value, Held) and not value.whole for value in stacked):
            return self._refused(eqn, stacked, "moved before it is read by")
        return self.scan(eqn, values, consts, carries)

    def _refused(self, eqn: Equation, values: Sequence[Any], how: str) -> list[Any]:
        line = source_line(eqn)
        why = f"{how} {eqn.primitive.name}" + (f" at {line}" if line else "")
        for value in values:
            if isinstance(value, Held):
                self.refuse(value.path, why)
        return [None] * len(eqn.outvars)

    def leave(self, outs: Sequence[Any], by: str) -> None:
        """Refuses kernels among the results of a program."""
        for value in outs:
            if isinstance(value, Held):
                self.refuse(value.path, f"returned by {by}")

    @abc.abstractmethod
    def constant(self, var: Any, arrays: dict[Any, Any]) -> Any: ...
    @abc.abstractmethod
    def other(self, eqn: Equation, values: list[Any]) -> Sequence[Any]: ...
    @abc.abstractmethod
    def move(self, eqn: Equation, own: Held, at: np.ndarray) -> Held: ...
    @abc.abstractmethod
    def product(
        self, eqn: Equation, operand: int, own: Held, other: Any
    ) -> Sequence[Any]: ...
    @abc.abstractmethod
    def remat(self, eqn: Equation, values: list[Any]) -> Sequence[Any]: ...
    @abc.abstractmethod
    def scan(
        self, eqn: Equation, values: list[Any], consts: int, carries: int
    ) -> Sequence[Any]: ...
    @abc.abstractmethod
    def refuse(self, path: str, why: str) -> None: ...


def _is_contraction(eqn: Equation, operand: int) -> bool:
    known = declaration(eqn)
    product = known is not None and known.is_product and len(eqn.invars) == 2
    if not product or not can_read(eqn, operand):
        return False
    return eqn.params.get("out_sharding") is None


class Uses(Follower):
    """Finds the contractions that read each leaf.

    Attributes:
        uses: path -> the contractions that read the leaf, in order.
        others: path -> what else reads it.
        shapes: path -> shape of every leaf.
    """

    def __init__(self, program: Program) -> None:
        self.uses: dict[str, list[Use]] = {}
        self.others: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._steps = 1
        ins: list[Any] = []
        for path, var in zip(program.paths, program.jaxpr.invars, strict=True):
            own = variable_path(path)
            if own is not None:
                self.shapes[own] = var.aval.shape
            ins.append(None if own is None else held(own, var.aval.shape))
        self.leave(self.run(program.closed, ins), "the function")

    def constant(self, var: Any, arrays: dict[Any, Any]) -> None:
        return None

    def other(self, eqn: Equation, values: list[Any]) -> list[None]:
        return [None] * len(eqn.outvars)

    def move(self, eqn: Equation, own: Held, at: np.ndarray) -> Held:
        return own._replace(at=at)

    def product(self, eqn: Equation, operand: int, own: Held, other: Any) -> list[None]:
        use = Use(eqn, operand, own.at, own.lead, self._steps)
        self.uses.setdefault(own.path, []).append(use)
        return [None]

    def remat(self, eqn: Equation, values: list[Any]) -> list[Any]:
        outs = self.run(inner_jaxprs(eqn)[0], values)
        self.leave(outs, eqn.primitive.name)
        return [None] * len(outs)

    def scan(
        self, eqn: Equation, values: list[Any], consts: int, carries: int
    ) -> list[None]:
        before, self._steps = self._steps, self._steps * eqn.params["length"]
        ins = [
            value.layer()
            if isinstance(value, Held) and k >= consts + carries
            else value
            for k, value in enumerate(values)
        ]
        self.leave(self.run(inner_jaxprs(eqn)[0], ins), eqn.primitive.name)
        self._steps = before
        return [None] * len(eqn.outvars)

    def refuse(self, path: str, why: str) -> None:
        self.others.setdefault(path, why)
