"""One search: agents try cuts of some groups, many at a time, and learn from them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxprune.core._checks import whole_number
from jaxprune.core._groups import Groups
from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import apply_masks, expand_masks
from jaxprune.core._names import listed
from jaxprune.core._progress import advancing
from jaxprune.core._types import PyTree
from jaxprune.recipes._targets import cuttable
from jaxprune.recipes._training import batch_at, default_step, first_state
from jaxprune.search._agents import Agent, unit_weights
from jaxprune.search._reinforce import (
    Advantage,
    advantages,
    check_drop_bound,
    repaired,
    reward,
    surrogate,
)
from jaxprune.statistics import taps

Metric = Callable[[PyTree, Any], Any]
Decision = Literal["likeliest", "best candidate", "nothing cut"]


@dataclasses.dataclass(frozen=True, eq=False)
class FineTune:
    """How every candidate is trained before it is measured.

    All candidates of an update start from the same variables and see the same batches,
    so that they differ by what they cut and by nothing else.

    Attributes:
        loss_fn: ``(variables, batch) -> loss``, or ``(loss, new collections)``.
        tx: the `optax.GradientTransformation`; every candidate starts its own state.
        data: batches of equal shapes: a sequence, or a function of the number of the
            step.
        steps: how many, at least 1.
    """

    loss_fn: Callable[[PyTree, Any], Any]
    tx: optax.GradientTransformation
    data: Sequence[Any] | Callable[[int], Any]
    steps: int

    def __post_init__(self) -> None:
        whole_number("FineTune.steps", self.steps)


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """What agents have learned about some groups.

    Attributes:
        keep: group -> bool ``[size]``, True = kept: for `expand_masks`.
        probabilities: group -> float ``[size]``, how likely the agent keeps each unit.
        decision: where `keep` is from. "likeliest" takes every unit whose probability
            is above 1/2, if that is worth at least as much as the "best candidate" that
            was tried; "nothing cut" if neither is worth more than 0.
        metric: of the net that `keep` leaves, fine-tuned as candidates are.
        baseline: what it is compared with.
        reward: what `keep` is worth; at least 0, so the drop is within the bound.
        rewards: of all candidates, float ``[updates, candidates]``.
    """

    keep: dict[str, np.ndarray]
    probabilities: dict[str, np.ndarray]
    decision: Decision
    metric: float
    baseline: float
    reward: float
    rewards: np.ndarray


def learn_keep(
    groups: Groups,
    variables: PyTree,
    metric_fn: Metric,
    batches: Sequence[object],
    *,
    drop_bound: float,
    only: str | Sequence[str] | None = None,
    baseline: float | None = None,
    fine_tune: FineTune | None = None,
    updates: int = 100,
    candidates: int = 5,
    at_once: int | None = None,
    learning_rate: float = 0.01,
    advantage: Advantage = "mean",
    agent: Agent | None = None,
    patience: int | None = None,
    key: jax.Array | None = None,
    progress: bool | None = None,
) -> Learned:
    r"""Lets an agent per group try out which units to keep (Algorithm 1 of the paper).

    In every update the agents draw `candidates` cuts from what they think of every
    unit. Each is fine-tuned if that is asked for, measured, and rewarded by `reward`:
    the units saved times the share of the allowed drop that is left. The agents follow
    the gradient of the expected reward (REINFORCE),

    .. math:: \theta \leftarrow \theta + \eta \, \frac{1}{M} \sum_{j=1}^M
        \Big( R_j - \frac{1}{M} \sum_k R_k \Big) \nabla_\theta \log \pi_\theta(A_j)

    with Adam. An update is one compiled program that holds all candidates side by side:
    without fine-tuning as gates on activations, so that weights are read once for all;
    with it as masks of the variables. No net is cut until the decision is made.

    Args:
        groups: what ``trace(..., roles=True)`` returned; without roles agents read the
            weights of consumers too.
        variables: tree of arrays, of a trained net.
        metric_fn: ``(variables, batch) -> number``, larger is better, jit-able; such as
            the accuracy in points. A candidate is worth the mean over `batches`.
        batches: held-out batches of equal shapes, apart from those for training.
        drop_bound: how much the metric may fall, in its own units, above 0.
        only: names or patterns of the groups; None for all. One agent a group, one
            decision for all.
        baseline: what drops are counted from; None for the metric of `variables`.
        fine_tune: how candidates are trained before they are measured; None for not.
        updates: of the agents; the paper's 100 for recognition, 200 for segmentation.
        candidates: cuts in an update; the paper's 5.
        at_once: how many of them run side by side, to spare memory; None for all.
        learning_rate: of Adam; the paper's 0.01 for recognition, 0.001 for
            segmentation.
        advantage: "mean" or "leave_one_out", see `advantages`.
        agent: the network of the agents; None for `Agent()`.
        patience: stop once the likeliest cut has been the same for so many updates;
            None for never.
        key: random key; None for ``jax.random.key(0)``.
        progress: show a progress bar? None for on a terminal.

    Returns:
        The decision, and how it came about.

    Raises:
        ValueError: if `drop_bound` is 0 or below, `only` names no group, a group is not
            exact or balanced, or batches have different shapes.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):  # the third of its hidden units does nothing
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.eye(3), "w2": jnp.array([[1.0], [1.0], [0.0]])}
        >>> x = jnp.ones((4, 3))
        >>> groups = jaxprune.trace(mlp, params, x, roles=True)
        >>> learned = learn_keep(
        ...     groups, params, lambda params, x: -jnp.abs(mlp(params, x) - 2).mean(),
        ...     [x], drop_bound=0.5, updates=60, learning_rate=0.03)
        >>> learned.keep
        {'w1:1': array([ True,  True, False])}

    References:
        Huang et al., `Learning to Prune Filters in Convolutional Neural Networks
        <https://arxiv.org/abs/1801.07365>`_, WACV 2018
    """
    check_drop_bound(drop_bound)
    whole_number("candidates", candidates)
    advantages(jnp.zeros(candidates), advantage)  # complains early
    names = chosen_groups(groups, only)
    leaves = named_leaves(variables)
    trial = _Trial(
        sizes={name: groups[name].size for name in names},
        measure=measured(groups, names, variables, metric_fn, batches, fine_tune),
        weights={name: unit_weights(groups[name], leaves) for name in names},
        held=stacked(batches),
        agent=agent or Agent(),
        tx=optax.adam(learning_rate),
        drop_bound=drop_bound,
        advantage=advantage,
        candidates=candidates,
        at_once=at_once,
    )
    if baseline is None:
        plain = jax.jit(lambda v, held: mean_metric(metric_fn, v, held))
        baseline = float(plain(variables, trial.held))

    def point(number: int) -> tuple[PyTree, Any, jax.Array]:
        return variables, fresh_batches(fine_tune, number), jnp.float32(baseline)

    key = jax.random.key(0) if key is None else key
    with advancing(f"agents of {listed(names, 2)}", updates, progress) as advance:
        tried = _search(trial, key, point, updates, patience, advance)
    return _decided(trial, tried, point(updates), baseline)


class _Tried(NamedTuple):
    """What the updates of a search have come to.

    Attributes:
        params: weights of all agents.
        best: the candidate of the largest reward; None if no reward was above 0.
        rewards: of all candidates, update by update.
    """

    params: Mapping[str, PyTree]
    best: np.ndarray | None
    rewards: list[np.ndarray]


def _search(
    trial: "_Trial",
    key: jax.Array,
    point: Callable[[int], tuple[object, ...]],
    updates: int,
    patience: int | None,
    advance: Callable[[], None],
) -> _Tried:
    """Updates the agents, until the likeliest cut has been the same for `patience`."""
    start, draws = jax.random.split(key)
    update, state = jax.jit(trial.update), trial.init(start)
    rewards: list[np.ndarray] = []
    best, cut = 0.0, None  # nothing cut is worth 0
    steady, last = 0, b""
    for number in range(updates):
        state, found = update(state, jax.random.fold_in(draws, number), *point(number))
        here = np.asarray(found.rewards)
        rewards.append(here)
        if here.max() > best:
            best, cut = float(here.max()), np.asarray(found.actions)[here.argmax()]
        advance()
        now = np.asarray(found.likeliest).tobytes()
        steady, last = (steady + 1 if now == last else 0), now
        if patience is not None and steady >= patience:
            break
    return _Tried(state.params, cut, rewards)


def _decided(
    trial: "_Trial", tried: _Tried, point: tuple[object, ...], baseline: float
) -> Learned:
    """The likeliest decision or the best candidate, assessed side by side."""
    logits = trial.logits(tried.params)
    rows = [np.asarray(trial.repaired(logits > 0, logits))]
    rows += [] if tried.best is None else [tried.best]
    assess = jax.jit(trial.assess)
    metrics, worth = map(np.asarray, assess(jnp.asarray(np.stack(rows)), *point))
    pick = int(worth.argmax())
    decision: Decision = "best candidate" if pick else "likeliest"
    units, metric, gain = rows[pick], float(metrics[pick]), float(worth[pick])
    if not gain > 0:
        decision, units = "nothing cut", np.ones_like(rows[0])
        metric, gain = baseline, 0.0
    none = np.zeros((0, trial.candidates))
    return Learned(
        keep=trial.split(units),
        probabilities=trial.split(np.asarray(jax.nn.sigmoid(logits))),
        decision=decision,
        metric=metric,
        baseline=baseline,
        reward=gain,
        rewards=np.stack(tried.rewards) if tried.rewards else none,
    )


class _State(NamedTuple):
    """Weights of all agents, and their optimiser's state."""

    params: Mapping[str, PyTree]
    opt_state: optax.OptState


