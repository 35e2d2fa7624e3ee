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
