import functools
import importlib
import re
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contract import quick_jit
from flax import nnx
from flax.training.train_state import TrainState

from jaxprune import training
from jaxprune.training import BridgeoutState, noisy_params

# The published noise, on all weights: what the closed forms are of. What differs by
# default is in test_bridgeout_defaults.py.
bridgeout = functools.partial(training.bridgeout, relative=False, target_fraction=1.0)
# Many tests look at ``update`` alone.
pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore:.*noisy_params was never called"),
]

W = np.array([[-1.5], [-0.6], [0.2], [0.4], [0.9], [2.0]], np.float32)
X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 1)).astype(np.float32)


def squared_loss(params):
    return jnp.sum((Y - X @ params["kernel"]) ** 2)


def net_loss(params, batch):
    x, y = batch
    one, two = params["one"], params["two"]
    hidden = jnp.tanh(x @ one["kernel"] + one["bias"][None])
    return jnp.mean((hidden @ two["kernel"] + two["bias"][None] - y) ** 2)


@pytest.fixture(scope="module")
def net():
    one, two = jax.random.normal(jax.random.key(0), (2, 6, 6))
    return {
        "one": {"kernel": one, "bias": jnp.full(6, 0.1, jnp.float32)},
        "two": {"kernel": two[:, :1], "bias": jnp.zeros(1)},
    }


@pytest.fixture(scope="module")
def batches():
    keys = jax.random.split(jax.random.key(0), 4)
    return [(jax.random.normal(k, (8, 6)), jax.random.normal(k, (8, 1))) for k in keys]


def over_draws(function, state, count):
    """Stacks function(state) over `count` successive draws."""
    counts = jnp.arange(count, dtype=jnp.int32)
    return quick_jit(jax.vmap(lambda c: function(state._replace(count=c))))(counts)


