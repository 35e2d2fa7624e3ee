"""Where the widths of an arm come from, and what finding them has cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.slimmable.bench import (
    BATCH,
    Bench,
    Counts,
    Traced,
    Widths,
    forward,
    optimiser,
)
from jaxprune import search
from jaxprune.training.distillation import label_loss

SHARES = (1.0, 0.75, 0.5)  # of S-Net
BASES = (1.0, 0.75)  # of SP-Net: width 1 comes from the first, width 2 from the second
LEAST, JUDGED, BINS = 0.1, 256, 8
# The sum over steps of learning rate * penalty / (1 - momentum) is 0.6 in the training
# of a base; those of the paper are 0.3 to 2.6, at 1e-5 and 1e-4 over far more steps.
PENALTY = 1e-2


class Base(NamedTuple):
    """A network trained by itself.

    Attributes:
        share: of the units of every group that it has.
        variables: its variables.
        apply_fn: the net narrowed to it.
        spent: multiply-adds of its training, forwards.
    """

    share: float
    variables: Any
    apply_fn: Any
    spent: float


class Found(NamedTuple):
    """Widths, the weights that joint training starts from, and the cost so far.

    Attributes:
        keeps: for every width what stays.
        start: variables of the widest network.
        spent: multiply-adds of training so far, forwards.
        zero_padded: are the writers of streams pruned by themselves?
        order: what a count keeps; None for the units with the largest scales.
    """

    keeps: Widths
    start: Any
    spent: float
    zero_padded: bool = False
    order: Any = None


def uniform(bench: Bench) -> Sequence[Counts]:
    """The widths of S-Net."""
    return search.uniform(bench.groups, SHARES)


def total_cost(bench: Bench, keeps: Widths) -> float:
    """Multiply-adds of an image at every width, together."""
    return float(sum(bench.cost.value(each) for each in keeps))


def base(bench: Bench, share: float, epochs: float, seed: int) -> Base:
    """The network of this share of the units, trained with the L1 of scales."""
    counts = search.uniform(bench.groups, (share,))
    slim = bench.slim(bench.init(seed), counts)
    steps = int(epochs * len(bench.train_set[0])) // BATCH
    own = slim.at(0, bench.train(slim, steps, seed, l1=PENALTY))
    spent = steps * BATCH * total_cost(bench, counts)
    return Base(share, own.variables, own.apply_fn, spent)


def scores_of(bench: Bench, own: Base, *, zero_padded: bool = False) -> Any:
    """Groups of a base, and the scales of what may be pruned by itself."""
    one = bench.train_set[0][:1]
    groups = Traced(own.apply_fn, own.variables, one, zero_padded=zero_padded).groups
    streams = {group.stream for group in groups.values()} - {""}
    names = [name for name in groups if name not in streams]
    return groups, search.importance(groups, own.variables, only=names)


def counts_at(
    bench: Bench, scored: Any, ratio: float, before: Sequence[Counts]
) -> dict[str, int]:
    """Counts of a width that keeps this share of its base, within those before."""
    own = search.threshold_counts(*scored, keep_ratio=ratio, min_ratio=LEAST)
    return search.multi_base(bench.groups, [*before, own])[-1]


def units_at(
    bench: Bench, scored: Any, ratio: float, before: Mapping[str, Any], first: Any
) -> dict[str, Any]:
    """Likewise where writers of streams are pruned by themselves: bools by group.

    What a writer keeps are the units with the largest scales in the first base.
    """
    groups, scores = scored
    inner, writers = (
        search.threshold_counts(groups, scores, keep_ratio=ratio, min_ratio=least)
        for least in (LEAST, LEAST / 2)
    )
    counts = {n: (writers if groups[n].stream else inner)[n] for n in inner}
    ranks = {n: np.argsort(np.argsort(-first[n])) for n in counts}
    own = {n: (ranks[n] < k) & before[n] for n, k in counts.items()}
    return search.fused(bench.traced(zero_padded=True).groups, own)


def pruned(
    bench: Bench, scored: Sequence[Any], like: Sequence[Counts]
) -> list[dict[str, int]]:
    """Counts of every width, each from its base, within the cost of these widths."""
    found: list[Mapping[str, int]] = []
    for base, width in zip(scored, like[1:], strict=True):

        def counts(ratio: float, base: Any = base) -> Any:
            return counts_at(bench, base, ratio, found)

        found.append(bisect(counts, bench.cost.value, bench.cost.value(width)))
    return search.multi_base(bench.groups, found)


def zero_padded(
    bench: Bench, scored: Sequence[Any], like: Sequence[Counts]
) -> list[dict[str, Any]]:
    """Likewise with the writers of streams pruned by themselves; streams fuse them."""
    whole = bench.traced(zero_padded=True)
    keeps = [{n: np.ones(group.size, bool) for n, group in whole.groups.items()}]

    def value(keep: Any) -> float:
        return float(whole.cost.value({n: int(k.sum()) for n, k in keep.items()}))

    for base, width in zip(scored, like[1:], strict=True):

        def units(ratio: float, base: Any = base) -> Any:
            return units_at(bench, base, ratio, keeps[-1], scored[0][1])

        keeps.append(bisect(units, value, float(bench.cost.value(width))))
    return keeps


def bisect(
    widths: Callable[[float], Any], cost: Callable[[Any], Any], budget: float
) -> Any:
    """The widths of the largest ratio within the budget."""
    low, high = 0.01, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = cost(widths(middle)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return widths(low)


def fine_tuned(bench: Bench, own: Base, counts: Counts, epochs: float, s: int) -> Base:
    """A base pruned to these counts and trained on: a turn of iterative pruning."""
    slim = bench.slim(own.variables, [counts])
    steps = int(epochs * len(bench.train_set[0])) // BATCH
    small = slim.at(0, bench.train(slim, steps, s, l1=PENALTY))
    spent = steps * BATCH * total_cost(bench, [counts])
    return Base(own.share, small.variables, small.apply_fn, spent)


def greedy(bench: Bench, spend: float, seed: int) -> Found:
    """AutoSlim: a slimmable network, slimmed where that costs least of its error."""
    keeps = uniform(bench)
    slim = bench.slim(bench.init(seed), keeps, private=())
    steps = int(spend / total_cost(bench, keeps)) // BATCH
    start = bench.train(slim, steps, seed, alpha=1.0)
    budgets = [float(bench.cost.value(each)) for each in keeps[1:]]
    error = _error(bench, start)
    found = search.greedy_slimming(bench.groups, error, bench.cost, budgets, steps=BINS)
    widths = search.multi_base(bench.groups, found)
    spent = steps * BATCH * total_cost(bench, keeps)
    return Found(widths, start, spent, order=_in_place(bench))


def evolved(bench: Bench, spend: float, seed: int) -> Found:
    """BCNet: a supernet whose units serve all widths alike, and evolution in it."""
    keeps, start = uniform(bench), bench.init(seed)
    one_step = 4 * BATCH * float(bench.cost.value({}))
    steps = int(spend / one_step)
    tx = optimiser(start["params"], steps)
    options = search.choices(bench.groups, BINS)
    step = search.bilateral_step(bench.net.apply, bench.groups, tx, forward, options)
    key = jax.random.key(seed)
    state = search.JointState(start, tx.init(start["params"]), key)
    start = bench.run(step, state, steps, seed)
    error, found = _error(bench, start, ("first", "last")), []
    for each in keeps[1:]:
        best = search.evolve(
            lambda counts: -error(counts),
            options,
            legal=search.within(bench.cost, float(bench.cost.value(each))),
            seed=seed,
            first=[each],
            population=20,
            parents=5,
            mutations=8,
            crossovers=8,
            generations=4,
        )
        found.append(best[0].counts)
    widths = search.multi_base(bench.groups, found)
    return Found(widths, start, steps * one_step, order=_in_place(bench))


def _in_place(bench: Bench) -> Any:
    """The order that units have: the first matter most."""
    return {n: -np.arange(float(group.size)) for n, group in bench.groups.items()}


def _error(bench: Bench, variables: Any, sides: Any = ("first",)) -> Any:
    """The error at any widths on images of the training set, statistics theirs."""
    batch = tuple(part[-JUDGED:] for part in bench.train_set)

    def loss_fn(variables: Any, batch: Any) -> Any:
        logits, _ = forward(bench.net.apply, variables, batch)
        return label_loss(logits, batch[1]).mean()

    return search.masked_error(bench.groups, loss_fn, variables, batch, sides=sides)
