"""Names and patterns: which names a pattern means, and the nearest to a wrong one."""

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern means.

    A name in full means itself alone, whatever characters it contains; anything else
    is a pattern of `fnmatch`, in which ``*`` matches everything, ``/`` too. Names that
    map to groups are also meant by what matches the group's label.

    Example:
        >>> matching("a[0]", ["a[0]", "a0"]), matching("a[0-9]", ["a[0]", "a0"])
        (['a[0]'], ['a0'])
    """
    labels = labels_in(names)
    names = list(names)
    if pattern in names:
        return [pattern]
    if labelled := [name for name in names if labels.get(name) == pattern]:
        return labelled
    return [
        name
        for name in names
        if fnmatch.fnmatchcase(name, pattern)
        or (name in labels and fnmatch.fnmatchcase(labels[name], pattern))
    ]


def labels_in(names: Iterable[str]) -> dict[str, str]:
    """Name -> label, where the names map to something that has one."""
    if not isinstance(names, Mapping):
        return {}
    labels = {name: getattr(thing, "label", "") for name, thing in names.items()}
    return {name: label for name, label in labels.items() if label}


def listed(names: Collection[str], most: int = 8) -> str:
    """The first names, and how many there are if not all are shown.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b, ... (3 in all)'
    """
    shown = ", ".join(list(names)[:most])
    return shown + (f", ... ({len(names)} in all)" if len(names) > most else "")


def nearest(name: str, names: Iterable[str], most: int = 1) -> str:
    """A question that names the closest of the names, or "".

    Example:
        >>> nearest("cnv*", ["conv1:3", "dense:1"])
        '; did you mean conv1:3?'
        >>> nearest("xyz", ["conv1:3"])
        ''
    """
    stem, names = name.strip("*"), [*names, *labels_in(names).values()]
    within = [known for known in names if stem and stem in known][:most]
    close = within or difflib.get_close_matches(stem, names, most, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def patterns(option: str, given: str | Sequence[str]) -> tuple[str, ...]:
    """One pattern or several, as a tuple.

    Raises:
        TypeError: if it is anything else.

    Example:
        >>> patterns("pin", "params/head/*"), patterns("pin", ["a", "b"])
        (('params/head/*',), ('a', 'b'))
    """
    if isinstance(given, str):
        return (given,)
    found = tuple(given)
    for pattern in found:
        if not isinstance(pattern, str):
            raise TypeError(f"{option} takes patterns, which are text; got {pattern!r}")
    return found
