"""`narrow`: any JAX function, as if it had been written for the smaller shapes."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.core import Tracer

from jaxprune.core._functions import check_function
from jaxprune.core._layer_masks import kept_of_sliced
from jaxprune.core._leaves import leaf_names
from jaxprune.core._names import listed
from jaxprune.core._positions import BoolArray, count_kept
from jaxprune.core._types import ApplyFn, PyTree, PyTreeDef
from jaxprune.coupling._trace import twin_of
from jaxprune.narrowing._decide import SILENT, Alive, untraced
from jaxprune.narrowing._replay import Part, Restricted, restrict
from jaxprune.narrowing._unrolled import narrow_unrolled
from jaxprune.program._collector import collector_paused
from jaxprune.program._jaxprs import Program, abstract, is_array, trace_program


def narrow(
    apply_fn: ApplyFn,
    masks: PyTree,
    *,
    statistics: Literal["masked", "kept"] = "masked",
    unroll: bool = False,
) -> ApplyFn:
    """Transforms a function of full-size variables into one of sliced variables.

    The contract::

        small = slice_params(variables, masks)
        narrow(apply_fn, masks)(small, *args) == apply_fn(
            apply_masks(variables, masks), *args)          # to float rounding

    whenever the groups that `masks` cuts are exact (`Group.exact`). Sums, maxima and
    contractions over an axis that is cut count what the masked program holds at the
    dead positions (exp(0) in a softmax), computed once for all of them. Like `jax.vmap`
    it is a transformation: same signature, same static arguments, usable under jit,
    grad, vmap, scan and export. The program is traced at its original shapes, which
    the masks know, and written down at the smaller ones, with the source lines and
    scopes of its equations; it runs as one call of a jitted function, or equation by
    equation under `jax.disable_jit`. Random draws keep the numbers of the original
    program.

    Args:
        apply_fn: the function; its first argument is the variables.
        masks: tree like the variables, bool, True = kept, broadcastable, concrete.
        statistics: what a reduction over an axis that is cut runs over. ``"masked"``:
            what the masked program holds, which is the contract. ``"kept"``: what is
            kept alone; a sum over N positions that is divided by N (or N - 1) is then
            divided by as many as are kept. So a LayerNorm has the mean and variance of
            the smaller layer, like a network built at that width, which width pruning
            followed by distillation wants (Muralidharan et al., `Minitron
            <https://arxiv.org/abs/2407.14679>`_, 2024); the result differs from the
            masked model.
        unroll: write out the scans whose layers lose units of their own, so that they
            may keep different numbers. The variables are those of
            ``slice_params(..., unroll=True)``. What it costs: the program has the body
            of the scan once for every layer, so its equations and the time to compile
            it grow with the number of layers (see `jaxprune.costing.equations`), and
            new values that such a scan stacks cannot differ in size.

    Returns:
        A function with the signature of `apply_fn` that takes sliced variables. New
        values of variables (mutated Flax collections) come out sliced too.

    Raises:
        TypeError: if `apply_fn` is a module, or the masks are tracers.
        ValueError: if `statistics` is neither; when called, if the variables do not
            have the sliced shapes, if the masks cut a unit in one axis and keep it in a
            coupled one, or if they cut an axis that cannot be cut. The text names the
            axes.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 3)))
        >>> keep = {"w1:1": jnp.arange(8) < 5}
        >>> masks = jaxprune.expand_masks(groups, keep)
        >>> small = jaxprune.slice_params(params, masks)
        >>> small["w1"].shape, small["w2"].shape
        ((3, 5), (5, 2))
        >>> jaxprune.narrow(mlp, masks)(small, jnp.ones((1, 3)))
        Array([[15., 15.]], dtype=float32)
    """
    check_function(apply_fn)
    if statistics not in ("masked", "kept"):
        raise ValueError(f"statistics must be 'masked' or 'kept', got {statistics!r}")
    leaves, treedef = jax.tree.flatten(masks)
    names = leaf_names(masks, treedef)
    flat = list(zip(names, map(_concrete, names, leaves), strict=True))
    if unroll:
        run = functools.partial(narrow, statistics=statistics)
        return functools.wraps(apply_fn)(narrow_unrolled(apply_fn, masks, run))
    restricted: dict[Program, Restricted] = {}

    @functools.wraps(apply_fn)
    @collector_paused()
    def small_apply(variables: PyTree, *args: PyTree, **kwargs: PyTree) -> Any:
        full, alive = _full_shapes(variables, flat, treedef)
        program = trace_program(apply_fn, full, *args, **kwargs)
        ready = restricted.get(program)
        if ready is None:
            names = [path.split("/", 2)[-1] for path in program.paths[: len(alive)]]
            given = [Part(each, (True,) * len(each)) for each in alive]
            counts = statistics == "masked"
            ready = restrict(program, given, names, counts_removed=counts)
            _check_new_values(ready, names)
        if ready.lasting:
            restricted[program] = ready
        arrays = jax.tree.leaves(((variables, *args), kwargs))
        return ready.flat([x for x in arrays if is_array(x)])

    return small_apply


def _check_new_values(ready: Restricted, names: Sequence[str]) -> None:
    """New values of variables have the shapes of the variables."""
    known = dict(zip(names, ready.walked.ins, strict=False))
    for path, out in zip(ready.program.out_paths, ready.walked.outs, strict=True):
        name = twin_of(path, out, known)
        if name is None:
            continue
        got, expected = ready.kept.shape(out), ready.kept.shape(known[name])
        if got != expected:
            raise ValueError(
                f"apply_fn returns a new {name} of shape {got}, but the masks leave "
                f"{expected} of it{untraced(name)}"
            )


def _concrete(name: str, mask: BoolArray) -> np.ndarray:
    if isinstance(mask, Tracer):
        raise TypeError(
            f"masks[{name!r}] is a tracer, but narrow changes shapes and needs to know "
            "them while tracing; build the masks outside of jit"
        )
    array = np.asarray(mask)
    if array.dtype != bool:
        raise TypeError(f"masks[{name!r}] has dtype {array.dtype}, expected bool")
    return array


def _full_shapes(
    variables: PyTree, masks: Sequence[tuple[str, np.ndarray]], treedef: PyTreeDef
) -> tuple[Any, list[list[Alive]]]:
    """The variables at their original shapes, and which positions of each live."""
    leaves, tree = jax.tree.flatten(variables)
    if tree != treedef:
        raise ValueError(_other_tree(variables, [name for name, _ in masks]))
    full: list[Any] = []
    alive: list[list[Alive]] = []
    for leaf, (name, mask) in zip(leaves, masks, strict=True):
        if not is_array(leaf):
            full.append(leaf)
            continue
        shape = _full_shape(name, np.shape(leaf), mask)
        keep: list[Alive] = list(kept_of_sliced(mask, shape, np.shape(leaf)))
        _check_sliced(name, np.shape(leaf), shape, keep)
        if mask.ndim and not mask.any():
            # An emptied leaf: its other axes follow whatever they are coupled to.
            keep = [SILENT if mask is None else mask for mask in keep]
        full.append(abstract(leaf, shape))
        alive.append(keep)
    return jax.tree.unflatten(tree, full), alive


def _other_tree(variables: PyTree, masked: Sequence[str]) -> str:
    """Why these variables are not those that the masks were made for."""
    given = leaf_names(variables, jax.tree.structure(variables))
    collection = masked[0].partition("/")[0] if masked else ""
    if {f"{collection}/{name}" for name in given} <= set(masked):
        return (
            f"the function takes all variables, but got the collection "
            f"{collection!r} alone; call it with {{{collection!r}: ...}} and whatever "
            "else the masks were made for, "
            f"{listed(list(dict.fromkeys(n.partition('/')[0] for n in masked)))}"
        )
    missing = [name for name in masked if name not in set(given)]
    unknown = [name for name in given if name not in set(masked)]
    parts = [f"lack {listed(missing, 3)}"] * bool(missing)
    parts += [f"have {listed(unknown, 3)}, which no mask is for"] * bool(unknown)
    cause = " and ".join(parts) or "hold the same leaves in other containers"
    return f"variables {cause}; were the masks made for the same model?"


def _full_shape(name: str, small: tuple[int, ...], mask: np.ndarray) -> tuple[int, ...]:
    if mask.ndim == 0:
        return small
    if mask.ndim != len(small):
        raise ValueError(
            f"variables[{name!r}] has shape {small} but its mask has shape "
            f"{mask.shape}; a mask has the rank of its leaf, or is a scalar"
        )
    return tuple(n if m == 1 else m for n, m in zip(small, mask.shape, strict=True))


def _check_sliced(
    name: str, small: tuple[int, ...], full: tuple[int, ...], keep: list
) -> None:
    for d, (got, mask) in enumerate(zip(small, keep, strict=True)):
        expected = full[d] if mask is None else count_kept(mask, d)
        if got != expected:
            cause = (
                "they have not been sliced with these masks (see slice_params)"
                if got == full[d]
                else "were they sliced with other masks?"
            )
            raise ValueError(
                f"variables[{name!r}] axis {d} has size {got}, expected {expected} "
                f"after slicing {full[d]}; {cause}"
            )
