"""Random numbers, constants, and linear algebra under batch dimensions."""

from jaxprune.program._types import Equation
from jaxprune.program.primitives._declaration import declare
from jaxprune.program.primitives._signature import (
    Builder,
    Constants,
    Factors,
    Signature,
    shapes_of,
    unindexed,
)


@declare("iota", "random_bits", "random_gamma", "rng_uniform", combine="draw")
def _draw(eqn: Equation, constant: Constants) -> Signature:
    ins, outs = shapes_of(eqn)
    build = Builder()
    axes = tuple([tuple(build.axes(shape)) for shape in outs])
    deciding = frozenset(range(len(ins)))
    return Signature(tuple(build.sizes), unindexed(ins), axes, deciding=deciding)


@declare("random_seed", "random_split", "random_fold_in", "random_wrap", combine="draw")
@declare("random_unwrap", "random_clone", "threefry2x32", "rng_bit_generator")
def _keys(eqn: Equation, constant: Constants) -> Signature:
    ins, outs = shapes_of(eqn)
    deciding = frozenset(range(len(ins)))
    return Signature((), unindexed(ins), unindexed(outs), deciding=deciding)


# --- linear algebra -------------------------------------------------------------------

_ALGEBRA = "algebra"


@declare(
    *"cholesky qr eigh eig svd lu schur hessenberg geqrf geqp3 ormqr".split(),
    *"householder_product triangular_solve symmetric_product".split(),
    pinned=_ALGEBRA,
    made=_ALGEBRA,
)
def _matrices(eqn: Equation, constant: Constants) -> Signature:
    """Matrices, and vectors beside them, under batch dimensions that all share."""
    return _batched(eqn, 2)


@declare(
    "tridiagonal_solve", "lu_pivots_to_permutation", pinned=_ALGEBRA, made=_ALGEBRA
)
def _vectors(eqn: Equation, constant: Constants) -> Signature:
    return _batched(eqn, 1)


def _batched(eqn: Equation, own: int) -> Signature:
    """All but the last `own` axes of the first operand are a batch."""
    ins, outs = shapes_of(eqn)
    batch = ins[0][: len(ins[0]) - own]
    index = tuple([(d,) for d in range(len(batch))])

    def axes(shape: tuple[int, ...]) -> tuple[Factors, ...]:
        return index + ((),) * (len(shape) - len(batch))

    return Signature(batch, tuple(map(axes, ins)), tuple(map(axes, outs)))
