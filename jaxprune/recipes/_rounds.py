"""`rounds`: prune, train, evaluate, again, from a folder that outlives kills."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from jaxprune.core._checks import concrete_bools, whole_number
from jaxprune.core._layer_masks import recalled
from jaxprune.core._masks import expand_masks
from jaxprune.core._names import nearest
from jaxprune.core._progress import advancing
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.costing import costs
from jaxprune.narrowing._narrow import narrow
from jaxprune.recipes._deciding import (
    Problem,
    decide,
    decide_by,
    problem_of,
    recalibrated,
    scores_of,
)
from jaxprune.recipes._pruned import Pruned, make_pruned
from jaxprune.recipes._reports import as_call, report_rounds
from jaxprune.recipes._request import DEFAULTS, OPTIONS, Request, refuse_unknown
from jaxprune.recipes._round_files import Files, Progress
from jaxprune.recipes._targets import budget_of
from jaxprune.recipes._training import (
    State,
    Step,
    batch_at,
    default_step,
    first_state,
    loss_alone,
    sliced_state,
)
from jaxprune.surgery._slicing import slice_params

Schedule = Literal["geometric", "linear"]
Decide = Callable[[int, PyTree | None, PyTree], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Round:
    """What is known of a round.

    Attributes:
        round: its number; 0 is the net before the first cut.
        metric: what `evaluate` returned, None without it.
        kept: fraction of the units that are left.
        parameters: how many parameters are left.
        flops: of one call.
        steps: how many steps it was trained for.
        seconds: that the round took, kills aside.
    """

    round: int
    metric: float | None
    kept: float
    parameters: int
    flops: int
    steps: int
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Rounds:
    """What `rounds` returns.

    Attributes:
        history: one entry a round.
        load: number of a round -> the net after it.
        call: the call that made it, as text.
    """

    history: tuple[Round, ...]
    load: Callable[[int], Pruned]
    call: str = ""

    @property
    def last(self) -> Pruned:
        """The net after the last round."""
        return self.load(len(self.history) - 1)

    @property
    def best(self) -> Pruned:
        """The net with the highest metric; of equal ones the smallest."""
        return self.load(self.choose(0.0, among=max))

    def within(self, drop: float) -> Pruned:
        """The smallest net whose metric is at most `drop` below that of round 0."""
        return self.load(self.choose(drop))

    def report(
        self,
        path: str | Path,
        *more: "Rounds",
        title: str = "Rounds of pruning",
        metric: str = "metric",
        latency: bool = True,
        progress: bool | None = None,
    ) -> None:
        """Writes one HTML file: every round's costs and metric, curves, what is left.

        Args:
            path: the file; replaced as a whole.
            *more: further runs, such as of other seeds, with as many rounds: tables
                then have means with 95 % confidence intervals, and curves their spread.
            title: of the page.
            metric: what `evaluate` returned is called.
            latency: measure a call of the net after every round.
            progress: show a progress bar? None for on a terminal.

        Raises:
            ValueError: if the runs do not have the same rounds.
            ModuleNotFoundError: if ``jaxprune[report]`` is missing.
        """
        report_rounds(path, [self, *more], title, metric, latency, progress)

    def choose(self, drop: float, among: ApplyFn | None = None) -> int:
        """The number of the last round whose metric is good enough.

        Args:
            drop: how much below the reference the metric may be.
            among: what takes the reference from all metrics; None for round 0.

        Raises:
            ValueError: if the rounds were not evaluated.
        """
        found = [entry.metric for entry in self.history]
        metrics = [metric for metric in found if metric is not None]
        if len(metrics) < len(found):
            raise ValueError("the rounds have no metric; give rounds(evaluate=...)")
        reference = metrics[0] if among is None else among(metrics)
        return max(k for k, m in enumerate(metrics) if m >= reference - drop)


def rounds(
    apply_fn: ApplyFn,
    variables: PyTree,
    *args: PyTree,
    tx: optax.GradientTransformation,
    data: Sequence[Any] | Callable[[int], Any],
    steps: int | Sequence[int],
    kwargs: Mapping[str, PyTree] | None = None,
    sparsity: float | Sequence[Any] | Mapping[str, float] | None = None,
    budget: float | str | Sequence[float | str] | None = None,
    rounds: int | None = None,
    schedule: Schedule = "geometric",
    decide: Decide | None = None,
    step: Step | None = None,
    loss_fn: Callable[[PyTree, PyTree], PyTree] | None = None,
    evaluate: Callable[[Callable[..., Any], PyTree], Any] | str | None = None,
    folder: str | Path | None = None,
    rewind: int | None = None,
    rescore: bool = True,
    save_every: int = 500,
    key: jax.Array | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Rounds:
    """Prunes in rounds: train, evaluate, cut, train again, as often as it takes.

    Round 0 trains the whole net (for as long as `steps` says, perhaps not at all);
    every further round cuts, trains and evaluates. The optimiser's state goes along.
    With a folder every step of the way is on disk before the next: a run that was
    killed at any moment, called again with the same arguments, goes on where it was
    and ends with the same bits.

    Args:
        apply_fn: the function; its first argument is the variables.
        variables: its variables.
        *args: example arguments, arrays or shapes.
        tx: the `optax.GradientTransformation`, of ``variables["params"]``, or of all
            variables if there is no such collection.
        data: batches for training: a sequence, read again and again, or a function of
            the number of the step.
        steps: how many steps to train in each round; or one number for round 0 and
            each of the further ones.
        kwargs: keyword arguments of the function.
        sparsity: as for `prune`, of the last round; or a list, one for each round.
        budget: as for `prune`, of the last round; or one for each round.
        rounds: how many times to cut; not needed if there is a number for each.
        schedule: how to get to the last round: "geometric" leaves the same fraction in
            each, "linear" removes the same amount.
        decide: in place of `sparsity` and `budget`, ``(round, masks, variables) ->
            keep``: which units of what is left stay, group -> bool ``[units left]``.
            The masks, of the original variables, say what is left; None before the
            first cut. If it has an attribute `settings`, JSON, a run is only resumed
            with the same.
        step: ``(apply_fn, state, batch) -> state``, jit-able, with a `State`; takes
            the narrowed function. None for gradient descent on `loss_fn`.
        loss_fn: ``(variables, batch) -> loss``, or ``(loss, new)`` with new values of
            collections, such as ``{"batch_stats": ...}``; for training, and for scores
            that look at data.
        evaluate: ``(apply_fn, variables) -> number``, larger is better; or "loss" for
            minus the mean of `loss_fn` over `batches`.
        folder: where the run is kept; None for in memory alone.
        rewind: after every cut go back to the variables and optimiser that round 0
            had after so many steps (0: the initial ones), what is cut left out.
        rescore: score anew in every round; False for once, before the first cut.
        save_every: how many steps are at most lost in a kill.
        key: random key for `State.key`; None for ``jax.random.key(0)``.
        progress: show progress bars? None for on a terminal.
        **options: further options of `prune`: `score`, `batches`, `only`, ...

    Returns:
        The rounds: their history, the last net, the best, and the smallest that is
        good enough.

    Raises:
        ValueError: if the folder holds a run with other settings, or as `prune`.
        TypeError: if an option does not exist.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune, optax
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))}
        >>> run = jaxprune.rounds(
        ...     mlp, params, jnp.ones((1, 3)), tx=optax.sgd(0.01), steps=2,
        ...     data=[jnp.ones((4, 3))], sparsity=[0.25, 0.5],
        ...     loss_fn=lambda p, x: jnp.mean(mlp(p, x) ** 2))
        >>> [round(entry.kept, 2) for entry in run.history]
        [1.0, 0.75, 0.5]
        >>> run.last.variables["w1"].shape
        (3, 4)

    References:
        Han et al., `Learning both Weights and Connections
        <https://arxiv.org/abs/1506.02626>`_, 2015; Frankle and Carbin, `The Lottery
        Ticket Hypothesis <https://arxiv.org/abs/1803.03635>`_, 2018, and Frankle et
        al., `Linear Mode Connectivity <https://arxiv.org/abs/1912.05671>`_, 2019
        (`rewind`); Renda et al., `Comparing Rewinding and Fine-tuning
        <https://arxiv.org/abs/2003.02389>`_, 2020
    """
    refuse_unknown("rounds", _unknown(options), OPTIONS)
    given = locals()
    asked = {**options, **{name: given[name] for name in _TOLD}}
    if decide is not None:
        _refuse_both(sparsity, budget)
        sparsity = 0.0  # what `decide` is asked in place of
    targets = _targets(sparsity, budget, rounds)
    last = dict(zip(("sparsity", "budget"), targets[-1], strict=True))
    options = {**options, **last, "loss_fn": loss_alone(loss_fn), "progress": progress}
    if options.get("batches") is None and not callable(data):
        options["batches"] = list(data) if loss_fn is not None else None
    request = Request(**options)
    problem = problem_of(apply_fn, variables, args, kwargs, request)
    lengths = _lengths(steps, len(targets))
    _check_rewind(rewind, lengths)
    _check_evaluate(evaluate, request)
    if step is None and loss_fn is None:
        raise ValueError("give step=, or loss_fn= for gradient descent on it")
    plan = _Plan(
        problem=problem,
        requests=tuple(
            dataclasses.replace(request, sparsity=s, budget=b) for s, b in targets
        ),
        shares=_shares(request, problem, len(targets), schedule, sparsity, budget),
        steps=lengths,
        decide=decide,
        tx=tx,
        data=data,
        step=step,
        loss_fn=loss_fn,
        evaluate=evaluate,
        rewind=rewind,
        rescore=rescore,
        save_every=save_every,
    )
    start = first_state(variables, tx, jax.random.key(0) if key is None else key)
    files = Files(folder, problem.groups, start, tx, _settings(plan, schedule))
    found = _run(plan, files, start, progress)
    called = as_call("jaxprune.rounds", apply_fn, args, asked, _USUAL)

    def load(number: int) -> Pruned:
        keep, small = files.round(number)
        masks = expand_masks(problem.groups, keep)
        call = problem.groups, problem.args, problem.kwargs
        return make_pruned(apply_fn, variables, masks, *call, called).replace(
            variables=small
        )

    return Rounds(tuple(Round(**entry) for entry in found.history), load, called)


# What a report tells of the call besides the options of `prune`, and the defaults.
_TOLD = (
    *("loss_fn", "sparsity", "budget", "rounds", "steps", "schedule", "decide"),
    *("rewind", "rescore"),
)
_USUAL = DEFAULTS | {"schedule": "geometric", "rescore": True}


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What a run does, all of it."""

    problem: Problem
    requests: tuple[Request, ...]
    shares: tuple[float, ...]
    steps: tuple[int, ...]
    decide: Decide | None
    tx: optax.GradientTransformation
    data: Any
    step: Step | None
    loss_fn: Any
    evaluate: Any
    rewind: int | None
    rescore: bool
    save_every: int


