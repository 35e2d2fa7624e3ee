"""Random numbers: keys are never cut; drawn arrays take the size of their use.

The narrowed program draws at the original size and keeps the living positions, so
that dropout and noise see the very numbers of the masked program.
"""

import jax

from jaxprune.coupling._labels import Value
from jaxprune.coupling._registry import rule
from jaxprune.coupling._types import Liveness, Narrowed, Step, Walk
from jaxprune.program._types import Equation


def _narrow_draw(kept: Liveness, step: Step, *operands: jax.Array) -> Narrowed:
    bits = step.eqn.primitive.bind(*operands, **step.eqn.params)
    many = step.eqn.primitive.multiple_results
    outs = list(bits) if many else [bits]
    cut = [kept.cut(x, value) for x, value in zip(outs, step.outs, strict=True)]
    return cut if many else cut[0]


@rule("random_bits", "random_gamma", "rng_uniform", narrow=_narrow_draw)
def _draw(walk: Walk, eqn: Equation, *operands: Value) -> Value:
    why = walk.ledger.reason("random_operand", eqn)
    for value in operands:
        for axis in value.axes:
            walk.ledger.freeze(axis, why)
    shape = eqn.outvars[0].aval.shape
    axes = tuple(walk.ledger.fresh_axis(n) for n in shape)
    live = [axis for axis in axes if not isinstance(axis, int)]
    walk.ledger.ordered.extend(axis[0].units for axis in live)
    return Value(shape, axes)


@rule(
    "random_seed",
    "random_split",
    "random_fold_in",
    "random_wrap",
    "random_unwrap",
    "random_clone",
    "threefry2x32",
    "rng_bit_generator",
)
def _keys(walk: Walk, eqn: Equation, *operands: Value) -> list[Value]:
    return walk.frozen(eqn, walk.ledger.reason("random_key", eqn), *operands)
