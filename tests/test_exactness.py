"""The certificate: `Group.exact` is true if and only if cutting equals masking.

The zoo shows the first direction (every exact group of every model is equal to rounding).
Here stand the causes of the other: the group says so, names the place, and the difference
is there.
"""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import TOLERANCE, difference, halve, quick_jit
from jax import lax
from jax.extend.core import Primitive
from zoo import linen, normal, weights

import jaxprune

X = np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)
SUMMED = "a sum runs over masked positions that are not 0"

# --- causes --------------------------------------------------------------------------


TABLE = jnp.linspace(0.5, 2.0, 6)[None]  # a number of its own for every unit


def value_added(p, x):
    h = x @ p["w"] + TABLE
    return h.sum(-1)  # here


def mean_of_a_bias(p, x):
    # A bias that is no member of the group: one number for all channels.
    h = jax.nn.relu(x @ p["w"] + p["b"])
    return h.mean(-1)  # here


def softmax(p, x):
    h = x @ p["w"] + TABLE
    return jax.nn.softmax(h, axis=-1) @ p["v"]  # here


def log_sum_exp(p, x):
    return jax.nn.logsumexp(x @ p["w"] + TABLE, axis=-1)  # here


def two_pass_variance(p, x):
    h = x @ p["w"] * 2.0 + TABLE
    return h.var(-1)  # here


def maximum(p, x):
    h = -jnp.abs(x @ p["w"]) - TABLE
    return h.max(-1)  # here


def product(p, x):
    return (x @ p["w"]).prod(-1) + 1.0  # here


def gating_by_the_largest(p, x):
    h = jnp.exp(x @ p["w"] + TABLE)
    return (h / h.max(-1, keepdims=True)) @ p["v"]  # here


def running_product(p, x):
    return lax.cumprod(jnp.sin(x @ p["w"]) + 0.1, axis=1) @ p["v"]  # here


def two_operands_lose_zero(p, x):
    h = jnp.exp(x @ p["w"] + TABLE)
    return h @ h.T  # here


def inside_scan(p, x):
    def step(h, _):
        return jnp.cos(h), h.sum(-1)  # here

    return lax.scan(step, x @ p["w"], length=3)[1]


def inside_cond(p, x):
    def shifted(h):
        return (h - TABLE).sum(-1)  # here

    return lax.cond(x[0, 0] < 9.0, shifted, lambda h: h.sum(-1), x @ p["w"])


def inside_while(p, x):
    def busy(state):
        return state[0] < 3

    def body(state):
        count, h, total = state
        return count + 1, jnp.cos(h), total + h.sum(-1)  # here

    return lax.while_loop(busy, body, (0, x @ p["w"], x[:, 0]))[2]


@jax.jit
def _shifted_sum(h):
    return (h - TABLE).sum(-1)  # here


def inside_jit(p, x):
    # Two calls of one jitted function: the line inside it, whichever call it is.
    return _shifted_sum((x @ p["w"]) ** 2 + 3.0) + _shifted_sum(x @ p["w"])


def inside_a_jitted_library_function(p, x):
    # Two calls of one; the first is exact.
    first = jnp.var(x @ p["w"], axis=0) @ p["u"]
    return first + jnp.var(x @ p["w"] + TABLE, axis=1)  # here


def pole(p, x):
    h = x @ p["w"]
    return (h / jnp.abs(h)) @ p["v"]  # here


def update_writes_a_constant(p, x):
    h = lax.dynamic_update_slice(x @ p["w"], jnp.ones((1, 6)), (0, 0))
    return h.sum(-1)  # here


def padded_with_ones(p, x):
    h = jnp.pad(x @ p["w"], ((0, 1), (0, 0)), constant_values=1.0)
    return h.sum(-1)  # here


def noise_added(p, x):
    h = x @ p["w"] + jax.random.normal(jax.random.key(0), (3, 6))
    return h.sum(-1)  # here


