"""Linen modules that take sliced variables: `narrow` in the shape of a module."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.core
import flax.linen as nn
from flax.core.scope import LazyRng

from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.narrowing._narrow import narrow
from jaxprune.surgery._slicing import slice_params


def linen_module(module: nn.Module, masks: PyTree) -> nn.Module:
    """A Linen module that takes sliced variables.

    It is `narrow` of the original in the shape of a module, so it computes what the
    masked model computes whatever the layers are. ``apply`` (with `mutable`, `rngs`
    and every argument of the original), ``init``, `TrainState` and use inside another
    module work; variables have the names they had.

    Args:
        module: the original.
        masks: tree like ``module.init(...)``, bool, True = kept; concrete.

    Returns:
        A module whose ``init`` gives ``slice_params(module.init(...), masks)`` and
        whose ``apply`` is ``narrow(module.apply, masks)``.

    Raises:
        TypeError: if a mask is traced or not boolean.
        ValueError: when called, if the variables are not the sliced ones.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxprune
        >>> from jaxprune.integrations import linen
        >>> net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
        >>> x = jnp.ones((1, 3))
        >>> variables = net.init(jax.random.key(0), x)
        >>> pruned = jaxprune.prune(net.apply, variables, x, sparsity=0.5)
        >>> small = linen.linen_module(net, pruned.masks)
        >>> small.apply(pruned.variables, x).shape
        (1, 2)
        >>> small.init(jax.random.key(0), x)["params"]["layers_0"]["kernel"].shape
        (3, 4)
    """
    module, masks = module.clone(parent=None), flax.core.unfreeze(masks)
    return NarrowedModule(_Cut(module, masks, narrow(module.apply, masks)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Cut:
    """What a Linen module must not look into: it would adopt the module as a child."""

    module: nn.Module
    masks: PyTree
    apply: ApplyFn

    def __repr__(self) -> str:
        return f"narrow({self.module!r})"


class NarrowedModule(nn.Module):
    """What `linen_module` returns.

    Args:
        cut: the original module, the masks, and its narrowed `apply`.
    """

    cut: _Cut

    @nn.compact
    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:
        """Calls the narrowed module with the arguments of the original."""
        assert (
            self.scope is not None
        )  # Flax calls compact methods of bound modules only
        mutable, rngs = self.scope.mutable, _random_streams(self.scope)
        if self.is_initializing():
            mutable = True
            if not self.variables:
                full = self.cut.module.init(rngs, *args, **kwargs)
                self._put(slice_params(_plain(full), self.cut.masks))
        given = _plain(self.variables)
        variables = {name: given[name] for name in self.cut.masks if name in given}
        out = self.cut.apply(variables, *args, rngs=rngs, mutable=mutable, **kwargs)
        if mutable is False:
            return out
        out, new = out
        if not self.is_initializing():
            self._put(new)
        return out

    def _put(self, collections: Mapping[str, Mapping[str, Any]]) -> None:
        for collection, tree in collections.items():
            for name, value in tree.items():
                self.put_variable(collection, name, value)


def _plain(variables: Mapping[str, Any]) -> dict[str, Any]:
    return flax.core.unfreeze(dict(variables))


def _random_streams(scope: flax.core.Scope) -> dict[str, Any]:
    """The random streams at this place of the model, other ones at every call.

    Names of submodules are folded in from here on, so that the draws are those of the
    original module in the same place.
    """
    streams: dict[str, LazyRng] = {}
    for name, rng in scope.rngs.items():
        calls = scope.rng_counters[name]
        scope.rng_counters[name] += 1
        streams[name] = LazyRng.create(rng, *([calls] if calls else []))
    return streams
