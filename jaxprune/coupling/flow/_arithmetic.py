"""Marks through what computes: position by position, and sums."""

from typing import Any

import jax.numpy as jnp

from jaxprune.coupling._marks import Marking, Sources, State
from jaxprune.coupling._walk import Step
from jaxprune.coupling.flow._handlers import (
    HANDLERS,
    Handler,
    Run,
    alike,
    all_results,
    handles,
    refuse_summed,
    unknown,
)
from jaxprune.coupling.rules import _elementwise as elementwise

# --- position by position -------------------------------------------------------------


def _elementwise(kind: str) -> Handler:
    def handle(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
        real = all(
            jnp.issubdtype(v.aval.dtype, jnp.inexact)
            for v in (*step.eqn.invars, *step.eqn.outvars)
        )
        used = kind if real else "apply"
        return all_results(marking, step, operands, alike(step), used)

    return handle


for _kind, _names in (
    ("apply", elementwise.KEEPS_ZERO + elementwise.LOSES_ZERO),
    ("apply", elementwise.POLE_AT_ZERO + elementwise.SUMS + elementwise.PRODUCTS),
    ("apply", elementwise.SHIFTS + "rem integer_pow pow clamp max min".split()),
    ("add", "add sub add_any neg real copy copy_p convert_element_type".split()),
    ("add", "reduce_precision stop_gradient sharding_constraint name pvary".split()),
    ("add", ["pcast"]),
    ("multiply", ["mul"]),
    ("divide", ["div"]),
):
    HANDLERS.update(dict.fromkeys(_names, _elementwise(_kind)))


@handles("bitcast_convert_type")
def _bitcast(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    if step.ins[0].shape != step.outs[0].shape:
        return unknown(marking, run, step, operands)
    return all_results(marking, step, operands, alike(step), "apply")


@handles("select_n")
def _select(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    which, *cases = operands
    refuse_summed(marking, which)
    sources = [[(n, d) for n in range(len(cases))] for d in range(len(cases[0].axes))]
    (out,) = step.outs
    chosen = marking.result(out, cases, sources, "add")
    return [chosen._replace(fed=chosen.fed or which.fed)]


@handles("optimization_barrier", "device_put")
def _as_they_are(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    return operands


# --- sums -----------------------------------------------------------------------------


@handles("dot_general")
def _dot(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    sums, batch = step.eqn.params["dimension_numbers"]
    return _product(marking, step, operands, sums, batch)


def _product(
    marking: Marking, step: Step, operands: list[State], sums: Any, batch: Any
) -> list[State]:
    for i, j in zip(*sums, strict=True):
        marking.contract(operands[0], i, operands[1], j)
    sources: list[Sources] = [[(0, i), (1, j)] for i, j in zip(*batch, strict=True)]
    for n in (0, 1):
        gone = (*sums[n], *batch[n])
        rank = len(step.ins[n].shape)
        sources += [[(n, d)] for d in range(rank) if d not in gone]
    return all_results(marking, step, operands[:2], sources, "multiply")


@handles("ragged_dot_general")
def _ragged(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    numbers = step.eqn.params["ragged_dot_dimension_numbers"]
    (left, right), _ = numbers.dot_dimension_numbers
    held = tuple(numbers.rhs_group_dimensions)
    for i, j in zip(left, right, strict=True):
        marking.contract(operands[0], i, operands[1], j)
    sources: list[Sources] = [
        [(0, d)] for d in range(len(step.ins[0].shape)) if d not in left
    ]
    gone = (*right, *held)
    sources += [[(1, d)] for d in range(len(step.ins[1].shape)) if d not in gone]
    return all_results(marking, step, operands[:2], sources, "multiply")


@handles("conv_general_dilated")
def _conv(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    numbers = step.eqn.params["dimension_numbers"]
    (batch, feature, *_), (made, into, *_) = numbers.lhs_spec, numbers.rhs_spec
    lhs, rhs = operands
    inner = rhs.axes[into]
    if step.eqn.params["feature_group_count"] == 1:
        inner = {**inner, **lhs.axes[feature]}
    # Channels within a group are summed over, groups are multiplied one by one.
    summed = {g: m for g, m in lhs.axes[feature].items() if g in inner}
    grouped = {g: m for g, m in lhs.axes[feature].items() if g not in inner}
    marking.contract(State((summed,), lhs.fed), 0, rhs, into)
    axes = list(lhs.axes)
    axes[feature] = grouped
    sources: list[Sources] = [[] for _ in axes]
    sources[numbers.out_spec[0]] = [(0, batch)]
    sources[numbers.out_spec[1]] = [(0, feature), (1, made)]
    pair = [lhs._replace(axes=tuple(axes)), rhs]
    return all_results(marking, step, pair, sources, "multiply")


def _reduction(kind: str, *, idempotent: bool) -> Handler:
    def handle(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
        (state,) = operands
        gone = step.eqn.params["axes"]
        for d in gone:
            if kind == "add":
                marking.add_up(state, d)
            else:
                marking.collapse(state, d, idempotent=idempotent)
        sources = [[(0, d)] for d in range(len(state.axes)) if d not in gone]
        return all_results(marking, step, operands, sources, kind)

    return handle


HANDLERS["reduce_sum"] = _reduction("add", idempotent=False)
for _name in "max min and or argmax argmin".split():
    _full = _name if _name.startswith("arg") else f"reduce_{_name}"
    HANDLERS[_full] = _reduction("apply", idempotent=True)
for _name in "reduce_prod reduce_xor".split():
    HANDLERS[_name] = _reduction("apply", idempotent=False)


def _along(kind: str) -> Handler:
    """Mixes positions of axes that hold no group, or an ordered one."""

    def handle(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
        return all_results(marking, step, operands, alike(step), kind)

    return handle


for _name in "cumsum reduce_window_sum".split():
    HANDLERS[_name] = _along("add")
for _name in """
    cumprod cummax cummin cumlogsumexp reduce_window_max reduce_window_min
    sort top_k fft
""".split():
    HANDLERS[_name] = _along("apply")
