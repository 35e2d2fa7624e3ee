"""Sparse training: every method goes through the same checks, then each has its own."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contract import quick_jit
from flax import nnx

from jaxprune import select
from jaxprune.core._masks import apply_masks
from jaxprune.core._packing import pack_masks
from jaxprune.surgery._slicing import slice_opt_state, slice_params
from jaxprune.training import (
    Rule,
    SparseState,
    current_masks,
    dynamic_network_surgery,
    gradual_pruning,
    grow_and_prune,
    hold_masks,
    iterative_hard_thresholding,
    iterative_soft_shrinkage,
    masked_params,
    rigl,
    sparse_evolutionary_training,
    sparse_training,
    straight_through,
    threshold_pruning,
)
from jaxprune.training.schedules import cubic, narang
from jaxprune.training.sparse import _resets as resets

pytestmark = pytest.mark.once

PRUNABLE = {"kernel": True, "half": True, "one": True, "zero": True, "bias": False}
STEPS = 6


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax itself mixes Python floats and int32 counters."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def weights():
    """Floats and bfloat16, one weight, zeros, and a leaf that is not pruned."""
    rng = np.random.default_rng(0)
    return {
        "bias": jnp.asarray(rng.normal(size=6), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(4, 8)), jnp.bfloat16),
        "kernel": jnp.asarray(rng.normal(size=(2, 8, 6)), jnp.float32),
        "one": jnp.ones((1, 1)),
        "zero": jnp.zeros((3, 4)),
    }


def gradients(step):
    rng = np.random.default_rng(100 + step)
    return {
        path: jnp.asarray(rng.normal(size=w.shape), w.dtype)
        for path, w in weights().items()
    }


def inner():
    """A chain with decay, momentum and a schedule."""
    schedule = optax.cosine_decay_schedule(3e-2, 100)
    return optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(schedule, momentum=0.9)
    )


def noisy(tx):
    """With a typed key in the state."""
    noise = optax.add_noise(eta=1e-3, gamma=0.55, key=jax.random.key(3))
    return optax.chain(noise, tx)


def held(params):
    return select.per_leaf(
        {p: jnp.abs(w) if PRUNABLE[p] else None for p, w in params.items()},
        sparsity=0.5,
    )


TWO_OF_FOUR = functools.partial(select.n_of_m, n=2, m=4, axis=-2)
BLOCKS = functools.partial(select.blocks, shape=(2, 2))
RAMP = cubic(0.75, start=0, end=4)
METHODS = {
    "hold_masks": lambda tx: hold_masks(optax.adamw(3e-2, weight_decay=0.1), held),
    "gradual": lambda tx: gradual_pruning(tx, RAMP, every=2, prunable=PRUNABLE),
    "global saliency": lambda tx: gradual_pruning(
        tx, RAMP, every=1, score="saliency", selection=select.across_leaves
    ),
    "random blocks": lambda tx: gradual_pruning(
        tx, RAMP, every=2, score="random", selection=BLOCKS
    ),
    "threshold": lambda tx: threshold_pruning(tx, 0.7, every=2),
    "SET": lambda tx: sparse_evolutionary_training(noisy(tx), 0.5, every=2),
    "RigL": lambda tx: rigl(optax.adamw(3e-2, weight_decay=0.1), 0.5, every=2, until=4),
    "RigL 2:4": lambda tx: rigl(tx, every=2, selection=TWO_OF_FOUR),
    "GaP": lambda tx: grow_and_prune(tx, 0.5, parts=2, every=2, rounds=1),
    "STE": lambda tx: straight_through(tx, 0.5),
    "DNS": lambda tx: dynamic_network_surgery(tx, 0.0, probability=0.7),
    "ISS-P": lambda tx: iterative_soft_shrinkage(tx, 0.5),
    "IHT": lambda tx: iterative_hard_thresholding(tx, 0.5, every=2),
}
ZERO = [n for n in METHODS if n not in ("STE", "DNS", "ISS-P", "IHT")]
EVERY = pytest.mark.parametrize("name", METHODS)


@functools.cache
def compiled(name):
    """One step of a method, and how often it was traced."""
    tx, traces = METHODS[name](inner()), []

    @quick_jit
    def step(params, opt_state, grads):
        traces.append(1)
        seen = masked_params(params, opt_state)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, seen

    return tx, step, traces


def train(name, params, opt_state, steps, order=None):
    _, step, _ = compiled(name)
    for k in steps:
        grads = gradients(k)
        grads = grads if order is None else permuted(grads, order)
        params, opt_state, _ = step(params, opt_state, grads)
    return params, opt_state


@functools.cache
def trained(name):
    params = weights()
    return train(name, params, compiled(name)[0].init(params), range(STEPS))


def plain(tree):
    """Keys as numbers, for comparison."""
    return jax.tree.map(
        lambda x: (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        ),
        tree,
    )


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, plain(a), plain(b))


def facts(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@EVERY
def test_the_contract(name):
    tx, _, traces = compiled(name)
    params = weights()
    start = tx.init(params)
    end, opt_state = trained(name)
    assert len(traces) == 1, "no retrace"
    assert facts(end) == facts(params)
    assert facts(opt_state) == facts(start)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(end))
    masks = current_masks(end, opt_state)
    assert all(mask.dtype == bool for mask in masks.values())
    assert masks["one"].all(), "a single weight stays"
    assert all(mask.any() for mask in masks.values()), "no leaf is emptied"
    assert masks["bias"].shape == (), "never pruned"
    removed = sum(int((~mask).sum()) for mask in masks.values())
    assert removed > 0
    assert facts(masked_params(end, opt_state)) == facts(params)
    bits = opt_state.masks.bits
    assert bits["kernel"].dtype == jnp.uint8 and bits["kernel"].size * 8 == 96


@pytest.mark.parametrize("name", ZERO)
def test_removed_weights_are_zero_through_decay(name):
    params, opt_state = trained(name)
    assert_equal(params, apply_masks(params, current_masks(params, opt_state)))
    assert_equal(params, masked_params(params, opt_state))


def test_a_checkpoint_in_the_middle_changes_nothing(tmp_path):
    """The states of all methods in one checkpoint; one of them trains on."""
    halves = {}
    for name in METHODS:
        params = weights()
        halves[name] = train(name, params, compiled(name)[0].init(params), range(3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", halves)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", halves)
    assert facts(restored) == facts(halves)
    assert_equal(restored, halves)
    assert_equal(train("RigL", *restored["RigL"], range(3, STEPS)), trained("RigL"))


def permuted(tree, order):
    return {p: w[..., order[p]] if w.ndim else w for p, w in tree.items()}


@pytest.mark.parametrize(
    "name", [n for n in METHODS if n not in ("SET", "random blocks", "DNS")]
)
def test_units_may_stand_in_any_order(name):
    """But for what is drawn anew: the last axis is permuted, with the first masks."""
    tx, _, _ = compiled(name)
    rng, params = np.random.default_rng(1), weights()
    order = {path: rng.permutation(w.shape[-1]) for path, w in params.items()}
    order["zero"] = np.arange(4)  # zeros tie, and ties are decided by position
    opt_state = tx.init(params)
    masks = permuted(current_masks(params, opt_state), order)
    prunable = {path: masks[path] for path in opt_state.masks.bits}
    weights_of = {path: params[path] for path in prunable}
    packed = pack_masks(prunable, weights_of, opt_state.masks)
    moved_state = opt_state._replace(masks=packed)
    moved = train(name, permuted(params, order), moved_state, range(STEPS), order)
    end, opt_state = trained(name)
    masks = permuted(current_masks(end, opt_state), order)
    assert_equal(current_masks(*moved), masks)
    for path, w in permuted(end, order).items():
        np.testing.assert_allclose(
            moved[0][path].astype(np.float32), w.astype(np.float32), rtol=1e-5
        )


# --- what the mechanism promises -----------------------------------------------------

FULL = Rule(lambda params, key: {"w": jnp.array([[True, False, True, False]])})


def test_all_multipliers_one_is_the_optimiser_bit_for_bit():
    tx = optax.adam(0.1)
    ones = sparse_training(tx, FULL, forward=1.0, gradient=1.0, post_step=1.0)
    params, grads = {"w": jnp.ones((1, 4))}, {"w": jnp.arange(4.0)[None]}
    expected, got = (
        opt.update(grads, opt.init(params), params)[0] for opt in (tx, ones)
    )
    assert_equal(got, expected)
    assert_equal(masked_params(params, ones.init(params)), params)


def test_multipliers_in_between():
    """forward, gradient and post_step on what the masks remove, by hand."""
    tx = sparse_training(
        optax.sgd(0.1), FULL, forward=0.5, gradient=0.25, post_step=0.8
    )
    params, grads = {"w": jnp.array([[1.0, 2, 3, 4]])}, {"w": jnp.ones((1, 4))}
    opt_state = tx.init(params)
    seen = masked_params(params, opt_state)["w"]
    np.testing.assert_allclose(seen, [[1, 1, 3, 2]])
    updates, _ = tx.update(grads, opt_state, params)
    after = optax.apply_updates(params, updates)["w"]
    expected = [[0.9, 0.8 * (2 - 0.025), 2.9, 0.8 * (4 - 0.025)]]
    np.testing.assert_allclose(after, expected, rtol=1e-6)


def test_the_gradient_is_the_same_inside_and_outside():
    params = {"w": jnp.array([[1.0, 2.0, jnp.inf, 4.0]])}
    tx = hold_masks(optax.sgd(0.1), {"w": jnp.array([[True, False, False, True]])})
    opt_state = tx.init(params)

    def loss(p):
        return jnp.sum(p["w"] ** 2 * jnp.arange(1.0, 5.0)[None])

    inside = jax.grad(loss)(masked_params(params, opt_state))
    outside = jax.grad(lambda p: loss(masked_params(p, opt_state)))(params)
    assert_equal(inside, outside)
    np.testing.assert_array_equal(inside["w"], [[2, 0, 0, 32]])


def test_a_whole_leaf_may_be_held_at_zero():
    params = {"w": jnp.ones((2, 3)), "number": jnp.ones(())}
    tx = hold_masks(optax.sgd(0.1), {"w": np.array(False), "number": np.array(True)})
    opt_state = tx.init(params)
    assert not masked_params(params, opt_state)["w"].any()
    assert opt_state.masks.bits["w"].size == 1
    updates, _ = tx.update(params, opt_state, params)
    assert not optax.apply_updates(params, updates)["w"].any()
    with pytest.raises(ValueError, match="remove 'number', which is a single number"):
        hold_masks(optax.sgd(0.1), {"w": True, "number": False}).init(params)


def test_momentum_of_what_leaves_and_comes_back_starts_afresh():
    """One weight leaves at step 1 and returns at step 3."""
    there = Rule(
        lambda params, key: {"w": jnp.ones((1, 2), bool)},
        lambda moment: {"w": jnp.array([[True, False]]) | (moment.count == 3)},
        due=lambda count, key: (count == 1) | (count == 3),
    )
    params, grads = {"w": jnp.ones((1, 2))}, {"w": jnp.ones((1, 2))}
    tx = sparse_training(optax.sgd(0.1, momentum=0.9), there)
    opt_state, seen = tx.init(params), []
    for _ in range(4):
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        seen.append(
            (float(params["w"][0, 1]), float(opt_state.inner[0].trace["w"][0, 1]))
        )
    np.testing.assert_allclose(seen, [(0.9, 1), (0, 0), (0, 0), (-0.1, 1)], rtol=1e-6)


OPTIMISERS = {
    "adam": lambda: optax.adam(0.1),
    "lion": lambda: optax.lion(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9),
    "noise": lambda: noisy(optax.sgd(0.1, momentum=0.9)),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "if finite": lambda: optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 3),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.adam(0.1), 2
    ).gradient_transformation(),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_refresh_resets_any_optimiser(name):
    """What has the shape of the weights is fresh where they leave, and only there."""
    tx = OPTIMISERS[name]()
    params = {"a": [jnp.ones((2, 3)), (jnp.ones(3),)], "b": jnp.ones((3, 2))}
    opt_state = jax.tree.map(  # as if trained: no number is that of a fresh start
        lambda x: x + 1 if jnp.issubdtype(x.dtype, jnp.floating) else x, tx.init(params)
    )
    lasting = jnp.array([[True, False, True], [False, True, True]])
    found = resets.reset_state(tx, opt_state, params, {"a/0": lasting})
    assert jax.tree.structure(found) == jax.tree.structure(opt_state)
    fresh, checked = tx.init(params), 0
    for new, old, first in zip(
        *map(jax.tree.leaves, (found, opt_state, fresh)), strict=True
    ):
        if old.shape == (2, 3):
            np.testing.assert_array_equal(new, jnp.where(lasting, old, first))
            checked += 1
        else:
            assert_equal(new, old)
    assert checked > 0 or name == "adafactor"


@pytest.mark.parametrize("kind", ["MultiSteps", "partition"])
def test_wrappers_of_optax(kind):
    link = functools.partial(gradual_pruning, sparsity=0.5, every=1, start=1)
    tx = {
        "MultiSteps": lambda: optax.MultiSteps(link(optax.sgd(0.1)), 2),
        "partition": lambda: optax.partition(
            {"a": link(optax.adam(0.1)), "b": optax.set_to_zero()}, {"a": "a", "b": "b"}
        ),
    }[kind]()
    params = {"a": jnp.arange(1.0, 9.0).reshape(2, 4), "b": jnp.ones((2, 2))}
    grads, opt_state = jax.tree.map(jnp.ones_like, params), tx.init(params)
    update = quick_jit(tx.update)
    for _ in range(4):
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    masks = current_masks(params, opt_state)
    np.testing.assert_array_equal(masks["a"], [[0] * 4, [1] * 4])
    np.testing.assert_array_equal(params["a"] != 0, masks["a"])
    assert_equal(masked_params(params, opt_state), params)


def test_recurrent_weights_under_scan():
    """A GRU whose loss scans over time, trained in a scan over steps, as Narang's."""
    cell = nn.RNN(nn.GRUCell(5))
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)), jnp.float32)
    params = cell.init(jax.random.key(0), inputs)["params"]
    limit = narang(0.5, start=0, ramp=3, end=8, frequency=2)
    tx = threshold_pruning(optax.adam(1e-2), limit, every=2)

    def loss(params):
        return jnp.mean((cell.apply({"params": params}, inputs) - 1) ** 2)

    def step(carry, _):
        params, opt_state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    carry = params, tx.init(params)
    train = quick_jit(lambda carry: jax.lax.scan(step, carry, length=12))
    (params, opt_state), losses = train(carry)
    assert losses[-1] < losses[0]
    masks = current_masks(params, opt_state)
    assert_equal(params, apply_masks(params, masks))
    removed = [float((~mask).mean()) for mask in jax.tree.leaves(masks) if mask.ndim]
    assert len(removed) == 6 and 0.2 < np.mean(removed) < 0.9


