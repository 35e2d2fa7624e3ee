"""State that a function writes: cut along with what it is made of."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_same
from zoo import weights

import jaxprune

X = np.random.default_rng(2).normal(size=(5, 4)).astype(np.float32)
KEPT = np.arange(6) % 3 > 0


def written(variables, x):
    """Returns statistics that it never reads."""
    params = variables["params"]
    hidden = x @ params["w1"]
    new = {"mean": hidden.mean(0)}
    return jax.nn.relu(hidden) @ params["w2"], {"state": new}


def passed(variables, x):
    """Returns statistics as they are."""
    params = variables["params"]
    return jax.nn.relu(x @ params["w1"]) @ params["w2"], {"state": variables["state"]}


def variables():
    mean = np.arange(6, dtype=np.float32)
    return {"params": weights(w1=(4, 6), w2=(6, 2)), "state": {"mean": mean}}


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint])
def test_state_that_is_written_and_never_read(wrap):
    fn, full = wrap(written), variables()
    groups = jaxprune.trace(fn, full, X)
    [group] = groups.values()
    assert (group.size, group.exact) == (6, True)
    assert {m.path for m in group.members} == {"params/w1", "params/w2", "state/mean"}
    masks = jaxprune.expand_masks(groups, {group.name: KEPT})
    small = jaxprune.slice_params(full, masks)
    out, new = jaxprune.narrow(fn, masks)(small, X)
    expected, state = fn(jaxprune.apply_masks(full, masks), X)
    assert_same(out, expected)
    assert_same(new["state"]["mean"], state["state"]["mean"][KEPT])


def test_state_that_is_passed_on_is_not_used():
    groups = jaxprune.trace(passed, variables(), X)
    assert [{m.path for m in g.members} for g in groups.values()] == [
        {"params/w1", "params/w2"}
    ]
    [pin] = [p for p in groups.pinned if p.path == "state/mean"]
    assert "not use it" in pin.why or "unused" in pin.why


def test_masks_of_a_function_that_uses_less_say_what_to_trace():
    full = variables()
    groups = jaxprune.trace(passed, full, X)
    masks = jaxprune.expand_masks(groups, {"params/w1:1": KEPT})
    small = jaxprune.slice_params(full, masks)
    with pytest.raises(
        ValueError,
        match="new state/mean of shape .4,., but the masks leave .6,. of it.*training mode",
    ):
        jaxprune.narrow(written, masks)(small, X)


@pytest.fixture(scope="module")
def haiku_net():
    def net(x, is_training):
        x = hk.Linear(6)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training)
        return hk.Linear(2)(jax.nn.relu(x))

    net = hk.transform_with_state(net)
    params, state = net.init(jax.random.key(0), X, True)

    def apply(variables, x, is_training):
        with jax.numpy_dtype_promotion("standard"):  # Haiku counts in integers
            out, state = net.apply(
                variables["params"], variables["state"], None, x, is_training
            )
        return out, {"state": state}

    return apply, {"params": params, "state": state}


def test_masks_of_haiku_in_training_fit_evaluation(haiku_net):
    apply, full = haiku_net
    groups = jaxprune.trace(apply, full, X, True)
    [group] = groups.values()
    assert (group.size, group.exact) == (6, True)
    assert sum(m.path.startswith("state/") for m in group.members) == 4
    masks = jaxprune.expand_masks(groups, {group.name: KEPT})
    small = jaxprune.slice_params(full, masks)
    narrowed, masked = jaxprune.narrow(apply, masks), jaxprune.apply_masks(full, masks)
    _, new = apply(masked, X, True)
    expected = jaxprune.slice_params(new["state"], masks["state"])
    _, small_new = narrowed(small, X, True)
    assert_same(small_new["state"], expected)
    trained = {**small, "state": small_new["state"]}
    expected, _ = apply({**masked, "state": new["state"]}, X, False)
    out, _ = narrowed(trained, X, False)
    assert_same(out, expected)


# --- scalar parameters ---------------------------------------------------------------


@pytest.mark.parametrize("score", ["l1", "l2", "lamp", "geometric_median"])
@pytest.mark.parametrize("scalar", [jnp.float32, np.float32])
def test_a_scalar_parameter(score, scalar):
    def fn(params, x):
        return jnp.exp(params["scale"]) * (jax.nn.relu(x @ params["w1"]) @ params["w2"])

    params = {**weights(w1=(4, 6), w2=(6, 2)), "scale": scalar(0.5)}
    pruned = jaxprune.prune(fn, params, X, sparsity=0.5, score=score)
    assert pruned.variables["w1"].shape == (4, 3)
    assert pruned.variables["scale"] == 0.5
    expected = fn(jaxprune.apply_masks(params, pruned.masks), X)
    assert_same(pruned.apply_fn(pruned.variables, X), expected)
