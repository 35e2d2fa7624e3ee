"""Limits: what a selection may not do to a group, and which groups it is about."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from jax.core import Tracer

from jaxprune.core._checks import number, whole_number
from jaxprune.core._names import labels_in, listed, matching, nearest, patterns
from jaxprune.core._types import Scalar

T = TypeVar("T")

# One value for all, or name or pattern -> value; later entries win, the rest is free.
Each: TypeAlias = T | Mapping[str, T]


class Limits(NamedTuple):
    """What a group may lose.

    Attributes:
        min_keep: how many units stay at least.
        multiple_of: kept counts are multiples of this.
        max_sparsity: the largest fraction that may go.
        parts: the units come in so many blocks that lose as many each (`Group.blocks`);
            the other limits are about each of them.
    """

    min_keep: int = 1
    multiple_of: int = 1
    max_sparsity: float = 1.0
    parts: int = 1

    def __str__(self) -> str:
        told = zip(self._fields[:3], self, strict=False)
        return ", ".join(f"{name}={value}" for name, value in told)

    def least(self, size: int) -> int:
        """How many of `size` units stay at least, rounding aside."""
        capped = math.ceil(size - self.max_sparsity * size - 1e-9)
        return min(max(self.min_keep, capped), size)

    def blocks(self, size: int) -> np.ndarray:
        """Sizes of the blocks a group can lose, in order of leaving.

        The first block leaves a multiple behind; what the limits protect is in none.
        """
        size //= self.parts
        least = -(-self.least(size) // self.multiple_of) * self.multiple_of
        if least >= size:
            return np.zeros(0, np.int32)
        first = size % self.multiple_of or self.multiple_of
        more = (size - least - first) // self.multiple_of
        return np.array([first] + [self.multiple_of] * more, np.int32) * self.parts

    def widths(self, size: int) -> np.ndarray:
        """The counts that a group may keep, from all to the fewest."""
        return size - np.concatenate([[0], np.cumsum(self.blocks(size), dtype=int)])


def limits_of(
    names: Collection[str],
    min_keep: Each[int] = 1,
    multiple_of: Each[int] = 1,
    max_sparsity: Each[float] = 1.0,
) -> dict[str, Limits]:
    """The limits of every group."""
    columns = {
        "min_keep": _each("min_keep", names, min_keep, 1),
        "multiple_of": _each("multiple_of", names, multiple_of, 1),
        "max_sparsity": _each("max_sparsity", names, max_sparsity, 1.0),
    }
    found = {}
    for name in names:
        options = {option: values[name] for option, values in columns.items()}
        group = names[name] if isinstance(names, Mapping) else None
        found[name] = Limits(
            min_keep=whole_number("min_keep", options["min_keep"]),
            multiple_of=whole_number("multiple_of", options["multiple_of"]),
            max_sparsity=fraction("max_sparsity", options["max_sparsity"]),
            parts=getattr(group, "blocks", 1),
        )
    return found


def _each(
    option: str, names: Collection[str], value: Each[T], default: T
) -> dict[str, T]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    found = dict.fromkeys(names, default)
    for pattern, own in value.items():
        chosen = selected(names, pattern, "groups", f"{option} names ")
        found |= dict.fromkeys(chosen, own)
    return found


def selected(
    names: Collection[str],
    only: str | Sequence[str] | None,
    what: str = "groups",
    naming: str = "",
) -> list[str]:
    """The names that any of the patterns matches, in their own order.

    Raises:
        ValueError: if a pattern matches none.
    """
    if only is None:
        return list(names)
    chosen: set[str] = set()
    for pattern in patterns("only", only):
        found = matching(pattern, names)
        if not found:
            raise ValueError(
                f"{naming}{pattern!r}{', which' if naming else ''} matches none of "
                f"the {len(names)} {what}: "
                f"{listed(names, 5)}{nearest(pattern, names)}"
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def fraction(what: str, value: Scalar) -> float:
    """A static number in [0, 1]."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{what} is traced, but decides how many units go: make it static"
        )
    if not 0 <= number(what, value) <= 1:
        raise ValueError(f"{what} must be a fraction in [0, 1], got {value}")
    return float(value)


def fractions(
    names: Collection[str],
    sparsity: Scalar | Mapping[str, Scalar],
    only: str | Sequence[str] | None,
    what: str = "groups",
) -> dict[str, Scalar]:
    """Name -> fraction to remove, for the names that are to lose any.

    `sparsity` is one fraction for those that `only` selects, or a mapping that names
    each in full.
    """
    if not isinstance(sparsity, Mapping):
        return dict.fromkeys(selected(names, only, what), sparsity)
    if only is not None:
        raise ValueError(
            f"only and a sparsity by name both select {what}; give only one"
        )
    labels, by_name = labels_in(names), {}
    for given, share in sparsity.items():
        for name in selected(names, given, what):
            if given not in (name, labels.get(name)) and name not in sparsity:
                raise ValueError(
                    f"sparsity must name {what} in full; {name} is missing"
                )
            by_name[name] = share
    return {name: by_name[name] for name in names if name in by_name}