def _run(plan: _Plan, files: Files, start: State, shown: bool | None) -> Progress:
    """Goes from one state on disk to the next until all rounds are done."""
    now = files.restore() or Progress(state=start)
    total = sum(plan.steps)
    done = sum(plan.steps[: now.round]) + max(now.done, 0)
    with advancing("rounds", total, shown, done) as advance:
        step: Any = None
        while now.round < len(plan.steps):
            began = time.perf_counter()
            title = f"round {now.round} of {len(plan.steps) - 1}"
            if now.done < 0:
                after, step = _cut(plan, now), None
            elif now.done < plan.steps[now.round]:
                step = step or _compiled(plan, now)
                advance(0, title)
                after = _train(plan, now, step, advance)
            else:
                after = _finish(plan, files, now)
            spent = now.seconds + time.perf_counter() - began
            fresh = after.round != now.round
            now = dataclasses.replace(after, seconds=0.0 if fresh else spent)
            files.save(now)
    return now


def _train(
    plan: _Plan, now: Progress, step: Any, advance: Callable[..., None]
) -> Progress:
    """Some steps, at most to where something is to be kept."""
    stops = [now.done + plan.save_every, plan.steps[now.round]]
    if plan.rewind is not None and now.round == 0 and now.rewound is None:
        if plan.rewind == now.done:
            now = dataclasses.replace(now, rewound=now.state)
        elif plan.rewind > now.done:
            stops.append(plan.rewind)
    state = now.state
    first = int(state.step)
    count = min(stops) - now.done
    for number in range(first, first + count):
        state = step(state, batch_at(plan.data, number))
        advance()
    jax.block_until_ready(state.variables)
    return dataclasses.replace(now, state=state, done=now.done + count)


