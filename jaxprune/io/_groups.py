"""Groups as JSON and index arrays, and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune.core import Group, Groups, Member, Pinned
from jaxprune.io._trees import describe, rebuild


def groups_as_json(groups: Groups) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The groups as JSON, which names index arrays by their number, and the arrays.

    Many members share one array, which is stored once.
    """
    indices: list[np.ndarray] = []
    numbers: dict[Any, int] = {}

    def number(index: np.ndarray) -> int:
        array = np.ascontiguousarray(index, np.int32)
        key = array.shape, array.tobytes()
        if key not in numbers:
            numbers[key] = len(indices)
            indices.append(array)
        return numbers[key]

    tree = groups.treedef.unflatten(range(groups.treedef.num_leaves))
    about = {
        "groups": [
            {
                **_fields(group, "members"),
                "members": [
                    {**_fields(member, "index"), "index": number(member.index)}
                    for member in group.members
                ],
            }
            for group in groups.values()
        ],
        "pinned": [_fields(pin) for pin in groups.pinned],
        "shapes": {path: list(shape) for path, shape in groups.shapes.items()},
        "tree": describe(tree),
    }
    return about, indices


def groups_from_json(about: Mapping[str, Any], indices: Sequence[np.ndarray]) -> Groups:
    """The groups of what `groups_as_json` returned."""
    found = {}
    for group in about["groups"]:
        members = tuple(
            Member(**{**member, "index": indices[member["index"]].astype(np.int64)})
            for member in group["members"]
        )
        found[group["name"]] = Group(**{**group, "members": members})
    pinned = tuple(Pinned(**pin) for pin in about["pinned"])
    shapes = {path: tuple(shape) for path, shape in about["shapes"].items()}
    tree = rebuild(about["tree"], iter(range(len(shapes))))
    return Groups(found, pinned, shapes, jax.tree.structure(tree))


def _fields(thing: Any, *but: str) -> dict[str, Any]:
    """The fields that JSON holds as they are; reasons become text."""
    found = {}
    for field in dataclasses.fields(thing):
        if field.name not in but:
            value = getattr(thing, field.name)
            plain = value is None or isinstance(value, str | int | float)
            found[field.name] = value if plain else str(value)
    return found
