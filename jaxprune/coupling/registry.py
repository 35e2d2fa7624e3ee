"""One rule per primitive.

A rule has two halves. `label` moves labels from the operands to the results of an
equation and ties those that must live or die together. `narrow` runs the equation on
operands whose dead positions are gone; without it the equation is run as it stands,
which is right for every primitive whose parameters name no sizes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.extend.core import Primitive


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """How one primitive moves labels, and how it runs on smaller operands.

    Attributes:
        label: ``(walk, eqn, *values) -> Value or list of Value``.
        narrow: ``(kept, step, *arrays) -> array or list of arrays``, or None.
        whole: ``eqn -> n``; the first n operands may be data without labels, because
            the rule only hands them on to inner programs.
    """

    label: Callable[..., Any]
    narrow: Callable[..., Any] | None = None
    whole: Callable[[Any], int] = lambda eqn: 0


RULES: dict[str, Rule] = {}


def register_rule(
    primitive: Primitive | str,
    label: Callable[..., Any],
    narrow: Callable[..., Any] | None = None,
    whole: Callable[[Any], int] = lambda eqn: 0,
) -> None:
    """Teaches the engine a primitive.

    Args:
        primitive: the primitive or its name.
        label: ``(walk, eqn, *values) -> Value | list[Value]``; see
            `jaxprune.coupling.rules` for every kind of example.
        narrow: ``(kept, step, *arrays) -> array | list``; omit it when the equation's
            parameters name no sizes.
        whole: ``eqn -> n``: how many leading operands are only handed on to inner
            programs; zero for all but control flow.

    Example:
        >>> from jaxprune.coupling.rules.elementwise import elementwise
        >>> register_rule("my_activation", elementwise("first"))
    """
    name = primitive if isinstance(primitive, str) else primitive.name
    RULES[name] = Rule(label, narrow, whole)


def rule(
    *names: str,
    narrow: Callable[..., Any] | None = None,
    whole: Callable[[Any], int] = lambda eqn: 0,
):
    """Decorator: registers a labelling function for the named primitives."""

    def register(label: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            register_rule(name, label, narrow, whole)
        return label

    return register
