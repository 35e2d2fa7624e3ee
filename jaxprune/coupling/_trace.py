"""`trace`: from any JAX function to the groups of axes that belong together."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxprune.core._functions import check_function
from jaxprune.core._groups import Groups
from jaxprune.core._leaves import leaf_names
from jaxprune.core._names import listed, matching, nearest, patterns
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.coupling._apart import apart_groups
from jaxprune.coupling._balance import Balance
from jaxprune.coupling._branches import find_branches
from jaxprune.coupling._collect import collect_groups, find_groups
from jaxprune.coupling._labels import Value, take
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._lines import explain
from jaxprune.coupling._roles import Whole
from jaxprune.coupling._solve import solve
from jaxprune.coupling._walk import Walked, walk_program
from jaxprune.program._collector import collector_paused
from jaxprune.program._jaxprs import Program, is_array, trace_program


@collector_paused()
def trace(
    apply_fn: ApplyFn,
    variables: PyTree,
    *args: PyTree,
    pin: str | Sequence[str] = (),
    unpin: str | Sequence[str] = (),
    balanced: str | Sequence[str] = (),
    writers: str | Sequence[str] = (),
    layers: bool = False,
    per_layer: str | Sequence[str] = (),
    roles: bool = False,
    **kwargs: PyTree,
) -> Groups:
    """Finds which parameter axes must be cut together.

    Walks the jaxpr of ``apply_fn(variables, *args, **kwargs)`` once. Works for any
    function that JAX can trace (Linen, NNX, Equinox, Haiku, hand-written), from
    shapes alone. What cannot be understood is pinned, with the reason.

    The inputs and outputs of the function keep their shapes, with one exception: an
    output that is the new value of a variable (its path ends in the path of a leaf of
    `variables` of the same shape, as for a mutated Flax collection) is cut along with
    that variable.

    Args:
        apply_fn: the function; its first argument is `variables`.
        variables: pytree of arrays or `jax.ShapeDtypeStruct`; nothing is computed.
        *args: further arguments; arrays or shapes are traced, the rest is static.
        pin: glob patterns of leaves (``"params/head/*"``), single axes
            (``"params/head/kernel:0"``) or labels of groups (``"residual stream"``)
            that must not be cut. Of an axis that holds heads times features, a label
            pins both.
        unpin: glob patterns of outputs (``"output/1/cache/*"``) that may shrink.
        balanced: names, labels or patterns of groups whose blocks (the channels of one
            group of a convolution, the features of one head) lose units of their own,
            as many in every block, instead of the same in all. Where the program
            computes a group's blocks together it stays as it is.
        writers: leaves or axes, as patterns (``"params/*/conv2/kernel:3"``; ``"*"`` for
            all that can), of what is added to a residual stream and may lose units that
            the stream keeps. Such a writer has a group of its own (`Group.stream` names
            that of the stream, whose units still cut all writers): its removed units
            add 0, and `narrow` adds the smaller result into the positions that are
            left, by padding where they are a prefix or evenly spaced. This is the
            zero padding match of Kuratsu and Nakamura, `Slimmable Pruned Neural
            Networks <https://arxiv.org/abs/2212.03415>`_, 2022. Masks of such groups
            mean the same to `narrow` whatever was traced.
        layers: the layers that a scan iterates over (`flax.linen.scan`, stacked NNX
            modules, `haiku.layer_stack`) are units too: cutting one takes it out of the
            stacked parameters and shortens the scan. Where a layer of zeros is not the
            identity, as a residual block is, the axis stays pinned. Masks of such
            groups mean the same to `narrow` whatever was traced.
        per_layer: names, labels or patterns of groups of which every layer of a scan
            loses units of its own, as many as the others (``"*"`` for all that can):
            hidden units, heads, experts. The units of such a group are those of the
            first layer, then those of the next, and so on; the smaller scan has one
            shape for all. What is carried from layer to layer stays the same in all.
        roles: also find which members make the units and which read them, and whether
            equal units can be merged (`Member.role`, `Group.obstacle`); it is proven
            on the program, in about half the time again.
        **kwargs: further arguments, treated like `args`.

    Returns:
        An immutable mapping name -> `Group`; ``.pinned`` explains every axis, or part
        of one, that cannot be cut.

    Raises:
        TypeError: if `apply_fn` is a module instead of a function of its variables.
        ValueError: if a pattern matches nothing, `balanced` nothing that has
            independent blocks or `per_layer` nothing that has independent layers, or if
            `writers` names what is not added to a stream or does not add 0 where it is
            removed.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 3)))
        >>> [(g.name, g.size) for g in groups.values()]
        [('w1:1', 8)]
    """
    check_function(apply_fn)
    leaves, treedef = jax.tree.flatten(variables)
    names = leaf_names(variables, treedef)  # first: it names paths as the caller does
    program = trace_program(apply_fn, variables, *args, **kwargs)
    shapes = dict(zip(names, map(np.shape, leaves), strict=True))
    arrays = list(itertools.compress(names, map(is_array, leaves)))
    freed = _freed(patterns("writers", writers), arrays, shapes)
    places = [(k, d) for own in freed.values() for k, d in own]
    stacked = [(k, 0) for k, name in enumerate(arrays) if layers and shapes[name]]
    ledger, walked = walk_program(program, len(arrays), free=places, layers=stacked)
    known = dict(zip(arrays, walked.ins, strict=False))
    _check_writers(ledger, walked, freed)
    labels = _pin(ledger, known, patterns("pin", pin))
    unpinned = patterns("unpin", unpin)
    twins = _close_outputs(ledger, program, walked.outs, known, unpinned)
    ordered = _order_by_use(ledger, walked, known, twins)
    if labels:
        groups = collect_groups(
            ledger, solve(ledger), ordered, shapes, treedef, walked=walked
        )
        _pin_labels(ledger, known, groups, labels)
    solution = solve(ledger)
    if walked.writers is not None and walked.writers.keep_one(solution):
        solution = solve(ledger)
    whole = Whole(walked, arrays, twins) if roles else None
    groups = collect_groups(ledger, solution, ordered, shapes, treedef, whole, walked)
    if walked.writers is not None:
        found = find_branches(walked, arrays, twins, groups)
        branches = {name: branch.groups for name, branch in found.items()}
        groups = dataclasses.replace(groups, branches=branches)
    if not (balanced or per_layer):
        return groups
    found = find_groups(ledger, solution, ordered)
    balance = Balance(solution, walked, found, layers=bool(per_layer))
    apart = {"balanced": balanced, "per_layer": per_layer}
    options = {option: patterns(option, given) for option, given in apart.items()}
    return apart_groups(groups, balance, known, options)


def _freed(
    writers: Sequence[str],
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, list[tuple[int, int]]]:
    """For every pattern the axes that it names, as (number of a leaf, axis)."""
    axes = {
        f"{name}:{d}": (k, d)
        for k, name in enumerate(names)
        for d in range(len(shapes[name]))
    }
    found: dict[str, list[tuple[int, int]]] = {}
    for pattern in writers:
        leaves = set(matching(pattern, names))
        found[pattern] = [
            place for axis, place in axes.items() if axis.rpartition(":")[0] in leaves
        ] or [axes[axis] for axis in matching(pattern, axes)]
        if not found[pattern]:
            raise ValueError(
                f"writers pattern {pattern!r} matches no axis of variables; the leaves "
                f"are {listed(names)}{nearest(pattern, [*names, *axes])}"
            )
    return found


def _check_writers(
    ledger: Ledger,
    walked: Walked,
    freed: Mapping[str, Sequence[tuple[int, int]]],
) -> None:
    """Every pattern but ``"*"`` must name a writer with units of its own."""
    writers = walked.writers
    if writers is None:
        return
    for pattern, places in freed.items():
        axes = [walked.ins[k].axes[d] for k, d in places]
        blocks = [ledger.block(a[0].units) for a in axes if not isinstance(a, int)]
        if pattern != "*" and writers.blocks().keys().isdisjoint(blocks):
            refused = [
                reason
                for key, reason in writers.refused.items()
                if ledger.block(ledger.blocks[key]) in blocks
            ]
            why = explain(ledger, refused[0]) if refused else "it is added to no stream"
            raise ValueError(
                f"writers pattern {pattern!r} names no writer that may lose units of "
                f"its own: {why}"
            )


def _pin(ledger: Ledger, known: dict[str, Value], pins: Sequence[str]) -> list[str]:
    """Freezes axes; returns the patterns that match none, which may be labels."""
    why, others = ledger.reason("pinned"), []
    axes = {f"{n}:{d}": axis for n, v in known.items() for d, axis in enumerate(v.axes)}
    for pattern in pins:
        leaves = set(matching(pattern, known))
        whole = [name for name in axes if name.rpartition(":")[0] in leaves]
        found = whole if pattern in leaves else whole + matching(pattern, axes)
        for name in found:
            ledger.freeze(axes[name], why)
        if not found and not leaves:
            others.append(pattern)
    return others


def _pin_labels(
    ledger: Ledger, known: dict[str, Value], groups: Groups, pins: Sequence[str]
) -> None:
    """Freezes the positions of groups, which have labels once they are found."""
    why = ledger.reason("pinned")
    for pattern in pins:
        found = matching(pattern, groups)
        for member in itertools.chain.from_iterable(groups[n].members for n in found):
            axis = known[member.path].axes[member.axis]
            ledger.freeze(take(axis, member.index.ravel()), why)
        if not found:
            axes = [f"{n}:{d}" for n, v in known.items() for d in range(len(v.axes))]
            labels = [group.label for group in groups.values()]
            raise ValueError(
                f"pin pattern {pattern!r} matches no axis of variables; the leaves "
                f"are {listed(known)}{nearest(pattern, [*known, *axes, *labels])}"
            )


def _close_outputs(
    ledger: Ledger,
    program: Program,
    outs: list[Value],
    known: dict[str, Value],
    unpinned: Sequence[str],
) -> list[int | None]:
    """Outputs keep their shape, unless they are new values of variables: of which?"""
    names = ["/".join(filter(None, ("output", path))) for path in program.out_paths]
    free: set[str] = set()
    for pattern in unpinned:
        found = matching(pattern, names)
        if not found:
            raise ValueError(
                f"unpin pattern {pattern!r} matches no output; the outputs are "
                f"{listed(names)}{nearest(pattern, names)}"
            )
        free.update(found)
    twins = [twin_of(p, v, known) for p, v in zip(program.out_paths, outs, strict=True)]
    for name, twin, out in zip(names, twins, outs, strict=True):
        why = ledger.reason("output", name=name)
        for d, axis in enumerate(out.axes):
            if twin is not None:
                ledger.tie(axis, known[twin].axes[d])
            elif name not in free:
                ledger.freeze(axis, why)
    place = {name: k for k, name in enumerate(known)}
    return [None if twin is None else place[twin] for twin in twins]


def twin_of(path: str, out: Value, known: dict[str, Value]) -> str | None:
    """The variable that this output is the new value of, if any."""
    parts = path.split("/")
    for start in range(len(parts)):
        name = "/".join(parts[start:])
        if name in known and known[name].shape == out.shape:
            return name
    return None


def _order_by_use(
    ledger: Ledger,
    walked: Walked,
    known: dict[str, Value],
    twins: Sequence[int | None],
) -> dict[str, Value]:
    """The variables in the order of their first use; the unused are pinned.

    A variable that is written and never read, as running statistics in training, is
    used too: it is cut along with its new value.
    """
    inputs = dict(zip(map(id, walked.jaxpr.invars), known, strict=False))
    used = _first_uses(walked, inputs)
    names = list(known)
    for out, twin in zip(walked.jaxpr.outvars, twins, strict=True):
        if twin is not None and inputs.get(id(out)) != names[twin]:
            used.setdefault(names[twin], None)
    why = ledger.reason("unused")
    for name, value in known.items():
        if name not in used:
            for axis in value.axes:
                ledger.freeze(axis, why)
    return {name: known[name] for name in {**used, **known}}


def _first_uses(walked: Walked, inputs: Mapping[int, str]) -> dict[str, None]:
    """The named inputs of a program in the order in which its equations read them.

    Looks into inner programs whose inputs are the operands of their equation (jit,
    remat, scan); the operands of others count in the order they are listed in.

    Args:
        walked: the program.
        inputs: id of an input variable -> name.
    """
    used: dict[str, None] = {}
    for step in walked.steps:
        operands = list(map(id, step.eqn.invars))
        if inputs.keys().isdisjoint(operands):
            continue
        if step.subs and len(step.subs[0].ins) == len(step.eqn.invars):
            inner = step.subs[0]
            pairs = zip(inner.jaxpr.invars, step.eqn.invars, strict=True)
            within = {id(v): inputs[id(w)] for v, w in pairs if id(w) in inputs}
            used.update(_first_uses(inner, within))
        used.update((inputs[v], None) for v in operands if v in inputs)
    return used
