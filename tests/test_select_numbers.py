"""Budgets, limits and masks that are no numbers, no bools or not concrete."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import select
from jaxprune.surgery import merge

pytestmark = pytest.mark.once

NOT_FINITE = [float("nan"), float("inf")]


def net(p, x):
    return jax.nn.relu(x @ p["w1"]) @ p["w2"]


PARAMS = {"w1": np.ones((3, 8), np.float32), "w2": np.ones((8, 2), np.float32)}
X = np.ones((1, 3), np.float32)


@pytest.fixture(scope="module")
def groups():
    return jaxprune.trace(net, PARAMS, X, roles=True)


@pytest.fixture(scope="module")
def cost(groups):
    return jaxprune.cost_model(net, PARAMS, X, groups=groups).multiply_adds


SCORES = {"w1:1": np.arange(8.0)}


@pytest.mark.parametrize("value", [*NOT_FINITE, 1.5, True, "2"])
@pytest.mark.parametrize("option", ["min_keep", "multiple_of"])
def test_limits_are_whole_numbers(option, value, groups, cost):
    kind = TypeError if isinstance(value, bool | str) else ValueError
    for given in (value, {"*": value}):
        with pytest.raises(kind, match=f"{option} must be a (whole )?number"):
            select.per_group(groups, SCORES, sparsity=0.5, **{option: given})
        with pytest.raises(kind, match=f"{option} must be a (whole )?number"):
            budget = 0.5 * cost.full
            select.to_budget(groups, SCORES, cost, budget=budget, **{option: given})
    with pytest.raises(kind, match="min_keep must be a (whole )?number"):
        select.per_leaf({"w": np.ones((2, 2))}, sparsity=0.5, min_keep=value)


def test_limits_may_be_numbers_of_numpy_and_whole_floats(groups):
    for value in (2, 2.0, np.int32(2), jnp.asarray(2)):
        keep = select.per_group(groups, SCORES, sparsity=0.9, min_keep=value)
        assert keep["w1:1"].sum() == 2


@pytest.mark.parametrize("value", NOT_FINITE)
def test_budgets_are_finite(value, groups, cost):
    with pytest.raises(ValueError, match="budget must be a finite number, got"):
        select.to_budget(groups, SCORES, cost, budget=value)
    widths = lambda r: {"w1:1": max(1, round(8 * r))}  # noqa: E731
    for options in ({"budget": value}, {"low": value}, {"high": value}):
        options = {"budget": 0.5 * cost.full, "low": 0.0, "high": 1.0} | options
        with pytest.raises(ValueError, match="must be a finite number, got"):
            select.bisect(widths, cost, **options)
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        select.proportional({"a": value}, 1, most={"a": 2})
    with pytest.raises(ValueError, match=r"sizes\[w1:1\] must be a whole number"):
        select.to_sizes(groups, SCORES, {"w1:1": value})
    with pytest.raises(ValueError, match="sparsity of w1:1 must be a fraction"):
        select.per_group(groups, SCORES, sparsity=value)


def test_masks_are_bools(groups, cost):
    floats = {"w1": np.ones((3, 8), np.float32), "w2": np.ones((8, 2), bool)}
    with pytest.raises(TypeError, match=r"masks\[w1\] must be boolean.*got float32"):
        select.widths_from_nonzeros(groups, floats)
    with pytest.raises(TypeError, match=r"keep\[w1:1\] must be boolean.*got float64"):
        select.remove_one(groups, SCORES, cost, {"w1:1": np.ones(8)})


@pytest.mark.parametrize(
    "call",
    [
        lambda g, c, x: select.remove_one(g, {"w1:1": x}, c),
        lambda g, c, x: select.remove_one(g, SCORES, c, {"w1:1": x > 0}),
        lambda g, c, x: select.widths_from_nonzeros(
            g, {"w1": jnp.ones((3, 8)) > x[None], "w2": np.array(True)}
        ),
        lambda g, c, x: select.to_budget(g, SCORES, c, budget=x[0]),
        lambda g, c, x: select.per_group(g, SCORES, sparsity=0.5, min_keep=x[0]),
        lambda g, c, x: select.to_sizes(g, SCORES, {"w1:1": x[0]}),
        lambda g, c, x: select.lamp({"w": x}, sparsity=0.5),
        lambda g, c, x: select.proportional({"a": 1.0}, x[0], most={"a": 2}),
        lambda g, c, x: select.clusters.k_means(
            g, {"w1": PARAMS["w1"] * x[None], "w2": PARAMS["w2"]}, sparsity=0.5
        ),
        lambda g, c, x: merge(PARAMS, g, {"w1:1": x.astype(int)}),
    ],
)
def test_what_decides_shapes_cannot_be_traced(call, groups, cost):
    with pytest.raises(TypeError, match="is traced"):
        jax.jit(lambda x: call(groups, cost, x))(jnp.ones(8))


def test_infinite_scores_powers_out_of_range_and_empty_requests(groups, cost):
    bad = {"w1:1": np.r_[np.arange(6.0), np.inf, np.inf]}
    for how in (select.per_group, select.across_groups):
        with pytest.raises(ValueError, match=r"scores\[w1:1\] are not finite"):
            how(groups, bad, sparsity=0.5)
    with pytest.raises(ValueError, match=r"scores\[w1:1\] are not finite"):
        select.to_budget(groups, bad, cost, budget=cost.full)
    for size in (1e-25, 1e20):
        with pytest.raises(ValueError, match="scores of w1 are not finite or all 0"):
            jaxprune.scores.lp({"w1": np.full((2, 2), size, np.float32)}, 3.0)
    with pytest.raises(ValueError, match="rounds must be a whole number, got nan"):
        jaxprune.prune(net, PARAMS, X, sparsity=0.5, rounds=float("nan"))
    with pytest.raises(ValueError, match="sparsity={} names no group"):
        jaxprune.prune(net, PARAMS, X, sparsity={})
    huge = {name: leaf * np.float32(2e38) for name, leaf in PARAMS.items()}
    with pytest.raises(ValueError, match=r"scores\[w1:1\] are not finite"):
        jaxprune.prune(net, huge, X, sparsity=0.5)