def _compiled(plan: _Plan, now: Progress) -> Any:
    """The training step for the net as small as it is."""
    masks = _masks(plan, now)
    if plan.step is None:
        return jax.jit(default_step(plan.loss_fn, plan.tx, masks))
    apply_fn, user = _small(plan, now), plan.step
    return jax.jit(lambda state, batch: user(apply_fn, state, batch))


def _masks(plan: _Plan, now: Progress) -> PyTree:
    return expand_masks(plan.problem.groups, now.keep) if now.keep else None


def _small(plan: _Plan, now: Progress) -> ApplyFn:
    masks = _masks(plan, now)
    apply_fn = plan.problem.apply_fn
    return apply_fn if masks is None else narrow(apply_fn, masks)


def _cut(plan: _Plan, now: Progress) -> Progress:
    """The net with fewer units, rewound if that is asked for."""
    number = now.round - 1
    problem = dataclasses.replace(plan.problem, request=plan.requests[number])
    share, scores = plan.shares[number], now.scores
    if plan.decide is not None:
        keep = _decided(plan, plan.decide, now)
    elif plan.rescore:
        keep = decide(problem, now.state.variables, now.keep, share)
    else:
        scores = scores or scores_of(problem, now.state.variables, now.keep)
        keep = decide_by(problem, scores, now.keep, share)
    masks = expand_masks(problem.groups, keep)
    if now.rewound is not None:
        state = sliced_state(now.rewound, plan.tx, masks)
    else:
        before = _masks(plan, now)
        # What the new masks say about what the old ones have left.
        further = masks if before is None else slice_params(masks, before)
        if any(group.layers > 1 for group in problem.groups.values()):
            further = jax.tree.map(recalled, further)
        state = sliced_state(now.state, plan.tx, further)
    small = narrow(problem.apply_fn, masks)
    state = state._replace(variables=recalibrated(problem, small, state.variables))
    return dataclasses.replace(now, state=state, keep=keep, scores=scores, done=0)