def test_boxed_parameters():
    """Linen's partitioned boxes: state made with boxes, updates without."""
    boxed = {
        "kernel": nn.Partitioned(jnp.arange(1.0, 17.0).reshape(2, 8), ("in", "out"))
    }
    bare = nn.meta.unbox(boxed)
    tx = straight_through(optax.sgd(0.1), 0.5)
    with_boxes, without = tx.init(boxed), tx.init(bare)
    for params in (boxed, bare):
        seen = masked_params(params, with_boxes)
        assert jax.tree.structure(seen) == jax.tree.structure(params)
        assert_equal(nn.meta.unbox(seen), masked_params(bare, without))
    updates, state = tx.update(boxed, with_boxes, boxed)
    assert jax.tree.structure(updates) == jax.tree.structure(boxed)
    assert jax.tree.structure(state) == jax.tree.structure(with_boxes)


def test_nnx_optimizer():
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    tx = gradual_pruning(optax.sgd(0.1, momentum=0.9), 0.75, every=1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(2):
        params = masked_params(nnx.state(model, nnx.Param), optimizer.opt_state)
        optimizer.update(model, jax.tree.map(jnp.ones_like, params))
    masks = current_masks(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert int(masks["kernel"][...].sum()) == 8
    np.testing.assert_array_equal(model.kernel[...] != 0, masks["kernel"][...])


def test_a_step_after_slicing_is_the_masked_step_sliced():
    """A structured round in the middle of sparse training: masks and momentum follow."""
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
        "bias": jnp.ones(6),
    }
    keep = np.array([True, False, True, True, False, True])
    cut = {"a": keep[None], "b": keep[:, None], "bias": keep}
    random = {p: rng.random(w.shape) for p, w in params.items()}
    held = select.per_leaf(random, sparsity={"a": 0.5, "b": 0.5})
    tx = hold_masks(optax.sgd(0.1, momentum=0.9), held)
    grads = jax.tree.map(jnp.cos, params)
    opt_state = tx.init(params)
    params = masked_params(params, opt_state)

    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = step(params, opt_state, grads)
    small, small_state = slice_params(params, cut), slice_opt_state(tx, opt_state, cut)
    masks = slice_params(
        jax.tree.map(
            lambda w, m: jnp.broadcast_to(m, w.shape).astype(jnp.float32),
            params,
            current_masks(params, opt_state),
        ),
        cut,
    )
    got = current_masks(small, small_state)
    np.testing.assert_array_equal(got["a"], masks["a"] != 0)
    np.testing.assert_array_equal(got["b"], masks["b"] != 0)
    expected, _ = step(params, opt_state, grads)
    after, _ = step(small, small_state, slice_params(grads, cut))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        after,
        slice_params(expected, cut),
    )


