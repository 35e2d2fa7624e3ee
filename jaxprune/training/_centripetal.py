"""Centripetal SGD: units of a cluster are trained to become equal, and then are one.

Weight decay pulls weights to zero. Here the units of a cluster are pulled to each other
instead, and equal units can be merged into one without changing the function
(`jaxprune.merge`). The link only rewrites gradients, so schedules, momentum and
everything else of optax go on as usual.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import KeyPath
from jax.typing import ArrayLike

from jaxprune.core._clusters import checked_clusters
from jaxprune.core._groups import Groups, Member
from jaxprune.core._leafwise import widened
from jaxprune.core._leaves import keystr, named_leaves, parameter_paths
from jaxprune.core._types import Array
from jaxprune.training._hyperparameters import check, current
from jaxprune.training._leaves import MaskOrFn, select_leaves
from jaxprune.training._links import link


class CentripetalState(NamedTuple):
    """State of `centripetal`.

    Attributes:
        count: int32 scalar, how many updates are behind; what a schedule is read at.
        strength: float32 scalar, the strength of the next update.
        clusters: group -> int32 ``[size]``, for every unit the first of its cluster.
    """

    # Every optax state calls it so, over tuple.count.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    strength: jax.Array
    clusters: dict[str, jax.Array]


def centripetal(
    groups: Groups,
    clusters: Mapping[str, np.ndarray],
    strength: optax.ScalarOrSchedule = 3e-3,
    *,
    vector_strength: float = 0.1,
    weight_decay: float = 0.0,
    mask: MaskOrFn = None,
) -> optax.GradientTransformation:
    r"""Draws the units of every cluster together while they are trained.

    For everything that makes a unit :math:`j` of a cluster :math:`H`, the gradient
    becomes

    .. math::
        g_j \leftarrow \frac{1}{|H|} \sum_{k \in H} g_k + \eta F_j
        + \epsilon \Big(F_j - \frac{1}{|H|} \sum_{k \in H} F_k\Big)

    with the decay :math:`\eta` and the centripetal strength :math:`\epsilon`. Under SGD
    with learning rate :math:`\tau` the difference of two units is multiplied by exactly
    :math:`1 - \tau (\eta + \epsilon)` per step, whatever the data, and their mean is
    trained as if nothing pulled. With momentum :math:`\beta` it falls at the rate
    :math:`\tau (\eta + \epsilon) / (1 - \beta)` per step in the end.

    What reads the units (`Member.role` is "consumer") is trained as usual, and so is
    what lies in no group. Put the link first: ``optax.chain(centripetal(...),
    optax.sgd(learning_rate, momentum=0.9))``. When the clusters have met (`deviation`),
    `merge` them; the optimiser goes on behind the link, with `slice_opt_state`.

    The clusters are in the state, so one compiled step serves all clusters, and a
    checkpoint knows them.

    Args:
        groups: what ``trace(..., roles=True)`` returned, for the parameters or for
            variables with a collection ``params``.
        clusters: group -> int ``[size]``, the cluster of every unit, as `merge` takes
            them (`jaxprune.clusters`). Groups that are not named train as usual.
        strength: at least 0, or a schedule of it. The authors: 3e-3 on CIFAR, 0.05 on
            ImageNet.
        vector_strength: share of the strength that biases and normalisation get.
        weight_decay: of the leaves that `mask` chooses, clustered or not. The same as
            `optax.add_decayed_weights` next in the chain.
        mask: which leaves are kernels, as in `bridgeout`; the others count as vectors.

    Returns:
        An `optax.GradientTransformation` with state `CentripetalState`. Its arithmetic
        is float32 or wider; members of a cluster that are equal stay equal to the bit.

    Raises:
        ValueError: if a group does not exist or its units cannot be merged (the text
            names the place in the program), if clusters have another length, if a
            hyperparameter is out of range (where its value is known), or if ``init`` or
            ``update`` get parameters that were not traced.
        TypeError: if clusters are not integers.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, jaxprune
        >>> def net(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, 3.0]]), "w2": jnp.ones((2, 1))}
        >>> groups = jaxprune.trace(net, params, jnp.ones((1, 1)), roles=True)
        >>> tx = centripetal(groups, {"w1:1": np.array([0, 0])}, 0.5)
        >>> grads = {"w1": jnp.array([[0.0, 2.0]]), "w2": jnp.zeros((2, 1))}
        >>> tx.update(grads, tx.init(params), params)[0]["w1"]  # 1 + 0.5 (w - 2)
        Array([[0.5, 1.5]], dtype=float32)

    References:
        Ding et al., `Centripetal SGD for Pruning Very Deep Convolutional Networks With
        Complicated Structure <https://arxiv.org/abs/1904.03837>`_, CVPR 2019
    """
    for name, value in (
        ("strength", strength),
        ("vector_strength", vector_strength),
        ("weight_decay", weight_decay),
    ):
        check(name, value)
    firsts = {
        name: checked_clusters(groups, name, ids) for name, ids in clusters.items()
    }
    makers = _makers(groups, firsts)

    def init(params: optax.Params) -> CentripetalState:
        if jax.tree.leaves(params):  # optax.tree.map_params probes with none
            _check_traced(groups, makers, params)
        count = jnp.zeros((), jnp.int32)
        arrays = {name: jnp.asarray(ids, jnp.int32) for name, ids in firsts.items()}
        return CentripetalState(count, current("strength", strength, count), arrays)

    def update(
        updates: optax.Updates,
        state: CentripetalState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, CentripetalState]:
        if params is None:
            raise ValueError(
                "units are drawn to each other by their weights; call "
                "tx.update(grads, opt_state, params)"
            )
        _check_traced(groups, makers, params)
        weights = named_leaves(params)
        kernels = select_leaves(params, mask, gets="decay")

        def rewrite(path: KeyPath, grad: jax.Array) -> jax.Array:
            name = keystr(path)
            is_kernel, members = name in kernels, makers.get(_traced(groups, name), ())
            if not members and not is_kernel:
                return grad
            share = 1.0 if is_kernel else vector_strength
            pull = share * state.strength if members else 0.0
            decay = weight_decay if is_kernel else 0.0
            targets = _targets(members, grad.shape, state.clusters)
            return _drawn(grad, weights[name], pull, decay, targets)

        count = jnp.asarray(optax.safe_increment(state.count))
        now = current("strength", strength, count)
        new = CentripetalState(count, now, state.clusters)
        return jax.tree.map_with_path(rewrite, updates), new

    return link(init, update)


def _drawn(
    grad: jax.Array,
    weight: jax.Array,
    pull: ArrayLike,
    decay: ArrayLike,
    targets: list[tuple[int, jax.Array]],
) -> jax.Array:
    """The new gradient of a leaf; `targets` say which slices of it are one."""
    g, w = widened(grad), widened(weight)
    pull = jnp.asarray(pull, g.dtype)
    # Both averages in one: mean(g) + e (w - mean(w)) = mean(g - e w) + e w.
    mean = g - pull * w if targets else g
    for axis, target in targets:
        mean = _average(mean, target, axis)
    return (mean + (pull + decay) * w).astype(grad.dtype)


# Group and member, for every trained leaf that makes units of clustered groups.
_Makers = Mapping[str, list[tuple[str, Member]]]


def _makers(groups: Groups, names: Mapping[str, Array]) -> _Makers:
    trained = parameter_paths(groups.shapes)
    found: dict[str, list[tuple[str, Member]]] = {}
    for name in names:
        for member in groups[name].members:
            if member.role == "producer" and member.path in trained:
                found.setdefault(member.path, []).append((name, member))
    return found


def _traced(groups: Groups, name: str) -> str:
    """The traced path of a leaf, which may start with the collection."""
    return name if name in groups.shapes else f"params/{name}"


def _check_traced(groups: Groups, makers: _Makers, params: optax.Params) -> None:
    shapes = {
        _traced(groups, name): np.shape(leaf)
        for name, leaf in named_leaves(params).items()
    }
    for path, [(name, _), *_] in makers.items():
        if path not in shapes:
            raise ValueError(
                f"params lack {path}, which produces the units of {name}, so that its "
                "clusters would never merge; were the groups traced from other "
                "parameters, or does optax.masked hide it?"
            )
        if shapes[path] != groups.shapes[path]:
            raise ValueError(
                f"{path} has shape {shapes[path]}, but the traced leaf has "
                f"{groups.shapes[path]}; are these parameters merged already?"
            )


def _targets(
    members: Sequence[tuple[str, Member]],
    shape: tuple[int, ...],
    clusters: Mapping[str, jax.Array],
) -> list[tuple[int, jax.Array]]:
    """Axis and int32 ``[positions]``: the first position of each one's cluster.

    Groups share an axis side by side (concatenation) or as its factors (heads and what
    is in them, flattened): then every one merges slices that the others keep apart, in
    any order, so the maps are applied one after the other.
    """
    found: dict[int, jax.Array] = {}
    for name, member in members:
        flat = member.index.ravel()
        unit = np.zeros(shape[member.axis], np.int32)
        slot = np.zeros(shape[member.axis], np.int32)
        unit[flat] = np.repeat(np.arange(len(member.index)), member.repeats)
        slot[flat] = np.tile(np.arange(member.repeats), len(member.index))
        inside = np.isin(np.arange(shape[member.axis]), flat)
        moved = jnp.asarray(member.index, jnp.int32)[clusters[name][unit], slot]
        moved = jnp.where(inside, moved, np.arange(len(unit), dtype=np.int32))
        before = found.get(member.axis)
        found[member.axis] = moved if before is None else moved[before]
    return list(found.items())


# Above, a matrix of positions by positions takes more memory than the leaf.
_SMALL_AXIS = 1024


def _average(x: jax.Array, target: jax.Array, axis: int) -> jax.Array:
    """Every slice replaced by the mean of those with its target.

    The mean is computed once for each target and then copied, so that slices of one
    cluster get the same bits.
    """
    size = x.shape[axis]
    if size <= _SMALL_AXIS:
        same = (target[None] == np.arange(size, dtype=np.int32)[:, None]).astype(
            x.dtype
        )
        matrix = same / jnp.maximum(same.sum(1, keepdims=True), 1)
        line = jnp.moveaxis(x, axis, -1)
        sums = lax.dot_general(
            line,
            matrix,
            (((line.ndim - 1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST,
        )
        return jnp.moveaxis(jnp.take(sums, target, axis=-1, mode="clip"), -1, axis)
    line = jnp.moveaxis(x, axis, 0)
    counts = jax.ops.segment_sum(jnp.ones(size, x.dtype), target, size)
    sums = jax.ops.segment_sum(line, target, size)
    means = sums / jnp.maximum(counts, 1).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.moveaxis(jnp.take(means, target, axis=0, mode="clip"), 0, axis)
