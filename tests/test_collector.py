"""The collector is off while a program is traced, and afterwards as it was."""

import gc
import inspect

import jax
import jax.numpy as jnp
import pytest

import jaxprune
from jaxprune.program._collector import collector_paused


@pytest.fixture(params=[True, False])
def enabled(request):
    """The collector, on and off."""
    before = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if before else gc.disable)()


def test_the_collector_is_left_as_it_was(enabled):
    with collector_paused(), collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled() == enabled


def test_an_error_leaves_the_collector_as_it_was(enabled):
    with pytest.raises(KeyError), collector_paused():
        raise KeyError
    assert gc.isenabled() == enabled


def test_trace_and_narrow_leave_the_collector_as_it_was(enabled):
    seen = []

    def apply(params, x):
        seen.append(gc.isenabled())
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    params, x = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}, jnp.ones((1, 3))
    groups = jaxprune.trace(apply, params, x)
    masks = jaxprune.expand_masks(groups, {"up:1": jnp.arange(4) < 2})
    small = jaxprune.slice_params(params, masks)
    jaxprune.narrow(apply, masks)(small, x)
    assert seen == [False]  # narrow replays what trace has traced
    assert gc.isenabled() == enabled


def test_trace_keeps_its_signature():
    assert list(inspect.signature(jaxprune.trace).parameters)[:2] == [
        "apply_fn",
        "variables",
    ]