SHAPES = {"w": (4, 6)}
WV = {"w": (4, 6), "v": (6, 2)}
CAUSES = [
    (value_added, SHAPES, SUMMED),
    (mean_of_a_bias, {"w": (4, 6), "b": ()}, SUMMED),
    (softmax, WV, "a maximum over this axis includes masked positions"),
    (log_sum_exp, SHAPES, "a maximum over this axis includes masked positions"),
    (two_pass_variance, SHAPES, SUMMED),
    (maximum, SHAPES, "a maximum over this axis includes masked positions"),
    (product, SHAPES, "a product over this axis includes masked positions"),
    (gating_by_the_largest, WV, "a maximum over this axis includes masked positions"),
    (
        running_product,
        WV,
        "a cumulative operation runs over masked positions",
    ),
    (two_operands_lose_zero, SHAPES, "a contraction runs over masked positions"),
    (inside_scan, SHAPES, SUMMED),
    (inside_cond, SHAPES, SUMMED),
    (inside_while, SHAPES, SUMMED),
    (inside_jit, SHAPES, SUMMED),
    (inside_a_jitted_library_function, {"w": (4, 6), "u": (6,)}, SUMMED),
    (pole, WV, "the result is not finite"),
    (update_writes_a_constant, SHAPES, SUMMED),
    (padded_with_ones, SHAPES, SUMMED),
    (noise_added, SHAPES, SUMMED),
]


def place(fn):
    """``file:line`` of the line that the comment marks."""
    fn = {inside_jit: _shifted_sum.__wrapped__}.get(fn, fn)
    lines, first = inspect.getsourcelines(fn)
    (offset,) = (k for k, line in enumerate(lines) if "# here" in line)
    return f"test_exactness.py:{first + offset}"


def gap(fn, variables, groups, names, seed, args):
    masks = jaxprune.expand_masks(groups, halve(groups, seed, names))
    small = jaxprune.slice_params(variables, masks)
    got = quick_jit(jaxprune.narrow(fn, masks))(small, *args)
    expected = quick_jit(fn)(jaxprune.apply_masks(variables, masks), *args)
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    return difference(got, expected) if finite else np.inf


@pytest.mark.parametrize(
    ("fn", "shapes", "text"), CAUSES, ids=[case[0].__name__ for case in CAUSES]
)
def test_an_inexact_group_names_the_place_and_the_difference_is_there(fn, shapes, text):
    variables = weights(**shapes)
    (group,) = jaxprune.trace(fn, variables, X).values()
    assert (group.name, group.size, group.exact) == ("w:1", 6, False)
    assert text in group.why
    assert place(fn) in group.why
    groups = jaxprune.trace(fn, variables, X)
    assert max(gap(fn, variables, groups, ["w:1"], s, (X,)) for s in range(2)) > 1e-3


# --- the same programs, exact --------------------------------------------------------


def sum_of_squares(p, x):
    return ((x @ p["w"]) ** 2).sum(-1)


def softmax_over_another_axis(p, x):
    return jax.nn.softmax(x @ p["w"], axis=0) @ p["v"]


def one_pass_variance(p, x):
    h = x @ p["w"]
    return (h * h).mean(-1) - h.mean(-1) ** 2


def regained(p, x):
    # exp is 1 where the unit is dead; multiplied by a parameter of the unit it is 0.
    return (jnp.exp(x @ p["w"]) * p["u"][None]).sum(-1)


def selected_away(p, x):
    h = x @ p["w"]
    return jnp.where(h > 0, h, 0.0).sum(-1)


def difference_of_equals(p, x):
    h = x @ p["w"]
    return (jnp.cosh(h) - 1.0) @ p["v"]


EXACT = [
    (sum_of_squares, SHAPES),
    (softmax_over_another_axis, WV),
    (one_pass_variance, SHAPES),
    (regained, {"w": (4, 6), "u": (6,)}),
    (selected_away, SHAPES),
    (difference_of_equals, WV),
]


