"""Gates on residual branches: one number for all that a block adds to its shortcut."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._groups import Groups
from jaxprune.core._names import listed, nearest
from jaxprune.core._types import ApplyFn, Array, PyTree
from jaxprune.coupling._branches import find_branches
from jaxprune.coupling._trace import twin_of
from jaxprune.coupling._walk import Walked, walk_program
from jaxprune.program._jaxprs import Program, trace_program, variable_path
from jaxprune.statistics.taps._named import call
from jaxprune.statistics.taps._program import Site, Tap, inner_program


def gate_branches(apply_fn: ApplyFn, groups: Groups) -> ApplyFn:
    """Transforms a function into one with a gate on every residual branch.

    A gate multiplies what its branch adds to the shortcut, so a gate of 0 is a removed
    branch: `without_branches` cuts it without any change. Gates are learned like
    weights, driven to 0 by an L1 norm (`training.proximal_group_lasso` on leaves of
    shape [1] reaches 0 exactly).

    Args:
        apply_fn: the function; its first argument is the variables that `groups` were
            traced for. It may do more than the function traced, such as compute a
            loss.
        groups: what ``trace(..., writers="*")`` returned.

    Returns:
        A function ``(gates, variables, *args, **kwargs)`` with gates ``{branch: a
        number}``, of shape [] or [1]; branches without gates are left alone.

    Raises:
        ValueError: when called, if `gates` names no branch, a gate is no single number,
            or a branch is added where taps cannot act.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def net(params, x):
        ...     h = x @ params["stem"]
        ...     h = h + jax.nn.relu(h @ params["block/up"]) @ params["block/down"]
        ...     return h @ params["head"]
        >>> shapes = {"stem": (2, 4), "block/up": (4, 8), "block/down": (8, 4),
        ...           "head": (4, 1)}
        >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
        >>> x = jnp.ones((1, 2))
        >>> groups = jaxprune.trace(net, params, x, writers="*")
        >>> gated = gate_branches(net, groups)
        >>> bool(gated({"block": jnp.zeros(1)}, params, x)
        ...     == x @ params["stem"] @ params["head"])
        True
    """

    @functools.wraps(apply_fn)
    def gated(
        gates: Mapping[str, jax.Array],
        variables: PyTree,
        *args: PyTree,
        **kwargs: PyTree,
    ) -> Any:
        for name, gate in gates.items():
            if name not in groups.branches:
                known = listed(list(groups.branches)) if groups.branches else "none"
                raise ValueError(
                    f"gates names {name!r}, which is no branch; the branches are "
                    f"{known}{nearest(name, list(groups.branches))}; trace with "
                    "writers='*' finds them"
                )
            if np.size(gate) != 1:
                raise ValueError(
                    f"gates[{name!r}] has shape {np.shape(gate)}, but is to be one "
                    "number"
                )
        program = trace_program(apply_fn, variables, *args, **kwargs)
        sites = _sites(program, groups)
        taps = [Tap(sites[name], _multiply(gate)) for name, gate in gates.items()]
        return call(program, taps, variables, *args, **kwargs)[0]

    return gated


def _multiply(gate: jax.Array) -> Any:
    def act(value: Array, eqn: Any, operands: Any) -> tuple[Any, None]:
        del eqn, operands
        return jnp.asarray(value) * jnp.reshape(gate, ()).astype(value.dtype), None

    return act


def _sites(program: Program, groups: Groups) -> dict[str, Site]:
    """Where every branch is added.

    Raises:
        ValueError: if taps cannot act there.
    """
    paths = [path for path in map(variable_path, program.paths) if path is not None]
    place = {path: k for k, path in enumerate(paths)}
    free = [
        (place[member.path], member.axis)
        for group in groups.values()
        for member in group.members
        if group.stream and member.path in place
    ]
    _, walked = walk_program(program, len(paths), free=free)
    if walked.writers is None:
        return {}
    known = dict(zip(paths, walked.ins, strict=False))
    pairs = zip(program.out_paths, walked.outs, strict=True)
    twins = [twin_of(path, out, known) for path, out in pairs]
    numbers = [None if twin is None else place[twin] for twin in twins]
    found = find_branches(walked, paths, numbers, groups)
    return {
        name: Site(_path(walked, branch.eqn, name), branch.operand, operand=True)
        for name, branch in found.items()
    }


def _path(walked: Walked, eqn: Any, name: str) -> tuple[int, ...]:
    """The number of an equation, after those of the equations around it."""
    numbers = {id(each): k for k, each in enumerate(walked.jaxpr.eqns)}
    for step in walked.steps:
        if step.eqn is eqn:
            return (numbers[id(eqn)],)
        for sub in step.subs:
            inner = _path(sub, eqn, name)
            if inner and inner_program(step.eqn) is None:
                raise ValueError(
                    f"branch {name} is added inside {step.eqn.primitive.name}, where "
                    "taps cannot act"
                )
            if inner:
                return (numbers[id(step.eqn)], *inner)
    return ()
