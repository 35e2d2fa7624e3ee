"""`narrow` of layers that keep different numbers of units: their scan is written out.

Three transformations, one after the other: layers that go are taken out of the scan; it
is written out, layer by layer; and what is left of each of them is narrowed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune.core._layer_masks import parts_of, without_layers
from jaxprune.core._types import ApplyFn, PyTree, PyTreeDef
from jaxprune.program._jaxprs import abstract, is_array, trace_program
from jaxprune.program._unroll import Layers, unrolled


def narrow_unrolled(
    apply_fn: ApplyFn, masks: PyTree, narrow: Callable[[ApplyFn, PyTree], ApplyFn]
) -> ApplyFn:
    """`narrow` with the scans written out whose layers lose units of their own.

    Args:
        apply_fn: the function.
        masks: concrete masks of its variables.
        narrow: `jaxprune.narrow`.
    """
    leaves, treedef = jax.tree.flatten(masks)
    every = [np.asarray(mask) for mask in leaves]
    parts = [parts_of(mask) for mask in every]
    wholes = [part.whole for part in parts if part is not None and part.whole.ndim]
    cuts = [
        (part.whole, part.each) if part else without_layers(mask, wholes)
        for mask, part in zip(every, parts, strict=True)
    ]
    if wholes:
        apply_fn = narrow(apply_fn, treedef.unflatten([whole for whole, _ in cuts]))
    axes = [None if part is None else part.axis for part in parts]
    own = treedef.unflatten([each for _, each in cuts])
    return narrow(_written_out(apply_fn, treedef, axes), own)


def _written_out(
    apply_fn: ApplyFn, treedef: PyTreeDef, axes: Sequence[int | None]
) -> ApplyFn:
    """The function of variables of which some leaves are tuples, layer by layer.

    Args:
        apply_fn: the function of stacked leaves.
        treedef: the structure of its variables.
        axes: for every leaf the axis of its layers; None if it stays stacked.
    """

    def apply_unrolled(variables: PyTree, *args: PyTree, **kwargs: PyTree) -> Any:
        pairs = list(zip(treedef.flatten_up_to(variables), axes, strict=True))
        whole = [x if axis is None else _stacked(x, axis) for x, axis in pairs]
        program = trace_program(apply_fn, treedef.unflatten(whole), *args, **kwargs)
        operands = [x if d is None else Layers(tuple(x), d) for x, d in pairs]
        operands += jax.tree.leaves((args, kwargs))
        given = [x for x in operands if isinstance(x, Layers) or is_array(x)]
        return jax.tree.unflatten(program.out_tree, unrolled(program.closed, given))

    return apply_unrolled


def _stacked(each: Sequence[Any], axis: int) -> jax.ShapeDtypeStruct:
    """What the layers are when they are stacked."""
    shape = list(np.shape(each[0]))
    shape.insert(axis, len(each))
    return abstract(each[0], tuple(shape))
