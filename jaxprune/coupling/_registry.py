"""One rule per primitive.

A rule has two halves. `label` moves labels from the operands to the results of an
equation and ties those that must live or die together. The other half says what the
equation is on operands whose dead positions are gone: `resize` tells its parameters,
`narrow` runs it. Without either it stays as it stands, which is right for every
primitive whose parameters name no sizes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jaxprune.coupling._labels import Value
from jaxprune.program._types import Equation

Label: TypeAlias = Callable[..., Value | Sequence[Value]]
Resize: TypeAlias = Callable[..., Mapping[str, object] | None]


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

    label: Label
    narrow: Callable[..., object] | None = None
    resize: Resize | None = None
    inline: bool = False
    whole: Callable[[Equation], int] = lambda eqn: 0


RULES: dict[str, Rule] = {}


def register_label(
    label: Label,
    *names: str,
    narrow: Callable[..., object] | None = None,
    resize: Resize | None = None,
    inline: bool = False,
    whole: Callable[[Equation], int] = lambda eqn: 0,
) -> None:
    """Registers a rule for the named primitives; see `Rule`."""
    rule = Rule(label, narrow, resize, inline, whole)
    RULES.update(dict.fromkeys(names, rule))


def rule(*names: str, **halves: Any):
    """Decorator: registers a labelling function for the named primitives."""

    def register(label: Label) -> Label:
        register_label(label, *names, **halves)
        return label

    return register
