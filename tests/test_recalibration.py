"""BatchNorm statistics of batches, against numpy's means and variances."""

import gc
import importlib
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import recalibrate

pytestmark = pytest.mark.once

recalibration = importlib.import_module("jaxprune.statistics._recalibration")


class Net(nn.Module):
    """A layer, BatchNorm, ReLU and a layer."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
        return nn.Dense(2)(nn.relu(x))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return [rng.normal(1, 2, (8, 3)).astype(np.float32) for _ in range(3)]


def start(net, x):
    return jax.device_get(net.init(jax.random.key(0), x))


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_statistics_are_the_plain_average_over_batches(inputs, momentum):
    net = Net(momentum)
    variables = start(net, inputs[0])
    dense = variables["params"]["Dense_0"]
    hidden = [x @ dense["kernel"] + dense["bias"] for x in inputs]
    found = recalibrate(net.apply, variables, inputs)
    stats = found["batch_stats"]["BatchNorm_0"]
    for name, numpys in (("mean", np.mean), ("var", np.var)):
        expected = np.mean([numpys(h, axis=0) for h in hidden], axis=0)
        np.testing.assert_allclose(stats[name], expected, rtol=2e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found["params"], variables["params"])


def test_a_narrowed_net_recalibrates_like_the_masked_one(inputs):
    net = Net()
    variables = start(net, inputs[0])
    groups = jaxprune.trace(net.apply, variables, inputs[0])
    keep = {name: np.arange(g.size) % 2 == 0 for name, g in groups.items()}
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(variables, masks)
    found = recalibrate(jaxprune.narrow(net.apply, masks), small, inputs)
    masked = recalibrate(net.apply, jaxprune.apply_masks(variables, masks), inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        jaxprune.slice_params(masked, masks),
    )


def test_what_cannot_be_recalibrated_is_refused(inputs):
    net = Net()
    variables = start(net, inputs[0])
    with pytest.raises(ValueError, match="no 'batch_stats', only"):
        recalibrate(net.apply, {"params": variables["params"]}, inputs)
    with pytest.raises(ValueError, match="batches are empty"):
        recalibrate(net.apply, variables, [])
    with pytest.raises(ValueError, match=r"does not update batch_stats/BatchNorm_0/"):
        recalibrate(net.apply, variables, [jnp.ones((2, 3))], train=False)


class Choosy(nn.Module):
    """Its keyword arguments are lists, dicts with arrays among them, and sets."""

    @nn.compact
    def __call__(self, x, train=False, axes=(), extra=None):
        if extra is not None and extra["use"]:
            x = x + extra["shift"]
        x = x.sum(axes, keepdims=True) + x if axes else x
        return nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)


def test_one_program_for_one_function(inputs):
    """However often, whatever the arrays, and with what cannot be hashed."""
    net, traces = Choosy(), []
    variables = start(net, inputs[0])

    def apply_fn(*args, **kwargs):
        traces.append(1)
        return net.apply(*args, **kwargs)

    for shift in (1.0, 2.0):
        row = jnp.full((1, 3), shift)
        extra = {"use": True, "shift": row}
        found = recalibrate(
            apply_fn, variables, inputs, train=True, axes=[1], extra=extra
        )
        moved = [x + shift + (x + shift).sum(1, keepdims=True) for x in inputs]
        mean = np.mean([x.mean(0) for x in moved], 0)
        stats = found["batch_stats"]["BatchNorm_0"]
        np.testing.assert_allclose(stats["mean"], mean, rtol=1e-4)
    assert len(traces) == 1
    recalibrate(apply_fn, variables, inputs, train=True, axes=[0, 1])
    assert len(traces) == 2  # another program
    for _ in range(2):
        recalibrate(net.apply, variables, inputs)  # a new bound method every time
    before = len(recalibration._PROGRAMS)
    recalibrate(net.apply, variables, inputs)
    assert len(recalibration._PROGRAMS) == before
    with pytest.raises(
        TypeError, match="argument extra/use is a set, which is neither"
    ):
        recalibrate(net.apply, variables, inputs, extra={"use": {1}, "shift": 0.0})


def test_a_narrowed_function_takes_its_program_along(inputs):
    net = Net()
    variables = start(net, inputs[0])
    groups = jaxprune.trace(net.apply, variables, inputs[0])
    keep = {name: np.arange(g.size) % 2 == 0 for name, g in groups.items()}
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(variables, masks)
    narrowed = jaxprune.narrow(net.apply, masks)
    before = len(recalibration._PROGRAMS)
    recalibrate(narrowed, small, inputs)
    assert len(recalibration._PROGRAMS) == before + 1
    gone = weakref.ref(narrowed)
    del narrowed
    gc.collect()
    assert gone() is None
    assert len(recalibration._PROGRAMS) == before


# --- what is a running average, and what is not ---------------------------------------


class Mixed(nn.Module):
    """BatchNorms, one of them frozen, and a layer that counts."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=True, name="frozen")(x)
        steps = self.variable("batch_stats", "steps", lambda: jnp.zeros((), jnp.int32))
        total = self.variable("batch_stats", "total", lambda: jnp.zeros(()))
        if train:
            steps.value += 1
            total.value += 1.0
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.99)(x)


