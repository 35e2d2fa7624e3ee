"""Along which axes the entries of a parameter are weighed against each other.

Where a product reads a parameter, it sums over some of its axes: the inputs of a layer.
N:M patterns run along them, second moments of activations belong to them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.program._interpret import (
    HOLDERS,
    Passage,
    inner_jaxprs,
    interpret,
    through,
)
from jaxprune.program._jaxprs import opened, trace_program, variable_path
from jaxprune.program._types import Atom, Equation, Jaxpr
from jaxprune.program.primitives import declaration

Origins = frozenset[tuple[int, int]]  # (number of an input, its axis)


class _Axes(NamedTuple):
    """Which axes of the chosen inputs run along the axes of a value.

    Attributes:
        origins: for every axis; of a value made of chosen inputs alone.
        free: does the value depend on another input?
    """

    origins: tuple[Origins, ...] = ()
    free: bool = False


def contracted_axes(
    apply_fn: ApplyFn, variables: PyTree, *args: PyTree, **kwargs: PyTree
) -> dict[str, tuple[int, ...]]:
    """The axes of every parameter that the products of a function sum over.

    A product counts where it reads a parameter as it is, moved (transposed, reshaped,
    sliced by a scan), or changed entry by entry, as by a mask. Axes that the other
    operand shares, the inputs of the layer, come before those of a convolution's
    window, which the kernel alone has.

    Args:
        apply_fn: the function; its first argument is `variables`.
        variables: tree of arrays or ShapeDtypeStructs; nothing is computed.
        *args: further arguments; arrays or shapes are traced, the rest is static.
        **kwargs: further arguments, treated like `args`.

    Returns:
        Path of a leaf -> its axes; () where no product reads it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def layer(params, x):
        ...     return jax.nn.relu(x @ params["w"].T) + params["b"]
        >>> params = {"w": jnp.ones((5, 3)), "b": jnp.ones((2, 5))}
        >>> contracted_axes(layer, params, jnp.ones((2, 3)))
        {'b': (), 'w': (1,)}
    """
    program = trace_program(apply_fn, variables, *args, **kwargs)
    paths = [variable_path(path) for path in program.paths]
    found = contracted_axes_of(program.closed, [path is not None for path in paths])
    pairs = zip(paths, found, strict=True)
    return {path: axes for path, axes in pairs if path is not None}


def contracted_axes_of(program: Jaxpr, chosen: Sequence[bool]) -> list[tuple[int, ...]]:
    """`contracted_axes` of a jaxpr: for every input; () for those not chosen."""
    jaxpr, _ = opened(program)
    shapes = [getattr(var.aval, "shape", ()) for var in jaxpr.invars]
    ins = [
        _Axes(tuple([frozenset([(k, d)]) for d in range(len(shape))]))
        if own
        else _Axes(free=True)
        for k, (own, shape) in enumerate(zip(chosen, shapes, strict=True))
    ]
    found: dict[tuple[int, int], bool] = {}  # -> does the other operand share it?
    _run(jaxpr, ins, found)
    order = sorted(found, key=lambda axis: (not found[axis], axis))
    return [tuple([d for k, d in order if k == own]) for own in range(len(ins))]


def _run(
    jaxpr: Jaxpr, ins: Sequence[_Axes], found: dict[tuple[int, int], bool]
) -> list[_Axes]:
    jaxpr, _ = opened(jaxpr)

    def step(number: int, eqn: Equation, operands: list[_Axes]) -> list[_Axes]:
        if eqn.primitive.name in HOLDERS:
            return through(eqn, operands, _passage(eqn, found))
        return _equation(eqn, operands, found)

    def constant(var: Atom) -> _Axes:
        return _Axes((frozenset(),) * len(getattr(var.aval, "shape", ())))

    return interpret(jaxpr, ins, step, constant)


def _passage(eqn: Equation, found: dict[tuple[int, int], bool]) -> Passage[_Axes]:
    programs = inner_jaxprs(eqn)
    return Passage(
        run=lambda k, ins: _run(programs[k], ins, found),
        join=_join,
        unstacked=lambda value: value._replace(origins=value.origins[1:]),
        stacked=lambda value: value._replace(origins=_led(value)),
    )


def _led(value: _Axes) -> tuple[Origins, ...]:
    return value.origins if value.free else (frozenset(), *value.origins)


def _join(a: _Axes, b: _Axes) -> _Axes:
    if a.free or b.free:
        return _Axes(free=True)
    pairs = zip(a.origins, b.origins, strict=True)
    return _Axes(tuple([x | y for x, y in pairs]))


def _equation(
    eqn: Equation, operands: list[_Axes], found: dict[tuple[int, int], bool]
) -> list[_Axes]:
    known = declaration(eqn)
    free = any(value.free for value in operands)
    signature = None if known is None else known.signature(eqn, lambda operand: None)
    if known is not None and signature is not None and known.is_product:
        for k, value in enumerate(operands):
            _note(signature, k, value, found)
    if free or signature is None:
        shapes = [getattr(var.aval, "shape", ()) for var in eqn.outvars]
        return [_Axes((frozenset(),) * len(shape), free) for shape in shapes]
    return [
        _Axes(
            tuple(
                [
                    frozenset().union(*(operands[k].origins[d] for k, d in along))
                    for along in signature.sources(result)
                ]
            )
        )
        for result in range(len(eqn.outvars))
    ]


def _note(
    signature: Any, k: int, value: _Axes, found: dict[tuple[int, int], bool]
) -> None:
    """Notes which axes of chosen inputs a product sums over in operand `k`."""
    if value.free:
        return
    others = [axes for j, axes in enumerate(signature.ins) if j != k]
    shared = {f for axes in others for factors in axes for f in factors}
    for d in signature.contracted_axes(k):
        own = not shared.isdisjoint(signature.ins[k][d])
        for origin in value.origins[d]:
            found[origin] = found.get(origin, False) or own
