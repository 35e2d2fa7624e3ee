"""A net that gets smaller in rounds, and the checkpoint of each round."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optax

import jaxprune
from experiments.harness.training import State
from jaxprune import Groups, plans
from jaxprune.io import checkpoints


@dataclasses.dataclass(frozen=True)
class SmallNet:
    """What is left of a net.

    Attributes:
        dense_fn: the ``apply`` of the net as it was written.
        groups: its units.
        state: variables and optimiser, as small as the net is now.
        keep: group name -> bool ``[size]``, True = kept; missing groups are whole.
        history: what was noted about each round.
    """

    dense_fn: Callable[..., Any]
    groups: Groups
    state: State
    keep: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()

    def noted(self, **facts: Any) -> "SmallNet":
        """The same net with a round more in its history."""
        return dataclasses.replace(self, history=(*self.history, facts))

    @property
    def masks(self) -> Any:
        """Masks of the net as it was written."""
        return jaxprune.expand_masks(self.groups, self.keep)

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """The program for what is left of the variables."""
        return jaxprune.narrow(self.dense_fn, self.masks)

    @property
    def full_variables(self) -> Any:
        """The variables at their first sizes, with zeros where something is cut."""
        return jaxprune.unslice_params(self.state.variables, self.masks)


def cut(
    small: SmallNet, tx: optax.GradientTransformation, keep: Mapping[str, np.ndarray]
) -> SmallNet:
    """Cuts down to `keep`, optimiser state included.

    Args:
        small: the net before.
        tx: made its optimiser state.
        keep: group name -> bool ``[size]`` of the first sizes, True = kept; a part of
            what `small` keeps.

    Returns:
        The smaller net.
    """
    masks = jaxprune.expand_masks(small.groups, keep)
    # What the new masks say about what the old ones have left.
    further = jaxprune.slice_params(masks, small.masks)
    state = small.state._replace(
        variables=jaxprune.slice_params(small.state.variables, further),
        opt_state=jaxprune.slice_opt_state(
            tx, small.state.opt_state, further["params"]
        ),
    )
    return dataclasses.replace(small, state=state, keep=keep)


def save_round(folder: Path, small: SmallNet) -> None:
    """Writes the net after a round; its number is that of the rounds in the history."""
    plan = plans.as_json(small.groups, small.keep)
    meta = {"plan": plan, "history": small.history}
    checkpoints.save(folder, len(small.history), small.state, meta, keep=100)


def restore_round(
    folder: Path, tx: optax.GradientTransformation, dense: SmallNet
) -> SmallNet:
    """Returns the net after the newest round, or the dense one.

    Args:
        folder: what `save_round` wrote to; may be missing.
        tx: the optimiser.
        dense: the net before the first round; says what its parts look like.

    Raises:
        ValueError: if the rounds were those of another net.
    """

    def resized(meta: Any) -> SmallNet:
        return cut(dense, tx, plans.from_json(meta["plan"], dense.groups, str(folder)))

    saved = checkpoints.restore_latest(folder, lambda meta: resized(meta).state)
    if saved is None:
        return dense
    history = tuple(saved.meta["history"])
    return dataclasses.replace(resized(saved.meta), state=saved.state, history=history)
