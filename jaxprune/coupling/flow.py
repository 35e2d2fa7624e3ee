"""How every primitive carries marks (`jaxprune.coupling.marks`).

A handler is ``(marking, run, step, operands) -> states of the results``, where `run`
marks an inner program. A primitive without one carries nothing: the groups it touches
cannot be merged.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxprune.coupling.jaxprs import scan_counts
from jaxprune.coupling.marks import EQUAL, Marking, Sources, State
from jaxprune.coupling.rules import elementwise, indexing, shape
from jaxprune.coupling.walk import Step, Walked

Run: TypeAlias = Callable[[Walked, Sequence[State]], list[State]]
Handler: TypeAlias = Callable[[Marking, Run, Step, list[State]], list[State]]

HANDLERS: dict[str, Handler] = {}


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def unknown(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    """A primitive that says nothing about equal units."""
    touched = {g for state in operands for marks in state.axes for g in marks}
    touched |= {
        g for v in step.outs for axis in v.axes for g in marking.places.on(axis)
    }
    name = step.eqn.primitive.name
    for g in touched:
        marking.refuse(g, f"what {name} makes of equal units is not known")
    return [marking.constant(value) for value in step.outs]


def _all_results(
    marking: Marking,
    step: Step,
    operands: list[State],
    sources: Sequence[Sources],
    kind: str,
) -> list[State]:
    return [marking.result(out, operands, sources, kind) for out in step.outs]


def _alike(step: Step, count: int | None = None) -> list[Sources]:
    """Every axis of the result from the same axis of the operands that have axes."""
    full = [n for n, value in enumerate(step.ins[:count]) if value.shape]
    return [[(n, d) for n in full] for d in range(len(step.outs[0].shape))]


# --- position by position -------------------------------------------------------------


def _elementwise(kind: str) -> Handler:
    def handle(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
        real = all(
            jnp.issubdtype(v.aval.dtype, jnp.inexact)
            for v in (*step.eqn.invars, *step.eqn.outvars)
        )
        used = kind if real else "apply"
        return _all_results(marking, step, operands, _alike(step), used)

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


@_handles("bitcast_convert_type")
def _bitcast(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    if step.ins[0].shape != step.outs[0].shape:
        return unknown(marking, run, step, operands)
    return _all_results(marking, step, operands, _alike(step), "apply")


@_handles("select_n")
def _select(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    which, *cases = operands
    _refuse_summed(marking, which)
    sources = [[(n, d) for n in range(len(cases))] for d in range(len(cases[0].axes))]
    (out,) = step.outs
    chosen = marking.result(out, cases, sources, "add")
    return [chosen._replace(fed=chosen.fed or which.fed)]


@_handles("optimization_barrier")
def _barrier(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    return operands


def _refuse_summed(marking: Marking, *states: State) -> None:
    for state in states:
        for marks in state.axes:
            for g, mark in marks.items():
                if mark.summed:
                    marking.refuse(g, "its consumers decide where something goes")


# --- sums -----------------------------------------------------------------------------


@_handles("dot_general")
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
    return _all_results(marking, step, operands[:2], sources, "multiply")


@_handles("ragged_dot_general")
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
    return _all_results(marking, step, operands[:2], sources, "multiply")


@_handles("conv_general_dilated")
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
    return _all_results(marking, step, pair, sources, "multiply")


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
        return _all_results(marking, step, operands, sources, kind)

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
        return _all_results(marking, step, operands, _alike(step), kind)

    return handle


for _name in "cumsum reduce_window_sum".split():
    HANDLERS[_name] = _along("add")
for _name in """
    cumprod cummax cummin cumlogsumexp reduce_window_max reduce_window_min
    sort top_k fft
