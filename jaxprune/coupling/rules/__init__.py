"""Rules, one file per family of primitives; importing the package registers them."""

from jaxprune.coupling.rules import (
    control,
    elementwise,
    indexing,
    linear,
    pieces,
    random,
    reduction,
    scatter,
    shape,
    shuffle,
)

__all__ = [
    "control",
    "elementwise",
    "indexing",
    "linear",
    "pieces",
    "random",
    "reduction",
    "scatter",
    "shape",
    "shuffle",
]
