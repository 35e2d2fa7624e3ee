"""Functionality-oriented pruning: filters that look for the same replace each other."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxprune.core._groups import Groups
from jaxprune.core._limits import fraction, fractions
from jaxprune.core._types import ApplyFn, Array, PyTree
from jaxprune.scores import contribution
from jaxprune.select import clusters as of_units
from jaxprune.statistics import taps
from jaxprune.statistics._streaming import Batches, LossFn


class Functions(NamedTuple):
    """What the units of a net look for, and which of them stay.

    Attributes:
        keep: group name -> bool ``[size]``, True = kept.
        images: group name -> ``[size, ...]``, an input that excites every unit.
        clusters: group name -> int ``[size]``, units whose images are alike.
        contribution: group name -> ``[size]``, how much the loss feels every unit.
    """

    keep: dict[str, np.ndarray]
    images: dict[str, np.ndarray]
    clusters: dict[str, np.ndarray]
    contribution: dict[str, np.ndarray]


def functionality(
    groups: Groups,
    apply_fn: ApplyFn,
    loss_fn: LossFn,
    variables: PyTree,
    example: Array,
    batches: Batches,
    *,
    key: jax.Array,
    sparsity: float | Mapping[str, float],
    count: int | Mapping[str, int] | None = None,
    steps: int = 32,
    rate: float = 0.1,
    progress: bool | None = None,
) -> Functions:
    """Prunes units that do what others do, whatever the size of their weights.

    What a unit does is seen in the input that excites it most. Units of a group whose
    inputs are alike form a cluster; every cluster loses the same share of its units,
    those that contribute least to the loss, and keeps one.

    Args:
        groups: what `trace` returned.
        apply_fn: ``(variables, batch of inputs) -> anything``.
        loss_fn: ``(variables, batch) -> scalar``, the mean loss over a batch of
            `batches`, BatchNorm in inference mode.
        variables: tree of arrays that `groups` was traced with.
        example: floating ``[B, ...]``, an input of `apply_fn`; only its shape, but for
            B, and dtype matter.
        batches: iterable of batches of `loss_fn`, examples along axis 0.
        key: random key, consumed: where the ascent starts.
        sparsity: fraction to remove of every group; or group name -> fraction, where
            groups that are not named are left alone.
        count: how many clusters; None for the elbow, see `clusters.by_features`, but
            no more than units stay.
        steps: of the ascent, see `taps.exciting_inputs`.
        rate: of the ascent.
        progress: show a progress bar? None for on a terminal.

    Returns:
        `Functions`; then `expand_masks`. `display.functions_figure` draws the images.

    Raises:
        ImportError: if scikit-learn is missing.
        TypeError: if the input is not floating.
        ValueError: if a group is in no activation or comes in blocks, batches run dry,
            or fewer units would stay than `count` clusters.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def net(params, x):
        ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, 1.1, -1.0]]), "w2": jnp.ones((3, 1))}
        >>> x = jnp.ones((4, 1))
        >>> groups = jaxprune.trace(net, params, x)
        >>> loss = lambda params, x: jnp.square(net(params, x)).mean()
        >>> found = functionality(groups, net, loss, params, x, [x], count=2,
        ...     key=jax.random.key(0), sparsity=1 / 3, rate=1.0)
        >>> found.keep["w1:1"].tolist()  # the first and the last go opposite ways
        [True, False, True]

    References:
        Qin et al., `Functionality-Oriented Convolutional Filter Pruning
        <https://arxiv.org/abs/1810.07322>`_, 2019
    """
    given = fractions(groups, sparsity, None)
    shares = {name: fraction(f"sparsity of {name}", x) for name, x in given.items()}
    chosen = dataclasses.replace(
        groups, by_name={name: groups[name] for name in shares}, branches={}
    )
    stay = {
        name: max(1, group.size - round(shares[name] * group.size))
        for name, group in chosen.items()
    }
    images = taps.exciting_inputs(
        apply_fn, chosen, variables, example, key=key, steps=steps, rate=rate
    )
    most = stay if count is None else None
    ids = of_units.by_features(chosen, images, count=count, most=most)
    felt = jax.device_get(
        contribution(chosen, loss_fn, variables, batches, progress=progress)
    )
    keep = of_units.within_clusters(chosen, felt, ids, sparsity=shares)
    return Functions(keep, images, ids, felt)
