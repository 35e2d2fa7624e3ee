"""Every primitive of JAX has a rule, or is refused on purpose."""

import inspect
import sys
import warnings

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import jax.scipy.special
import numpy as np
import pytest
from contract import assert_same
from jax import lax
from jax.extend.core import Primitive, jaxprs_in_params
from zoo import weights

import jaxprune
from jaxprune.coupling._refused import REFUSED
from jaxprune.coupling._registry import RULES

PUBLIC = {
    "lax": jax.lax,
    "numpy": jnp,
    "nn": jax.nn,
    "special": jax.scipy.special,
    "linalg": jax.scipy.linalg,
    "numpy.linalg": jnp.linalg,
    "fft": jnp.fft,
    "image": jax.image,
    "random": jax.random,
}
SQUARE = jnp.eye(4) + 0.1
ARGUMENTS = [
    (SQUARE,),
    (SQUARE, SQUARE),
    (SQUARE, SQUARE, SQUARE),
    (jnp.arange(4),),
    (jnp.arange(4), jnp.arange(4)),
    (jnp.arange(4) > 1,),
    (jnp.arange(4) > 1, SQUARE[0], SQUARE[0]),
    (SQUARE, 1),
    (SQUARE, 0, 1),
    (SQUARE, (2, 8)),
    (SQUARE, (2, 8), "linear"),
    ([SQUARE, SQUARE],),
    (SQUARE, [1, 0]),
    (SQUARE[0].astype(jnp.complex64),),
    (4,),
    ((4, 4),),
    ((4, 4), 1.0),
    (0,),
    (jax.random.key(0),),
    (jax.random.key(0), (4,)),
    (jax.random.key(0), SQUARE[0]),
    (jax.random.key(0), SQUARE[0], (4,)),
    (jax.random.key(0), SQUARE[0] + 1.0, SQUARE[0] + 1.0),
    (jax.random.key(0), 4.0, 0.5),
    (jax.random.key(0), 4),
]
ENOUGH = 1  # ways of calling one function


def primitives(jaxpr):
    """The names of all primitives of a program."""
    found = set()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        found.add(eqn.primitive.name)
        for inner in jaxprs_in_params(eqn.params):
            found |= primitives(inner)
        if eqn.primitive.name == "call_hi_primitive":
            avals = [v.aval for v in eqn.invars]
            program = jax.make_jaxpr(
                lambda *xs, eqn=eqn: eqn.primitive.to_lojax(*xs, **eqn.params)
            )
            found |= primitives(program(*avals))
    return found


