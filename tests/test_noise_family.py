"""The Bridgeout family in the optimiser: one contract for all, and the law of each."""

import dataclasses
import importlib
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contract import quick_jit

import jaxprune
from jaxprune.training import (
    bridge_penalty,
    bridgeout,
    dropconnect,
    group_bridgeout,
    group_lasso,
    noisy_params,
)

# Many tests look at ``update`` alone.
pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore:.*noisy_params was never called"),
]

draws = importlib.import_module("jaxprune.training.noise._draws")

NOISES = {
    "bridgeout": lambda rate, **kw: bridgeout(
        rate, 1.0, target_fraction=1.0, relative=False, **kw
    ),
    "relative bridgeout": lambda rate, **kw: bridgeout(
        rate, 1.0, target_fraction=1.0, **kw
    ),
    "targeted bridgeout": lambda rate, **kw: bridgeout(
        rate, 1.5, target_fraction=0.5, **kw
    ),
    "dropconnect": dropconnect,
    "targeted dropconnect": lambda rate, **kw: dropconnect(
        rate, target_fraction=0.5, **kw
    ),
    "group by input": lambda rate, **kw: group_bridgeout(rate, 1.0, **kw),
    "group by output": lambda rate, **kw: group_bridgeout(
        rate, 1.5, inner_q=1.5, groups="output", **kw
    ),
}
PENALTIES = {
    "bridge 0.5": lambda strength, **kw: bridge_penalty(strength, 0.5, **kw),
    "bridge 1": lambda strength, **kw: bridge_penalty(strength, 1.0, **kw),
    "bridge 1.5": lambda strength, **kw: bridge_penalty(strength, 1.5, **kw),
    "group lasso": lambda strength, **kw: group_lasso(strength, **kw),
}
LINKS = NOISES | PENALTIES

W = np.array([[1.5, -0.6], [0.2, 0.4], [-0.9, 0.05]], np.float32)


def kernel(w=W):
    return {"kernel": jnp.asarray(w)}


def where(params, state, name):
    return noisy_params(params, state) if name in NOISES else params


# ------------------------------------------------------------------------ the contract


@pytest.fixture(scope="module")
def net():
    rng = np.random.default_rng(0)
    return {
        "conv": {
            "kernel": rng.normal(size=(3, 3, 4, 6)).astype(np.float32),
            "bias": np.ones(6, np.float32),
        },
        "head": {"kernel": rng.normal(size=(6, 1)).astype(np.float32)},
    }


