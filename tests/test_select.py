import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import select
from jaxprune.core._groups import Group, Groups
from jaxprune.core._masks import expand_masks
from jaxprune.scores import group_scores

pytestmark = pytest.mark.once


def bare(**sizes):
    found = {name: Group(name, size, ()) for name, size in sizes.items()}
    return Groups(found, (), {}, jax.tree.structure({}))


def distinct(groups, seed=0):
    """Scores without ties, every group on its own scale."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.permutation(group.size) * 10.0**k + rng.random() + k
        for k, (name, group) in enumerate(groups.items())
    }


def kept(keep):
    return {name: int(units.sum()) for name, units in keep.items()}


def assert_lowest_go(keep, scores):
    """No removed unit scores higher than a kept one of its group."""
    for name, units in keep.items():
        values = np.asarray(scores[name])
        if units.any() and not units.all():
            assert values[~units].max() <= values[units].min(), name


@pytest.mark.parametrize(
    ("size", "sparsity", "left"),
    [
        (10, 0.9, 1),
        (100, 0.9, 10),
        (64, 0.3, 45),
        (5, 0.5, 3),
        (7, 0.5, 3),
        (10, 0.99, 1),
    ],
)
def test_per_group_removes_the_rounded_count(size, sparsity, left):
    groups = bare(g=size)
    scores = distinct(groups)
    keep = select.per_group(groups, scores, sparsity=sparsity)
    assert kept(keep) == {"g": left}
    assert_lowest_go(keep, scores)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("how", [select.per_group, select.across_groups])
def test_equal_scores_lose_exactly_what_was_asked(how, sparsity):
    groups = bare(a=40, b=20, c=20)
    scores = {name: np.full(group.size, 0.1) for name, group in groups.items()}
    keep = how(groups, scores, sparsity=sparsity)
    left = kept(keep)
    assert sum(left.values()) == 80 - round(sparsity * 80)
    for name, group in groups.items():
        assert abs(left[name] - (1 - sparsity) * group.size) <= 1, "in proportion"
    again = how(groups, scores, sparsity=sparsity)
    jax.tree.map(np.testing.assert_array_equal, keep, again)


def test_zeros_do_not_all_go():
    groups = bare(g=40)
    scores = {"g": np.where(np.arange(40) < 8, 0.0, 1.0 + np.arange(40))}
    keep = select.across_groups(groups, scores, sparsity=0.1)
    np.testing.assert_array_equal(np.flatnonzero(~keep["g"]), [4, 5, 6, 7])


def test_across_groups_is_the_sort_of_all_scores():
    groups = bare(a=9, b=7, c=12)
    rng = np.random.default_rng(0)
    scores = {name: rng.random(group.size) for name, group in groups.items()}
    keep = select.across_groups(groups, scores, sparsity=0.4)
    every = np.concatenate(list(scores.values()))
    threshold = np.sort(every)[round(0.4 * every.size)]
    for name, values in scores.items():
        np.testing.assert_array_equal(keep[name], values >= threshold)


def test_a_layer_below_the_threshold_keeps_one_unit_and_others_pay():
    groups = bare(low=20, high=20)
    scores = {"low": np.arange(20) * 1e-6, "high": 1.0 + np.arange(20)}
    keep = select.across_groups(groups, scores, sparsity=0.6)
    assert kept(keep) == {"low": 1, "high": 15}
    assert_lowest_go(keep, scores)


def test_max_sparsity_is_a_cap_and_the_budget_still_met():
    groups = bare(low=20, high=20)
    scores = {"low": np.arange(20) * 1e-6, "high": 1.0 + np.arange(20)}
    keep = select.across_groups(groups, scores, sparsity=0.4, max_sparsity=0.5)
    assert kept(keep) == {"low": 10, "high": 14}
    capped = select.per_group(groups, scores, sparsity=0.7, max_sparsity=0.5)
    assert kept(capped) == {"low": 10, "high": 10}
    floored = select.per_group(groups, scores, sparsity=0.9, min_keep=6)
    assert kept(floored) == {"low": 6, "high": 6}


def test_a_group_at_its_limit_loses_nothing():
    groups = bare(one=1, three=3, ten=10)
    scores = {"one": np.zeros(1), "three": np.zeros(3), "ten": 1.0 + np.arange(10)}
    keep = select.across_groups(groups, scores, sparsity=0.5, min_keep=3)
    assert kept(keep) == {"one": 1, "three": 3, "ten": 3}


def test_a_cap_is_not_missed_by_rounding():
    groups = bare(g=100)
    assert 100 - 0.57 * 100 > 43
    keep = select.per_group(groups, distinct(groups), sparsity=0.6, max_sparsity=0.57)
    assert kept(keep) == {"g": 43}


@pytest.mark.parametrize("seed", range(20))
def test_limits_and_budget_hold_for_random_nets(seed):
    rng = np.random.default_rng(seed)
    groups = bare(**{f"g{k}": int(n) for k, n in enumerate(rng.integers(2, 40, 6))})
    scores = {n: rng.choice(5, size=g.size) * 0.5 for n, g in groups.items()}
    sparsity, cap = rng.uniform(0, 0.5), rng.uniform(0.6, 1.0)
    least = int(rng.integers(1, 3))
    keep = select.across_groups(
        groups, scores, sparsity=sparsity, max_sparsity=cap, min_keep=least
    )
    units = sum(group.size for group in groups.values())
    removable = sum(
        min(g.size - least, int(cap * g.size + 1e-9)) for g in groups.values()
    )
    assert removable >= round(sparsity * units), "the case does not test the budget"
    assert sum(kept(keep).values()) == units - round(sparsity * units)
    for name, group in groups.items():
        assert keep[name].sum() >= max(least, np.ceil((1 - cap) * group.size - 1e-9))
    assert_lowest_go(keep, scores)


@pytest.mark.parametrize(
    ("size", "sparsity", "left"),
    [
        (20, 0.7, 8),  # 6 -> 8: never "not pruned because the remainder is small"
        (20, 0.05, 20),  # 19 -> 20, the whole group, not 16
        (64, 0.3, 48),  # 45 -> 48
        (64, 0.35, 40),  # 42 -> 40
        (24, 0.5, 16),  # 12 is halfway: more is kept
        (6, 0.5, 6),  # smaller than one multiple
        (64, 0.99, 8),
    ],
)
def test_multiple_of_rounds_to_the_nearest(size, sparsity, left):
    groups = bare(g=size)
    scores = distinct(groups)
    keep = select.per_group(groups, scores, sparsity=sparsity, multiple_of=8)
    assert kept(keep) == {"g": left}
    assert_lowest_go(keep, scores)


@pytest.mark.parametrize("seed", range(10))
def test_multiple_of_across_groups_meets_the_budget_to_half_a_block(seed):
    rng = np.random.default_rng(seed)
    groups = bare(a=64, b=20, c=48, d=5)
    scores = {n: rng.random(g.size) + rng.random() for n, g in groups.items()}
    keep = select.across_groups(groups, scores, sparsity=0.5, multiple_of=8)
    left = kept(keep)
    assert all(n % 8 == 0 or n == groups[name].size for name, n in left.items())
    assert abs(sum(left.values()) - (137 - round(0.5 * 137))) <= 4
    assert_lowest_go(keep, scores)


def test_a_budget_the_limits_forbid_is_refused_with_its_numbers():
    groups = bare(a=20, b=20)
    scores = distinct(groups)
    with pytest.raises(
        ValueError, match=r"32 of 40 units.*max_sparsity=0.5 leave only 20"
    ):
        select.across_groups(groups, scores, sparsity=0.8, max_sparsity=0.5)
    with pytest.raises(ValueError, match=r"40 of 40 units, but min_keep=1.*only 38"):
        select.across_groups(groups, scores, sparsity=1.0)
    assert kept(select.per_group(groups, scores, sparsity=1.0)) == {"a": 1, "b": 1}


def test_only_takes_names_and_patterns_and_budgets_them_alone():
    groups = bare(conv1=10, conv2=10, dense=10)
    scores = distinct(groups)
    keep = select.across_groups(groups, scores, sparsity=0.5, only="conv*")
    assert list(keep) == ["conv1", "conv2"]
    assert sum(kept(keep).values()) == 10
    keep = select.per_group(groups, scores, sparsity=0.2, only=["dense", "conv1"])
    assert kept(keep) == {"conv1": 8, "dense": 8}
    keep = select.per_group(groups, scores, sparsity={"conv2": 0.3, "dense": 0.9})
    assert kept(keep) == {"conv2": 7, "dense": 1}


@pytest.mark.parametrize("how", [select.per_group, select.across_groups])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "cnv*"}, r"'cnv\*' matches none of the 2 groups: a, b"),
        ({"sparsity": 1.5}, r"sparsity.* in \[0, 1\], got 1.5"),
        ({"max_sparsity": -1}, r"max_sparsity must be a fraction"),
        ({"min_keep": 0}, "min_keep must be a whole number of at least 1, got 0"),
        ({"multiple_of": 0}, "multiple_of must be a whole number of at least 1, got 0"),
        ({"scores": {"a": np.ones(4)}}, "scores have no entry for the group b"),
        (
            {"scores": {"a": np.ones(4), "b": np.ones(5)}},
            r"scores\[b\].*\(5,\).*3 units",
        ),
        ({"scores": {"a": np.ones(4), "b": np.full(3, np.nan)}}, r"scores\[b\] is NaN"),
    ],
)
def test_bad_input_is_refused(how, options, message):
    groups = bare(a=4, b=3)
    with pytest.raises(ValueError, match=message):
        how(groups, **{"scores": distinct(groups), "sparsity": 0.5, **options})


def test_a_sparsity_per_group_must_name_groups():
    groups = bare(a=4, b=3)
    scores = distinct(groups)
    with pytest.raises(ValueError, match="'c' matches none"):
        select.per_group(groups, scores, sparsity={"c": 0.5})
    with pytest.raises(ValueError, match="must name groups in full; a is missing"):
        select.per_group(groups, scores, sparsity={"*": 0.5})
    with pytest.raises(ValueError, match="only and a sparsity by name both"):
        select.per_group(groups, scores, sparsity={"a": 0.5}, only="a")
    with pytest.raises(TypeError, match="sparsity is traced"):
        jax.jit(lambda s: select.across_groups(groups, scores, sparsity=s))(0.5)


@pytest.mark.parametrize("multiple_of", [1, 3])
@pytest.mark.parametrize("how", [select.per_group, select.across_groups])
def test_traced_scores_decide_the_same(how, multiple_of):
    groups = bare(a=12, b=7, c=9)
    rng = np.random.default_rng(0)
    scores = {
        n: (rng.choice(4, size=g.size) / 4).astype(np.float32)
        for n, g in groups.items()
    }
    options = {"sparsity": 0.5, "multiple_of": multiple_of}
    inside = jax.jit(lambda s: how(groups, s, **options))(scores)
    outside = how(groups, jax.tree.map(jnp.asarray, scores), **options)
    jax.tree.map(np.testing.assert_array_equal, inside, outside)


def test_scores_to_masks_in_one_jit():
    groups, variables = chain.groups(), chain.variables()

    def masks(variables):
        scores = group_scores(groups, variables)
        return expand_masks(groups, select.across_groups(groups, scores, sparsity=0.4))

    assert not all(np.all(mask) for mask in jax.tree.leaves(masks(variables)))
    # Inside jit a cut axis has its full size even if everything on it is kept.
    jax.tree.map(
        lambda inside, outside, leaf: np.testing.assert_array_equal(
            np.broadcast_to(inside, leaf.shape), np.broadcast_to(outside, leaf.shape)
        ),
        jax.jit(masks)(variables),
        masks(variables),
        variables,
    )


def test_no_groups_no_decision():
    assert select.across_groups(bare(), {}, sparsity=0.5) == {}
    assert select.per_group(bare(), {}, sparsity=0.5) == {}