def of_function(fn):
    """The primitives of a public function, on whatever arguments it takes."""
    found, ways = set(), 0
    for arguments in ARGUMENTS:
        dynamic = [isinstance(x, jax.Array) for x in arguments]
        arrays = [x for x, is_array in zip(arguments, dynamic, strict=True) if is_array]

        def call(*arrays, arguments=arguments, dynamic=dynamic):
            rest = iter(arrays)
            return fn(
                *[
                    next(rest) if is_array else x
                    for x, is_array in zip(arguments, dynamic, strict=True)
                ]
            )

        try:
            found |= primitives(jax.make_jaxpr(call)(*arrays))
        except Exception:  # not the arguments of this function
            continue
        ways += 1
        if ways == ENOUGH:
            break
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_the_primitives_of_public_functions_are_known(module):
    unknown, count = {}, 0
    with (
        warnings.catch_warnings(),
        np.printoptions(),  # jnp.set_printoptions is called too
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        warnings.simplefilter("ignore")
        for name in dir(PUBLIC[module]):
            fn = getattr(PUBLIC[module], name, None)
            if name.startswith("_") or not callable(fn) or inspect.isclass(fn):
                continue
            found = of_function(fn)
            count += bool(found)
            missing = found - set(RULES) - set(REFUSED)
            if missing:
                unknown[name] = missing
    assert count
    assert not unknown


def test_all_primitives_that_jax_defines_are_known():
    """Also those that no public function showed, but for kernels and experiments."""
    found = {
        value.name: module.__name__
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("jax._src.")
        and ".pallas" not in module.__name__
        and ".mosaic" not in module.__name__
        and ".tpu_custom_call" not in module.__name__
        for value in list(vars(module).values())
        if isinstance(value, Primitive)
    }
    assert len(found) > 200
    assert {n: m for n, m in found.items() if n not in RULES and n not in REFUSED} == {}


def test_no_primitive_has_a_rule_and_is_refused():
    assert not set(RULES) & set(REFUSED)


def test_a_refused_primitive_says_why():
    def fn(params, x):
        return jax.lax.approx_max_k(x @ params["w"], 2)

    params = weights(w=(4, 5))
    [pin, *_] = [p for p in jaxprune.trace(fn, params, np.eye(4)).pinned if p.axis == 1]
    assert (
        "primitive approx_top_k has no rule: it selects the largest positions"
        in pin.why
    )


# --- values of primitives that came later, or with newer versions ---------------------

X = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
KEPT = np.arange(6) % 3 > 0


def by_composite(h):
    return lax.composite(lambda h: jnp.sin(h) + 1.0, "tests.one_more")(h)


OPS = {
    "digitize": lambda h: jnp.digitize(h, jnp.linspace(-1.0, 1.0, 5)).astype(h.dtype),
    "searchsorted": lambda h: jnp.searchsorted(jnp.arange(4.0), h).astype(h.dtype),
    "log2": lambda h: jnp.log2(1.0 + h * h),
    "expm1": jnp.expm1,
    "arccosh": lambda h: jnp.arccosh(1.5 + h * h),
    "arcsin": lambda h: jnp.arcsin(jnp.tanh(h)),
    "polyval": lambda h: jnp.polyval(jnp.array([1.0, 2.0, 3.0]), h),
    "ndtri": lambda h: jax.scipy.special.ndtri(jax.nn.sigmoid(h)),
    "gammaln": lambda h: jax.scipy.special.gammaln(1.5 + h * h),
    "device_put": jax.device_put,
    "composite": by_composite,
}


@pytest.mark.parametrize("name", OPS)
def test_the_value_of(name):
    def fn(params, x):
        return OPS[name](x @ params["w1"]) @ params["w2"]

    params = weights(w1=(4, 6), w2=(6, 2))
    groups = jaxprune.trace(fn, params, X)
    assert [(g.size, g.exact) for g in groups.values()] == [(6, True)]
    masks = jaxprune.expand_masks(groups, {"w1:1": KEPT})
    small, narrowed = jaxprune.slice_params(params, masks), jaxprune.narrow(fn, masks)
    expected = fn(jaxprune.apply_masks(params, masks), X)
    assert_same(narrowed(small, X), expected)
    assert_same(jax.jit(narrowed)(small, X), expected)
    stacked = jax.vmap(narrowed, (None, 0))(small, X[:, None])
    assert_same(stacked[:, 0], expected)


@pytest.mark.parametrize("between", [jnp.tanh, lax.optimization_barrier])
def test_blocks_pass_through_an_identity(between):
    def fn(params, x):
        hidden = between((x @ params["w"]).reshape(-1, 3, 4))
        return hidden.reshape(-1, 12) @ params["o"]

    params = weights(w=(4, 12), o=(12, 3))
    groups = jaxprune.trace(fn, params, X, balanced=["w:1#2"])
    assert {n: (g.size, g.blocks) for n, g in groups.items()} == {
        "w:1": (3, 1),
        "w:1#2": (12, 3),
    }
    keep = {"w:1#2": np.array([1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1], bool)}
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(params, masks)
    expected = fn(jaxprune.apply_masks(params, masks), X)
    assert_same(jaxprune.narrow(fn, masks)(small, X), expected)
