"""What `narrow` writes down: the user's own equations, at the sizes that stay."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_same, check_types, halve
from jax.experimental import checkify
from jax.sharding import PartitionSpec
from zoo import MODELS, weights

import jaxprune
from jaxprune.coupling._registry import RULES
from jaxprune.narrowing import _build as build_module
from jaxprune.program._jaxprs import opened, source_line

X = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
PARAMS = weights(w1=(4, 8), w2=(8, 3))


def cut(fn, params, *args):
    """The masked and the narrowed function with their variables, at half of the units."""
    groups = jaxprune.trace(fn, params, *args)
    masks = jaxprune.expand_masks(groups, halve(groups, 0))
    masked = jaxprune.apply_masks(params, masks)
    return masked, jaxprune.slice_params(params, masks), jaxprune.narrow(fn, masks)


def equations(fn, *args):
    """The equations inside the one call that a narrowed function makes."""
    [call] = opened(jax.make_jaxpr(fn)(*args))[0].eqns
    assert call.primitive.name in ("jit", "pjit")
    return call.params["name"], opened(call.params["jaxpr"])[0].eqns


def scoped(p, x):
    with jax.named_scope("hidden"):
        h = jnp.tanh(x @ p["w1"])
    return h @ p["w2"]


def test_equations_keep_their_scope_and_their_source_line():
    _, small, narrowed = cut(scoped, PARAMS, X)
    name, eqns = equations(narrowed, small, X)
    assert name == "scoped"
    assert [e.primitive.name for e in eqns] == ["dot_general", "tanh", "dot_general"]
    assert [str(e.source_info.name_stack) for e in eqns] == ["hidden", "hidden", ""]
    assert all("test_build.py" in source_line(eqn) for eqn in eqns)
    assert [e.outvars[0].aval.shape for e in eqns] == [(3, 4), (3, 4), (3, 3)]


@pytest.mark.parametrize("name", ["resnet_projection", "densenet"])
def test_an_ordinary_model_is_copied_without_tracing(name, monkeypatch):
    def refuse(*_):
        raise AssertionError("traced")

    monkeypatch.setattr(build_module._Emitter, "traced", refuse)
    built = MODELS[name].build()
    args = built.inputs(2, 0)
    _, small, narrowed = cut(built.apply_fn, built.variables, *args)
    jax.make_jaxpr(narrowed)(small, *args)


def test_with_jit_disabled_it_runs_one_equation_after_another():
    masked, small, narrowed = cut(scoped, PARAMS, X)
    with jax.disable_jit():
        names = [e.primitive.name for e in jax.make_jaxpr(narrowed)(small, X).eqns]
        assert_same(narrowed(small, X), scoped(masked, X))
    assert names == ["dot_general", "tanh", "dot_general"]


def test_numpy_arrays_are_given_the_types_of_jax():
    masked, small, narrowed = cut(scoped, PARAMS, X)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), small)
    assert_same(narrowed(wide, X.astype(np.float64)), scoped(masked, X))


def test_results_of_a_call_that_nothing_reads():
    @jax.jit
    def both(x, w):
        return jnp.sort(x @ w), x @ w

    def fn(p, x):
        return both(x, p["w1"])[1] @ p["w2"]

    masked, small, narrowed = cut(fn, PARAMS, X)
    assert_same(narrowed(small, X), fn(masked, X))


def test_a_rule_whose_halves_do_not_agree_is_told(monkeypatch):
    wrong = dataclasses.replace(RULES["tanh"], narrow=lambda kept, step, x: x[:, :1])
    monkeypatch.setitem(RULES, "tanh", wrong)
    _, small, narrowed = cut(scoped, PARAMS, X)
    text = re.escape("the rule of tanh narrows its results to [(3, 1)], but their ")
    with pytest.raises(ValueError, match=text + "labels keep " + re.escape("[(3, 4)]")):
        narrowed(small, X)


# --- where a narrowed function may stand ---------------------------------------------


def rescaled(p, x):
    return jax.nn.silu(jax.nn.relu(x @ p["w1"])) @ p["w2"]


def _under(context):
    def run(fn, p, x):
        with context(True):
            return fn(p, x)

    return run


def _on_explicit_mesh(fn, p, x):
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    with jax.set_mesh(jax.make_mesh((2, 2), ("rows", "units"), kinds)):
        p = {
            "w1": jax.device_put(p["w1"], PartitionSpec(None, "units")),
            "w2": jax.device_put(p["w2"], PartitionSpec("units")),
        }
        return np.asarray(fn(p, jax.device_put(x, PartitionSpec("rows"))))


def _of_shards(p, x):
    """`rescaled`, which says how the sum over shards of units is to lie."""
    h = jax.nn.silu(jax.nn.relu(x @ p["w1"]))
    return jnp.einsum("bh,ho->bo", h, p["w2"], out_sharding=PartitionSpec("rows"))


CONTEXTS = {
    "checkpoint": lambda fn, p, x: jax.checkpoint(fn)(p, x),
    "cond": lambda fn, p, x: jax.lax.cond(x[0, 0] < 9, fn, lambda p, x: x[:, :3], p, x),
    "loop": lambda fn, p, x: jax.lax.fori_loop(
        0, 2, lambda _, y: fn(p, x) + 0 * y, jnp.zeros((4, 3))
    ),
    "linearize": lambda fn, p, x: jax.linearize(lambda x: fn(p, x), x)[1](x),
    "hessian": lambda fn, p, x: jax.hessian(lambda x: fn(p, x).sum())(x),
    "checkify": lambda fn, p, x: checkify.checkify(fn, checkify.float_checks)(p, x)[1],
    "debug_nans": _under(jax.debug_nans),
    "checks of JAX itself": _under(jax.enable_checks),
    "another device": lambda fn, p, x: fn(*jax.device_put((p, x), jax.devices()[1])),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_narrowed_function_stands_wherever_a_function_may(name):
    x = np.random.default_rng(2).normal(size=(4, 4)).astype(np.float32)
    masked, small, narrowed = cut(rescaled, PARAMS, x)
    run = CONTEXTS[name]
    assert_same(
        run(narrowed, small, jnp.asarray(x)), run(rescaled, masked, jnp.asarray(x))
    )


def test_on_a_mesh_of_explicit_axes():
    x = np.random.default_rng(2).normal(size=(4, 4)).astype(np.float32)
    groups = jaxprune.trace(rescaled, PARAMS, x)
    masks = jaxprune.expand_masks(groups, halve(groups, 0))
    small = jaxprune.slice_params(PARAMS, masks)
    expected = np.asarray(rescaled(jaxprune.apply_masks(PARAMS, masks), x))
    narrowed = jaxprune.narrow(_of_shards, masks)
    assert_same(_on_explicit_mesh(narrowed, small, x), expected)


# --- custom derivatives ----------------------------------------------------------------

PLACES = np.random.default_rng(0).permutation(8)


@jax.custom_jvp
def moved(x):
    """Moves positions, so its narrowed self needs a table of constants."""
    return jnp.maximum(x, 0)[:, PLACES]


@moved.defjvp
def _moved_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return moved(x), (2 * dx * jnp.tanh(x))[:, PLACES]  # not the true one: told apart


@jax.custom_jvp
def gated(x, gate, n):
    return x * jnp.sin(gate) * n


def _gated_jvp(primals, tangents):
    (x, gate, n), (dx, dgate, _) = primals, tangents
    slopes = [2 * jnp.sin(gate) * n, 3 * x * jnp.cos(gate) * n]
    parts = [
        slope * d
        for slope, d in zip(slopes, (dx, dgate), strict=True)
        if not isinstance(d, jax.custom_derivatives.SymbolicZero)
    ]
    return gated(x, gate, n), sum(parts)


gated.defjvp(_gated_jvp, symbolic_zeros=True)


@jax.custom_jvp
def counted(x, n):
    return x * n.astype(x.dtype)


@counted.defjvp
def _counted_jvp(primals, tangents):
    return counted(*primals), 5 * tangents[0] * primals[1].astype(np.float32)


@jax.custom_vjp
def scaled(x, table):
    return x * table


def _scaled_forward(x, table):
    return scaled(x, table), (x, table)


def _scaled_backward(residuals, slope):
    x, table = residuals
    return 3 * slope * table * jnp.tanh(x), (x * slope).sum(0, keepdims=True)


scaled.defvjp(_scaled_forward, _scaled_backward)


ACTIVATIONS = {
    "moved": lambda h: moved(h),
    "one tangent": lambda h: gated(h, jnp.ones_like(h), jnp.float32(2)),
    "two tangents": lambda h: gated(h, h + 1, jnp.float32(2)),
    "integers": lambda h: counted(h, jnp.int32(3)),
    "data in custom_vjp": lambda h: scaled(h, jnp.arange(8.0)[None] + 1),
    "mapped": lambda h: jax.vmap(jax.nn.silu)(jax.nn.relu(h)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_custom_derivatives_survive_every_transformation(name):
    def fn(p, x):
        return ACTIVATIONS[name](x @ p["w1"]) @ p["w2"]

    def slope(fn):
        return jax.grad(lambda x, p: jnp.sin(fn(p, x)).sum())

    def twice(fn):
        return jax.grad(lambda x, p: slope(fn)(x, p).sum())

    def curve(fn):
        def along(x, p):
            return jax.jvp(lambda x: slope(fn)(x, p), (x,), (jnp.ones_like(x),))

        return along

    masked, small, narrowed = cut(fn, PARAMS, X)
    check_types(slope(narrowed), X, small)
    # JAX refuses a forward derivative through a custom_vjp.
    for transform in (slope, twice) if "vjp" in name else (slope, twice, curve):
        expected = jax.jit(transform(fn))(X, masked)
        assert_same(transform(narrowed)(X, small), expected)
        assert_same(jax.jit(transform(narrowed))(X, small), expected)
        each = jax.vmap(transform(narrowed), in_axes=(0, None))
        assert_same(
            jax.tree.map(lambda a: a[0], jax.jit(each)(X[None], small)), expected
        )
