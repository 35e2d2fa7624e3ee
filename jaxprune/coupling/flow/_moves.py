"""Marks through what moves positions: reshapes, slices, gathers, scatters."""

from typing import Any

import numpy as np

from jaxprune.coupling._marks import Marking, Sources, State
from jaxprune.coupling._walk import Step
from jaxprune.coupling.flow._handlers import (
    Run,
    alike,
    all_results,
    handles,
    refuse_summed,
)
from jaxprune.coupling.rules import _indexing as indexing
from jaxprune.coupling.rules import _pieces as pieces
from jaxprune.coupling.rules import _scatter as scatter
from jaxprune.coupling.rules import _shape as shape


@handles("broadcast_in_dim")
def _broadcast(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    sources: list[Sources] = [[] for _ in step.outs[0].shape]
    for k, d in enumerate(step.eqn.params["broadcast_dimensions"]):
        sources[d] = [(0, k)]
    return all_results(marking, step, operands[:1], sources, "add")


@handles("reshape")
def _reshape(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    # Row-major on both sides: the positions of a unit keep their order.
    (out,) = step.outs
    sources: list[Sources] = [[] for _ in out.shape]
    for run_a, run_b in shape.segments(step.ins[0].shape, out.shape):
        groups = [g for d in run_a for g in operands[0].axes[d]]
        for g in groups:
            if groups.count(g) > 1:
                marking.refuse(g, "axes_joined")
        for d in run_b:
            sources[d] = [(0, source) for source in run_a]
    return [marking.result(out, operands[:1], sources, "add")]


@handles("squeeze")
def _squeeze(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    gone = step.eqn.params["dimensions"]
    sources = [[(0, d)] for d in range(len(operands[0].axes)) if d not in gone]
    return all_results(marking, step, operands, sources, "add")


@handles("transpose")
def _transpose(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    sources = [[(0, d)] for d in step.eqn.params["permutation"]]
    return all_results(marking, step, operands, sources, "add")


@handles("concatenate", "rev", "tile")
def _joined(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    return all_results(marking, step, operands, alike(step), "add")


@handles("permute")
def _permute(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    d = step.eqn.params["axis"]
    marking.shuffled(step.ins[0].axes[d], step.outs[0].axes[d])
    return all_results(marking, step, operands, alike(step), "add")


@handles("slice")
def _slice(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    (value,) = step.ins
    spans = pieces.spans(step.eqn)
    for axis, n, span in zip(value.axes, value.shape, spans, strict=True):
        marking.picked(axis, np.arange(n)[span])
    return all_results(marking, step, operands, alike(step), "add")


@handles("split")
def _split(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    axis = step.ins[0].axes[step.eqn.params["axis"]]
    for span in pieces.ranges(step.eqn.params["sizes"]):
        marking.picked(axis, np.arange(span.start, span.stop))
    return all_results(marking, step, operands, alike(step), "add")


@handles("pad")
def _pad(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    value, fill = step.ins
    config = step.eqn.params["padding_config"]
    for axis, n, span in zip(value.axes, value.shape, config, strict=True):
        source = pieces.pad_map(n, *span)
        marking.picked(axis, source[source >= 0])
    kind = "add" if fill.is_zero else "apply"
    return all_results(marking, step, operands[:1], alike(step, 1), kind)


@handles("dynamic_slice")
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
    refuse_summed(marking, *operands[1:])
    return all_results(marking, step, operands[:1], alike(step, 1), "add")


@handles("dynamic_update_slice")
def _update(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    whole, part = step.ins[:2]
    for d, (n, size) in enumerate(zip(whole.shape, part.shape, strict=True)):
        if n != size:
            marking.shuffled(whole.axes[d], part.axes[d])
    refuse_summed(marking, *operands[2:])
    return all_results(marking, step, operands[:2], alike(step, 2), "add")


@handles("gather")
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
    refuse_summed(marking, operands[1])
    # What stands in for positions outside is not summed, unless it is 0 or nan.
    kind = "multiply" if step.eqn.params.get("fill_value") is None else "apply"
    return all_results(marking, step, operands, sources, kind)


@handles("scatter", "scatter-add", "scatter-sub")
def _scatter(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    operand, _, update = step.ins
    numbers = step.eqn.params["dimension_numbers"]
    windows = scatter._windows(numbers, len(operand.shape))
    sources: list[Sources] = []
    for d, n in enumerate(operand.shape):
        k = windows.get(d)
        if k is not None and update.shape[k] == n:
            sources.append([(0, d), (1, k)])
        else:
            sources.append([(0, d)])
            marking.shuffled(operand.axes[d])
    refuse_summed(marking, operands[1])
    pair = [operands[0], operands[2]]
    return all_results(marking, step, pair, sources, "add")


@handles("stack")
def _stack(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    sources: list[Sources] = [
        [(n, d) for n in range(len(operands))] for d in range(len(operands[0].axes))
    ]
    sources.insert(step.eqn.params["axis"], [])
    return all_results(marking, step, operands, sources, "add")


@handles("unstack")
def _unstack(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    gone = step.eqn.params["axis"]
    sources = [[(0, d)] for d in range(len(operands[0].axes)) if d != gone]
    return all_results(marking, step, operands, sources, "add")
