"""Tricky structures: what other pruning libraries cut wrongly, ignore or crash on.

Each is a few lines of JAX under a name, with what a person reads off it: the groups and
their sizes, the groups whose cut is not masking, and the axes that cannot be cut, with
a word of the reason. `rival` is what Torch-Pruning 1.6.1 did with the same structure in
torch, measured at half of the channels: "right", "wrong" (a wrong model, silently),
"idle" (nothing or little cut, silently), "crash", "hang", or "output" (it cut what the
model returns). "thread" marks what was not measured: structures that its users report
as broken, relatives of those measured, and what has to be refused.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax

from zoo import Built, normal, weights

STRUCTURES: dict[str, "Structure"] = {}

IMAGE = normal(4, 4, 3)  # NHWC
ROW = normal(4)
SEQUENCE = normal(5, 4)


@dataclasses.dataclass(frozen=True)
class Structure:
    """A named structure and what a person expects of it.

    Attributes:
        name: unique.
        rival: what the leading rival did with it.
        build: makes it.
        groups: group name -> number of units.
        inexact: group name -> a word of why cutting it is not masking it.
        refused: ``path:axis`` -> a word of why it cannot be cut. Axes that cannot be
            cut because they belong to an input, an output, or the window of a
            convolution go without saying.
        subject_refused: is what the structure is about refused (see the score)?
    """

    name: str
    rival: str
    build: Callable[[], Built]
    groups: Mapping[str, int]
    inexact: Mapping[str, str]
    refused: Mapping[str, str]
    subject_refused: bool = False


def register(
    name: str,
    rival: str,
    groups: Mapping[str, int],
    build: Callable[[], tuple],
    *,
    inexact: Mapping[str, str] | None = None,
    refused: Mapping[str, str] | None = None,
    subject_refused: bool = False,
) -> None:
    """Registers a builder of ``(apply_fn, variables, inputs)``."""
    assert name not in STRUCTURES, name
    STRUCTURES[name] = Structure(
        name,
        rival,
        functools.cache(lambda: Built(*build())),  # once a run
        groups,
        inexact or {},
        refused or {},
        subject_refused,
    )


def structure(
    name: str,
    rival: str,
    groups: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    inputs: Callable[[int, int], tuple] = IMAGE,
    **expected: Any,
):
    """Registers a function of (parameters of these shapes, *inputs)."""

    def decorate(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
        build = lambda: (apply_fn, weights(**shapes), inputs)  # noqa: E731
        register(name, rival, groups, build, **expected)
        return apply_fn

    return decorate


# --- the few operations that the structures are made of -------------------------------


def conv(x: Any, kernel: Any, stride: int = 1, groups: int = 1) -> Any:
    """A convolution on NHWC by an HWIO kernel."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def conv_nchw(x: Any, kernel: Any, stride: int = 1) -> Any:
    """A convolution on NCHW by an OIHW kernel, torch's layout."""
    layout = ("NCHW", "OIHW", "NCHW")
    strides = (stride, stride)
    return lax.conv_general_dilated(x, kernel, strides, "SAME", None, None, layout)


def relu_conv(x: Any, kernel: Any, stride: int = 1, groups: int = 1) -> Any:
    """A convolution and a ReLU."""
    return jax.nn.relu(conv(x, kernel, stride, groups))


def head(x: Any, kernel: Any) -> Any:
    """The mean over space and a linear layer."""
    return x.mean((1, 2)) @ kernel


def flatten(x: Any) -> Any:
    """All axes but the first as one."""
    return x.reshape(x.shape[0], -1)


from zoo.structures import (  # noqa: E402
    attention,
    concatenation,
    gates,
    limits,
    networks,
    parameters,
    sequences,
    slices,
    transformers,
    vision,
)

__all__ = [
    "STRUCTURES",
    "Structure",
    "attention",
    "concatenation",
    "gates",
    "limits",
    "networks",
    "parameters",
    "sequences",
    "slices",
    "transformers",
    "vision",
]
