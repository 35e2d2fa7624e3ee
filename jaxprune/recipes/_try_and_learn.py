"""`try_and_learn`: agents prune a whole net, one group after the other."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import scores
from jaxprune.core._checks import finite
from jaxprune.core._functions import check_function
from jaxprune.core._groups import Groups
from jaxprune.core._types import PyTree
from jaxprune.coupling._trace import trace
from jaxprune.narrowing._narrow import narrow
from jaxprune.recipes._rounds import Rounds, rounds
from jaxprune.recipes._trials import (
    FineTune,
    Learned,
    chosen_groups,
    learn_keep,
    mean_metric,
    measured,
    stacked,
)
from jaxprune.search._reinforce import check_drop_bound

Order = Literal["low_to_high", "high_to_low", "sensitivity", "joint"]
Baseline = Literal["original", "current"]


def try_and_learn(
    apply_fn: Callable[..., Any],
    variables: PyTree,
    *args: Any,
    metric: Callable[[Callable[..., Any], PyTree, Any], Any],
    batches: Sequence[Any],
    drop_bound: float,
    loss_fn: Callable[[PyTree, Any], Any],
    data: Sequence[Any] | Callable[[int], Any],
    tx: optax.GradientTransformation,
    steps: int,
    fine_tune: int = 0,
    order: Order | Sequence[str] = "low_to_high",
    only: str | Sequence[str] | None = None,
    baseline: Baseline | float = "original",
    kwargs: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    learned: Callable[[int, Learned], Any] | None = None,
    key: jax.Array | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Rounds:
    """Prunes a trained net group by group, as agents learn what it can do without.

    Algorithm 2 of the paper, as `rounds`: in every round an agent learns which units of
    the next group to keep (`learn_keep`), the rest is cut, and the smaller net is
    trained for `steps`. The groups may be anything that `trace` finds: filters of
    plain, residual and concatenating nets, hidden units, heads. With a folder the run
    can be killed and called again; a search that was under way starts anew, with the
    same end.

    Args:
        apply_fn: the function; its first argument is the variables.
        variables: its variables, trained.
        *args: example arguments, arrays or shapes.
        metric: ``(apply_fn, variables, batch) -> number``, larger is better, jit-able.
        batches: held-out batches of equal shapes, for the rewards.
        drop_bound: how much the metric may fall in all, in its own units, above 0.
        loss_fn: ``(variables, batch) -> loss``, or ``(loss, new collections)``.
        data: batches for training: a sequence, or a function of the number of the step.
        tx: the `optax.GradientTransformation`.
        steps: of training after every cut.
        fine_tune: steps of training of every candidate before it is measured.
        order: of the groups: "low_to_high" as the program uses them, as published;
            "high_to_low"; "sensitivity", first those of which the smaller half (by L2
            norm) is missed least; "joint", all in one search; or names.
        only: names or patterns of the groups; None for all that are exact.
        baseline: what drops are counted from: the "original" metric, which bounds the
            drop of the whole run, the "current" one at the start of each round, which
            bounds that of a round; or a number.
        kwargs: keyword arguments of the function.
        folder: where the run is kept; None for in memory alone.
        learned: called with the number of each round and what was learned in it.
        key: random key; None for ``jax.random.key(0)``.
        progress: show progress bars? None for on a terminal.
        **options: further options of `learn_keep`: `updates`, `candidates`, ...

    Returns:
        The rounds, as `rounds`; the metric of each is the mean over `batches`.

    Raises:
        ValueError: as `learn_keep` and `rounds`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune, optax
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.eye(3), "w2": jnp.array([[1.0], [1.0], [0.0]])}
        >>> x = jnp.ones((4, 3))
        >>> run = try_and_learn(
        ...     mlp, params, x, batches=[x], drop_bound=0.5, data=[x], steps=1,
        ...     metric=lambda apply, params, x: -jnp.abs(apply(params, x) - 2).mean(),
        ...     loss_fn=lambda params, x: jnp.mean((mlp(params, x) - 2) ** 2),
        ...     tx=optax.sgd(0.01), updates=60, learning_rate=0.03)
        >>> run.last.variables["w1"].shape
        (3, 2)

    References:
        Huang et al., `Learning to Prune Filters in Convolutional Neural Networks
        <https://arxiv.org/abs/1801.07365>`_, WACV 2018
    """
    check_function(apply_fn)
    check_drop_bound(drop_bound)
    kwargs = dict(kwargs or {})
    groups = trace(apply_fn, variables, *args, roles=True, **kwargs)
    if only is None:
        only = [name for name, group in groups.items() if group.exact]
    held = stacked(batches)

    def evaluate(apply_fn: Any, variables: PyTree) -> float:
        # Not jitted under the name of the function: narrowed ones share it.
        def mean(variables: PyTree, held: Any) -> jax.Array:
            return mean_metric(
                lambda v, batch: metric(apply_fn, v, batch), variables, held
            )

        return float(jax.jit(mean)(variables, held))

    subject = _Subject(apply_fn, variables, args, kwargs, metric, batches)
    turns = _turns(groups, chosen_groups(groups, only), order, subject)
    agents = _Agents(
        subject=subject,
        turns=turns,
        baseline=_counted_from(baseline, lambda: evaluate(apply_fn, variables)),
        drop_bound=drop_bound,
        loss_fn=loss_fn,
        data=data,
        tx=tx,
        fine_tune=fine_tune,
        key=jax.random.key(0) if key is None else key,
        learned=learned,
        options={**options, "progress": progress},
    )
    return rounds(
        apply_fn,
        variables,
        *args,
        tx=tx,
        data=data,
        steps=[0, *[steps] * len(turns)],
        kwargs=kwargs,
        rounds=len(turns),
        decide=agents,
        loss_fn=loss_fn,
        evaluate=evaluate,
        folder=folder,
        recalibrate=False,
        progress=progress,
    )


def _counted_from(
    baseline: Baseline | float, first: Callable[[], float]
) -> float | None:
    """What drops are counted from; None for the metric of each round."""
    if not isinstance(baseline, str):
        return finite("baseline", baseline)
    if baseline not in ("original", "current"):
        raise ValueError(
            f"baseline must be 'original', 'current' or a number, got {baseline!r}"
        )
    return first() if baseline == "original" else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Subject:
    """What is pruned, and how it is measured."""

    apply_fn: Callable[..., object]
    variables: PyTree
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    metric: Callable[..., object]
    batches: Sequence[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _Agents:
    """How rounds decide: the next group, by agents that see the net as it is."""

    subject: _Subject
    turns: Sequence[Sequence[str]]
    baseline: float | None
    drop_bound: float
    loss_fn: Any
    data: Any
    tx: optax.GradientTransformation
    fine_tune: int
    key: jax.Array
    learned: Callable[[int, Learned], object] | None
    options: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must share, as JSON."""
        plain = {
            name: value
            for name, value in self.options.items()
            if isinstance(value, str | int | float) and name != "progress"
        }
        return {
            "groups": [list(turn) for turn in self.turns],
            "drop_bound": self.drop_bound,
            "fine_tune": self.fine_tune,
            "baseline": self.baseline,
            "key": np.asarray(jax.random.key_data(self.key)).tolist(),
            **plain,
        }

    def __call__(
        self, number: int, masks: PyTree | None, variables: PyTree
    ) -> dict[str, np.ndarray]:
        """Which units of this round's groups stay, of those that are left."""
        subject, loss_fn = self.subject, self.loss_fn
        apply_fn = subject.apply_fn
        if masks is not None:
            apply_fn, loss_fn = narrow(apply_fn, masks), narrow(loss_fn, masks)
        groups = trace(apply_fn, variables, *subject.args, roles=True, **subject.kwargs)
        names = [name for name in self.turns[number - 1] if name in groups]
        if not names:
            return {}
        tune = None
        if self.fine_tune:
            tune = FineTune(loss_fn, self.tx, self.data, self.fine_tune)
        found = learn_keep(
            groups,
            variables,
            lambda v, batch: subject.metric(apply_fn, v, batch),
            subject.batches,
            drop_bound=self.drop_bound,
            only=names,
            baseline=self.baseline,
            fine_tune=tune,
            key=jax.random.fold_in(self.key, number),
            **self.options,
        )
        if self.learned is not None:
            self.learned(number, found)
        return found.keep