@pytest.mark.parametrize(
    ("fn", "shapes"), EXACT, ids=[case[0].__name__ for case in EXACT]
)
def test_an_exact_group_is_equal_to_rounding(fn, shapes):
    variables = weights(**shapes)
    groups = jaxprune.trace(fn, variables, X)
    (group,) = groups.values()
    assert (group.size, group.exact, group.why) == (6, True, "")
    for seed in range(2):
        assert gap(fn, variables, groups, list(groups), seed, (X,)) < TOLERANCE


# --- layers --------------------------------------------------------------------------


class Normed(nn.Module):
    fast: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="wide")(x)
        x = nn.LayerNorm(use_fast_variance=self.fast, name="norm")(x)
        x = nn.relu(nn.Dense(8, name="deep")(x))
        return nn.Dense(2, name="head")(x)


@pytest.mark.parametrize("fast", [True, False])
def test_layer_norm_is_exact_in_one_pass_and_in_two(fast):
    fn, variables, inputs = linen(Normed(fast), normal(4))
    groups = jaxprune.trace(fn, variables, *inputs(2, 0))
    sizes = {name: group.size for name, group in groups.items()}
    assert sizes == {"params/wide/kernel:1": 6, "params/deep/kernel:1": 8}
    wide, deep = groups.values()
    assert deep.exact
    assert gap(fn, variables, groups, [deep.name], 0, inputs(3, 0)) < TOLERANCE
    assert wide.exact
    assert gap(fn, variables, groups, [wide.name], 0, inputs(3, 0)) < TOLERANCE


class TokenMixing(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="embed")(x)
        y = nn.Dense(5, name="mix", use_bias=self.bias)(x.swapaxes(1, 2)).swapaxes(1, 2)
        return nn.Dense(2, name="head")(nn.LayerNorm(name="norm")(x + y))

    bias: bool = True


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_written_into_a_dead_channel_before_a_mean(bias):
    fn, variables, inputs = linen(TokenMixing(bias=bias), normal(5, 4))
    groups = jaxprune.trace(fn, variables, *inputs(2, 0))
    (group,) = groups.values()
    assert (group.name, group.size) == ("params/embed/kernel:1", 6)
    assert group.exact
    assert gap(fn, variables, groups, [group.name], 0, inputs(3, 0)) < TOLERANCE


def test_a_doubt_about_a_product_is_a_doubt_about_its_factors():
    def fn(p, x):
        h = (x @ p["w"]).reshape(3, 2, 3)
        h = jax.nn.softmax(h.reshape(3, 6), axis=-1)  # over heads x width
        return jnp.einsum("bhd,hdo->bo", h.reshape(3, 2, 3), p["v"])

    variables = weights(w=(4, 6), v=(2, 3, 2))
    groups = jaxprune.trace(fn, variables, X)
    assert {n: (g.size, g.exact) for n, g in groups.items()} == {
        "w:1": (2, False),
        "w:1#2": (3, False),
    }
    for name in groups:
        assert gap(fn, variables, groups, [name], 0, (X,)) > 1e-3


# --- what cannot be cut --------------------------------------------------------------

mystery_p = Primitive("mystery")
mystery_p.def_impl(lambda x: x)
mystery_p.def_abstract_eval(lambda x: x)
jax.interpreters.mlir.register_lowering(mystery_p, lambda ctx, x: [x])


def test_an_unknown_primitive_pins_with_its_name_and_the_users_line():
    def fn(p, x):
        h = mystery_p.bind(x @ p["w"])  # here
        return jax.nn.relu(h @ p["v"]) @ p["u"]

    variables = weights(w=(4, 6), v=(6, 5), u=(5, 2))
    groups = jaxprune.trace(fn, variables, X)
    assert {n: (g.size, g.exact) for n, g in groups.items()} == {"v:1": (5, True)}
    pinned = {f"{pin.path}:{pin.axis}": pin for pin in groups.pinned}
    assert set(pinned) == {"w:0", "w:1", "v:0", "u:1"}
    for name in ("w:1", "v:0"):
        assert "primitive mystery has no rule" in pinned[name].why
        assert place(fn) in pinned[name].why
    assert pinned["w:0"].why == "coupled to the input args/1"
    assert pinned["u:1"].why == "coupled to the output of apply_fn"
    assert gap(fn, variables, groups, ["v:1"], 0, (X,)) < TOLERANCE


