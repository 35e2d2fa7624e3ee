"""Costs as functions of group sizes: value, gradient, and what one unit less saves."""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._types import Array, PyTree

Sizes = Mapping[str, int | Array]  # group name -> how many units stay; not named: all


class Cost(abc.ABC):
    """Something to spend, as a function of group sizes.

    Attributes:
        sizes: group name -> full size.
    """

    sizes: Mapping[str, int]

    @abc.abstractmethod
    def value(self, sizes: Sizes | None = None) -> Any:
        """The cost when `sizes` units of the groups stay.

        Args:
            sizes: group name -> number of units; groups that are not named have all.
                Arrays may be traced and fractional: then the result is a scalar of
                float32, differentiable.

        Returns:
            The cost at whole sizes; exact where its unit is whole.

        Raises:
            ValueError: if a name is no group.
        """

    @property
    def full(self) -> Any:
        """The cost of the whole program."""
        return self.value()

    def gradient(self, sizes: Sizes | None = None) -> dict[str, jax.Array]:
        """The derivative along the size of every group, at these sizes."""
        point = {
            name: jnp.asarray(n, jnp.float32) for name, n in self.filled(sizes).items()
        }
        return jax.grad(self.value)(point)

    def without_one(self, name: str, sizes: Sizes | None = None) -> Any:
        """What it saves to remove one more unit of a group, exactly.

        Where a group meets itself in a product this is less than the gradient says.
        """
        now = self.filled(sizes)
        self.filled({name: 0})
        return self.value(now) - self.value({**now, name: now[name] - 1})

    def savings(self, sizes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """What each group alone saves when it loses `steps` units.

        Args:
            sizes: ``[groups]``, how many units stay, in the order of the groups.
            steps: ``[groups]``, how many go.
        """
        now = dict(zip(self.sizes, sizes.tolist(), strict=True))
        before = self.value(now)
        return np.array(
            [
                before - self.value({**now, name: now[name] - step}) if step else 0.0
                for name, step in zip(now, steps.tolist(), strict=True)
            ]
        )

    def filled(self, sizes: Sizes | None) -> dict[str, int | Array]:
        """The size of every group, in order."""
        sizes = sizes or {}
        for name in sizes:
            if name not in self.sizes:
                raise ValueError(
                    f"sizes name the group {name!r}, which does not exist; the groups "
                    f"are {', '.join(list(self.sizes)[:5])}"
                )
        return {name: sizes.get(name, full) for name, full in self.sizes.items()}


class Term(NamedTuple):
    """``coefficient * product of size ** power``.

    Attributes:
        coefficient: whole, but for groups whose units weigh differently
            and products in which a group meets itself.
        powers: ``(group name, power)``, sorted.
        cut: groups of which some unit must be gone, else the term is 0: what a cut
            adds, such as a sum over what is removed (see `narrow`).
    """

    coefficient: int | Fraction
    powers: tuple[tuple[str, int], ...]
    cut: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Polynomial(Cost):
    """A sum of terms: linear in every group, unless one meets itself in a product.

    Attributes:
        sizes: group name -> full size.
        terms: sorted; no two have the same powers.

    Example:
        >>> term = Term(9, (("conv1", 1), ("conv2", 1)))
        >>> cost = Polynomial({"conv1": 16, "conv2": 32}, (term,))
        >>> cost.full, cost.value({"conv1": 8}), cost.without_one("conv2")
        (4608, 2304, 144)
        >>> print(cost)
        9 conv1 conv2
    """

    sizes: Mapping[str, int]
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", MappingProxyType(dict(self.sizes)))

    def __reduce__(self) -> Any:  # a read-only mapping cannot be pickled
        return Polynomial, (dict(self.sizes), self.terms)

    def __str__(self) -> str:
        return (
            " + ".join(
                " ".join(
                    [
                        str(term.coefficient),
                        *(n if p == 1 else f"{n}^{p}" for n, p in term.powers),
                        *(f"[{n} cut]" for n in term.cut),
                    ]
                )
                for term in self.terms
            )
            or "0"
        )

    def value(self, sizes: Sizes | None = None) -> Any:
        """See `Cost.value`; an integer at whole sizes, if the terms allow."""
        point = self.filled(sizes)
        if any(isinstance(n, jax.Array) for n in point.values()):
            return self._traced(point)
        total = sum(
            term.coefficient
            * math.prod(_number(point[name]) ** p for name, p in term.powers)
            for term in self.terms
            if all(point[name] < self.sizes[name] for name in term.cut)
        )
        if isinstance(total, float):
            return total
        total = Fraction(total)
        return int(total) if total.denominator == 1 else float(total)

    def _traced(self, point: Mapping[str, int | Array]) -> jax.Array:
        factors, coefficients = self._table
        columns = [jnp.asarray(n, jnp.float32) for n in point.values()]
        full = [jnp.asarray(n, jnp.float32) for n in self.sizes.values()]
        is_cut = [(n < m).astype(n.dtype) for n, m in zip(columns, full, strict=True)]
        padded = jnp.stack([*columns, *is_cut, jnp.ones((), jnp.float32)])
        return jnp.sum(
            jnp.asarray(coefficients, jnp.float32) * padded[factors].prod(axis=1)
        )

    def savings(self, sizes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """See `Cost.savings`; in float64, all groups at once."""
        if any(term.cut for term in self.terms):
            always, at_a_cut = self._by_condition
            return always.savings(sizes, steps) + Cost.savings(at_a_cut, sizes, steps)
        factors, coefficients = self._table
        rest = np.ones(len(sizes) + 1)
        terms = coefficients * np.append(sizes, rest)[factors].prod(axis=1)
        row, group, power = self._incidence
        with np.errstate(divide="ignore", invalid="ignore"):
            left = np.nan_to_num((sizes - steps) / sizes)
        saved = terms[row] * (1 - left[group] ** power)
        return np.bincount(group, weights=saved, minlength=len(sizes))

    @functools.cached_property
    def _by_condition(self) -> "tuple[Polynomial, Polynomial]":
        """The terms that are always there, and those that a cut adds."""
        always = tuple([term for term in self.terms if not term.cut])
        at_a_cut = tuple([term for term in self.terms if term.cut])
        return Polynomial(self.sizes, always), Polynomial(self.sizes, at_a_cut)

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Every term's groups, repeated by power and padded, and its coefficient.

        Groups of `Term.cut` are numbered after all groups; what pads comes last.
        """
        number = {name: k for k, name in enumerate(self.sizes)}
        flat = [
            [number[name] for name, power in term.powers for _ in range(power)]
            + [len(number) + number[name] for name in term.cut]
            for term in self.terms
        ]
        degree = max(map(len, flat), default=0)
        factors = np.full((len(self.terms), max(degree, 1)), 2 * len(number))
        for row, own in enumerate(flat):
            factors[row, : len(own)] = own
        return factors, np.array([float(term.coefficient) for term in self.terms])

    @functools.cached_property
    def _incidence(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which term holds which group to which power."""
        number = {name: k for k, name in enumerate(self.sizes)}
        found = [
            (row, number[name], power)
            for row, term in enumerate(self.terms)
            for name, power in term.powers
        ]
        row, group, power = np.array(found, int).reshape(-1, 3).T
        return row, group, power


def _number(n: Any) -> Any:
    """A Python number, exact if it is whole."""
    n = n.item() if isinstance(n, np.ndarray | np.generic) else n
    return int(n) if n == int(n) else float(n)


@dataclasses.dataclass(frozen=True, eq=False)
class Largest(Cost):
    """The largest of several costs.

    Attributes:
        sizes: group name -> full size.
        costs: what is compared.
    """

    sizes: Mapping[str, int]
    costs: tuple[Polynomial, ...]

    def value(self, sizes: Sizes | None = None) -> Any:
        """See `Cost.value`."""
        found = [cost.value(sizes) for cost in self.costs]
        if any(isinstance(value, jax.Array) for value in found):
            return jnp.stack(found).max()
        return max(found, default=0)


class Product(NamedTuple):
    """Products that sum over equally many inputs.

    Attributes:
        inputs: how many inputs each output sums over.
        multiply_adds: multiplications, each with one addition.
    """

    inputs: PyTree
    multiply_adds: Any


@dataclasses.dataclass(frozen=True, eq=False)
class BitOperations(Cost):
    """Bit operations of all products and convolutions; see `Costs.bit_operations`.

    Attributes:
        sizes: group name -> full size.
        products: as polynomials of the sizes.
        weight_bits: bits of a weight.
        activation_bits: bits of an activation.
        density: fraction of the weights that are not zero.
    """

    sizes: Mapping[str, int]
    products: tuple[Product, ...]
    weight_bits: float
    activation_bits: float
    density: float

    def value(self, sizes: Sizes | None = None) -> Any:
        """See `Cost.value`; a float."""
        found = [
            Product(product.inputs.value(sizes), product.multiply_adds.value(sizes))
            for product in self.products
        ]
        return bit_operations(
            found, self.weight_bits, self.activation_bits, self.density
        )


def bit_operations(
    products: Sequence[Product],
    weight_bits: float,
    activation_bits: float,
    density: float = 1.0,
) -> Any:
    """See `Costs.bit_operations`."""
    total: float | Array = 0.0
    for inputs, multiply_adds in products:
        traced = isinstance(inputs, jax.Array)
        # Nothing is summed over no input; log2(1) = 0 keeps it finite.
        log = jnp.log2(jnp.maximum(inputs, 1)) if traced else math.log2(max(inputs, 1))
        each = density * weight_bits * activation_bits + weight_bits + activation_bits
        total += multiply_adds * (each + log)
    return total
