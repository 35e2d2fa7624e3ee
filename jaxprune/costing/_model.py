"""Cost models: what a program costs as polynomials of its group sizes.

The program is walked once, every axis of every parameter labelled by the groups that
cut it. So the length of every axis of every value is known as a polynomial of group
sizes, and with it what each equation costs.
"""

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction

import jax

from jaxprune.core._groups import Groups
from jaxprune.core._leaves import leaf_names, named_leaves, parameter_paths
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.costing._count import (
    live_program,
)
from jaxprune.costing._lengths import (
    Lengths,
    Monomial,
    Number,
    Sum,
    Units,
    plus,
)
from jaxprune.costing._polynomial import (
    BitOperations,
    Largest,
    Polynomial,
    Product,
    Term,
)
from jaxprune.costing._tally import Spent, Tally
from jaxprune.coupling._labels import ALIVE, Value
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._solve import solve
from jaxprune.coupling._trace import trace
from jaxprune.coupling._walk import Walk
from jaxprune.coupling._writers import Labelled
from jaxprune.program._jaxprs import is_array, trace_program


@dataclasses.dataclass(frozen=True, eq=False)
class CostModel:
    """What one call costs, as functions of how many units of each group stay.

    Attributes:
        sizes: group name -> full size.
        parameters: entries in the collection ``params``, or in all variables.
        parameter_bytes: their size.
        multiply_adds: of matrix products and convolutions.
        activation_bytes: size of everything the program computes from its inputs.
        largest_activation_bytes: size of the largest array it computes.
        products: multiply-adds by how many inputs each output sums over.
        exact: the values equal what the narrowed program costs, whichever units stay.
        why: what is not, if not exact.
    """

    sizes: Mapping[str, int]
    parameters: Polynomial
    parameter_bytes: Polynomial
    multiply_adds: Polynomial
    activation_bytes: Polynomial
    largest_activation_bytes: Largest
    products: tuple[Product, ...]
    exact: bool = True
    why: str = ""

    @property
    def flops(self) -> Polynomial:
        """Floating point operations: two per multiply-add."""
        terms = self.multiply_adds.terms
        doubled = (t._replace(coefficient=2 * t.coefficient) for t in terms)
        return Polynomial(self.sizes, tuple(doubled))

    def bit_operations(
        self,
        weight_bits: float = 32,
        activation_bits: float = 32,
        density: float = 1.0,
    ) -> BitOperations:
        """Bit operations, by the formula of `Costs.bit_operations`."""
        return BitOperations(
            self.sizes, self.products, weight_bits, activation_bits, density
        )


def cost_model(
    apply_fn: ApplyFn,
    variables: PyTree,
    *args: PyTree,
    groups: Groups | None = None,
    **kwargs: PyTree,
) -> CostModel:
    """Derives what ``apply_fn(variables, *args, **kwargs)`` costs at every width.

    Each cost is a polynomial of group sizes: linear in every group, unless a group
    meets itself in a product (a recurrent kernel, a Gram matrix). At the sizes that
    masks leave, parameters and multiply-adds equal `costs` of the sliced variables
    and the narrowed function; so do activation bytes, where `narrow` runs the same
    equations (it may add a step to pick scattered positions).

    The conventions are those of `costs`. Nothing is run or allocated.

    Args:
        apply_fn: the function; its first argument is the variables.
        variables: tree of arrays or ShapeDtypeStructs.
        *args: further arguments, arrays or ShapeDtypeStructs.
        groups: what `trace` returned for the same arguments; None to trace here.
        **kwargs: further keyword arguments.

    Returns:
        The costs; each has ``value(sizes)``, ``gradient(sizes)`` (both may be traced),
        ``without_one(name, sizes)`` and ``full``.

    Raises:
        ValueError: if `groups` are of another program.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))}
        >>> model = cost_model(mlp, params, jnp.ones((5, 3)))
        >>> print(model.parameters, "|", model.multiply_adds)
        5 w1:1 | 25 w1:1
        >>> model.multiply_adds.value({"w1:1": 4}), model.parameters.without_one("w1:1")
        (100, 5)
    """
    if groups is None:
        groups = trace(apply_fn, variables, *args, **kwargs)
    program = live_program(trace_program(apply_fn, variables, *args, **kwargs))
    ledger = Ledger()
    units = Units(groups, ledger)
    leaves, treedef = jax.tree.flatten(variables)
    names = leaf_names(variables, treedef)
    paths = [name for name, leaf in zip(names, leaves, strict=True) if is_array(leaf)]
    ins = []
    for k, var in enumerate(program.jaxpr.invars):
        shape = var.aval.shape
        named = k < len(paths)
        frozen = Value(shape, (ALIVE,) * len(shape))
        ins.append(units.label(paths[k], shape) if named else frozen)
    walked = Walk(ledger, Labelled()).run(program.closed, ins)
    lengths = Lengths(units, solve(ledger))
    tally = Tally(lengths, [len(own) for own in units.units])
    count = tally.program(walked)
    held = parameter_paths(named_leaves(variables))
    dtypes = [var.aval.dtype for var in program.jaxpr.invars]
    own = [
        (lengths.size(v), dtype.itemsize)
        for v, path, dtype in zip(ins, paths, dtypes, strict=False)
        if path in held
    ]
    parameters = plus(*[size for size, _ in own])
    held_bytes = plus(*[{m: c * n for m, c in size.items()} for size, n in own])
    return _model(groups, count, (parameters, held_bytes), tally)


def _model(
    groups: Groups, count: Spent, parameters: tuple[Sum, Sum], tally: Tally
) -> CostModel:
    names, blocks = list(groups), [group.blocks for group in groups.values()]
    sizes = {name: group.size for name, group in groups.items()}

    def each_block(monomial: Monomial) -> Number:
        """From the units of one block to those of all."""
        scale = math.prod(blocks[g] ** power for g, power in monomial if g >= 0)
        return 1 if scale == 1 else Fraction(1, scale)

    def made(total: Sum) -> Polynomial:
        terms = [
            Term(
                c * each_block(monomial),
                tuple((names[g], p) for g, p in monomial if g >= 0),
                tuple(names[~g] for g, _ in reversed(monomial) if g < 0),
            )
            for monomial, c in sorted(total.items())
        ]
        return Polynomial(sizes, tuple(terms))

    why = [
        f"the units of {names[g]} hold unequal shares of some axis"
        for g in sorted(tally.lengths.uneven)
    ]
    why += ["another branch of a cond may become the most expensive"] * tally.unsure
    entries, held_bytes = map(made, parameters)
    return CostModel(
        sizes,
        entries,
        held_bytes,
        made(count.multiply_adds),
        made(count.total_bytes),
        Largest(sizes, tuple(map(made, map(dict, count.largest)))),
        tuple(
            Product(made(dict(inputs)), made(multiply_adds))
            for inputs, multiply_adds in count.products.items()
        ),
        not why,
        "; ".join(why),
    )