@pytest.mark.parametrize("name", LINKS)
def test_contract(name, net, tmp_path):
    """Structure, dtypes, one trace, what has no kernel, a checkpoint."""
    tx = LINKS[name](0.3)
    params = jax.tree.map(jnp.asarray, net)
    params["half"] = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params["conv"])
    traces = []

    @quick_jit
    def step(params, state):
        traces.append(1)
        grads = jax.tree.map(jnp.ones_like, where(params, state, name))
        return tx.update(grads, state, params)

    state = tx.init(params)
    updates, after = step(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert int(after.count) == 1
    chex.assert_tree_all_finite(updates)
    for layer in ("conv", "half"):
        np.testing.assert_array_equal(updates[layer]["bias"], 1)
        assert np.any(updates[layer]["kernel"] != 1)
    step(params, after)
    assert len(traces) == 1

    plain = jax.tree.map(
        lambda x: (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        ),
        after,
    )
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", plain)
        saver.wait_until_finished()
        chex.assert_trees_all_equal(saver.restore(tmp_path / "state", plain), plain)


@pytest.mark.parametrize("name", LINKS)
def test_nothing_at_zero(name, net):
    tx = LINKS[name](0.0)

    @quick_jit
    def noisy_and_updates(params):
        state = tx.init(params)
        return where(params, state, name), tx.update(params, state, params)[0]

    for found in noisy_and_updates(net):
        chex.assert_trees_all_equal(found, net)


@pytest.mark.parametrize("name", LINKS)
def test_zero_and_tiny_weights(name):
    tiny = np.array([0.0, 1e-40, -1e-30, 1e-12], np.float32)
    w = np.zeros((4, 3, 2), np.float32)
    w[:, 0, 0], w[:, 2, 0] = 0.5, -2.0
    w[:, [0, 1, 1, 2], [1, 0, 1, 1]] = tiny[:, None]
    tx = LINKS[name](0.4)

    @quick_jit
    def noisy_and_updates(params):
        state = tx.init(params)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return where(params, state, name), updates

    found = noisy_and_updates({str(k): jnp.asarray(each) for k, each in enumerate(w)})
    chex.assert_tree_all_finite(found)
    noisy, updates = found
    np.testing.assert_array_equal(noisy["0"][w[0] == 0], 0)
    if name in PENALTIES:
        np.testing.assert_array_equal(updates["0"][w[0] == 0], 1)


@pytest.mark.parametrize("name", LINKS)
def test_inside_multi_steps(name):
    """Two mini-batches of one draw count as their mean."""
    params, tx = kernel(), LINKS[name](0.3)
    many = optax.MultiSteps(tx, 2)
    update = quick_jit(many.update)
    state, grads = many.init(params), [{"kernel": jnp.asarray(W) * k} for k in (1, 3)]
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps multiplies by a bool
        for grad in grads:
            updates, state = update(grad, state, params)
    mean = {"kernel": jnp.asarray(W) * 2}
    expected, _ = quick_jit(tx.update)(mean, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-5)


@pytest.mark.parametrize("name", LINKS)
def test_one_unit(name):
    tx = LINKS[name](0.3)

    @quick_jit
    def updates(params):
        state = tx.init(params)
        return tx.update(where(params, state, name), state, params)[0]

    chex.assert_tree_all_finite(updates(kernel(np.array([[0.7]], np.float32))))


@pytest.mark.parametrize("name", LINKS)
def test_update_needs_params(name):
    tx = LINKS[name](0.3)
    with pytest.raises(
        ValueError, match=r"call tx\.update\(grads, opt_state, params\)"
    ):
        tx.update(kernel(), tx.init(kernel()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dropconnect(1.0), r"rate must be in \[0, 1\), got 1.0"),
        (lambda: dropconnect(target_fraction=0.0), "target_fraction must be in"),
        (lambda: group_bridgeout(q=0.0), "q must be above 0, got 0.0"),
        (lambda: group_bridgeout(inner_q=0.5), "inner_q must be at least 1, got 0.5"),
        (lambda: group_bridgeout(groups="rows"), 'must be "input" or "output", got'),
        (lambda: bridge_penalty(-0.1), "strength must be at least 0, got -0.1"),
        (lambda: bridge_penalty(0.1, q=-1.0), "q must be above 0, got -1.0"),
        (lambda: group_lasso(-1.0), "strength must be at least 0, got -1.0"),
        (
            lambda: bridge_penalty(0.1).init({"bias": jnp.ones(3)}),
            "none of the 1 leaves .* gets a penalty",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ----------------------------------------------------------------------------- the laws


def draws_of(tx, params, count, function=None):
    """Noisy kernels, or what `function` makes of a state, over successive draws."""
    state = tx.init(params)
    function = function or (lambda s: noisy_params(params, s)["kernel"])
    counts = jnp.arange(count, dtype=jnp.int32)
    return np.asarray(
        quick_jit(jax.vmap(lambda c: function(state._replace(count=c))))(counts),
        np.float64,
    )


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4)])
def test_words_come_in_pairs_with_their_halves_swapped(shape):
    words = np.asarray(draws.random_words(jax.random.key(1), shape))
    assert (words.shape, words.dtype) == (shape, np.uint32)
    rows = words.reshape(-1, shape[-1] if shape else 1)
    even, odd = rows[:, 0::2], rows[:, 1::2]
    swapped = [int(f"{word:08x}"[4:] + f"{word:08x}"[:4], 16) for word in even.flat]
    swapped = np.reshape(swapped, even.shape)[:, : odd.shape[1]]
    np.testing.assert_array_equal(odd, swapped)
    assert len(np.unique(even)) == even.size


