"""How rows move through primitives: see `jaxprune.coupling._rows`.

A rule gets the states of the operands and returns those of the results. It ties what is
computed together: rows of operands that meet, and rows along an axis that is mixed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune.coupling._rows import Rows, State, row_rule
from jaxprune.coupling._walk import Step
from jaxprune.coupling.rules import _elementwise as elementwise
from jaxprune.coupling.rules._pieces import pad_map, ranges, spans
from jaxprune.coupling.rules._shape import segments
from jaxprune.coupling.rules._shuffle import moved_order
from jaxprune.program._jaxprs import scan_counts


def _met(rows: Rows, states: Sequence[State]) -> State:
    """The state of what is computed from several values, position by position."""
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    for state in states:
        for key, labels in state.items():
            found.setdefault(key, []).append(labels)
    return {key: rows.tie(*labels) for key, labels in found.items()}


@row_rule(
    *elementwise.KEEPS_ZERO,
    *elementwise.LOSES_ZERO,
    *elementwise.POLE_AT_ZERO,
    *elementwise.SUMS,
    *elementwise.PRODUCTS,
    *"div rem integer_pow pow select_n clamp max min convert_element_type copy".split(),
)
def _elementwise(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    return [_met(rows, states)]


@row_rule("optimization_barrier", "device_put")
def _each_alone(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    return list(states)


# --- moves ---------------------------------------------------------------------------


@row_rule("broadcast_in_dim")
def _broadcast(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    dims = step.eqn.params["broadcast_dimensions"]
    rank = len(step.eqn.params["shape"])
    out = {}
    for (d, number), labels in states[0].items():
        shape = [1] * rank
        for k, n in zip(dims, labels.shape, strict=True):
            shape[k] = n
        out[dims[d], number] = labels.reshape(shape)
    return [out]


@row_rule("transpose")
def _transpose(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    order = step.eqn.params["permutation"]
    return [
        {
            (order.index(d), number): labels.transpose(order)
            for (d, number), labels in states[0].items()
        }
    ]


@row_rule("squeeze")
def _squeeze(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    return [_without(rows, states[0], step.eqn.params["dimensions"])]


@row_rule("reshape")
def _reshape(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    before, after = step.ins[0], step.outs[0]
    runs = segments(before.shape, after.shape)
    out = {}
    for (d, number), labels in states[0].items():
        full, target = [1] * labels.ndim, [1] * len(after.shape)
        for run_a, run_b in runs:
            if any(labels.shape[k] > 1 for k in run_a):
                for k in run_a:
                    full[k] = before.shape[k]
                for k in run_b:
                    target[k] = after.shape[k]
        labels = rows.spread(labels, full).reshape(target)
        run = next((b for a, b in runs if d in a), [])
        places = [k for k in run if number in rows.slots(after.axes[k])]
        if len(places) == 1:
            out[places[0], number] = labels
        else:
            rows.forbid([number], "a reshape spreads its units over several axes")
    return [out]


def _taken(state: State, positions: dict[int, Any]) -> State:
    """The state of ``x[positions]``, axis by axis."""
    return {
        key: labels[
            tuple(
                positions.get(k, slice(None)) if n > 1 else slice(None)
                for k, n in enumerate(labels.shape)
            )
        ]
        for key, labels in state.items()
    }


@row_rule("slice")
def _slice(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    return [_taken(states[0], dict(enumerate(spans(step.eqn))))]


@row_rule("split")
def _split(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    d = step.eqn.params["axis"]
    parts = zip(step.outs, ranges(step.eqn.params["sizes"]), strict=True)
    return [_present(rows, out, _taken(states[0], {d: span})) for out, span in parts]


def _present(rows: Rows, value: Any, state: State) -> State:
    """Without the groups that this part of an axis holds nothing of."""
    return {
        (d, number): labels
        for (d, number), labels in state.items()
        if number in rows.slots(value.axes[d])
    }


@row_rule("rev")
def _rev(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    back = dict.fromkeys(step.eqn.params["dimensions"], slice(None, None, -1))
    return [_taken(states[0], back)]


@row_rule("permute")
def _permute(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    params = step.eqn.params
    return [_taken(states[0], {params["axis"]: moved_order(params)})]


@row_rule("pad")
def _pad(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    state = states[0]
    for k, span in enumerate(step.eqn.params["padding_config"]):
        if span == (0, 0, 0):
            continue
        source = pad_map(step.ins[0].shape[k], *span)
        for (d, number), labels in state.items():
            if labels.shape[k] > 1 or k == d:
                n = step.ins[0].shape[k]
                shape = [n if j == k else m for j, m in enumerate(labels.shape)]
                line = np.broadcast_to(labels, shape).take(source, axis=k)
                hole = [-1 if j == k else 1 for j in range(labels.ndim)]
                line = np.where((source < 0).reshape(hole), 0, line)
                state = {**state, (d, number): line}
    return [state]


@row_rule("concatenate")
def _concatenate(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    c = step.eqn.params["dimension"]
    return [_joined(rows, states, c, [value.shape[c] for value in step.ins])]


@row_rule("stack")
def _stack(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    c = step.eqn.params["axis"]
    slices = [
        {(d + (d >= c), n): np.expand_dims(x, c) for (d, n), x in state.items()}
        for state in states
    ]
    return [_joined(rows, slices, c, [1] * len(slices))]


@row_rule("unstack")
def _unstack(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    c = step.eqn.params["axis"]
    slices = [_taken(states[0], {c: [k]}) for k in range(len(step.outs))]
    return [
        {(d - (d > c), n): x.squeeze(c) for (d, n), x in state.items()}
        for state in slices
    ]


def _joined(rows: Rows, states: Sequence[State], c: int, sizes: Sequence[int]) -> State:
    """The state of values side by side along one axis."""
    out = {}
    for key, some in {k: x for state in states for k, x in state.items()}.items():
        each = [state.get(key, np.zeros([1] * some.ndim, int)) for state in states]
        common = np.broadcast_shapes(*(x.shape[:c] + x.shape[c + 1 :] for x in each))
        shapes = [(*common[:c], n, *common[c:]) for n in sizes]
        full = [rows.spread(x, shape) for x, shape in zip(each, shapes, strict=True)]
        out[key] = np.concatenate(full, axis=c)
    return out


# --- sums ----------------------------------------------------------------------------


def _without(rows: Rows, state: State, gone: Sequence[int]) -> State:
    """After a reduction over these axes: what runs along the others is mixed."""
    out = {}
    for (d, number), labels in state.items():
        if d not in gone:
            left = rows.collapse(labels, gone).squeeze(tuple(gone))
            out[d - sum(k < d for k in gone), number] = left
    return out


@row_rule(*(f"reduce_{kind}" for kind in "sum max min prod and or xor".split()))
def _reduce(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    return [_without(rows, states[0], step.eqn.params["axes"])]


@row_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    along = [step.eqn.params["axis"]]
    return [{key: rows.collapse(x, along) for key, x in states[0].items()}]


@row_rule("reduce_window_max", "reduce_window_min", "reduce_window_sum")
def _window(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    sizes = step.eqn.params["window_dimensions"]
    mixed = [k for k, n in enumerate(sizes) if n > 1]
    return [{key: rows.collapse(x, mixed) for key, x in states[0].items()}]


@row_rule("dot_general")
def _dot(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    """Places both operands in one space: batch, summed, free of lhs, free of rhs."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = step.eqn.params["dimension_numbers"]
    orders = [
        [*batch, *summed, *(k for k in range(len(v.shape)) if k not in batch + summed)]
        for v, batch, summed in zip(
            step.ins, (lhs_batch, rhs_batch), (lhs_sum, rhs_sum), strict=True
        )
    ]
    shared = len(lhs_batch) + len(lhs_sum)
    left, right = (len(order) - shared for order in orders)
    placed: list[State] = []
    for side, (state, order) in enumerate(zip(states, orders, strict=True)):
        here: State = {}
        for (d, number), labels in state.items():
            labels = labels.transpose(order)
            own = labels.shape[shared:]
            free = (*own, *[1] * right) if side == 0 else (*[1] * left, *own)
            at = order.index(d)
            at += left if side == 1 and at >= shared else 0
            here[at, number] = labels.reshape(labels.shape[:shared] + free)
        placed.append(here)
    summed = list(range(len(lhs_batch), shared))
    return [_without(rows, _met(rows, placed), summed)]