def test_register_rule_teaches_a_primitive(monkeypatch):
    from jaxprune.coupling._registry import RULES
    from jaxprune.program.primitives import DECLARATIONS, elementwise

    def fn(p, x):
        return mystery_p.bind(x @ p["w"]) @ p["v"]

    variables = weights(**WV)
    assert not jaxprune.trace(fn, variables, X)
    for table in (RULES, DECLARATIONS):  # undone after the test
        monkeypatch.setitem(table, "mystery", None)
    jaxprune.register_rule(mystery_p, elementwise("first"))
    groups = jaxprune.trace(fn, variables, X)  # what was known before is not used
    assert {n: g.size for n, g in groups.items()} == {"w:1": 6}
    assert gap(fn, variables, groups, ["w:1"], 0, (X,)) < TOLERANCE


def two_layers(p, x):
    h = jax.nn.relu(x @ p["first"]["w"])
    h = jax.nn.relu(h @ p["second"]["w"])
    return {"logits": h @ p["head"], "features": h}


LAYERS = {"first": {"w": (4, 6)}, "second": {"w": (6, 5)}, "head": (5, 2)}


def group_names(**options):
    return set(jaxprune.trace(two_layers, weights(**LAYERS), X, **options))


def test_pin_and_unpin():
    assert group_names() == {"first/w:1"}
    assert group_names(unpin=["output/features"]) == {"first/w:1", "second/w:1"}
    assert group_names(unpin=["output/*"]) >= {"first/w:1", "second/w:1"}
    assert group_names(pin=["first/*"]) == set()
    assert group_names(pin=["second/w:0"]) == set()
    assert group_names(pin=["second/w:1"], unpin=["output/features"]) == {"first/w:1"}
    assert group_names(pin=["*:7", "head:1"][1:]) == {"first/w:1"}


def test_pinned_by_the_caller_says_so():
    groups = jaxprune.trace(two_layers, weights(**LAYERS), X, pin=["second/w:0"])
    why = {f"{pin.path}:{pin.axis}": pin.why for pin in groups.pinned}
    assert why["first/w:1"] == why["second/w:0"] == "pinned by the caller"
    assert why["first/w:0"] == "coupled to the input args/1"


def test_the_callers_pin_is_told_before_other_reasons():
    groups = jaxprune.trace(two_layers, weights(**LAYERS), X, pin=["first/w:0"])
    why = {f"{pin.path}:{pin.axis}": pin.why for pin in groups.pinned}
    assert why["first/w:0"] == "pinned by the caller"


def test_patterns_that_match_nothing_raise():
    with pytest.raises(ValueError, match=r"pin pattern 'third/\*' matches no axis"):
        group_names(pin=["first/*", "third/*"])
    with pytest.raises(ValueError, match=r"the leaves are first/w, head, second/w"):
        group_names(pin=["first/w:2"])
    with pytest.raises(ValueError, match=r"unpin pattern 'features' matches no output"):
        group_names(unpin=["features"])
    with pytest.raises(ValueError, match="output/features, output/logits"):
        group_names(unpin=["nothing"])


def test_unused_variables_are_pinned():
    def fn(p, x):
        return x @ p["w"] @ p["v"]

    groups = jaxprune.trace(fn, weights(**WV, spare=(5, 3)), X)
    assert set(groups) == {"w:1"}
    why = {pin.why for pin in groups.pinned if pin.path == "spare"}
    assert why == {"unused variable"}
