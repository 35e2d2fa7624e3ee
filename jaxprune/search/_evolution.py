"""Evolution of widths, within a window of cost; and what it may look for."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.core._checks import finite
from jaxprune.costing import Cost
from jaxprune.search._counts import Counts
from jaxprune.search._sampling import Choices

_TRIES = 1000  # draws for one legal candidate


class Candidate(NamedTuple):
    """Widths and what they are worth.

    Attributes:
        fitness: larger is better.
        counts: group name -> count.
    """

    fitness: float
    counts: Counts


def within(
    cost: Cost, budget: float, least: float = 0.8
) -> Callable[[Mapping[str, int]], bool]:
    """The legality window: widths that cost between `least` of a budget and all of it.

    Args:
        cost: what is to be spent.
        budget: the highest cost allowed.
        least: the share of it to spend at least.

    Returns:
        ``counts -> bool``, for `evolve`.
    """
    budget, least = finite("budget", budget), finite("least", least)
    return lambda counts: bool(least * budget <= cost.value(counts) <= budget)


def evolve(
    fitness: Callable[[Mapping[str, int]], float],
    options: Choices,
    *,
    legal: Callable[[Mapping[str, int]], bool],
    seed: int,
    population: int = 50,
    parents: int = 10,
    mutations: int = 25,
    crossovers: int = 25,
    mutation_rate: float = 0.1,
    generations: int = 20,
    first: Iterable[Mapping[str, int]] = (),
) -> list[Candidate]:
    """Finds widths by selection, mutation and crossover.

    Every generation keeps the best `parents` seen so far and makes mutants of them
    (every width drawn anew with probability `mutation_rate`), crossings (every width
    from either parent) and, up to `population`, random candidates. What is illegal is
    drawn again; nothing is judged twice.

    Args:
        fitness: counts -> number, larger is better, such as `evaluator`.
        options: group name -> counts to choose from, see `choices`.
        legal: counts -> may they be tried? See `within`.
        seed: of the draws.
        population: candidates in a generation.
        parents: how many of the best have children.
        mutations: how many children are mutants.
        crossovers: how many are crossings.
        mutation_rate: in [0, 1].
        generations: how many, the random first one included.
        first: candidates of the first generation, before random ones.

    Returns:
        Everything judged, the best first.

    Raises:
        ValueError: if no legal candidate is found in 1000 random draws.

    Example:
        >>> found = evolve(lambda c: -abs(c["a"] - 7), {"a": range(1, 65)}, seed=0,
        ...                legal=lambda c: c["a"] % 2 == 0, generations=5)
        >>> found[0].counts["a"] in (6, 8)
        True

    References:
        Liu et al., `MetaPruning <https://arxiv.org/abs/1903.10258>`_, 2019
    """
    rng = np.random.default_rng(seed)
    search = _Search(fitness, options, legal, rng)
    start = (c for c in itertools.chain(first, search.at_random()) if legal(c))
    search.judge(itertools.islice(start, population))
    for _ in range(generations - 1):
        best = [each.counts for each in search.ranked()[:parents]]
        mutants = (search.mutant(best, mutation_rate) for _ in itertools.count())
        crossed = (search.crossing(best) for _ in itertools.count())
        search.fill(mutants, mutations)
        search.fill(crossed, crossovers)
        search.fill(search.at_random(), population - mutations - crossovers)
    return search.ranked()


class _Search:
    """What has been judged, and how new candidates are drawn."""

    def __init__(
        self, fitness: Any, options: Choices, legal: Any, rng: np.random.Generator
    ) -> None:
        self.fitness, self.legal, self.rng = fitness, legal, rng
        self.options = {name: list(own) for name, own in options.items()}
        self.found: dict[tuple[int, ...], Candidate] = {}

    def ranked(self) -> list[Candidate]:
        return sorted(self.found.values(), key=lambda each: -each.fitness)

    def judge(self, some: Iterable[Mapping[str, int]]) -> None:
        for counts in some:
            own = {name: int(counts[name]) for name in self.options}
            key = tuple(own.values())
            if key not in self.found:
                self.found[key] = Candidate(float(self.fitness(own)), own)

    def fill(self, source: Iterable[Mapping[str, int]], number: int) -> None:
        """Judges some new legal candidates, as many as a bounded search finds."""
        drawn = itertools.islice(source, 20 * max(number, 0))
        new = (c for c in drawn if tuple(c.values()) not in self.found)
        self.judge(itertools.islice(filter(self.legal, new), max(number, 0)))

    def at_random(self) -> Iterable[Counts]:
        failed = 0
        while failed < _TRIES:
            counts = {n: int(self.rng.choice(own)) for n, own in self.options.items()}
            failed = 0 if self.legal(counts) else failed + 1
            yield counts
        raise ValueError(
            f"{_TRIES} random candidates in a row are not legal; is the budget below "
            "what the smallest choices cost? Else widen the window, or give legal ones "
            "as first="
        )

    def mutant(self, parents: Sequence[Counts], rate: float) -> Counts:
        parent = parents[int(self.rng.integers(len(parents)))]
        return {
            name: int(self.rng.choice(own))
            if self.rng.random() < rate
            else parent[name]
            for name, own in self.options.items()
        }

    def crossing(self, parents: Sequence[Counts]) -> Counts:
        pair = self.rng.integers(len(parents), size=2)
        return {n: parents[pair[self.rng.integers(2)]][n] for n in self.options}


def pruning_reward(
    accuracy: float, cost: float, *, base_accuracy: float, base_cost: float
) -> float:
    r"""The reward of rewarded meta-pruning: accuracy against what is saved.

    .. math::
        \Big( \frac{A_0}{A_0 - A} \Big)^2 \cdot \Big( - \ln \frac{C}{C_0} \Big)

    It has a pole at :math:`A = A_0` and falls above it, so accuracies must stay below
    :math:`A_0`.

    Args:
        accuracy: A.
        cost: C, such as FLOPs.
        base_accuracy: :math:`A_0`, above every accuracy that may occur.
        base_cost: :math:`C_0`, of the whole network.

    Returns:
        The reward; 0 for the whole network.

    Raises:
        ValueError: if the accuracy reaches the base, or a cost is not above 0.

    Example:
        >>> round(pruning_reward(70.0, 1.0, base_accuracy=77.0, base_cost=2.718282), 3)
        121.0

    References:
        Shibu et al., `Rewarded meta-pruning <https://arxiv.org/abs/2301.11063>`_, 2023
    """
    if accuracy >= base_accuracy:
        raise ValueError(
            f"accuracy={accuracy} reaches base_accuracy={base_accuracy}, where the "
            "reward has a pole; give a base above every accuracy, such as 1 or 100"
        )
    if cost <= 0 or base_cost <= 0:
        raise ValueError(f"costs must be above 0, got {cost} and {base_cost}")
    return (base_accuracy / (base_accuracy - accuracy)) ** 2 * -math.log(
        cost / base_cost
    )


def width_prior(
    judged: Sequence[tuple[Mapping[str, int], float]],
    options: Choices,
    cost: Cost,
    budget: float,
    *,
    best: int = 100,
    steps: int = 2000,
    learning_rate: float = 0.1,
    penalty: float = 1000.0,
) -> dict[str, np.ndarray]:
    r"""Probabilities of widths that the best networks seen so far speak for.

    With the mean loss :math:`E_{l,w}` of the networks that give group l the width w,
    descends

    .. math::
        \frac{1}{L} \sum_l p_l \cdot E_l
        + \lambda \Big( 1 - \frac{\mathbb{E}[cost]}{budget} \Big)^2,
        \qquad p_l = \mathrm{softmax}(P_l).

    A width that no network had gets the largest loss of all.

    Args:
        judged: ``(counts, loss)`` of networks.
        options: group name -> counts to choose from.
        cost: what is to be spent; its value at the mean widths stands for the mean.
        budget: the cost to aim at.
        best: how many of the networks count, those of the lowest loss.
        steps: of Adam.
        learning_rate: of Adam.
        penalty: :math:`\lambda`.

    Returns:
        Group name -> probabilities of its choices, to draw a first population from.

    Raises:
        ValueError: if no network was judged.

    References:
        Su et al., `BCNet: Searching for Network Width with Bilaterally Coupled Network
        <https://arxiv.org/abs/2105.10533>`_, 2021
    """
    if not judged:
        raise ValueError("judged holds no network; train and evaluate some first")
    chosen = sorted(judged, key=lambda each: each[1])[:best]
    worst = max(loss for _, loss in chosen)
    losses = {
        name: jnp.array([_mean_loss(chosen, name, w, worst) for w in own], jnp.float32)
        for name, own in options.items()
    }
    widths = {name: jnp.array(own, jnp.float32) for name, own in options.items()}

    def objective(logits: object) -> jax.Array:
        p = jax.tree.map(jax.nn.softmax, logits)
        loss = sum(jnp.sum(p[n] * losses[n]) for n in p) / len(p)
        mean = {n: jnp.sum(p[n] * widths[n]) for n in p}
        spent = jnp.asarray(cost.value(mean), jnp.float32)
        return loss + penalty * (1 - spent / budget) ** 2

    tx = optax.adam(learning_rate)

    def step(carry: Any, _: object) -> Any:
        logits, state = carry
        updates, state = tx.update(jax.grad(objective)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    start = jax.tree.map(jnp.zeros_like, widths)
    descend = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[0])
    with jax.numpy_dtype_promotion("standard"):  # Adam's correction of its bias
        logits, _ = descend((start, tx.init(start)))
    return jax.device_get(jax.tree.map(jax.nn.softmax, logits))


def prior_population(
    prior: Mapping[str, Any], options: Choices, *, number: int, seed: int
) -> list[Counts]:
    """Draws widths from a prior, such as that of `width_prior`, for `evolve`.

    Args:
        prior: group name -> probabilities of its choices.
        options: group name -> counts to choose from.
        number: how many networks.
        seed: of the draws.

    Returns:
        Counts of each, for ``evolve(first=...)``, which leaves out illegal ones.

    Raises:
        ValueError: if a group of `options` has no probabilities, or not as many as
            choices.

    Example:
        >>> prior_population({"a": [0.0, 1.0]}, {"a": (2, 4)}, number=2, seed=0)
        [{'a': 4}, {'a': 4}]
    """
    for name, counts in options.items():
        if name not in prior or len(prior[name]) != len(counts):
            raise ValueError(
                f"the prior of {name} has {len(prior.get(name, ()))} probabilities, "
                f"expected one for each of its {len(counts)} choices"
            )
    rng = np.random.default_rng(seed)
    shares = {name: np.asarray(prior[name], float) for name in options}
    return [
        {
            name: int(rng.choice(own, p=shares[name] / shares[name].sum()))
            for name, own in options.items()
        }
        for _ in range(number)
    ]


def _mean_loss(judged: Any, name: str, width: int, worst: float) -> float:
    own = [loss for counts, loss in judged if counts[name] == width]
    return float(np.mean(own)) if own else worst
