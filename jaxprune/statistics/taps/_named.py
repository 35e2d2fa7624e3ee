"""`names`, `read`, `modify`: taps on the activations that have a name."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._names import matching
from jaxprune.core._types import ApplyFn, Array, PyTree
from jaxprune.program._jaxprs import Program, is_array, trace_program
from jaxprune.program._types import Equation
from jaxprune.statistics.taps._names import Found, named_sites
from jaxprune.statistics.taps._program import Tap, run

Edit = Callable[[jax.Array], jax.Array] | jax.Array | np.ndarray


def names(
    apply_fn: ApplyFn, variables: PyTree, *args: PyTree, **kwargs: PyTree
) -> dict[str, jax.ShapeDtypeStruct]:
    """The activations of a function that have a name, with their shapes.

    Names come from

    * layers: ``"block/conv"`` is what the layer returns that holds the parameters
      ``block/conv/...`` of `variables`: what the last of them to meet an activation
      makes of it. ``"block/conv:input"`` is what the first of them meets (of a
      BatchNorm in training, the centred value). A parameter outside of any layer, such
      as ``w1``, is a layer itself;
    * scopes: ``"Model/block"`` for what `jax.named_scope` or a Flax Linen module
      returns, if no layer names it already;
    * markers: the name given to `jax.ad_checkpoint.checkpoint_name`.

    A second use of a layer is ``"name#2"``. Layers inside ``lax.scan`` have one entry
    per step, stacked along axis 0. What lies inside a while loop, a branch of
    ``lax.cond`` or a function with a derivative of its own has no name.

    Args:
        apply_fn: the function; its first argument is `variables`.
        variables: pytree of arrays or shapes; nothing is computed.
        *args: further arguments; arrays or shapes are traced, the rest is static.
        **kwargs: further arguments, treated like `args`.

    Returns:
        Name -> shape and dtype, in the order of the program.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))}
        >>> {n: a.shape for n, a in names(mlp, params, jnp.ones((1, 3))).items()}
        {'w1:input': (1, 3), 'w1': (1, 8), 'w2:input': (1, 8), 'w2': (1, 2)}
    """
    program = trace_program(apply_fn, variables, *args, **kwargs)
    return {name: found.shape for name, found in named_sites(program).items()}


def read(
    apply_fn: ApplyFn, names: str | Sequence[str]
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """Transforms a function into one that also returns activations.

    Args:
        apply_fn: the function; its first argument is the variables.
        names: names as `taps.names` lists them, or glob patterns of names
            (``"block*/conv"``).

    Returns:
        A function with the signature of `apply_fn` that returns ``(result, {name:
        activation})``.

    Raises:
        ValueError: when called, if a name or pattern matches nothing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, -1.0]]), "w2": jnp.array([[2.0], [2.0]])}
        >>> read(mlp, ["w1", "w2:input"])(params, jnp.array([[3.0]]))
        (Array([[6.]], dtype=float32), {'w1': Array([[ 3., -3.]], dtype=float32),
        'w2:input': Array([[3., 0.]], dtype=float32)})
    """
    patterns = [names] if isinstance(names, str) else list(names)

    def note(value: Array, eqn: Equation, operands: object) -> tuple[Any, Any]:
        return value, value

    @functools.wraps(apply_fn)
    def reading(variables: PyTree, *args: PyTree, **kwargs: PyTree) -> Any:
        program = trace_program(apply_fn, variables, *args, **kwargs)
        chosen = _matching(named_sites(program), patterns)
        taps = [Tap(found.site, note, name) for name, found in chosen.items()]
        result, notes = call(program, taps, variables, *args, **kwargs)
        return result, {name: notes[name] for name in chosen}

    return reading


def modify(apply_fn: ApplyFn, edits: Mapping[str, Edit]) -> ApplyFn:
    """Transforms a function into one with other activations inside.

    Args:
        apply_fn: the function; its first argument is the variables.
        edits: name (as `taps.names` lists them) or glob pattern of names -> a
            function from the activation to what takes its place, of the same shape and
            dtype, or an array that takes its place. ``{"conv": lambda a: a * gate}``
            multiplies. Inside ``lax.scan`` it acts at every step, on the activation
            of the step.

    Returns:
        A function with the signature of `apply_fn`.

    Raises:
        ValueError: when called, if a name or pattern matches nothing, or the shape or
            dtype would change.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 2)), "w2": jnp.array([[2.0], [5.0]])}
        >>> gate = jnp.array([[1.0, 0.0]])
        >>> modify(mlp, {"w2:input": lambda a: a * gate})(params, jnp.array([[3.0]]))
        Array([[6.]], dtype=float32)
    """

    @functools.wraps(apply_fn)
    def modified(variables: PyTree, *args: PyTree, **kwargs: PyTree) -> Any:
        program = trace_program(apply_fn, variables, *args, **kwargs)
        sites = named_sites(program)
        taps = [
            Tap(found.site, _editor(name, edit))
            for pattern, edit in edits.items()
            for name, found in _matching(sites, [pattern]).items()
        ]
        return call(program, taps, variables, *args, **kwargs)[0]

    return modified


def call(
    program: Program, taps: Sequence[Tap], *args: PyTree, **kwargs: PyTree
) -> tuple[Any, dict[Any, Any]]:
    """Runs a traced program on arguments of the structure it was traced with."""
    arrays = [leaf for leaf in jax.tree.leaves((args, kwargs)) if is_array(leaf)]
    outs, notes = run(program.closed, arrays, taps)
    return jax.tree.unflatten(program.out_tree, outs), notes


def _editor(name: str, edit: object) -> Callable[..., tuple[Any, None]]:
    def act(value: Array, eqn: Equation, operands: object) -> tuple[Any, None]:
        new = jnp.asarray(edit(value) if callable(edit) else edit)
        if new.shape != value.shape or new.dtype != value.dtype:
            raise ValueError(
                f"the activation {name!r} has shape {value.shape} and dtype "
                f"{value.dtype}, but its replacement has shape {new.shape} "
                f"and dtype {new.dtype}"
            )
        return new, None

    return act


def _matching(sites: Mapping[str, Found], patterns: Sequence[str]) -> dict[str, Found]:
    chosen: dict[str, Found] = {}
    for pattern in patterns:
        found = {name: sites[name] for name in matching(pattern, sites)}
        if not found:
            raise ValueError(
                f"no activation is called {pattern!r}; the names are "
                f"{', '.join(sites)} (a layer inside a while loop, a branch or a "
                "function with a derivative of its own has none)"
            )
        chosen |= found
    return chosen
