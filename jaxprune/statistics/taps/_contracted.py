"""Along which axes of every parameter the program sums."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.coupling._labels import Axis, Value, is_live
from jaxprune.coupling._walk import Step, Walked, walk_program
from jaxprune.program._jaxprs import trace_program
from jaxprune.statistics.taps._names import variable_path
from jaxprune.statistics.taps._products import products

Axes = tuple[int, ...]


def contracted_axes(
    apply_fn: ApplyFn, variables: PyTree, *args: PyTree, **kwargs: PyTree
) -> dict[str, Axes]:
    """The axes along which products sum over every kernel.

    What N:M patterns and comparisons within one output need to know, whatever the
    layout: axis 0 of a dense kernel ``[in, out]``, axis 1 of an Equinox weight ``[out,
    in]``, height, width and input channels of a convolution, heads and features of the
    kernel after an attention.

    Args:
        apply_fn: the function; its first argument is `variables`.
        variables: pytree of arrays or shapes; nothing is computed.
        *args: further arguments; arrays or shapes are traced, the rest is static.
        **kwargs: further arguments, treated like `args`.

    Returns:
        Path -> axes, outermost first, the input channels of a convolution last. Leaves
        that no product takes in as they are or moved are left out, as are those that
        products sum over along different axes (a tied embedding) or along parts of an
        axis.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def net(params, x):
        ...     heads = jnp.einsum("nf,fhd->nhd", x, params["in"])
        ...     return jnp.einsum("nhd,hdf->nf", heads, params["out"])
        >>> params = {"in": jnp.ones((6, 2, 3)), "out": jnp.ones((2, 3, 6))}
        >>> contracted_axes(net, params, jnp.ones((1, 6)))
        {'in': (0,), 'out': (0, 1)}

    References:
        Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
        <https://arxiv.org/abs/2306.11695>`_, 2023 (compares within an output)
    """
    program = trace_program(apply_fn, variables, *args, **kwargs)
    paths = [path for path in map(variable_path, program.paths) if path is not None]
    _, walked = walk_program(program, len(paths))
    leaves = dict(zip(paths, walked.ins, strict=False))
    units = {
        int(unit): (path, axis)
        for path, value in leaves.items()
        for axis, labels in enumerate(value.axes)
        if is_live(labels)
        for unit in labels[0].units  # pyright: ignore[reportIndexIssue]
    }
    steps = dict(_steps(walked, ()))
    found: dict[str, set[Axes | None]] = {}
    for product in products(program):
        step = steps.get(product.site.path)
        if step is None or len(product.owners) != 1:
            continue
        (owner,) = product.owners
        operand = 1 - product.site.position
        axes = _axes_of(step, operand, units, owner, leaves[owner])
        found.setdefault(owner, set()).add(axes)
    known = {owner: each.pop() for owner, each in found.items() if len(each) == 1}
    return {owner: axes for owner, axes in known.items() if axes is not None}


def _steps(walked: Walked, path: tuple[int, ...]) -> Iterator[tuple[Any, Step]]:
    numbers = {id(eqn): k for k, eqn in enumerate(walked.jaxpr.eqns)}
    for step in walked.steps:
        here = (*path, numbers.get(id(step.eqn), -1))
        yield here, step
        for inner in step.subs:
            yield from _steps(inner, here)


def _axes_of(
    step: Step,
    operand: int,
    units: Mapping[int, tuple[str, int]],
    owner: str,
    leaf: Value,
) -> Axes | None:
    """The axes of the leaf that this operand is summed over, or None if not known."""
    axes: list[int] = []
    size = 1
    for d in _summed(step, operand):
        value = step.ins[operand]
        size *= value.shape[d]
        axes += _owned(value.axes[d], units, owner)
    if step.eqn.primitive.name == "dot_general":
        axes.sort()
    whole = 1
    for axis in axes:
        whole *= leaf.shape[axis]
    # A part of an axis, or an axis that the labels have lost, is not known.
    return tuple(axes) if len(set(axes)) == len(axes) and whole == size else None


def _owned(axis: Axis, units: Mapping[int, tuple[str, int]], owner: str) -> list[int]:
    if isinstance(axis, int):
        return []
    places = [units.get(int(column.units[0]), ("", 0)) for column in axis]
    return [d for path, d in places if path == owner]


def _summed(step: Step, operand: int) -> Axes:
    """The axes of an operand that an equation sums over."""
    params = step.eqn.params
    if step.eqn.primitive.name == "dot_general":
        return tuple(params["dimension_numbers"][0][operand])
    if step.eqn.primitive.name == "conv_general_dilated" and operand == 1:
        _, channels, *window = params["dimension_numbers"].rhs_spec
        return (*window, channels)
    return ()
