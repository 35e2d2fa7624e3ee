"""What the authors' code of Batch Bridgeout does besides the paper's method.

Each of these changes the curves, so each is a switch of `batch_bridgeout`, off unless
it is named. All four on are the protocol of the published figures.

References:
    Khan and Stavness, `Pruning Convolutional Filters using Batch Bridgeout
    <https://arxiv.org/abs/2009.10893>`_, 2020, and their code,
    https://github.com/najeebkhan/bridgeout-filter-pruning
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.io import checkpoints
from jaxprune.recipes import State

QUIRKS: Mapping[str, str] = {
    "fresh_momentum": "the optimiser is made anew in every epoch, so that momentum "
    "starts from zero",
    "best_test_epoch": "what is cut is the epoch that was best on the test set, not "
    "the last",
    "kernels_alone": "every convolution is cut by itself, shortcuts too, and its bias "
    "and BatchNorm stay, so that a cut filter still emits a constant",
    "scales_too": "the smallest scales of the BatchNorms of a VGG and of a ResNet's "
    "shortcuts are zeroed too, whichever filters went",
}
# With these a cut unit is no zero, so there is nothing to slice.
OF_MASKS = frozenset({"kernels_alone", "scales_too"})


class RestartState(NamedTuple):
    """State of `restarted`.

    Attributes:
        updates: int32 scalar, how many there were.
        inner: state of what is restarted.
    """

    updates: jax.Array
    inner: Any


def restarted(
    tx: optax.GradientTransformation, every: int
) -> optax.GradientTransformation:
    """Puts `tx` back into its first state after every so many updates."""

    def init(params: Any) -> RestartState:
        return RestartState(jnp.zeros((), jnp.int32), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        fresh = state.updates % every == 0
        first = tx.init(updates)  # zeros of the same shapes
        inner = jax.tree.map(
            lambda new, old: jnp.where(fresh, new, old), first, state.inner
        )
        updates, inner = tx.update(updates, inner, params)
        return updates, RestartState(state.updates + 1, inner)

    return optax.GradientTransformation(init, update)


def keep_best(
    folder: Path, score: Callable[[Any], float]
) -> Callable[[int, State], None]:
    """Returns what `fit` should call after an epoch: it saves the best variables.

    A resumed run goes through some epochs again, which changes nothing: they score
    what they scored before, and only a higher score replaces the best.

    Args:
        folder: of the checkpoint.
        score: variables -> number, larger is better.
    """

    def after(epoch: int, state: State) -> None:
        found, best = score(state.variables), read_best(folder, state.variables)
        if best is None or found > best.meta["score"]:
            checkpoints.save(folder, epoch, state.variables, {"score": found}, keep=1)

    return after


def read_best(folder: Path, like: Any) -> checkpoints.Restored | None:
    """What `keep_best` saved last."""
    return checkpoints.restore_latest(folder, like)


def quirky_masks(
    variables: Any, fraction: float, quirks: Collection[str], *, chain: bool, masks: Any
) -> Any:
    """Masks of a one-shot cut as the authors' code makes them.

    Args:
        variables: Flax variables.
        fraction: share that is cut of everything that is cut.
        quirks: names in `QUIRKS`; those not in `OF_MASKS` do nothing here.
        chain: whether the net is a VGG, all of whose BatchNorms are cut.
        masks: of the cut without quirks.

    Returns:
        Tree of bools like `variables`, True = kept. They cut units in some of their
        parameters only, so they can be applied, but not sliced.
    """

    def mask(path: Any, leaf: Any, plain: Any) -> Any:
        names = [entry.key for entry in path]
        if names[0] != "params":
            return plain if "kernels_alone" not in quirks else np.True_
        if names[-1] == "kernel" and names[1] != "head":
            norms = np.sqrt(np.square(leaf).sum(tuple(range(leaf.ndim - 1))))
            own = _not_lowest(norms, fraction).reshape((1,) * (leaf.ndim - 1) + (-1,))
            return own if "kernels_alone" in quirks else plain
        plain = np.True_ if "kernels_alone" in quirks else plain
        is_scale = names[-1] == "scale" and (chain or names[-2] == "shortcut_bn")
        if is_scale and "scales_too" in quirks:
            return plain & _not_lowest(np.abs(leaf), fraction)
        return plain

    return jax.tree.map_with_path(mask, variables, masks)


def _not_lowest(scores: np.ndarray, fraction: float) -> np.ndarray:
    """True for all but the ``int(size * fraction)`` lowest; ties at the border stay."""
    rank = int(scores.size * fraction + 1e-9)
    return scores >= np.sort(scores)[rank]