class _Found(NamedTuple):
    """What an update tells: rewards, the decisions tried, and the likeliest."""

    rewards: jax.Array
    actions: jax.Array
    likeliest: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class _Trial:
    """All that stays the same in a search.

    Attributes:
        sizes: group -> how many units; decisions of all groups stand in one row.
        measure: ``(keep, variables, training batches, held batches) -> metric``.
        weights: group -> what its agent reads.
        held: batches to measure on, stacked.
        agent: the network of the agents.
        tx: their optimiser.
        drop_bound: see `learn_keep`, as the rest.
        advantage: form of the advantages.
        candidates: in an update.
        at_once: of them; None for all.
    """

    sizes: Mapping[str, int]
    measure: Callable[..., jax.Array]
    weights: Mapping[str, jax.Array]
    held: object
    agent: Agent
    tx: optax.GradientTransformation
    drop_bound: float
    advantage: Advantage
    candidates: int
    at_once: int | None

    def init(self, key: jax.Array) -> _State:
        keys = jax.random.split(key, len(self.sizes))
        params = {
            name: self.agent.init(own, self.weights[name])
            for own, name in zip(keys, self.sizes, strict=True)
        }
        return _State(params, self.tx.init(params))

    def logits(self, params: Mapping[str, PyTree]) -> jax.Array:
        """Log-odds of all units, ``[units]``."""
        found = [self.agent(params[name], self.weights[name]) for name in self.sizes]
        return jnp.concatenate(found)

    def split(self, row: Any) -> dict[str, Any]:
        """Group -> its part of a row, or rows, of all units."""
        xp = np if isinstance(row, np.ndarray) else jnp
        ends = np.cumsum(list(self.sizes.values()))[:-1].tolist()
        return dict(zip(self.sizes, xp.split(row, ends, axis=-1), strict=True))

    def repaired(self, rows: jax.Array, logits: jax.Array) -> jax.Array:
        """Decisions ``[..., units]`` after which every group has a unit left."""
        odds = self.split(logits)
        parts = [repaired(own, odds[name]) for name, own in self.split(rows).items()]
        return jnp.concatenate(parts, -1)

    def assess(
        self, actions: jax.Array, variables: PyTree, seen: Any, baseline: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Metrics and rewards of decisions ``[M, units]``."""

        def one(action: jax.Array) -> jax.Array:
            return self.measure(self.split(action), variables, seen, self.held)

        if self.at_once is None:
            metrics = jax.vmap(one)(actions)
        else:
            metrics = lax.map(one, actions, batch_size=self.at_once)
        total = sum(self.sizes.values())
        options = {"baseline": baseline, "drop_bound": self.drop_bound}
        return metrics, reward(metrics, actions.sum(-1), total, **options)

    def update(
        self,
        state: _State,
        key: jax.Array,
        variables: PyTree,
        seen: Any,
        baseline: jax.Array,
    ) -> tuple[_State, _Found]:
        """Draws, measures and learns; the key is consumed."""
        logits = self.logits(state.params)
        shape = (self.candidates, logits.shape[0])
        drawn = jax.random.bernoulli(key, jax.nn.sigmoid(logits)[None], shape)
        tried = self.repaired(drawn, logits)
        _, rewards = self.assess(tried, variables, seen, baseline)

        def loss(params: Mapping[str, PyTree]) -> jax.Array:
            # What was drawn, not what became of it: the repair is the world's.
            return -surrogate(self.logits(params), drawn, rewards, self.advantage)

        slopes = jax.grad(loss)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # Adam counts in integers
            steps, opt_state = self.tx.update(slopes, state.opt_state, state.params)
        params = optax.apply_updates(state.params, steps)
        return _State(cast(Mapping[str, PyTree], params), opt_state), _Found(
            rewards, tried, logits > 0
        )


def measured(
    groups: Groups,
    names: Sequence[str],
    variables: PyTree,
    metric_fn: Metric,
    batches: Sequence[object],
    fine_tune: FineTune | None,
) -> Callable[..., jax.Array]:
    """``(keep, variables, seen, held) -> metric`` of a candidate, for `jax.vmap`."""

    def masked(
        keep: Mapping[str, jax.Array], variables: PyTree, seen: object, held: object
    ) -> jax.Array:
        masks = expand_masks(groups, keep)
        if fine_tune is not None:
            variables = _tuned(fine_tune, masks, variables, seen)
        return mean_metric(metric_fn, apply_masks(variables, masks), held)

    gated = taps.gate(metric_fn, groups)

    def with_gates(
        keep: Mapping[str, jax.Array], variables: PyTree, seen: object, held: object
    ) -> jax.Array:
        del seen
        gates = {name: units.astype(jnp.float32) for name, units in keep.items()}

        def metric(variables: PyTree, batch: object) -> Any:
            return gated(gates, variables, batch)

        return mean_metric(metric, variables, held)

    if fine_tune is not None:
        return masked
    ones = {name: jnp.ones(groups[name].size) for name in names}
    try:
        jax.eval_shape(gated, ones, variables, next(iter(batches)))
    except ValueError:  # inside a branch, where no gate can act
        return masked
    return with_gates


def _tuned(how: FineTune, masks: PyTree, variables: PyTree, seen: Any) -> PyTree:
    """The variables after some steps in which what is masked stays 0."""

    def loss_fn(variables: PyTree, batch: Any) -> Any:
        return how.loss_fn(apply_masks(variables, masks), batch)

    step = default_step(loss_fn, how.tx, None)
    state = first_state(variables, how.tx, jax.random.key(0))
    final, _ = lax.scan(lambda state, batch: (step(state, batch), None), state, seen)
    return final.variables


def fresh_batches(fine_tune: FineTune | None, number: int) -> Any:
    """The training batches of an update, stacked; the same for all its candidates."""
    if fine_tune is None:
        return ()
    first, data = number * fine_tune.steps, fine_tune.data
    return stacked([batch_at(data, first + k) for k in range(fine_tune.steps)])


def mean_metric(metric_fn: Metric, variables: PyTree, held: object) -> jax.Array:
    """The mean over stacked batches, one after the other."""

    def one(batch: object) -> jax.Array:
        return jnp.asarray(metric_fn(variables, batch)).astype(jnp.float32)

    return lax.map(one, held).mean()


def stacked(batches: Sequence[object]) -> Any:
    """Batches of equal shapes as one, along a new first axis.

    Raises:
        ValueError: if there are none, or they have different shapes.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty, so no candidate can be measured")
    shapes = [list(map(np.shape, jax.tree.leaves(batch))) for batch in batches]
    for k, each in enumerate(shapes):
        if each != shapes[0]:
            raise ValueError(
                f"batch {k} has shapes {each}, but the first has {shapes[0]}; "
                "candidates are measured on stacked batches, so leave out the last if "
                "it is smaller"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def chosen_groups(groups: Groups, only: str | Sequence[str] | None) -> list[str]:
    """The groups that agents decide on, in the order of the program.

    Raises:
        ValueError: if there is none, or one for which units cannot go one by one.
    """
    names = cuttable(groups, only, exact=False)
    for name in names:
        if groups[name].blocks > 1:
            raise ValueError(
                f"group {name} is balanced: every block loses as many units, but "
                "agents decide on units one by one; trace without balanced="
            )
        if not groups[name].exact:
            raise ValueError(
                f"group {name} cannot be cut exactly, so candidates would not be what "
                f"is cut in the end: {groups[name].why}; leave it out of only="
            )
    return names
