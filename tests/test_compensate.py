"""Compensation against closed forms, brute force, and units that others explain."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.datasets
from contract import difference

import jaxprune
from jaxprune.core._leaves import named_leaves
from jaxprune.program._jaxprs import trace_program
from jaxprune.statistics._contractions import contractions
from jaxprune.surgery._consumers import rewrite_consumers
from jaxprune.surgery._reconstruction import (
    greedy_backward,
    greedy_forward,
    lasso,
    matched_spread,
    refit,
    soft_factors,
    unit_factors,
    unit_moments,
)

pytestmark = pytest.mark.once

RNG = np.random.default_rng(1)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


# Reconstruction from moments, against loops over samples.

X = RNG.normal(size=(60, 8)) @ RNG.normal(size=(8, 8)) + RNG.normal(size=8)
W = RNG.normal(size=(8, 3))
UNITS = np.array([0, 0, 1, 1, 2, 2, 3, 3])  # two taps a channel
SECOND = X.T @ X / len(X)
COVARIANCE = np.cov(X.T, bias=True)


def channel_outputs():
    return [X[:, u == UNITS] @ W[u == UNITS] for u in range(4)]


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_refit_is_the_closed_form(ridge):
    kept = np.arange(8) < 5
    got = refit(SECOND, SECOND @ W, W, np.repeat(kept[:, None], 3, 1), ridge)
    # The penalty is a few more samples: rows of the identity with the old weights.
    size = np.sqrt(ridge * np.trace(SECOND[:5, :5]) / 5 * len(X))
    rows = np.vstack([X[:, :5], size * np.eye(5)])
    targets = np.vstack([X @ W, size * W[:5]])
    np.testing.assert_allclose(got[:5], np.linalg.lstsq(rows, targets)[0], rtol=1e-8)
    assert not got[5:].any()


def test_refit_of_single_weights_is_column_by_column():
    kept = RNG.random(W.shape) < 0.6
    got = refit(SECOND, SECOND @ W, W, kept)
    for n in range(3):
        own = np.flatnonzero(kept[:, n])
        expected = np.linalg.lstsq(X[:, own], X @ W[:, n])[0]
        np.testing.assert_allclose(got[own, n], expected, rtol=1e-8)
    assert not got[~kept].any()


def test_matched_spread():
    kernel = refit(COVARIANCE, COVARIANCE @ W, W, np.arange(8)[:, None] < [5, 5, 5])
    before = (X @ W).var(0)
    assert ((X @ kernel).var(0) < before).all()
    np.testing.assert_allclose(
        (X @ matched_spread(kernel, COVARIANCE, before)).var(0), before
    )


def test_greedy_backward_picks_as_the_loop_over_samples():
    parts = channel_outputs()
    kept = set(range(4))
    for keep in (3, 2, 1):
        removed = set(range(4)) - kept
        errors = {
            u: np.square(sum(parts[v] for v in removed | {u})).sum() for u in kept
        }
        kept.remove(min(errors, key=errors.__getitem__))
        gram = unit_moments(SECOND, W, UNITS, 4)
        assert set(np.flatnonzero(greedy_backward(gram, keep))) == kept


def loss(units):
    """The least squares error, with an intercept, from the channels alone."""
    rows = np.hstack([X[:, np.isin(UNITS, units)], np.ones((len(X), 1))])
    fit = np.linalg.lstsq(rows, X @ W)[0]
    return np.square(X @ W - rows @ fit).sum()


def test_greedy_forward_picks_as_brute_force():
    order = greedy_forward(COVARIANCE, COVARIANCE @ W, UNITS, 4).tolist()
    losses = [loss([])]
    for k in range(4):
        best = min(set(range(4)) - set(order[:k]), key=lambda u: loss([*order[:k], u]))
        assert order[k] == best
        losses.append(loss(order[: k + 1]))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-9


def test_greedy_forward_ranks_what_says_nothing_last():
    x = X.copy()
    x[:, :2] = 3.0  # constant
    x[:, 4:6] = x[:, 6:8] @ normal(2, 2) + 1  # explained by another
    second = np.cov(x.T, bias=True)
    order = greedy_forward(second, second @ W, UNITS, 4).tolist()
    assert order[2:] in ([0, 2], [0, 3]) and order[3] != 1


def test_lasso_solves_its_problem_and_keeps_as_many_as_asked():
    parts = np.stack(channel_outputs(), -1)
    gram = unit_moments(SECOND, W, UNITS, 4)
    np.testing.assert_allclose(gram, np.einsum("rni,rnj->ij", parts, parts) / len(X))
    target = gram.sum(1)
    penalty = 0.3 * np.abs(target).max()
    factors = soft_factors(gram, target, penalty)
    slope = target - gram @ factors  # the subgradient conditions
    some = factors != 0
    np.testing.assert_allclose(slope[some], penalty * np.sign(factors[some]), rtol=1e-6)
    assert (np.abs(slope[~some]) <= penalty).all() and 0 < some.sum() < 4
    for keep in range(5):
        assert lasso(gram, target, keep).sum() == keep
    np.testing.assert_array_equal(lasso(gram, target, int(some.sum())), some)
    kept = np.array([True, False, True, True])
    expected = np.linalg.lstsq(parts[..., kept].reshape(-1, 3), parts.sum(-1).ravel())[
        0
    ]
    np.testing.assert_allclose(unit_factors(gram, target, kept)[kept], expected)


# Units that are an affine function of kept ones are removed without any change.


def explained(variables, path, axis, unit, by, bias=None):
    """Makes a unit of a linear layer an affine function of others."""
    leaves = {name: np.array(leaf) for name, leaf in named_leaves(variables).items()}
    for name, along in ((path, axis), (bias, -1)):
        if name is None:
            continue
        line = np.moveaxis(leaves[name], along, 0)
        line[unit] = sum(share * line[other] for other, share in by.items())
        if name == bias:
            line[unit] += 0.7
    return jax.tree.structure(variables).unflatten(map(jnp.asarray, leaves.values()))


def removal(apply_fn, variables, batches, cut):
    """Outputs before, after the cut alone, and after compensation, narrowed."""
    groups = jaxprune.trace(apply_fn, variables, batches[0], roles=True)
    keep = {name: np.ones(groups[name].size, bool) for name in cut}
    for name, units in cut.items():
        keep[name][units] = False
    masks = jaxprune.expand_masks(groups, keep)
    fitted = jaxprune.compensate(
        groups, apply_fn, variables, masks, batches, ridge=1e-9
    )
    for path, leaf in named_leaves(fitted).items():
        mask = np.broadcast_to(named_leaves(masks)[path], leaf.shape)
        assert not np.asarray(leaf)[~mask].any()
    x = batches[-1]
    small = jaxprune.slice_params(fitted, masks)
    return (
        apply_fn(variables, x),
        apply_fn(jaxprune.apply_masks(variables, masks), x),
        jaxprune.narrow(apply_fn, masks)(small, x),
    )


def check_removal(apply_fn, variables, batches, cut):
    before, alone, fitted = removal(apply_fn, variables, batches, cut)
    assert difference(alone, before) > 0.02
    assert difference(fitted, before) < 1e-4


def linear(params, x):
    hidden = x @ params["w1"] + params["b1"][None]
    return hidden @ params["w2"] + params["b2"][None]


def test_an_affine_unit_of_a_dense_layer():
    params = {"w1": normal(4, 5), "b1": normal(5), "w2": normal(5, 3), "b2": normal(3)}
    params = explained(params, "w1", 1, 2, {0: 0.5, 4: -2.0}, "b1")
    check_removal(linear, params, [normal(40, 4), normal(30, 4)], {"w1:1": [2]})


def test_a_linear_unit_needs_no_bias():
    def net(params, x):
        return jnp.abs(x) @ params["w1"] @ params["w2"]

    params = explained({"w1": normal(4, 5), "w2": normal(5, 3)}, "w1", 1, 2, {1: 0.5})
    check_removal(net, params, [normal(40, 4)], {"w1:1": [2]})


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="a")(x)
        x = nn.Conv(3, (3, 3), padding="VALID", use_bias=False, name="b")(x)
        x = nn.BatchNorm(use_running_average=True, name="bn")(x)
        return nn.Dense(2)(nn.relu(x).mean((1, 2)))


def test_an_affine_channel_of_a_convolution_before_a_batchnorm():
    net, x = Conv(), normal(6, 5, 5, 2)
    variables = net.init(jax.random.key(0), x)
    stats = variables["batch_stats"]["bn"]
    stats = {"mean": stats["mean"] + 0.3, "var": stats["var"] * 2}
    variables = {**variables, "batch_stats": {"bn": stats}}
    path, bias = "params/a/kernel", "params/a/bias"
    variables = explained(variables, path, 3, 1, {0: 0.5, 2: 1.5}, bias)

    def apply_fn(variables, x):
        return net.apply(variables, x)

    check_removal(apply_fn, variables, [x, normal(8, 5, 5, 2)], {f"{path}:3": [1]})


def test_an_affine_value_of_attention():
    net, x = (
        nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8),
        normal(9, 5, 4),
    )
    variables = net.init(jax.random.key(0), x)

    def apply_fn(variables, x):
        return net.apply(variables, x)

    # Position 1 of the values, in every head.
    path, bias = "params/value/kernel", "params/value/bias"
    variables = explained(variables, path, 2, 1, {0: 0.5, 3: 1.5}, bias)
    check_removal(apply_fn, variables, [x], {f"{path}:2": [1]})


def test_layers_under_a_scan_are_fitted_one_after_the_other():
    def net(params, x):
        def layer(h, own):
            w1, b1, w2, b2 = own
            return h + (h @ w1 + b1[None]) @ w2 + b2[None], None

        layers = tuple(params[name] for name in ("w1", "b1", "w2", "b2"))
        return jax.lax.scan(layer, x, layers)[0]

    params = {"w1": normal(3, 2, 4), "b1": normal(3, 4), "w2": normal(3, 4, 2)}
    params = {**params, "b2": normal(3, 2)}
    params = explained(params, "w1", 2, 2, {0: 0.5, 1: -1.0}, "b1")
    check_removal(net, params, [normal(30, 2)], {"w1:2": [2]})


# The whole: what compensation gives back.


def digits(params, x):
    x = jax.nn.relu(x @ params["w1"] + params["b1"][None])
    x = jax.nn.relu(x @ params["w2"] + params["b2"][None])
    return x @ params["w3"] + params["b3"][None]


def test_compensation_gives_most_of_a_cut_back():
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    x, y = (images / 16).astype(np.float32), labels.astype(np.int32)
    sizes, params = (64, 32, 32, 10), {}
    for k in (1, 2, 3):
        params[f"w{k}"] = normal(*sizes[k - 1 : k + 1]) / np.float32(
            sizes[k - 1] ** 0.5
        )
        params[f"b{k}"] = np.zeros(sizes[k], np.float32)

    @jax.jit
    def loss(params, x, y):
        logits = digits(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    tx = optax.sgd(0.1, momentum=0.9)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, x[:1000], y[:1000]), state)
        return (optax.apply_updates(params, updates), state), None

    start = params, tx.init(params)
    params = jax.lax.scan(step, start, length=150)[0][0]
    groups = jaxprune.trace(digits, params, x[:2], roles=True)
    keep = {name: np.arange(32) % 2 == 0 for name in groups}
    masks = jaxprune.expand_masks(groups, keep)
    batches = [x[:500], x[500:1000]]

    def lost(params):
        return float(loss(params, x[1000:], y[1000:])) - whole

    whole = float(loss(params, x[1000:], y[1000:]))
    fitted = jaxprune.compensate(groups, digits, params, masks, batches)
    alone = lost(jaxprune.apply_masks(params, masks))
    assert whole < 0.5 < alone and lost(fitted) < 0.25 * alone
    # A fit explains less variance than there was; rescaled, the outputs have all of it.
    scaled = jaxprune.compensate(groups, digits, params, masks, batches, rescale=True)
    before, fit, after = (
        digits(each, x[:1000]).var(0) for each in (params, fitted, scaled)
    )
    assert (fit < before).all()
    np.testing.assert_allclose(after, before, rtol=1e-3)


def test_the_mean_is_kept_and_what_is_missing_is_uncorrelated():
    params = {"w1": normal(4, 6), "b1": normal(6), "w2": normal(6, 3), "b2": normal(3)}

    def net(params, x):
        hidden = jax.nn.relu(x @ params["w1"] + params["b1"][None])
        return hidden @ params["w2"] + params["b2"][None]

    x = normal(200, 4)
    groups = jaxprune.trace(net, params, x, roles=True)
    keep = {"w1:1": np.arange(6) % 2 == 0}
    masks = jaxprune.expand_masks(groups, keep)
    fitted = jaxprune.compensate(groups, net, params, masks, [x], ridge=1e-9)
    missing = np.asarray(net(params, x) - net(fitted, x), np.float64)
    hidden = np.maximum(x @ params["w1"] + params["b1"], 0)[:, ::2]
    assert np.abs(missing).max() > 0.1
    np.testing.assert_allclose(missing.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(missing.T @ hidden / len(x), 0, atol=1e-4)


def test_consumers_are_rewritten_by_a_matrix_and_a_shift():
    params = {"w1": normal(4, 5), "b1": normal(5), "w2": normal(5, 3), "b2": normal(3)}
    x = normal(7, 4)
    groups = jaxprune.trace(linear, params, x, roles=True)
    found = contractions(trace_program(linear, params, x)).values()
    # x' = Qᵀ (x - s): the producers are turned, the consumers turn back.
    turn, shift = np.linalg.qr(normal(5, 5))[0].astype(np.float32), normal(5)
    turned = rewrite_consumers(params, groups, "w1:1", turn, shift, found)
    turned["w1"], turned["b1"] = params["w1"] @ turn, (params["b1"] - shift) @ turn
    assert isinstance(turned["w2"], np.ndarray)
    np.testing.assert_allclose(linear(turned, x), linear(params, x), atol=2e-5)
    with pytest.raises(
        ValueError, match="w2 axis 0 reads w1:1, but is not a contraction"
    ):
        rewrite_consumers(params, groups, "w1:1", turn, shift)


# What cannot be fitted is said.


def pruned(net, params, x, name, count=1):
    groups = jaxprune.trace(net, params, x, roles=True)
    keep = {name: np.arange(groups[name].size) >= count}
    return groups, net, params, jaxprune.expand_masks(groups, keep)


def test_what_cannot_be_fitted_is_refused():
    params = {"w1": normal(4, 5), "b1": normal(5), "w2": normal(5, 3), "b2": normal(3)}
    x = normal(30, 4)
    case = pruned(linear, params, x, "w1:1")
    with pytest.raises(ValueError, match="batches is empty"):
        jaxprune.compensate(*case, [])
    with pytest.raises(ValueError, match=r"w2 has 4 inputs but only 3 rows .* a ridge"):
        jaxprune.compensate(*case, [x[:3]], ridge=0.0)
    with pytest.warns(
        UserWarning, match="w2 has 4 inputs but only 3 rows .* the ridge"
    ):
        jaxprune.compensate(*case, [x[:3]])
    with pytest.raises(ValueError, match="the inputs of w2 are not finite"):
        jaxprune.compensate(*case, [x * np.float32(np.nan)])
    still = {**params, "w1": params["w1"] * (np.arange(5) != 3).astype(np.float32)}
    case = pruned(linear, still, x, "w1:1")
    with pytest.raises(ValueError, match="w2: kept input 3 is constant or a linear"):
        jaxprune.compensate(*case, [x], ridge=0.0)
    fitted = jaxprune.compensate(*case, [x])
    np.testing.assert_allclose(fitted["w2"][3], params["w2"][3], rtol=1e-6)


def test_several_passes_need_batches_that_can_be_read_again():
    def net(params, x):
        x = jax.nn.relu(x @ params["a"])
        return jax.nn.relu(x @ params["b"]) @ params["c"]

    params, x = {"a": normal(3, 4), "b": normal(4, 4), "c": normal(4, 2)}, normal(20, 3)
    groups = jaxprune.trace(net, params, x, roles=True)
    keep = {name: np.arange(4) > 0 for name in groups}
    masks = jaxprune.expand_masks(groups, keep)
    with pytest.raises(ValueError, match="compensate, .* reads the batches twice"):
        jaxprune.compensate(groups, net, params, masks, iter([x]))


def test_consumers_that_are_no_contraction_are_named_or_refused():
    def summed(params, x):
        hidden = x @ params["w1"]
        return (hidden * params["w2"][None]).sum(1)

    params, x = {"w1": normal(4, 5), "w2": normal(5)}, normal(20, 4)
    case = (*pruned(summed, params, x, "w1:1"), [x])
    with pytest.raises(ValueError, match="w1:1 is pruned|reads the pruned group"):
        jaxprune.compensate(*case, unfitted="raise")
    with pytest.warns(UserWarning, match="stays as it was cut: .*w1:1"):
        fitted = jaxprune.compensate(*case)
    np.testing.assert_array_equal(fitted["w2"], params["w2"] * (np.arange(5) > 0))

    def tied(params, x):
        hidden = jnp.tanh(x @ params["w"])
        return hidden @ params["w"].T

    params = {"w": normal(4, 5)}
    case = (*pruned(tied, params, x, "w:1"), [x])
    with pytest.raises(ValueError, match="w loses inputs .* read along different axes"):
        jaxprune.compensate(*case, unfitted="raise")
    with pytest.raises(ValueError, match="unfitted must be .* got 'maybe'"):
        jaxprune.compensate(*case, unfitted="maybe")

    def quantised(params, x):
        hidden = jax.nn.relu(x @ params["w1"])
        return hidden @ params["w2"].astype(jnp.float32)

    params = {"w1": normal(4, 5), "w2": np.ones((5, 3), np.int8)}
    case = (*pruned(quantised, params, x, "w1:1"), [x])
    with pytest.warns(UserWarning, match="w2 loses inputs .* its dtype is int8"):
        jaxprune.compensate(*case)


def test_what_can_be_fitted_is_fitted_beside_what_cannot():
    """Queries and keys meet each other and no parameter; values meet the output."""
    net, x = nn.MultiHeadDotProductAttention(2, qkv_features=8), normal(9, 5, 4)
    variables = net.init(jax.random.key(0), x)

    def apply_fn(variables, x):
        return net.apply(variables, x)

    groups = jaxprune.trace(apply_fn, variables, x, roles=True)
    keep = {f"params/{n}/kernel:2": np.arange(4) > 0 for n in ("query", "value")}
    masks = jaxprune.expand_masks(groups, keep)
    case = groups, apply_fn, variables, masks, [x]
    with pytest.warns(UserWarning, match="group params/query/kernel:2 is pruned") as w:
        fitted = jaxprune.compensate(*case)
    assert "value" not in str(w[0].message)
    alone = jaxprune.apply_masks(variables, masks)
    before, cut, after = (apply_fn(v, x) for v in (variables, alone, fitted))
    assert jnp.square(after - before).sum() < 0.9 * jnp.square(cut - before).sum()


def test_a_unit_of_an_lstm_whose_gates_are_side_by_side():
    """Its kernels are concatenated before they are used; a twin is removed exactly."""
    net, x = nn.RNN(nn.OptimizedLSTMCell(4)), normal(9, 5, 3)
    variables = net.init(jax.random.key(0), x)

    def model(variables, x):
        return net.apply({"params": variables["params"]}, x) @ variables["head"]

    variables = {**variables, "head": normal(4, 2)}
    groups = jaxprune.trace(model, variables, x, roles=True)
    [(name, group)] = groups.items()
    leaves = {path: np.array(leaf) for path, leaf in named_leaves(variables).items()}
    for member in group.members:
        if member.role == "producer":
            line = np.moveaxis(leaves[member.path], member.axis, 0)
            line[member.index[3]] = line[member.index[1]]
    variables = jax.tree.structure(variables).unflatten(leaves.values())
    check_removal(model, variables, [x], {name: [3]})