def _decided(plan: _Plan, decide: Decide, now: Progress) -> dict[str, np.ndarray]:
    """What the user's own way of deciding leaves, as units of the original."""
    groups, keep = plan.problem.groups, dict(now.keep)
    for name, units in decide(
        now.round, _masks(plan, now), now.state.variables
    ).items():
        if name not in groups:
            raise ValueError(
                f"decide names the group {name!r}, which does not exist"
                f"{nearest(name, groups)}"
            )
        left = keep.get(name, np.ones(groups[name].size, bool))
        units = concrete_bools(f"decide's keep[{name}]", units)
        if units.shape != (left.sum(),):
            raise ValueError(
                f"decide returned shape {units.shape} for the group {name}, of which "
                f"{left.sum()} units are left"
            )
        keep[name] = left.copy()
        keep[name][left] = units
    return keep


def _finish(plan: _Plan, files: Files, now: Progress) -> Progress:
    """Evaluates a round, keeps its net and turns to the next."""
    small, problem = _small(plan, now), plan.problem
    variables = now.state.variables
    spent = costs(small, variables, *problem.args, **problem.kwargs)
    metric = _metric(plan, now, small)
    entry = Round(
        now.round,
        metric,
        _kept(problem, now.keep),
        spent.parameters,
        spent.flops,
        plan.steps[now.round],
        round(now.seconds, 3),
    )
    files.save_round(now)
    history = (*now.history, dataclasses.asdict(entry))
    return dataclasses.replace(now, round=now.round + 1, done=-1, history=history)


def _metric(plan: _Plan, now: Progress, small: Callable[..., Any]) -> float | None:
    """What the net is worth, None if nobody asks."""
    variables = now.state.variables
    if plan.evaluate is None:
        return None
    if plan.evaluate != "loss":
        return float(plan.evaluate(small, variables))
    request, masks = plan.problem.request, _masks(plan, now)
    assert request.loss_fn is not None and request.batches is not None  # was checked
    loss = request.loss_fn if masks is None else narrow(request.loss_fn, masks)
    compiled = jax.jit(loss)
    return -float(np.mean([compiled(variables, batch) for batch in request.batches]))


def _kept(problem: Problem, keep: Mapping[str, np.ndarray]) -> float:
    units = sum(group.size for group in problem.groups.values())
    gone = sum(int(np.sum(~kept)) for kept in keep.values())
    return 1 - gone / units


# --- what is asked for ---------------------------------------------------------------


def _refuse_both(sparsity: object, budget: object) -> None:
    for name, given in (("sparsity", sparsity), ("budget", budget)):
        if given is not None:
            raise ValueError(
                f"{name}={given} and decide= both say what to remove; give only one"
            )


