"""Plans: the decision which units stay, as data that can be saved, replayed and proven.

A plan is the ``keep`` mapping that `select` returns. It names groups, not arrays, so it
replays on any checkpoint of the same model.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._checks import refuse_traced
from jaxprune.core._groups import Group, Groups
from jaxprune.core._masks import apply_masks, expand_masks
from jaxprune.core._positions import BoolArray
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.coupling._trace import trace
from jaxprune.io._files import first_line, read_regular, write_atomically
from jaxprune.narrowing._narrow import narrow
from jaxprune.program._jaxprs import is_array
from jaxprune.surgery._permuting import can_permute, permute
from jaxprune.surgery._slicing import slice_params

FORMAT = 1
_LARGEST = 2**28  # bytes


def save(
    path: str | os.PathLike[str], groups: Groups, keep: Mapping[str, BoolArray]
) -> None:
    """Writes a plan as JSON.

    Args:
        path: the file to write.
        groups: what `trace` returned.
        keep: group name -> bool ``[size]``, True = kept; concrete.

    Raises:
        ValueError: if a name is no group or a length is not the group's size.

    Example:
        >>> import tempfile, numpy as np, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 3)))
        >>> plan = {"w1:1": np.array([True, False, True, True])}
        >>> file = tempfile.NamedTemporaryFile(suffix=".json")
        >>> jaxprune.plans.save(file.name, groups, plan)
        >>> jaxprune.plans.load(file.name, groups)
        {'w1:1': array([ True, False,  True,  True])}
    """
    text = json.dumps(as_json(groups, keep), indent=1)
    write_atomically(path, text + "\n")


def load(path: str | os.PathLike[str], groups: Groups) -> dict[str, np.ndarray]:
    """Reads a plan back, for the same model.

    Args:
        path: a file that `save` wrote.
        groups: what `trace` returns for the model at hand.

    Returns:
        Group name -> bool ``[size]``, True = kept.

    Raises:
        ValueError: if the file is not a plan, or was made for another model: the text
            names the first group that differs and how.
    """
    try:
        data = json.loads(
            read_regular(pathlib.Path(path), _LARGEST), object_pairs_hook=_distinct
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a plan: {first_line(error)}") from error
    return from_json(data, groups, str(path))


def as_json(groups: Groups, keep: Mapping[str, BoolArray]) -> dict[str, Any]:
    """A plan as `save` writes it: dicts, lists, strings and ints.

    Args:
        groups: what `trace` returned.
        keep: group name -> bool ``[size]``, True = kept; concrete.

    Returns:
        The plan.

    Raises:
        ValueError: if a name is no group or a length is not the group's size.
    """
    refuse_traced("plans.save", keep=dict(keep))
    expand_masks(groups, keep)  # names and sizes are checked there
    plan = {
        name: {
            "size": groups[name].size,
            "members": _members(groups[name]),
            "removed": np.flatnonzero(~np.asarray(units)).tolist(),
        }
        for name, units in keep.items()
    }
    return {"format": FORMAT, "groups": plan}


def from_json(
    data: Any, groups: Groups, where: str = "the plan"
) -> dict[str, np.ndarray]:
    """The ``keep`` mapping of what `as_json` returned, for the same model.

    Args:
        data: what `as_json` returned, also read back from JSON.
        groups: what `trace` returns for the model at hand.
        where: what to call the plan in errors.

    Returns:
        Group name -> bool ``[size]``, True = kept.

    Raises:
        ValueError: if it is not a plan, or was made for another model.
    """
    found = isinstance(data, dict) and data.get("format")
    if type(found) is not int or found != FORMAT:
        raise ValueError(f"{where} is not a plan of format {FORMAT}")
    entries = data.get("groups")
    if not isinstance(entries, dict):
        raise ValueError(f"{where} is not a plan: groups must be an object")
    keep = {
        name: _replay(where, groups, name, entry) for name, entry in entries.items()
    }
    expand_masks(groups, keep)  # blocks of balanced groups are checked there
    return keep


def _replay(where: str, groups: Groups, name: str, entry: Any) -> np.ndarray:
    if name not in groups:
        raise ValueError(
            f"{where} cuts the group {name}, which this model does not have"
        )
    expected = {"size": int, "members": dict, "removed": list}
    for key, kind in expected.items():
        value = entry.get(key) if isinstance(entry, dict) else None
        if type(value) is not kind:
            raise ValueError(
                f"{where} is not a plan: {key} of the group {name} must be of type "
                f"{kind.__name__}, got {_short(value)}"
            )
    group = groups[name]
    if entry["size"] != group.size or entry["members"] != _members(group):
        raise ValueError(
            f"{where} was made for another model: its group {name} has {entry['size']} "
            f"units on {sorted(entry['members'])}, here it has {group.size} units on "
            f"{sorted(_members(group))}"
        )
    keep = np.ones(group.size, bool)
    for unit in entry["removed"]:
        if type(unit) is not int or not 0 <= unit < group.size:
            raise ValueError(
                f"{where} removes {_short(unit)} from the group {name}, whose units "
                f"are numbered 0 to {group.size - 1}"
            )
        if not keep[unit]:
            raise ValueError(f"{where} removes unit {unit} of the group {name} twice")
        keep[unit] = False
    return keep


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; Python alone would keep the last of two equal names."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has two entries named {twice}")
    return found


def _short(value: object) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


def _members(group: Group) -> dict[str, int]:
    """``path:axis`` -> positions per unit: what makes two groups the same."""
    return {f"{m.path}:{m.axis}": m.repeats for m in group.members}


@dataclasses.dataclass(frozen=True)
class Proof:
    """What `verify` measured; differences are relative to the largest output.

    Attributes:
        narrowed: between the masked and the narrowed model.
        permuted: group name -> between the model and itself with the units of that
            group reordered; groups whose units have a place of their own are left out.
        tolerance: what was allowed.
    """

    narrowed: float
    permuted: Mapping[str, float]
    tolerance: float


def verify(
    apply_fn: ApplyFn,
    variables: PyTree,
    *args: PyTree,
    keep: Mapping[str, BoolArray],
    key: jax.Array,
    tolerance: float = 2e-5,
    balanced: Sequence[str] = (),
    writers: Sequence[str] = (),
    layers: bool = False,
    per_layer: Sequence[str] = (),
    **kwargs: PyTree,
) -> Proof:
    """Proves a plan on random numbers before it is committed.

    Draws random variables and floating-point arguments of the given shapes (so that
    zeros and ones in a fresh initialisation hide nothing) and checks that the
    narrowed model equals the masked one, and that reordering the units of each cut
    group changes nothing.

    Args:
        apply_fn: the function; its first argument is the variables.
        variables: arrays or shapes; only shapes and dtypes are used.
        *args: example arguments; integer arrays keep their values.
        keep: group name -> bool ``[size]``, True = kept.
        key: random key, consumed.
        tolerance: largest relative difference allowed.
        balanced: the groups that the plan cuts block by block, see `trace`.
        writers: those that the plan cuts where their stream stays, see `trace`.
        layers: does the plan cut layers of scans? See `trace`.
        per_layer: the groups of which it cuts units of every layer, see `trace`.
        **kwargs: further example arguments.

    Returns:
        The measured differences.

    Raises:
        ValueError: if a difference exceeds the tolerance; the text names the group,
            and why it is not exact where that is known.

    Example:
        >>> import jax, numpy as np, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
        >>> plan = {"w1:1": np.array([True, False, True, True])}
        >>> proof = jaxprune.plans.verify(
        ...     mlp, params, jnp.ones((5, 3)), keep=plan, key=jax.random.key(0))
        >>> proof.narrowed < 1e-6, proof.permuted["w1:1"] < 1e-6
        (True, True)
    """
    options = {
        "balanced": balanced,
        "writers": writers,
        "layers": layers,
        "per_layer": per_layer,
    }
    groups = trace(apply_fn, variables, *args, **options, **kwargs)
    masks = expand_masks(groups, keep)
    key, variables_key, order_key = jax.random.split(key, 3)
    variables = _random_like(variables, variables_key)
    args = tuple(
        _random_like(arg, jax.random.fold_in(key, k)) for k, arg in enumerate(args)
    )

    def run(tree: PyTree) -> Any:
        return apply_fn(tree, *args, **kwargs)

    full = run(variables)
    small = narrow(apply_fn, masks)(slice_params(variables, masks), *args, **kwargs)
    narrowed = _difference(run(apply_masks(variables, masks)), small)
    permuted = {
        name: _difference(full, run(_permuted(groups, name, variables, order_key)))
        for name in keep
        if can_permute(groups[name])
    }
    proof = Proof(narrowed, permuted, tolerance)
    _check(groups, keep, proof)
    return proof


def _check(groups: Groups, keep: Mapping[str, BoolArray], proof: Proof) -> None:
    if not proof.narrowed <= proof.tolerance:
        inexact = [f"{n}: {groups[n].why}" for n in keep if not groups[n].exact]
        raise ValueError(
            f"the narrowed model differs from the masked one by {proof.narrowed:.1e}, "
            f"allowed {proof.tolerance:.1e}; "
            + ("not exact: " + "; ".join(inexact) if inexact else "no cause is known")
        )
    for name, difference in proof.permuted.items():
        if not difference <= proof.tolerance:
            raise ValueError(
                f"reordering the units of {name} changes the output by "
                f"{difference:.1e}, allowed {proof.tolerance:.1e}; its units are not "
                "interchangeable, or its coupling is wrong"
            )


def _random_like(tree: PyTree, key: jax.Array) -> PyTree:
    """Random numbers for every floating leaf, scaled to keep activations near 1.

    Vectors are positive: a variance must be.
    """
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves) + 1)
    drawn = [_draw(leaf, k) for leaf, k in zip(leaves, keys, strict=False)]
    return jax.tree.unflatten(treedef, drawn)


def _draw(leaf: PyTree, key: jax.Array) -> Any:
    if not (is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
        return leaf
    if leaf.ndim < 2:
        noise = jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5)
    else:
        fan_in = leaf.size // leaf.shape[-1]
        noise = jax.random.normal(key, leaf.shape) / np.sqrt(fan_in)
    return noise.astype(leaf.dtype)


def _difference(a: PyTree, b: PyTree) -> float:
    """Largest difference of two outputs relative to the largest entry of `a`."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if x.shape != y.shape:  # a new value of a variable, sliced along with it
            continue
        if jnp.issubdtype(x.dtype, jnp.inexact):
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
            scale = jnp.max(jnp.abs(x), initial=1e-30)
            gap = jnp.max(jnp.abs(x - y), initial=0.0) / scale
            worst = float(np.maximum(worst, gap))  # unlike max, keeps a nan
    return worst


def _permuted(groups: Groups, name: str, variables: PyTree, key: jax.Array) -> PyTree:
    """The variables with the units of one group, block by block, in another order."""
    group = groups[name]
    grid = jnp.arange(group.size).reshape(group.blocks, -1)
    order = jax.random.permutation(key, grid, axis=1, independent=True)
    return permute(variables, groups, {name: np.asarray(order).ravel()})