@pytest.mark.parametrize("wide", [False, True])
def test_the_lowest_are_those_of_a_sort(wide):
    x = np.random.default_rng(0).exponential(size=(6, 9, 2)).round(1)
    x[0, :3], x[1] = np.inf, 0.0
    with jax.enable_x64(wide):
        for fraction in (0.0, 0.3, 0.5, 1.0):
            found = draws.lowest(jnp.asarray(x, float), fraction, axis=1)
            rank = int(9 * fraction)
            ordered = np.append(np.sort(x, axis=1), np.full((6, 1, 2), np.nan), axis=1)
            expected = np.isnan(ordered[:, [rank]]) | (x < ordered[:, [rank]])
            np.testing.assert_array_equal(found, expected)


def test_dropconnect_is_bridgeout_of_norm_two_for_positive_weights():
    params = kernel(abs(W))
    ours = noisy_params(params, dropconnect(0.3, key=5).init(params))
    bridge = noisy_params(
        params, bridgeout(0.3, 2.0, target_fraction=1.0, key=5).init(params)
    )
    np.testing.assert_allclose(ours["kernel"], bridge["kernel"], rtol=1e-6, atol=1e-6)


def test_dropconnect_drops_or_scales_up_and_so_does_its_gradient():
    rate, n = 0.3, 4_000
    found = draws_of(dropconnect(rate), kernel(), n)
    kept = np.isclose(found, W / (1 - rate), rtol=1e-5)
    assert np.all(kept ^ (found == 0))
    assert np.all(abs(kept.mean(0) - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / n))
    tx = dropconnect(rate)
    state = tx.init(kernel())
    updates, _ = tx.update({"kernel": jnp.full(W.shape, 2.0)}, state, kernel())
    np.testing.assert_allclose(
        updates["kernel"], np.where(kept[0], 2 / (1 - rate), 0), rtol=1e-6
    )


def test_targeted_dropconnect_spares_the_large():
    w = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32)
    tx = dropconnect(0.5, target_fraction=0.5)
    found = draws_of(tx, kernel(w), 64)
    touched = (found != w).any((0, 1, 2))  # of 64 draws of 9 weights one differs
    norms = np.sqrt((w**2).sum((0, 1)))
    for o in range(5):
        smallest = set(np.argsort(norms[:, o])[:2].tolist())
        assert set(np.flatnonzero(touched[:, o]).tolist()) == smallest


def group_norms(w, groups, inner_q):
    """The norm of each weight's group, by loop."""
    norms = np.zeros(w.shape)
    axis = w.ndim - (2 if groups == "input" else 1)
    for unit in range(w.shape[axis]):
        rows = tuple(unit if a == axis else slice(None) for a in range(w.ndim))
        norms[rows] = (abs(w[rows]) ** inner_q).sum() ** (1 / inner_q)
    return norms


@pytest.mark.parametrize("groups", ["input", "output"])
@pytest.mark.parametrize(("q", "inner_q"), [(1.0, 2.0), (1.5, 1.0)])
def test_the_noise_of_a_weight_is_as_large_as_its_group(groups, q, inner_q):
    w = np.random.default_rng(1).normal(size=(2, 2, 3, 4)).astype(np.float32)
    rate, n = 0.3, 20_000
    tx = group_bridgeout(rate, q, inner_q=inner_q, groups=groups)
    found = draws_of(tx, kernel(w), n) - w
    size = group_norms(w.astype(np.float64), groups, inner_q) ** (q / 2)
    for value, share in ((rate / (1 - rate), 1 - rate), (-1.0, rate)):
        there = np.isclose(found, size * value, rtol=1e-4, atol=1e-5)
        assert np.all(
            abs(there.mean(0) - share) < 4.5 * np.sqrt(share * (1 - share) / n)
        )


