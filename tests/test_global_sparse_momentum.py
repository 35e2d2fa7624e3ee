"""Global sparse momentum against loops in numpy, its claims, and the contract."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contract import quick_jit

import jaxprune
from jaxprune.training import global_sparse_momentum, winning_ticket

pytestmark = pytest.mark.once

RATE, DECAY, BETA = 0.05, 0.02, 0.9
SHAPES = {"conv": (3, 3, 2, 4), "bias": (4,), "head": (6, 5)}
KERNELS = {"conv": True, "bias": False, "head": True}
TOTAL = 72 + 30
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 6)).astype(np.float32)


def normal(seed=0):
    rng = np.random.default_rng(seed)
    return {k: jnp.array(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def grads_of(params):
    """Gradients of a loss in which every weight has its own part."""
    return jax.tree.map(lambda w: jnp.sin(3.0 * w) + 0.1, params)


def by_loops(params, steps, kept):
    """The published update, weight by weight."""
    w = {k: np.array(v, np.float64) for k, v in params.items()}
    z = {k: np.zeros_like(v) for k, v in w.items()}
    for _ in range(steps):
        g = {k: np.sin(3.0 * v) + 0.1 for k, v in w.items()}
        ranked = sorted(
            ((abs(w[k][i] * g[k][i]), k, i) for k in w if KERNELS[k]
             for i in np.ndindex(w[k].shape)),
            reverse=True,
        )  # fmt: skip
        active = {(k, i) for _, k, i in ranked[:kept]}
        for k in w:
            for i in np.ndindex(w[k].shape):
                slope = g[k][i]
                if KERNELS[k]:
                    slope = DECAY * w[k][i] + (slope if (k, i) in active else 0.0)
                z[k][i] = BETA * z[k][i] + slope
                w[k][i] -= RATE * z[k][i]
    return w


def trained(tx, params, steps, grads=grads_of):
    update, state = quick_jit(tx.update), tx.init(params)
    for _ in range(steps):
        updates, state = update(grads(params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def gsm(ratio):
    link = global_sparse_momentum(ratio, weight_decay=DECAY)
    return optax.chain(link, optax.sgd(RATE, momentum=BETA))


# -------------------------------------------------------------------- against the paper


@pytest.mark.parametrize("ratio", [0.05, 0.4])
def test_training_is_the_published_update(ratio):
    got = trained(gsm(ratio), normal(), 25)
    expected = by_loops(normal(), 25, int(ratio * TOTAL))
    for name in SHAPES:
        np.testing.assert_allclose(got[name], expected[name], atol=2e-4)


@pytest.mark.parametrize("scheduled", [False, True])
def test_g1_exactly_q_entries_are_active(scheduled):
    """Ties or not; the kernels share one budget, the rest keeps its gradient."""
    ratios = [1 / TOTAL, 0.1, 0.29, 0.999, 1.0] if scheduled else [0.29]
    given = (lambda count: jnp.array(ratios)[count]) if scheduled else ratios[0]
    link = global_sparse_momentum(given)
    state, update = link.init(normal()), quick_jit(link.update)
    for ratio in ratios:
        for params in (normal(1), jax.tree.map(jnp.ones_like, normal())):
            updates, after = update(jax.tree.map(jnp.ones_like, params), state, params)
            active = sum(int(np.count_nonzero(updates[k])) for k in ("conv", "head"))
            assert active == int(ratio * TOTAL + 1e-6)
            np.testing.assert_array_equal(updates["bias"], 1)
        state = after


def test_no_active_weight_is_lost_to_rounding():
    """0.29 * 100 is 28.999999999999996."""
    link = global_sparse_momentum(lambda count: (count + 1).astype(jnp.float32) / 100)
    params = {"kernel": jnp.ones((10, 10))}
    state, update = link.init(params), quick_jit(link.update)
    for percent in range(1, 101):
        updates, state = update(params, state, params)
        assert int(updates["kernel"].sum()) == percent


def test_g2_a_passive_weight_follows_the_recursion():
    """z <- m z + d w, w <- w - r z, whatever its gradient; and falls as published."""
    params = {"kernel": jnp.array([[1.0, 1e-3], [1.0, -2e-3]])}
    grads = {"kernel": jnp.array([[1.0, 0.3], [-1.0, 0.9]])}
    end = trained(gsm(0.5), params, 60, lambda _: grads)["kernel"]
    for row, start in enumerate((1e-3, -2e-3)):
        z, w = 0.0, start
        for _ in range(60):
            z = BETA * z + DECAY * w
            w -= RATE * z
        assert float(end[row, 1]) == pytest.approx(w, rel=1e-4)
    slow = np.exp(-RATE * DECAY * 60 / (1 - BETA))
    assert w / -2e-3 == pytest.approx(slow, rel=0.12)


def test_g3_what_training_leaves_small_can_go():
    """A net that needs few weights; all others are cut without a loss."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(128, 10)).astype(np.float32)
    y = x[:, :4] @ rng.normal(size=(4, 1)).astype(np.float32)
    y += np.maximum(x[:, 4:5], 0)
    params = {
        "in": jnp.array(0.4 * rng.normal(size=(10, 6)), jnp.float32),
        "out": jnp.array(0.4 * rng.normal(size=(6, 1)), jnp.float32),
    }

    def loss(p):
        return ((jax.nn.relu(x @ p["in"]) @ p["out"] - y) ** 2).mean()

    @quick_jit
    def end(params, ratio):
        link = global_sparse_momentum(ratio, weight_decay=1e-2)
        tx = optax.chain(link, optax.sgd(1e-2, momentum=0.95))

        def step(_, carry):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return optax.apply_updates(w, updates), state

        w, _ = jax.lax.fori_loop(0, 1500, step, (params, tx.init(params)))
        pruned, masks = winning_ticket(w, w, 20.5 / 66)
        return loss(w), loss(pruned), sum(m.sum() for m in jax.tree.leaves(masks))

    whole, cut, kept = end(params, jnp.float32(20.5 / 66))
    assert kept == 20
    assert whole < 1e-3 and abs(cut - whole) < 1e-3
    # Cutting a net that was trained as usual is not free.
    whole, cut, _ = end(params, jnp.float32(1))
    assert whole < 1e-3 and cut > 0.1