class Spectral(nn.Module):
    """SpectralNorm keeps sigma and u in batch_stats; both belong to the weights."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


def test_frozen_layers_and_counters_stay_as_they_are(inputs):
    net = Mixed()
    variables = jax.device_get(start(net, inputs[0]))
    stats = variables["batch_stats"]
    stats["frozen"] = {"mean": np.full(3, 0.5, np.float32), "var": np.full(3, 4.0)}
    stats["frozen"]["var"] = stats["frozen"]["var"].astype(np.float32)
    found = recalibrate(net.apply, variables, inputs)["batch_stats"]
    for name in ("frozen", "steps", "total"):
        jax.tree.map(np.testing.assert_array_equal, found[name], stats[name])
    seen = [(x - 0.5) / np.sqrt(4 + 1e-5) for x in inputs]
    mean = np.mean([x.mean(0) for x in seen], 0)
    np.testing.assert_allclose(found["bn"]["mean"], mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"does not update batch_stats/frozen/mean"):
        recalibrate(net.apply, variables, inputs, only="frozen/*")


def test_what_is_no_running_average_is_refused_by_path_or_left_out(inputs):
    net = Spectral()
    variables = start(net, inputs[0])
    match = r"SpectralNorm_0/\S+/u.*is not a running average.*only="
    with pytest.raises(ValueError, match=match):
        recalibrate(net.apply, variables, inputs)
    found = recalibrate(net.apply, variables, inputs, only="BatchNorm_0/*")
    before, after = variables["batch_stats"], found["batch_stats"]
    jax.tree.map(
        np.testing.assert_array_equal, after["SpectralNorm_0"], before["SpectralNorm_0"]
    )
    changed = after["BatchNorm_0"]["mean"] != before["BatchNorm_0"]["mean"]
    assert changed.any()
    with pytest.raises(ValueError, match="matches none of the 4 leaves of batch_stats"):
        recalibrate(net.apply, variables, inputs, only="norm/*")


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (2, 3, 8, 5)])
def test_pooled_moments_are_those_of_all_examples(sizes):
    x = np.random.default_rng(0).normal(3, 2, (sum(sizes), 3)).astype(np.float32)
    batches = np.split(x, np.cumsum(sizes)[:-1])
    net = nn.BatchNorm(momentum=0.99)
    variables = net.init(jax.random.key(0), x, True)
    how = {"use_running_average": False}
    found = recalibrate(net.apply, variables, batches, moments="pooled", **how)
    stats = found["batch_stats"]
    np.testing.assert_allclose(stats["mean"], x.mean(0), rtol=1e-3)
    np.testing.assert_allclose(stats["var"], x.var(0), rtol=1e-3)
    average = recalibrate(net.apply, variables, batches, **how)["batch_stats"]["var"]
    assert (average < stats["var"]).all()
    with pytest.raises(ValueError, match="moments must be one of.*got 'exact'"):
        recalibrate(net.apply, variables, batches, moments="exact", **how)


def test_a_lone_variance_cannot_be_pooled(inputs):
    class Lone(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            var = self.variable("batch_stats", "var", lambda: jnp.ones(3))
            if train:
                var.value = 0.9 * var.value + 0.1 * x.var(0)
            return x / jnp.sqrt(var.value)[None]

    net = Lone()
    variables = start(net, inputs[0])
    assert recalibrate(net.apply, variables, inputs)["batch_stats"]["var"].shape == (3,)
    with pytest.raises(ValueError, match="var has no running mean called mean beside"):
        recalibrate(net.apply, variables, inputs, moments="pooled")