def _turns(
    groups: Groups, names: list[str], order: Order | Sequence[str], subject: _Subject
) -> list[list[str]]:
    """The groups of every round."""
    if order == "low_to_high":
        return [[name] for name in names]
    if order == "high_to_low":
        return [[name] for name in reversed(names)]
    if order == "joint":
        return [names]
    if order == "sensitivity":
        missed = _missed(groups, names, subject)
        return [[name] for name in sorted(names, key=missed.__getitem__)]
    if isinstance(order, str):
        raise ValueError(
            "order must be 'low_to_high', 'high_to_low', 'sensitivity', 'joint' or "
            f"names of groups, got {order!r}"
        )
    return [chosen_groups(groups, name) for name in order]


def _missed(groups: Groups, names: list[str], subject: _Subject) -> dict[str, float]:
    """What the metric loses with the smaller half of each group."""
    norms = scores.group_scores(groups, subject.variables)
    held = stacked(subject.batches)

    def metric_fn(variables: PyTree, batch: object) -> Any:
        return subject.metric(subject.apply_fn, variables, batch)

    found = {}
    for name in names:
        data = groups, [name], subject.variables, metric_fn, subject.batches, None
        measure = jax.jit(measured(*data))
        rank = np.argsort(np.argsort(np.asarray(norms[name]), kind="stable"))
        keep = {name: jnp.asarray(rank >= groups[name].size // 2)}
        found[name] = -float(measure(keep, subject.variables, (), held))
    return found
