"""Leaves of a tree by name: the paths that groups, masks and messages use."""

from collections.abc import Iterable
from typing import Any

import jax


def keystr(path: Any) -> str:
    """The one way a leaf is named."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_names(tree: Any, treedef: Any) -> tuple[str, ...]:
    """`keystr` of every leaf of a tree, whose structure is `treedef`.

    Remembered: a model's thousands of leaves are named at every step of pruning it.
    """
    try:
        names = _NAMES.get(treedef)
    except TypeError:  # something static cannot be hashed
        return _leaf_names(tree)
    if names is None:
        if len(_NAMES) >= _MOST_NAMES:
            _NAMES.clear()
        names = _NAMES[treedef] = _leaf_names(tree)
    return names


_NAMES: dict[Any, tuple[str, ...]] = {}
_MOST_NAMES = 64


def _leaf_names(tree: Any) -> tuple[str, ...]:
    return tuple([keystr(path) for path, _ in jax.tree.leaves_with_path(tree)])


def named_leaves(tree: Any) -> dict[str, Any]:
    """Path -> leaf in tree order, with the paths that `Member.path` uses.

    Example:
        >>> named_leaves({"a": [1, 2], "b": None})
        {'a/0': 1, 'a/1': 2}
    """
    leaves, treedef = jax.tree.flatten(tree)
    return dict(zip(leaf_names(tree, treedef), leaves, strict=True))


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
