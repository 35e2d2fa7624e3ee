"""What a person asks of `prune` and `rounds`, as frozen data, checked when made."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune import scores as scoring
from jaxprune.core._checks import number
from jaxprune.core._limits import Each, fraction
from jaxprune.core._types import PyTree
from jaxprune.costing import Cost
from jaxprune.recipes._batches import check_batches, inputs_like, reread
from jaxprune.recipes._targets import CostName, Scope
from jaxprune.recipes._unit_scores import NEED_BATCHES, Score, check_score
from jaxprune.select._budget import Method


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """The options of `prune`, which documents them."""

    sparsity: float | Mapping[str, float] | None = None
    budget: float | str | None = None
    cost: CostName | Cost = "flops"
    score: Score = "l2"
    loss_fn: Callable[[PyTree, PyTree], PyTree] | None = None
    batches: Iterable[PyTree] | None = None
    inputs: Callable[[PyTree], tuple[PyTree, ...]] | None = None
    rounds: int = 1
    scope: Scope = "group"
    method: Method | None = None
    normalize: scoring.Normalize | None = None
    members: scoring.Members = "all"
    only: str | Sequence[str] | None = None
    pin: str | Sequence[str] = ()
    unpin: str | Sequence[str] = ()
    balanced: str | Sequence[str] = ()
    writers: str | Sequence[str] = ()
    layers: bool = False
    per_layer: str | Sequence[str] = ()
    max_sparsity: Each[float] | None = None
    min_keep: Each[int] | None = None
    multiple_of: Each[int] | None = None
    exact: bool = True
    recalibrate: bool | Mapping[str, Any] = True
    progress: bool | None = None

    def __post_init__(self) -> None:
        _check_target(self.sparsity, self.budget)
        rounds = number("rounds", self.rounds)
        if not math.isfinite(rounds) or int(rounds) != rounds:
            raise ValueError(f"rounds must be a whole number, got {self.rounds!r}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        _check_flags(exact=self.exact, progress=self.progress)
        if not isinstance(self.recalibrate, Mapping):
            _check_flags(recalibrate=self.recalibrate)
        check_score(self.score, self.loss_fn, self.batches)
        if self.batches is not None:
            check_batches(self.batches)
            scored = isinstance(self.score, str) and self.score in NEED_BATCHES
            both = scored + (self.recalibrate is not False)
            reread(self.batches, self.rounds * both)

    @property
    def limits(self) -> dict[str, Any]:
        """`max_sparsity`, `min_keep` and `multiple_of`, where given."""
        names = "max_sparsity", "min_keep", "multiple_of"
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def patterns(self) -> dict[str, Any]:
        """What `trace` takes."""
        names = "pin", "unpin", "balanced", "writers", "layers", "per_layer"
        given = {name: getattr(self, name) for name in names}
        return {**given, "roles": self.members == "producers"}

    def inputs_of(
        self, args: tuple[PyTree, ...]
    ) -> Callable[[PyTree], tuple[PyTree, ...]]:
        """Batch -> positional arguments."""
        return self.inputs or inputs_like(args)


OPTIONS = tuple(field.name for field in dataclasses.fields(Request))
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Request)}


def refuse_unknown(what: str, unknown: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises if there is an option that does not exist.

    Raises:
        TypeError: naming the nearest, and where the function's own arguments go.
    """
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise TypeError(
            f"{what} has no option {name!r}{hint} Keyword arguments of the function "
            f"itself go into kwargs={{{name!r}: ...}}"
        )


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not (isinstance(value, bool | np.bool_) or value is DEFAULTS[name]):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_target(sparsity: Any, budget: Any) -> None:
    if sparsity is None and budget is None:
        raise ValueError(
            "give sparsity=, the fraction of units to remove, or budget=, the cost "
            "that may be left"
        )
    if sparsity is not None and budget is not None:
        raise ValueError(
            f"sparsity={sparsity} and budget={budget} both say how much to "
            "remove; give only one"
        )
    if isinstance(sparsity, Mapping) and not sparsity:
        raise ValueError(
            "sparsity={} names no group, so nothing would be cut; give a fraction, or "
            "name or pattern -> fraction"
        )
    shares = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
    for share in shares:
        if share is not None and fraction("sparsity", share) == 1:
            raise ValueError(
                "sparsity=1 cuts every unit, and nothing is left to compute; give a "
                "fraction below 1 (with min_keep=1 the last unit of a group stays)"
            )
