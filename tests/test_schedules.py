"""Every schedule through the same checks, and the published identities."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import schedules

pytestmark = pytest.mark.once

# name -> (schedule, its last value, the step from which it holds, the largest value)
RAMPS = {
    "one_shot": (schedules.one_shot(0.7, at=20), 0.7, 20),
    "linear": (schedules.linear(0.9, start=10, end=70), 0.9, 70),
    "linear_steps": (
        schedules.linear(0.9, start=10, end=75, initial=0.2, frequency=20),
        0.9,
        75,
    ),
    "cubic": (schedules.cubic(0.95, start=5, end=90), 0.95, 90),
    "cubic_steps": (
        schedules.cubic(1.0, start=0, end=64, initial=0.5, frequency=8),
        1.0,
        64,
    ),
    "cubic_at_once": (schedules.cubic(0.5, start=30, end=30), 0.5, 30),
    "geometric": (schedules.geometric(0.9, start=10, end=60), 0.9, 60),
    "geometric_steps": (
        schedules.geometric(0.99, start=0, end=95, initial=0.1, frequency=10),
        0.99,
        95,
    ),
    "narang": (
        schedules.narang(0.3, start=10, ramp=40, end=90, frequency=10),
        None,
        90,
    ),
}
FALLING = {
    "inverse_decay": (schedules.inverse_decay(0.1, 2.0, stop=80), 0.0, 80),
    "forever": (schedules.inverse_decay(0.0), 1.0, 0),
}
STEPS = np.arange(127)


@pytest.mark.parametrize("name", RAMPS | FALLING)
def test_contract(name):
    schedule, last, end = (RAMPS | FALLING)[name]
    values = jax.jit(schedule)(STEPS)
    assert values.dtype == jnp.float32 and values.shape == STEPS.shape
    assert np.all((values >= 0) & (values <= 1))
    slope = np.diff(values)
    assert np.all(slope >= 0) if name in RAMPS else np.all(slope <= 0)
    np.testing.assert_array_equal(values[end:], values[-1])
    if last is not None:
        assert values[-1] == np.float32(last)


@pytest.mark.parametrize("name", RAMPS | FALLING | {"cyclic": ()})
def test_any_integer_dtype_one_trace_and_vectorised(name):
    table = RAMPS | FALLING | {"cyclic": (schedules.cyclic(3, every=7, rounds=4),)}
    schedule = table[name][0]
    expected = np.asarray(schedule(STEPS))
    traced = jax.jit(chex.assert_max_traces(schedule, n=1))
    chex.clear_trace_counter()
    some = [0, 9, 10, 21, 60, 126]
    np.testing.assert_allclose(
        [traced(jnp.int32(i)) for i in some], expected[some], 1e-6
    )
    np.testing.assert_allclose(jax.vmap(schedule)(STEPS), expected, 1e-6)
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.uint32, np.int64):
        np.testing.assert_array_equal(schedule(STEPS.astype(dtype)), expected)
    assert schedule(5).dtype == schedule(STEPS).dtype


def test_cubic_is_the_published_polynomial():
    target, first, start, step, rounds = 0.9, 0.1, 12, 5, 16
    schedule = schedules.cubic(
        target, start=start, end=start + rounds * step, initial=first, frequency=step
    )
    for i in range(rounds + 1):
        published = target + (first - target) * (1 - i / rounds) ** 3
        for extra in (0, step - 1):
            assert float(schedule(start + i * step + extra)) == pytest.approx(published)


def test_geometric_removes_the_same_fraction_of_the_rest_every_time():
    schedule = schedules.geometric(0.97, start=3, end=83, initial=0.2, frequency=10)
    left = 1 - np.asarray(schedule(3 + 10 * np.arange(9)), np.float64)
    np.testing.assert_allclose(left[1:] / left[:-1], (0.03 / 0.8) ** (1 / 8), rtol=1e-5)


@pytest.mark.parametrize(("start", "ramp", "end"), [(0, 500, 1000), (200, 200, 900)])
@pytest.mark.parametrize("frequency", [1, 50, 100])
def test_narang_ends_at_its_threshold(start, ramp, end, frequency):
    q = 0.25

    def last(steepening):
        return float(
            schedules.narang(
                q,
                start=start,
                ramp=ramp,
                end=end,
                frequency=frequency,
                steepening=steepening,
            )(end)
        )

    base = 2 * (ramp - start) + 3 * (end - ramp)
    assert last(1.5) == pytest.approx(q * (1 + 5 / base), rel=1e-6)
    assert last(1.5) == pytest.approx(q, rel=0.01)
    # The setting of Distiller's example goes too far.
    assert last(2.0) == pytest.approx(
        q * (2 * (ramp - start) + 4 * (end - ramp) + 6) / base, rel=1e-6
    )


def test_narang_is_the_published_rule():
    q, start, ramp, end, freq, theta_ratio = 0.2, 20, 60, 120, 10, 1.7
    schedule = schedules.narang(
        q, start=start, ramp=ramp, end=end, frequency=freq, steepening=theta_ratio
    )
    theta = 2 * q * freq / (2 * (ramp - start) + 3 * (end - ramp))
    threshold = 0.0
    for t in range(150):
        if start <= t <= end and (t - start) % freq == 0:
            if t < ramp:
                threshold = theta * (t - start + 1) / freq
            else:
                phi = theta_ratio * theta
                threshold = theta * (ramp - start + 1) + phi * (t - ramp + 1)
                threshold /= freq
        assert float(schedule(t)) == pytest.approx(threshold, rel=1e-5)


def test_cyclic_gives_every_part_its_turn():
    schedule = schedules.cyclic(3, every=7, rounds=2)
    expected = [i // 7 % 3 for i in range(42)] + [-1] * 10
    np.testing.assert_array_equal(schedule(np.arange(52)), expected)
    assert int(schedules.cyclic(3, every=7)(10**6)) == 10**6 // 7 % 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: schedules.one_shot(1.2), r"sparsity must be a fraction in \[0, 1\]"),
        (lambda: schedules.cubic(0.5, start=3, end=2), "need start <= end"),
        (lambda: schedules.linear(0.5, start=0, end=2, frequency=0), "frequency=0"),
        (lambda: schedules.geometric(1.0, start=0, end=2), "sparsity below 1"),
        (lambda: schedules.narang(0.1, start=5, ramp=3, end=9), "in order"),
        (lambda: schedules.narang(-0.1, start=0, ramp=3, end=9), "negative"),
        (lambda: schedules.narang(math.nan, start=0, ramp=3, end=9), "got nan"),
        (lambda: schedules.inverse_decay(math.inf), "rate must .* got inf"),
        (lambda: schedules.one_shot(math.nan), "sparsity must .* got nan"),
        (lambda: schedules.linear(0.5, start=0, end=math.inf), "end must .* got inf"),
        (lambda: schedules.cubic(0.5, start=math.nan, end=9), "start must .* got nan"),
        (lambda: schedules.cyclic(2, every=2.5), "every must be a whole .* got 2.5"),
        (lambda: schedules.cyclic(0, every=3), "parts=0"),
        (
            lambda: schedules.inverse_decay(-1.0),
            "rate must not be negative, and finite, got -1.0",
        ),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
