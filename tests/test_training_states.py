"""States of all methods: on meshes, under optax's own recipe, through every format.

One table of methods goes through the same checks. conftest.py makes eight devices.
"""

import contextlib
import functools
import io

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import quick_jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import select, training
from jaxprune.surgery import slice_opt_state, slice_params
from jaxprune.training.schedules import cubic


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax itself mixes Python floats and int32 counters."""
    with jax.numpy_dtype_promotion("standard"):
        yield


SPECS = {"a": P("data", "model"), "b": P("model"), "c": P("model", "data")}


def weights():
    rng = np.random.default_rng(0)
    shapes = {"a": (16, 8), "b": (8,), "c": (8, 4)}
    return {
        path: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for path, shape in shapes.items()
    }


def net(params, x):
    return jax.nn.relu(x @ params["a"] + params["b"][None]) @ params["c"]


GROUPS = jaxprune.trace(net, weights(), jnp.ones((1, 16)), roles=True)
(UNITS,) = GROUPS


def units(params):
    keep = jnp.arange(params["b"].size) % 4 != 1
    return {"a": keep[None], "b": keep, "c": keep[:, None]}


def half(params):
    return select.per_leaf(jax.tree.map(jnp.abs, params), sparsity=0.5)


def before(link):
    return lambda tx: optax.chain(link, tx)


TWO_OF_FOUR = functools.partial(select.n_of_m, n=2, m=4, axis=-2)
BLOCKS = functools.partial(select.blocks, shape=(2, 2))
RAMP = cubic(0.75, start=0, end=4)
METHODS = {
    "hold_masks": lambda tx: training.hold_masks(tx, half),
    "hold_masks of units": lambda tx: training.hold_masks(tx, units),
    "gradual": lambda tx: training.gradual_pruning(tx, RAMP, every=2),
    "saliency across leaves": lambda tx: training.gradual_pruning(
        tx, RAMP, every=1, score="saliency", selection=select.across_leaves
    ),
    "random blocks": lambda tx: training.gradual_pruning(
        tx, RAMP, every=2, score="random", selection=BLOCKS
    ),
    "threshold": lambda tx: training.threshold_pruning(
        tx, 0.7, every=2, in_deviations=True
    ),
    "SET": lambda tx: training.sparse_evolutionary_training(tx, 0.5, every=2),
    "RigL 2:4": lambda tx: training.rigl(tx, every=2, selection=TWO_OF_FOUR),
    "GaP": lambda tx: training.grow_and_prune(tx, 0.5, parts=2, every=2, rounds=1),
    "movement": lambda tx: training.movement_pruning(tx, 0.5, every=2),
    "STE of saliency": lambda tx: training.straight_through(tx, 0.5, score="saliency"),
    "TRP": lambda tx: training.trained_rank_pruning(
        tx, every=2, energy=0.9, strength=0.1
    ),
    "STE": lambda tx: training.straight_through(tx, 0.5),
    "DNS": lambda tx: training.dynamic_network_surgery(tx, 0.0, probability=0.7),
    "ISS-P": lambda tx: training.iterative_soft_shrinkage(tx, 0.5),
    "IHT": lambda tx: training.iterative_hard_thresholding(tx, 0.5, every=2),
    "bridgeout": before(training.bridgeout(0.3, target_fraction=0.5)),
    "group_bridgeout": before(training.group_bridgeout(0.01)),
    "dropconnect": before(training.dropconnect(0.3, key=jax.random.key(1, impl="rbg"))),
    "bridge_penalty": before(training.bridge_penalty(0.1)),
    "growing": before(training.growing_regularization(units, growth=0.1, every=2)),
    "force": before(training.force_regularization(0.1)),
    "proximal": lambda tx: optax.chain(
        tx, training.proximal_group_lasso(0.1, 0.1, GROUPS)
    ),
    "ema_teacher": lambda tx: optax.chain(tx, training.ema_teacher(0.9)),
    "group_lasso": before(training.group_lasso(0.1, GROUPS)),
    "centripetal": before(
        training.centripetal(GROUPS, {UNITS: np.array([0, 0, 2, 3, 4, 5, 6, 6])}, 0.5)
    ),
    "global_sparse_momentum": before(training.global_sparse_momentum(0.3)),
}
EVERY = pytest.mark.parametrize("name", METHODS)
STEPS = 5


@functools.cache
def method(name):
    return METHODS[name](
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    )


def at_what_is_seen(params, opt_state):
    """Where the gradient of any method is taken."""
    for look in (training.masked_params, training.noisy_params):
        with contextlib.suppress(ValueError):
            params = look(params, opt_state)
    return params


def step_of(name):
    def step(params, opt_state):
        seen = at_what_is_seen(params, opt_state)
        grads = jax.tree.map(lambda w: jnp.sin(3 * w), seen)
        updates, opt_state = method(name).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


@functools.cache
def compiled(name):
    return quick_jit(step_of(name))


def trained(name, params, opt_state, steps=STEPS):
    for _ in range(steps):
        params, opt_state = compiled(name)(params, opt_state)
    return params, opt_state


@functools.cache
def alone(name):
    """Trained on one device."""
    return trained(name, weights(), method(name).init(weights()))


def facts(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def assert_close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b
    )


# --- meshes --------------------------------------------------------------------------


def spread(tree, mesh):
    return {
        path: jax.device_put(leaf, NamedSharding(mesh, SPECS[path]))
        for path, leaf in tree.items()
    }


# There the compiler spreads what it likes: one method of each way to update.
AUTO = ("hold_masks", "RigL 2:4", "TRP", "STE", "DNS", "bridgeout", "centripetal")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, AxisType.Explicit) for name in METHODS),
        *((name, AxisType.Auto) for name in AUTO),
    ],
)
def test_every_method_runs_where_adam_runs(name, kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    params = spread(weights(), mesh)
    if kind == AxisType.Auto:  # the context changes nothing there
        got = trained(name, params, method(name).init(params))
    else:
        with jax.set_mesh(mesh):
            start = method(name).init(params)
            got = trained(name, params, start)
            for new, old in zip(*map(jax.tree.leaves, (got[1], start)), strict=True):
                assert jax.typeof(new) == jax.typeof(old), "or a scan would not close"
    assert_close(got[0], alone(name)[0])
    for path, leaf in got[0].items():
        assert leaf.sharding.spec == SPECS[path]
    for leaf in jax.tree.leaves(got[1]):
        assert leaf.size < 16 or not leaf.is_fully_replicated, "spread like the weights"


@pytest.mark.parametrize("name", ["gradual", "RigL 2:4", "STE", "bridgeout"])
def test_without_a_context_and_without_jit(name):
    """What the arrays say of their mesh is enough."""
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    params = spread(weights(), mesh)
    opt_state = method(name).init(params)
    for _ in range(2):
        params, opt_state = step_of(name)(params, opt_state)
    assert_close(params, trained(name, weights(), method(name).init(weights()), 2)[0])
    if name != "bridgeout":
        masks = training.current_masks(params, opt_state)
        assert masks["a"].sharding.spec == SPECS["a"]


@EVERY
def test_optax_recipe_for_the_sharding_of_a_state(name):
    """``optax.tree.map_params`` over the abstract state, as `out_shardings`."""
    mesh = jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)
    )
    tx, params = method(name), spread(weights(), mesh)
    shardings = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        jax.tree.map(lambda w: w.sharding, params),
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert facts(opt_state) == facts(tx.init(weights()))
    momentum = optax.tree.get(opt_state, "trace")
    assert momentum["a"].sharding.spec == SPECS["a"]


# --- formats -------------------------------------------------------------------------


def through_flax(opt_state, like):
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(opt_state))


def through_equinox(opt_state, like):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, opt_state)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, like)


@pytest.mark.parametrize("through", [through_flax, through_equinox])
@EVERY
def test_every_state_survives_any_format(name, through):
    _, opt_state = alone(name)
    restored = through(opt_state, method(name).init(weights()))
    assert facts(restored) == facts(opt_state)
    jax.tree.map(np.testing.assert_array_equal, restored, opt_state)


# --- slicing -------------------------------------------------------------------------


# They know the traced shapes: after slicing, trace again and make a new link.
TRACED = ("group_lasso", "centripetal", "proximal")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in TRACED])
def test_every_state_is_sliced(name):
    """To what ``init`` makes of the smaller weights, and it trains on."""
    tx, (params, opt_state) = method(name), alone(name)
    cut = jax.tree.map(np.asarray, units(params))
    small, small_state = slice_params(params, cut), slice_opt_state(tx, opt_state, cut)
    assert facts(small_state) == facts(tx.init(small))
    assert facts(jax.eval_shape(step_of(name), small, small_state)[0]) == facts(small)
