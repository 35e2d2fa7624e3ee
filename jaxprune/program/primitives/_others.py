"""Random numbers, constants, and linear algebra under batch dimensions."""

from typing import Any

from jaxprune.program.primitives._declaration import declare
from jaxprune.program.primitives._signature import (
    Builder,
    Constants,
    Signature,
    shapes_of,
    unindexed,
)


@declare("iota", "random_bits", "random_gamma", "rng_uniform", combine="draw")
def _draw(eqn: Any, constant: Constants) -> Signature:
    ins, outs = shapes_of(eqn)
    build = Builder()
    axes = tuple([tuple(build.axes(shape)) for shape in outs])
    deciding = frozenset(range(len(ins)))
    return Signature(tuple(build.sizes), unindexed(ins), axes, deciding=deciding)


@declare("random_seed", "random_split", "random_fold_in", "random_wrap", combine="draw")
@declare("random_unwrap", "random_clone", "threefry2x32", "rng_bit_generator")
def _keys(eqn: Any, constant: Constants) -> Signature:
    ins, outs = shapes_of(eqn)
    deciding = frozenset(range(len(ins)))
    return Signature((), unindexed(ins), unindexed(outs), deciding=deciding)