@pytest.mark.parametrize("groups", ["input", "output"])
@pytest.mark.parametrize(("q", "inner_q"), [(1.0, 2.0), (1.5, 1.0), (2.0, 3.0)])
def test_the_pull_back_of_a_group_is_its_jacobian(groups, q, inner_q):
    tx = group_bridgeout(0.3, q, inner_q=inner_q, groups=groups)
    state = tx.init(kernel())
    w = W.astype(np.float64)
    norms = group_norms(w, groups, inner_q)
    noise = np.asarray(noisy_params(kernel(), state)["kernel"], np.float64) - w
    xi = noise / norms ** (q / 2)
    grads = np.random.default_rng(2).normal(size=W.shape)
    expected = grads.copy()
    for i, j, k, m in itertools.product(range(3), range(2), range(3), range(2)):
        if (i == k) if groups == "input" else (j == m):
            slope = np.sign(w[k, m]) * abs(w[k, m]) ** (inner_q - 1)
            slope *= norms[k, m] ** (1 - inner_q)
            spread = q / 2 * norms[i, j] ** (q / 2 - 1) * slope
            expected[k, m] += grads[i, j] * spread * xi[i, j]
    updates, _ = tx.update({"kernel": jnp.float32(grads)}, state, kernel())
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-3, atol=1e-4)


def test_group_noise_averages_to_a_group_lasso_with_features_scaled():
    rate, n = 0.4, 100_000
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    tx = group_bridgeout(rate, 1.0)

    def update(state):
        def loss(p):
            return jnp.sum((jnp.float32(y) - jnp.float32(x) @ p["kernel"]) ** 2)

        grads = jax.grad(loss)(noisy_params(kernel(), state))
        return tx.update(grads, state, kernel())[0]["kernel"]

    found = draws_of(tx, kernel(), n, update)
    w = W.astype(np.float64)
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    energy = (x**2).sum(0)[:, None]
    penalty = rate / (1 - rate) * 2 * energy * w / norms  # 2 outputs
    plain = 2 * x.T @ (x @ w - y)
    error = found.std(0) / math.sqrt(n)
    assert np.all(abs(found.mean(0) - plain - penalty) < 4.5 * error)
    assert np.any(abs(found.mean(0) - plain) > 10 * error)


def test_a_row_of_zeros_stays_zero():
    w = np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)
    tx = group_bridgeout(0.5, 1.0)
    noise = draws_of(tx, kernel(w), 8) - w
    assert np.all(noise[:, 0] == 0)
    np.testing.assert_allclose(noise[:, 1] ** 2, 5.0, rtol=1e-4)


# ------------------------------------------------------------------------ the penalties


@pytest.mark.parametrize("q", [0.5, 1.0, 1.5, 2.0])
def test_bridge_penalty_is_the_noise_of_unit_features_on_average(q):
    rate = 0.3
    tx = bridge_penalty(rate / (1 - rate), q)
    updates, _ = tx.update(kernel(0 * W), tx.init(kernel()), kernel())
    expected = rate / (1 - rate) * q * abs(W) ** (q - 1) * np.sign(W)
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


def test_group_lasso_of_filters():
    w = np.random.default_rng(4).normal(size=(3, 3, 2, 4)).astype(np.float32)
    w[..., 1] = 0
    tx = group_lasso(0.5)
    updates, _ = tx.update(kernel(0 * w), tx.init(kernel(w)), kernel(w))
    for o in range(4):
        norm = np.linalg.norm(w[..., o])
        expected = 0.5 * math.sqrt(18) * w[..., o] / norm if norm else 0 * w[..., o]
        np.testing.assert_allclose(updates["kernel"][..., o], expected, rtol=1e-5)


