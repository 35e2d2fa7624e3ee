"""Where a run of rounds is kept: its newest state, and the net after each round."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxprune.core._groups import Groups
from jaxprune.core._masks import expand_masks
from jaxprune.core._types import PyTree
from jaxprune.recipes._training import State, trained
from jaxprune.surgery._slicing import slice_params


@dataclasses.dataclass(frozen=True, eq=False)
class Progress:
    """Where a run is.

    Attributes:
        state: variables and optimiser, as small as the net is.
        keep: group name -> bool ``[size]``, True = kept; missing ones are whole.
        round: number of the round.
        done: how many of its steps are done; -1 before its cut.
        number: how many times the run was saved.
        history: what was noted about every round.
        seconds: that this round took so far.
        scores: of all units, where they are counted once.
        rewound: the state to go back to after every cut.
    """

    state: State
    keep: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    round: int = 0
    done: int = 0
    number: int = 0
    history: tuple[dict[str, Any], ...] = ()
    seconds: float = 0.0
    scores: dict[str, np.ndarray] | None = None
    rewound: State | None = None

    @property
    def arrays(self) -> dict[str, Any]:
        """What is saved as arrays."""
        found: dict[str, Any] = {"state": self.state}
        found |= {"scores": self.scores} if self.scores is not None else {}
        return found | ({"rewound": self.rewound} if self.rewound is not None else {})


class Files:
    """The folder of a run, or its stand-in in memory.

    Args:
        folder: made if missing; None for in memory alone.
        groups: what `trace` returned.
        start: the state before the first step, which says what arrays look like.
        tx: the optimiser.
        settings: what has to be the same when the run is resumed, as JSON.
    """

    def __init__(
        self,
        folder: str | Path | None,
        groups: Groups,
        start: State,
        tx: optax.GradientTransformation,
        settings: dict[str, Any],
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.groups, self.tx, self.settings = groups, tx, settings
        self.dense = jax.eval_shape(lambda state: state, start)
        self.rounds: dict[int, tuple[Mapping[str, np.ndarray], PyTree]] = {}
        self.number = 0

    def restore(self) -> Progress | None:
        """The newest state that is whole, None if there is none.

        Raises:
            ValueError: if the run has other settings.
        """
        if self.folder is None:
            return None
        from jaxprune.io import checkpoints

        found = checkpoints.restore_latest(self.folder / "steps", self._like)
        if found is None:
            return None
        self.number = found.step
        meta, arrays = found.meta, found.state
        return Progress(
            state=arrays["state"],
            keep=self._keep(meta),
            round=meta["round"],
            done=meta["done"],
            number=found.step,
            history=tuple(meta["history"]),
            seconds=meta["seconds"],
            scores=jax.device_get(arrays.get("scores")),
            rewound=arrays.get("rewound"),
        )

    def save(self, now: Progress) -> None:
        """Writes the state of a run; the one before stays until this one is whole."""
        self.number += 1
        if self.folder is None:
            return
        from jaxprune.io import checkpoints

        meta = {
            **self._meta(now.keep),
            "round": now.round,
            "done": now.done,
            "history": list(now.history),
            "seconds": now.seconds,
            "arrays": sorted(now.arrays),
        }
        checkpoints.save(self.folder / "steps", self.number, now.arrays, meta, keep=2)

    def save_round(self, now: Progress) -> None:
        """Keeps the net after a round."""
        self.rounds[now.round] = now.keep, now.state.variables
        if self.folder is None:
            return
        from jaxprune.io import checkpoints

        checkpoints.save(
            self.folder / f"round_{now.round}",
            now.round,
            {"variables": now.state.variables},
            self._meta(now.keep),
            keep=1,
        )

    def round(self, number: int) -> tuple[Mapping[str, np.ndarray], PyTree]:
        """The decision and the variables after a round.

        Raises:
            ValueError: if they are not there.
        """
        if number in self.rounds:
            return self.rounds[number]
        found = None
        if self.folder is not None:
            from jaxprune.io import checkpoints

            place = self.folder / f"round_{number}"
            found = checkpoints.restore_latest(
                place, lambda meta: {"variables": self._small(self._keep(meta))}
            )
        if found is None:
            raise ValueError(f"there is no round {number} in {self.folder}")
        self.rounds[number] = self._keep(found.meta), found.state["variables"]
        return self.rounds[number]

    def _meta(self, keep: Mapping[str, np.ndarray]) -> dict[str, Any]:
        gone = {name: np.flatnonzero(~kept).tolist() for name, kept in keep.items()}
        return {"settings": self.settings, "removed": gone}

    def _keep(self, meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
        keep = {}
        for name, gone in meta["removed"].items():
            keep[name] = np.ones(self.groups[name].size, bool)
            keep[name][gone] = False
        return keep

    def _small(self, keep: Mapping[str, np.ndarray]) -> PyTree:
        return slice_params(self.dense.variables, expand_masks(self.groups, keep))

    def _like(self, meta: Mapping[str, Any]) -> PyTree:
        """What the arrays of a saved state look like."""
        self._check(meta["settings"])
        small = self._small(self._keep(meta))
        opt_state = jax.eval_shape(self.tx.init, trained(small))
        like: dict[str, Any] = {
            "state": self.dense._replace(variables=small, opt_state=opt_state)
        }
        if "scores" in meta["arrays"]:
            like["scores"] = {
                name: jax.ShapeDtypeStruct((group.size,), np.float32)
                for name, group in self.groups.items()
            }
        if "rewound" in meta["arrays"]:
            like["rewound"] = self.dense
        return like

    def _check(self, saved: Mapping[str, Any]) -> None:
        for name, value in self.settings.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"{self.folder} holds a run with {name}={saved.get(name)}, but "
                    f"this one has {name}={value}; take another folder, or the same "
                    "settings"
                )
