"""The interpreter loop, and how values of any kind pass through inner programs."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from jax.extend.core import Literal

from jaxprune.program._jaxprs import scan_counts
from jaxprune.program._types import Atom, Equation, Jaxpr, Var

T = TypeVar("T")

# Equations that only call a program with their own operands. What a remat keeps, or how
# a function is differentiated, is said by the equation; what it computes is not.
CALLS = frozenset("jit pjit closed_call core_call composite remat_opt".split())
REMATS = frozenset("remat2 checkpoint remat".split())
CUSTOM = frozenset("custom_jvp_call custom_vjp_call".split())
PLAIN = CALLS | REMATS | CUSTOM
LOOPS = frozenset(["scan", "while"])
HOLDERS = PLAIN | LOOPS | {"cond"}


def interpret(
    jaxpr: Jaxpr,
    ins: Sequence[T],
    step: Callable[[int, Equation, list[T]], Iterable[T]],
    constant: Callable[[Atom], T],
    equations: Sequence[Equation] | None = None,
) -> list[T]:
    """Carries a value of any kind for every variable through a program.

    Args:
        jaxpr: an open jaxpr.
        ins: a value for every input.
        step: ``(number, equation, operands) -> results``.
        constant: the value of a literal, or of a variable that no equation makes.
        equations: those to go through, if not those of the jaxpr.
    """
    env: dict[Var, T] = dict(zip(jaxpr.invars, ins, strict=True))

    def read(var: Atom) -> T:
        return constant(var) if isinstance(var, Literal) or var not in env else env[var]

    for number, eqn in enumerate(jaxpr.eqns if equations is None else equations):
        results = step(number, eqn, [read(var) for var in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]


def inner_jaxprs(eqn: Equation) -> list[Any]:
    """The programs of a call, loop or branch, as `through` numbers them.

    A loop with a condition holds its body first.
    """
    name, p = eqn.primitive.name, eqn.params
    if name in PLAIN or name == "scan":
        [held] = p.keys() & {"call_jaxpr", "jaxpr", "fwd_jaxpr"}
        return [p[held]]
    if name == "while":
        return [p["body_jaxpr"], p["cond_jaxpr"]]
    return list(p["branches"]) if name == "cond" else []


def _same(value: T) -> T:
    return value


class Passage(NamedTuple, Generic[T]):
    """How values of one kind pass through calls, loops and branches.

    Attributes:
        run: ``(number of an inner program, its inputs) -> its results``.
        join: of a value that may be either of two.
        settled: ``(joined, carried in) -> bool``: does another turn of a loop change
            nothing?
        carried: of what is carried around a loop, before its first turn.
        unstacked: of what a scan reads one step at a time.
        stacked: of what a scan returns for all steps.
        deciding: is told of the values that choose a branch or end a loop.
    """

    run: Callable[[int, list[T]], Sequence[T]]
    join: Callable[[T, T], T]
    settled: Callable[[Sequence[T], Sequence[T]], bool] = operator.eq
    carried: Callable[[T], T] = _same
    unstacked: Callable[[T], T] = _same
    stacked: Callable[[T], T] = _same
    deciding: Callable[[T], object] = _same


def through(eqn: Equation, operands: Sequence[T], passage: Passage[T]) -> list[T]:
    """The results of an equation of `HOLDERS`."""
    name = eqn.primitive.name
    if name == "scan":
        return _scan(eqn, list(operands), passage)
    if name == "while":
        return _while(eqn, list(operands), passage)
    if name == "cond":
        return _cond(eqn, list(operands), passage)
    return list(passage.run(0, list(operands)))


def _scan(eqn: Equation, operands: list[T], passage: Passage[T]) -> list[T]:
    n_consts, n_carry = scan_counts(eqn.params)
    consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]
    slices = list(map(passage.unstacked, operands[n_consts + n_carry :]))
    made: list[T] = []

    def body(carry: list[T]) -> Sequence[T]:
        outs = passage.run(0, [*consts, *carry, *slices])
        made[:] = outs[n_carry:]
        return outs[:n_carry]

    carry = _fixed_point(init, body, passage)
    return [*carry, *map(passage.stacked, made)]


def _while(eqn: Equation, operands: list[T], passage: Passage[T]) -> list[T]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, init = operands[n_cond : n_cond + n_body], operands[n_cond + n_body :]

    def body(carry: list[T]) -> Sequence[T]:
        return passage.run(0, [*consts, *carry])

    carry = _fixed_point(init, body, passage)
    for value in passage.run(1, [*operands[:n_cond], *carry]):
        passage.deciding(value)
    return carry


def _fixed_point(
    init: list[T], body: Callable[[list[T]], Sequence[T]], passage: Passage[T]
) -> list[T]:
    """What is carried around a loop, once a turn changes nothing."""
    carry = list(map(passage.carried, init))
    while True:
        after = list(map(passage.join, carry, body(carry)))
        if passage.settled(after, carry):
            return after
        carry = after


def _cond(eqn: Equation, operands: list[T], passage: Passage[T]) -> list[T]:
    index, *rest = operands
    passage.deciding(index)
    branches = range(len(eqn.params["branches"]))
    first, *others = [passage.run(k, list(rest)) for k in branches]
    joined = list(first)
    for other in others:
        joined = list(map(passage.join, joined, other))
    return joined
