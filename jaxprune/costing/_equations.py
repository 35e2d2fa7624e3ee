"""How long a program is, which is what compiling it costs."""

from typing import Any

from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.program._interpret import inner_jaxprs
from jaxprune.program._jaxprs import opened, trace_program


def equations(
    apply_fn: ApplyFn, variables: PyTree, *args: PyTree, **kwargs: Any
) -> int:
    """Counts the equations of ``apply_fn(variables, *args, **kwargs)``.

    Those of the body of a loop count once, however often it runs, so a network under
    a scan is as long as one of its layers. The time to trace and to compile a program
    grows with this number; nothing is run or compiled.

    Args:
        apply_fn: the function.
        variables: tree of arrays or ShapeDtypeStructs.
        *args: further arguments, arrays or shapes; what is no array is static.
        **kwargs: further keyword arguments.

    Returns:
        The number of equations, calls themselves not counted.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def layers(params, x):
        ...     return jax.lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, params)[0]
        >>> equations(layers, jnp.ones((9, 4, 4)), jnp.ones((1, 4)))
        3
    """
    return _count(trace_program(apply_fn, variables, *args, **kwargs).closed)


def _count(jaxpr: Any) -> int:
    total = 0
    for eqn in opened(jaxpr)[0].eqns:
        inner = inner_jaxprs(eqn)
        total += sum(map(_count, inner)) + (eqn.primitive.name == "scan" or not inner)
    return total
