"""Labels: what a person calls a group, from the paths and axes of its members.

A label is a module path and a kind: ``block1 hidden``, ``encoder/attention heads``,
``residual stream``. It is a name to read and to select by, and decides nothing else:
kinds follow from shapes, from the order of use and from the names that module
libraries give, so an unusual program may be labelled less well, never cut differently.
"""

import collections
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxprune.core._groups import Group, Member

_COLLECTION = re.compile(r"^(params|batch_stats)/")
# What libraries call the projections of attention, and what only rescales a stream.
_PROJECTIONS = frozenset(
    "query key value q k v qkv q_proj k_proj v_proj qkv_proj query_proj key_proj "
    "value_proj wq wk wv wqkv c_attn in_proj to_q to_k to_v to_qkv".split()
)
_GATES = re.compile(r"(^|_)(se|gate|squeeze|excit\w*|expand)(?![a-z])", re.IGNORECASE)
_VECTORS = frozenset({"bias", "b", "scale", "offset"})
# Leaves that say nothing of their layer; any other leaf is a layer of its own.
_LEAVES = _VECTORS | {"kernel", "weight", "w", "embedding", "embeddings", "mean", "var"}


class _Kernel(NamedTuple):
    """A member on a leaf of two axes or more.

    Attributes:
        layer: the components of the path of its layer.
        member: the member.
        ndim: how many axes the leaf has.
        writes: the axis is the layer's output; else the layer sums over it.
    """

    layer: tuple[str, ...]
    member: "Member"
    ndim: int
    writes: bool

    @property
    def is_projection(self) -> bool:
        """Makes the queries, keys or values of an attention."""
        return bool(self.layer) and self.layer[-1].lower() in _PROJECTIONS


def labels_of(
    groups: Mapping[str, "Group"], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Name -> label, each unique.

    The module of a label is what the layers of the group have in common, so that a
    hidden layer is named after its block. Where this is nothing, or two groups would
    have one label, it is the layer of the group's first member.

    Args:
        groups: name -> group.
        shapes: path -> shape of the leaves.
    """
    short, full = {}, {}
    for name, group in groups.items():
        kernels = _kernels(group, shapes)
        kind = "writer" if group.stream else _kind(kernels)
        if _is_layers(group, kernels):
            kind = "layers"
        own = layer_of(group.members[0].path)[0] if group.members else ()
        layers = [k.layer for k in kernels if k.writes or kind != "state"]
        common = _common(layers) if layers else own
        full[name] = _joined(own, kind)
        whole_net = kind == "residual stream"
        short[name] = _joined(common, kind) if common or whole_net else full[name]
    times = collections.Counter(short.values())
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name, label in short.items():
        label = label if times[label] == 1 else full[name]
        found[name] = label = _unique(label, taken)
        taken.add(label)
    return found


def layer_of(path: str) -> tuple[tuple[str, ...], str]:
    """The components of a layer's path, without its collection, and the leaf.

    Example:
        >>> layer_of("params/block1/up/kernel"), layer_of("w1")
        ((('block1', 'up'), 'kernel'), (('w1',), 'w1'))
    """
    *layer, leaf = _COLLECTION.sub("", path).removesuffix("/value").split("/")
    return tuple(layer if leaf in _LEAVES else [*layer, leaf]), leaf


def _kernels(group: "Group", shapes: Mapping[str, tuple[int, ...]]) -> list[_Kernel]:
    found = []
    for member in group.members:
        ndim = len(shapes.get(member.path, (0,) * (member.axis + 1)))
        layer, leaf = layer_of(member.path)
        if ndim >= 2 and leaf not in _VECTORS:
            kernel = _Kernel(layer, member, ndim, False)
            writes = _is_output(leaf, member.axis, kernel)
            found.append(kernel._replace(writes=writes))
    return found


def _is_output(leaf: str, axis: int, kernel: _Kernel) -> bool:
    """Equinox keeps the outputs first, everyone else last.

    Projections onto heads have two axes of outputs: ``[inputs, heads, head_dim]``.
    """
    if leaf == "weight":
        return axis == 0
    if kernel.is_projection and kernel.ndim > 2:
        return axis >= kernel.ndim - 2
    return axis == kernel.ndim - 1


def _kind(kernels: list[_Kernel]) -> str:
    axes = collections.defaultdict(set)
    for kernel in kernels:
        axes[kernel.member.path].add(kernel.member.axis)
    if not kernels:
        return "units"
    # A kernel that reads and writes the units: of a recurrent cell, step after step, or
    # of a convolution whose result is added to its input.
    loops = [k for k in kernels if len(axes[k.member.path]) > 1]
    if loops and loops[0].ndim < 4:
        return "state"
    if loops or _is_stream(kernels):
        return "residual stream"
    for kernel in kernels:
        if kernel.is_projection and kernel.writes:
            return "heads" if _is_heads(kernel) else "head_dim"
    is_convolution = any(
        kernel.ndim >= 4 or (kernel.layer and "conv" in kernel.layer[-1].lower())
        for kernel in kernels
    )
    return "channels" if is_convolution else "hidden"


def _is_stream(kernels: Iterable[_Kernel]) -> bool:
    """A layer writes to it after another has read it; members are in order of use."""
    is_read = False
    for kernel in kernels:
        if not kernel.writes:
            is_read = True
        elif is_read and not any(map(_GATES.search, kernel.layer)):
            return True
    return False


def _is_layers(group: "Group", kernels: list[_Kernel]) -> bool:
    """The stacked layers of a scan: the first axis of several leaves."""
    first = all(m.axis == 0 and m.repeats == 1 for m in group.members)
    stacked = bool(kernels) and all(kernel.ndim > 2 for kernel in kernels)
    return group.ordered and first and stacked and len(group.members) > 1


def _is_heads(kernel: _Kernel) -> bool:
    """A head is a run of positions of a fused axis, or an entry of an axis of heads."""
    index = kernel.member.index
    if kernel.member.repeats > 1:
        return bool(index[0, 1] - index[0, 0] == 1)
    return kernel.ndim > 2 and kernel.member.axis < kernel.ndim - 1


def _common(layers: list[tuple[str, ...]]) -> tuple[str, ...]:
    alike = itertools.takewhile(
        lambda each: len(set(each)) == 1, zip(*layers, strict=False)
    )
    return tuple(each[0] for each in alike)


def _joined(layer: tuple[str, ...], kind: str) -> str:
    return " ".join(filter(None, ("/".join(layer), kind)))


def _unique(label: str, taken: set[str]) -> str:
    if label not in taken:
        return label
    number = 2
    while f"{label} #{number}" in taken:
        number += 1
    return f"{label} #{number}"