def train(tx, params, batches):
    @quick_jit
    def step(params, opt_state, batch):
        grads = jax.grad(net_loss)(noisy_params(params, opt_state), batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for batch in batches:
        params, opt_state = step(params, opt_state, batch)
    return params, opt_state


# --- the noise -----------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.5, 1.0, 1.5, 2.0])
def test_mean_and_variance_of_the_noise(q):
    rate, n = 0.3, 100_000
    params = {"kernel": jnp.asarray(W)}
    state = bridgeout(rate, q).init(params)
    draws = over_draws(lambda s: noisy_params(params, s)["kernel"], state, n)
    draws = np.asarray(draws, np.float64)
    variance = np.abs(W) ** q * rate / (1 - rate)
    # Fourth central moment of a variable that is rate / (1 - rate) or -1.
    fourth = np.abs(W) ** (2 * q) * (rate**4 / (1 - rate) ** 3 + rate)
    assert np.all(abs(draws.mean(0) - W) < 4 * np.sqrt(variance / n))
    bound = 4 * np.sqrt((fourth - variance**2) / n)
    assert np.all(abs(draws.var(0) - variance) < bound)


def test_entries_and_draws_are_independent():
    n = 20_000
    params = {"kernel": jnp.ones((3, 2)), "other": jnp.ones((3, 2))}
    state = bridgeout(0.3, 1.0).init(params)
    draws = over_draws(lambda s: noisy_params(params, s), state, n)
    flat = np.concatenate([np.reshape(x, (n, 6)) for x in draws.values()], axis=1)
    columns = np.concatenate([flat[1:], flat[:-1]], axis=1)  # with the draw before
    correlation = np.corrcoef(columns, rowvar=False)
    assert np.all(abs(correlation - np.eye(24)) < 5 / np.sqrt(n))


@pytest.mark.parametrize("rate", [0.3, 0.5])
def test_q_two_is_dropconnect_for_positive_and_its_mirror_for_negative_weights(rate):
    n = 20_000
    params = {"kernel": jnp.asarray(W)}
    state = bridgeout(rate, 2.0).init(params)
    draws = np.asarray(
        over_draws(lambda s: noisy_params(params, s), state, n)["kernel"]
    )
    kept = np.where(W > 0, W / (1 - rate), W * (1 - rate / (1 - rate)))
    dropped = np.where(W > 0, 0, 2 * W)
    is_kept = np.isclose(draws, kept, atol=1e-5)
    assert np.all(is_kept ^ np.isclose(draws, dropped, atol=1e-5))
    error = 4 * np.sqrt(rate * (1 - rate) / n)
    assert np.all(abs(is_kept.mean(0) - (1 - rate)) < error)


def test_rate_zero_is_the_identity(net, batches):
    tx = bridgeout(rate=0.0)
    state = tx.init(net)
    chex.assert_trees_all_equal(noisy_params(net, state), net)
    grads = jax.grad(net_loss)(net, batches[0])
    updates, _ = tx.update(grads, state, net)
    chex.assert_trees_all_equal(updates, grads)


def test_clean_params_and_excluded_leaves_are_untouched(net):
    before = jax.tree.map(np.array, net)
    noisy = noisy_params(net, bridgeout().init(net))
    chex.assert_trees_all_equal(net, before)
    for layer in net:
        assert np.all(noisy[layer]["kernel"] != net[layer]["kernel"])
        np.testing.assert_array_equal(noisy[layer]["bias"], net[layer]["bias"])


def test_draws_differ_by_key_count_and_path_and_repeat_otherwise():
    params = {"u": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}
    state = bridgeout(key=1).init(params)
    draw = noisy_params(params, state)
    chex.assert_trees_all_equal(draw, noisy_params(params, state))
    typed = bridgeout(key=jax.random.key(1)).init(params)
    chex.assert_trees_all_equal(draw, noisy_params(params, typed))
    assert np.any(draw["u"] != draw["v"])
    for other in (bridgeout(key=2).init(params), state._replace(count=state.count + 1)):
        changed = noisy_params(params, other)
        assert all(np.any(changed[name] != draw[name]) for name in params)


def test_a_leaf_keeps_its_draw_when_others_come_and_go():
    small = {"v": jnp.ones((8, 8))}
    large = {"u": jnp.ones((8, 8)), "v": jnp.ones((8, 8)), "w": jnp.ones((2, 2))}
    draws = [noisy_params(p, bridgeout().init(p))["v"] for p in (small, large)]
    np.testing.assert_array_equal(*draws)


# --- the pull-back -------------------------------------------------------------------


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_updates_average_to_the_gradient_of_the_penalised_loss(q):
    rate, n = 0.5, 200_000
    params = {"kernel": jnp.asarray(W)}
    tx = bridgeout(rate, q)

    def gradients(state):
        at_noise = jax.grad(squared_loss)(noisy_params(params, state))
        return at_noise["kernel"], tx.update(at_noise, state, params)[0]["kernel"]

    raw, pulled = over_draws(gradients, tx.init(params), n)
    x, y, w = (a.astype(np.float64) for a in (X, Y, W))
    plain = 2 * x.T @ (x @ w - y)
    energy = (x**2).sum(0)[:, None]
    penalty = rate / (1 - rate) * energy * q * abs(w) ** (q - 1) * np.sign(w)

    def off(sample, expected):
        sample = np.asarray(sample, np.float64)
        error = sample.std(0) / np.sqrt(n)
        return abs(sample.mean(0) - expected) / error

    assert np.all(off(pulled, plain + penalty) < 4)
    assert np.all(off(pulled, plain) > 10)
    # Why the pull-back exists: gradients at the noisy weights carry no penalty.
    assert np.all(off(raw, plain) < 4)
    assert np.all(off(raw, plain + penalty) > 10)


@pytest.mark.parametrize("q", [0.7, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("target_fraction", [1.0, 0.5])
def test_update_multiplies_by_the_published_factor(q, target_fraction):
    rate = 0.3
    w = np.random.default_rng(2).normal(size=(3, 3, 6, 5))
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    tx = bridgeout(rate, q, target_fraction=target_fraction)
    state = tx.init(params)
    noise = np.asarray(noisy_params(params, state)["kernel"], np.float64) - w
    xi = noise / abs(w) ** (q / 2)
    factor = 1 + q / 2 * abs(w) ** (q / 2 - 1) * np.sign(w) * xi
    grads = {"kernel": jnp.full(w.shape, 3.0)}
    updates, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["kernel"], 3 * factor, rtol=2e-3, atol=1e-4)


def test_inside_and_outside_differentiation_agree(net, batches):
    state = bridgeout(0.5, 1.0).init(net)
    inside = jax.grad(net_loss)(noisy_params(net, state), batches[0])
    outside = jax.grad(lambda p: net_loss(noisy_params(p, state), batches[0]))(net)
    chex.assert_trees_all_close(inside, outside, rtol=1e-6)
    clean = jax.grad(net_loss)(net, batches[0])
    assert np.any(abs(inside["one"]["kernel"] - clean["one"]["kernel"]) > 1e-2)


@pytest.mark.parametrize("w", [0.0, 1e-40, -1e-40, 1e-30, 1e-12])
@pytest.mark.parametrize("q", [0.5, 1.0, 2.0])
def test_zero_and_tiny_weights_are_finite(q, w):
    params = {"kernel": jnp.full((16, 16), w, jnp.float32)}
    tx = bridgeout(0.5, q)
    state = tx.init(params)
    noisy = noisy_params(params, state)["kernel"]
    updates, _ = tx.update({"kernel": jnp.ones((16, 16))}, state, params)
    assert np.all(np.isfinite(noisy))
    bound = 1 + q / 2 * 1e-12 ** (q / 2 - 1)
    assert np.all(abs(updates["kernel"]) <= bound * (1 + 1e-5))
    if w == 0:
        np.testing.assert_array_equal(noisy, 0)
        np.testing.assert_array_equal(updates["kernel"], 1)


def test_pruned_weights_stay_exactly_zero(net, batches):
    masks = jax.tree.map(lambda w: abs(w) > 0.5 if w.ndim > 1 else w == w, net)

    def masked_loss(params, batch):
        return net_loss(jax.tree.map(jnp.where, masks, params, zeros), batch)

    zeros = jax.tree.map(jnp.zeros_like, net)
    params = jax.tree.map(jnp.where, masks, net, zeros)
    tx = optax.chain(
        bridgeout(0.5, 1.0),
        optax.clip_by_global_norm(5.0),
        optax.add_decayed_weights(1e-2),
        optax.sgd(0.05, momentum=0.9),
    )
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        noisy = noisy_params(params, opt_state)
        grads = jax.grad(masked_loss)(noisy, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, noisy

    for i in range(60):
        params, opt_state, noisy = step(params, opt_state, batches[i % 4])
        for tree in (params, noisy):
            removed = jax.tree.map(lambda w, m: w[~m], tree, masks)
            assert sum(r.size for r in jax.tree.leaves(removed)) > 10
            assert all(np.all(r == 0) for r in jax.tree.leaves(removed))
    assert all(np.all(np.isfinite(w)) for w in jax.tree.leaves(params))
    assert np.any(params["one"]["kernel"] != net["one"]["kernel"])


# --- targeting -----------------------------------------------------------------------


def targets_by_loop(w, fraction):
    """Section by section: rank the inputs of every output, keep those below."""
    noisy = np.zeros(w.shape, bool)
    fan_in = w.shape[-2]
    for out in range(w.shape[-1]):
        norms = [np.sqrt(np.sum(np.square(w[..., i, out]))) for i in range(fan_in)]
        threshold = sorted(norms)[max(int(fan_in * fraction), 1)]
        for i in range(fan_in):
            noisy[..., i, out] = norms[i] < threshold
    return noisy


@pytest.mark.parametrize("shape", [(3, 3, 10, 4), (10, 6), (5, 8, 3), (3, 3, 3, 8)])
def test_targets_are_the_small_kernels_of_each_filter(shape):
    @quick_jit
    def noisy_and_updates(weight, fraction):
        params = {"kernel": weight}
        tx = bridgeout(0.5, 1.0, target_fraction=fraction)
        state = tx.init(params)
        updates, _ = tx.update({"kernel": jnp.ones(shape)}, state, params)
        return noisy_params(params, state)["kernel"], updates["kernel"]

    w = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    tied = np.sign(w) * np.ceil(2 * abs(w)) * 2  # squares and their sums are exact
    for fraction in (0.25, 0.7, 0.9):
        for weight in (w, tied):
            noisy, updates = noisy_and_updates(weight, np.float32(fraction))
            expected = targets_by_loop(weight, fraction)
            # At rate 0.5 xi is -1 or 1, so noise is zero on no target.
            np.testing.assert_array_equal(noisy != weight, expected)
            np.testing.assert_array_equal(updates != 1, expected)
        assert targets_by_loop(w, fraction).reshape(-1, shape[-1]).any(0).all()


def test_targeting_a_leaf_without_inputs_is_refused(net):
    tx = bridgeout(target_fraction=0.5, mask=lambda p: jax.tree.map(lambda _: True, p))
    with pytest.raises(ValueError, match=r"'one/bias' has shape \(6,\)"):
        tx.init(net)


# --- masks ---------------------------------------------------------------------------


def noised(tx, params):
    return sorted(optax.tree.get(tx.init(params), "noised"))


def test_default_mask_takes_kernels_only():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
            x = nn.MultiHeadDotProductAttention(num_heads=2)(x.reshape(2, -1, 4))
            return nn.Dense(4)(nn.LayerNorm()(x)).reshape(2, 4, 4, 4), None

    stack = nn.scan(
        Block,
        {"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
        in_axes=nn.broadcast,
    )()
    x = jnp.zeros((2, 4, 4, 4))
    params = jax.eval_shape(stack.init, jax.random.key(0), x, None)["params"]
    attention = "MultiHeadDotProductAttention_0"
    assert params[attention]["query"]["bias"].ndim == 3  # as many axes as a kernel
    state = jax.eval_shape(bridgeout().init, params)
    assert sorted(state.noised) == [
        "Conv_0/kernel",
        "Dense_0/kernel",
        *(f"{attention}/{name}/kernel" for name in ("key", "out", "query", "value")),
    ]


@pytest.mark.parametrize(
    "mask",
    [
        {"one": {"kernel": False, "bias": True}, "two": {"kernel": True, "bias": True}},
        {"one": {"kernel": np.False_, "bias": jnp.array(True)}, "two": True},
        lambda params: jax.tree.map(lambda w: w.shape != (6, 6), params),
    ],
    ids=["tree", "prefix", "callable"],
)
def test_mask_chooses_leaves(net, mask):
    tx = bridgeout(mask=mask)
    assert noised(tx, net) == ["one/bias", "two/bias", "two/kernel"]
    noisy = noisy_params(net, tx.init(net))
    np.testing.assert_array_equal(noisy["one"]["kernel"], net["one"]["kernel"])
    assert np.all(noisy["one"]["bias"] != net["one"]["bias"])
    np.testing.assert_array_equal(noisy["two"]["bias"], 0)  # zeros get no noise


def test_several_links_with_disjoint_leaves_act_together(net, batches):
    def only(name):
        return lambda p: {k: k == name for k in p}

    both = optax.chain(
        optax.masked(bridgeout(0.5, 1.0), only("one")),
        optax.masked(bridgeout(0.5, 2.0), only("two")),
        optax.sgd(0.1),
    )
    split = optax.partition(
        {
            "one": optax.chain(bridgeout(0.5, 1.0), optax.sgd(0.1)),
            "two": optax.chain(bridgeout(0.5, 2.0), optax.sgd(0.1)),
        },
        {"one": "one", "two": "two"},
    )
    draws = {
        q: noisy_params(net, bridgeout(0.5, q).init(net))[name]
        for name, q in (("one", 1.0), ("two", 2.0))
    }
    for tx in (both, split):
        noisy = noisy_params(net, tx.init(net))
        chex.assert_trees_all_equal(noisy, {"one": draws[1.0], "two": draws[2.0]})
    ends = [train(tx, net, batches)[0] for tx in (both, split)]
    chex.assert_trees_all_close(*ends, rtol=1e-6)


# --- composition with the rest of the ecosystem --------------------------------------


def reference_training(params, batches, rate, q, learning_rate):
    """SGD on the published equations in float64; only the draws are the library's."""
    state = bridgeout(rate, q).init(params)
    for count, batch in enumerate(batches):
        noisy = noisy_params(params, state._replace(count=jnp.int32(count)))
        grads = jax.grad(net_loss)(noisy, batch)

        def step(path, w, wn, g):
            if path[-1].key == "bias":
                return w - learning_rate * g
            w, wn, g = (np.asarray(a, np.float64) for a in (w, wn, g))
            xi = np.where((wn - w) > 0, rate / (1 - rate), -1)
            factor = 1 + q / 2 * abs(w) ** (q / 2 - 1) * np.sign(w) * xi
            return jnp.asarray(w - learning_rate * g * factor, jnp.float32)

        params = jax.tree.map_with_path(step, params, noisy, grads)
    return params


def wrapped(sgd):
    """One optimiser in every form the state may be buried in."""
    static = ("target_fraction", "mask", "eps", "key")
    everything = optax.chain(bridgeout(0.3, 1.5), sgd)
    return {
        "chain": everything,
        "named_chain": optax.named_chain(("noise", bridgeout(0.3, 1.5)), ("sgd", sgd)),
        "inject": optax.chain(
            optax.inject_hyperparams(bridgeout, static_args=static)(0.3, 1.5), sgd
        ),
        "inject_all": optax.chain(optax.inject_hyperparams(bridgeout)(0.3, 1.5), sgd),
        "inject_outer": optax.inject_hyperparams(
            lambda learning_rate: optax.chain(
                bridgeout(0.3, 1.5), optax.sgd(learning_rate)
            )
        )(0.1),
        "apply_if_finite": optax.apply_if_finite(everything, 3),
        "multi_steps_of_one": optax.MultiSteps(everything, 1),
        "masked": optax.chain(
            optax.masked(
                bridgeout(0.3, 1.5), lambda p: jax.tree.map(lambda w: w.ndim > 1, p)
            ),
            sgd,
        ),
        "partition": optax.partition(
            {"all": everything, "none": optax.set_to_zero()}, lambda p: "all"
        ),
        "schedules": optax.chain(bridgeout(lambda _: 0.3, lambda _: 1.5), sgd),
    }


@pytest.fixture(scope="module")
def reference(net, batches):
    return reference_training(net, batches, 0.3, 1.5, 0.1)


@pytest.mark.parametrize("form", wrapped(optax.identity()))
def test_every_wrapper_trains_alike(form, net, batches, reference):
    tx = wrapped(optax.sgd(0.1))[form]
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps multiplies by a bool
        params, opt_state = train(tx, net, batches)
    chex.assert_trees_all_close(params, reference, rtol=1e-4, atol=1e-5)
    assert optax.tree.get(opt_state, "BridgeoutState").count == len(batches)


def test_train_state(net, batches, reference):
    tx = optax.chain(bridgeout(0.3, 1.5), optax.sgd(0.1))
    state = TrainState.create(apply_fn=net_loss, params=net, tx=tx)

    @quick_jit
    def step(state, batch):
        noisy = noisy_params(state.params, state.opt_state)
        return state.apply_gradients(grads=jax.grad(net_loss)(noisy, batch))

    for batch in batches:
        state = step(state, batch)
    chex.assert_trees_all_close(state.params, reference, rtol=1e-4, atol=1e-5)


def test_nnx_optimizer(batches):
    model = nnx.Linear(6, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(bridgeout(0.3, 1.5), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, shared = nnx.split(model, nnx.Param)
    start = jax.tree.map(jnp.copy, shared)  # the optimizer updates the model in place

    def loss(params, batch):
        return jnp.mean((nnx.merge(graph, params)(batch[0]) - batch[1]) ** 2)

    params, opt_state = start, tx.init(start)
    for batch in batches:
        noisy = noisy_params(nnx.state(model, nnx.Param), optimizer.opt_state)
        assert np.all(noisy["kernel"][...] != model.kernel[...])
        np.testing.assert_array_equal(noisy["bias"][...], model.bias[...])
        optimizer.update(model, jax.grad(loss)(noisy, batch))
        grads = jax.grad(loss)(noisy_params(params, opt_state), batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert np.any(params["kernel"][...] != start["kernel"][...])
    chex.assert_trees_all_close(nnx.state(model, nnx.Param), params, rtol=1e-6)


def test_outside_multi_steps_every_mini_batch_has_its_own_draw(net, batches):
    link = bridgeout(0.3, 1.5)
    multi = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx = optax.chain(link, multi)
    with jax.numpy_dtype_promotion("standard"):
        params, _ = train(tx, net, batches[:2])
    pulled, state = [], link.init(net)
    for batch in batches[:2]:
        grads = jax.grad(net_loss)(noisy_params(net, state), batch)
        update, state = link.update(grads, state, net)
        pulled.append(update)
    expected = jax.tree.map(lambda w, a, b: w - 0.1 * (a + b) / 2, net, *pulled)
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)


def test_inside_multi_steps_one_draw_is_held(net, batches):
    link = bridgeout(0.3, 1.5)
    tx = optax.MultiSteps(optax.chain(link, optax.sgd(0.1)), 2)
    state = link.init(net)
    noisy = noisy_params(net, state)
    grads = [jax.grad(net_loss)(noisy, batch) for batch in batches[:2]]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    pulled, _ = link.update(mean, state, net)
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, net, pulled)
    params, opt_state, update = net, tx.init(net), quick_jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):
        for grad in grads:
            chex.assert_trees_all_equal(noisy_params(net, opt_state), noisy)
            updates, opt_state = update(grad, opt_state, params)
            params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
    assert np.any(
        noisy_params(net, opt_state)["one"]["kernel"] != noisy["one"]["kernel"]
    )


def rate_of_draw(w, noisy):
    """At q = 2 a positive weight becomes 0 or w / (1 - rate)."""
    return 1 - w / np.max(noisy)


def schedule(count):
    return 0.1 + 0.1 * jnp.minimum(count, 4).astype(jnp.float32)


@pytest.mark.parametrize(("form", "lag"), [("direct", 0), ("injected", 1)])
def test_a_scheduled_rate_drives_noise_and_pull_back_together(form, lag):
    inject = optax.inject_hyperparams(bridgeout) if form == "injected" else bridgeout
    tx = optax.chain(inject(rate=schedule, q=2.0), optax.scale(-0.0))
    params = {"kernel": jnp.full((20, 20), 0.5)}
    grads = {"kernel": jnp.ones((20, 20))}
    link_state = tx.init(params)
    for count in range(5):
        noisy = noisy_params(params, link_state)["kernel"]
        expected = float(schedule(max(count - lag, 0)))
        assert rate_of_draw(0.5, noisy) == pytest.approx(expected, abs=1e-5)
        first = tx.update(grads, link_state, params)[1]
        pulled = inject(rate=schedule, q=2.0).update(grads, link_state[0], params)[0]
        # For q = 2 and w > 0 the factor is w~ / w.
        np.testing.assert_allclose(pulled["kernel"], noisy / 0.5, atol=1e-5)
        link_state = first


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_everything_injected_and_traced(net, fraction):
    tx = optax.inject_hyperparams(bridgeout)(0.5, 1.0, target_fraction=fraction, key=4)
    state = jax.jit(tx.init)(net)
    plain = bridgeout(0.5, 1.0, target_fraction=fraction, key=4)
    expected = noisy_params(net, plain.init(net))
    chex.assert_trees_all_close(noisy_params(net, state), expected, rtol=1e-6)
    updates, after = jax.jit(tx.update)(net, state, net)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    expected, _ = plain.update(net, plain.init(net), net)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_q_follows_a_schedule():
    tx = bridgeout(0.5, lambda count: jnp.where(count < 2, 2.0, 1.0))
    params = {"kernel": jnp.full((4, 4), 0.25)}
    state = tx.init(params)
    sizes = []
    for _ in range(3):
        noise = noisy_params(params, state)["kernel"] - params["kernel"]
        sizes.append(float(abs(noise[0, 0])))
        _, state = tx.update(params, state, params)
    np.testing.assert_allclose(sizes, [0.25, 0.25, 0.5], rtol=1e-5)


def test_outside_apply_if_finite_a_rejected_step_gets_a_new_draw(net, batches):
    tx = optax.chain(bridgeout(), optax.apply_if_finite(optax.sgd(0.1), 5))
    opt_state = tx.init(net)
    grads = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), net)
    updates, after = tx.update(grads, opt_state, net)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, net))
    before, now = noisy_params(net, opt_state), noisy_params(net, after)
    assert np.any(before["one"]["kernel"] != now["one"]["kernel"])


