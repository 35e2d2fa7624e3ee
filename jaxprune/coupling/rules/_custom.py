"""Functions with derivatives of their own: custom_jvp and custom_vjp.

The derivative of the original call is itself a program of full size. It is traced, and
narrowed like any other, when somebody differentiates, for the operands with respect to
which he does: a rule may ask which they are, and may fail for others.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.extend.linear_util import wrap_init

from jaxprune.core._types import PyTree
from jaxprune.coupling._labels import Value
from jaxprune.coupling._registry import rule
from jaxprune.coupling._types import Liveness, Narrowed, Step, Walk
from jaxprune.program._closures import has_ended
from jaxprune.program._jaxprs import abstract, bind, opened, source_line
from jaxprune.program._types import Aval, Equation


def _all_operands(eqn: Equation) -> int:
    return len(eqn.invars)


def _resize_custom_jvp(kept: Liveness, step: Step) -> dict[str, Any]:
    p = step.eqn.params
    ins = step.ins[p["num_consts"] :]
    slopes = [Value(value.shape, value.axes, data=value.data) for value in ins]

    @functools.cache
    def small_jvp(*zeros: bool) -> Any:
        jaxpr, consts, out_zeros = p["jvp_jaxpr_fun"].call_wrapped(*zeros)
        _check_closed_over(consts, step)
        tangents = [v for v, zero in zip(slopes, zeros, strict=True) if not zero]
        given = list(map(kept.given, (*ins, *tangents)))
        small = kept.narrow_jaxpr(ClosedJaxpr(jaxpr, consts), given)
        return *opened(small), out_zeros

    debug_info = p["jvp_jaxpr_fun"].debug_info
    return {
        "call_jaxpr": kept.program(step.subs[0]),
        "jvp_jaxpr_fun": wrap_init(small_jvp, debug_info=debug_info),
    }


@rule("custom_jvp_call", resize=_resize_custom_jvp, whole=_all_operands)
def _custom_jvp(walk: Walk, eqn: Equation, *values: Value) -> list[Value]:
    return walk.enter_branch(eqn.params["call_jaxpr"], list(values))


def _narrow_custom_vjp(kept: Liveness, step: Step, *operands: jax.Array) -> Narrowed:
    @jax.custom_vjp
    def call(*args: PyTree) -> Any:
        return kept.replay(step.subs[0], args)

    passes: dict[Any, _Forward] = {}  # structure of the residuals -> what made them

    def forward(*args: PyTree) -> Any:
        moving = [k for k, arg in enumerate(args) if arg.perturbed]
        moving = [k for k in moving if _has_slope(args[k].value)]
        run = _Forward(kept, step, moving)
        outs, residuals = run.narrowed(*[arg.value for arg in args])
        passes[jax.tree.structure(residuals)] = run
        return outs, residuals

    def backward(residuals: PyTree, cotangents: PyTree) -> Any:
        run = passes[jax.tree.structure(residuals)]
        slopes = run.backward(residuals, cotangents)
        return tuple([slopes.get(k) for k in range(len(operands))])

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call(*operands)


@rule("custom_vjp_call", narrow=_narrow_custom_vjp, whole=_all_operands)
def _custom_vjp(walk: Walk, eqn: Equation, *values: Value) -> list[Value]:
    return walk.enter_branch(eqn.params["call_jaxpr"], list(values))


def _has_slope(x: jax.Array | Aval) -> bool:
    """Is the derivative with respect to this array more than a formal zero?"""
    return jnp.issubdtype(x.dtype, jnp.inexact)


class _Forward:
    """The forward pass of a custom_vjp with respect to some of its operands.

    Attributes:
        narrowed: ``operands -> (results, pull-back)``.
    """

    def __init__(self, kept: Liveness, step: Step, moving: Sequence[int]) -> None:
        self.kept, self.step, self.moving = kept, step, moving
        avals = [abstract(var.aval) for var in step.eqn.invars]
        given = list(map(kept.given, step.ins))
        self.narrowed = kept.narrow_call(self._forward, avals, given)
        _check_closed_over(self.narrowed.program.closed.consts, step)

    def _forward(self, *primals: PyTree) -> PyTree:
        """At full size."""

        def of_moving(moved: dict[int, Any]) -> Any:
            args = [moved.get(k, primal) for k, primal in enumerate(primals)]
            return bind(self.step.eqn, *args)

        return jax.vjp(of_moving, {k: primals[k] for k in self.moving})

    def backward(self, residuals: PyTree, cotangents: Sequence[Any]) -> dict[int, Any]:
        """The slopes of the moving operands, by number."""
        outs = [var.aval for var in self.step.eqn.outvars]
        reals = [k for k, aval in enumerate(outs) if _has_slope(aval)]

        def full(pull: Any, cts: PyTree) -> Any:
            every: list[Any] = [np.zeros(v.shape, jax.dtypes.float0) for v in outs]
            for k, ct in zip(reals, cts, strict=True):
                every[k] = ct
            return pull(every)[0]

        narrowed, count = self.narrowed, len(outs)
        given = [*narrowed.out_given[count:]]
        given += [self.kept.given(self.step.outs[k]) for k in reals]
        avals = narrowed.out_shapes[1], [abstract(outs[k]) for k in reals]
        run = self.kept.narrow_call(full, avals, given)
        _check_closed_over(run.program.closed.consts, self.step)
        slopes = run(residuals, [_instantiated(cotangents[k]) for k in reals])
        labels = dict(zip(self.moving, run.walked.outs, strict=True))
        return {
            k: self._like_operand(slope, self.step.ins[k], run.kept, labels[k])
            for k, slope in slopes.items()
        }

    def _like_operand(
        self, slope: PyTree, operand: Value, kept: Liveness, value: Value
    ) -> Any:
        """The slope at the size of the operand: data is whole, also where it is cut."""
        if not operand.data:
            return slope
        for d, axis in enumerate(value.axes):
            positions = None if value.data else kept.positions(axis)
            if positions is not None:
                shape = (*slope.shape[:d], operand.shape[d], *slope.shape[d + 1 :])
                at = (slice(None),) * d + (positions,)
                slope = jnp.zeros(shape, slope.dtype).at[at].set(slope)
        return slope


def _check_closed_over(consts: Sequence[Any], step: Step) -> None:
    """Raises if a derivative reads what the traced function computed outside of it."""
    for const in filter(has_ended, consts):
        what, line = step.eqn.primitive.name, source_line(step.eqn)
        place = what.removesuffix("_call") + (line and f" at {line}")
        raise ValueError(
            f"the derivative of {place} closes over an array ({const.aval}) that the "
            "pruned function computes outside of it, which is gone when somebody "
            "differentiates (so it is in jax.grad(jax.jit(fn))). Give the array to it "
            "as an argument, or compute it inside the derivative"
        )


def _instantiated(ct: PyTree) -> Any:
    """The array behind a cotangent that may be a symbolic zero."""
    if isinstance(ct, jax.custom_derivatives.SymbolicZero):
        aval = cast(Aval, ct.aval)
        return jnp.zeros(aval.shape, aval.dtype)
    return ct
