"""How a kernel is a stack of matrices, how its factors are laid out and contracted.

The axes of a kernel are named and split until each name is of one kind: of a batch of
matrices, summed (rows) or free (columns). A convolution ``HWIO`` of G groups is ``(s0)
(s1) (i) (g o)``; its matrices for ``kind="channel"`` are ``[g, s0 s1 i, o]``, its
factors ``(s0) (s1) (i) (g r)`` and ``() () (r) (g o)``: two convolutions.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from jaxprune.program._types import Equation

FactorKind: TypeAlias = Literal["channel", "spatial", "depthwise", "basis"]
KINDS = ("channel", "spatial", "depthwise", "basis")
Names: TypeAlias = tuple[str, ...]  # of axes that are one axis of an array
RANK = "r"


@dataclasses.dataclass(frozen=True)
class Form:
    """The axes of a kernel and of its factors.

    Attributes:
        kind: how the kernel is a matrix.
        sizes: (name, size) of every named axis but the rank.
        kernel: names of the axes of the kernel as its contraction reads it.
        first: names of the axes of the first factor.
        second: names of the axes of the second factor.
        batch: names of what counts matrices: scanned layers, experts, groups.
        rows: names of what is summed by the first factor.
        columns: names of what is made by the second.
    """

    kind: FactorKind
    sizes: tuple[tuple[str, int], ...]
    kernel: tuple[Names, ...]
    first: tuple[Names, ...]
    second: tuple[Names, ...]
    batch: Names
    rows: Names
    columns: Names

    @property
    def full_rank(self) -> int:
        """The largest rank of any of the matrices."""
        return min(self.size(self.rows), self.size(self.columns))

    @property
    def count(self) -> int:
        """How many matrices there are."""
        return self.size(self.batch)

    @property
    def row_sizes(self) -> list[int]:
        """The sizes of what the first factor sums."""
        return [dict(self.sizes)[name] for name in self.rows]

    def params(self, rank: int) -> int:
        """How many entries both factors have."""
        both = self.size(self.rows) + self.size(self.columns)
        return self.count * rank * both

    def size(self, names: Sequence[str]) -> int:
        sizes = dict(self.sizes)
        return math.prod(sizes[name] for name in names)

    def rank_of(self, first: Any) -> int:
        """The rank that this first factor has."""
        return math.prod(np.shape(first)) // self.size((*self.batch, *self.rows))

    def matrices(self, kernel: Any) -> Any:
        """The kernel as ``[matrices, rows, columns]``."""
        whole = (self.batch, self.rows, self.columns)
        return rearranged(kernel, self.kernel, whole, dict(self.sizes))

    def whole(self, matrices: Any) -> Any:
        """The inverse of `matrices`."""
        whole = (self.batch, self.rows, self.columns)
        return rearranged(matrices, whole, self.kernel, dict(self.sizes))

    def factors(self, left: Any, right: Any) -> tuple[Any, Any]:
        """Both factors from ``[matrices, rows, rank]`` and ``[.., rank, columns]``."""
        sizes = {**dict(self.sizes), RANK: left.shape[-1]}
        first = rearranged(left, (self.batch, self.rows, (RANK,)), self.first, sizes)
        second = rearranged(
            right, (self.batch, (RANK,), self.columns), self.second, sizes
        )
        return first, second

    def parts(self, first: Any, second: Any) -> tuple[Any, Any]:
        """The inverse of `factors`."""
        sizes = {**dict(self.sizes), RANK: self.rank_of(first)}
        left = rearranged(first, self.first, (self.batch, self.rows, (RANK,)), sizes)
        right = rearranged(
            second, self.second, (self.batch, (RANK,), self.columns), sizes
        )
        return left, right

    def of_layers(self, lead: Sequence[int]) -> "Form":
        """The form of kernels that scans take apart: these axes stand in front."""
        names = tuple(f"layer{k}" for k in range(len(lead)))
        front = tuple((name,) for name in names)
        return dataclasses.replace(
            self,
            sizes=(*zip(names, lead, strict=True), *self.sizes),
            kernel=(*front, *self.kernel),
            first=(*front, *self.first),
            second=(*front, *self.second),
            batch=(*names, *self.batch),
        )


def rearranged(
    x: Any, have: Sequence[Names], want: Sequence[Names], sizes: Mapping[str, int]
) -> Any:
    """An array with its axes split, permuted and joined by name.

    Example:
        >>> x = np.arange(6).reshape(2, 3)
        >>> rearranged(x, [("a",), ("b",)], [(), ("b", "a")], {"a": 2, "b": 3})
        array([[0, 3, 1, 4, 2, 5]])
    """
    names = [name for axis in have for name in axis]
    order = [names.index(name) for axis in want for name in axis]
    shape = [math.prod(sizes[name] for name in axis) for axis in want]
    return x.reshape([sizes[name] for name in names]).transpose(order).reshape(shape)


def form_of(
    eqn: Equation, operand: int, kind: FactorKind, basis_size: int | None = None
) -> Form | str:
    """The form of the kernel that a contraction reads, or why it has none."""
    if eqn.primitive.name == "dot_general":
        return _dot_form(eqn, operand, kind, basis_size)
    return _conv_form(eqn, kind, basis_size)


def _dot_form(
    eqn: Equation, operand: int, kind: FactorKind, basis_size: int | None
) -> Form | str:
    if kind not in ("channel", "basis"):
        return f"it is a matrix, which kind={kind!r} does not take apart"
    summed, batch = eqn.params["dimension_numbers"]
    shape = eqn.invars[operand].aval.shape
    names = tuple((f"a{d}",) for d in range(len(shape)))
    sizes = {f"a{d}": size for d, size in enumerate(shape)}
    along = tuple(f"a{d}" for d in batch[operand])
    rows = tuple(f"a{d}" for d in sorted(summed[operand]))
    columns = tuple(
        f"a{d}" for d in range(len(shape)) if f"a{d}" not in {*along, *rows}
    )
    front = tuple((name,) for name in along)
    if kind == "channel" or basis_size is None:
        first = (*front, *((name,) for name in rows), (RANK,))
        second = (*front, (RANK,), *((name,) for name in columns))
        return Form(
            kind, tuple(sizes.items()), names, first, second, along, rows, columns
        )
    if len(rows) != 1 or along:
        return "a basis is shared by groups along one summed axis, and it has more"
    size = sizes.pop(rows[0])
    if size % basis_size:
        return f"its {size} inputs do not split into groups of basis_size={basis_size}"
    sizes |= {"n": size // basis_size, "p": basis_size}
    split = tuple(("n", "p") if name == rows else name for name in names)
    second = (("n",), (RANK,), *((name,) for name in columns))
    return Form(
        kind, tuple(sizes.items()), split, (("p",), (RANK,)), second,
        (), ("p",), ("n", *columns),
    )  # fmt: skip


def _conv_form(eqn: Equation, kind: FactorKind, basis_size: int | None) -> Form | str:
    spec = eqn.params["dimension_numbers"].rhs_spec
    shape = eqn.invars[1].aval.shape
    groups = eqn.params["feature_group_count"]
    outs, inputs, *space = [shape[d] for d in spec]
    sizes = {"g": groups, "o": outs // groups, "i": inputs}
    sizes |= {f"s{k}": size for k, size in enumerate(space)}
    window = tuple(f"s{k}" for k in range(len(space)))
    one = ((),) * len(window)
    each = tuple((name,) for name in window)
    of = functools.partial(_by_spec, spec)
    kernel = of(("g", "o"), ("i",), each)
    if kind == "channel":
        first, second = of(("g", RANK), ("i",), each), of(("g", "o"), (RANK,), one)
        split = ("g",), (*window, "i"), ("o",)
    elif kind == "basis":
        size = inputs if basis_size is None else basis_size
        if groups > 1:
            return "a grouped convolution has a basis of its own for every group"
        if inputs % size:
            return f"its {inputs} inputs do not split into groups of basis_size={size}"
        del sizes["i"], sizes["g"]
        sizes |= {"n": inputs // size, "p": size}
        kernel = of(("o",), ("n", "p"), each)
        first, second = of((RANK,), ("p",), each), of(("o",), ("n", RANK), one)
        split = (), (*window, "p"), ("n", "o")
    elif len(window) != 2:
        return f"kind={kind!r} needs two axes of space, and it has {len(window)}"
    elif kind == "spatial":
        first = of(("g", RANK), ("i",), (("s0",), ()))
        second = of(("g", "o"), (RANK,), ((), ("s1",)))
        split = ("g",), ("i", "s0"), ("o", "s1")
    else:
        first = of(("g", "o", RANK), ("i",), one)
        second = of(("g", "o"), (RANK,), each)
        split = ("g", "o"), ("i",), window
    return Form(kind, tuple(sizes.items()), kernel, first, second, *split)


def _by_spec(
    spec: Sequence[int], outs: Names, inputs: Names, window: Sequence[Names]
) -> tuple[Names, ...]:
    """The axes of a kernel in the order in which a convolution has them."""
    placed = dict(zip(spec, (outs, inputs, *window), strict=True))
    return tuple(placed[d] for d in sorted(placed))
