import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quick_jit

import jaxprune
from jaxprune import scores
from jaxprune.core._leaves import named_leaves

pytestmark = pytest.mark.once

KEY = jax.random.key(0, impl="rbg")  # compiles in no time
RNG = np.random.default_rng(0)
DATA = {
    "x": RNG.normal(size=(12, 3)).astype(np.float32),
    "y": RNG.normal(size=(12, 2)).astype(np.float32),
}


def take(start, stop):
    return {name: values[start:stop] for name, values in DATA.items()}


UNEVEN = [take(0, 5), take(5, 10), take(10, 12)]
SINGLES = [take(n, n + 1) for n in range(12)]


def net(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"]


def loss_fn(params, batch):
    x, y = (batch[name].astype(params["w1"].dtype) for name in "xy")
    return jnp.square(net(params, x) - y).sum(1).mean()


def make_params(hidden=4, dtype=np.float32):
    rng = np.random.default_rng(1)
    shapes = {"b1": (hidden,), "w1": (3, hidden), "w2": (hidden, 2)}
    drawn = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return {n: jnp.asarray(w, dtype) for n, w in drawn.items()} | {"n": jnp.arange(3)}


SCORES = {
    "taylor": scores.taylor,
    "taylor_square": lambda *args: scores.taylor(*args, form="square"),
    "taylor_signed": lambda *args: scores.taylor(*args, form="signed"),
    "snip": scores.snip,
    "grasp": scores.grasp,
    "fisher": scores.fisher,
    "hessian_diagonal": lambda *args: scores.hessian_diagonal(*args, KEY),
    "obd": lambda loss, p, b: scores.obd(p, scores.fisher(loss, p, b)),
    "movement": lambda loss, p, b: scores.movement(p, jax.grad(loss)(_floats(p), b[0])),
}
SIGNED = ("taylor_signed", "grasp", "hessian_diagonal", "movement")


def _floats(params):
    return {name: leaf for name, leaf in params.items() if name != "n"}


def reference(params, batches):
    """Everything from loops over single examples, in numpy, float64."""
    each = [take(n, n + 1) for n in range(12)]
    grad = quick_jit(jax.grad(loss_fn))
    grads = [grad(_floats(params), example) for example in each]
    mean = lambda trees: jax.tree.map(  # noqa: E731
        lambda *leaves: np.mean(np.asarray(leaves, np.float64), 0), *trees
    )
    change = jax.tree.map(lambda w, g: w * g, _floats(params), mean(grads))
    total = sum(np.abs(leaf).sum() for leaf in change.values())
    squares = mean([jax.tree.map(np.square, g) for g in grads])
    return {
        "taylor": jax.tree.map(np.abs, change),
        "taylor_square": jax.tree.map(np.square, change),
        "taylor_signed": change,
        "snip": jax.tree.map(lambda c: np.abs(c) / total, change),
        "fisher": squares,
        "obd": jax.tree.map(lambda w, f: w**2 * f / 2, _floats(params), squares),
    }


@pytest.fixture(scope="module")
def expected():
    return reference(make_params(), UNEVEN)


def permuted(params, order):
    cut = {"b1": params["b1"][order], "w1": params["w1"][:, order]}
    return params | cut | {"w2": params["w2"][order]}


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_finite_like_params_and_goes_with_its_units(name):
    score, params = SCORES[name], make_params()
    if name == "movement":
        params = _floats(params)
    compiled = quick_jit(lambda p: score(loss_fn, p, UNEVEN[:1]))
    found, order = compiled(params), np.array([2, 0, 3, 1])
    assert found.keys() == params.keys() and found.get("n") is None
    for path, values in named_leaves(found).items():
        assert values.shape == params[path].shape and values.dtype == jnp.float32
        assert np.isfinite(values).all() and (values != 0).any()
        assert name in SIGNED or (values >= 0).all()
    if name != "hessian_diagonal":  # its signs stay where they are
        after, before = compiled(permuted(params, order)), permuted(found, order)
        for path, values in named_leaves(after).items():
            np.testing.assert_allclose(values, before[path], rtol=1e-3, atol=1e-6)
    dead = compiled(jax.tree.map(jnp.zeros_like, params))
    assert all(np.isfinite(values).all() for values in jax.tree.leaves(dead))


@pytest.mark.parametrize(
    "name", ["taylor", "taylor_square", "taylor_signed", "snip", "fisher", "obd"]
)
def test_scores_equal_a_loop_over_examples_whatever_the_batches(name, expected):
    # Torch-Pruning's Hessian importance keeps the last sample alone.
    found = SCORES[name](loss_fn, make_params(), iter(UNEVEN))
    for path, values in expected[name].items():
        np.testing.assert_allclose(found[path], values, rtol=2e-4, atol=1e-7)


def test_the_last_example_does_not_decide():
    one, other = (
        scores.fisher(loss_fn, make_params(), each) for each in (SINGLES, SINGLES[::-1])
    )
    np.testing.assert_allclose(one["w1"], other["w1"], rtol=1e-5)
    last = scores.fisher(loss_fn, make_params(), SINGLES[-1:])
    assert not np.allclose(one["w1"], last["w1"], rtol=0.1)


def test_the_loss_is_traced_once_for_all_batches_of_a_shape():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    scores.taylor(counted, make_params(), SINGLES[:1])
    once = len(traces)
    scores.taylor(counted, make_params(), SINGLES)
    assert len(traces) == 2 * once


def test_running_sums_are_float32():
    # The slope is 1 for every batch: a sum in bfloat16 stalls at 256.
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    batches = [jnp.ones((1, 2), jnp.bfloat16)] * 600
    found = scores.taylor(lambda p, x: (x @ p["w"]).mean(), params, batches)
    assert found["w"].dtype == jnp.float32
    np.testing.assert_array_equal(found["w"], [1.0, 1.0])


@pytest.mark.parametrize("name", SCORES)
def test_every_score_takes_bfloat16_and_a_single_unit(name):
    params = make_params(hidden=1, dtype=jnp.bfloat16)
    params = _floats(params) if name == "movement" else params
    found = quick_jit(lambda p: SCORES[name](loss_fn, p, UNEVEN[:1]))(params)
    for values in jax.tree.leaves(found):
        assert values.dtype == jnp.float32 and np.isfinite(values).all()


def permuted(params, order):
    cut = {"b1": params["b1"][order], "w1": params["w1"][:, order]}
    return params | cut | {"w2": params["w2"][order]}


# Least squares: the gradient of example n is (x w - y) x, the Hessian is mean x x'.
X, Y = DATA["x"].astype(np.float64), DATA["y"][:, 0].astype(np.float64)
W = np.array([0.5, -1.0, 2.0])
H = X.T @ X / 12
G = X.T @ (X @ W - Y) / 12
LINEAR = [
    {name: values[a:b] for name, values in DATA.items()} for a, b in ((0, 8), (8, 12))
]


def squared(params, batch):
    return jnp.square(batch["x"] @ params["w"] - batch["y"][:, 0]).mean() / 2


LINEAR_PARAMS = {"w": jnp.asarray(W, jnp.float32)}


def test_grasp_is_the_fall_of_the_squared_gradient():
    found = scores.grasp(squared, LINEAR_PARAMS, LINEAR)["w"]
    np.testing.assert_allclose(found, W * (H @ G), rtol=1e-4)
    flow = lambda w: np.sum((X.T @ (X @ w - Y) / 12) ** 2)  # noqa: E731
    for j in range(3):
        less = W - 1e-6 * W[j] * np.eye(3)[j]
        fall = (flow(W) - flow(less)) / 1e-6
        np.testing.assert_allclose(2 * found[j], fall, rtol=1e-3)


def test_hutchinson_is_exact_for_a_diagonal_hessian(key):
    def diagonal(params, batch):
        return (batch["x"] ** 2 @ params["w"] ** 2).mean() / 2 + params["w"].sum()

    found = scores.hessian_diagonal(diagonal, LINEAR_PARAMS, LINEAR, key)["w"]
    np.testing.assert_allclose(found, np.diag(H), rtol=1e-5)


def test_hutchinson_is_unbiased(key):
    samples = 20_000
    found = scores.hessian_diagonal(
        squared, LINEAR_PARAMS, LINEAR, key, samples=samples
    )
    parts = [X[:8].T @ X[:8] / 12, X[8:].T @ X[8:] / 12]  # new signs for every batch
    spread = sum(np.sum(part**2, 1) - np.diag(part) ** 2 for part in parts)
    error = np.sqrt(spread / samples)
    assert (np.abs(found["w"] - np.diag(H)) < 5 * error).all()
    assert (np.abs(found["w"] - np.diag(H)) > 0).any()


def test_hutchinson_draws_new_signs_for_every_batch(key):
    found = scores.hessian_diagonal(squared, LINEAR_PARAMS, LINEAR[:1] * 2, key)["w"]
    once = scores.hessian_diagonal(squared, LINEAR_PARAMS, LINEAR[:1], key)["w"]
    assert not np.allclose(found, once, rtol=1e-3)


def test_obd_is_the_rise_of_a_quadratic_at_its_minimum(key):
    slope = np.array([1.0, 2.0, 3.0])

    def quadratic(params, batch):
        return (slope * (params["w"] - W) ** 2).sum() / 2 + 0 * batch["x"].sum()

    minimum = {"w": jnp.asarray(W, jnp.float32)}
    with jax.numpy_dtype_promotion("standard"):
        curvature = scores.hessian_diagonal(quadratic, minimum, LINEAR, key)
    found = scores.obd(minimum, curvature)["w"]
    rise = [slope[j] * W[j] ** 2 / 2 for j in range(3)]
    np.testing.assert_allclose(found, rise, rtol=1e-5)


def test_movement_is_what_gradient_descent_does_to_the_square():
    # Sum of -w g is, per unit of learning rate, half the growth of w^2 to first order.
    params, total, rate = {"w": jnp.array([1.0, -0.5])}, None, 1e-4
    start, target = params["w"], jnp.array([2.0, 0.5])
    for _ in range(50):
        grads = {"w": params["w"] - target}
        total = scores.movement(params, grads, total)
        params = {"w": params["w"] - rate * grads["w"]}
    growth = (params["w"] ** 2 - start**2) / 2 / rate
    np.testing.assert_allclose(total["w"], growth, rtol=1e-2)


def test_signed_changes_of_a_unit_cancel_before_their_size_counts():
    params = {k: v for k, v in make_params().items() if k != "n"}
    groups = jaxprune.trace(net, params, DATA["x"])
    signed = scores.taylor(loss_fn, params, UNEVEN, form="signed")

    def gated(gates):
        return loss_fn(params | {"w2": params["w2"] * gates[:, None]}, DATA)

    # tanh(w1 x + b1) is not linear: only the consumers have the gate's derivative.
    slope = jax.grad(gated)(jnp.ones(4))
    consumers = {"w1": None, "b1": None, "w2": signed["w2"]}
    for reduce, shape in (("abs_of_sum", np.abs), ("square_of_sum", np.square)):
        found = scores.group_scores(groups, consumers, reduce=reduce)["w1:1"]
        np.testing.assert_allclose(found, shape(slope), rtol=1e-4)


def test_taylor_counts_normalisation_layers():
    # Torch-Pruning's Taylor importance leaves BatchNorm out.
    def normalised(params, batch):
        h = (batch["x"] - batch["x"].mean(0, keepdims=True)) * params["scale"][None]
        return jnp.square(h + params["bias"][None]).mean()

    params = {"scale": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.ones(3)}
    found = scores.taylor(normalised, params, [DATA])
    assert (found["scale"] > 0).all() and (found["bias"] > 0).all()


def test_refusals_say_what_is_wrong(key):
    params = make_params()
    with pytest.raises(ValueError, match="batches is empty, so taylor has nothing"):
        scores.taylor(loss_fn, params, [])
    with pytest.raises(ValueError, match=r"examples along axis 0.*\(5, 3\), \(2, 2\)"):
        scores.snip(loss_fn, params, [{"x": DATA["x"][:5], "y": DATA["y"][:2]}])
    with pytest.raises(ValueError, match=r"axis 0.*got the shapes \(\)"):
        scores.fisher(loss_fn, params, [jnp.ones(())])
    with pytest.raises(ValueError, match=r"grasp reads the batches twice.*iterator"):
        scores.grasp(loss_fn, params, iter(UNEVEN))
    with pytest.raises(ValueError, match=r"form must be one of .*got 'l1'"):
        scores.taylor(loss_fn, params, UNEVEN, form="l1")
    with pytest.raises(
        ValueError, match="samples must be a whole number of at least 1, got 0"
    ):
        scores.hessian_diagonal(loss_fn, params, UNEVEN, key, samples=0)


def test_a_progress_bar_shows_on_demand_and_only_then(capsys):
    scores.taylor(loss_fn, make_params(), UNEVEN[:1])
    assert capsys.readouterr().out == ""
    scores.taylor(loss_fn, make_params(), UNEVEN[:1], progress=True)
    assert "taylor" in capsys.readouterr().out


def relu_net(params, x):
    for name in ("w1", "w2"):
        x = jax.nn.relu(x @ params[name])
    return x @ params["w3"]


def test_synaptic_flow_is_conserved():
    rng = np.random.default_rng(2)
    shapes = {"w1": (3, 5), "w2": (5, 4), "w3": (4, 2)}
    params = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()
    }
    found = scores.synflow(relu_net, params, jax.ShapeDtypeStruct((1, 3), jnp.float32))
    for name, values in found.items():
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values.sum(), 1.0, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(found["w1"].sum(0), found["w2"].sum(1), rtol=1e-6)
    np.testing.assert_allclose(found["w2"].sum(0), found["w3"].sum(1), rtol=1e-6)
    paths = np.einsum(
        "ij,jk,kl->ijkl", *(np.abs(params[n], dtype=np.float64) for n in shapes)
    )
    np.testing.assert_allclose(found["w2"], paths.sum((0, 3)) / paths.sum(), rtol=1e-5)
    compiled = quick_jit(lambda p: scores.synflow(relu_net, p, jnp.ones((1, 3))))(
        params
    )
    np.testing.assert_allclose(compiled["w2"], found["w2"], rtol=1e-5)


def deep(params, x):
    return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, params["w"])[0]


def test_synaptic_flow_of_a_deep_net_does_not_overflow():
    params = {"w": jnp.full((40, 16, 16), 0.7)}  # 11.2^40 is 10^42
    found = scores.synflow(deep, params, jnp.ones((1, 16)))["w"]
    np.testing.assert_allclose(found, 1 / 256, rtol=1e-5)
    with pytest.raises(ValueError, match="the synaptic flow is 0.0.*nothing through"):
        scores.synflow(deep, jax.tree.map(jnp.zeros_like, params), jnp.ones((1, 16)))
    with pytest.raises(ValueError, match="the synaptic flow is inf.*overflows"):
        scores.synflow(
            lambda p, x: deep(p, x).astype(jnp.float16), params, jnp.ones((1, 16))
        )
