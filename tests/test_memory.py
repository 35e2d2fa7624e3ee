"""What is remembered of a program is forgotten with its function."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import weights

import jaxprune
from jaxprune.program import _jaxprs

X = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
PARAMS = weights(w1=(4, 6), w2=(6, 6))


class Net:
    """A model whose method closes over an array."""

    def __init__(self, table):
        self.table = table

    def apply(self, params, x, mode="plain"):
        return jnp.tanh(x @ params["w1"]) @ params["w2"] @ self.table


def function(table):
    def fn(params, x, mode="plain"):
        return jnp.tanh(x @ params["w1"]) @ params["w2"] @ table

    return fn


class Static:
    """Something static among the arguments."""


def use(fn, mode):
    """Everything that traces: groups, narrow, its gradient, costs."""
    groups = jaxprune.trace(fn, PARAMS, X, mode, roles=True)
    masks = jaxprune.expand_masks(groups, {"w1:1": np.arange(6) < 3})
    small, narrowed = jaxprune.slice_params(PARAMS, masks), jaxprune.narrow(fn, masks)
    narrowed(small, X, mode)
    jax.jit(narrowed, static_argnums=2)(small, X, mode)
    jax.grad(lambda p: narrowed(p, X, mode).sum())(small)
    jaxprune.costs(fn, PARAMS, X, mode)


@pytest.mark.parametrize("make", [function, lambda table: Net(table).apply])
def test_nothing_outlives_the_function(make, quick_gc):
    table = jnp.eye(6)
    fn = make(table)
    refs = [weakref.ref(table), weakref.ref(getattr(fn, "__self__", fn))]
    before = set(_jaxprs._JITTED)
    use(fn, "plain")
    assert set(_jaxprs._JITTED) > before
    del fn, table
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert set(_jaxprs._JITTED) == before


def test_of_one_function_not_everything_is_remembered(quick_gc):
    net, refs = Net(jnp.eye(6)), []
    for _ in range(12):
        static = Static()
        refs.append(weakref.ref(static))
        jaxprune.trace(net.apply, PARAMS, X, static)
    del static
    gc.collect()
    assert sum(ref() is not None for ref in refs) <= _jaxprs._MOST


def test_a_structure_that_holds_a_function_is_not_remembered(quick_gc):
    class Box:
        def __init__(self, array, fn):
            self.array, self.fn = array, fn

    jax.tree_util.register_pytree_with_keys(
        Box,
        lambda box: (((jax.tree_util.GetAttrKey("array"), box.array),), box.fn),
        lambda fn, children: Box(*children, fn),
    )
    fn = function(jnp.eye(6))
    ref = weakref.ref(fn)
    masks = {"box": Box(np.array([True, False]), fn)}
    small = jaxprune.slice_params({"box": Box(np.ones(2), fn)}, masks)
    assert small["box"].array.shape == (1,)
    del masks, small, fn
    gc.collect()
    assert ref() is None


def test_a_program_is_traced_once():
    seen = []

    def fn(params, x):
        seen.append(x.shape)
        return jnp.tanh(x @ params["w1"]) @ params["w2"]

    groups = jaxprune.trace(fn, PARAMS, X)
    masks = jaxprune.expand_masks(groups, {"w1:1": np.arange(6) < 3})
    narrowed = jaxprune.narrow(fn, masks)
    narrowed(jaxprune.slice_params(PARAMS, masks), X)
    jaxprune.costs(fn, PARAMS, X)
    assert seen == [(3, 4)]


def test_a_function_that_cannot_be_referred_to_weakly():
    class Slots:
        __slots__ = ()

        def __call__(self, params, x):
            return jnp.tanh(x @ params["w1"]) @ params["w2"]

    [group] = jaxprune.trace(Slots(), PARAMS, X).values()
    assert group.size == 6