""".split():
    HANDLERS[_name] = _along("apply")


# --- positions that move --------------------------------------------------------------


@_handles("broadcast_in_dim")
def _broadcast(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    sources: list[Sources] = [[] for _ in step.outs[0].shape]
    for k, d in enumerate(step.eqn.params["broadcast_dimensions"]):
        sources[d] = [(0, k)]
    return _all_results(marking, step, operands[:1], sources, "add")


@_handles("reshape")
def _reshape(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    # Row-major on both sides: the positions of a unit keep their order.
    (out,) = step.outs
    sources: list[Sources] = [[] for _ in out.shape]
    for run_a, run_b in shape.segments(step.ins[0].shape, out.shape):
        groups = [g for d in run_a for g in operands[0].axes[d]]
        for g in groups:
            if groups.count(g) > 1:
                marking.refuse(g, "two of its axes are merged into one")
        for d in run_b:
            sources[d] = [(0, source) for source in run_a]
    return [marking.result(out, operands[:1], sources, "add")]


@_handles("squeeze")
def _squeeze(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    gone = step.eqn.params["dimensions"]
    sources = [[(0, d)] for d in range(len(operands[0].axes)) if d not in gone]
    return _all_results(marking, step, operands, sources, "add")


@_handles("transpose")
def _transpose(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    sources = [[(0, d)] for d in step.eqn.params["permutation"]]
    return _all_results(marking, step, operands, sources, "add")


@_handles("concatenate", "rev", "tile")
def _joined(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    return _all_results(marking, step, operands, _alike(step), "add")


@_handles("permute")
def _permute(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    d = step.eqn.params["axis"]
    marking.shuffled(step.ins[0].axes[d], step.outs[0].axes[d])
    return _all_results(marking, step, operands, _alike(step), "add")


@_handles("slice")
def _slice(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    (value,) = step.ins
    spans = shape.spans(step.eqn)
    for axis, n, span in zip(value.axes, value.shape, spans, strict=True):
        marking.picked(axis, np.arange(n)[span])
    return _all_results(marking, step, operands, _alike(step), "add")


@_handles("split")
def _split(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    axis = step.ins[0].axes[step.eqn.params["axis"]]
    for span in shape.ranges(step.eqn.params["sizes"]):
        marking.picked(axis, np.arange(span.start, span.stop))
    return _all_results(marking, step, operands, _alike(step), "add")


@_handles("pad")
def _pad(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    value, fill = step.ins
    config = step.eqn.params["padding_config"]
    for axis, n, span in zip(value.axes, value.shape, config, strict=True):
        source = shape.pad_map(n, *span)
        marking.picked(axis, source[source >= 0])
    kind = "add" if fill.is_zero else "apply"
    return _all_results(marking, step, operands[:1], _alike(step, 1), kind)


@_handles("dynamic_slice")
def _dynamic_slice(
    marking: Marking, run: Run, step: Step, operands: list[State]
) -> Any:
    value, *starts = step.ins
    sizes = step.eqn.params["slice_sizes"]
    for axis, n, size, start in zip(
        value.axes, value.shape, sizes, starts, strict=True
    ):
        first = indexing._start(start, n, size)
        if size != n and first is not None:
            marking.picked(axis, np.arange(first, first + size))
    _refuse_summed(marking, *operands[1:])
    return _all_results(marking, step, operands[:1], _alike(step, 1), "add")


@_handles("dynamic_update_slice")
def _update(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    whole, part = step.ins[:2]
    for d, (n, size) in enumerate(zip(whole.shape, part.shape, strict=True)):
        if n != size:
            marking.shuffled(whole.axes[d], part.axes[d])
    _refuse_summed(marking, *operands[2:])
    return _all_results(marking, step, operands[:2], _alike(step, 2), "add")


@_handles("gather")
def _gather(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    (operand, index), (out,) = step.ins, step.outs
    numbers = step.eqn.params["dimension_numbers"]
    sources: list[Sources] = [[] for _ in out.shape]
    windows = indexing._offsets(numbers, len(operand.shape))
    for k, d in zip(numbers.offset_dims, windows, strict=True):
        sources[k] = [(0, d)]
    batch = [k for k in range(len(out.shape)) if k not in numbers.offset_dims]
    for k, i in zip(batch, range(len(index.shape) - 1), strict=True):
        sources[k] = [(1, i)]
    paired = dict(
        zip(
            numbers.start_indices_batching_dims,
            numbers.operand_batching_dims,
            strict=True,
        )
    )
    for i, d in paired.items():
        sources[batch[i]] = [(0, d), (1, i)]
    picked = indexing._picked(step.eqn, step.ins)
    if picked is not None:
        sources[batch[0]] = [(0, picked[0])]
        marking.shuffled(operand.axes[picked[0]], out.axes[batch[0]])
    _refuse_summed(marking, operands[1])
    # What stands in for positions outside is not summed, unless it is 0 or nan.
    kind = "multiply" if step.eqn.params.get("fill_value") is None else "apply"
    return _all_results(marking, step, operands, sources, kind)


@_handles("scatter", "scatter-add", "scatter-sub")
def _scatter(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    operand, _, update = step.ins
    numbers = step.eqn.params["dimension_numbers"]
    windows = indexing._windows(numbers, len(operand.shape))
    sources: list[Sources] = []
    for d, n in enumerate(operand.shape):
        k = windows.get(d)
        if k is not None and update.shape[k] == n:
            sources.append([(0, d), (1, k)])
        else:
            sources.append([(0, d)])
            marking.shuffled(operand.axes[d])
    _refuse_summed(marking, operands[1])
    pair = [operands[0], operands[2]]
    return _all_results(marking, step, pair, sources, "add")


@_handles("stack")
def _stack(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    sources: list[Sources] = [
        [(n, d) for n in range(len(operands))] for d in range(len(operands[0].axes))
    ]
    sources.insert(step.eqn.params["axis"], [])
    return _all_results(marking, step, operands, sources, "add")


@_handles("unstack")
def _unstack(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    gone = step.eqn.params["axis"]
    sources = [[(0, d)] for d in range(len(operands[0].axes)) if d != gone]
    return _all_results(marking, step, operands, sources, "add")


# --- inner programs -------------------------------------------------------------------


@_handles(
    *"jit pjit closed_call core_call remat2 checkpoint remat".split(),
    *"custom_jvp_call custom_vjp_call".split(),
)
def _call(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    return run(step.subs[0], operands)


def _carried(marking: Marking, *states: State) -> list[State]:
    """What goes round a loop: equal, before and after."""
    _refuse_summed(marking, *states)
    return [
        State(tuple(dict.fromkeys(marks, EQUAL) for marks in state.axes), True)
        for state in states
    ]


@_handles("scan")
def _scan(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    n_consts, n_carry = scan_counts(step.eqn.params)
    consts, rest = operands[:n_consts], operands[n_consts:]
    carry = _carried(marking, *rest[:n_carry])
    slices = [state._replace(axes=state.axes[1:]) for state in rest[n_carry:]]
    outs = run(step.subs[0], [*consts, *carry, *slices])
    stacked = [state._replace(axes=({}, *state.axes)) for state in outs[n_carry:]]
    return [*_carried(marking, *outs[:n_carry]), *stacked]


@_handles("while")
def _while(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    n_cond, n_body = (step.eqn.params[f"{kind}_nconsts"] for kind in ("cond", "body"))
    cond, body = operands[:n_cond], operands[n_cond : n_cond + n_body]
    carry = _carried(marking, *operands[n_cond + n_body :])
    _refuse_summed(marking, *run(step.subs[1], [*cond, *carry]))
    return _carried(marking, *run(step.subs[0], [*body, *carry]))


@_handles("cond")
def _cond(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    _refuse_summed(marking, operands[0])
    branches = [run(sub, operands[1:]) for sub in step.subs]
    merged = []
    for k, states in enumerate(zip(*branches, strict=True)):
        rank = len(step.outs[k].shape)
        sources = [[(n, d) for n in range(len(states))] for d in range(rank)]
        merged.append(marking.result(step.outs[k], states, sources, "add"))
    return merged
