"""One declaration per primitive: what is known of it, said once.

From it follow which axes are coupled, what equal units may do, which blocks are
independent, what an equation costs, where units are summed over, and along which axes
the entries of a parameter are weighed against each other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from jaxprune.program._types import Equation
from jaxprune.program.primitives._signature import (
    Constants,
    Signature,
    no_constants,
)

# How the operands of an equation make one entry of its result.
#   add       a sum of them (or one of them, as it is): linear in all together
#   multiply  a product: linear in each
#   divide    the first by the others: linear in the first
#   apply     anything else
#   draw      not from them: every entry is its own, as in random numbers
Combine: TypeAlias = Literal["add", "multiply", "divide", "apply", "draw"]
# How entries along a contracted factor become one.
#   sum         they are added
#   idempotent  f(x, x) = x, as for a maximum
#   count       anything else that sees how many there are
Reduce: TypeAlias = Literal["sum", "idempotent", "count"]
# When a result is 0: if any operand is, all are, the first is, the first is and the
# second is not, or never (as far as is known).
Zero: TypeAlias = Literal["any", "all", "first", "quotient", "never"]


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What is known of a primitive.

    Attributes:
        signature: ``(eqn, constant) -> Signature``, or None where the equation is one
            that nothing is known of; ``constant(k)`` is the value of operand `k` if it
            is the same in every call, else None.
        combine: how operands make a result; or ``eqn -> Combine``.
        reduce: how entries along a contracted factor become one.
        zero: when a result is 0 at a position, given the operands there.
        elementwise: does every position of the results depend on that position alone?
        moves: every entry of the results is an entry of the operands as it is (or
            padding): nothing is computed.
        pinned: why operand axes without a factor, or with a fixed one, keep their size:
            a kind of reason (`jaxprune.coupling._reasons.TEXTS`).
        made: why such axes of results do, likewise.
    """

    signature: Callable[[Equation, Constants], Signature | None]
    combine: Combine | Callable[[Equation], Combine] = "apply"
    reduce: Reduce = "count"
    zero: Zero = "never"
    elementwise: bool = False
    moves: bool = False
    pinned: str = "mixed"
    made: str = "mixed"

    def combines(self, eqn: Equation) -> Combine:
        """How the operands of this equation make a result."""
        return self.combine(eqn) if callable(self.combine) else self.combine

    @property
    def is_product(self) -> bool:
        """Is it a contraction: a sum of products?"""
        return self.combine == "multiply" and self.reduce == "sum"


DECLARATIONS: dict[str, Declaration] = {}


def declare(*names: str, **known: Any) -> Callable[[Any], Any]:
    """Decorator for a signature: declares the named primitives.

    Args:
        *names: of primitives.
        **known: the other attributes of `Declaration`.
    """

    def register(signature: Callable[[Equation, Constants], Signature | None]) -> Any:
        declaration = Declaration(signature, **known)
        DECLARATIONS.update(dict.fromkeys(names, declaration))
        return signature

    return register


def declaration(eqn: Equation) -> Declaration | None:
    """What is known of the primitive of an equation, if anything."""
    return DECLARATIONS.get(eqn.primitive.name)


def signature(eqn: Equation, constant: Constants = no_constants) -> Signature | None:
    """What indexes the axes of an equation; None if that is not known.

    Args:
        eqn: an equation of a jaxpr.
        constant: ``operand number -> value``, None for what is no constant.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> jaxpr = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5)))
        >>> [eqn] = jaxpr.eqns
        >>> found = signature(eqn)
        >>> found.ins, found.outs, found.sizes
        ((((1,), (0,)), ((0,), (2,))), (((1,), (2,)),), (3, 2, 5))
        >>> found.contracted_axes(0), found.contracted_axes(1)
        ((1,), (0,))
    """
    known = declaration(eqn)
    return None if known is None else known.signature(eqn, constant)
