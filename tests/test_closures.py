"""What a function closes over, and derivatives that it defines itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_same, total
from jax import lax
from jax.experimental.ode import odeint
from zoo import weights

import jaxprune

X = np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)
NET = {"w1": (4, 6), "w2": (6, 2)}
KEPT = np.arange(6) % 3 > 0


def cut(fn, params, units=KEPT, x=X):
    """The narrowed function, sliced parameters and the masks, one group cut."""
    groups = jaxprune.trace(fn, params, x)
    assert [(g.size, g.exact) for g in groups.values()] == [(len(units), True)]
    masks = jaxprune.expand_masks(groups, dict.fromkeys(groups, units))
    return jaxprune.narrow(fn, masks), jaxprune.slice_params(params, masks), masks


def summed(fn):
    return lambda params, x: total(fn(params, x))


def check_transformed(fn, params, x=X, units=KEPT):
    """Value and gradient, under jit, vmap, remat and scan."""
    narrowed, small, masks = cut(fn, params, units, x)

    def masked(params, x):
        return fn(jaxprune.apply_masks(params, masks), x)

    def slope(params, x):
        return jaxprune.slice_params(jax.grad(summed(masked))(params, x), masks)

    assert_same(narrowed(small, x), masked(params, x))
    assert_same(jax.jit(narrowed)(small, 2 * x), masked(params, 2 * x))
    expected = slope(params, x)
    assert_same(jax.jit(jax.grad(summed(narrowed)))(small, x), expected)
    assert_same(jax.grad(summed(jax.checkpoint(narrowed)))(small, x), expected)
    stacked = np.stack([x, 2 * x])
    each = jax.vmap(jax.grad(summed(narrowed)), (None, 0))(small, stacked)
    assert_same(each, jax.vmap(slope, (None, 0))(params, stacked))

    def over(fn, params):
        def body(carry, x):
            return carry + total(fn(params, x)), None

        return jax.lax.scan(body, 0.0, stacked)[0]

    got = jax.jit(jax.grad(functools.partial(over, narrowed)))(small)
    whole = jax.grad(functools.partial(over, masked))(params)
    assert_same(got, jaxprune.slice_params(whole, masks))


# --- closed-over scalars, keys and tangents that are no numbers ----------------------

SCALARS = {
    "float32": lambda: jnp.float32(2.0),
    "bfloat16": lambda: jnp.bfloat16(2.0),
    "int32": lambda: jnp.int32(2),
    "bool": lambda: jnp.bool_(True),
    "numpy": lambda: np.float32(2.0),
}


@pytest.mark.parametrize("name", SCALARS)
def test_a_scalar_that_is_closed_over(name):
    scalar = SCALARS[name]()

    def fn(params, x):
        factor = jnp.asarray(scalar).astype(jnp.float32)
        return (jax.nn.relu(x @ params["w1"]) * factor) @ params["w2"]

    params = weights(**NET)
    narrowed, small, masks = cut(fn, params)
    expected = fn(jaxprune.apply_masks(params, masks), X[:2])
    assert_same(jax.jit(narrowed)(small, X[:2]), expected)
    got = jax.jit(lambda p, x: jaxprune.narrow(fn, masks)(p, x))(small, X[:2])
    assert_same(got, expected)


def test_a_scalar_that_is_closed_over_under_transformations():
    scalar = jnp.float32(2.0)

    def fn(params, x):
        return (jax.nn.relu(x @ params["w1"]) * scalar) @ params["w2"]

    check_transformed(fn, weights(**NET))


def test_a_zero_that_is_closed_over_is_known_to_be_zero():
    zero = jnp.float32(0.0)

    def fn(params, x):
        return jnp.maximum(x @ params["w1"], zero).sum(-1)

    cut(fn, weights(w1=(4, 6)))


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_key_that_is_closed_over(shape):
    keys = jax.random.split(jax.random.key(3), shape) if shape else jax.random.key(3)

    def fn(params, x):
        def drop(key):
            kept = jax.random.bernoulli(key, 0.5, (6,))
            return jax.nn.relu(x @ params["w1"]) * kept[None].astype(jnp.float32)

        hidden = jax.vmap(drop)(keys).sum(0) if shape else drop(keys)
        return hidden @ params["w2"]

    check_transformed(fn, weights(**NET))


def test_a_key_among_the_variables():
    def fn(params, x):
        def body(carry, _):
            key, hidden = carry
            key, now = jax.random.split(key)
            noise = jax.random.normal(now, (6,))
            return (key, hidden * (1.0 + noise[None])), None

        start = params["key"], jax.nn.relu(x @ params["w1"])
        (_, hidden), _ = jax.lax.scan(body, start, None, length=2)
        return hidden @ params["w2"]

    params = {**weights(**NET), "key": jax.random.key(1)}
    narrowed, small, masks = cut(fn, params)
    assert small["key"] is params["key"]
    expected = fn(jaxprune.apply_masks(params, masks), X)
    assert_same(narrowed(small, X), expected)
    assert_same(jax.jit(narrowed)(small, X), expected)


def test_tangents_of_integers_are_no_numbers():
    """The gradient within the program goes past an integer and its float0."""

    def fn(params, x):
        hidden = x @ params["w1"]

        def energy(hidden, steps):
            return (jnp.sin(hidden) * steps.astype(jnp.float32)).sum()

        slope, _ = jax.grad(energy, (0, 1), allow_int=True)(hidden, jnp.int32(3))
        return (hidden * slope) @ params["w2"]

    check_transformed(fn, weights(**NET))


# --- custom_vjp: differentiated only when somebody differentiates --------------------

TABLE = np.sin(np.arange(6, dtype=np.float32)) + 2.0


def scaled(*, symbolic, strict, table):
    """``h * k * table`` with a gradient that is told apart from the true one."""

    @jax.custom_vjp
    def op(h, k, n):
        return h * k * jnp.asarray(table)[None] * n.astype(h.dtype), n + 1

    def forward(h, k, n):
        if symbolic:
            assert not strict or (h.perturbed, k.perturbed) == (True, False)
            h, k, n = h.value, k.value, n.value
        return op(h, k, n), (h, k, n)

    def backward(residuals, cotangents):
        (h, k, n), (ct, ct_int) = residuals, cotangents
        if not symbolic:
            assert ct_int.dtype == jax.dtypes.float0
        ct = ct * jnp.asarray(table)[None] * n.astype(h.dtype)
        return 3.0 * ct * k, (2.0 * ct * h).sum(0, keepdims=True), None

    op.defvjp(forward, backward, symbolic_zeros=symbolic)
    return lambda h, k: op(h, k, jnp.int32(2))[0]


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("of_input", [False, True])
def test_a_custom_vjp_that_closes_over_an_array(symbolic, of_input):
    op = scaled(symbolic=symbolic, strict=not of_input, table=jnp.asarray(TABLE))

    def fn(params, x):
        k = x[:1, :1] + jnp.zeros((1, 6)) if of_input else jnp.asarray(TABLE)[None]
        return op(x @ params["w1"], k) @ params["w2"]

    check_transformed(fn, weights(**NET))


def test_a_forward_call_asks_for_no_derivative():
    @jax.custom_vjp
    def op(h, table):
        return h * table[None]

    def forward(h, table):
        raise AssertionError("nobody differentiates")

    op.defvjp(forward, lambda residuals, ct: (ct, None))

    def fn(params, x):
        return op(x @ params["w1"], jnp.asarray(TABLE)) @ params["w2"]

    narrowed, small, masks = cut(fn, params := weights(**NET))
    expected = fn(jaxprune.apply_masks(params, masks), X)
    assert_same(narrowed(small, X), expected)
    assert_same(jax.jit(narrowed)(small, X), expected)
    with pytest.raises(AssertionError, match="nobody differentiates"):
        jax.grad(summed(narrowed))(small, X)


def test_the_gradient_of_what_a_custom_vjp_gets_from_outside():
    """The table is data to the engine, and somebody differentiates with respect to it."""
    op = scaled(symbolic=False, strict=False, table=TABLE)
    params = weights(**NET)

    def loss(table, params, change):
        def fn(params, x):
            return op(x @ params["w1"], table[None]) @ params["w2"]

        return total(change(fn)(params, X))

    _, small, masks = cut(
        lambda params, x: op(x @ params["w1"], jnp.asarray(TABLE)[None]) @ params["w2"],
        params,
    )
    for wrap in (lambda fn: fn, jax.jit):
        got = wrap(
            jax.grad(
                functools.partial(loss, change=lambda fn: jaxprune.narrow(fn, masks))
            )
        )(TABLE, small)
        masked = jaxprune.apply_masks(params, masks)
        expected = jax.grad(functools.partial(loss, change=lambda fn: fn))(
            TABLE, masked
        )
        assert_same(got, expected)
        assert not np.asarray(got)[~KEPT].any()


def test_a_python_number_given_to_a_custom_vjp_under_remat():
    """There JAX carries the number itself from the forward to the backward pass."""
    op = jax.custom_vjp(lambda h, c: c * h)
    op.defvjp(lambda h, c: (c * h, (h, c)), lambda hc, ct: (hc[1] * ct, ct.sum()))

    def fn(params, x):
        return jax.checkpoint(lambda h: op(h, 2.0))(x @ params["w1"]) @ params["w2"]

    narrowed, small, masks = cut(fn, params := weights(**NET))
    expected = jax.grad(summed(fn))(jaxprune.apply_masks(params, masks), X)
    got = jax.grad(summed(narrowed))(small, X)
    assert_same(got, jaxprune.slice_params(expected, masks))


def test_an_ordinary_differential_equation():
    """`odeint` closes over the times and asks for integer powers of literals."""

    def fn(params, x):
        def slope(y, t):
            return jnp.tanh(y @ params["w1"]) @ params["w3"]

        return odeint(slope, x, jnp.linspace(0.0, 1.0, 3))[-1]

    params = weights(w1=(4, 6), w3=(6, 4))
    narrowed, small, masks = cut(fn, params)
    masked = jaxprune.apply_masks(params, masks)
    assert_same(narrowed(small, X), fn(masked, X))
    got = jax.jit(jax.grad(summed(narrowed)))(small, X)
    expected = jax.grad(summed(fn))(masked, X)
    assert_same(got, jaxprune.slice_params(expected, masks))


@pytest.mark.parametrize("kind", ["jvp", "forward", "backward"])
def test_a_derivative_that_closes_over_what_the_function_computes(kind):
    """JAX itself fails at this under jit, in words that name no cause."""

    def fn(params, x):
        scale = jnp.arange(6.0)[None] + 1  # an array of the program
        if kind == "jvp":
            op = jax.custom_jvp(lambda h: 2 * h)
            op.defjvp(lambda hs, slopes: (op(*hs), slopes[0] * scale))
        else:
            op = jax.custom_vjp(lambda h: 2 * h)
            there = (lambda h: h * scale) if kind == "forward" else lambda h: 2 * h
            back = (lambda ct: ct * scale) if kind == "backward" else lambda ct: 2 * ct
            op.defvjp(lambda h: (there(h), None), lambda _, ct: (back(ct),))
        return op(x @ params["w1"]) @ params["w2"]

    narrowed, small, masks = cut(fn, params := weights(**NET))
    assert_same(narrowed(small, X), fn(jaxprune.apply_masks(params, masks), X))
    for wrap in (lambda fn: fn, jax.jit):
        with pytest.raises(
            ValueError,
            match=r"custom_[jv]+p at test_closures.py:.* closes over an array",
        ):
            jax.grad(summed(wrap(narrowed)))(small, X)


OUTER = {
    "jit": lambda fn: jax.jit(fn)(2.0),
    "vmap": lambda fn: jax.vmap(fn)(jnp.array([2.0, 2.0]))[0],
    "scan": lambda fn: lax.scan(lambda _, c: (None, fn(c)), None, jnp.array([2.0]))[1],
}


def check_around(made, outer):
    """The gradient of ``made(c)``, with `c` of a transformation around the narrowing."""
    _, small, masks = cut(made(1.0), params := weights(**NET))
    masked = jaxprune.apply_masks(params, masks)

    def slopes(c):
        return jax.grad(summed(jaxprune.narrow(made(c), masks)))(small, X)["w1"]

    expected = jax.grad(summed(made(2.0)))(masked, X)
    expected = jaxprune.slice_params(expected, masks)["w1"]
    assert_same(OUTER[outer](slopes).reshape(expected.shape), expected)


class Scaled:
    """An object whose attribute a derivative reads."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, cotangent):
        return (self.scale * cotangent,)

    def backward(self, _, cotangent):
        return self(cotangent)


