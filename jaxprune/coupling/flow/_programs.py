"""Marks through inner programs: calls, loops, branches."""

from typing import Any

from jaxprune.coupling._marks import EQUAL, Marking, State
from jaxprune.coupling._walk import Step
from jaxprune.coupling.flow._handlers import Run, handles, refuse_summed
from jaxprune.program._jaxprs import scan_counts


@handles(
    *"jit pjit closed_call core_call remat2 checkpoint remat".split(),
    *"custom_jvp_call custom_vjp_call".split(),
)
def _call(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    return run(step.subs[0], operands)


def _carried(marking: Marking, *states: State) -> list[State]:
    """What goes round a loop: equal, before and after."""
    refuse_summed(marking, *states)
    return [
        State(tuple(dict.fromkeys(marks, EQUAL) for marks in state.axes), True)
        for state in states
    ]


@handles("scan")
def _scan(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    n_consts, n_carry = scan_counts(step.eqn.params)
    consts, rest = operands[:n_consts], operands[n_consts:]
    carry = _carried(marking, *rest[:n_carry])
    slices = [state._replace(axes=state.axes[1:]) for state in rest[n_carry:]]
    outs = run(step.subs[0], [*consts, *carry, *slices])
    stacked = [state._replace(axes=({}, *state.axes)) for state in outs[n_carry:]]
    return [*_carried(marking, *outs[:n_carry]), *stacked]


@handles("while")
def _while(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    n_cond, n_body = (step.eqn.params[f"{kind}_nconsts"] for kind in ("cond", "body"))
    cond, body = operands[:n_cond], operands[n_cond : n_cond + n_body]
    carry = _carried(marking, *operands[n_cond + n_body :])
    refuse_summed(marking, *run(step.subs[1], [*cond, *carry]))
    return _carried(marking, *run(step.subs[0], [*body, *carry]))


@handles("cond")
def _cond(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    refuse_summed(marking, operands[0])
    branches = [run(sub, operands[1:]) for sub in step.subs]
    merged = []
    for k, states in enumerate(zip(*branches, strict=True)):
        rank = len(step.outs[k].shape)
        sources = [[(n, d) for n in range(len(states))] for d in range(rank)]
        merged.append(marking.result(step.outs[k], states, sources, "add"))
    return merged
