"""The products of a program that multiply activations with parameters."""

from typing import Any, NamedTuple

from jaxprune.program._jaxprs import Program
from jaxprune.program.primitives import declaration
from jaxprune.statistics.taps._names import Naming, inner_programs, variable_kinds
from jaxprune.statistics.taps._program import Site


class Product(NamedTuple):
    """A product of an activation with parameters.

    Attributes:
        site: the operand that is the activation, of two.
        owners: the paths of the parameters that the other operand is made of.
    """

    site: Site
    owners: frozenset[str]


def products(program: Program) -> list[Product]:
    """Every product of an activation with parameters that are as they are, or moved."""
    naming = Naming()
    naming.run(program.closed, variable_kinds(program), ())
    found = []
    for jaxpr, path, _ in inner_programs(program.closed):
        for k, eqn in enumerate(jaxpr.eqns):
            known = declaration(eqn)
            if known is not None and known.is_product:
                found += _product(naming.kinds[*path, k], (*path, k))
    return found


def _product(kinds: list[Any], path: tuple[int, ...]) -> list[Product]:
    for k in (0, 1):
        if kinds[k].data and kinds[1 - k].moved:
            return [Product(Site(path, k, operand=True), kinds[1 - k].owners)]
    return []
