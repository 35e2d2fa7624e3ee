"""Sensitivities against loops, and what the papers say of sampling by them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import scores, select
from jaxprune.scores._sensitivity import unit_shares, weight_shares
from jaxprune.select import provable
from jaxprune.surgery import scale_units

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


# Sensitivities.


def net(params, x):
    x = jax.nn.relu(conv(x, params["a"]))
    x = jnp.tanh(conv(x, params["b"]))
    return x.reshape(len(x), -1) @ params["head"]


def conv(x, kernel):
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), "VALID", dimension_numbers=numbers
    )


PARAMS = {"a": normal(2, 1, 4), "b": normal(2, 4, 3), "head": normal(9, 2)}
X = normal(5, 5, 1)


def by_loop(rows, kernel, unit_of, size, form):
    """Every row, output, pair of signs and unit, one after the other."""
    found = np.zeros(size)
    for x, w, a, b in itertools.product(rows, kernel.T, (1, -1), (1, -1)):
        parts = np.maximum(a * x, 0).astype(float) * np.maximum(b * w, 0)
        if parts.sum() == 0:
            continue
        for unit in range(size):
            own = parts[unit_of == unit]
            share = (own.sum() if form == "channel" else own.max()) / parts.sum()
            found[unit] = max(found[unit], share)
    return found


@pytest.mark.parametrize("form", ["channel", "tap"])
def test_sensitivities_are_those_of_the_loop(form):
    groups = jaxprune.trace(net, PARAMS, X)
    batches = [X[:2], X[2:]]
    found = scores.empirical_sensitivity(groups, net, PARAMS, batches, form=form)
    hidden = np.maximum(conv(X, PARAMS["a"]), 0)
    patches = np.stack([hidden[:, :-1], hidden[:, 1:]], 3).reshape(-1, 8)
    kernel = PARAMS["b"].transpose(1, 0, 2).reshape(8, 3)
    expected = by_loop(patches, kernel, np.arange(8) // 2, 4, form)
    np.testing.assert_allclose(found["a:2"], expected, rtol=1e-5)
    last = np.tanh(conv(hidden, PARAMS["b"])).reshape(5, 9)
    expected = by_loop(last, PARAMS["head"], np.arange(9) % 3, 3, form)
    np.testing.assert_allclose(found["b:2"], expected, rtol=1e-5)
    assert 1 <= found["a:2"].sum() <= 4 and found["a:2"].max() <= 1
    with pytest.raises(ValueError, match="form must be 'channel' or 'tap', got 'x'"):
        scores.empirical_sensitivity(groups, net, PARAMS, batches, form="x")
    with pytest.raises(ValueError, match="batches is empty"):
        scores.empirical_sensitivity(groups, net, PARAMS, [])


def test_sensitivities_go_with_permutations_and_ignore_scales_of_outputs():
    x, kernel = normal(6, 8), normal(8, 3)
    table = np.arange(8).reshape(4, 2)
    before = unit_shares(x, kernel, table)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(unit_shares(x, kernel, table[order]), before[order])
    scaled = unit_shares(x, kernel * np.float32([1e-3, 1.0, 50.0]), table)
    np.testing.assert_allclose(scaled, before, rtol=1e-5)


def test_of_a_bank_every_expert_counts_and_of_what_meets_no_parameter_nothing_is_known():
    def bank(params, x):
        hidden = jax.nn.relu(jnp.einsum("bd,edf->ebf", x, params["up"]))
        return jnp.einsum("ebf,efd->ebd", hidden, params["down"])

    # Of one sign, or the largest share of nearly every unit is 1.
    params = {"up": np.abs(normal(2, 3, 4)), "down": np.abs(normal(2, 4, 3))}
    x = np.abs(normal(5, 3))
    groups = jaxprune.trace(bank, params, x)
    found = scores.empirical_sensitivity(groups, bank, params, [x])["up:2"]
    hidden = np.maximum(np.einsum("bd,edf->ebf", x, params["up"]), 0)
    each = [
        by_loop(hidden[e], params["down"][e], np.arange(4), 4, "channel")
        for e in (0, 1)
    ]
    np.testing.assert_allclose(found, np.max(each, 0), rtol=1e-5)
    assert max(found) < 0.95

    def gram(params, x):
        q, k = x @ params["q"], x @ params["k"]
        return q @ k.T

    params = {"q": normal(3, 4), "k": normal(3, 4)}
    groups = jaxprune.trace(gram, params, x)
    found = scores.empirical_sensitivity(groups, gram, params, [x])
    assert found["q:1"].tolist() == [1.0] * 4


# Sampling.


def test_what_is_sampled_is_right_on_average():
    """F1, by enumeration: the factors of all outcomes, weighed, are 1."""
    p, draws = np.array([0.2, 0.5, 0.3]), 3
    mean = np.zeros(3)
    for outcome in itertools.product(range(3), repeat=draws):
        counts = np.bincount(outcome, minlength=3)
        mean += p[list(outcome)].prod() * counts / (draws * p)
    np.testing.assert_allclose(mean, 1)
    groups, s = linear_groups(8), np.linspace(0.05, 1, 8)
    for partly in (False, True):
        found = [
            provable.draw(groups, {"w1:1": s}, {"w1:1": 5}, key, partly=partly)
            for key in jax.random.split(KEY, 400)
        ]
        factors = np.array([one.factors["w1:1"] for one in found])
        error = factors.std(0) / 20 + 1e-9
        assert (np.abs(factors.mean(0) - 1) < 4.5 * error).all()
        kept = np.array([one.keep["w1:1"].sum() for one in found])
        assert 4 < kept.mean() <= 5.3
        assert all(
            ((f > 0) == o.keep["w1:1"]).all()
            for f, o in zip(factors, found, strict=True)
        )
    assert (factors[:, -1] == 1).all()  # certain if derandomised


def linear_groups(size):
    params = {"w1": jnp.ones((3, size)), "w2": jnp.ones((size, 2))}
    return jaxprune.trace(mlp, params, jnp.ones((1, 3)), roles=True)


def mlp(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


def test_of_one_example_and_output_every_draw_is_exact():
    """F2: the variance is 0."""
    params = {"w1": np.abs(normal(3, 8)), "w2": np.abs(normal(8, 1))}
    x = np.abs(normal(1, 3))
    groups = jaxprune.trace(mlp, params, x, roles=True)
    s = scores.empirical_sensitivity(groups, mlp, params, [x])
    assert float(s["w1:1"].sum()) == pytest.approx(1)
    for key in jax.random.split(KEY, 5):
        found = provable.draw(groups, s, {"w1:1": 3}, key)
        scaled = scale_units(params, groups, found.factors)
        np.testing.assert_allclose(mlp(scaled, x), mlp(params, x), rtol=1e-5)
        # And cutting what is not drawn changes nothing.
        masks = jaxprune.expand_masks(groups, found.keep)
        small = jaxprune.slice_params(scaled, masks)
        y = jaxprune.narrow(mlp, masks)(small, x)
        np.testing.assert_allclose(y, mlp(params, x), rtol=1e-5)


def test_the_bound_fails_less_often_than_it_says():
    """F3, on a layer of 64 inputs that are not negative, 10 outputs and 32 points."""
    rng = np.random.default_rng(0)
    a, w = np.abs(rng.normal(size=(32, 64))), np.abs(rng.normal(size=(64, 10)))
    s = np.asarray(unit_shares(jnp.float32(a), jnp.float32(w), np.arange(64)[:, None]))
    settings = {"delta": 0.05, "outputs": 320, "constant": 1.0}
    draws = provable.sample_complexity(s.sum(), 0.5, **settings)
    p, z = provable.distribution(s), a @ w
    counts = rng.multinomial(draws, p, size=200)
    made = np.einsum("tj,bj,ji->tbi", counts / (draws * p), a, w)
    worst = np.abs(made / z - 1).max((1, 2))
    assert (worst > 0.5).mean() <= 0.05
    assert worst.max() > 0.02  # the bound is not empty of meaning


def test_complexity_falls_with_the_error_and_grows_with_the_sensitivity():
    """F5, and the inverse."""
    draws = [provable.sample_complexity(5.0, e) for e in (0.1, 0.5, 1.0, 10.0)]
    assert draws == sorted(draws, reverse=True)
    assert provable.sample_complexity(10.0, 0.5) > provable.sample_complexity(5.0, 0.5)
    for error in (0.05, 0.7, 20.0):
        m = provable.sample_complexity(7.0, error)
        assert provable.error_bound(7.0, m) <= error < provable.error_bound(7.0, m - 1)
    with pytest.raises(ValueError, match="error must be above 0"):
        provable.sample_complexity(1.0, 0.0)
    with pytest.raises(ValueError, match="delta must be a probability"):
        provable.error_bound(1.0, 3, delta=0)


def test_expected_unique_units_are_those_of_simulation_and_its_inverse():
    """F7."""
    rng, p = np.random.default_rng(1), provable.distribution(np.arange(1.0, 21))
    for draws in (3, 15, 60):
        met = (rng.multinomial(draws, p, size=4000) > 0).sum(1)
        assert abs(met.mean() - provable.expected_unique(p, draws)) < 0.08
    for unique in (1, 7, 20):
        draws = provable.draws_for(p, unique)
        assert np.ceil(provable.expected_unique(p, draws)) == unique
        assert draws == 1 or np.ceil(provable.expected_unique(p, draws - 1)) < unique
    assert provable.draws_for([1.0, 0.0], 2) == 1
    assert provable.distribution([0.0, 0.0]).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="must be finite and not negative"):
        provable.distribution([-1.0])


# One error for a net.


def deep(params, x):
    for w in params[:-1]:
        x = jax.nn.relu(x @ w)
    return x @ params[-1]


DEEP = [normal(4, 16), normal(16, 16), normal(16, 2)]


def test_one_error_meets_a_budget_to_one_unit_and_spares_what_matters_evenly():
    """F6 and F8."""
    groups = jaxprune.trace(deep, DEEP, np.ones((1, 4), np.float32))
    cost = jaxprune.cost_model(deep, DEEP, np.ones((1, 4), np.float32), groups=groups)
    few, even = np.full(16, 1e-3), np.ones(16)
    few[:3] = 1.0
    s = {"0:1": even, "1:1": few}
    before = None
    for share in (0.9, 0.6, 0.3, 0.1):
        budget = share * cost.parameters.full
        found = provable.allocate(groups, s, cost.parameters, budget=budget)
        assert cost.parameters.value(found.sizes) <= budget
        more = [{**found.sizes, n: k + 1} for n, k in found.sizes.items() if k < 16]
        assert any(cost.parameters.value(sizes) > budget for sizes in more)
        assert found.sizes["0:1"] >= found.sizes["1:1"]
        if before is not None:
            assert found.error > before.error
            assert all(found.sizes[n] <= before.sizes[n] for n in s)
        before = found
        # F9: the pruner without chance keeps the most sensitive.
        keep = select.to_budget(
            groups,
            s,
            cost.parameters,
            budget=budget,
            method="sampling",
            max_sparsity=1.0,
        )
        assert {n: int(k.sum()) for n, k in keep.items()} == found.sizes
        assert keep["1:1"][: min(3, found.sizes["1:1"])].all()
    with pytest.raises(
        ValueError, match="budget=1 cannot be met: between the two ends"
    ):
        provable.allocate(groups, s, cost.parameters, budget=1)


def test_prune_and_rounds_take_it_by_name():
    x = np.abs(normal(12, 4))
    pruned = jaxprune.prune(
        deep,
        DEEP,
        x,
        budget=0.4,
        score="empirical_sensitivity",
        method="sampling",
        batches=[x],
    )
    assert pruned.costs.flops <= 0.4 * pruned.costs_before.flops
    run = jaxprune.rounds(  # the cascade: the same fraction stays in every round
        deep,
        DEEP,
        x,
        tx=optax.sgd(1e-3),
        data=[x],
        steps=1,
        budget=0.36,
        rounds=2,
        score="empirical_sensitivity",
        method="sampling",
        loss_fn=lambda p, x: jnp.mean(deep(p, x) ** 2),
    )
    whole, half, last = (entry.flops for entry in run.history)
    assert half <= 0.6 * whole and last <= 0.36 * whole


def test_blocks_lengths_and_missing_consumers_are_refused():
    groups = linear_groups(4)
    params = {"w1": np.ones((3, 4), np.float32), "w2": np.ones((4, 2), np.int8)}
    with pytest.raises(ValueError, match=r"factors\[w1:1\] has shape \(3,\), but .* 4"):
        scale_units(params, groups, {"w1:1": np.ones(3)})
    with pytest.raises(TypeError, match="w2 has dtype int8 and cannot be scaled"):
        scale_units(params, groups, {"w1:1": np.ones(4)})
    plain = jaxprune.trace(mlp, {**params, "w2": params["w2"] * 1.0}, np.ones((1, 3)))
    with pytest.raises(ValueError, match="no parameter is known to read .* roles=True"):
        scale_units(params, plain, {"w1:1": np.ones(4)})


# Single weights.


def test_shares_of_weights_add_up_over_one_example():
    x, kernel = np.abs(normal(1, 6)), normal(6, 4)
    shares = np.asarray(weight_shares(x, kernel))
    for sign in (1, -1):
        own = np.where(sign * kernel > 0, shares, 0).sum(0)
        np.testing.assert_allclose(own, (sign * kernel > 0).any(0), rtol=1e-5)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_shares_of_weights_are_those_of_the_loop(reduce):
    found = scores.weight_sensitivity(net, PARAMS, [X[:3], X[3:]], reduce=reduce)
    hidden = np.maximum(conv(X, PARAMS["a"]), 0)
    patches = np.stack(
        [hidden[:, :-1], hidden[:, 1:]], 2
    )  # [n, place, window, channel]
    kernel, expected = PARAMS["b"], np.zeros((2, 4, 3))
    for i, sign in itertools.product(range(3), (1, -1)):
        w = np.maximum(sign * kernel[..., i], 0)
        shares = (
            patches * w / np.maximum((patches * w).sum((2, 3), keepdims=True), 1e-30)
        )
        over = shares.max(1) if reduce == "max" else shares.mean(1)
        expected[..., i] = np.maximum(expected[..., i], over.max(0))
    np.testing.assert_allclose(found["b"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="weight_sensitivity has nothing to score"):
        scores.weight_sensitivity(
            lambda p, x: x * p["s"][None], {"s": X[0, :1, 0]}, [X[0]]
        )
