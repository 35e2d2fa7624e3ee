"""Residual branches: what only one writer of a stream needs.

Everything that reaches the outputs through one operand of one sum is computed for that
operand alone. If its writer is gone, so may all of it be: the groups that stand on the
leaves which nothing else reads. What is left is the other operand, the shortcut.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from jax.extend.core import DropVar, Literal

from jaxprune.core._group_labels import layer_of
from jaxprune.core._groups import Group
from jaxprune.coupling._walk import Step, Walked
from jaxprune.program._interpret import CALLS, REMATS

Uses: TypeAlias = set[tuple[int, int]]  # (id of an equation, operand)


class Branch(NamedTuple):
    """A residual branch.

    Attributes:
        groups: the names of the groups that it consists of.
        eqn: the sum that it goes into.
        operand: as which operand.
    """

    groups: tuple[str, ...]
    eqn: Any
    operand: int


def find_branches(
    walked: Walked,
    names: Sequence[str],
    twins: Sequence[int | None],
    groups: Mapping[str, Group],
) -> dict[str, Branch]:
    """The branches of a program, by their names.

    Args:
        walked: the program, whose writers have units of their own.
        names: paths of the leaves, which are its first inputs.
        twins: for every output the number of the leaf it is the new value of.
        groups: the groups; those of writers know their stream.
    """
    found: dict[str, Branch] = {}
    outs = zip(walked.jaxpr.outvars, twins, strict=True)
    state = {var for var, twin in outs if twin is not None}
    assert walked.writers is not None
    for eqn, operand in walked.writers.places.values():
        inputs = _inputs_alone(walked, eqn, operand, state) or ()
        leaves = {names[k] for k in inputs if k < len(names)}
        own = [
            name
            for name, group in groups.items()
            if all(member.path in leaves for member in group.members)
        ]
        writers = [name for name in own if groups[name].stream]
        if writers:
            found[_name(groups, own, found)] = Branch(tuple(own), eqn, operand)
    return found


def _name(
    groups: Mapping[str, Group], own: Sequence[str], taken: Collection[str]
) -> str:
    """What the layers of a branch have in common, but for what all have.

    If that is nothing, the first of them.
    """
    layers, every = _layers(groups, own), _layers(groups, groups)
    shared = _common(layers)
    short = len(shared) <= len(_common(every)) and len(every) > len(layers)
    name = "/".join(layers[0] if short else shared) or own[0].rpartition(":")[0]
    count = 1 + sum(other.partition("#")[0] == name for other in taken)
    return name if count == 1 else f"{name}#{count}"


def _layers(
    groups: Mapping[str, Group], names: Collection[str]
) -> list[tuple[str, ...]]:
    return [layer_of(m.path)[0] for name in names for m in groups[name].members]


def _common(layers: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    steps = itertools.takewhile(
        lambda parts: len(set(parts)) == 1, zip(*layers, strict=False)
    )
    return tuple(parts[0] for parts in steps)


def _inputs_alone(
    walked: Walked, eqn: object, operand: int, state: Collection[object] = ()
) -> set[int] | None:
    """The inputs of a program that only this operand needs; None if it is not here."""
    for step in walked.steps:
        if step.eqn is eqn:
            return _needed_only_by(walked, {(id(eqn), operand)}, state)
        for sub in step.subs:
            inner = _inputs_alone(sub, eqn, operand)
            if inner is not None:
                shift = len(step.eqn.invars) - len(sub.jaxpr.invars)
                uses = {(id(step.eqn), k + shift) for k in inner}
                return _needed_only_by(walked, uses, state)
    return None


def _needed_only_by(walked: Walked, uses: Uses, state: Collection[object]) -> set[int]:
    """The inputs of a program that only these uses need.

    Args:
        walked: the program.
        uses: what they need directly, as (id of an equation, operand).
        state: outputs that do not count: new values of variables.
    """
    other = Counter(
        var
        for var in walked.jaxpr.outvars
        if not isinstance(var, Literal) and var not in state
    )
    read: set[Any] = set(state)
    for step in reversed(walked.steps):
        outs = [var for var in step.eqn.outvars if not isinstance(var, DropVar)]
        alone = (
            bool(outs)
            and not any(other[var] for var in outs)
            and any(var in read for var in outs)
        )
        unread = _unread(step)
        for k, var in enumerate(step.eqn.invars):
            if isinstance(var, Literal) or k in unread:
                continue
            if alone or (id(step.eqn), k) in uses:
                read.add(var)
            else:
                other[var] += 1
    return {
        k for k, var in enumerate(walked.jaxpr.invars) if var in read and not other[var]
    }


def _unread(step: Step) -> set[int]:
    """The operands of a call that its program does not read: whole trees are given."""
    if step.eqn.primitive.name not in CALLS | REMATS or len(step.subs) != 1:
        return set()
    jaxpr = step.subs[0].jaxpr
    reads = {
        var for eqn in jaxpr.eqns for var in eqn.invars if not isinstance(var, Literal)
    }
    reads |= {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    shift = len(step.eqn.invars) - len(jaxpr.invars)
    return {shift + k for k, var in enumerate(jaxpr.invars) if var not in reads}