def _targets(
    sparsity: object, budget: object, rounds: int | None
) -> list[tuple[Any, Any]]:
    """Sparsity and budget of every round."""
    for name, given in (("sparsity", sparsity), ("budget", budget)):
        if isinstance(given, Sequence) and not isinstance(given, str):
            if rounds not in (None, len(given)):
                raise ValueError(
                    f"rounds={rounds}, but {name} has a number for {len(given)} rounds"
                )
            if not given:
                raise ValueError(f"{name} is empty; give a number for each round")
            other = budget if name == "sparsity" else sparsity
            return [(g, other) if name == "sparsity" else (other, g) for g in given]
    if rounds is not None:
        whole_number("rounds", rounds)
    else:
        raise ValueError(
            "rounds must be at least 1, got None; give rounds=, or a sparsity or "
            "budget for each"
        )
    return [(sparsity, budget)] * rounds


def _check_rewind(rewind: int | None, lengths: Sequence[int]) -> None:
    if rewind is not None and not 0 <= rewind < lengths[0]:
        raise ValueError(
            f"rewind={rewind} is not a step of round 0, which has {lengths[0]}; give 0 "
            "for the initial variables, and steps for round 0"
        )


def _check_evaluate(evaluate: object, request: Request) -> None:
    if evaluate is None or callable(evaluate):
        return
    if evaluate != "loss":
        raise ValueError(
            f"evaluate must be a function of (apply_fn, variables), or 'loss', got "
            f"{evaluate!r}"
        )
    if request.loss_fn is None or request.batches is None:
        raise ValueError("evaluate='loss' needs loss_fn= and batches=")


def _lengths(steps: int | Sequence[int], rounds: int) -> tuple[int, ...]:
    each = (steps,) * (rounds + 1) if isinstance(steps, int) else tuple(steps)
    if len(each) != rounds + 1 or any(n < 0 for n in each):
        raise ValueError(
            f"steps must be one number or {rounds + 1}, for round 0 and {rounds} "
            f"further ones, none below 0; got {steps}"
        )
    return each


def _shares(
    request: Request,
    problem: Problem,
    rounds: int,
    schedule: str,
    sparsity: object,
    budget: object,
) -> tuple[float, ...]:
    """How far every round goes towards its own target."""
    if schedule not in ("geometric", "linear"):
        raise ValueError(f"schedule must be 'geometric' or 'linear', got {schedule!r}")
    given = sparsity if budget is None else budget
    if isinstance(given, Sequence) and not isinstance(given, str):
        return (1.0,) * rounds
    way = [k / rounds for k in range(1, rounds + 1)]
    left = _left(request, problem)
    if schedule == "linear" or not 0 < left < 1:
        return tuple(way)
    return (*((1 - left**part) / (1 - left) for part in way[:-1]), 1.0)


def _left(request: Request, problem: Problem) -> float:
    """The fraction that the last round leaves."""
    if request.budget is not None:
        assert problem.cost is not None  # there is one wherever there is a budget
        full = float(problem.cost.full)
        return budget_of(request.budget, full, request.cost) / full
    if isinstance(request.sparsity, Mapping):
        return 1 - max(request.sparsity.values(), default=0.0)
    assert request.sparsity is not None  # one of the two was given
    return 1 - request.sparsity


def _settings(plan: _Plan, schedule: str) -> dict[str, Any]:
    """What has to be the same when a run is resumed, as JSON."""
    first = plan.problem
    own = plan.decide and getattr(plan.decide, "settings", type(plan.decide).__name__)
    return {
        **({"decide": own} if own else {}),
        "groups": {name: group.size for name, group in first.groups.items()},
        "targets": [[_text(r.sparsity), _text(r.budget)] for r in plan.requests],
        "shares": list(plan.shares),
        "steps": list(plan.steps),
        "cost": _text(first.request.cost),
        "score": _text(first.request.score),
        "rewind": plan.rewind,
        "rescore": plan.rescore,
    }


def _text(value: object) -> str:
    plain = str, int, float, bool, Mapping, type(None)
    return str(value) if isinstance(value, plain) else type(value).__name__


def _unknown(options: Mapping[str, object]) -> dict[str, Any]:
    taken = {"rounds", "sparsity", "budget", "loss_fn", "progress"}
    return {n: v for n, v in options.items() if n not in OPTIONS or n in taken}