@row_rule("conv_general_dilated")
def _conv(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    """Its input channels are summed over, group by group; the window mixes space."""
    params = step.eqn.params
    numbers = params["dimension_numbers"]
    feature, into = numbers.lhs_spec[1], numbers.rhs_spec[1]
    summed: dict[int, list[np.ndarray]] = {}
    out = {}
    rank = len(step.outs[0].shape)
    for side, state in enumerate(states):
        for (d, number), labels in state.items():
            others = [k for k in range(labels.ndim) if k != d]
            line = rows.collapse(labels, others).ravel()
            if d == (feature, into)[side]:
                grid = (
                    line
                    if len(line) == 1
                    else line.reshape(-1, step.ins[1].shape[into])
                )
                summed.setdefault(number, []).append(grid)
            else:
                place = numbers.out_spec[0 if side == 0 else 1]
                shape = [-1 if k == place else 1 for k in range(rank)]
                out[place, number] = line.reshape(shape)
    for labels in summed.values():
        rows.tie(*labels)
    return [out]


# --- programs ------------------------------------------------------------------------


@row_rule("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat")
def _call(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    return rows.run(step.subs[0], states)


# The derivative that comes with it is taken to treat the units alike as it does itself.
row_rule("custom_jvp_call")(_call)


@row_rule("cond")
def _cond(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    branches = [rows.run(sub, states[1:]) for sub in step.subs]
    return [_met(rows, outs) for outs in zip(*branches, strict=True)]


@row_rule("scan")
def _scan(rows: Rows, step: Step, states: Sequence[State]) -> list[State]:
    """One body for all turns: what differs between turns is tied."""
    consts, carries = scan_counts(step.eqn.params)
    before, after = list(states[:consts]), states[consts + carries :]
    carry = list(states[consts : consts + carries])
    inner = [_without(rows, state, (0,)) for state in after]
    while True:
        outs = rows.run(step.subs[0], [*before, *carry, *inner])
        both = zip(carry, outs[:carries], strict=True)
        met = [_met(rows, pair) for pair in both]
        if [set(state) for state in met] == [set(state) for state in carry]:
            break
        carry = met
    stacked = [
        {(d + 1, number): labels[None] for (d, number), labels in state.items()}
        for state in outs[carries:]
    ]
    return [*met, *stacked]
