"""Latency tables, with a clock that is exact and with the real one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quick_jit

import jaxprune
from jaxprune import select

pytestmark = pytest.mark.once

SHAPES = {"w1": (6, 40), "w2": (40, 24), "w3": (24, 32), "w4": (32, 3)}
PARAMS = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
X = jnp.ones((2, 6))


def net(params, x, scale=1.0):
    for name in ("w1", "w2", "w3"):
        x = jax.nn.relu(x @ params[name])
    return scale * (x @ params["w4"])


def clock(fn, args, kwargs):
    """A machine that takes a microsecond, and a nanosecond per multiply-add."""
    return 1e-6 + 1e-9 * jaxprune.costs(fn, *args, **kwargs).multiply_adds


def table(**options):
    return jaxprune.latency_table(net, PARAMS, X, measure=clock, **options)


def true(sizes):
    model = jaxprune.cost_model(net, PARAMS, X)
    return 1e-6 + 1e-9 * model.multiply_adds.value(sizes)


def test_measured_points_are_met():
    found = table()
    assert found.full == pytest.approx(true({}))
    assert len(found.measured) == 1 + 3 * 3 + 3
    for sizes, seconds in found.measured:
        assert seconds == pytest.approx(true(sizes))
        together = len({n / found.sizes[name] for name, n in sizes.items()}) == 1
        # All groups alike: exact. One alone: as close as the calibration is near 1.
        assert found.value(sizes) == pytest.approx(
            seconds, rel=1e-6 if together else 0.1
        )


def test_between_the_points_the_estimate_is_close():
    found, rng = table(), np.random.default_rng(0)
    errors = []
    for _ in range(50):
        sizes = {n: int(rng.integers(n_ // 4, n_ + 1)) for n, n_ in found.sizes.items()}
        errors.append(abs(found.value(sizes) / true(sizes) - 1))
    assert np.mean(errors) < 0.1 and max(errors) < 0.35


def test_noise_does_not_make_fewer_units_slower():
    rng = np.random.default_rng(0)

    def noisy(fn, args, kwargs):
        return clock(fn, args, kwargs) * rng.uniform(0.5, 1.5)

    found = jaxprune.latency_table(net, PARAMS, X, measure=noisy)
    for curve in (*found.curves.values(), found.calibration):
        assert (np.diff(curve.y) >= 0).all() and (np.diff(curve.x) > 0).all()


def test_a_budget_of_seconds():
    found = table(shares=(0.25, 0.5, 0.75), multiple_of=4)
    groups = jaxprune.trace(net, PARAMS, X)
    scores = {
        name: np.random.default_rng(k).random(group.size)
        for k, (name, group) in enumerate(groups.items())
    }
    for method in ("greedy", "global", "uniform"):
        keep = select.to_budget(
            groups, scores, found, budget=0.6 * found.full, method=method
        )
        assert keep.cost <= 0.6 * found.full < keep.one_more
        assert true(keep.sizes) == pytest.approx(keep.cost, rel=0.15)
    with pytest.raises(ValueError, match="needs a polynomial cost, got LatencyTable"):
        select.to_budget(groups, scores, found, budget=0.6 * found.full, method="exact")


def test_a_table_is_a_penalty():
    found = table()
    sizes = {name: jnp.asarray(0.6 * n) for name, n in found.sizes.items()}
    slopes = quick_jit(found.gradient)(sizes)
    assert all(float(slope) > 0 for slope in slopes.values())
    value = float(quick_jit(found.value)(sizes))
    assert value == pytest.approx(found.value({n: float(s) for n, s in sizes.items()}))


def test_only_some_groups_and_static_arguments():
    found = jaxprune.latency_table(
        net, PARAMS, X, 2.0, measure=clock, only="w2*", shares=(0.5,)
    )
    assert set(found.curves) == {"w2:1"} and set(found.sizes) == {
        "w1:1",
        "w2:1",
        "w3:1",
    }
    assert found.value({"w1:1": 1}) == found.full
    with pytest.raises(ValueError, match=r"share of units must be in \(0, 1\), got 1"):
        table(shares=(0.5, 1.0))
    with pytest.raises(ValueError, match="'w9' matches none of the 3 groups"):
        table(only="w9")


def test_the_real_clock_sees_less_work():
    params = {"a": jnp.ones((64, 2048)), "b": jnp.ones((2048, 64))}
    x = jnp.ones((64, 64))

    def wide(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    found = jaxprune.latency_table(wide, params, x, shares=(0.1,))
    assert found.full > 0
    assert found.value({"a:1": 205}) < 0.8 * found.full