# --- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda tx: gradual_pruning(tx, 1.5), ValueError, r"in \[0, 1\], got 1.5"),
        (
            lambda tx: gradual_pruning(tx, 0.5, every=0),
            ValueError,
            "every=0, start=0, until=None",
        ),
        (
            lambda tx: gradual_pruning(
                tx, lambda count: jnp.minimum(count / 125, 0.8), until=60
            ),
            ValueError,
            "until=60 is before step 100, .* stay at 0.48 and never reach 0.8",
        ),
        (
            lambda tx: gradual_pruning(tx, 0.5, score="size"),
            ValueError,
            "score must be one of .* got 'size'",
        ),
        (
            lambda tx: gradual_pruning(tx, {"kernel": 0.5}, prunable=PRUNABLE),
            ValueError,
            "both select leaves; give only one",
        ),
        (
            lambda tx: gradual_pruning(tx, {"w": 0.5}),
            ValueError,
            "sparsity names 'w', which params lack: bias, half",
        ),
        (
            lambda tx: gradual_pruning(tx, 0.5, prunable=lambda params: False),
            ValueError,
            "none of the 5 leaves .* gets pruned",
        ),
        (lambda tx: rigl(tx, 0.5, drop=2.0), ValueError, "drop must be .* got 2.0"),
        (
            lambda tx: grow_and_prune(tx, 0.5, parts=9, every=2),
            ValueError,
            "4 prunable leaves cannot be split into 9 parts",
        ),
        (
            lambda tx: grow_and_prune(tx, 0.5, parts={"half": 0}, every=2),
            ValueError,
            "parts must name 'kernel'",
        ),
        (
            lambda tx: straight_through(tx, 0.5, score="size"),
            ValueError,
            "or a function, got 'size'",
        ),
        (
            lambda tx: dynamic_network_surgery(tx, 1.0, margin=1.0),
            ValueError,
            "margin must be in",
        ),
        (
            lambda tx: dynamic_network_surgery(tx, 1.0, probability=2.0),
            ValueError,
            "probability must be in",
        ),
        (
            lambda tx: iterative_soft_shrinkage(tx, 0.5, shrinkage=1.1),
            ValueError,
            "shrinkage must be in",
        ),
        (
            lambda tx: hold_masks(
                tx, lambda params: dict.fromkeys(params, True) | {"b": 1}
            ),
            ValueError,
            "masks without a leaf: b",
        ),
        (
            lambda tx: hold_masks(tx, {"kernel": np.ones((2, 8, 6))}),
            ValueError,
            "leaves without a mask",
        ),
        (
            lambda tx: rigl(optax.lbfgs(), 0.5),
            ValueError,
            "cannot tell which parts of the optimiser's state",
        ),
    ],
)
def test_nonsense_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make(optax.sgd(0.1)).init(weights())


def test_update_without_params_and_states_without_masks_are_refused():
    tx, params = hold_masks(optax.sgd(0.1), held), weights()
    opt_state = tx.init(params)
    with pytest.raises(ValueError, match=r"tx.update\(grads, opt_state, params\)"):
        tx.update(params, opt_state)
    with pytest.raises(ValueError, match="opt_state holds no SparseState"):
        masked_params(params, optax.sgd(0.1).init(params))
    del params["kernel"]
    with pytest.raises(ValueError, match="has a mask for 'kernel', which params lack"):
        current_masks(params, opt_state)
    assert isinstance(opt_state, SparseState)
