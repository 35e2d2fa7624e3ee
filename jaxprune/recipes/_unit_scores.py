"""Scores by name: one number per unit from weights, from a program, or from data."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxprune import scores as scoring
from jaxprune.core._groups import Groups
from jaxprune.core._leaves import named_leaves
from jaxprune.core._names import nearest
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.recipes._training import one_number
from jaxprune.scores._published import OF_UNITS, OF_WEIGHTS, REDUCTIONS, Given

Score = str | Callable[[PyTree], PyTree] | PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What is scored: a program, its variables, and what data it is to be seen with.

    Attributes:
        groups: what `trace` returned for it.
        apply_fn: the function; its first argument is the variables.
        variables: its variables.
        args: example arguments.
        kwargs: example keyword arguments.
        loss_fn: ``(variables, batch) -> scalar``, or None.
        batches: batches of data, or None.
        inputs: batch -> positional arguments of `apply_fn`.
        progress: show progress bars? None for on a terminal.
    """

    groups: Groups
    apply_fn: ApplyFn
    variables: PyTree
    args: tuple[PyTree, ...] = ()
    kwargs: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)
    loss_fn: Any = None
    batches: Any = None
    inputs: Callable[[PyTree], tuple[PyTree, ...]] = lambda batch: (batch,)
    progress: bool | None = None

    def forward(self, variables: PyTree, batch: PyTree) -> Any:
        """The outputs for a batch."""
        return self.apply_fn(variables, *self.inputs(batch), **self.kwargs)

    @functools.cached_property
    def loss(self) -> Callable[[PyTree, PyTree], Any]:
        """`loss_fn`, checked to return one number."""
        return lambda variables, batch: one_number(self.loss_fn(variables, batch))


Scored = tuple[PyTree, scoring.Reduce]


def _norm(reduced: str) -> Callable[[Subject], Scored]:
    """The norm is a reduction of the weights themselves: no tree of their sizes."""
    return lambda subject: (subject.variables, REDUCTIONS[reduced])


def _of_weights(name: str, given: Given) -> Callable[[Subject], Scored]:
    score, reduce = getattr(scoring, name), REDUCTIONS[name]
    return lambda subject: (
        score(*_given(subject, given), **_bars(subject, given)),
        reduce,
    )


def _of_units(name: str, given: Given) -> Callable[[Subject], Mapping[str, jax.Array]]:
    score = getattr(scoring, name)
    return lambda subject: score(
        subject.groups, *_given(subject, given), **_bars(subject, given)
    )


def _given(subject: Subject, given: Given) -> tuple[PyTree, ...]:
    """What a score declares to be given."""
    if given == "variables":
        return (subject.variables,)
    looked_at = subject.loss if given == "loss" else subject.forward
    return looked_at, subject.variables, subject.batches


def _bars(subject: Subject, given: Given) -> dict[str, bool | None]:
    """What looks at data takes long."""
    return {} if given == "variables" else {"progress": subject.progress}


def _fisher(subject: Subject) -> Scored:
    curvature, reduce = _of_weights("fisher", "loss")(subject)
    return scoring.obd(subject.variables, curvature), reduce


def _synflow(subject: Subject) -> Scored:
    kwargs = dict(subject.kwargs)
    flow = scoring.synflow(subject.apply_fn, subject.variables, *subject.args, **kwargs)
    return flow, REDUCTIONS["synflow"]


# Scores of weights, and how those of a unit add up.
_TREES: dict[str, Callable[[Subject], Scored]] = {
    "l1": _norm("l1"),
    "l2": _norm("l2"),
    "lamp": _norm("l2"),
    "synflow": _synflow,
    "fisher": _fisher,
    **{name: _of_weights(name, given) for name, given in OF_WEIGHTS.items()},
}
# Scores that are of units from the start.
_UNITS: dict[str, Callable[[Subject], Mapping[str, jax.Array]]] = {
    name: _of_units(name, given) for name, given in OF_UNITS.items()
}
_LOOKS_AT = {"fisher": "loss", **OF_WEIGHTS, **OF_UNITS}
NEED_LOSS = tuple([name for name, given in _LOOKS_AT.items() if given == "loss"])
NEED_BATCHES = (
    *NEED_LOSS,
    *[name for name, given in _LOOKS_AT.items() if given == "outputs"],
)
NAMES = ("geometric_median", *_TREES, *_UNITS)


def unit_scores(
    subject: Subject,
    score: Score,
    *,
    normalize: scoring.Normalize | None = None,
    members: scoring.Members = "all",
) -> dict[str, jax.Array]:
    """One number per unit: larger matters more.

    Args:
        subject: what is scored.
        score: a name of `NAMES`; a function of the variables; or what it would
            return: a tree of scores like the variables, or scores of units.
        normalize: how the scores of a group are scaled, see `group_scores`.
        members: which members of a group score, see `group_scores`.

    Returns:
        Group name -> float ``[size]``.

    Raises:
        ValueError: if the name is unknown, or needs a loss or data that is missing.
    """
    if isinstance(score, str):
        check_score(score, subject.loss_fn, subject.batches)
        return _named(subject, score, normalize, members)
    numbers = score
    if callable(score) and not _is_tree_like(score, subject.variables):
        numbers = score(subject.variables)
    if isinstance(numbers, Mapping) and set(numbers) == set(subject.groups):
        return scoring.normalized(numbers, normalize)
    options: dict[str, Any] = {"normalize": normalize, "members": members}
    return scoring.group_scores(subject.groups, numbers, **options)


def _named(
    subject: Subject,
    name: str,
    normalize: scoring.Normalize | None,
    members: scoring.Members,
) -> dict[str, jax.Array]:
    groups = subject.groups
    if name == "geometric_median":
        units = scoring.geometric_median(groups, subject.variables, members=members)
        return scoring.normalized(units, normalize)
    if name in _UNITS:
        return scoring.normalized(_UNITS[name](subject), normalize)
    tree, reduce = _TREES[name](subject)
    options: dict[str, Any] = {"reduce": reduce, "members": members}
    options["normalize"] = "lamp" if name == "lamp" else normalize
    return scoring.group_scores(groups, tree, **options)


def check_score(
    score: object, loss_fn: Callable[..., PyTree] | None, batches: object
) -> None:
    """Raises unless a score of this name exists and has what it needs."""
    if not isinstance(score, str):
        return
    if score not in NAMES:
        raise ValueError(
            f"unknown score {score!r}{nearest(score, NAMES)} Expected a function, "
            f"scores, or one of {', '.join(NAMES)}, of which "
            f"{', '.join(NEED_LOSS)} look at data and need loss_fn and batches, and "
            f"{', '.join(NEED_BATCHES[len(NEED_LOSS) :])} need batches"
        )
    if score in NEED_LOSS and loss_fn is None:
        raise ValueError(
            f"score {score!r} differentiates a loss: give loss_fn=(variables, batch) "
            "-> scalar and batches=[...]"
        )
    if score in NEED_BATCHES and batches is None:
        raise ValueError(f"score {score!r} looks at data: give batches=[...]")


def _is_tree_like(score: object, variables: PyTree) -> bool:
    """Is it a tree of scores? So may a module be that can also be called."""
    paths = named_leaves(score)
    known = {
        p
        for path in named_leaves(variables)
        for p in (path, path.removeprefix("params/"))
    }
    return bool(paths) and "" not in paths and set(paths) <= known
