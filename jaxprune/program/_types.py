"""What the package reads of a jaxpr, in every supported JAX.

JAX's own classes say less: there the type of a variable is an `AbstractValue`, without
a shape. These protocols are what the interpreters of this package rely on.
"""

from collections.abc import Sequence, Set
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
from jax.extend.core import Primitive


class Aval(Protocol):
    """The type of an array in a program."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    def update(self, *, shape: tuple[int, ...]) -> Self: ...


class Var(Protocol):
    """A variable of a program."""

    @property
    def aval(self) -> Aval: ...


# A variable, or a `jax.extend.core.Literal`, which has a value `val` besides.
Atom: TypeAlias = Var


class Equation(Protocol):
    """One equation of a program. What `params` hold depends on the primitive."""

    @property
    def primitive(self) -> Primitive: ...
    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def invars(self) -> Sequence[Atom]: ...
    @property
    def outvars(self) -> Sequence[Var]: ...
    @property
    def effects(self) -> Set[object]: ...
    @property
    def source_info(self) -> Any: ...
    def replace(self, **parts: object) -> Self: ...
    @property
    def ctx(self) -> Any: ...  # a context manager of JAX's, the same in no two versions


class Jaxpr(Protocol):
    """A program, open or closed."""

    @property
    def eqns(self) -> Sequence[Equation]: ...
    @property
    def invars(self) -> Sequence[Var]: ...
    @property
    def outvars(self) -> Sequence[Atom]: ...
    @property
    def constvars(self) -> Sequence[Var]: ...
    @property
    def effects(self) -> Set[object]: ...
    @property
    def debug_info(self) -> Any: ...
    def replace(self, **changes: object) -> Self: ...
