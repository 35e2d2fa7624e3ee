"""Haiku functions: parameters and state as one tree of variables."""

import inspect
from typing import Any

from jaxprune.core._types import ApplyFn, PyTree


def haiku_apply(
    transformed: Any, params: PyTree, state: PyTree | None = None, *, rng: Any = None
) -> tuple[ApplyFn, PyTree]:
    """A transformed Haiku function as a pure function and its variables.

    Args:
        transformed: what ``hk.transform``, ``hk.transform_with_state`` or their
            ``without_apply_rng`` returned.
        params: its parameters.
        state: its state; None if it has none.
        rng: random key that every call gets, where the function draws numbers.

    Returns:
        ``apply_fn(variables, *args, **kwargs)``, which returns the output; and the
        variables ``{"params": ..., "state": ...}``. With ``mutable=["state"]`` it
        returns the output and ``{"state": new}``, as `jaxprune.recalibrate` wants.

    Raises:
        TypeError: if it was not transformed.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp, jaxprune
        >>> from jaxprune.integrations.haiku import haiku_apply
        >>> net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 2])(x)))
        >>> x = jnp.ones((1, 3))
        >>> apply_fn, variables = haiku_apply(net, net.init(jax.random.key(0), x))
        >>> pruned = jaxprune.prune(apply_fn, variables, x, sparsity=0.5)
        >>> pruned.variables["params"]["mlp/~/linear_0"]["w"].shape
        (3, 4)
    """
    apply = getattr(transformed, "apply", None)
    if not callable(apply):
        raise TypeError(
            f"expected what hk.transform returns, got a {type(transformed).__name__}"
        )
    takes_rng = "rng" in _parameters(apply)
    variables = {"params": params} | ({} if state is None else {"state": state})

    def apply_fn(
        variables: PyTree, *args: PyTree, mutable: Any = None, **kwargs: PyTree
    ) -> Any:
        held = [variables["params"]]
        held += [variables["state"]] if "state" in variables else []
        out: Any = apply(*held, *([rng] if takes_rng else []), *args, **kwargs)
        if "state" not in variables:
            return out
        value, new = out
        return value if mutable is None else (value, {"state": new})

    return apply_fn, variables


def _parameters(apply: ApplyFn) -> set[str]:
    return set(inspect.signature(apply).parameters)
