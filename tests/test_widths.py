"""Training several widths at once, and the counts they are made of."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_same, quick_jit
from zoo import weights

import jaxprune
from jaxprune import search
from jaxprune.training.distillation import in_place

pytestmark = pytest.mark.once


class Net(nn.Module):
    """Two layers and a BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return nn.Dense(3)(x)


NET = Net()
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, 16), jnp.int32)
VARIABLES = NET.init(jax.random.key(0), X)
GROUPS = jaxprune.trace(NET.apply, VARIABLES, X)
[HIDDEN] = GROUPS
TX = optax.sgd(0.1)


def forward(apply_fn, variables, batch):
    return apply_fn(variables, batch[0], train=True, mutable=["batch_stats"])


def slim_of(shares, private="batch_stats/*"):
    return jaxprune.slimmable(
        NET.apply,
        VARIABLES,
        search.uniform(GROUPS, shares),
        groups=GROUPS,
        private=private,
    )


def joint_loss(slim, params, numbers, **options):
    held = {**slim.variables, "params": params}
    logits = [forward(slim[i], held, (X, Y))[0] for i in numbers]
    return in_place(logits, Y, **options).mean()


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_a_step_follows_the_gradient_of_the_sum_over_widths(alpha):
    """T6; at alpha=0 (S-Net) as with in-place distillation (SP-Net)."""
    slim = slim_of((1.0, 0.5, 0.25))
    options = {"alpha": alpha, "temperature": 2.0}
    step = search.joint_step(slim, TX, forward, **options)
    state, losses = quick_jit(step)(search.joint_state(slim, TX, None), (X, Y))
    params = slim.variables["params"]
    total = lambda params: joint_loss(slim, params, range(3), **options)  # noqa: E731
    value, grads = quick_jit(jax.value_and_grad(total))(params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    # A bias before BatchNorm has the gradient 0, to rounding.
    assert_same(state.variables["params"], expected, floor=0.1)
    np.testing.assert_allclose(losses.sum(), value, rtol=1e-5)
    # The state owns its arrays, so that it may be donated.
    donated = jax.jit(step, donate_argnums=0)
    donated(search.joint_state(slim, TX, None), (X, Y))
    assert_same(slim[0](slim.variables, X), NET.apply(VARIABLES, X))
    # Every width has moved its own statistics.
    means = state.variables["batch_stats"]["BatchNorm_0"]["mean"]
    assert [mean.size for mean in means] == [8, 4, 2]
    assert all(np.abs(mean).min() > 0 for mean in means)


def test_the_teacher_gets_no_gradient():
    """T6: units that the narrow width lacks learn from the widest width's loss alone."""
    slim = slim_of((1.0, 0.5))
    params = slim.variables["params"]
    grads = [
        jax.grad(lambda p, n=n: joint_loss(slim, p, n, alpha=1.0))(params)
        for n in ((0,), (0, 1))
    ]
    alone, both = (g["Dense_0"]["kernel"] for g in grads)
    np.testing.assert_allclose(alone[:, 4:], both[:, 4:], rtol=1e-5, atol=1e-7)
    assert np.abs(alone[:, :4] - both[:, :4]).max() > 1e-4


def test_the_sandwich_trains_the_ends_and_draws_between():
    slim = slim_of((1.0, 0.75, 0.5, 0.25))
    step = quick_jit(search.joint_step(slim, TX, forward, alpha=1.0, sample=3))
    params = slim.variables["params"]
    found = set()
    for seed in range(6):
        state, losses = step(search.joint_state(slim, TX, jax.random.key(seed)), (X, Y))
        assert losses.shape == (3,)
        means = state.variables["batch_stats"]["BatchNorm_0"]["mean"]
        moved = [bool(np.abs(mean).max() > 0) for mean in means]
        assert moved[0] and moved[3] and moved[1] != moved[2]
        middle = moved.index(True, 1)
        found.add(middle)
        grads = jax.grad(lambda p, m=middle: joint_loss(slim, p, (0, 3, m), alpha=1.0))(
            params
        )
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        # A bias before BatchNorm has the gradient 0, to rounding.
    assert_same(state.variables["params"], expected, floor=0.1)
    assert found == {1, 2}


def test_untracked_statistics_stay_and_are_calibrated_afterwards():
    """US-Net: BatchNorm is measured for every width once training is over."""
    slim = slim_of((1.0, 0.5))
    step = search.joint_step(slim, TX, forward, track=False)
    state, _ = quick_jit(step)(search.joint_state(slim, TX, None), (X, Y))
    stats = state.variables["batch_stats"]
    assert_same(
        stats["BatchNorm_0"]["var"], slim.variables["batch_stats"]["BatchNorm_0"]["var"]
    )
    found = search.calibrate(slim, state.variables, [X], train=True)
    for i in range(2):
        own = slim.at(i, found).variables
        dense = own["params"]["Dense_0"]
        h = X @ dense["kernel"] + dense["bias"][None]
        mean, var = (own["batch_stats"]["BatchNorm_0"][n] for n in ("mean", "var"))
        np.testing.assert_allclose(mean, h.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(var, h.var(0), rtol=1e-4)


def test_the_penalty_of_scales_is_a_link():
    """Network slimming: s sign(gamma) is added to the gradient of gamma alone."""
    slim = slim_of((1.0, 0.5))
    scales = jax.tree.map_with_path(
        lambda path, _: path[-1].key == "scale", slim.variables["params"]
    )
    link = jaxprune.training.bridge_penalty(1e-2, mask=scales)
    tx = optax.chain(link, TX)
    results = []
    for each in (TX, tx):
        step = search.joint_step(slim, each, forward)
        state, _ = quick_jit(step)(search.joint_state(slim, each, None), (X, Y))
        results.append(state.variables["params"])
    gap = jax.tree.map(lambda a, b: a - b, *results)
    np.testing.assert_allclose(gap["BatchNorm_0"]["scale"], 1e-3, rtol=1e-3)
    assert np.abs(gap["Dense_0"]["kernel"]).max() == 0


def test_thresholds_keep_about_the_ratio_and_counts_grow_with_it():
    """T7."""
    params = weights(a=(4, 20), b=(20, 30), c=(30, 2))
    groups = jaxprune.trace(lambda p, x: x @ p["a"] @ p["b"] @ p["c"], params, X)
    scores = {"a:1": RNG.uniform(size=20), "b:1": 0.5 * RNG.uniform(size=30)}
    ratios = np.linspace(0.05, 1, 20)
    found = [
        search.threshold_counts(groups, scores, keep_ratio=r, min_ratio=0.0)
        for r in ratios
    ]
    for ratio, counts in zip(ratios[1:], found[1:], strict=True):
        kept = sum(counts.values())
        assert abs(kept - ratio * 50) <= 1 + 1e-9
    for before, after in itertools.pairwise(found):
        assert all(before[name] <= after[name] for name in scores)
    assert found[-1] == {"a:1": 20, "b:1": 30}
    clamped = search.threshold_counts(groups, scores, keep_ratio=0.05)
    assert clamped["b:1"] >= 3
    widths = search.multi_base(groups, [found[9], {"a:1": 20, "b:1": 3}, found[4]])
    for before, after in itertools.pairwise(widths):
        assert all(before[name] >= after[name] for name in scores)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: search.joint_step(slim_of((1.0,)), TX, forward, sample=1), "sample=1"),
        (
            lambda: search.joint_step(slim_of((1.0, 0.5)), TX, forward, sample=3),
            "sample=3 of 2 widths: the sandwich rule trains",
        ),
        (
            lambda: search.joint_step(slim_of((1.0,)), TX, forward, alpha=2.0),
            "alpha must be in",
        ),
        (
            lambda: search.calibrate(slim_of((1.0,), ()), VARIABLES, [X]),
            "every width needs statistics .* all widths share batch_stats/BatchNorm_0",
        ),
        (
            lambda: search.uniform(GROUPS, (1.5,)),
            r"shares must be in \(0, 1\], got 1.5",
        ),
        (
            lambda: search.threshold_counts(GROUPS, {HIDDEN: np.ones(8)}, keep_ratio=0),
            "keep_ratio must be in",
        ),
        (
            lambda: search.threshold_counts(GROUPS, {}, keep_ratio=0.5),
            "scores are of no group",
        ),
        (
            lambda: search.threshold_counts(
                GROUPS, {HIDDEN: np.full(8, np.nan)}, keep_ratio=0.5
            ),
            "must be 8 finite numbers, one for every unit",
        ),
        (
            lambda: search.multi_base(GROUPS, [{HIDDEN: 4}, {HIDDEN: 0}]),
            r"found\[1\]\[.*must be a whole number of at least 1, got 0",
        ),
        (lambda: search.multi_base(GROUPS, []), "found holds no width"),
        (
            lambda: search.joint_step(
                slim_of((1.0, 0.75, 0.5)), TX, forward, sample=2.5
            ),
            "sample must be a whole number",
        ),
        (
            lambda: search.multi_base(GROUPS, [{"nothing": 3}]),
            "'nothing' matches none of the 1 groups",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_joint_training_needs_a_collection_of_parameters():
    params = weights(w1=(4, 8), w2=(8, 3))
    groups = jaxprune.trace(lambda p, x: x @ p["w1"] @ p["w2"], params, X)
    slim = jaxprune.slimmable(
        lambda p, x: x @ p["w1"] @ p["w2"], params, [{"w1:1": 4}], groups=groups
    )
    with pytest.raises(ValueError, match="differentiates the collection 'params'"):
        search.joint_state(slim, TX, jax.random.key(0))
