"""Meshes with explicit axes: the methods run under automatic ones.

On a mesh of `jax.sharding.AxisType.Explicit` axes, the default of `jax.make_mesh`, the
sharding of every value is part of its type. Ranking, packing and masking reshape and
broadcast across sharded axes, where no single typed rule exists; the partitioner
decides such things well. So they run under `jax.sharding.auto_axes`, and what leaves
them is typed like the weights, gradients or state that it belongs to. The optimiser
inside is not touched: it runs in the mode of its caller.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune.core._types import Array, PyTree

T = TypeVar("T")


def under_auto_axes(fn: Callable[..., T], *args: PyTree, like: PyTree) -> T:
    """``fn(*args)``, with explicit axes of the mesh made automatic meanwhile.

    Args:
        fn: function of arrays. What it closes over has to be host data.
        *args: trees of arrays, or None.
        like: tree of the structure of the result, or a prefix of it. Arrays: the result
            is sharded as they are. Shardings: as they say. None: every device has all.

    Returns:
        What `fn` returns. Without explicit axes this is a plain call.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(4.0)
        >>> under_auto_axes(lambda x: 2 * x, x, like=x)
        Array([0., 2., 4., 6.], dtype=float32)
    """
    mesh = explicit_mesh((args, like))
    if mesh is None:
        return fn(*args)
    explicit = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    out = jax.tree.map(
        lambda x: x if isinstance(x, NamedSharding) else _sharding_of(mesh, x),
        like,
        is_leaf=lambda x: x is None,
    )
    typed = jax.sharding.auto_axes(fn, axes=explicit, out_sharding=out)
    return cast(Callable[..., T], typed)(*args)


def beside_leaves(
    fn: Callable[..., T], *args: PyTree, leaves: Mapping[str, Array]
) -> T:
    """`under_auto_axes` for results by path, each sharded as the leaf that it is for.

    Args:
        fn: function of arrays that returns a tree whose innermost keys are paths.
        *args: trees of arrays.
        leaves: path -> leaf.
    """
    if explicit_mesh((args, leaves)) is None:
        return fn(*args)
    like = jax.tree.map_with_path(
        lambda path, x: sharding_for(x.shape, leaves[path[-1].key]),
        jax.eval_shape(fn, *shapes_of(args)),
    )
    return under_auto_axes(fn, *args, like=like)


def shapes_of(tree: PyTree) -> PyTree:
    """Shapes and dtypes alone, on no mesh."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree
    )


def explicit_mesh(tree: PyTree) -> Mesh | AbstractMesh | None:
    """The mesh with explicit axes that an array of the tree lies on, or None.

    It is the mesh of devices where the array is concrete, and abstract in a trace.

    Example:
        >>> import jax.numpy as jnp
        >>> explicit_mesh({"w": jnp.ones(3)}) is None
        True
    """
    for leaf in jax.tree.leaves(tree):
        sharding = leaf if isinstance(leaf, NamedSharding) else _typed(leaf)
        mesh = sharding.mesh
        if mesh.empty or AxisType.Explicit not in mesh.axis_types:
            continue
        concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        own = getattr(leaf, "sharding", None) if concrete else sharding
        return own.mesh if isinstance(own, NamedSharding) else mesh
    return None


def sharding_for(shape: tuple[int, ...], leaf: Array) -> NamedSharding | None:
    """How an array that goes along with a leaf is sharded on its explicit mesh.

    Axis by axis as the leaf, where the size allows it; whole elsewhere.

    Returns:
        A `NamedSharding`; None if the leaf lies on no mesh with explicit axes.
    """
    mesh = explicit_mesh(leaf)
    if mesh is None:
        return None
    spec: list[str | tuple[str, ...] | None] = [None] * len(shape)
    for axis, names in enumerate(_typed(leaf).spec[: len(shape)]):
        parts = 1
        for name in names if isinstance(names, tuple) else (names,):
            parts *= mesh.shape.get(name, 1)
        if names is not None and shape[axis] % parts == 0 and shape[axis]:
            spec[axis] = names
    return NamedSharding(mesh, P(*spec))


def _typed(leaf: Array) -> NamedSharding:
    return jax.typeof(leaf).sharding


def _sharding_of(mesh: Mesh | AbstractMesh, leaf: Array | None) -> NamedSharding:
    if leaf is None:
        return NamedSharding(mesh, P())
    own = _typed(leaf)
    spec = P(*[None] * len(jax.typeof(leaf).shape)) if own.mesh.empty else own.spec
    return NamedSharding(mesh, spec)
