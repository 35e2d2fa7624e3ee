"""Trained rank pruning: kernels are kept close to low rank while they are trained."""

import fnmatch
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import KeyPath

from jaxprune.core._leafwise import widened
from jaxprune.core._leaves import keystr, named_leaves
from jaxprune.core._types import PyTree
from jaxprune.training._auto_axes import under_auto_axes
from jaxprune.training._hyperparameters import check, current, is_whole
from jaxprune.training._leaves import MaskOrFn, select_leaves
from jaxprune.training._links import link_with_extra

Kind = Literal["channel", "spatial", "depthwise"]


class TrainedRankState(NamedTuple):
    """State of `trained_rank_pruning`.

    Attributes:
        count: int32 scalar, how many updates are behind.
        strength: float32 scalar, the factor of the nuclear norm in the next update.
        inner: state of the optimiser inside.
    """

    # Every optax state calls it so, over tuple.count.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    strength: jax.Array
    inner: optax.OptState


def trained_rank_pruning(
    tx: optax.GradientTransformation,
    *,
    every: int = 20,
    energy: float = 0.98,
    strength: optax.ScalarOrSchedule = 0.0,
    kind: Kind = "channel",
    feature_groups: Mapping[str, int] | None = None,
    mask: MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Truncates kernels to low rank every few steps while they are trained (TRP).

    As matrices with singular values :math:`s_1 \ge s_2 \ge \dots`, kernels become,
    after steps `every`, 2 `every`, ...,

    .. math::
        W \leftarrow U_r \, \mathrm{diag}(s_1 \dots s_r) \, V_r^T, \qquad
        r = \min \Big\{ r : \sum_{i \le r} s_i^2 \ge energy \sum_i s_i^2 \Big\}

    and train freely in between. At the steps that start from truncated kernels,
    :math:`strength \cdot U_r V_r^T`, the subgradient of the nuclear norm
    :math:`\sum_i s_i`, is added to the gradient. A net trained so loses little when its
    kernels are factorised afterwards.

    Kernels ``[..., in, out]`` are seen as matrices in one of three ways:

    * "channel": ``(... in) x out``, a convolution of r filters and a pointwise one;
    * "spatial": ``(in height) x (out width)``, a column and a row of a convolution;
    * "depthwise": for every filter ``in x (height width)``.

    Args:
        tx: any optimiser; this transformation sets weights, so put it outermost.
        every: steps between two truncations; the paper's 20.
        energy: share of the sum of squares that is kept, in (0, 1]; the paper's 0.98.
        strength: of the nuclear norm, at least 0, or a schedule of it; the authors use
            3e-4.
        kind: how a kernel is a matrix.
        feature_groups: path or pattern (as `fnmatch`) -> ``feature_group_count`` of a
            grouped convolution; each group of filters is a matrix of its own.
        mask: which leaves are truncated, as in `bridgeout`; by default the kernels. The
            authors leave out the first two layers, 1x1 convolutions and the classifier.

    Returns:
        An optimiser with state `TrainedRankState`.

    Raises:
        ValueError: if a number is out of range, if `mask` does not fit, if a leaf has
            too few axes for `kind` or filters that do not split into groups, if a
            pattern matches nothing, or if ``update`` gets no `params`.
        TypeError: if `mask` holds something other than bools or selects a leaf that is
            not floating.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = trained_rank_pruning(optax.sgd(0.1), every=1, energy=0.9)
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
        >>> grads = {"kernel": jnp.zeros((2, 2))}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> jnp.round(optax.apply_updates(params, updates)["kernel"], 4)
        Array([[3., 0.],
               [0., 0.]], dtype=float32)

    References:
        Xu et al., `Trained Rank Pruning for Efficient Deep Neural Networks
        <https://arxiv.org/abs/1812.02402>`_, 2018; `TRP: Trained Rank Pruning
        <https://arxiv.org/abs/2004.14566>`_, IJCAI 2020
    """
    check("energy", energy)
    check("strength", strength)
    if not is_whole(every) or every < 1:
        raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
    if kind not in ("channel", "spatial", "depthwise"):
        raise ValueError(
            f'kind must be "channel", "spatial" or "depthwise", got {kind!r}'
        )
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> TrainedRankState:
        if jax.tree.leaves(params):  # optax.tree.map_params probes with none
            _layouts(params, kind, feature_groups, mask)  # complains early
        count = jnp.zeros((), jnp.int32)
        return TrainedRankState(
            count, current("strength", strength, count), tx.init(params)
        )

    def update(
        updates: optax.Updates,
        state: TrainedRankState,
        params: optax.Params | None = None,
        **extra: object,
    ) -> tuple[optax.Updates, TrainedRankState]:
        if params is None:
            raise ValueError(
                "trained rank pruning sets weights; call "
                "tx.update(grads, opt_state, params)"
            )
        layouts = _layouts(params, kind, feature_groups, mask)

        def with_norm(
            grads: optax.Updates, params: optax.Params, factor: jax.Array, on: jax.Array
        ) -> PyTree:
            return lax.cond(
                on, lambda: _add_slopes(grads, params, factor, layouts, energy),
                lambda: grads,
            )  # fmt: skip

        def truncated(
            updates: optax.Updates, params: optax.Params, on: jax.Array
        ) -> PyTree:
            return lax.cond(
                on, lambda: _truncating(updates, params, layouts, energy),
                lambda: _as_wide(updates, params, layouts),
            )  # fmt: skip

        count, grads = jnp.asarray(optax.safe_increment(state.count)), updates
        if callable(strength) or strength != 0:
            on = (state.count % every == 0) & (state.strength > 0)
            grads = under_auto_axes(
                with_norm, updates, params, state.strength, on, like=updates
            )
        updates, inner = tx.update(grads, state.inner, params, **extra)
        updates = under_auto_axes(
            truncated, updates, params, count % every == 0, like=updates
        )
        now = current("strength", strength, count)
        return updates, TrainedRankState(count, now, inner)

    return link_with_extra(init, update)


class _Layout(NamedTuple):
    """How a kernel is a stack of matrices."""

    kind: Kind
    groups: int


def _layouts(
    params: optax.Params,
    kind: Kind,
    feature_groups: Mapping[str, int] | None,
    mask: MaskOrFn,
) -> dict[str, _Layout]:
    """Path -> layout of the kernels that are truncated."""
    chosen = select_leaves(params, mask, min_ndim=2, gets="truncated")
    leaves, patterns = named_leaves(params), dict(feature_groups or {})
    for pattern in patterns:
        if not fnmatch.filter(chosen, pattern):
            raise ValueError(
                f"feature_groups names {pattern!r}, which matches none of "
                f"{', '.join(chosen)}"
            )
    found = {}
    for path in chosen:
        shape = np.shape(leaves[path])
        groups = [n for p, n in patterns.items() if fnmatch.fnmatch(path, p)]
        count = groups[-1] if groups else 1
        if kind != "channel" and len(shape) != 4:
            raise ValueError(
                f"kind={kind!r} needs kernels [height, width, in, out], but {path!r} "
                f"has shape {shape}; leave it out of the mask"
            )
        if count < 1 or shape[-1] % count:
            raise ValueError(
                f"the {shape[-1]} filters of {path!r} do not split into {count} groups"
            )
        found[path] = _Layout(kind, count)
    return found


def matrices(kernel: jax.Array, kind: Kind, groups: int = 1) -> jax.Array:
    """A kernel ``[..., in, out]`` as a stack of matrices ``[matrices, rows, columns]``.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.zeros((3, 5, 4, 8))
        >>> kinds = ("channel", "spatial", "depthwise")
        >>> [matrices(kernel, kind).shape for kind in kinds]
        [(1, 60, 8), (1, 12, 40), (8, 4, 15)]
    """
    *rest, out = kernel.shape
    if kind == "channel":
        split = kernel.reshape(-1, groups, out // groups)
        return jnp.moveaxis(split, 1, 0)
    height, width, inputs = rest
    if kind == "depthwise":
        return kernel.transpose(3, 2, 0, 1).reshape(out, inputs, height * width)
    split = kernel.reshape(height, width, inputs, groups, out // groups)
    rows = split.transpose(3, 2, 0, 4, 1)  # groups, in, height, out, width
    return rows.reshape(groups, inputs * height, out // groups * width)


def _kernel(stack: jax.Array, shape: tuple[int, ...], layout: _Layout) -> jax.Array:
    """The inverse of `matrices`."""
    if layout.kind == "channel":
        return jnp.moveaxis(stack, 0, 1).reshape(shape)
    height, width, inputs, out = shape
    if layout.kind == "depthwise":
        return stack.reshape(out, inputs, height, width).transpose(2, 3, 1, 0)
    each = out // layout.groups
    split = stack.reshape(layout.groups, inputs, height, each, width)
    return split.transpose(2, 4, 1, 0, 3).reshape(shape)


def _leading(stack: jax.Array, energy: float, power: float) -> jax.Array:
    r"""``U_r diag(s ** (1 + 2 power)) V_r^T`` of every matrix.

    Power 0 is the truncation, -1/2 the subgradient of the nuclear norm. The singular
    vectors of the shorter side are eigenvectors of its Gram matrix, which is much
    smaller than the kernel.
    """
    wide = stack.shape[1] < stack.shape[2]
    tall = stack.mT if wide else stack
    with jax.default_matmul_precision("highest"):
        squares, vectors = jnp.linalg.eigh(tall.mT @ tall)  # ascending
        squares = jnp.maximum(squares, 0)
        total = squares.sum(-1, keepdims=True)
        above = lax.cumsum(squares, squares.ndim - 1, reverse=True) - squares
        stays = (above < energy * total) & (squares > 0)
        factor = jnp.where(stays, jnp.where(stays, squares, 1.0) ** power, 0.0)
        found = (tall @ (vectors * factor[..., None, :])) @ vectors.mT
    return found.mT if wide else found


def _of_kernel(w: jax.Array, layout: _Layout, energy: float, power: float) -> jax.Array:
    stack = matrices(widened(w), layout.kind, layout.groups)
    return _kernel(_leading(stack, energy, power), w.shape, layout)


def _add_slopes(
    grads: optax.Updates,
    params: optax.Params,
    factor: jax.Array,
    layouts: Mapping[str, _Layout],
    energy: float,
) -> PyTree:
    weights = named_leaves(params)

    def add(path: KeyPath, grad: jax.Array) -> jax.Array:
        layout = layouts.get(name := keystr(path))
        if layout is None:
            return grad
        slope = _of_kernel(weights[name], layout, energy, -0.5)
        return grad + (factor.astype(slope.dtype) * slope).astype(grad.dtype)

    return jax.tree.map_with_path(add, grads)


def _truncating(
    updates: optax.Updates,
    params: optax.Params,
    layouts: Mapping[str, _Layout],
    energy: float,
) -> PyTree:
    """Updates after which the kernels are truncated."""
    moved = named_leaves(optax.apply_updates(params, updates))
    weights = named_leaves(params)

    def truncate(path: KeyPath, update: jax.Array) -> jax.Array:
        layout = layouts.get(name := keystr(path))
        if layout is None:
            return update
        new = _of_kernel(moved[name], layout, energy, 0.0)
        less = new - widened(weights[name])
        return less.astype(np.promote_types(update.dtype, weights[name].dtype))

    return jax.tree.map_with_path(truncate, updates)


def _as_wide(
    updates: optax.Updates, params: optax.Params, layouts: Mapping[str, _Layout]
) -> PyTree:
    """Updates of the dtypes of `_truncating`."""
    weights = named_leaves(params)
    return jax.tree.map_with_path(
        lambda path, update: (
            update.astype(np.promote_types(update.dtype, weights[name].dtype))
            if (name := keystr(path)) in layouts
            else update
        ),
        updates,
    )
