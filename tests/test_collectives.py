"""Collectives over named axes: bound by vmap, or by a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_same, quick_jit, total
from jax import lax
from jax.sharding import PartitionSpec as P
from zoo import weights

import jaxprune

BATCH = 4
X = np.random.default_rng(5).normal(size=(BATCH, 3)).astype(np.float32)
PARAMS = weights(w1=(3, 6), w2=(6, 2))
KEPT = np.arange(6) % 3 > 0

# What an example gets from all of its batch; every one needs all of them.
COLLECTIVES = {
    "psum": lambda h: lax.psum(h, "batch"),
    "pmean": lambda h: lax.pmean(h, "batch"),
    "pmax": lambda h: lax.pmax(h, "batch"),
    "pmin": lambda h: lax.pmin(h, "batch"),
    "psum of two": lambda h: sum(lax.psum((h, jnp.sin(h)), "batch")),
    "all_gather": lambda h: jnp.sin(lax.all_gather(h, "batch")).sum(0),
    "all_gather tiled": lambda h: lax.all_gather(h, "batch", tiled=True)[:6],
    "all_to_all": lambda h: lax.all_to_all(
        h[None] * jnp.arange(4.0)[:, None], "batch", 0, 0
    ).sum(0),
    "psum_scatter": lambda h: lax.psum_scatter(
        h[None] * jnp.arange(4.0)[:, None], "batch"
    ),
    "ppermute": lambda h: lax.ppermute(
        h, "batch", [(k, (k + 1) % 4) for k in range(4)]
    ),
    "axis_index": lambda h: h * lax.axis_index("batch").astype(h.dtype),
}
DIFFERENTIABLE = set(COLLECTIVES) - {"pmax", "pmin"}


def net(collective, params, x):
    """One example, whose hidden units see those of the others."""
    hidden = x @ params["w1"]
    return jnp.tanh(hidden - 0.5 * collective(hidden)) @ params["w2"]


def cut(fn):
    groups = jaxprune.trace(fn, PARAMS, X)
    assert [(n, g.size, g.exact) for n, g in groups.items()] == [("w1:1", 6, True)]
    masks = jaxprune.expand_masks(groups, {"w1:1": KEPT})
    return masks, jaxprune.slice_params(PARAMS, masks)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_that_vmap_binds(name):
    one = functools.partial(net, COLLECTIVES[name])
    fn = jax.vmap(one, (None, 0), axis_name="batch")
    masks, small = cut(fn)
    narrowed = jaxprune.narrow(fn, masks)
    expected = quick_jit(fn)(jaxprune.apply_masks(PARAMS, masks), X)
    assert_same(quick_jit(narrowed)(small, X), expected)
    if name not in DIFFERENTIABLE:
        return

    def masked(params):
        return total(fn(jaxprune.apply_masks(params, masks), X))

    slope = quick_jit(jax.grad(masked))(PARAMS)
    got = quick_jit(jax.grad(lambda p: total(narrowed(p, X))))(small)
    assert_same(got, jaxprune.slice_params(slope, masks))


@pytest.mark.parametrize(
    ("collective", "exact"), [(lax.psum, True), (lax.pmax, False), (lax.pmin, False)]
)
def test_a_collective_over_the_units(collective, exact):
    """The dimension that vmap binds is the one that is cut."""

    def fn(params, x):
        over = jax.vmap(lambda h: collective(h, "unit"), 1, 1, axis_name="unit")
        return over(x @ params["w1"])[:, :1]

    def unit(params, x):
        def one(column):
            return collective(x @ column, "unit")

        return jax.vmap(one, 1, None, axis_name="unit")(params["w1"])

    params = {"w1": PARAMS["w1"]}
    [group] = jaxprune.trace(unit, params, X).values()
    assert (group.size, group.exact) == (6, exact)
    if not exact:
        assert "includes masked positions" in group.why
        return
    masks = {"w1": KEPT[None]}
    small = jaxprune.slice_params(params, masks)
    expected = X @ np.where(KEPT, params["w1"], 0.0).sum(1)
    assert_same(jaxprune.narrow(unit, masks)(small, X), expected)


@pytest.mark.parametrize(
    "name", ["psum", "pmean", "pmax", "all_gather", "all_gather tiled", "ppermute"]
)
def test_a_collective_that_a_mesh_binds(name):
    one = functools.partial(net, COLLECTIVES[name])
    masks, small = cut(jax.vmap(one, (None, 0), axis_name="batch"))
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

    def mapped(fn):
        def local(params, x):
            return fn(params, x[0])[None]

        specs = {"mesh": mesh, "in_specs": (P(), P("batch")), "out_specs": P("batch")}
        return jax.jit(jax.shard_map(local, **specs, check_vma=False))

    expected = mapped(one)(jaxprune.apply_masks(PARAMS, masks), X)
    assert_same(mapped(jaxprune.narrow(one, masks))(small, X), expected)
