"""Links of training against closed forms: proximal, growing, movement, trained rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import select, training
from jaxprune.training.schedules import linear

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax itself mixes Python floats and int32 counters."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(tx, params, grad, steps):
    """Trained, with the parameters after every step."""

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(grad(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, seen = tx.init(params), []
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
        seen.append(params)
    return params, opt_state, seen


def none(params):
    return jax.tree.map(jnp.zeros_like, params)


# --- proximal group lasso ------------------------------------------------------------


def test_proximal_steps_solve_the_group_lasso():
    """Of ``||w - t||^2 / 2``: every column shrinks to a closed form, or to exactly 0."""
    target = normal(4, 6) * np.array([3, 1, 0.1, 2, 0.05, 0.2], np.float32)
    tx = optax.chain(optax.sgd(0.5), training.proximal_group_lasso(0.5, 0.4))
    params, _, _ = run(
        tx, {"w": jnp.zeros((4, 6))}, lambda p: {"w": p["w"] - target}, 60
    )
    norms = np.linalg.norm(target, axis=0)
    factor = np.maximum(0, 1 - 0.4 * np.sqrt(4) / norms)
    assert 0 < (factor == 0).sum() < 6
    np.testing.assert_allclose(params["w"], factor * target, atol=1e-6)
    np.testing.assert_array_equal(params["w"][:, factor == 0], 0)


def test_units_of_a_traced_net_reach_zero_in_all_kernels():
    def net(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["c"]

    params = {"a": jnp.asarray(normal(3, 4)), "c": jnp.asarray(normal(4, 2, seed=1))}
    params = {"a": params["a"].at[:, 1].mul(0.05), "c": params["c"].at[1].mul(0.05)}
    groups = jaxprune.trace(net, params, jnp.ones((1, 3)))
    tx = training.proximal_group_lasso(1.0, 0.2, groups)
    updates, _ = tx.update(none(params), tx.init(params), params)
    got = optax.apply_updates(params, updates)
    joint = np.concatenate([params["a"].T, params["c"]], 1)  # [units, weights]
    factor = np.maximum(0, 1 - 0.2 * np.sqrt(5) / np.linalg.norm(joint, axis=1))
    np.testing.assert_allclose(got["a"], params["a"] * factor[None], rtol=1e-5)
    np.testing.assert_allclose(got["c"], params["c"] * factor[:, None], rtol=1e-5)
    np.testing.assert_array_equal(got["a"][:, 1], 0)
    np.testing.assert_array_equal(got["c"][1], 0)


def test_zeros_are_exact_in_bfloat16_and_strength_0_changes_nothing():
    params = {"w": jnp.asarray(normal(4, 3), jnp.bfloat16)}
    grads = {"w": jnp.asarray(normal(4, 3, seed=1), jnp.bfloat16)}
    for strength in (0.0, 100.0):
        tx = optax.chain(optax.sgd(0.1), training.proximal_group_lasso(0.1, strength))
        updates, _ = tx.update(grads, tx.init(params), params)
        after = optax.apply_updates(params, updates)["w"]
        if strength:
            np.testing.assert_array_equal(after, 0)
        else:
            plain, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(params))
            np.testing.assert_array_equal(
                after, optax.apply_updates(params, plain)["w"]
            )


# --- growing regularisation ----------------------------------------------------------


def test_growing_decay_is_a_product():
    masks = {"w": jnp.array([[True, False]])}
    link = training.growing_regularization(masks, growth=0.1, every=2, ceiling=0.25)
    params = {"w": jnp.array([[2.0, 3.0]])}
    after, _, _ = run(optax.chain(link, optax.sgd(0.5)), params, none, 6)
    decay = np.array([0.1, 0.1, 0.2, 0.2, 0.25, 0.25])
    np.testing.assert_allclose(after["w"], [[2, 3 * np.prod(1 - 0.5 * decay)]], 1e-5)


def test_growing_decay_of_all_kernels_separates_by_curvature():
    """GReg-2: under ``sum h (w - 1)^2 / 2`` weights settle at ``h / (h + decay)``."""
    curvature = jnp.array([[1.0, 0.1]])
    link = training.growing_regularization(growth=0.5, every=1, ceiling=0.5)
    params = {"w": jnp.ones((1, 2)), "bias": jnp.ones(2)}
    after, _, _ = run(
        optax.chain(link, optax.sgd(0.5)),
        params,
        lambda p: {"w": curvature * (p["w"] - 1), "bias": jnp.zeros(2)},
        200,
    )
    np.testing.assert_allclose(after["w"], curvature / (curvature + 0.5), rtol=1e-4)
    np.testing.assert_array_equal(after["bias"], 1)


# --- movement pruning ----------------------------------------------------------------


def test_movement_against_a_loop():
    params = {"w": jnp.asarray(normal(5, 4))}
    grads = [normal(5, 4, seed=k + 1) for k in range(6)]
    tx = training.movement_pruning(optax.sgd(0.1), 0.5, learning_rate=0.3)
    w, scores = np.asarray(params["w"]), np.zeros((5, 4), np.float32)
    mask = np.arange(20).reshape(5, 4) < 10  # zeros tie: the earlier stay
    opt_state, returned = tx.init(params), 0
    for grad in grads:
        seen = training.masked_params(params, opt_state)["w"]
        np.testing.assert_array_equal(seen, np.where(mask, params["w"], 0))
        np.testing.assert_allclose(params["w"], w, rtol=1e-6)
        updates, opt_state = tx.update({"w": jnp.asarray(grad)}, opt_state, params)
        params = optax.apply_updates(params, updates)
        scores = scores - np.float32(0.3) * w * grad
        w = w - np.float32(0.1) * grad * mask
        new = scores >= np.sort(scores.ravel())[10]
        returned += int((new & ~mask).sum())
        mask = new
    assert returned > 0


def test_straight_through_of_any_score():
    params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    grads = {"w": jnp.array([[9.0, 1.0, 5.0, 0.1]])}

    def of_gradients(params, grads):
        return jax.tree.map(jnp.abs, grads)

    for score, expected in (
        ("saliency", [[1, 0, 1, 0]]),  # |w g| = 9, 2, 15, .4
        (of_gradients, [[1, 0, 1, 0]]),
        ("magnitude", [[0, 0, 1, 1]]),
    ):
        tx = training.straight_through(optax.sgd(0.0), 0.5, score=score)
        opt_state = tx.init(params)
        if score != "magnitude":
            assert training.current_masks(params, opt_state)["w"].all()
        _, opt_state = tx.update(grads, opt_state, params)
        masks = training.current_masks(params, opt_state)
        np.testing.assert_array_equal(masks["w"], expected)


# --- trained rank pruning ------------------------------------------------------------

KERNELS = {  # kernel, kind, groups
    "dense": ((12, 7), "channel", 1),
    "convolution": ((3, 3, 4, 8), "channel", 1),
    "spatial": ((3, 5, 4, 6), "spatial", 1),
    "depthwise": ((3, 3, 6, 4), "depthwise", 1),
    "grouped": ((3, 3, 2, 8), "channel", 4),
    "grouped spatial": ((3, 3, 2, 8), "spatial", 4),
}


def by_hand(kernel, kind, groups):
    """The matrices of a kernel, filter by filter."""
    each = kernel.shape[-1] // groups
    if kind == "depthwise":
        return [
            kernel[..., n].reshape(-1, kernel.shape[2]).T
            for n in range(kernel.shape[-1])
        ]
    parts = [kernel[..., g * each : (g + 1) * each] for g in range(groups)]
    if kind == "channel":
        return [part.reshape(-1, each) for part in parts]
    height, width, inputs, _ = kernel.shape
    return [
        np.block([[part[:, :, c, n] for n in range(each)] for c in range(inputs)])
        for part in parts
    ]


@pytest.mark.parametrize("name", KERNELS)
def test_truncation_has_the_rank_and_the_energy_that_were_asked_for(name):
    """R1, R2: the nearest matrix of the least rank that keeps the energy."""
    shape, kind, groups = KERNELS[name]
    kernel = normal(*shape)
    options = {"kind": kind, "feature_groups": {"k*": groups}}
    tx = training.trained_rank_pruning(optax.sgd(0.1), every=1, energy=0.7, **options)
    params = {"kernel": jnp.asarray(kernel)}
    after, _, _ = run(tx, params, none, 1)
    less = False
    for old, new in zip(
        by_hand(kernel, kind, groups),
        by_hand(np.asarray(after["kernel"]), kind, groups),
        strict=True,
    ):
        values = np.linalg.svd(old, compute_uv=False)
        share = np.cumsum(values**2) / np.sum(values**2)
        rank = int(np.argmax(share >= 0.7)) + 1
        less |= rank < len(values)
        assert np.linalg.matrix_rank(new, tol=1e-4) == rank
        np.testing.assert_allclose(
            (new**2).sum() / (old**2).sum(), share[rank - 1], 1e-4
        )
        if rank < len(values):
            gap = np.linalg.norm(old - new, 2)
            np.testing.assert_allclose(gap, values[rank], rtol=1e-4)
    assert less


def test_the_nuclear_norm_alone_falls_monotonically():
    """R4; by ``learning rate * strength * rank`` a step, while values stay positive."""
    params = {"w": jnp.asarray(normal(6, 4))}
    tx = training.trained_rank_pruning(
        optax.sgd(0.1), every=1, energy=1.0, strength=0.5
    )
    _, _, seen = run(tx, params, none, 5)
    norms = [np.linalg.svd(p["w"], compute_uv=False).sum() for p in (params, *seen)]
    np.testing.assert_allclose(np.diff(norms), -0.1 * 0.5 * 4, rtol=1e-3)


def test_trained_rank_loses_less_when_it_is_factorised():
    """R3, on linear regression from more outputs than the data need."""
    inputs, truth = normal(64, 12), normal(12, 3, seed=1) @ normal(3, 10, seed=2)
    noise = normal(64, 10, seed=3)

    def loss(params):
        return jnp.mean((inputs @ params["w"] - inputs @ truth - noise) ** 2)

    def lost(tx):
        params, _, _ = run(tx, {"w": jnp.asarray(normal(12, 10))}, jax.grad(loss), 60)
        u, s, v = np.linalg.svd(params["w"], full_matrices=False)
        cut = {"w": jnp.asarray((u[:, :3] * s[:3]) @ v[:3])}
        return float(loss(cut) - loss(params))

    plain = lost(optax.sgd(0.5))
    trained = lost(training.trained_rank_pruning(optax.sgd(0.5), every=5, energy=0.9))
    assert trained < 0.5 * plain


# --- force regularisation ------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_forces_are_the_published_sum(norm):
    """A loop over pairs; lengths stay, and a filter of zeros neither pulls nor turns."""
    kernel = normal(3, 2, 5)
    kernel[..., 3] = 0
    tx = training.force_regularization(0.3, norm)
    params = {"kernel": jnp.asarray(kernel)}
    slope = tx.update(none(params), tx.init(params), params)[0]["kernel"]
    got = -np.asarray(slope).reshape(6, 5) / 0.3
    filters = kernel.reshape(6, 5).astype(np.float64)
    expected = np.zeros_like(filters)
    for i in range(5):
        for j in set(range(5)) - {i, 3} if i != 3 else ():
            u, v = (filters[:, k] / np.linalg.norm(filters[:, k]) for k in (i, j))
            force = (v - u) / (np.linalg.norm(v - u) if norm == "l1" else 1)
            length = np.linalg.norm(filters[:, i])
            expected[:, i] += length * (force - force @ u * u)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose((got * filters).sum(0), 0, atol=1e-5)


def test_forces_lower_the_rank_for_an_error():
    """Wen et al.: fewer filters span nearly the same."""
    inputs, target = normal(40, 12), normal(12, 10, seed=1)

    def loss(params):
        return jnp.mean((inputs @ params["w"] - inputs @ target) ** 2)

    def rank(link):
        tx = optax.chain(link, optax.sgd(0.2))
        params, _, _ = run(tx, {"w": jnp.asarray(target)}, jax.grad(loss), 60)
        values = np.linalg.svd(params["w"], compute_uv=False) ** 2
        return int(np.argmax(np.cumsum(values) >= 0.95 * values.sum())) + 1

    assert rank(training.force_regularization(0.1)) < rank(optax.identity())


# --- ramps, copies of weights, selections --------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda tx, ramp: training.gradual_pruning(tx, ramp, every=30),
        lambda tx, ramp: training.straight_through(tx, ramp, every=30),
        lambda tx, ramp: training.iterative_hard_thresholding(tx, ramp, every=30),
        lambda tx, ramp: training.movement_pruning(tx, ramp, every=30),
    ],
)
def test_a_ramp_is_reached_at_its_end(make):
    params = {"w": jnp.asarray(normal(10, 10))}
    tx = make(optax.sgd(0.0), linear(0.9, start=0, end=100))
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(101):
        _, opt_state = update(none(params), opt_state, params)
    assert int(training.current_masks(params, opt_state)["w"].sum()) == 10


@pytest.mark.parametrize("base", ["schedule_free_sgd", "schedule_free_adamw"])
def test_averages_of_weights_hold_zeros_where_weights_are_removed(base):
    params = {"w": jnp.asarray(normal(4, 4))}  # dense: removed by the first step
    masks = {"w": jnp.asarray(normal(4, 4, seed=1) > 0)}
    tx = training.hold_masks(getattr(optax.contrib, base)(0.1), masks)
    after, opt_state, _ = run(tx, params, lambda p: {"w": jnp.sin(p["w"])}, 4)
    average = optax.contrib.schedule_free_eval_params(opt_state.inner, after)["w"]
    np.testing.assert_array_equal(average[~masks["w"]], 0)
    # As if it had been trained from masked weights without the removed ones.
    expected, plain, _ = run(
        getattr(optax.contrib, base)(0.1),
        jaxprune.apply_masks(params, masks),
        lambda p: jaxprune.apply_masks({"w": jnp.sin(p["w"])}, masks),
        4,
    )
    assert float(jnp.abs(average).max()) > 0.1
    np.testing.assert_allclose(after["w"], expected["w"], rtol=1e-5, atol=1e-7)
    eval_params = optax.contrib.schedule_free_eval_params(plain, expected)
    np.testing.assert_allclose(average, eval_params["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda tx: training.rigl(tx, 0.5, selection=select.across_leaves),
            "across_leaves ranks all leaves together, but sparse training with",
        ),
        (
            lambda tx: training.grow_and_prune(
                tx, 0.5, parts=1, every=2, selection=select.across_leaves
            ),
            "across_leaves ranks all leaves together, but grow_and_prune",
        ),
        (
            lambda tx: training.gradual_pruning(
                tx, {"w": 0.5}, selection=select.across_leaves
            ),
            "across_leaves cannot serve this method, .* by leaf",
        ),
        (
            lambda tx: training.gradual_pruning(tx, 0.5, selection=select.n_of_m),
            "selection=n_of_m cannot serve this method, .* as one number",
        ),
        (
            lambda tx: training.straight_through(tx, selection=select.per_leaf),
            "selection=per_leaf cannot serve this method, .* of its own",
        ),
        (lambda tx: training.gradual_pruning(tx, 0.5, every=2.5), "got 2.5"),
        (lambda tx: training.gradual_pruning(tx, float("nan")), "got nan"),
        (lambda tx: training.threshold_pruning(tx, float("nan")), "limit .* got nan"),
        (lambda tx: training.bridgeout(q=float("inf")), "q must .* finite, got inf"),
        (lambda tx: training.bridge_penalty(float("inf")), "finite, got inf"),
        (lambda tx: training.proximal_group_lasso(0.1, -1.0), "at least 0, got -1"),
        (lambda tx: training.growing_regularization(every=0), "at least 1, got 0"),
        (lambda tx: training.force_regularization(-1.0), "at least 0, got -1"),
        (lambda tx: training.force_regularization(0.1, "l3"), "norm must be .* 'l3'"),
        (lambda tx: training.trained_rank_pruning(tx, energy=0.0), "energy must"),
        (lambda tx: training.trained_rank_pruning(tx, kind="tall"), "got 'tall'"),
        (
            lambda tx: training.trained_rank_pruning(tx, kind="spatial"),
            r"'w' has shape \(4, 4\)",
        ),
        (
            lambda tx: training.trained_rank_pruning(tx, feature_groups={"w": 3}),
            "4 filters of 'w' do not split into 3 groups",
        ),
        (
            lambda tx: training.trained_rank_pruning(tx, feature_groups={"v": 2}),
            "'v', which matches none of w",
        ),
        (lambda tx: training.ema_teacher(1.0), r"decay must be in \[0, 1\)"),
    ],
)
def test_nonsense_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make(optax.sgd(0.1)).init({"w": jnp.ones((4, 4))})
