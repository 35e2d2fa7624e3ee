"""Gates on channels and on residual branches: both go by one threshold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import select, training
from jaxprune.statistics import taps

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def block(p, name, h):
    up = jax.nn.relu(h @ p[f"{name}/up"]) * p[f"{name}/scale"][None]
    return h + (up @ p[f"{name}/down"] + p[f"{name}/bias"][None])


def net(p, x):
    h = x @ p["stem"]
    h = jax.jit(block, static_argnums=1)(p, "first", h)  # given all, reads its own
    h = block(p, "second", h)
    return h @ p["head"]


PARAMS = {"stem": normal(3, 5), "head": normal(5, 2)}
for name, width in (("first", 4), ("second", 6)):
    PARAMS |= {f"{name}/up": normal(5, width), f"{name}/down": normal(width, 5)}
    PARAMS |= {f"{name}/scale": normal(width), f"{name}/bias": normal(5)}
X = normal(7, 3)
GROUPS = jaxprune.trace(net, PARAMS, X, writers="*")
UP = {
    member.path.split("/")[0]: name
    for name, group in GROUPS.items()
    for member in group.members
    if member.path.endswith("/up") and member.axis == 1
}


def test_a_gate_scales_what_its_block_adds():
    gated = taps.gate_branches(net, GROUPS)
    assert set(GROUPS.branches) == {"first", "second"}
    gates = {"first": jnp.array([0.3]), "second": jnp.float32(-2.0)}
    h = X @ PARAMS["stem"]
    h = h + 0.3 * (block(PARAMS, "first", h) - h)
    h = h - 2.0 * (block(PARAMS, "second", h) - h)
    np.testing.assert_allclose(gated(gates, PARAMS, X), h @ PARAMS["head"], rtol=1e-4)
    np.testing.assert_allclose(gated({}, PARAMS, X), net(PARAMS, X), rtol=1e-5)
    with pytest.raises(ValueError, match="'frist', which is no branch.*mean first"):
        gated({"frist": 1.0}, PARAMS, X)
    with pytest.raises(ValueError, match=r"gates\['first'\] has shape \(2,\), but is"):
        gated({"first": jnp.ones(2)}, PARAMS, X)


def test_a_block_with_a_zero_gate_is_removed_without_loss():
    gated = taps.gate_branches(net, GROUPS)
    tree = {"gates": {"first": jnp.zeros(1), "second": jnp.array([0.7])}, "net": PARAMS}

    def apply_fn(tree, x):
        return gated(tree["gates"], tree["net"], x)

    groups = jaxprune.trace(apply_fn, tree, X, writers="*")
    (gone,) = [name for name in groups.branches if name.endswith("first")]
    keep = select.adaptive(groups, {}, {gone: tree["gates"]["first"][0]}, threshold=0.1)
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(tree, masks)
    assert small["net"]["first/up"].size == small["net"]["first/down"].size == 0
    made = jaxprune.narrow(apply_fn, masks)(small, X)
    np.testing.assert_allclose(made, apply_fn(tree, X), rtol=1e-5)


def test_training_with_a_proximal_step_switches_a_useless_block_off():
    """The target needs the second block alone."""
    gated = taps.gate_branches(net, GROUPS)
    params = PARAMS | {n: 0.1 * PARAMS[n] for n in ("first/down", "first/bias")}
    target = gated({"first": jnp.zeros(1)}, params, X)
    state = {"first": jnp.ones(1), "second": jnp.ones(1)}
    tx = optax.chain(
        optax.sgd(1e-3),
        training.proximal_group_lasso(1e-3, 0.5, mask=dict.fromkeys(state, True)),
    )

    @jax.jit
    def run(gates):
        def step(carry, _):
            gates, opt_state = carry
            loss = lambda g: jnp.square(gated(g, params, X) - target).mean()  # noqa: E731
            updates, opt_state = tx.update(jax.grad(loss)(gates), opt_state, gates)
            return (optax.apply_updates(gates, updates), opt_state), None

        return jax.lax.scan(step, (gates, tx.init(gates)), None, 400)[0][0]

    learned = jax.device_get(run(state))
    assert learned["first"] == 0 < 0.5 < learned["second"]
    keep = select.adaptive(
        GROUPS, {}, {name: gate[0] for name, gate in learned.items()}, threshold=0.0
    )
    assert set(keep) == set(GROUPS.branches["first"])


SCALES = {
    UP["first"]: np.array([4.0, 0.1, 2.0, -0.3]),
    UP["second"]: np.array([0.01, 0.02, 0.05, 0.04, 0.003, 0.001]),
}
GATES = {"first": 0.2, "second": -1.0}


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.3, 1.0])
def test_thresholds_are_of_each_layer_and_of_all_branches(alpha):
    keep = select.adaptive(GROUPS, SCALES, GATES, threshold=alpha)
    for branch, name in UP.items():
        size = np.abs(SCALES[name])
        kept = size >= alpha * size.max()
        kept &= abs(GATES[branch]) >= alpha * 1.0
        np.testing.assert_array_equal(keep.get(name, np.ones(len(size), bool)), kept)


def test_a_budget_is_met_by_the_smallest_threshold_of_all():
    cost = jaxprune.cost_model(net, PARAMS, X, groups=GROUPS).parameters
    spent = {}
    for alpha in np.linspace(0, 1, 401):
        keep = select.adaptive(GROUPS, SCALES, GATES, threshold=alpha)
        sizes = {n: int(keep.get(n, np.ones(g.size)).sum()) for n, g in GROUPS.items()}
        spent[alpha] = cost.value(sizes)
    for budget in (0.9, 0.6, 0.45):
        found = select.adaptive(
            GROUPS, SCALES, GATES, cost=cost, budget=budget * cost.full
        )
        first = min(a for a, s in spent.items() if s <= budget * cost.full)
        expected = select.adaptive(GROUPS, SCALES, GATES, threshold=first)
        assert set(found) == set(expected)
        for name, kept in expected.items():
            np.testing.assert_array_equal(found[name], kept)


def test_a_branch_of_few_channels_goes_and_what_is_wrong_is_refused():
    keep = select.adaptive(GROUPS, SCALES, {}, threshold=0.6, least=0.3)
    assert not keep[UP["first"]].any() and keep[UP["second"]].any()
    with pytest.raises(ValueError, match="give either threshold, or cost and budget"):
        select.adaptive(GROUPS, SCALES, GATES)
    with pytest.raises(ValueError, match="'third' is not a branch; the branches are"):
        select.adaptive(GROUPS, SCALES, {"third": 1.0}, threshold=0.1)
    cost = jaxprune.cost_model(net, PARAMS, X, groups=GROUPS).parameters
    with pytest.raises(ValueError, match="budget=1 cannot be met: with one unit"):
        select.adaptive(GROUPS, SCALES, GATES, cost=cost, budget=1)
