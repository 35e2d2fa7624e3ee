"""Groups as JSON and index arrays, and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune.core import Group, Groups, Member, Pinned, Reason
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
        found[group["name"]] = Group(**_with_reasons({**group, "members": members}))
    pinned = tuple(Pinned(**_with_reasons(pin)) for pin in about["pinned"])
    shapes = {path: tuple(shape) for path, shape in about["shapes"].items()}
    tree = rebuild(about["tree"], iter(range(len(shapes))))
    return Groups(found, pinned, shapes, jax.tree.structure(tree))


_REASONS = "reason", "obstacle"


def _fields(thing: Any, *but: str) -> dict[str, Any]:
    """The fields that JSON holds as they are, reasons field by field."""
    found = {}
    for field in dataclasses.fields(thing):
        if field.name not in but:
            value = getattr(thing, field.name)
            is_reason = isinstance(value, Reason)
            found[field.name] = dataclasses.asdict(value) if is_reason else value
    return found


def _with_reasons(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _reason(value) if name in _REASONS and value is not None else value
        for name, value in fields.items()
    }


def _reason(value: str | Mapping[str, Any]) -> Reason:
    if isinstance(value, str):  # as it was saved before reasons had fields
        return Reason("saved", value)
    return Reason(**value)