@pytest.mark.parametrize("target_fraction", [1.0, 0.5])
def test_bfloat16_is_computed_in_float32(target_fraction):
    w = jax.random.normal(jax.random.key(1), (64, 64)).astype(jnp.bfloat16)
    tx = bridgeout(0.3, 1.0, target_fraction=target_fraction)
    halves, wides = {"kernel": w}, {"kernel": w.astype(jnp.float32)}
    state, wide_state = tx.init(halves), tx.init(wides)
    noisy = noisy_params(halves, state)["kernel"]
    assert noisy.dtype == jnp.bfloat16
    expected = noisy_params(wides, wide_state)["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(noisy, expected)
    updates, new_state = tx.update(halves, state, halves)
    wide_updates, _ = tx.update(wides, wide_state, wides)
    assert updates["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        updates["kernel"], wide_updates["kernel"].astype(jnp.bfloat16)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    injected = optax.inject_hyperparams(bridgeout)(0.3, 1.0).init(halves).inner_state
    assert float(injected.rate) == float(jnp.bfloat16(0.3))
    for scalar in (injected.rate, injected.q, injected.eps, state.rate, new_state.q):
        assert scalar.dtype == jnp.float32 and not scalar.weak_type


@pytest.mark.parametrize(
    ("rate", "target_fraction"), [(0.5, 0.5), (optax.linear_schedule(0.0, 0.5, 4), 1.0)]
)
def test_one_trace(net, batches, rate, target_fraction):
    tx = optax.chain(
        bridgeout(rate, target_fraction=target_fraction), optax.sgd(0.1, momentum=0.9)
    )

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, opt_state, batch):
        grads = jax.grad(net_loss)(noisy_params(params, opt_state), batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    chex.clear_trace_counter()
    params, opt_state = net, tx.init(net)
    for batch in batches:
        params, opt_state = step(params, opt_state, batch)
    expected, _ = train(tx, net, batches)
    chex.assert_trees_all_close(params, expected, rtol=1e-3, atol=1e-4)


def test_donating_the_state_leaves_the_callers_key_alive(net):
    key = jax.random.key(5)
    tx = bridgeout(key=key)
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(net, tx.init(net), net)
    assert not key.is_deleted()
    np.testing.assert_array_equal(
        tx.init(net).key["threefry2x32"], jax.random.key_data(key)
    )
    assert state.count == 1


@pytest.mark.parametrize("target_fraction", [1.0, 0.5])
def test_state_survives_a_checkpoint(tmp_path, net, batches, target_fraction):
    tx = optax.chain(
        bridgeout(0.3, 1.5, target_fraction=target_fraction, key=7),
        optax.sgd(0.1, momentum=0.9),
    )
    params, opt_state = train(tx, net, batches)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(opt_state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", opt_state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tx.init(params))
        restored = checkpointer.restore(tmp_path / "state", target)
    chex.assert_trees_all_equal_structs(restored, opt_state)
    chex.assert_trees_all_equal(
        noisy_params(params, restored), noisy_params(params, opt_state)
    )
    ends = [tx.update(net, state, params) for state in (restored, opt_state)]
    chex.assert_trees_all_equal(*ends)


@pytest.mark.parametrize("mask", [None, {"one": {"kernel": True, "bias": False}}])
def test_optax_can_map_over_the_parameters_in_the_state(mask, net):
    if mask is not None:
        net = {"one": net["one"]}
    for link in (
        bridgeout(mask=mask),
        optax.masked(bridgeout(), lambda p: jax.tree.map(lambda w: w.ndim > 1, p)),
        optax.inject_hyperparams(bridgeout)(mask=mask),
    ):
        tx = optax.chain(link, optax.trace(0.9))
        state = tx.init(net)
        halved = optax.tree.map_params(
            tx, lambda x: x[: len(x) // 2], state, is_leaf=lambda x: x is None
        )
        assert halved[1].trace["one"]["kernel"].shape == (3, 6)
        small = jax.tree.map(lambda w: w[: len(w) // 2], net)
        assert noisy_params(small, halved)["one"]["kernel"].shape == (3, 6)
        specs = optax.tree.map_params(
            tx, lambda _: "param", state, transform_non_params=lambda _: "other"
        )
        # A valid prefix of the state, as jit's shardings must be.
        jax.tree.map(lambda spec, part: spec, specs, state)


# --- another member of the family ----------------------------------------------------


class DropConnectState(NamedTuple):
    key: Any
    count: Any
    rate: Any
    noised: Any


def dropconnect_noise(w, key, state):
    kept = jax.random.bernoulli(key, 1 - state.rate, w.shape)
    return jnp.where(kept, w * state.rate / (1 - state.rate), -w)


def test_another_noise_needs_a_state_and_a_function_only(monkeypatch, net):
    module = importlib.import_module("jaxprune.training.noise._weight_noise")
    monkeypatch.setattr(module, "NOISES", {DropConnectState: dropconnect_noise})
    tx = module.weight_noise(
        DropConnectState,
        dict,
        lambda count: {"rate": jnp.float32(0.2)},
        lambda params: {"one/kernel": None},
        key=3,
    )
    opt_state = optax.chain(tx, optax.sgd(0.1)).init(net)
    noisy = noisy_params(net, opt_state)["one"]["kernel"]
    # d(w * m) / dw = m with the m that made the noisy weights.
    mask = np.asarray(noisy / net["one"]["kernel"])
    ones = jax.tree.map(jnp.ones_like, net)
    updates, _ = tx.update(ones, opt_state[0], net)
    assert set(np.round(mask.ravel(), 4)) == {np.float32(0), np.float32(1.25)}
    np.testing.assert_allclose(updates["one"]["kernel"], mask, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(updates["two"]["kernel"], 1)


# --- errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.0}, "rate must be in [0, 1), got 1.0"),
        ({"rate": -0.1}, "rate must be in [0, 1), got -0.1"),
        ({"rate": jnp.float32(1.5)}, "rate must be in [0, 1), got 1.5"),
        ({"rate": float("nan")}, "rate must be in [0, 1), got nan"),
        ({"q": 0}, "q must be above 0, got 0"),
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
        ({"target_fraction": 0.0}, "target_fraction must be in (0, 1], got 0.0"),
        ({"target_fraction": 1.1}, "target_fraction must be in (0, 1], got 1.1"),
    ],
)
def test_hyperparameters_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bridgeout(**arguments)


def test_a_schedule_out_of_range_is_seen_where_it_is_known(net):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got 2"):
        bridgeout(rate=lambda count: 2.0).init(net)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got 1"):
        optax.inject_hyperparams(bridgeout)(rate=1.0).init(net)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            lambda p: jax.tree.map(lambda _: False, p),
            ValueError,
            "none of the 4 leaves",
        ),
        ({"one": True}, ValueError, "mask is not a tree prefix of params"),
        (
            lambda p: jax.tree.map(lambda w: w > 0, p),
            TypeError,
            "mask['one/bias'] is Array",
        ),
        (
            lambda p: {"one": 1, "two": 0},
            TypeError,
            "mask['one'] is 1, expected one bool",
        ),
    ],
)
def test_bad_masks(net, mask, error, message):
    with pytest.raises(error, match=re.escape(message)):
        bridgeout(mask=mask).init(net)


def test_bad_leaves():
    with pytest.raises(ValueError, match=r"none of the 1 leaves \(bias"):
        bridgeout().init({"bias": jnp.ones(3)})
    with pytest.raises(TypeError, match="mask selects 'ids' of dtype int32"):
        bridgeout(mask=True).init({"ids": jnp.ones((3, 3), jnp.int32)})


@pytest.mark.parametrize(
    "bad", [0.5, True, np.array([0, 1], np.uint32), jax.random.split(jax.random.key(0))]
)
def test_bad_keys(net, bad):
    with pytest.raises(TypeError, match="key must be an int or a typed key"):
        bridgeout(key=bad).init(net)


def test_update_without_params(net):
    tx = bridgeout()
    with pytest.raises(ValueError, match=r"tx.update\(grads, opt_state, params\)"):
        tx.update(net, tx.init(net))


def test_no_state_to_be_found(net):
    opt_state = optax.adam(1e-3).init(net)
    with pytest.raises(ValueError, match="opt_state holds none of BridgeoutState"):
        noisy_params(net, opt_state)
    with pytest.raises(ValueError, match=r"are the arguments \(params, opt_state\)"):
        noisy_params(bridgeout().init(net), net)


def test_a_module_of_that_name_is_no_state():
    params = {"BridgeoutState": {"kernel": jnp.ones((4, 4))}}
    tx = optax.chain(bridgeout(key=1), optax.trace(0.9))
    expected = noisy_params(params, bridgeout(key=1).init(params))
    chex.assert_trees_all_equal(noisy_params(params, tx.init(params)), expected)


def test_two_states_for_one_leaf(net):
    tx = optax.chain(bridgeout(0.1), bridgeout(0.2))
    with pytest.raises(ValueError, match="several noise states for 'one/kernel'"):
        noisy_params(net, tx.init(net))


def test_a_state_for_another_tree(net):
    tx = bridgeout()
    state = tx.init(net)
    assert isinstance(state, BridgeoutState)
    with pytest.raises(ValueError, match=r"noise for 'one/kernel', which params lack"):
        noisy_params({"params": net}, state)
    with pytest.raises(ValueError, match=r"\(1 such of 2\)"):
        tx.update(net, state, {"one": net["one"]})
