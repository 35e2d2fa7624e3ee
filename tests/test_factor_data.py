"""Factors that are best on data: against regressions by hand, and behind a ReLU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune
from jaxprune.statistics import moments
from jaxprune.surgery import _factor_data

pytestmark = pytest.mark.once


def draws(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def layer(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"][None])


def skewed(rows=400):
    """Inputs whose directions matter very differently."""
    mixed = draws(rows, 8) * np.geomspace(3, 0.05, 8) @ draws(8, 8, seed=1)
    return jnp.asarray(mixed + 0.3, jnp.float32)


PARAMS = {
    "w": jnp.asarray(draws(8, 6, seed=2), jnp.float32),
    "b": jnp.asarray(draws(6, seed=3), jnp.float32),
}


def test_moments_give_the_best_responses_of_the_rank():
    """The error is the tail of the spectrum of the responses."""
    x = skewed()
    small = jaxprune.factorise(
        layer, PARAMS, x, ranks={"w": 2}, moments=moments(layer, PARAMS, [x])
    )
    kernel = np.asarray(small.compose(small.variables)["w"])
    assert np.linalg.matrix_rank(kernel, tol=1e-4) == 2
    responses = np.asarray(x @ PARAMS["w"], np.float64)
    expected = (np.linalg.svd(responses, compute_uv=False)[2:] ** 2).sum()
    got = np.square(responses - np.asarray(x) @ kernel).sum()
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    plain = jaxprune.factorise(layer, PARAMS, x, ranks={"w": 2})
    cut = np.asarray(x @ plain.compose(plain.variables)["w"])
    assert got < 0.7 * np.square(responses - cut).sum()


@pytest.mark.parametrize("groups", [1, 2])
def test_moments_are_matched_by_position(groups):
    """Patches of convolutions are ordered otherwise than their kernels."""

    def conv(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (1, 1), "VALID", feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    params = {"w": jnp.asarray(draws(2, 3, 4 // groups, 8), jnp.float32)}
    x = jnp.asarray(draws(6, 6, 6, 4) * np.array([3, 0.1, 1, 0.3]) + 0.5, jnp.float32)
    small = jaxprune.factorise(
        conv, params, x, ranks=2, moments=moments(conv, params, [x])
    )
    out = np.asarray(conv(params, x), np.float64).reshape(-1, groups, 8 // groups)
    got = np.asarray(small.apply_fn(small.variables, x)).reshape(out.shape)
    expected = sum(
        (np.linalg.svd(out[:, g], compute_uv=False)[2:] ** 2).sum()
        for g in range(groups)
    )
    np.testing.assert_allclose(np.square(out - got).sum(), expected, rtol=2e-3)


def test_half_steps_never_raise_the_objective():
    """Zhang et al.: z in closed form, then M and c, at a fixed penalty."""
    y = draws(300, 5) @ draws(5, 5, seed=1)
    found = _factor_data.reduced_rank(y, y, 2, True)
    z = y.copy()

    def objective(z, found):
        gap = np.square(np.maximum(y, 0) - np.maximum(z, 0)).sum()
        return gap + 0.3 * np.square(z - _factor_data.predicted(y, found)).sum()

    seen = [objective(z, found)]
    for _ in range(5):
        z = _factor_data.relaxed(y, _factor_data.predicted(y, found), 0.3)
        seen.append(objective(z, found))
        found = _factor_data.reduced_rank(y, z, 2, True)
        seen.append(objective(z, found))
    assert (np.diff(seen) <= 1e-9 * seen[0]).all()
    assert seen[-1] < 0.9 * seen[0]


def test_closed_form_is_the_best_of_a_grid():
    y, made = np.meshgrid(np.linspace(-2, 2, 9), np.linspace(-2, 2, 9))
    z = _factor_data.relaxed(y, made, 0.4)
    grid = np.linspace(-4, 4, 4001)[:, None, None]

    def cost(z):
        gap = np.square(np.maximum(y, 0) - np.maximum(z, 0))
        return gap + 0.4 * np.square(z - made)

    assert (cost(z) <= cost(grid).min(0) + 1e-9).all()


@pytest.mark.parametrize("with_bias", [True, False])
def test_relu_is_met_better_than_by_a_linear_fit(with_bias):
    def net(params, x):
        made = x @ params["w"]
        return jax.nn.relu(made + params["b"][None] if with_bias else made)

    x = skewed()
    wanted = net(PARAMS, x)
    gaps = {}
    for relu in ((), "w"):
        small = jaxprune.factorise(
            net, PARAMS, x, ranks={"w": 2}, relu=relu,
            moments=moments(net, PARAMS, [x]),
        )  # fmt: skip
        gap = jnp.square(small.apply_fn(small.variables, x) - wanted)
        gaps[relu] = float(gap.sum())
        changed = not np.array_equal(small.variables["b"], PARAMS["b"])
        assert changed == (with_bias and relu == "w")
    assert gaps["w"] < 0.95 * gaps[()]


def test_layers_of_a_scan_have_moments_of_their_own():
    def net(params, x):
        def body(x, layer):
            return layer_of(layer, x), None

        return lax.scan(body, x, params, reverse=True)[0]

    def layer_of(params, x):
        return jnp.tanh(x @ params["w"])

    params = {"w": jnp.asarray(draws(3, 8, 8) / 3, jnp.float32)}
    x = skewed()
    small = jaxprune.factorise(
        net, params, x, ranks=3, moments=moments(net, params, [x])
    )
    last = np.asarray(params["w"][2])  # the first one that is met
    first = np.asarray(small.compose(small.variables)["w"][2])
    responses = np.asarray(x, np.float64) @ last
    expected = (np.linalg.svd(responses, compute_uv=False)[3:] ** 2).sum()
    got = np.square(responses - np.asarray(x) @ first).sum()
    np.testing.assert_allclose(got, expected, rtol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relu": "w"}, "relu= needs the moments"),
        ({"moments": []}, "no moments of the inputs of w"),
        ({"moments": [], "relu": "v"}, "relu names 'v', which matches no kernel"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        jaxprune.factorise(layer, PARAMS, skewed(4), ranks={"w": 2}, **options)
