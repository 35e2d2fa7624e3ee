"""What slicing buys, measured: latency, and that nothing else changed."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import jaxprune

# Sliced and masked programs sum in different orders, so float32 rounding is allowed.
TOLERANCE = 1e-4


def difference(sliced: Any, masked: Any) -> float:
    """The largest difference of two outputs, relative to the largest output.

    Raises:
        ArithmeticError: if it is above rounding: the sliced model is another model.
    """
    sliced, masked = np.asarray(sliced), np.asarray(masked)
    scale = max(1.0, float(np.abs(masked).max()))
    found = float(np.abs(sliced - masked).max()) / scale
    if not found <= TOLERANCE:
        raise ArithmeticError(
            f"the sliced model differs from the masked one by {found:.2g} of its "
            f"largest output, more than rounding ({TOLERANCE:.0e})"
        )
    return found


def slice_difference(
    apply_fn: Callable[..., Any], variables: Any, masks: Any, inputs: Any
) -> float:
    """`difference` of a sliced model and its masked original on some inputs.

    The narrowed program runs uncompiled: operations of a shape seen before cost little,
    while compiling every pruned model would cost more than training it.
    """
    small = jaxprune.slice_params(variables, masks)
    sliced = jaxprune.narrow(apply_fn, masks)(small, inputs)
    return difference(sliced, apply_fn(jaxprune.apply_masks(variables, masks), inputs))


def latency_ms(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float = 0.3
) -> dict[str, float]:
    """Median time of each call, which is taken in turns so that noise hits all alike.

    Args:
        calls: name -> function without arguments that starts the work.
        seconds: how long to measure each.

    Returns:
        Name -> milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # compiles
        jax.block_until_ready(call())
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: float(np.median(found)) for name, found in times.items()}
