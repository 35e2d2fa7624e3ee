"""Budgets in any cost, against enumeration, dynamic programming and brute slicing."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import select
from jaxprune.core._groups import Group, Groups
from jaxprune.costing import Polynomial, cost_model, costs
from jaxprune.costing._polynomial import Term
from jaxprune.scores import group_scores, magnitude

pytestmark = pytest.mark.once

METHODS = ("lamp", "greedy", "global", "uniform", "exact")
FREE: dict[str, Any] = {"max_sparsity": 1.0}  # no floor but min_keep


def bare(**sizes):
    found = {name: Group(name, size, ()) for name, size in sizes.items()}
    return Groups(found, (), {}, jax.tree.structure({}))


def polynomial(sizes, *terms):
    return Polynomial(sizes, tuple(Term(c, tuple(sorted(p.items()))) for c, p in terms))


def random_case(seed, low=2, high=6):
    """Four groups in a chain; one meets itself, three meet each other."""
    rng = np.random.default_rng(seed)
    sizes = {
        name: int(n) for name, n in zip("abcd", rng.integers(low, high, 4), strict=True)
    }
    terms = [
        (int(rng.integers(1, 9)), {"a": 1}),
        (int(rng.integers(1, 9)), {"a": 1, "b": 1}),
        (int(rng.integers(1, 5)), {"b": 2}),
        (int(rng.integers(1, 4)), {"b": 1, "c": 1, "d": 1}),
        (int(rng.integers(0, 30)), {}),
    ]
    scores = {name: rng.random(n) for name, n in sizes.items()}
    return bare(**sizes), polynomial(sizes, *terms), scores


def best_of_all(scores, cost, budget, allowed):
    """Every combination of widths."""
    top = {
        name: np.concatenate([[0], np.cumsum(np.sort(x)[::-1])])
        for name, x in scores.items()
    }
    best = -np.inf
    for widths in itertools.product(*(allowed[name] for name in scores)):
        sizes = dict(zip(scores, widths, strict=True))
        if cost.value(sizes) <= budget:
            best = max(best, sum(top[name][n] for name, n in sizes.items()))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_exact_is_the_best_of_all_widths(seed):
    groups, cost, scores = random_case(seed)
    budget = (0.35 + 0.05 * seed) * cost.full
    found = select.to_budget(
        groups, scores, cost, budget=budget, method="exact", **FREE
    )
    allowed = {name: range(1, group.size + 1) for name, group in groups.items()}
    best = best_of_all(scores, cost, budget, allowed)
    assert found.score == pytest.approx(best, abs=1e-9)
    assert found.bound == pytest.approx(best, rel=1e-5)
    for method in METHODS[:-1]:
        other = select.to_budget(groups, scores, cost, budget=budget, method=method)
        assert other.score <= best + 1e-9
        assert other.bound is None


def test_exact_keeps_to_the_limits():
    groups, cost, scores = random_case(3, 6, 10)
    options = {"multiple_of": 2, "min_keep": {"a": 3}, "max_sparsity": {"b": 0.5}}
    budget = 0.5 * cost.full
    found = select.to_budget(
        groups, scores, cost, budget=budget, method="exact", **options
    )
    allowed = {
        name: [
            n
            for n in range(1, group.size + 1)
            if (n % 2 == 0 or n == group.size)
            and n >= (3 if name == "a" else 1)
            and n >= (group.size / 2 if name == "b" else 1)
        ]
        for name, group in groups.items()
    }
    assert found.score == pytest.approx(best_of_all(scores, cost, budget, allowed))
    assert all(found.sizes[name] in allowed[name] for name in found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_the_budget_is_met_to_one_unit_and_never_exceeded(method, seed):
    groups, cost, scores = random_case(seed, 8, 20)
    budget = (0.2 + 0.2 * seed) * cost.full
    options = {"method": method, "multiple_of": 1 + seed % 2}
    found = select.to_budget(groups, scores, cost, budget=budget, **options)
    assert cost.value(found.sizes) == found.cost <= budget < found.one_more
    assert found.budget == budget and found.full == cost.full
    assert all(n >= 1 for n in found.sizes.values())
    for name, units in found.items():
        assert units.dtype == bool and units.shape == (groups[name].size,)
        if not units.all():
            assert scores[name][~units].max() < scores[name][units].min()
    assert found.score == pytest.approx(
        sum(scores[name][units].sum() for name, units in found.items())
    )
    if method in ("greedy", "exact"):  # nothing at all can come back
        for name, n in found.sizes.items():
            wider = {**found.sizes, name: n + options["multiple_of"]}
            if n < groups[name].size:
                assert cost.value(wider) > budget


@pytest.mark.parametrize("method", METHODS)
def test_all_of_the_budget_keeps_all(method):
    groups, cost, scores = random_case(0)
    found = select.to_budget(groups, scores, cost, budget=cost.full, method=method)
    assert found.cost == cost.full and found.one_more is None
    assert all(units.all() for units in found.values())
    assert "nothing is gone" in str(found)


def test_equal_costs_are_the_global_top_k():
    """Related systems, section 5, item 8."""
    groups = bare(a=30, b=50, c=20)
    rng = np.random.default_rng(0)
    scores = {name: rng.random(group.size) for name, group in groups.items()}
    sizes = {name: group.size for name, group in groups.items()}
    cost = polynomial(sizes, *((7, {name: 1}) for name in sizes))
    top = select.across_groups(groups, scores, sparsity=0.4)
    for method in ("greedy", "global", "exact"):
        found = select.to_budget(
            groups, scores, cost, budget=0.6 * cost.full, method=method, **FREE
        )
        for name in sizes:
            np.testing.assert_array_equal(found[name], top[name])


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_within_one_percent_of_dynamic_programming(seed):
    """200 items with costs of their own, as single-unit choices in 40 groups of 5."""
    rng = np.random.default_rng(seed)
    groups = bare(**{f"g{k}": 5 for k in range(40)})
    scores = {name: rng.random(5) for name in groups}
    price = {name: int(rng.integers(1, 50)) for name in groups}
    cost = polynomial(
        dict.fromkeys(groups, 5), *((c, {n: 1}) for n, c in price.items())
    )
    budget = cost.full // 2
    # best[c]: the highest score at cost c; one item of every group must stay.
    best = np.zeros(budget + 1)
    reach = np.full(budget + 1, -np.inf)
    reach[0] = 0.0
    for name in groups:
        top = np.cumsum(np.sort(scores[name])[::-1])
        best = np.full(budget + 1, -np.inf)
        for n in range(1, 6):
            c = n * price[name]
            if c <= budget:
                best[c:] = np.maximum(best[c:], reach[: budget + 1 - c] + top[n - 1])
        reach = best
    optimum = reach.max()
    how = FREE | {"method": "greedy"}
    found = select.to_budget(groups, scores, cost, budget=budget, **how)
    assert found.cost <= budget
    assert 0.99 * optimum <= found.score <= optimum + 1e-9
    if seed == 0:
        how["method"] = "exact"
        exact = select.to_budget(groups, scores, cost, budget=budget, **how)
        assert exact.score == pytest.approx(optimum)


def test_a_saving_is_computed_anew_after_every_step():
    """a costs 10 b: with b gone, a is cheap, and what was dearest no longer pays."""
    groups = bare(a=4, b=4)
    cost = polynomial({"a": 4, "b": 4}, (10, {"a": 1, "b": 1}), (9, {"b": 1}))
    scores = {"a": np.full(4, 1.0), "b": np.full(4, 1.01)}
    order, keep = [], {}
    for _ in range(6):
        before = {n: int(u.sum()) for n, u in keep.items()} or {"a": 4, "b": 4}
        keep = select.remove_one(groups, scores, cost, keep)
        after = {n: int(u.sum()) for n, u in keep.items()}
        ratio = {
            n: scores[n][0]
            / (cost.value(before) - cost.value({**before, n: before[n] - 1}))
            for n in ("a", "b")
            if before[n] > 1
        }
        (gone,) = [n for n in before if after[n] < before[n]]
        assert gone == min(ratio, key=lambda n: ratio[n])
        order.append(gone)
    assert set(order) == {"a", "b"}
    with pytest.raises(ValueError, match="no group can lose another unit"):
        select.remove_one(groups, scores, cost, keep)


def test_one_at_a_time_with_fixed_scores_is_greedy():
    groups, cost, scores = random_case(1, 8, 14)
    budget = 0.4 * cost.full
    keep = {name: np.ones(group.size, bool) for name, group in groups.items()}
    sizes = {}
    while cost.value(sizes) > budget:
        keep = select.remove_one(groups, scores, cost, keep)
        sizes = {name: int(units.sum()) for name, units in keep.items()}
    how = FREE | {"method": "greedy"}
    greedy = select.to_budget(groups, scores, cost, budget=budget, **how)
    # Greedy then takes back what still fits.
    for name, units in keep.items():
        assert (units <= greedy[name]).all()


def test_one_at_a_time_keeps_to_the_limits_and_ignores_what_is_gone():
    groups = bare(a=8, b=8)
    cost = polynomial({"a": 8, "b": 8}, (1, {"a": 1}), (1, {"b": 1}))
    scores = {"a": np.arange(8.0), "b": 100 + np.arange(8.0)}
    keep = select.remove_one(groups, scores, cost, multiple_of=3)
    assert {n: int(u.sum()) for n, u in keep.items()} == {"a": 6, "b": 8}
    scores["a"][[0, 1]] = 1e9  # those that are gone
    keep = select.remove_one(groups, scores, cost, keep, max_sparsity={"a": 0.25})
    assert {n: int(u.sum()) for n, u in keep.items()} == {"a": 6, "b": 7}
    np.testing.assert_array_equal(np.flatnonzero(~keep["a"]), [0, 1])


def test_bisection_meets_the_budget_to_one_step():
    """The allowed error of PFP: every layer keeps what one number asks of it."""
    rng = np.random.default_rng(0)
    sizes = {f"l{k}": int(n) for k, n in enumerate(rng.integers(8, 64, 6))}
    pairs = itertools.pairwise(sizes)
    cost = polynomial(sizes, *((9, {a: 1, b: 1}) for a, b in pairs))
    need = {name: float(x) for name, x in zip(sizes, rng.random(6), strict=True)}

    def widths(error):
        return {
            n: min(size, max(1, round(need[n] * size / error)))
            for n, size in sizes.items()
        }

    budget = 0.3 * cost.full
    found = select.bisect(widths, cost, budget=budget, low=1e-3, high=1e3)
    assert cost.value(found) <= budget
    assert any(cost.value({**found, n: found[n] + 1}) > budget for n in sizes)
    with pytest.raises(
        ValueError, match="budget=1 cannot be met: between the two ends"
    ):
        select.bisect(widths, cost, budget=1, low=1e-3, high=1e3)
    assert select.bisect(widths, cost, budget=cost.full, low=1e-3, high=1e3) == sizes


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"][None])
    return jax.nn.relu(hidden @ params["w2"]) @ params["w3"]


@pytest.mark.parametrize("quantity", ["parameters", "flops", "activation_bytes"])
@pytest.mark.parametrize("method", METHODS)
def test_the_narrowed_program_is_within_the_budget(method, quantity):
    rng = np.random.default_rng(0)
    shapes = {"w1": (6, 20), "b1": (20,), "w2": (20, 12), "w3": (12, 3)}
    params = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()
    }
    x = jnp.ones((2, 6))
    groups = jaxprune.trace(mlp, params, x)
    cost = getattr(cost_model(mlp, params, x, groups=groups), quantity)
    scores = group_scores(groups, magnitude(params))
    keep = select.to_budget(
        groups, jax.device_get(scores), cost, budget=0.4 * cost.full, method=method
    )
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(params, masks)
    found = costs(jaxprune.narrow(mlp, masks), small, x)
    assert getattr(found, quantity) == keep.cost <= 0.4 * cost.full < keep.one_more


@pytest.mark.parametrize("method", METHODS)
def test_the_result_does_not_depend_on_the_order_of_units(method):
    groups, cost, scores = random_case(2, 6, 12)
    rng = np.random.default_rng(1)
    moved = {name: rng.permutation(len(x)) for name, x in scores.items()}
    budget = 0.5 * cost.full
    plain = select.to_budget(groups, scores, cost, budget=budget, method=method)
    shuffled = {name: x[moved[name]] for name, x in scores.items()}
    other = select.to_budget(groups, shuffled, cost, budget=budget, method=method)
    for name in groups:
        np.testing.assert_array_equal(other[name], plain[name][moved[name]])


def test_bad_input_is_refused():
    groups, cost, scores = random_case(0)
    with pytest.raises(
        ValueError, match=r"budget=1 cannot be met: .* the cost is \d+ of"
    ):
        select.to_budget(groups, scores, cost, budget=1)
    with pytest.raises(ValueError, match="method must be one of.*'exact'.*got 'best'"):
        select.to_budget(groups, scores, cost, budget=9, method="best")
    with pytest.raises(ValueError, match="cost knows None units of the group a"):
        other = polynomial({"z": 3}, (1, {"z": 1}))
        select.to_budget(groups, scores, other, budget=9)
    with pytest.raises(ValueError, match=r"scores\[a\] is NaN"):
        bad = {**scores, "a": np.full(len(scores["a"]), np.nan)}
        select.to_budget(groups, bad, cost, budget=cost.full)
    with pytest.raises(TypeError, match=r"scores\[a\] is traced"):
        jax.eval_shape(
            lambda s: select.to_budget(groups, s, cost, budget=cost.full), scores
        )
    bits = cost_model(
        mlp,
        {
            "w1": jnp.ones((2, 3)),
            "b1": jnp.ones(3),
            "w2": jnp.ones((3, 4)),
            "w3": jnp.ones((4, 1)),
        },
        jnp.ones((1, 2)),
    ).bit_operations()
    found = bare(**bits.sizes)
    ones = {name: np.ones(n) for name, n in bits.sizes.items()}
    with pytest.raises(ValueError, match="needs a polynomial cost, got BitOperations"):
        select.to_budget(found, ones, bits, budget=0.5 * bits.full, method="exact")
    assert select.to_budget(found, ones, bits, budget=0.5 * bits.full).cost > 0


def test_a_second_round_removes_once_what_was_asked():
    """Decisions are values: nothing remembers, or repeats, the first."""
    params = {"w1": np.ones((3, 20)), "b1": np.ones(20), "w2": np.ones((20, 12))}
    params = {
        n: x.astype(np.float32) for n, x in (params | {"w3": np.ones((12, 2))}).items()
    }
    fn, sizes = mlp, []
    for _ in range(2):
        groups = jaxprune.trace(fn, params, jnp.ones((1, 3)))
        scores = jax.device_get(group_scores(groups, magnitude(params)))
        keep = select.per_group(groups, scores, sparsity=0.5)
        masks = jaxprune.expand_masks(groups, keep)
        fn, params = jaxprune.narrow(fn, masks), jaxprune.slice_params(params, masks)
        sizes.append([params["w1"].shape[1], params["w2"].shape[1]])
    assert sizes == [[10, 6], [5, 3]]


# --- defaults ------------------------------------------------------------------------


def test_no_group_is_emptied_because_its_numbers_are_small():
    """Group "a" scores a millionth of "b", and costs as much."""
    rng = np.random.default_rng(0)
    scores = {"a": 1e-6 * (1 + rng.random(20)), "b": 1 + rng.random(20)}
    groups, sizes = bare(a=20, b=20), {"a": 20, "b": 20}
    cost = polynomial(sizes, (3, {"a": 1}), (3, {"b": 1}))
    found = select.to_budget(groups, scores, cost, budget=0.6 * cost.full)
    assert abs(found.sizes["a"] - found.sizes["b"]) <= 2
    plain = select.to_budget(
        groups, scores, cost, budget=0.6 * cost.full, method="greedy"
    )
    assert plain.sizes == {"a": 4, "b": 20}  # the floor, a fifth
    greedy = {"method": "greedy", "max_sparsity": 1.0}
    plain = select.to_budget(groups, scores, cost, budget=0.5 * cost.full, **greedy)
    assert plain.sizes["a"] == 1


def test_lamp_is_the_share_in_what_stays():
    """Against the published formula, one unit at a time."""
    groups, cost, scores = random_case(5, 6, 12)
    rated = []
    for name, values in scores.items():
        ordered = np.sort(values)
        rated += [
            (u**2 / (ordered[k:] ** 2).sum(), name, u) for k, u in enumerate(ordered)
        ]
    gone = {name: set() for name in scores}
    for _, name, value in sorted(rated):
        sizes = {n: len(scores[n]) - len(gone[n]) for n in scores}
        if cost.value(sizes) <= 0.5 * cost.full:
            break
        if sizes[name] > 1:
            gone[name].add(value)
    found = select.to_budget(groups, scores, cost, budget=0.5 * cost.full, **FREE)
    for name, values in scores.items():
        np.testing.assert_array_equal(found[name], ~np.isin(values, list(gone[name])))


def test_equal_scores_leave_all_groups_in_turn():
    groups, sizes = bare(a=8, b=16), {"a": 8, "b": 16}
    cost = polynomial(sizes, (1, {"a": 1}), (1, {"b": 1}))
    for value in (0.0, 1.0):
        scores = {name: np.full(n, value) for name, n in sizes.items()}
        found = select.to_budget(groups, scores, cost, budget=16)
        assert found.sizes["a"] in (7, 8) if value else found.sizes["a"] in (5, 6)


def test_the_floor_gives_way_to_the_budget():
    groups, sizes = bare(a=100), {"a": 100}
    cost = polynomial(sizes, (1, {"a": 1}))
    scores = {"a": np.arange(100.0)}
    for budget in (50, 20, 15, 7, 2):
        assert select.to_budget(groups, scores, cost, budget=budget).sizes == {
            "a": budget
        }
    with pytest.raises(ValueError, match="budget=10 cannot be met"):
        select.to_budget(groups, scores, cost, budget=10, max_sparsity=0.8)
