"""Every selection goes through the same checks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quick_jit

from jaxprune import select
from jaxprune.core._groups import Group, Groups
from jaxprune.costing import Polynomial
from jaxprune.costing._polynomial import Term

pytestmark = pytest.mark.once

SIZES = {"a": 12, "one": 1, "b": 7}
GROUPS = Groups(
    {name: Group(name, size, ()) for name, size in SIZES.items()},
    (),
    {},
    jax.tree.structure({}),
)
COST = Polynomial(
    SIZES,
    (Term(2, (("a", 1),)), Term(3, (("a", 1), ("b", 1))), Term(5, (("one", 1),))),
)


@dataclasses.dataclass(frozen=True)
class Selector:
    """One way to decide.

    Attributes:
        select: scores -> masks, name -> bool.
        traced: it works under jit.
        moves: which permutations of the last axis it follows: all, or those of whole
            runs of this length.
    """

    select: Callable[[Any], Any]
    traced: bool = True
    moves: int = 1


def budget(method: str) -> Selector:
    return Selector(
        lambda s: select.to_budget(
            GROUPS, s, COST, budget=0.5 * COST.full, method=method
        ),
        traced=False,
    )


def layerwise(shares: Callable[..., Any]) -> Selector:
    return Selector(
        lambda s: select.per_group(GROUPS, s, sparsity=shares(s, sparsity=0.4)),
        traced=False,
    )


SELECTORS = {
    "per_group": Selector(lambda s: select.per_group(GROUPS, s, sparsity=0.5)),
    "per_group in blocks": Selector(
        lambda s: select.per_group(GROUPS, s, sparsity=0.5, multiple_of=3)
    ),
    "across_groups": Selector(lambda s: select.across_groups(GROUPS, s, sparsity=0.5)),
    "to_sizes": Selector(
        lambda s: select.to_sizes(GROUPS, s, {"a": 5, "b": 2, "one": 1})
    ),
    "remove_one": Selector(lambda s: select.remove_one(GROUPS, s, COST), traced=False),
    "greedy": budget("greedy"),
    "global": budget("global"),
    "uniform budget": budget("uniform"),
    "exact": budget("exact"),
    "lamp": layerwise(select.lamp),
    "uniform": layerwise(
        lambda s, sparsity: select.uniform(
            {n: np.zeros((1, k)) for n, k in SIZES.items()}, sparsity=sparsity
        )
    ),
    "per_leaf": Selector(lambda s: select.per_leaf(s, sparsity=0.5)),
    "across_leaves": Selector(lambda s: select.across_leaves(s, sparsity=0.5)),
    "n_of_m": Selector(lambda s: select.n_of_m(s, 2, 4, axis=-1), moves=4),
    "blocks": Selector(
        lambda s: {
            name: jnp.reshape(mask, SIZES[name])
            for name, mask in select.blocks(
                {n: jnp.asarray(x)[None] for n, x in s.items()},
                shape=(1, 2),
                sparsity=0.5,
            ).items()
        },
        moves=2,
    ),
}
EVERY = pytest.mark.parametrize("name", SELECTORS)


def draw(seed=0):
    """Scores without ties, exact in bfloat16."""
    rng = np.random.default_rng(seed)
    values = np.split(
        rng.permutation(sum(SIZES.values())), np.cumsum(list(SIZES.values()))[:-1]
    )
    return {name: x.astype(np.float32) for name, x in zip(SIZES, values, strict=True)}


def arrays(masks):
    return {name: np.asarray(masks[name]) for name in masks}


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, arrays(a), arrays(b))


@EVERY
def test_bools_of_the_size_and_nothing_empty(name):
    for scores in (draw(), {n: np.zeros(k, np.float32) for n, k in SIZES.items()}):
        masks = arrays(SELECTORS[name].select(scores))
        assert set(masks) == set(SIZES)
        for group, mask in masks.items():
            assert mask.dtype == bool and mask.shape == (SIZES[group],)
            assert mask.any(), "nothing is emptied"
        assert masks["one"].all(), "a single unit stays"


@EVERY
def test_something_goes_and_it_scores_least(name):
    scores = draw()
    masks = arrays(SELECTORS[name].select(scores))
    assert not all(mask.all() for mask in masks.values())
    if SELECTORS[name].moves > 1:
        return  # the least of its run or block, which tests/test_select_weights.py holds
    for group, mask in masks.items():
        if not mask.all():
            assert scores[group][~mask].max() < scores[group][mask].min()


@EVERY
def test_ties_are_decided_the_same_every_time(name):
    scores = {n: np.full(k, 0.1, np.float32) for n, k in SIZES.items()}
    once, again = (SELECTORS[name].select(dict(scores)) for _ in range(2))
    assert_equal(once, again)
    total = sum(int((~mask).sum()) for mask in arrays(once).values())
    assert 0 < total < sum(SIZES.values())


@EVERY
def test_a_positive_scale_changes_nothing(name):
    scores = draw()
    scaled = {n: 4 * x for n, x in scores.items()}
    assert_equal(SELECTORS[name].select(scores), SELECTORS[name].select(scaled))


@EVERY
def test_units_may_stand_in_any_order(name):
    selector, scores, rng = SELECTORS[name], draw(), np.random.default_rng(1)
    order = {}
    for group, size in SIZES.items():
        runs = np.arange(size - size % selector.moves).reshape(-1, selector.moves)
        rest = np.arange(runs.size, size)
        order[group] = np.concatenate([rng.permutation(runs).ravel(), rest])
    moved = selector.select({n: x[order[n]] for n, x in scores.items()})
    plain = arrays(selector.select(scores))
    assert_equal(moved, {n: mask[order[n]] for n, mask in plain.items()})


@EVERY
def test_scores_of_any_float_and_any_array(name):
    scores = draw()
    expected = SELECTORS[name].select(scores)
    for kind in (np.float64, jnp.bfloat16, np.float16):
        cast = {n: x.astype(kind) for n, x in scores.items()}
        assert_equal(SELECTORS[name].select(cast), expected)
    on_device = {n: jnp.asarray(x, jnp.bfloat16) for n, x in scores.items()}
    assert_equal(SELECTORS[name].select(on_device), expected)


@pytest.mark.parametrize("name", [n for n, s in SELECTORS.items() if s.traced])
def test_traced_scores_decide_the_same_without_retracing(name):
    traces = []

    @quick_jit
    def inside(scores):
        traces.append(1)
        return {
            n: jnp.asarray(mask) for n, mask in SELECTORS[name].select(scores).items()
        }

    ties = {n: np.round(x / 4) for n, x in draw(2).items()}
    for scores in (draw(0), draw(1), ties):
        assert_equal(inside(scores), SELECTORS[name].select(scores))
    assert len(traces) == 1


@EVERY
def test_nan_is_refused(name):
    scores = draw()
    scores["b"][2] = np.nan
    with pytest.raises(ValueError, match=r"b\]? is NaN"):
        SELECTORS[name].select(scores)
