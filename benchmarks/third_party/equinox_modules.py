"""An Equinox module as a function of its arrays, for all packages built on Equinox."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from benchmarks.third_party.models import Model


def module(
    net: Any, *args: Any, call: Callable[..., Any] | None = None, batched: bool = True
) -> Model:
    """A module without state; `call(net, *args)` sees one example of a batch."""
    arrays, static = eqx.partition(net, eqx.is_inexact_array)
    call = call or (lambda net, *args: net(*args))

    def apply_fn(variables: Any, *args: Any) -> Any:
        one = lambda *args: call(eqx.combine(variables, static), *args)
        return jax.vmap(one)(*args) if batched else one(*args)

    return Model(apply_fn, arrays, args)


def stateful(pair: tuple[Any, Any], call: Callable[..., Any], *args: Any) -> Model:
    """A module and its `eqx.nn.State`, at inference; `call(net, state, *args)`.

    The state is that after one batch in training: there are no averages before.
    """
    net, state = pair
    mapped = jax.vmap(
        lambda *args: call(net, state, *args), axis_name="batch", out_axes=(0, None)
    )
    state = mapped(*args)[1]
    arrays, static = eqx.partition(eqx.nn.inference_mode(net), eqx.is_inexact_array)

    def apply_fn(variables: Any, *args: Any) -> Any:
        net = eqx.combine(variables["params"], static)
        one = lambda *args: call(net, variables["state"], *args)[0]
        return jax.vmap(one, axis_name="batch")(*args)

    return Model(apply_fn, {"params": arrays, "state": state}, args)