def test_g4_all_active_is_sgd_with_weight_decay():
    plain = optax.chain(
        optax.add_decayed_weights(DECAY, KERNELS), optax.sgd(RATE, momentum=BETA)
    )
    ends = trained(gsm(1.0), normal(), 10), trained(plain, normal(), 10)
    chex.assert_trees_all_close(*ends, atol=1e-6)


# ------------------------------------------------------------------------- the contract


def test_contract(tmp_path):
    tx = global_sparse_momentum(0.3, weight_decay=DECAY)
    params, traces = normal(), []

    @quick_jit
    def step(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params)

    state = tx.init(params)
    updates, after = step(grads_of(params), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    step(grads_of(params), after, params)
    assert len(traces) == 1 and int(after.count) == 1

    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    updates, _ = quick_jit(tx.update)(half, tx.init(half), half)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, half)
    active = sum(
        int((np.abs(updates[k].astype("f")) > 0.5 * np.abs(half[k].astype("f"))).sum())
        for k in ("conv", "head")
    )
    assert active == int(0.3 * TOTAL)

    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", after)
        saver.wait_until_finished()
        chex.assert_trees_all_equal(saver.restore(tmp_path / "state", after), after)


def test_zero_weights_and_gradients_that_are_no_number():
    params = {"kernel": jnp.array([[0.0, 1.0, 2.0, 3.0]])}
    tx = global_sparse_momentum(0.5)
    update = quick_jit(tx.update)
    updates, _ = update({"kernel": jnp.ones((1, 4))}, tx.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], [[0, 0, 1, 1]])
    updates, _ = update(
        {"kernel": jnp.array([[1.0, jnp.nan, 1.0, 1.0]])}, tx.init(params), params
    )
    assert np.isnan(updates["kernel"][0, 1])  # seen, not masked


def test_a_schedule_of_the_ratio():
    tx = global_sparse_momentum(
        lambda count: jnp.where(count < 1, 1.0, 0.25), weight_decay=0.0
    )
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    state, update, active = tx.init(params), quick_jit(tx.update), []
    for _ in range(3):
        updates, state = update(params, state, params)
        active.append(int(np.count_nonzero(updates["kernel"])))
    assert active == [8, 2, 2]


def test_slice_opt_state_and_ranked_leaves():
    tx = gsm(0.5)
    params = {"a": jnp.ones((2, 3)), "c": jnp.ones((3, 2))}
    masks = {
        "a": np.array([[True, False, True]]),
        "c": np.array([[True], [False], [True]]),
    }
    state = jaxprune.slice_opt_state(tx, tx.init(params), masks)
    small = jaxprune.slice_params(params, masks)
    updates, _ = quick_jit(tx.update)(small, state, small)
    chex.assert_trees_all_equal_shapes(updates, small)
    only = global_sparse_momentum(0.5, mask={"a": True, "c": False})
    updates, _ = quick_jit(only.update)(params, only.init(params), params)
    assert [int(np.count_nonzero(u)) for u in updates.values()] == [3, 6]


def test_a_ticket_is_the_largest_weights_rewound():
    initial, trained_ = normal(2), normal(3)
    ticket = quick_jit(lambda a, b: winning_ticket(a, b, 0.2))(initial, trained_)
    flat = np.concatenate([np.abs(trained_[k]).ravel() for k in ("conv", "head")])
    limit = np.sort(flat)[::-1][int(0.2 * TOTAL) - 1]
    for name in ("conv", "head"):
        kept = np.abs(trained_[name]) >= limit
        np.testing.assert_array_equal(ticket.masks[name], kept)
        np.testing.assert_array_equal(
            ticket.params[name], np.where(kept, initial[name], 0)
        )
    assert np.shape(ticket.masks["bias"]) == ()
    np.testing.assert_array_equal(ticket.params["bias"], initial["bias"])


def test_errors():
    for ratio in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"nonzero_ratio must be in \(0, 1\], got"):
            global_sparse_momentum(ratio)
        with pytest.raises(ValueError, match=r"nonzero_ratio must be in \(0, 1\], got"):
            winning_ticket(normal(), normal(), ratio)
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        global_sparse_momentum(0.5, weight_decay=-1.0)
    tx = global_sparse_momentum(0.5)
    with pytest.raises(ValueError, match=r"tx.update\(grads, opt_state, params\)"):
        tx.update(normal(), tx.init(normal()))
    with pytest.raises(ValueError, match=r"none of the 1 leaves .* gets a rank"):
        tx.init({"bias": jnp.ones(3)})
