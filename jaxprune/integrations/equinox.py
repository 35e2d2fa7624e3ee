"""Equinox modules: as a pure function to prune, and as a smaller module afterwards."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np

from jaxprune.core._masks import PyTree
from jaxprune.integrations._compare import difference, random_input, random_variable
from jaxprune.narrowing._narrow import narrow
from jaxprune.recipes import Pruned
from jaxprune.recipes import prune as prune_function
from jaxprune.surgery._slicing import slice_params


def equinox_apply(
    model: Any, *, batched: bool = True
) -> tuple[Callable[..., Any], PyTree]:
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

    def apply_fn(variables: PyTree, *args: Any, **kwargs: Any) -> Any:
        called = eqx.combine(variables, static)
        if not batched:
            return called(*args, **kwargs)
        return jax.vmap(lambda *one: called(*one, **kwargs))(*args)

    return apply_fn, variables


def equinox_module(
    model: Any, masks: PyTree, *args: Any, batched: bool = True, **kwargs: Any
) -> Any:
    """A smaller Equinox module: same classes, sliced arrays, right sizes.

    Sizes that a module remembers (``in_features``, ``out_features``, ...) follow its
    arrays. The result is called once on random numbers and compared with `narrow`:
    where no module of these classes computes the pruned function, it is refused.

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
    small = _fitted(model, eqx.combine(slice_params(variables, masks), static))
    rng = np.random.default_rng(0)
    found, small_static = eqx.partition(small, eqx.is_array)
    drawn = jax.tree.map(lambda leaf: random_variable(leaf, rng), found)
    args, kwargs = jax.tree.map(lambda leaf: random_input(leaf, rng), (args, kwargs))
    # Sizes are static, so a fitted module is another tree: the leaves are the same.
    plain = jax.tree.structure(variables).unflatten(jax.tree.leaves(drawn))
    narrowed = narrow(apply_fn, masks)
    expected = jax.jit(lambda v: narrowed(v, *args, **kwargs))(plain)
    small_fn, _ = equinox_apply(eqx.combine(drawn, small_static), batched=batched)
    try:
        got = jax.jit(lambda v: small_fn(v, *args, **kwargs))(drawn)
    except Exception as error:  # whatever the module raises at other shapes
        text = (str(error).splitlines() or [""])[0]
        raise ValueError(
            _refusal(f"it raises {type(error).__name__}: {text}")
        ) from error
    gap, allowed = difference(got, expected)
    if not gap <= allowed:
        cause = f"it differs from narrow by {gap:.1e}, allowed {allowed:.1e}"
        raise ValueError(_refusal(cause))
    return small


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PrunedModule(Pruned):
    """A `Pruned` of an Equinox module.

    Attributes:
        model: the smaller module.
    """

    model: Any = None


def prune(model: Any, *args: Any, batched: bool = True, **options: Any) -> PrunedModule:
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
    kwargs = options.get("kwargs") or {}
    call = found.masks, *args
    fitted = equinox_module(model, *call, batched=batched, **kwargs)
    _, sizes = eqx.partition(fitted, eqx.is_array)
    leaves = jax.tree.leaves(found.variables)
    arrays = jax.tree.structure(eqx.filter(fitted, eqx.is_array)).unflatten(leaves)
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return PrunedModule(**fields, model=eqx.combine(arrays, sizes))


# What the layers of Equinox remember of the sizes of their arrays.
_SIZES: dict[type, Callable[[Any, Any], Mapping[str, Any]]] = {
    eqx.nn.Linear: lambda old, new: {
        "in_features": _like(old.in_features, new.weight.shape[1]),
        "out_features": _like(old.out_features, new.weight.shape[0]),
    },
    eqx.nn.Conv: lambda old, new: _convolution(old, new),
    eqx.nn.ConvTranspose: lambda old, new: {
        "in_channels": new.weight.shape[1] * old.groups,
        "out_channels": new.weight.shape[0],
    },
    eqx.nn.LayerNorm: lambda old, new: {"shape": _shape(old, new, "shape")},
    eqx.nn.RMSNorm: lambda old, new: {"shape": _shape(old, new, "shape")},
    eqx.nn.GroupNorm: lambda old, new: {"channels": _channels(old, new)},
    eqx.nn.Embedding: lambda old, new: {
        "num_embeddings": new.weight.shape[0],
        "embedding_size": new.weight.shape[1],
    },
    eqx.nn.GRUCell: lambda old, new: {
        "input_size": new.weight_ih.shape[1],
        "hidden_size": new.weight_hh.shape[1],
    },
    eqx.nn.LSTMCell: lambda old, new: {
        "input_size": new.weight_ih.shape[1],
        "hidden_size": new.weight_hh.shape[1],
    },
    eqx.nn.MultiheadAttention: lambda old, new: _attention(old, new),
    eqx.nn.MLP: lambda old, new: _mlp(old, new),
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


def _attention(old: Any, new: Any) -> dict[str, Any]:
    query, value = (p.weight.shape[0] for p in (new.query_proj, new.value_proj))
    heads = old.num_heads
    if query % old.qk_size == 0 and query // old.qk_size < heads:
        heads = query // old.qk_size  # whole heads went
    return {
        "num_heads": heads,
        "qk_size": query // heads,
        "vo_size": value // heads,
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


def _fitted(old: Any, new: Any) -> Any:
    """The module with the sizes that its layers remember set to those of its arrays."""
    if isinstance(new, eqx.Module):
        changes = {
            field.name: _fitted(getattr(old, field.name), getattr(new, field.name))
            for field in dataclasses.fields(new)
            if hasattr(new, field.name)
        }
        for kind in type(new).__mro__:
            if kind in _SIZES:
                changes |= _SIZES[kind](old, new)
                break
        return _with(new, changes)
    if isinstance(new, list | tuple) and not hasattr(new, "_fields"):
        return type(new)(_fitted(a, b) for a, b in zip(old, new, strict=True))
    if isinstance(new, dict):
        return {name: _fitted(old[name], new[name]) for name in new}
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