@pytest.mark.parametrize("collection", [True, False])
def test_group_lasso_of_traced_units(collection):
    rng = np.random.default_rng(5)
    params = {
        "one": rng.normal(size=(3, 4)).astype(np.float32),
        "two": rng.normal(size=(8, 2)).astype(np.float32),
    }

    def apply_fn(variables, x):
        p = variables["params"] if collection else variables
        hidden = jnp.repeat(jax.nn.relu(x @ p["one"]), 2, axis=-1)  # 2 rows a unit
        return hidden @ p["two"]

    variables = {"params": params} if collection else params
    groups = jaxprune.trace(apply_fn, variables, np.ones((1, 3), np.float32))
    # The copies can be cut too, but here it is the hidden units that are meant.
    by_name = {n: g for n, g in groups.items() if g.size == 4}
    (group,) = by_name.values()
    tx = group_lasso(0.1, dataclasses.replace(groups, by_name=by_name))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    expected = jax.tree.map(np.zeros_like, params)
    for unit in range(4):
        parts = {"one": (slice(None), [unit]), "two": ([2 * unit, 2 * unit + 1],)}
        weights = np.concatenate([params[k][rows].ravel() for k, rows in parts.items()])
        scale = 0.1 * math.sqrt(weights.size) / np.linalg.norm(weights)
        for name, rows in parts.items():
            expected[name][rows] += scale * params[name][rows]
    assert group.size == 4
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_group_lasso_of_other_parameters():
    variables = {"one": np.ones((3, 4), np.float32), "two": np.ones((4, 2), np.float32)}
    groups = jaxprune.trace(
        lambda v, x: jax.nn.relu(x @ v["one"]) @ v["two"],
        variables,
        np.ones((1, 3), np.float32),
    )
    small = {"one": jnp.ones((3, 3)), "two": jnp.ones((3, 2))}
    with pytest.raises(
        ValueError, match=r"one has shape \(3, 3\), but the traced leaf"
    ):
        group_lasso(0.1, groups).init(small)


def test_the_strength_follows_its_schedule():
    tx = bridge_penalty(lambda count: jnp.float32(0.5) ** count, 1.0)
    state = tx.init(kernel())
    for strength in (1.0, 0.5, 0.25):
        updates, state = tx.update(kernel(0 * W), state, kernel())
        np.testing.assert_allclose(updates["kernel"], strength * np.sign(W), rtol=1e-6)


def test_penalties_touch_masked_leaves_only():
    params = {"u": jnp.ones((2, 2)), "v": jnp.ones((2, 2))}
    tx = group_lasso(1.0, mask={"u": True, "v": False})
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    np.testing.assert_allclose(updates["u"], 1, rtol=1e-6)
    assert np.all(updates["v"] == 0)


# --------------------------------------------------------------------------- sparser nets


def trained_weights(q, key, x, y, w):
    """A linear model, trained with noise."""
    tx = optax.chain(
        bridgeout(0.3, q, target_fraction=1.0, relative=False, eps=1e-6, key=key),
        optax.clip_by_global_norm(1.0),
        optax.sgd(optax.cosine_decay_schedule(0.02, 6_000)),
    )

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.sum((x @ p["kernel"] - y) ** 2))(
            noisy_params(params, state)
        )
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"kernel": w}
    carry, _ = jax.lax.scan(step, (params, tx.init(params)), length=6_000)
    return carry[0]["kernel"]


def a_problem(seed):
    """12 of 16 features are irrelevant."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, 16)) / 8
    true = np.zeros((16, 1))
    true[:4, 0] = (1.0, -1.0, 0.8, -0.8)
    y = x @ true + 0.02 * rng.normal(size=(64, 1))
    return tuple(np.float32(a) for a in (x, y, 0.1 * rng.normal(size=(16, 1))))


def test_the_smaller_q_the_sparser_the_irrelevant_weights():
    norms, seeds = (2.0, 1.5, 1.0), range(3)
    cases = [(q, seed, *a_problem(seed)) for q in norms for seed in seeds]
    q, seed, *problem = (np.stack(each) for each in zip(*cases, strict=True))
    with jax.numpy_dtype_promotion("standard"):  # the schedule divides by an integer
        weights = quick_jit(jax.vmap(trained_weights))(
            jnp.float32(q), jax.vmap(jax.random.key)(seed), *problem
        )
    small = (np.abs(weights[:, 4:]) < 1e-3).reshape(len(norms), -1).sum(1)
    assert small[2] > small[1] >= small[0], small
