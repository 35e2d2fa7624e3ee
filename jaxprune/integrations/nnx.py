"""NNX modules: as a pure function to prune, and as a smaller module afterwards."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import concrete
from jaxprune.core._positions import axis_keep, first_layer
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.integrations._compare import (
    difference,
    is_half,
    random_input,
    random_variable,
    tolerance,
    widened,
)
from jaxprune.integrations._nnx_attention import scale_queries
from jaxprune.integrations._nnx_layers import Kept, fit_sizes, refusal
from jaxprune.narrowing._narrow import narrow
from jaxprune.recipes import Pruned
from jaxprune.recipes import prune as prune_function
from jaxprune.statistics._recalibration import recalibrate
from jaxprune.surgery._slicing import slice_opt_state, slice_params

_COLLECTIONS = {  # the first that fits; named as in Linen
    "params": nnx.Param,
    "batch_stats": nnx.BatchStat,
    "cache": nnx.Cache,
    "rngs": nnx.RngState,
    "state": ...,
}


def nnx_apply(model: nnx.Module, *, train: bool = False) -> tuple[ApplyFn, PyTree]:
    """An NNX module as a pure function and its variables.

    Everything the module holds is in the variables: statistics are cut along with the
    parameters, random streams are carried, and only ``variables["params"]`` is scored.
    The module is read once and never changed.

    Args:
        model: the module; its arrays may be abstract (`nnx.eval_shape`).
        train: False calls it in evaluation mode, and the function returns its output.
            True calls it in training mode, and the function returns the output and
            the new values of everything but the parameters. The function also takes
            ``train`` and ``mutable=["batch_stats"]`` as Linen's does, so that
            `jaxprune.recalibrate` can call it.

    Returns:
        ``apply_fn(variables, *args, **kwargs)`` and the variables: nested dicts of
        arrays under "params", "batch_stats", "cache", "rngs" and "state".

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> from flax import nnx
        >>> from jaxprune.integrations import nnx as nnx_integration
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.hidden = nnx.Linear(3, 8, rngs=rngs)
        ...         self.head = nnx.Linear(8, 2, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.head(nnx.relu(self.hidden(x)))
        >>> model, x = Net(nnx.Rngs(0)), jnp.ones((1, 3))
        >>> pruned = jaxprune.prune(*nnx_integration.nnx_apply(model), x, sparsity=0.5)
        >>> small = nnx_integration.nnx_module(model, pruned.masks, x)
        >>> small.hidden.out_features, small(x).shape
        (4, (1, 2))
    """
    modes = {}
    for mode in (False, True):
        copy = nnx.merge(*nnx.split(model))
        copy.train() if mode else copy.eval()
        modes[mode] = _split(copy)
    always = train

    def apply_fn(
        variables: PyTree,
        *args: PyTree,
        train: bool = always,
        mutable: Sequence[str] | None = None,
        **kwargs: PyTree,
    ) -> Any:
        graphdef, states, _ = modes[train]
        called = _merge(graphdef, states, variables)
        out = called(*args, **kwargs)
        if mutable is None and not train:
            return out
        new = _split(called)[2]
        wanted = [n for n in new if n != "params"] if mutable is None else mutable
        return out, {name: new[name] for name in wanted}

    return apply_fn, modes[always][2]


def nnx_module(
    model: nnx.Module, masks: PyTree, *args: PyTree, **kwargs: PyTree
) -> nnx.Module:
    """A smaller NNX module: same class, sliced variables, right feature counts.

    Nothing remains of the pruning: the result trains, splits, merges and saves like a
    module that was built small. It is called once on random numbers and compared with
    `narrow`, because not everything that can be cut can be built: a LayerNorm divides
    by its own number of features, the masked one by the original number. Such a cut
    is refused; `narrow` carries it.

    `nnx.MultiHeadAttention` divides its logits by the square root of the dimensions of
    its heads. Where d' of d are left, the kernel and bias of its queries are multiplied
    by ``sqrt(d' / d)``. Where queries and values keep different numbers of dimensions,
    which its constructor cannot build, its ``attention_fn`` pads them to one size.

    Args:
        model: the module; it is not changed.
        masks: tree like the variables of `nnx_apply`, or like ``nnx.split(model)[1]``;
            bool, True = kept; concrete.
        *args: example arguments for the comparison, arrays or shapes: floating-point
            values are replaced by random ones, integers keep theirs (0 for a shape).
        **kwargs: further example arguments.

    Returns:
        A new module in the mode of `model`, with its random streams.

    Raises:
        ValueError: if the masks are for another module, cut what `narrow` refuses to
            cut, or no module of these layers computes the pruned function; the text
            names the layers that stand in the way.
        TypeError: if a mask is traced or not boolean.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> from flax import nnx
        >>> from jaxprune.integrations import nnx as nnx_integration
        >>> model = nnx.Sequential(
        ...     nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu,
        ...     nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
        >>> graphdef, state = nnx.split(model)
        >>> apply = lambda state, x: nnx.merge(graphdef, state)(x)
        >>> pruned = jaxprune.prune(apply, state, jnp.ones((1, 3)), sparsity=0.5)
        >>> small = nnx_integration.nnx_module(model, pruned.masks, jnp.ones((1, 3)))
        >>> small.layers[0].kernel.shape
        (3, 4)
    """
    graphdef, states, variables = _split(model)
    masks = _like_variables(variables, masks)
    small = _merge(graphdef, states, slice_params(variables, masks))
    kept = {
        path.split("/", 1)[1]: first_layer(
            axis_keep(concrete(path, mask), np.shape(leaf))
        )
        for (path, mask), leaf in zip(
            named_leaves(masks).items(), jax.tree.leaves(variables), strict=True
        )
    }
    _fit_all(small, kept)
    _compare(model, small, masks, args, kwargs)
    scale_queries(model, small)
    return small


def _split(model: nnx.Module) -> tuple[Any, dict[str, Any], PyTree]:
    """Graph definition, states and plain arrays, both by collection."""
    graphdef, *parts = nnx.split(model, *_COLLECTIONS.values())
    states = {
        name: state for name, state in zip(_COLLECTIONS, parts, strict=True) if state
    }
    return graphdef, states, {n: nnx.to_pure_dict(s) for n, s in states.items()}


def _merge(graphdef: Any, states: Mapping[str, Any], variables: PyTree) -> Any:
    """A new module with these arrays."""
    filled = []
    for name in _COLLECTIONS:
        state = jax.tree.map(lambda leaf: leaf, states.get(name, nnx.State({})))
        nnx.replace_by_pure_dict(state, variables[name] if name in states else {})
        filled.append(state)
    return nnx.merge(graphdef, *filled)


def _like_variables(variables: PyTree, masks: PyTree) -> PyTree:
    """The masks by collection, whichever way the module was split."""
    given = named_leaves(masks)
    chosen = []
    for path in named_leaves(variables):
        stem = path.split("/", 1)[1]
        names = [name for name in (path, stem, f"{stem}/value") if name in given]
        if not names:
            raise ValueError(
                f"masks have no leaf for {path}; they need one for every variable of "
                "the model, as from nnx_apply(model) or nnx.split(model)"
            )
        chosen.append(names[0])
    unknown = [name for name in given if name not in set(chosen)]
    if unknown:
        raise ValueError(
            f"masks have a leaf {unknown[0]}, which the model does not have; were they "
            "made for another model?"
        )
    treedef = jax.tree.structure(variables)
    return treedef.unflatten(given[name] for name in chosen)


def _fit_all(small: nnx.Module, kept: Kept) -> None:
    """Fits every layer to its sliced variables, those it shares included."""
    paths = {
        id(node): "/".join(map(str, path))
        for path, node in nnx.iter_graph(small)
        if isinstance(node, nnx.Variable)
    }
    for _, layer in nnx.iter_modules(small):
        own = {n: paths[id(v)] for n, v in vars(layer).items() if id(v) in paths}
        fit_sizes(layer, {name: kept[path] for name, path in own.items()})


def _compare(
    model: nnx.Module,
    small: nnx.Module,
    masks: PyTree,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
) -> None:
    """Raises unless the module computes what `narrow` computes, on random numbers."""
    apply_fn, _ = nnx_apply(_widened(model))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: random_variable(leaf, rng), _split(small)[2])
    variables = widened(drawn)
    graphdef, states, _ = _split(_widened(small))
    tried = _merge(graphdef, states, variables)
    scale_queries(model, tried)
    small_fn, scaled = nnx_apply(tried)
    args, kwargs = jax.tree.map(lambda leaf: random_input(leaf, rng), (args, kwargs))
    args, kwargs = widened((args, kwargs))
    narrowed = narrow(apply_fn, masks)
    expected_fn = jax.jit(lambda v: narrowed(v, *args, **kwargs))
    expected, allowed = expected_fn(variables), tolerance(expected_fn, variables)
    try:
        got = jax.jit(lambda v: small_fn(v, *args, **kwargs))(scaled)
    except Exception as error:  # whatever the user's code raises at other shapes
        text = str(error).splitlines()[:1]
        cause = f"it raises {type(error).__name__}: {''.join(text)}"
        raise ValueError(refusal(cause, model, small)) from error
    gap = difference(got, expected)
    if not gap <= allowed:
        cause = f"it differs from narrow by {gap:.1e}, allowed {allowed:.1e}"
        raise ValueError(refusal(cause, model, small))


def _widened(model: nnx.Module) -> nnx.Module:
    """A copy whose layers compute in float32 where they do in 16 bits."""
    copy = nnx.clone(model)
    layer: Any
    for _, layer in nnx.iter_modules(copy):
        dtype = getattr(layer, "dtype", None)
        if dtype is not None and is_half(dtype):
            layer.dtype = jnp.float32
    return copy


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PrunedModel(Pruned):
    """A `Pruned` of an NNX module.

    It follows `model`, which is trained in place: calls, `recalibrate` and `save` take
    the arrays that `model` has by then.

    Attributes:
        model: the smaller module. Its arrays are `variables`, but for the queries of
            attention whose heads have lost dimensions, see `nnx_module`.
        original: the module before the cut.
    """

    model: PyTree = None
    original: Any = None

    def slice_optimizer(self, optimizer: nnx.Optimizer) -> nnx.Optimizer:
        """An optimiser of `model` with the momentum of the original's.

        Args:
            optimizer: of the original module, with ``wrt=nnx.Param``.

        Returns:
            The same transformation and step, its state sliced. Momentum of queries
            that were multiplied (see `nnx_module`) is what it was.

        Raises:
            ValueError: as `jaxprune.slice_opt_state`.
        """
        # As optax saw them: a state of the same paths.
        like = nnx.as_pure(nnx.state(self.original, optimizer.wrt))
        masks = self.masks if self.last_masks is None else self.last_masks
        given = named_leaves(masks["params"])
        if list(named_leaves(like)) != list(given):
            raise ValueError(
                f"the optimizer is of {optimizer.wrt}, but only the masks of "
                "nnx.Param are known; make it with wrt=nnx.Param"
            )
        masks = jax.tree.structure(like).unflatten(given.values())
        state = slice_opt_state(optimizer.tx, nnx.as_pure(optimizer.opt_state), masks)
        small = nnx.Optimizer(self.model, optimizer.tx, wrt=optimizer.wrt)
        nnx.update(small.opt_state, nnx.state(state))
        small.step[...] = optimizer.step[...]
        return small

    def replace(self, **changes: Any) -> "PrunedModel":
        """The same with a trained ``model=``, or with other ``variables=``.

        Both stay in step: a model's arrays become the variables, and variables are
        written into a copy of the model.
        """
        if "model" in changes:
            return dataclasses.replace(self, **changes)._now()
        new: Any = super().replace(**changes)
        if "variables" in changes:
            copy = nnx.clone(self.model)
            _write(copy, new.variables, self.original)
            new = dataclasses.replace(new, model=copy)
        return new

    def recalibrate(self, batches: Iterable[PyTree], **kwargs: PyTree) -> "PrunedModel":
        """The same with BatchNorm statistics measured anew, in `model` too.

        What `model` has learnt since the cut stays.
        """
        now = self._now()
        new = recalibrate(
            now.apply_fn, now.variables, batches, **{"train": True, **kwargs}
        )
        statistics = {n: new[n] for n in new if n != "params"}
        _write_collections(self.model, statistics)
        return dataclasses.replace(self, variables=new)

    def _now(self) -> "PrunedModel":
        return dataclasses.replace(self, variables=self._variables_now())

    def _variables_now(self) -> PyTree:
        copy = nnx.clone(self.model)
        scale_queries(self.original, copy, undo=True)
        now = named_leaves(_split(copy)[2])  # training may have sown more
        treedef = jax.tree.structure(self.variables)
        return treedef.unflatten(now[path] for path in named_leaves(self.variables))

    def _cut_again(self, **changes: Any) -> "PrunedModel":
        new: Any = super()._cut_again(**changes)
        call = new.last_masks, *new.args
        small = nnx_module(self.model, *call, **new.kwargs)
        _write(small, new.variables, self.original)
        return dataclasses.replace(new, model=small)


def pruned_model(model: nnx.Module, pruned: Pruned) -> PrunedModel:
    """The smaller NNX module of what `jaxprune.rounds` or `jaxprune.load` returned.

    Args:
        model: the original module; it is not changed.
        pruned: made of ``nnx_apply(model)``, its variables perhaps trained since.

    Returns:
        The same as `prune` returns, with the variables of `pruned` in ``.model``.

    Raises:
        ValueError: as `nnx_module`.

    Example:
        >>> import tempfile, jax.numpy as jnp, jaxprune
        >>> from flax import nnx
        >>> from jaxprune.integrations import nnx as nnx_integration
        >>> model = nnx.Sequential(
        ...     nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu,
        ...     nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
        >>> folder = tempfile.mkdtemp()
        >>> x = jnp.ones((1, 3))
        >>> nnx_integration.prune(model, x, sparsity=0.5).save(folder)
        >>> apply_fn, _ = nnx_integration.nnx_apply(model)
        >>> again = jaxprune.load(folder, apply_fn)
        >>> nnx_integration.pruned_model(model, again).model.layers[0].out_features
        4
    """
    return _with_model(model, pruned, pruned.args, pruned.kwargs)


def _with_model(
    model: nnx.Module,
    pruned: Pruned,
    args: tuple[PyTree, ...],
    kwargs: Mapping[str, PyTree],
) -> PrunedModel:
    small = nnx_module(model, pruned.masks, *args, **kwargs)
    _write(small, pruned.variables, model)
    fields = {f.name: getattr(pruned, f.name) for f in dataclasses.fields(Pruned)}
    return PrunedModel(**fields, model=small, original=model)


def prune(model: nnx.Module, *args: PyTree, **options: Any) -> PrunedModel:
    """Cuts the least important units of an NNX module.

    Args:
        model: the module; it is not changed.
        *args: example arguments, arrays or shapes.
        **options: as for `jaxprune.prune`; `loss_fn` takes the module in place of its
            variables: ``loss_fn(model, batch)``.

    Returns:
        The smaller module as ``.model``, of the same class and in the mode of the
        original; and all that `jaxprune.prune` returns.

    Raises:
        ValueError: as `jaxprune.prune` and `nnx_module`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxprune.integrations.nnx import prune
        >>> model = nnx.Sequential(
        ...     nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu,
        ...     nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
        >>> small = prune(model, jnp.ones((1, 3)), sparsity=0.5).model
        >>> small.layers[0].out_features, small(jnp.ones((1, 3))).shape
        (4, (1, 2))
    """
    apply_fn, variables = nnx_apply(model)
    loss_fn = options.pop("loss_fn", None)
    if loss_fn is not None:
        graphdef, states, _ = _split(_evaluating(model))
        options["loss_fn"] = lambda variables, batch: loss_fn(
            _merge(graphdef, states, variables), batch
        )
    found = prune_function(apply_fn, variables, *args, **options)
    return _with_model(model, found, args, options.get("kwargs") or {})


def _evaluating(model: nnx.Module) -> nnx.Module:
    copy = nnx.merge(*nnx.split(model))
    copy.eval()
    return copy


def _write(model: nnx.Module, variables: PyTree, original: nnx.Module) -> None:
    """Gives a smaller module other variables of the narrowed function."""
    _write_collections(model, variables)
    scale_queries(original, model)


def _write_collections(model: nnx.Module, variables: Mapping[str, PyTree]) -> None:
    """Gives a module other arrays of the same shapes."""
    _, states, _ = _split(model)
    for name in states.keys() & variables.keys():
        nnx.replace_by_pure_dict(states[name], variables[name])
        nnx.update(model, states[name])
