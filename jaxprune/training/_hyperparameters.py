"""Numbers that optimisers are given: in range, known or traced, fixed or scheduled."""

import math
import numbers
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxprune.core._types import Scalar

_DOMAINS: dict[str, tuple[Callable[[float], bool], str]] = {
    "rate": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "q": (lambda x: x > 0, "above 0"),
    "inner_q": (lambda x: x >= 1, "at least 1"),
    "eps": (lambda x: x > 0, "above 0"),
    "strength": (lambda x: x >= 0, "at least 0"),
    "vector_strength": (lambda x: x >= 0, "at least 0"),
    "weight_decay": (lambda x: x >= 0, "at least 0"),
    "nonzero_ratio": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "learning_rate": (lambda x: x >= 0, "at least 0"),
    "growth": (lambda x: x > 0, "above 0"),
    "ceiling": (lambda x: x > 0, "above 0"),
    "energy": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "decay": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "temperature": (lambda x: x > 0, "above 0"),
    "alpha": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "limit": (lambda x: x >= 0, "at least 0"),
    "target_fraction": (lambda x: 0 < x <= 1, "in (0, 1]"),
}


def check(name: str, value: optax.ScalarOrSchedule) -> None:
    """Raises if a hyperparameter is out of range; schedules and tracers pass."""
    if callable(value) or isinstance(value, Tracer):
        return
    inside, domain = _DOMAINS[name]
    if not inside(float(value)):
        raise ValueError(f"{name} must be {domain}, got {value}")
    if not math.isfinite(float(value)):
        raise ValueError(f"{name} must be {domain} and finite, got {value}")


def current(name: str, value: optax.ScalarOrSchedule, count: jax.Array) -> jax.Array:
    """The value of a number or a schedule at a count, checked where it is known."""
    now = value(count) if callable(value) else value
    check(name, cast(Scalar, now))
    return jnp.array(now, jnp.float32)


def is_whole(value: object) -> bool:
    """Whether it is a whole number: of steps, or of parts."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_ranked(target_fraction: Scalar) -> bool:
    """Whether weights must be ranked: not if the fraction is known to be 1."""
    return isinstance(target_fraction, Tracer) or bool(target_fraction < 1)
