"""Leaves of a tree by name: the paths that groups, masks and messages use."""

from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any

import jax
import numpy as np
from jax.tree_util import KeyPath

from jaxprune.core._types import Array, PyTree, PyTreeDef


def keystr(path: KeyPath) -> str:
    """The one way a leaf is named: its path, without the box around it.

    A variable's box (Flax NNX Variable, Linen Partitioned) is no part of its name: a
    tree may be made with boxes and updated without.
    """
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_names(tree: PyTree, treedef: PyTreeDef) -> tuple[str, ...]:
    """`keystr` of every leaf of a tree, whose structure is `treedef`.

    Remembered: a model's thousands of leaves are named at every step of pruning it. But
    not of trees with nodes of other libraries, whose structure may hold anything, such
    as functions and the arrays that they close over.

    Raises:
        ValueError: if two leaves have the same name.
    """
    try:
        names = _NAMES.get(treedef)
    except TypeError:  # something static cannot be hashed
        return _leaf_names(tree)
    if names is None and not _is_plain(treedef):
        return _leaf_names(tree)
    if names is None:
        if len(_NAMES) >= _MOST_NAMES:
            _NAMES.clear()
        names = _NAMES[treedef] = _leaf_names(tree)
    return names


_NAMES: dict[Any, tuple[str, ...]] = {}
_MOST_NAMES = 64


def _is_plain(treedef: PyTreeDef) -> bool:
    """Is this a tree of dictionaries, lists and tuples?"""
    todo = [treedef]
    while todo:
        node = todo.pop()
        kind = node.node_data()
        if kind is not None and not issubclass(kind[0], (dict, list, tuple, NoneType)):
            return False
        todo += node.children()
    return True


def _leaf_names(tree: PyTree) -> tuple[str, ...]:
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    return unique_names(paths, [keystr(path) for path in paths])


def unique_names(paths: Sequence[KeyPath], names: Sequence[str]) -> tuple[str, ...]:
    """The names of the leaves at these paths.

    Raises:
        ValueError: if two are the same; the text has both paths.

    Example:
        >>> leaf_names(tree := {"a/b": 1, "a": {"b": 2}}, jax.tree.structure(tree))
        Traceback (most recent call last):
            ...
        ValueError: two leaves are named a/b: ['a']['b'] and ['a/b']; rename one ...
    """
    if len(set(names)) < len(names):
        first: dict[str, KeyPath] = {}
        for path, name in zip(paths, names, strict=True):
            if name in first:
                one, other = map(jax.tree_util.keystr, (first[name], path))
                raise ValueError(
                    f"two leaves are named {name}: {one} and {other}; rename one of "
                    "the keys"
                )
            first[name] = path
    return tuple(names)


def named_leaves(tree: PyTree) -> dict[str, PyTree]:
    """Path -> leaf in tree order, with the paths that `Member.path` uses.

    Example:
        >>> named_leaves({"a": [1, 2], "b": None})
        {'a/0': 1, 'a/1': 2}
    """
    leaves, treedef = jax.tree.flatten(tree)
    return dict(zip(leaf_names(tree, treedef), leaves, strict=True))


# What Flax, Haiku and Equinox call them. The number of axes alone does not tell:
# attention biases, and biases and scales stacked over scanned layers, have two.
NOT_KERNELS = frozenset({"bias", "b", "scale", "offset"})


def kernel_paths(leaves: Mapping[str, Array]) -> list[str]:
    """The paths of kernels: two axes or more, and not called bias, b, scale or offset.

    Example:
        >>> import numpy as np
        >>> kernel_paths({"w": np.ones((2, 2)), "b": np.ones(2)})
        ['w']
    """
    return [
        path
        for path, leaf in leaves.items()
        if np.ndim(leaf) >= 2
        and path.removesuffix("/value").rpartition("/")[2] not in NOT_KERNELS
    ]


def parameter_paths(paths: Iterable[str]) -> set[str]:
    """The paths that are trained: those in the collection ``params``, if there is one.

    Everything else in a tree of variables (``batch_stats``, caches) is cut along with
    the parameters, but neither scored nor counted as one.

    Example:
        >>> sorted(parameter_paths(["batch_stats/bn/mean", "params/bn/scale"]))
        ['params/bn/scale']
        >>> sorted(parameter_paths(["bn/mean", "bn/scale"]))
        ['bn/mean', 'bn/scale']
    """
    paths = set(paths)
    return {path for path in paths if path.startswith("params/")} or paths
