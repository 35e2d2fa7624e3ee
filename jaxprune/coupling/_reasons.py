"""Reasons: why an axis cannot be cut, a group is not exact, units cannot be merged.

Rules name a reason by its kind; what a person reads is written here and nowhere else.
"""

from collections.abc import Mapping
from types import MappingProxyType

# A text stands after "params/dense/kernel axis 1 is pinned: " or "not exact: " and
# before "(primitive at file:line (function))".
TEXTS: Mapping[str, str] = MappingProxyType(
    {
        "alive": "never cut",
        "pinned": "pinned by the caller",
        "input": "coupled to the input {name}",
        "output": "coupled to the {name} of apply_fn",
        "unused": "unused variable",
        "no_rule": "primitive {name} has no rule",
        "refused": "primitive {name} has no rule: {why}",
        "size_one": "an axis of size 1",
        "not_split": "units do not vary along this axis of a reshape",
        "one_unit": "one unit spans a whole axis",
        "reshapes": "two reshapes factor this axis in incompatible ways",
        "factor": "one factor of this axis cannot be cut: {why}",
        "stacked": "arrays are stacked along this axis",
        "unstacked": "this axis is unstacked",
        "broadcast": "an axis of size 1 is broadcast against it",
        "scan": "a scan iterates over this axis",
        "no_identity": "a scan iterates over it, and zero layers are not the identity",
        "stacked_layers": "the units are layers of a scan",
        "ragged": "group sizes of a ragged product are computed at run time",
        "fourier": "a Fourier transform runs along this axis",
        "window": "spatial axis of a convolution kernel",
        "space": "spatial axis of a convolution input",
        "dynamic_slice": "the start of a dynamic slice is computed at run time",
        "dynamic_update": "the start of a dynamic update is computed at run time",
        "indexed_by_data": "indexed by values computed at run time",
        "indexed_by_constants": "indexed by constants that are not plain positions",
        "index_vector": "axis of an index vector",
        "gather_window": "the start of a gather window is computed at run time",
        "dropped": "this axis is removed by indexing",
        "random_operand": "parameter of a random draw",
        "random_key": "a random key",
        "scattered": "a scatter writes along this axis",
        "written": "a scatter writes to positions computed at run time",
        "argument": "indices into this axis are returned",
        "pooling": "spatial axis of a pooling window",
        "gathered": "values of all devices are gathered along this axis",
        "distributed": "parts of this axis go to different devices",
        "mixed": "values along this axis depend on each other",
        "algebra": "a factorization or a solver runs along this axis",
        "sorted": "values are sorted along this axis",
        "top_k": "top_k selects positions along this axis",
        "not_finite_at_zero": "masked positions hold 0, where the result is not finite",
        "contraction": "a contraction runs over masked positions that are not 0",
        "sum": "a sum runs over masked positions that are not 0",
        "reduction": "{name} over this axis includes masked positions",
        "cumulative": "a cumulative operation runs over masked positions",
        "completed": "a reduction over the group counts values at removed positions",
        "ordered": "units may be pruned but not permuted",
        "consumer_returned": "a consumer is an output of apply_fn",
        "not_one_axis": "units do not occupy one axis once each",
        "no_merge_rule": "the effect of this primitive on equal units is unknown",
        "unknown_to_merge": "the effect of {name} on equal units is unknown",
        "consumer_indexes": "a consumer is used as an index or predicate",
        "axes_joined": "a reshape joins two axes of the group",
        "one_operand": "only one operand of this contraction is indexed by the group",
        "consumers_contracted": "a contraction multiplies two consumers of the group",
        "reduction_counts": "a reduction over the group counts merged units",
        "sum_counts": "a sum over the group counts merged units",
        "writer": "the stream keeps units that this writer loses",
        "writer_not_zero": "the value of this writer is not 0 at removed positions",
        "uneven": "units occupy different numbers of positions on one axis",
        "consumers_multiplied": "two consumers of the group are multiplied",
        "nonlinear": "a consumer passes through a nonlinear operation",
        "consumer_added": "a consumer is added to a value that the group does not feed",
        "roles": "traced without roles=True",
        "balanced": "blocks of a balanced group lose different units",
        "part_taken": "a slice takes a different part of every unit",
        "rearranged": "the positions of a unit are rearranged",
    }
)


def text_of(kind: str, **details: str) -> str:
    """What a person reads.

    Raises:
        KeyError: if there is no such kind; `TEXTS` holds them all.

    Example:
        >>> text_of("no_rule", name="sort")
        'primitive sort has no rule'
    """
    return TEXTS[kind].format(**details)
