"""One rule per primitive.

A rule has two halves. `label` moves labels from the operands to the results of an
equation and ties those that must live or die together. The other half says what the
equation is on operands whose dead positions are gone: `resize` tells its parameters,
`narrow` runs it. Without either it stays as it stands, which is right for every
primitive whose parameters name no sizes.
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
        resize: ``(kept, step) -> dict``, the parameters that change, or None where
            they are not enough and `narrow` is needed.
        inline: the equation only calls its inner program, which is put in its place.
        whole: ``eqn -> n``; the first n operands may be data without labels, because
            the rule only hands them on to inner programs.
    """

    label: Callable[..., Any]
    narrow: Callable[..., Any] | None = None
    resize: Callable[..., dict[str, Any] | None] | None = None
    inline: bool = False
    whole: Callable[[Any], int] = lambda eqn: 0


RULES: dict[str, Rule] = {}


def register_rule(
    primitive: Primitive | str,
    label: Callable[..., Any],
    narrow: Callable[..., Any] | None = None,
    *,
    resize: Callable[..., dict[str, Any] | None] | None = None,
    inline: bool = False,
    whole: Callable[[Any], int] = lambda eqn: 0,
) -> None:
    """Teaches the engine a primitive.

    Args:
        primitive: the primitive or its name.
        label: ``(walk, eqn, *values) -> Value | list[Value]``; see
            `jaxprune.coupling.rules` for every kind of example.
        narrow: ``(kept, step, *arrays) -> array | list``; omit it when the equation's
            parameters name no sizes.
        resize: ``(kept, step) -> dict | None``: the parameters that name sizes, at
            those that stay; None hands the step to `narrow`. It costs no tracing.
        inline: is the equation nothing but a call of its inner program?
        whole: ``eqn -> n``: how many leading operands are only handed on to inner
            programs; zero for all but control flow.

    Example:
        >>> from jaxprune.coupling.rules._elementwise import elementwise
        >>> register_rule("my_activation", elementwise("first"))
    """
    name = primitive if isinstance(primitive, str) else primitive.name
    RULES[name] = Rule(label, narrow, resize, inline, whole)


def rule(*names: str, **halves: Any):
    """Decorator: registers a labelling function for the named primitives."""

    def register(label: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            register_rule(name, label, **halves)
        return label

    return register
