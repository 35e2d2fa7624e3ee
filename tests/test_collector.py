"""The collector is off while a program is traced, and afterwards as it was."""

import gc
import inspect
import threading

import jax
import jax.numpy as jnp
import pytest

import jaxprune
from jaxprune.program._collector import collector_paused


@pytest.fixture(params=[True, False])
def enabled(request):
    """The collector, on and off."""
    before = gc.isenabled(), gc.get_threshold()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if before[0] else gc.disable)()
    gc.set_threshold(*before[1])


@pytest.fixture
def collections():
    """The automatic collections since the test began."""
    seen = []

    def note(phase, info):
        seen.append(phase)

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def many_objects():
    return [[k] for k in range(50_000)]


def test_nothing_is_collected_within(collections):
    gc.enable()
    with collector_paused(), collector_paused():
        many_objects()
        assert not collections
    many_objects()
    assert collections


def test_the_collector_is_left_as_it_was(enabled):
    before = gc.get_threshold()
    with collector_paused(), collector_paused():
        assert gc.isenabled() == enabled
    assert (gc.isenabled(), gc.get_threshold()) == (enabled, before)


def test_an_error_leaves_the_collector_as_it_was(enabled):
    before = gc.get_threshold()
    with pytest.raises(KeyError), collector_paused():
        raise KeyError
    assert (gc.isenabled(), gc.get_threshold()) == (enabled, before)


def test_what_another_thread_sets_meanwhile_stays(enabled):
    def other():
        (gc.disable if enabled else gc.enable)()

    with collector_paused():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert gc.isenabled() != enabled


def test_a_threshold_that_is_set_meanwhile_stays(enabled):
    with collector_paused():
        gc.set_threshold(0)
    assert gc.get_threshold()[0] == 0


def test_pauses_of_two_threads_end_in_any_order(enabled):
    before = gc.get_threshold()
    first, second = collector_paused(), collector_paused()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before


def test_trace_and_narrow_pause_the_collector(enabled, collections):
    before, seen = gc.get_threshold(), []

    def apply(params, x):
        begun = len(collections)
        many_objects()
        seen.append(len(collections) - begun)
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    params, x = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}, jnp.ones((1, 3))
    groups = jaxprune.trace(apply, params, x)
    masks = jaxprune.expand_masks(groups, {"up:1": jnp.arange(4) < 2})
    small = jaxprune.slice_params(params, masks)
    jaxprune.narrow(apply, masks)(small, jnp.ones((2, 3)))
    assert seen == [0, 0]
    assert (gc.isenabled(), gc.get_threshold()) == (enabled, before)


def test_trace_keeps_its_signature():
    assert list(inspect.signature(jaxprune.trace).parameters)[:2] == [
        "apply_fn",
        "variables",
    ]
