"""Contractions at other sizes: dot_general, ragged products and convolution."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.coupling._registry import register_label
from jaxprune.coupling._types import Liveness, Step
from jaxprune.coupling.rules._factors import by_factors


def _empty(kept: Liveness, step: Step) -> bool:
    """Is an operand empty?"""
    return any(0 in kept.shape(value) for value in step.ins[:2])


def _sum_over_nothing(kept: Liveness, step: Step, *operands: jax.Array) -> Any:
    return jnp.zeros(kept.shape(step.outs[0]), step.eqn.outvars[0].aval.dtype)


def _resize_dot(kept: Liveness, step: Step) -> dict[str, object] | None:
    return None if _empty(kept, step) else {}


def _resize_conv(kept: Liveness, step: Step) -> dict[str, object] | None:
    if _empty(kept, step):
        return None
    numbers = step.eqn.params["dimension_numbers"]
    lhs, rhs = map(kept.shape, step.ins)
    groups = lhs[numbers.lhs_spec[1]] // rhs[numbers.rhs_spec[1]]
    batches = lhs[numbers.lhs_spec[0]] // kept.shape(step.outs[0])[numbers.out_spec[0]]
    return {"feature_group_count": groups, "batch_group_count": batches}


register_label(
    by_factors,
    "dot_general",
    "ragged_dot_general",
    resize=_resize_dot,
    narrow=_sum_over_nothing,
)
register_label(
    by_factors, "conv_general_dilated", resize=_resize_conv, narrow=_sum_over_nothing
)