GLOBALS = {"scaled": Scaled(1.0)}


def named(_, cotangent):
    return GLOBALS["scaled"](cotangent)


def with_backward(fn):
    """tanh with this derivative."""
    op = jax.custom_vjp(jnp.tanh)
    op.defvjp(lambda h: (op(h), None), fn)
    return op


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("kind", ["object", "method", "jitted", "global"])
def test_what_goes_on_around_is_found_wherever_python_keeps_it(kind, outer):
    def made(c):
        scaled = GLOBALS["scaled"] = Scaled(c)
        once = jax.jit(lambda ct: c * ct)
        op = {
            "object": with_backward(lambda _, ct: scaled(ct)),
            "method": with_backward(scaled.backward),
            "jitted": with_backward(lambda _, ct: (once(ct),)),
            "global": with_backward(named),
        }[kind]
        return lambda params, x: op(x @ params["w1"]) @ params["w2"]

    check_around(made, outer)


def test_a_custom_vjp_that_is_optimised_for_remat():
    """JAX puts its forward pass into a primitive of its own."""

    @jax.custom_vjp
    def op(h):
        return jnp.tanh(h) * TABLE[None]

    def backward(h, ct):
        return (3.0 * ct * jnp.cos(h),)

    op.defvjp(lambda h: (op(h), h), backward, optimize_remat=True)
    check_transformed(lambda p, x: op(x @ p["w1"]) @ p["w2"], weights(**NET))

    def force(params, x):  # the gradient is part of the program itself
        slope = jax.grad(lambda h: (op(h) @ params["w2"]).sum())
        return slope(x @ params["w1"]) @ params["w2"]

    narrowed, small, masks = cut(force, params := weights(**NET))
    expected = force(jaxprune.apply_masks(params, masks), X)
    assert_same(jax.jit(narrowed)(small, X), expected)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("kind", ["jvp", "forward", "backward"])
def test_a_derivative_that_closes_over_what_goes_on_around(kind, outer):
    """The function is narrowed inside a transformation whose array it closes over."""

    def made(c):
        op = jax.custom_jvp(jnp.tanh) if kind == "jvp" else jax.custom_vjp(jnp.tanh)
        if kind == "jvp":
            op.defjvp(lambda hs, slopes: (op(*hs), slopes[0] * c))
        elif kind == "forward":
            op.defvjp(lambda h: (jnp.tanh(h), c), lambda c, ct: (c * ct,))
        else:
            op.defvjp(lambda h: (op(h), None), lambda _, ct: (c * ct,))
        return lambda params, x: op(x @ params["w1"]) @ params["w2"]

    check_around(made, outer)
