"""Global sparse momentum: the few weights that matter most learn, the rest decays.

Nothing is set to zero while training. In every step a share of all weights, chosen anew
by how much the loss depends on them, gets its gradient; the others feel weight decay
alone, and momentum carries them to zero. The layers' sparsities come out by themselves.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import KeyPath
from jax.typing import ArrayLike

from jaxprune.core._leafwise import widened
from jaxprune.core._leaves import keystr, named_leaves
from jaxprune.core._masks import apply_masks
from jaxprune.core._types import Array, PyTree, Scalar
from jaxprune.select._thresholds import lowest_together
from jaxprune.training._hyperparameters import check, current
from jaxprune.training._leaves import MaskOrFn, select_leaves
from jaxprune.training._links import link


class GlobalSparseMomentumState(NamedTuple):
    """State of `global_sparse_momentum`.

    Attributes:
        count: int32 scalar, how many updates are behind; what a schedule is read at.
        nonzero_ratio: float32 scalar, the share of weights in the next update.
    """

    # Every optax state calls it so, over tuple.count.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    nonzero_ratio: jax.Array


def global_sparse_momentum(
    nonzero_ratio: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    mask: MaskOrFn = None,
) -> optax.GradientTransformation:
    r"""Passes the gradients of the weights that matter most now, and decays all.

    With :math:`T(w) = |w \, \partial L / \partial w|`, of the N entries of all kernels
    the ``Q = int(nonzero_ratio * N)`` with the largest :math:`T` are active:

    .. math::
        g \leftarrow \eta w + g \, [T(w) \text{ among the Q largest}]

    Put it first, before momentum: ``optax.chain(global_sparse_momentum(0.1,
    weight_decay=1e-4), optax.sgd(5e-3, momentum=0.98))``. A passive weight falls like
    :math:`\exp(-\tau \eta k / (1 - \beta))` in k steps, so momentum has to be high:
    :math:`\beta` is 0.98 or 0.99 in the paper, not 0.9. A passive weight can become
    active at any time. After training `winning_ticket` says which Q weights stay.

    Of equal :math:`T` the earlier entry is active, so that there are exactly Q. Over
    sharded parameters only counts are exchanged.

    Args:
        nonzero_ratio: share of the weights to keep, in (0, 1], or a schedule of it; 1
            is SGD with weight decay.
        weight_decay: of the kernels.
        mask: which leaves are ranked and decayed, as in `bridgeout`; by default the
            kernels. The others get their gradient as it is.

    Returns:
        An `optax.GradientTransformation` with state `GlobalSparseMomentumState`.

    Raises:
        ValueError: if a hyperparameter is out of range (where its value is known), if
            `mask` does not fit `params` or selects nothing, or if ``update`` gets no
            `params`.
        TypeError: if `mask` holds something other than bools or selects a leaf that is
            not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = global_sparse_momentum(0.5, weight_decay=0.1)
        >>> params = {"kernel": jnp.array([[2.0, -1.0], [1.0, 0.0]])}
        >>> grads = {"kernel": jnp.array([[1.0, 1.0], [0.5, 9.0]])}  # T: 2, 1, 0.5, 0
        >>> tx.update(grads, tx.init(params), params)[0]["kernel"]
        Array([[1.2, 0.9],
               [0.1, 0. ]], dtype=float32)

    References:
        Ding et al., `Global Sparse Momentum SGD for Pruning Very Deep Neural Networks
        <https://arxiv.org/abs/1909.12778>`_, NeurIPS 2019
    """
    check("nonzero_ratio", nonzero_ratio)
    check("weight_decay", weight_decay)

    def init(params: optax.Params) -> GlobalSparseMomentumState:
        select_leaves(params, mask, gets="a rank")
        count = jnp.zeros((), jnp.int32)
        now = current("nonzero_ratio", nonzero_ratio, count)
        return GlobalSparseMomentumState(count, now)

    def update(
        updates: optax.Updates,
        state: GlobalSparseMomentumState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, GlobalSparseMomentumState]:
        if params is None:
            raise ValueError(
                "weights are ranked by |w g| and decay; call "
                "tx.update(grads, opt_state, params)"
            )
        chosen = select_leaves(params, mask, gets="a rank")
        weights = {
            n: widened(w) for n, w in named_leaves(params).items() if n in chosen
        }
        grads = {n: widened(g) for n, g in named_leaves(updates).items() if n in chosen}
        # A number that is known is counted exactly; what is in the state is float32.
        known = not callable(nonzero_ratio) and not isinstance(nonzero_ratio, Tracer)
        ratio = cast(Scalar, nonzero_ratio) if known else state.nonzero_ratio
        active = _most({n: jnp.abs(w * grads[n]) for n, w in weights.items()}, ratio)

        def rewrite(path: KeyPath, grad: jax.Array) -> jax.Array:
            name = keystr(path)
            if name not in weights:
                return grad
            passed = jnp.where(active[name], grads[name], 0.0)
            return (passed + weight_decay * weights[name]).astype(grad.dtype)

        count = jnp.asarray(optax.safe_increment(state.count))
        now = current("nonzero_ratio", nonzero_ratio, count)
        new = GlobalSparseMomentumState(count, now)
        return jax.tree.map_with_path(rewrite, updates), new

    return link(init, update)


class Ticket(NamedTuple):
    """A sparse net at the start of its training.

    Attributes:
        params: the initial parameters, zero where the ticket has no weight.
        masks: tree of bools like them, True = kept; the scalar True where no weight
            was ranked.
    """

    params: optax.Params
    masks: PyTree


def winning_ticket(
    initial: optax.Params,
    trained: optax.Params,
    nonzero_ratio: float,
    *,
    mask: MaskOrFn = None,
) -> Ticket:
    """Rewinds the weights that are largest after training, and drops the others.

    Of the N entries of all kernels the ``int(nonzero_ratio * N)`` largest stay, ranked
    together by magnitude; of equal ones the earlier. With `trained` in the place of
    `initial` this is the cut that ends `global_sparse_momentum`.

    Args:
        initial: parameters before training; or of an early step.
        trained: parameters like them, after training. jit-able.
        nonzero_ratio: share of the weights that stay, in (0, 1].
        mask: which leaves are ranked, as in `bridgeout`; by default the kernels.

    Returns:
        `Ticket`; train it with gradients that obey its masks.

    Raises:
        ValueError: if the ratio is out of range, `mask` does not fit or selects
            nothing, or the two trees differ.
        TypeError: if `mask` holds something other than bools or selects a leaf that is
            not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> initial = {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.ones(2)}
        >>> trained = {"kernel": jnp.array([[9.0, -0.1]]), "bias": jnp.zeros(2)}
        >>> winning_ticket(initial, trained, 0.5).params["kernel"]
        Array([[1., 0.]], dtype=float32)

    References:
        Frankle and Carbin, `The Lottery Ticket Hypothesis
        <https://arxiv.org/abs/1803.03635>`_, ICLR 2019; Ding et al., `Global Sparse
        Momentum SGD <https://arxiv.org/abs/1909.12778>`_, Sec. 4.4
    """
    check("nonzero_ratio", nonzero_ratio)
    chosen = select_leaves(trained, mask, gets="a rank")
    sizes = {path: jnp.abs(w) for path, w in _wide(trained, chosen).items()}
    kept = _most(sizes, nonzero_ratio)
    masks = jax.tree.map_with_path(
        lambda path, _: kept.get(keystr(path), jnp.array(True)), trained
    )
    return Ticket(apply_masks(initial, masks), masks)


def _wide(tree: PyTree, chosen: Collection[str]) -> dict[str, jax.Array]:
    """Path -> leaf in single precision or more, of the chosen leaves."""
    leaves = named_leaves(tree).items()
    return {path: widened(leaf) for path, leaf in leaves if path in chosen}


def _most(scores: Mapping[str, jax.Array], ratio: Scalar) -> Mapping[str, Array]:
    """Where the ``int(ratio * N)`` largest of all N scores are; NaN is the largest."""
    total = sum(leaf.size for leaf in scores.values())
    if isinstance(ratio, jax.Array | Tracer):
        share = jnp.floor(ratio * total * (1 + 1e-6)).astype(jnp.uint32)
        gone: ArrayLike = np.uint32(total) - jnp.minimum(share, np.uint32(total))
    else:
        # 0.29 * 100 is a little less than 29.
        gone = total - min(int(float(ratio) * total * (1 + 1e-12)), total)
    # A gradient that is no number is the largest: it must be seen, not masked.
    lowest = lowest_together(
        list(scores.values()), gone, [leaf.size for leaf in scores.values()]
    )
    return {name: ~mask for name, mask in zip(scores, lowest, strict=True)}
