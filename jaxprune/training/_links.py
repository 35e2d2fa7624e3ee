"""optax links whose state has a type of its own."""

from collections.abc import Callable
from typing import TypeVar, cast

import optax

S = TypeVar("S")


def link(
    init: Callable[[optax.Params], S],
    update: Callable[[optax.Updates, S, optax.Params | None], tuple[optax.Updates, S]],
) -> optax.GradientTransformation:
    """The transformation of two functions that agree on the type of the state.

    optax itself types the states of all transformations alike.
    """
    return optax.GradientTransformation(
        cast(optax.TransformInitFn, init), cast(optax.TransformUpdateFn, update)
    )


def link_with_extra(
    init: Callable[[optax.Params], S],
    update: Callable[..., tuple[optax.Updates, S]],
) -> optax.GradientTransformationExtraArgs:
    """`link`, of an update that takes further arguments by name."""
    return optax.GradientTransformationExtraArgs(
        cast(optax.TransformInitFn, init),
        cast(optax.TransformUpdateExtraArgsFn, update),
    )
