"""The structure of a tree as JSON, so that it can be rebuilt without its classes."""

from collections.abc import Iterator
from typing import Any

import jax

from jaxprune.core._types import PyTree

LEAF = "leaf"


def describe(tree: PyTree) -> Any:
    """What JSON holds of a tree: its containers and keys, without its leaves.

    Dicts, lists, tuples and None come back as they are. Other containers (named
    tuples, modules) come back as dicts of their fields.

    Example:
        >>> describe({"a": (1, [2]), "b": None})
        ['dict', [['a', ['tuple', ['leaf', ['list', ['leaf']]]]], ['b', None]]]
    """
    if tree is None:
        return None
    # One level: everything below the root counts as a leaf.
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    children = found[0]
    if len(children) == 1 and not children[0][0]:
        return LEAF
    if type(tree) in (list, tuple):
        return [type(tree).__name__, [describe(child) for _, child in children]]
    return ["dict", [[_key(path[0]), describe(child)] for path, child in children]]


def rebuild(structure: Any, leaves: Iterator[object]) -> Any:
    """The tree that `describe` saw, with these leaves in its order.

    Raises:
        ValueError: if `structure` is nothing that `describe` returns, or there are too
            few leaves.

    Example:
        >>> rebuild(describe({"a": (1, [2]), "b": None}), iter([3, 4]))
        {'a': (3, [4]), 'b': None}
    """
    if structure is None:
        return None
    if structure == LEAF:
        try:
            return next(leaves)
        except StopIteration:
            raise ValueError("its tree has more leaves than were saved") from None
    try:
        kind, children = structure
        if kind == "dict":
            return {key: rebuild(child, leaves) for key, child in children}
        return {"list": list, "tuple": tuple}[kind](
            [rebuild(child, leaves) for child in children]
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"its tree is not a tree: {str(structure)[:60]}") from error


def _key(entry: object) -> str | int:
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            key = getattr(entry, name)
            return key if isinstance(key, str | int) else str(key)
    return str(entry)
