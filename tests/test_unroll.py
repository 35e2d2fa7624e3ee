"""Layers that keep different numbers of units: their scan is written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import check_types, difference, quick_jit, total
from random_programs import random_program
from test_layers import PARAMS, SEQUENCE, X, in_calls, net, normed, residual
from test_per_layer import linen, stacked, stacked_nnx, with_outputs
from test_random_programs import assert_equal

import jaxprune
from jaxprune.costing import equations

COUNTS = (3, 1, 6, 0, 4)


def uneven(group, counts, seed=0):
    """A decision for every layer, which keeps so many units of every block."""
    rng, blocks = np.random.default_rng(seed), group.blocks // group.layers
    size = group.size // group.blocks
    every = np.repeat(np.resize(counts, group.layers), blocks)
    return np.concatenate([rng.permutation(size) < count for count in every])


def both(fn, params, masks, *args):
    """What the written out and the masked function give, and the sliced parameters."""
    small = jaxprune.slice_params(params, masks, unroll=True)
    narrowed = jaxprune.narrow(fn, masks, unroll=True)
    got = quick_jit(narrowed)(small, *args)
    return got, quick_jit(fn)(jaxprune.apply_masks(params, masks), *args), small


@pytest.mark.parametrize("turn", [residual, normed, in_calls, with_outputs])
@pytest.mark.parametrize("reverse", [False, True])
def test_layers_keep_as_many_units_as_they_are_told(turn, reverse):
    fn = net(turn) if turn is normed else stacked(turn, reverse=reverse)
    groups = jaxprune.trace(fn, PARAMS, X, per_layer="*")
    masks = jaxprune.expand_masks(
        groups, {"up:2": uneven(groups["up:2"], COUNTS)}, unroll=True
    )
    got, expected, small = both(fn, PARAMS, masks, X)
    assert difference(got, expected) < (4e-3 if turn is normed else 1e-5)
    assert [layer.shape for layer in small["up"]] == [(4, n) for n in COUNTS]
    put_back = jaxprune.unslice_params(small, masks, unroll=True)
    masked = jaxprune.apply_masks(PARAMS, masks)
    jax.tree.map(np.testing.assert_array_equal, put_back, masked)


def test_derivatives_states_and_what_it_costs():
    fn = net(residual)
    groups = jaxprune.trace(fn, PARAMS, X, per_layer="*", layers=True)
    keep = {
        "up:2": uneven(groups["up:2"], COUNTS),
        "up:0": np.array([1, 1, 1, 1, 0], bool),
    }
    masks = jaxprune.expand_masks(groups, keep, unroll=True)
    got, expected, small = both(fn, PARAMS, masks, X)
    assert difference(got, expected) < 1e-5
    assert [layer.shape for layer in small["bias"]] == [(3,), (1,), (6,), (0,)]
    narrowed = jaxprune.narrow(fn, masks, unroll=True)
    check_types(narrowed, small, X)
    slopes = [
        quick_jit(jax.grad(lambda p, f=f: total(f(p, X))))(p)
        for f, p in ((narrowed, small), (fn, jaxprune.apply_masks(PARAMS, masks)))
    ]
    sliced = jaxprune.slice_params(slopes[1], masks, unroll=True)
    assert difference(slopes[0], sliced) < 1e-4
    # Copies of such masks say the same.
    copies = jax.tree.map(np.array, masks)
    again = jaxprune.slice_params(PARAMS, copies, unroll=True)
    assert jax.tree.map(jnp.shape, again["up"][:3]) == ((4, 3), (4, 1), (4, 6))
    tx = optax.sgd(0.1, momentum=0.9)
    state = tx.update(slopes[1], tx.init(PARAMS), PARAMS)[1]
    momentum = jaxprune.slice_opt_state(tx, state, masks, unroll=True)[0].trace
    jax.tree.map(np.testing.assert_array_equal, momentum, sliced)
    shapes = jax.eval_shape(lambda p: p, PARAMS)
    abstract = jaxprune.slice_params(shapes, masks, unroll=True)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, small)
    # The body stands in the program once for every layer.
    assert equations(fn, PARAMS, X) < 20
    assert equations(narrowed, small, X) > 3 * (equations(fn, PARAMS, X) - 5)


def test_refused_unless_the_scan_may_be_written_out():
    fn = net(residual)
    groups = jaxprune.trace(fn, PARAMS, X, per_layer="*")
    keep = {"up:2": uneven(groups["up:2"], COUNTS)}
    with pytest.raises(ValueError, match="3 units in layer 0 but 1 in layer 1.*unroll"):
        jaxprune.expand_masks(groups, keep)
    masks = jaxprune.expand_masks(groups, keep, unroll=True)
    with pytest.raises(ValueError, match="layers keep 0, 1, 3, 4, 6 positions.*unroll"):
        jaxprune.slice_params(PARAMS, masks)
    with pytest.raises(ValueError, match=r"no one scan.*its layers keep 3, 1, 6, 4"):
        jaxprune.narrow(fn, masks)(PARAMS, X)


@pytest.mark.parametrize("build", [linen, stacked_nnx])
def test_stacked_decoders(build):
    """Heads and hidden units, in every layer another number of each."""
    fn, shapes = build(3)
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(lambda s: rng.normal(size=s.shape) * 0.3, shapes)
    params = jax.tree.map(np.float32, drawn)
    groups = jaxprune.trace(fn, params, SEQUENCE, per_layer="*")
    sizes = {g.size: g for g in groups.values() if g.exact and g.layers == 3}
    heads, hidden = sizes[3 * 4], sizes[3 * 12]
    keep = {
        heads.name: uneven(heads, (1, 4, 2)),
        hidden.name: uneven(hidden, (5, 1, 12)),
    }
    masks = jaxprune.expand_masks(groups, keep, unroll=True)
    got, expected, small = both(fn, params, masks, SEQUENCE)
    assert difference(got, expected) < 2e-5
    kept = sum(np.size(x) for x in jax.tree.leaves(small))
    entries = sum(
        np.count_nonzero(np.broadcast_to(mask, leaf.shape))
        for mask, leaf in zip(
            jax.tree.leaves(masks), jax.tree.leaves(params), strict=True
        )
    )
    assert kept == entries


@pytest.mark.parametrize("seed", range(3))
def test_layers_that_are_random_programs(seed):
    program, rng = random_program(seed), np.random.default_rng(seed)
    with jax.enable_x64(True):
        params = {n: rng.normal(size=(3, *w.shape)) for n, w in program.params.items()}

        def fn(layers, x):
            return jax.lax.scan(lambda c, p: (c, program.apply_fn(p, x)), 0.0, layers)

        groups = jaxprune.trace(fn, params, program.x, per_layer="*")
        keep = {
            name: uneven(group, rng.integers(0, 5, group.layers), seed)
            for name, group in groups.items()
            if group.exact and group.blocks == group.layers
        }
        masks = jaxprune.expand_masks(groups, keep, unroll=True)
        got, expected, _ = both(fn, params, masks, program.x)
        assert_equal(got, expected, "\n".join([*program.text, str(keep)]))
