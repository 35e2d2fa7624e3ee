"""Taps on the units of groups: gates on them, and what they carry.

Multiplying by 0 where a program sums over a unit is cutting the unit.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._groups import Groups
from jaxprune.core._types import ApplyFn, Array, PyTree
from jaxprune.program._jaxprs import Program, trace_program
from jaxprune.program._types import Equation
from jaxprune.statistics.taps._named import call
from jaxprune.statistics.taps._program import Tap
from jaxprune.statistics.taps._units import UnitSite, unit_sites

Observe = Callable[[jax.Array], jax.Array]


def gate(apply_fn: ApplyFn, groups: Groups) -> ApplyFn:
    """Transforms a function into one with a gate on every unit.

    A gate multiplies its unit where the program sums over it, so a gate of 0 is a
    removed unit: with gates of 0 and 1 the result is that of the masked parameters,
    for exact groups. The derivative by a gate at 1 is how the result changes as the
    unit goes; all coupled sites add up in it.

    Args:
        apply_fn: the function; its first argument is the variables that `groups` were
            traced for, or their ``params`` collection. It may do more than the function
            traced, such as compute a loss.
        groups: what `trace` returned.

    Returns:
        A function ``(gates, variables, *args, **kwargs)`` with gates ``{group:
        float[size]}``; groups without gates are left alone. ``jax.vmap`` over gates
        and a batch gives every example its own.

    Raises:
        ValueError: when called, if `gates` names no group or has another size, or a
            group is used where taps cannot act.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 2)), "w2": jnp.array([[2.0], [5.0]])}
        >>> x = jnp.array([[3.0]])
        >>> gated = gate(mlp, jaxprune.trace(mlp, params, x))
        >>> gated({"w1:1": jnp.array([1.0, 0.0])}, params, x)
        Array([[6.]], dtype=float32)

    References:
        Liu et al., `Group Fisher Pruning for Practical Network Compression
        <https://arxiv.org/abs/2108.00708>`_, 2021 (one gate for all coupled sites)
    """

    @functools.wraps(apply_fn)
    def gated(
        gates: Mapping[str, jax.Array],
        variables: PyTree,
        *args: PyTree,
        **kwargs: PyTree,
    ) -> Any:
        _check_gates(groups, gates)
        program = trace_program(apply_fn, variables, *args, **kwargs)
        taps = [
            Tap(site.site, _multiply(site, gates[name]))
            for name, sites in unit_sites(program, groups, gates).items()
            for site in sites
        ]
        return call(program, taps, variables, *args, **kwargs)[0]

    return gated


def observe(
    program: Program, groups: Groups, what: Observe, args: Sequence[Any]
) -> dict[str, list[tuple[jax.Array, np.ndarray]]]:
    """Reads the activations that products (if none, sums) take in, unit by unit.

    Args:
        program: traced from the variables and further arguments.
        groups: what `trace` returned.
        what: elementwise function of an activation.
        args: the arguments, variables first.

    Returns:
        Group -> for every site the sum of ``what(activation)`` over everything that a
        unit holds, ``[size]``, and over how many entries that is.

    Raises:
        ValueError: if no activation carries the units of a group.
    """
    chosen, taps = _activations(program, groups), []
    for name, sites in chosen.items():
        for k, site in enumerate(sites):
            look = functools.partial(_look, site, groups[name].size, what)
            taps.append(Tap(site.site, look, (name, k)))
    _, notes = call(program, taps, *args)
    return {
        name: [
            (
                notes[name, k].reshape(-1, groups[name].size).sum(0),
                entries(site, groups[name].size),
            )
            for k, site in enumerate(sites)
        ]
        for name, sites in chosen.items()
    }


def probe(apply_fn: ApplyFn, groups: Groups) -> ApplyFn:
    """Transforms a function so that derivatives by activations can be squared.

    Args:
        apply_fn: as in `gate`.
        groups: what `trace` returned.

    Returns:
        A function ``(probes, variables, *args, **kwargs)`` with probes ``{group:
        float[size]}`` that change nothing. The derivative of a scalar result by a probe
        is the sum of squares of its derivatives by all that the unit holds where
        products (if none, sums) take it in.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return (jax.nn.relu(x @ params["w1"]) @ params["w2"]).sum()
        >>> params = {"w1": jnp.ones((1, 2)), "w2": jnp.array([[2.0], [5.0]])}
        >>> x = jnp.array([[3.0], [4.0]])
        >>> probed = probe(mlp, jaxprune.trace(mlp, params, x))
        >>> jax.grad(probed)({"w1:1": jnp.zeros(2)}, params, x)  # of two examples
        {'w1:1': Array([ 8., 50.], dtype=float32)}
    """

    @functools.wraps(apply_fn)
    def probed(
        probes: Mapping[str, jax.Array],
        variables: PyTree,
        *args: PyTree,
        **kwargs: PyTree,
    ) -> Any:
        _check_gates(groups, probes)
        program = trace_program(apply_fn, variables, *args, **kwargs)
        taps = [
            Tap(site.site, _probe(site, probes[name]))
            for name, sites in _activations(program, groups).items()
            for site in sites
        ]
        return call(program, taps, variables, *args, **kwargs)[0]

    return probed


def _probe(site: UnitSite, held: jax.Array) -> Callable[..., tuple[Any, None]]:
    @jax.custom_vjp
    def through(value: jax.Array, held: jax.Array) -> jax.Array:
        del held
        return value

    def backward(_: None, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
        squares = sum_units(site, len(held), jnp.square(slope.astype(held.dtype)))
        return slope, squares

    through.defvjp(lambda value, held: (through(value, held), None), backward)

    def act(value: Array, eqn: Equation, operands: Any) -> tuple[Any, None]:
        del eqn, operands
        return through(jnp.asarray(value), held), None

    return act


def _activations(program: Program, groups: Groups) -> dict[str, list[UnitSite]]:
    """The activations that products (if none, sums) take in, of every group.

    Raises:
        ValueError: if no activation carries the units of a group.
    """
    chosen = {
        name: [s for s in sites if s.data and s.product] or [s for s in sites if s.data]
        for name, sites in unit_sites(program, groups, groups).items()
    }
    for name, sites in chosen.items():
        if not sites:
            raise ValueError(
                f"group {name} is in no activation that a product or a sum takes in, "
                "so its units have no activation"
            )
    return chosen


def _look(
    site: UnitSite,
    size: int,
    what: Observe,
    value: jax.Array,
    eqn: Equation,
    operands: Any,
) -> tuple[jax.Array, jax.Array]:
    return value, sum_units(site, size, what(value))


def _check_gates(groups: Groups, gates: Mapping[str, Array]) -> None:
    for name, values in gates.items():
        if name not in groups:
            raise ValueError(
                f"gates names the group {name!r}, which does not exist; the groups are "
                f"{', '.join(groups)}"
            )
        if np.shape(values) != (groups[name].size,):
            raise ValueError(
                f"gates[{name!r}] has shape {np.shape(values)}, but the group has "
                f"{groups[name].size} units"
            )


def _multiply(site: UnitSite, gates: jax.Array) -> Callable[..., tuple[Any, None]]:
    spread = spread_units(site, gates)

    def act(value: Array, eqn: Equation, operands: Any) -> tuple[Any, None]:
        wide = jnp.asarray(value).astype(spread.dtype)
        return (wide * spread).astype(value.dtype), None

    return act


def spread_units(site: UnitSite, gates: jax.Array) -> jax.Array:
    """A number per unit, laid out over the operand's axes; 1 where there is no unit."""
    gates = jnp.asarray(gates)
    if not np.array_equal(site.units, np.arange(len(gates))):
        gates = jnp.concatenate([gates, jnp.ones(1, gates.dtype)])[site.units]
    shape = [1] * len(site.shape)
    shape[site.axis] = -1
    return gates.reshape(shape)


def sum_units(site: UnitSite, size: int, values: jax.Array) -> jax.Array:
    """Adds up an operand-shaped array over everything a unit holds: ``[size]``."""
    others = tuple(axis for axis in range(values.ndim) if axis != site.axis)
    sums = values.sum(others)
    if np.array_equal(site.units, np.arange(size)):
        return sums
    return jnp.zeros(size + 1, sums.dtype).at[site.units].add(sums)[:size]


def entries(site: UnitSite, size: int) -> np.ndarray:
    """How many entries of the operand every unit holds, in all steps: ``[size]``."""
    each = math.prod(site.shape) // site.shape[site.axis] * site.steps
    return np.bincount(site.units, minlength=size + 1)[:size] * each
