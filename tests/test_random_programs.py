"""The contract on random programs, with groups that are cut in part or emptied.

``JAXPRUNE_PROGRAMS=1000 pytest tests/test_random_programs.py`` tries more of them.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quick_jit, total
from random_programs import random_program
from zoo import weights

import jaxprune

PROGRAMS = int(os.environ.get("JAXPRUNE_PROGRAMS", "14"))


@pytest.fixture(autouse=True)
def float64():
    """Rounding is far below what any fault would do."""
    with jax.enable_x64(True):
        yield


def cuts(groups, seed):
    """Decisions for the exact groups: some units, and all units of some groups."""
    rng = np.random.default_rng(seed)
    exact = [name for name, group in groups.items() if group.exact]
    for share in (0.0, 0.4, 1.0):
        emptied = {name for name in exact if rng.random() < share}
        yield {
            name: rng.random(groups[name].size) < (0.0 if name in emptied else 0.6)
            for name in exact
        }
    for name in exact[int(rng.integers(3)) :: 3]:
        yield {name: np.zeros(groups[name].size, bool)}


def assert_equal(got, expected, text):
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected), text
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9 * scale, err_msg=text)


@pytest.mark.parametrize("writers", [(), "*"], ids=["tied", "writers"])
@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_narrowed_equals_masked(seed, writers):
    program = random_program(seed)
    apply_fn, params, x = program.apply_fn, program.params, program.x
    groups = jaxprune.trace(apply_fn, params, x, writers=writers)
    masked = quick_jit(apply_fn)
    for keep in cuts(groups, seed):
        masks = jaxprune.expand_masks(groups, keep)
        small = jaxprune.slice_params(params, masks)
        text = "\n".join([*program.text, str(keep)])
        got = quick_jit(jaxprune.narrow(apply_fn, masks))(small, x)
        assert_equal(got, masked(jaxprune.apply_masks(params, masks), x), text)


def is_finite(tree):
    """Has a derivative: the root of a variance has none where it is 0.

    So it is on rows of a value that the masks leave 0 throughout, which the masked
    program still computes: its slope there is inf * 0 = nan, and the sums behind it are
    nan. The narrowed program has no such rows, and its derivative is finite.
    """
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("seed", range(0, PROGRAMS, 7))
def test_derivatives_are_equal_too(seed):
    program = random_program(seed)
    apply_fn, params, x = program.apply_fn, program.params, program.x
    groups = jaxprune.trace(apply_fn, params, x)

    def masked(params, masks):
        return total(apply_fn(jaxprune.apply_masks(params, masks), x))

    slope = quick_jit(jax.grad(masked))
    for keep in list(cuts(groups, seed))[:2]:
        masks = jaxprune.expand_masks(groups, keep)
        small = jaxprune.slice_params(params, masks)
        narrowed = jaxprune.narrow(apply_fn, masks)
        got = quick_jit(jax.grad(lambda p, fn=narrowed: total(fn(p, x))))(small)
        expected = jaxprune.slice_params(slope(params, masks), masks)
        if is_finite(expected):
            assert_equal(got, expected, "\n".join([*program.text, str(keep)]))


# --- a group that is emptied by hand -------------------------------------------------


def heads(reduction):
    """Two groups on one axis of `w`; a bias stands where both of them are gone."""

    def fn(p, x):
        s = (x @ p["w"]).reshape(-1, 3, 4) + p["pe"][None]
        return reduction(jnp.tanh(s @ p["v"] + p["b"][None, None]), 1) @ p["o"]

    return fn


HEADS = {"w": (4, 12), "pe": (3, 4), "v": (4, 5), "b": (5,), "o": (5, 2)}


@pytest.mark.parametrize("reduction", [jnp.sum, jnp.max], ids=["sum", "max"])
def test_what_shares_axes_with_an_emptied_group_lives(reduction):
    fn, params, x = heads(reduction), weights(**HEADS), np.ones((2, 4), np.float32)
    groups = jaxprune.trace(fn, params, x)
    assert {n: (g.size, g.exact) for n, g in groups.items()} == {
        "w:1": (3, True),
        "w:1#2": (4, True),
        "v:1": (5, True),
    }
    masks = jaxprune.expand_masks(groups, {"w:1#2": np.zeros(4, bool)})
    small = jaxprune.slice_params(params, masks)
    assert small["pe"].shape == (3, 0)
    # Of three rows nothing but the bias is left.
    rows = np.tanh(params["b"]) * (3 if reduction is jnp.sum else 1)
    expected = np.tile(rows @ params["o"], (2, 1))
    narrowed = jaxprune.narrow(fn, masks)
    np.testing.assert_allclose(narrowed(small, x), expected, rtol=1e-6)
    mapped = jax.vmap(narrowed, (None, 0))(small, x[:, None])
    np.testing.assert_allclose(mapped[:, 0], expected, rtol=1e-6)
    slope = jax.grad(lambda p: narrowed(p, x).sum())(small)
    through = (1 - np.tanh(params["b"]) ** 2) * params["o"].sum(1)
    factor = 6 if reduction is jnp.sum else 2
    np.testing.assert_allclose(slope["b"], factor * through, rtol=1e-6)


def test_an_axis_that_two_groups_could_empty():
    """Nothing but the axis they share says which was cut; the result is the same."""

    def fn(p, x):
        s = jnp.tanh(x @ p["w"]).reshape(-1, 3, 4)
        return jnp.exp((s @ p["v"]).sum(-1)).sum(-1, keepdims=True)

    params, x = weights(w=(4, 12), v=(4, 5)), np.ones((2, 4), np.float32)
    groups = jaxprune.trace(fn, params, x)
    assert {n: (g.size, g.exact) for n, g in groups.items()} == {
        "w:1": (3, True),
        "w:1#2": (4, True),
        "v:1": (5, True),
    }
    masks = {"w": np.zeros((1, 12), bool), "v": np.zeros((1, 5), bool)}
    small = jaxprune.slice_params(params, masks)
    np.testing.assert_allclose(jaxprune.narrow(fn, masks)(small, x), 3.0)


def test_everything_can_be_emptied():
    fn, params, x = heads(jnp.sum), weights(**HEADS), np.ones((2, 4), np.float32)
    groups = jaxprune.trace(fn, params, x)
    every = {n: np.zeros(g.size, bool) for n, g in groups.items() if g.exact}
    masks = jaxprune.expand_masks(groups, every)
    small = jaxprune.slice_params(params, masks)
    assert small["v"].shape == (0, 0)
    np.testing.assert_array_equal(
        jaxprune.narrow(fn, masks)(small, x), np.zeros((2, 2))
    )
