"""Runs a traced program with taps: values read or changed on their way."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import Literal

from jaxprune.program._interpret import CALLS, REMATS, inner_jaxprs, interpret
from jaxprune.program._jaxprs import bind, opened, scan_counts
from jaxprune.program._types import Atom, Equation, Jaxpr


class Site(NamedTuple):
    """Where a value is met in a program.

    Attributes:
        path: the number of an equation; inside calls and scans one number for every
            program around it, outermost first.
        position: which operand or result of the equation.
        operand: an operand (changed for this equation alone) or a result (changed for
            all that use it)?
    """

    path: tuple[int, ...]
    position: int
    operand: bool = False


class Tap(NamedTuple):
    """What to do at a site.

    Attributes:
        site: where.
        act: ``(value, eqn, operands) -> (value, note)``; a note of None is dropped.
        key: under which the note is returned; a scan stacks the notes of its steps.
    """

    site: Site
    act: Callable[[jax.Array, Equation, Sequence[jax.Array]], tuple[jax.Array, Any]]
    key: Any = None


Notes = dict[Any, Any]


def inner_program(eqn: Equation) -> Any:
    """The program that taps may enter through this equation, or None.

    Not those of loops with a traced number of steps and of branches, which hand no
    notes out, nor functions with a derivative of their own, which would lose it.
    """
    enters = eqn.primitive.name in CALLS | REMATS | {"scan"}
    return inner_jaxprs(eqn)[0] if enters else None


def run(
    jaxpr: Jaxpr, args: Sequence[jax.Array], taps: Iterable[Tap]
) -> tuple[list[jax.Array], Notes]:
    """Evaluates a program (closed or open) under taps.

    Returns:
        Its results, and the notes of the taps.
    """
    jaxpr, consts = opened(jaxpr)
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    at: dict[int, list[Tap]] = {}
    for tap in taps:
        at.setdefault(tap.site.path[0], []).append(tap)
    notes: Notes = {}

    def step(number: int, eqn: Equation, operands: list[jax.Array]) -> list[jax.Array]:
        return _tapped(eqn, operands, at.get(number, []), notes)

    def constant(var: Atom) -> Any:
        return var.val if isinstance(var, Literal) else known[var]

    return interpret(jaxpr, args, step, constant), notes


def _tapped(
    eqn: Equation, operands: list[jax.Array], taps: list[Tap], notes: Notes
) -> list[jax.Array]:
    here = [tap for tap in taps if len(tap.site.path) == 1]
    inside = [_inner(tap) for tap in taps if len(tap.site.path) > 1]
    for tap in here:
        if tap.site.operand:
            _act(tap, operands, eqn, operands, notes)
    if inside:
        outs, inner = _enter(eqn, operands, inside)
        notes.update(inner)
    else:
        outs = bind(eqn, *operands)
    for tap in here:
        if not tap.site.operand:
            _act(tap, outs, eqn, operands, notes)
    return outs


def _act(
    tap: Tap,
    values: list[jax.Array],
    eqn: Equation,
    operands: list[jax.Array],
    notes: Notes,
) -> None:
    k = tap.site.position
    values[k], note = tap.act(values[k], eqn, operands)
    if note is not None:
        notes[tap.key] = note


def _inner(tap: Tap) -> Tap:
    return tap._replace(site=tap.site._replace(path=tap.site.path[1:]))


def _enter(
    eqn: Equation, operands: list[jax.Array], taps: list[Tap]
) -> tuple[list[jax.Array], Notes]:
    """Runs an equation that holds a program, with taps in that program."""
    name, program = eqn.primitive.name, inner_program(eqn)
    if name in CALLS:
        return run(program, operands, taps)
    if name == "scan":
        return _scan(eqn, program, operands, taps)
    p = eqn.params
    body = jax.checkpoint(
        lambda *args: run(program, args, taps),
        prevent_cse=p["prevent_cse"],
        policy=p["policy"],
    )
    return body(*operands)


def _scan(
    eqn: Equation, program: Jaxpr, operands: list[jax.Array], taps: list[Tap]
) -> tuple[list[jax.Array], Notes]:
    p = eqn.params
    consts, carries = scan_counts(p)
    fixed, init, xs = (
        operands[:consts],
        operands[consts : consts + carries],
        operands[consts + carries :],
    )

    def body(carry: list[jax.Array], x: list[jax.Array]) -> Any:
        outs, notes = run(program, [*fixed, *carry, *x], taps)
        return outs[:carries], (outs[carries:], notes)

    final, (ys, notes) = lax.scan(
        body, init, xs, p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    return [*final, *ys], notes
