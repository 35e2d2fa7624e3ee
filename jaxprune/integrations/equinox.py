"""Equinox modules: as a pure function to prune, and as a smaller module afterwards."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import concrete
from jaxprune.core._positions import axis_keep, first_layer
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.integrations._compare import (
    difference,
    random_input,
    random_variable,
    tolerance,
    widened,
)
from jaxprune.narrowing._narrow import narrow
from jaxprune.recipes import Pruned
from jaxprune.recipes import prune as prune_function
from jaxprune.surgery._slicing import slice_params


def equinox_apply(model: PyTree, *, batched: bool = True) -> tuple[ApplyFn, PyTree]:
    """An Equinox module as a pure function and its arrays.

    Args:
        model: the module.
        batched: the arguments have a batch in front; the module, which takes one
            example, is mapped over it.

    Returns:
        ``apply_fn(variables, *args, **kwargs)`` and the variables: the module with its
        arrays alone.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, jaxprune
        >>> from jaxprune.integrations.equinox import equinox_apply
        >>> model = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
        >>> apply_fn, variables = equinox_apply(model)
        >>> print(len(jaxprune.trace(apply_fn, variables, jnp.ones((5, 3)))))
        2
    """
    variables, static = eqx.partition(model, eqx.is_array)

    def apply_fn(variables: PyTree, *args: PyTree, **kwargs: PyTree) -> Any:
        called = eqx.combine(variables, static)
        if not batched:
            return called(*args, **kwargs)
        return jax.vmap(lambda *one: called(*one, **kwargs))(*args)

    return apply_fn, variables


def equinox_module(
    model: PyTree, masks: PyTree, *args: PyTree, batched: bool = True, **kwargs: PyTree
) -> Any:
    """A smaller Equinox module: same classes, sliced arrays, right sizes.

    Sizes that a module remembers (``in_features``, ``out_features``, ...) follow its
    arrays. Attention divides its logits by the square root of its own ``qk_size``, so
    where heads lose dimensions, d' of d being left, the weights and biases of its
    queries are multiplied by ``sqrt(d' / d)``. The result is called once on random
    numbers and compared with `narrow`: where no module of these classes computes the
    pruned function, it is refused.

    Args:
        model: the module; it is not changed.
        masks: tree like the variables of `equinox_apply`; bool, True = kept; concrete.
        *args: example arguments for the comparison, arrays or shapes.
        batched: as for `equinox_apply`.
        **kwargs: further example arguments.

    Returns:
        A new module.

    Raises:
        ValueError: if the masks are for another module, or no module of these classes
            computes the pruned function.
    """
    apply_fn, variables = equinox_apply(model, batched=batched)
    _, static = eqx.partition(model, eqx.is_array)
    sliced = eqx.combine(slice_params(variables, masks), static)
    unscaled = _fitted(model, sliced, _kept(variables, masks))
    rng = np.random.default_rng(0)
    found, small_static = eqx.partition(unscaled, eqx.is_array)
    drawn = widened(jax.tree.map(lambda leaf: random_variable(leaf, rng), found))
    args, kwargs = jax.tree.map(lambda leaf: random_input(leaf, rng), (args, kwargs))
    args, kwargs = widened((args, kwargs))
    # Sizes are static, so a fitted module is another tree: the leaves are the same.
    plain = jax.tree.structure(variables).unflatten(jax.tree.leaves(drawn))
    narrowed = narrow(apply_fn, masks)
    expected_fn = jax.jit(lambda v: narrowed(v, *args, **kwargs))
    expected, allowed = expected_fn(plain), tolerance(expected_fn, plain)
    tried = _scaled(model, eqx.combine(drawn, small_static))
    small_fn, drawn = equinox_apply(tried, batched=batched)
    try:
        got = jax.jit(lambda v: small_fn(v, *args, **kwargs))(drawn)
    except Exception as error:  # whatever the module raises at other shapes
        text = (str(error).splitlines() or [""])[0]
        raise ValueError(
            _refusal(f"it raises {type(error).__name__}: {text}")
        ) from error
    gap = difference(got, expected)
    if not gap <= allowed:
        cause = f"it differs from narrow by {gap:.1e}, allowed {allowed:.1e}"
        raise ValueError(_refusal(cause))
    return _scaled(model, unscaled)


def _kept(variables: PyTree, masks: PyTree) -> PyTree:
    """The variables' tree with, for every leaf, which positions of each axis stay."""
    leaves, treedef = jax.tree.flatten(variables)
    kept = [
        _Axes(first_layer(axis_keep(concrete(path, mask), np.shape(leaf))))
        for (path, mask), leaf in zip(named_leaves(masks).items(), leaves, strict=True)
    ]
    return treedef.unflatten(kept)


class _Axes(NamedTuple):
    """One leaf: for each axis bool of its length, None where all stay."""

    kept: tuple[np.ndarray | None, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PrunedModule(Pruned):
    """A `Pruned` of an Equinox module.

    Attributes:
        model: the smaller module. Its arrays are `variables`, but for the queries of
            attention whose heads have lost dimensions, see `equinox_module`.
        batched: as for `equinox_apply`.
        sizes: the module before the cut, without its arrays.
    """

    model: PyTree = None
    batched: bool = True
    sizes: Any = None

    def replace(self, **changes: Any) -> "PrunedModule":
        """The same with a trained ``model=``, or with other ``variables=``.

        Both stay in step: ``pruned.replace(model=trained).save(folder)``.
        """
        if "model" in changes:
            arrays = _scaled(self.sizes, changes["model"], undo=True)
            leaves = jax.tree.leaves(eqx.filter(arrays, eqx.is_array))
            variables = jax.tree.structure(self.variables).unflatten(leaves)
            changed: Any = super().replace(variables=variables)
            return dataclasses.replace(changed, **changes)
        new: Any = super().replace(**changes)
        return new._with_arrays(self.model) if "variables" in changes else new

    def _with_arrays(self, module: Any) -> "PrunedModule":
        """The same, as a module of these sizes."""
        arrays, sizes = eqx.partition(module, eqx.is_array)
        leaves = jax.tree.leaves(self.variables)
        arrays = jax.tree.structure(arrays).unflatten(leaves)
        model = _scaled(self.sizes, eqx.combine(arrays, sizes))
        return dataclasses.replace(self, model=model)

    def _cut_again(self, **changes: Any) -> "PrunedModule":
        new: Any = super()._cut_again(**changes)
        arrays, _ = eqx.partition(self.model, eqx.is_array)
        masks = jax.tree.structure(arrays).unflatten(jax.tree.leaves(new.last_masks))
        call = masks, *new.args
        small = equinox_module(self.model, *call, batched=self.batched, **new.kwargs)
        return new._with_arrays(small)


def pruned_module(
    model: PyTree, pruned: Pruned, *, batched: bool = True
) -> PrunedModule:
    """The smaller Equinox module of what `jaxprune.rounds` or `load` returned.

    Args:
        model: the original module.
        pruned: made of ``equinox_apply(model)``, its variables perhaps trained since.
        batched: as for `equinox_apply`.

    Returns:
        The same as `prune` returns, with the variables of `pruned` in ``.model``.

    Raises:
        ValueError: as `equinox_module`.
    """
    return _with_model(model, pruned, pruned.args, pruned.kwargs, batched)


def _with_model(
    model: PyTree,
    pruned: Pruned,
    args: tuple[PyTree, ...],
    kwargs: Mapping[str, PyTree],
    batched: bool,
) -> PrunedModule:
    arrays, sizes = eqx.partition(model, eqx.is_array)
    masks = jax.tree.structure(arrays).unflatten(jax.tree.leaves(pruned.masks))
    fitted = equinox_module(model, masks, *args, batched=batched, **kwargs)
    fields = {f.name: getattr(pruned, f.name) for f in dataclasses.fields(Pruned)}
    found = PrunedModule(**fields, batched=batched, sizes=sizes)
    return found._with_arrays(fitted)


def prune(
    model: PyTree, *args: PyTree, batched: bool = True, **options: Any
) -> PrunedModule:
    """Cuts the least important units of an Equinox module.

    Args:
        model: the module; it is not changed.
        *args: example arguments, arrays or shapes.
        batched: as for `equinox_apply`.
        **options: as for `jaxprune.prune`; `loss_fn` takes the module in place of its
            variables: ``loss_fn(model, batch)``.

    Returns:
        The smaller module as ``.model``, and all that `jaxprune.prune` returns.

    Raises:
        ValueError: as `jaxprune.prune` and `equinox_module`.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from jaxprune.integrations.equinox import prune
        >>> model = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
        >>> small = prune(model, jnp.ones((5, 3)), sparsity=0.5).model
        >>> small.layers[0]
        Linear(
          weight=f32[4,3], bias=f32[4], in_features=3, out_features=4, use_bias=True
        )
        >>> jax.vmap(small)(jnp.ones((5, 3))).shape
        (5, 2)
    """
    apply_fn, variables = equinox_apply(model, batched=batched)
    _, static = eqx.partition(model, eqx.is_array)
    loss_fn = options.pop("loss_fn", None)
    if loss_fn is not None:
        options["loss_fn"] = lambda variables, batch: loss_fn(
            eqx.combine(variables, static), batch
        )
    found = prune_function(apply_fn, variables, *args, **options)
    return _with_model(model, found, args, options.get("kwargs") or {}, batched)


# What the layers of Equinox remember of the sizes of their arrays.
_SIZES: dict[type, Callable[[Any, Any, Any], Mapping[str, Any]]] = {
    eqx.nn.Linear: lambda old, new, kept: {
        "in_features": _like(old.in_features, new.weight.shape[1]),
        "out_features": _like(old.out_features, new.weight.shape[0]),
    },
    eqx.nn.Conv: lambda old, new, kept: _convolution(old, new),
    eqx.nn.ConvTranspose: lambda old, new, kept: {
        "in_channels": new.weight.shape[1] * old.groups,
        "out_channels": new.weight.shape[0],
    },
    eqx.nn.LayerNorm: lambda old, new, kept: {"shape": _shape(old, new, "shape")},
    eqx.nn.RMSNorm: lambda old, new, kept: {"shape": _shape(old, new, "shape")},
    eqx.nn.GroupNorm: lambda old, new, kept: {"channels": _channels(old, new)},
    eqx.nn.Embedding: lambda old, new, kept: {
        "num_embeddings": new.weight.shape[0],
        "embedding_size": new.weight.shape[1],
    },
    eqx.nn.GRUCell: lambda old, new, kept: {
        "input_size": new.weight_ih.shape[1],
        "hidden_size": new.weight_hh.shape[1],
    },
    eqx.nn.LSTMCell: lambda old, new, kept: {
        "input_size": new.weight_ih.shape[1],
        "hidden_size": new.weight_hh.shape[1],
    },
    eqx.nn.MultiheadAttention: lambda old, new, kept: _attention(old, new, kept),
    eqx.nn.MLP: lambda old, new, kept: _mlp(old, new),
}


def _like(old: Any, size: int) -> Any:
    return old if old == "scalar" else size


def _convolution(old: Any, new: Any) -> dict[str, Any]:
    outputs, inputs = new.weight.shape[:2]
    depthwise = old.groups > 1 and old.groups == old.in_channels == old.out_channels
    groups = outputs if depthwise else old.groups
    return {"in_channels": inputs * groups, "out_channels": outputs, "groups": groups}


def _shape(old: Any, new: Any, name: str) -> Any:
    held = new.weight if new.weight is not None else new.bias
    return getattr(old, name) if held is None else held.shape


def _channels(old: Any, new: Any) -> int:
    return old.channels if new.weight is None else new.weight.shape[0]


def _attention(old: Any, new: Any, kept: Any) -> dict[str, Any]:
    # How many rows are left does not tell heads from their dimensions: which ones does.
    rows = kept.query_proj.weight.kept[0]
    heads = old.num_heads
    if rows is not None:
        heads = max(int(rows.reshape(heads, -1).any(axis=1).sum()), 1)
    return {
        "num_heads": heads,
        "qk_size": new.query_proj.weight.shape[0] // heads,
        "vo_size": new.value_proj.weight.shape[0] // heads,
        "query_size": new.query_proj.weight.shape[1],
        "key_size": new.key_proj.weight.shape[1],
        "value_size": new.value_proj.weight.shape[1],
        "output_size": new.output_proj.weight.shape[0],
    }


def _mlp(old: Any, new: Any) -> dict[str, Any]:
    return {
        "in_size": _like(old.in_size, new.layers[0].weight.shape[1]),
        "out_size": _like(old.out_size, new.layers[-1].weight.shape[0]),
        "width_size": new.layers[0].weight.shape[0] if old.depth else old.width_size,
    }


def _fitted(old: Any, new: Any, kept: Any) -> Any:
    """The module with the sizes that its layers remember set to those of its arrays."""

    def sizes(before: Any, after: Any, left: Any) -> Mapping[str, Any]:
        for kind in type(after).__mro__:
            if kind in _SIZES:
                return _SIZES[kind](before, after, left)
        return {}

    return _mapped(sizes, old, new, kept)


def _scaled(old: Any, new: Any, *, undo: bool = False) -> Any:
    """The module with queries that make up for another number of dimensions."""

    def queries(before: Any, after: Any) -> Mapping[str, Any]:
        if not isinstance(after, eqx.nn.MultiheadAttention):
            return {}
        factor = math.sqrt(after.qk_size / before.qk_size)
        if factor == 1:
            return {}
        factor = 1 / factor if undo else factor
        projection = after.query_proj
        changes = {"weight": projection.weight * factor}
        if projection.bias is not None:
            changes["bias"] = projection.bias * factor
        return {"query_proj": _with(projection, changes)}

    return _mapped(queries, old, new)


def _mapped(change: Callable[..., Mapping[str, Any]], *trees: Any) -> Any:
    """The second of some modules of one structure, with other values of fields.

    Args:
        change: these modules at one place -> field -> value, below them first.
        *trees: the modules; only the first two need fields that hold no arrays.
    """
    _, new, *_ = trees
    if isinstance(new, eqx.Module):
        below = {
            field.name: _mapped(change, *(getattr(t, field.name, None) for t in trees))
            for field in dataclasses.fields(new)
            if hasattr(new, field.name)
        }
        found = _with(new, below)
        return _with(found, change(trees[0], found, *trees[2:]))
    if isinstance(new, list | tuple) and not hasattr(new, "_fields"):
        return type(new)(_mapped(change, *each) for each in zip(*trees, strict=True))
    if isinstance(new, dict):
        return {name: _mapped(change, *(t[name] for t in trees)) for name in new}
    return new


def _with(module: Any, changes: Mapping[str, Any]) -> Any:
    """A copy with other values of fields, static ones too, past `__init__`."""
    copy = object.__new__(type(module))
    for field in dataclasses.fields(module):
        if hasattr(module, field.name):
            value = changes.get(field.name, getattr(module, field.name))
            object.__setattr__(copy, field.name, value)
    return copy


def _refusal(cause: str) -> str:
    return (
        f"this cut has no module of the same classes: {cause}. Likely cause: a layer "
        "computes with its own size (a norm, a reshape, a width in the code); use the "
        "narrowed function, jaxprune.prune(*equinox_apply(model), ...), or pin that "
        "layer"
    )
