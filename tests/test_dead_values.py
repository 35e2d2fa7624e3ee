"""Reductions over a cut axis see what the masked program holds at dead positions.

Eleven functions whose value there is not 0, but the same at all dead positions; held
against the masked program for cuts of every size.
"""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import TOLERANCE, difference, halve, quick_jit, total

import jaxprune

N = 8
CUTS = {
    "some": np.arange(N) % 3 > 0,
    "all_but_one": np.arange(N) == 4,
    "none": np.ones(N, bool),
    "all": np.zeros(N, bool),
}


def layer_norm(h, p):
    centred = h - h.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / jnp.sqrt(variance + 1e-5) * p["scale"][None] + p["bias"][None]


def norm_with_safe_slope(h):
    power = (h * h).sum(0)
    is_zero = power == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, power)))


def global_response(h):
    norm = norm_with_safe_slope(h)
    return h * (norm / (norm.mean() + 1e-6))[None]


FUNCTIONS = {
    "two_pass_layer_norm": layer_norm,
    "softmax": lambda h, p: jax.nn.softmax(h) * h,
    "softmax_alone": lambda h, p: jax.nn.softmax(h),
    "log_softmax": lambda h, p: jax.nn.log_softmax(h),
    "max_of_non_negative": lambda h, p: (
        jax.nn.relu(h) * jax.nn.sigmoid(jax.nn.relu(h).max(-1, keepdims=True))
    ),
    "below_the_largest": lambda h, p: h - h.max(-1, keepdims=True),
    "above_the_smallest": lambda h, p: h - h.min(-1, keepdims=True),
    "by_the_largest": lambda h, p: h / (jnp.abs(h).max(-1, keepdims=True) + 0.1),
    "rounded": lambda h, p: jnp.round(
        h / (jnp.abs(h).max(-1, keepdims=True) + 0.1) * 127
    ),
    "safe_norm": lambda h, p: global_response(jax.nn.gelu(h)),
    "gated": lambda h, p: h * jax.nn.sigmoid(h).mean(-1, keepdims=True),
}
REDUCED = {
    "mean_of_cosines": lambda h: jnp.cos(h).mean(-1),
    "logsumexp": lambda h: jax.nn.logsumexp(h, -1),
    "variance": lambda h: h.var(-1),
    "gram": lambda h: jnp.cos(h) @ jnp.cos(h).T,
    "both_axes": lambda h: (jnp.cos(h)[:, :, None] + jnp.sin(h)[:, None]).sum((1, 2)),
    "integers": lambda h: (jnp.round(jnp.cos(h) * 9).astype(jnp.int32)).sum(-1),
}


def every(p, x):
    h = x @ p["w"]
    kept = {name: fn(h, p) @ p["v"] for name, fn in FUNCTIONS.items()}
    return kept | {name: fn(h) for name, fn in REDUCED.items()}


X = np.random.default_rng(0).normal(size=(5, 4))
SHAPES = {"w": (4, N), "v": (N, 3), "scale": (N,), "bias": (N,)}
PARAMS = {
    name: np.random.default_rng(k).normal(size=shape)
    for k, (name, shape) in enumerate(SHAPES.items())
}


def cut(keep):
    groups = jaxprune.trace(every, PARAMS, X)
    (group,) = groups.values()
    assert (group.size, group.exact, group.why) == (N, True, "")
    return jaxprune.expand_masks(groups, {group.name: keep})


def slope(fn):
    """The gradient with respect to the inputs, but for what is rounded."""

    def loss(p, x):
        out = fn(p, x)
        return total({k: v for k, v in out.items() if k != "rounded"})

    return jax.grad(loss, argnums=1)


@pytest.mark.parametrize("name", CUTS)
def test_any_cut_equals_the_masked_program(name):
    with jax.enable_x64(True):
        masks = cut(CUTS[name])
        small = jaxprune.slice_params(PARAMS, masks)
        masked = jaxprune.apply_masks(PARAMS, masks)
        narrowed = jaxprune.narrow(every, masks)
        pairs = {"value": (narrowed, every)}
        if name != "all":  # where all are 0, any of them may be the largest
            pairs["slope"] = slope(narrowed), slope(every)
        for what, (got, expected) in pairs.items():
            gap = difference(quick_jit(got)(small, X), quick_jit(expected)(masked, X))
            assert gap < 1e-9, what


def test_under_vmap_and_remat():
    with jax.enable_x64(True):
        masks = cut(CUTS["some"])
        small = jaxprune.slice_params(PARAMS, masks)
        masked = jaxprune.apply_masks(PARAMS, masks)
        stacked = np.stack([X, 2.0 * X])
        narrowed = jaxprune.narrow(jax.checkpoint(every), masks)
        got = quick_jit(jax.vmap(narrowed, (None, 0)))(small, stacked)
        expected = quick_jit(jax.vmap(every, (None, 0)))(masked, stacked)
        assert difference(got, expected) < 1e-9


def test_nothing_is_added_where_dead_values_are_zero():
    def fn(p, x):
        h = x @ p["w"]
        return (h * h).sum(-1), jnp.tanh(h) @ p["v"]

    params = {name: PARAMS[name].astype(np.float32) for name in "wv"}
    x = X.astype(np.float32)
    groups = jaxprune.trace(fn, params, x)
    masks = jaxprune.expand_masks(groups, {"w:1": CUTS["some"]})
    small = jaxprune.slice_params(params, masks)

    def equations(fn, p):
        with jax.disable_jit():
            return len(jax.make_jaxpr(fn)(p, x).eqns)

    assert equations(jaxprune.narrow(fn, masks), small) == equations(fn, params)


# A sum of f(h), and whether it is exact: the sign of the 0 that h holds where it is dead
# is not known, and some functions read it.
SIGNS = {
    "arctangent_of_two": (lambda h: jnp.arctan2(h, -1.0), False),
    "bits": (lambda h: jax.lax.bitcast_convert_type(h, jnp.int32), False),
    "sign_bit": (lambda h: jnp.where(jnp.signbit(h), 2.0, 1.0), False),
    "copied_sign": (lambda h: jnp.copysign(1.0, h), False),
    "reciprocal_of_a_sum": (lambda h: jnp.exp(1.0 / (jnp.tanh(h) + h)), False),
    "branch_cut": (
        lambda h: jnp.imag(jnp.log(jax.lax.complex(-jnp.ones_like(h), h))),
        False,
    ),
    "sign_lost_by_a_square": (lambda h: 1.0 / (1.0 + h**2), True),
    "sign_lost_by_a_shift": (lambda h: 1.0 / (2.5 + jnp.tanh(h)), True),
    "sign_lost_by_exp": (lambda h: jnp.arctan2(jnp.exp(h), -1.0), True),
    "sign_of_a_zero_kept": (lambda h: jnp.cos(jnp.sin(h)), True),
}


@pytest.mark.parametrize("name", SIGNS)
def test_functions_that_read_the_sign_of_a_zero(name):
    fn, exact = SIGNS[name]
    params = {"w": PARAMS["w"].astype(np.float32)}

    def net(p, x):
        return fn(-(x @ p["w"])).sum(-1)

    x = np.abs(X).astype(np.float32)
    groups = jaxprune.trace(net, params, x)
    (group,) = groups.values()
    assert group.exact is exact
    if exact:
        masks = jaxprune.expand_masks(groups, {"w:1": CUTS["some"]})
        got = jaxprune.narrow(net, masks)(jaxprune.slice_params(params, masks), x)
        expected = net(jaxprune.apply_masks(params, masks), x)
        assert difference(got, expected) < TOLERANCE


def one_pass(h):
    mean = h.mean(-1, keepdims=True)
    return (h - mean) / jnp.sqrt((h * h).mean(-1, keepdims=True) - mean**2 + 1e-5)


def ranked_norm(h):
    centred = h - h.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


OWN = {
    "two_pass": ranked_norm,
    "one_pass": one_pass,
    "of_a_sample": lambda h: h / (jnp.std(h, -1, ddof=1, keepdims=True) + 0.1),
    "softmax": jax.nn.softmax,
    "smallest": lambda h: h * (jnp.abs(h) + 1.0).min(-1, keepdims=True),
}


@pytest.mark.parametrize("name", OWN)
def test_statistics_of_the_smaller_layer(name):
    """The function itself, on small parameters, is the network built at that width."""

    def fn(p, x):
        return OWN[name](x @ p["w"]) @ p["v"]

    with jax.enable_x64(True):
        params = {name: PARAMS[name] for name in "wv"}
        groups = jaxprune.trace(fn, params, X)
        masks = jaxprune.expand_masks(groups, {"w:1": CUTS["some"]})
        small = jaxprune.slice_params(params, masks)
        own = jaxprune.narrow(fn, masks, statistics="kept")(small, X)
        assert difference(own, fn(small, X)) < 1e-12
        assert difference(jaxprune.narrow(fn, masks)(small, X), fn(small, X)) > 1e-3
    with pytest.raises(ValueError, match="statistics must be 'masked' or 'kept', got"):
        jaxprune.narrow(fn, masks, statistics="own")


def test_inside_loops_and_functions_with_derivatives_of_their_own():
    """Dead values are found inside of the program where the reduction is."""

    @jax.custom_jvp
    def norm(h):
        return ranked_norm(jnp.cos(h))

    @norm.defjvp
    def _slope(primals, tangents):
        return jax.jvp(lambda h: ranked_norm(jnp.cos(h)), primals, tangents)

    def turn(p, x):
        def inner(h, _):
            return h + jnp.tanh(jax.nn.softmax(h) @ p["u"]) * norm(h), None

        def outer(h, _):
            return jax.lax.scan(inner, h, None, length=2)[0] * 0.5, None

        return jax.lax.scan(outer, x @ p["w"], None, length=2)[0] @ p["v"]

    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        params = {name: PARAMS[name] for name in "wv"} | {"u": rng.normal(size=(N, N))}
        groups = jaxprune.trace(turn, params, X)
        assert [(g.size, g.exact) for g in groups.values()] == [(N, True)]
        masks = jaxprune.expand_masks(groups, {next(iter(groups)): CUTS["some"]})
        small = jaxprune.slice_params(params, masks)
        narrowed = jaxprune.narrow(turn, masks)
        masked = jaxprune.apply_masks(params, masks)
        for kind in (lambda fn: fn, lambda fn: jax.grad(lambda p, x: total(fn(p, x)))):
            got = quick_jit(kind(narrowed))(small, X)
            expected = quick_jit(kind(turn))(masked, X)
            if isinstance(expected, dict):
                expected = jaxprune.slice_params(expected, masks)
            assert difference(got, expected) < 1e-9


def test_costs_of_what_is_added():
    """Nothing at full size; else once, whatever is cut."""
    params = {name: PARAMS[name].astype(np.float32) for name in "wv"}
    x = X.astype(np.float32)

    def fn(p, x):
        h = jnp.cos(x @ p["w"]) + x.mean(-1, keepdims=True)
        return h @ h.T, jax.nn.softmax(x @ p["w"]) @ p["v"]

    groups = jaxprune.trace(fn, params, x)
    model = jaxprune.costing.cost_model(fn, params, x, groups=groups)
    # Twice 5 * 4 n, 5 * 5 n and 5 * 3 n; and 5 * 5 of what is at dead positions.
    assert str(model.multiply_adds) == "25 [w:1 cut] + 80 w:1"
    for keep in CUTS.values():
        if not keep.any():
            continue
        masks = jaxprune.expand_masks(groups, {"w:1": keep})
        small = jaxprune.slice_params(params, masks)
        cost = jaxprune.costing.costs(jaxprune.narrow(fn, masks), small, x)
        sizes = {"w:1": int(keep.sum())}
        assert model.multiply_adds.value(sizes) == cost.multiply_adds
        assert model.activation_bytes.value(sizes) == cost.activation_bytes
        traced = jax.jit(model.activation_bytes.value)(sizes)
        assert float(traced) == cost.activation_bytes
        one = model.activation_bytes.savings(np.array([sizes["w:1"]]), np.array([1]))
        less = model.activation_bytes.without_one("w:1", sizes)
        assert one[0] == pytest.approx(less)


def test_what_differs_by_position_is_not_exact():
    def fn(p, x):
        h = x @ p["w"] + jnp.arange(float(N))[None]
        return jax.nn.softmax(h) @ p["v"]

    params = {name: PARAMS[name].astype(np.float32) for name in "wv"}
    (group,) = jaxprune.trace(fn, params, X.astype(np.float32)).values()
    assert not group.exact
    assert "a maximum over this axis includes masked positions" in group.why


class Block(eqx.Module):
    """A transformer block of Equinox: its norms compute the variance in two passes."""

    attention: eqx.nn.MultiheadAttention
    norms: list[eqx.nn.LayerNorm]
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    embed: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.attention = eqx.nn.MultiheadAttention(2, 6, key=keys[0])
        self.norms = [eqx.nn.LayerNorm(6) for _ in range(3)]
        self.up = eqx.nn.Linear(6, 10, key=keys[1])
        self.down = eqx.nn.Linear(10, 6, key=keys[2])
        self.embed = eqx.nn.Linear(4, 6, key=keys[3])
        self.head = eqx.nn.Linear(6, 2, key=keys[4])

    def __call__(self, x):
        x = jax.vmap(self.embed)(x)
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y)
        y = jax.vmap(self.norms[1])(x)
        x = x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(y)))
        return jax.vmap(self.head)(jax.vmap(self.norms[2])(x))


def equinox_transformer():
    arrays, static = eqx.partition(Block(jax.random.key(0)), eqx.is_array)
    return lambda p, x: eqx.combine(p, static)(x), arrays


def haiku_transformer():
    """Its norms compute the variance in two passes, too."""

    def net(x):
        def norm():
            return hk.LayerNorm(-1, create_scale=True, create_offset=True)

        x = hk.Linear(6)(x[None])
        attention = hk.MultiHeadAttention(
            2, 3, model_size=6, w_init=hk.initializers.Constant(0.0)
        )
        y = norm()(x)
        x = x + attention(y, y, y)
        x = x + hk.Linear(6)(jax.nn.gelu(hk.Linear(10)(norm()(x))))
        return hk.Linear(2)(norm()(x))

    made = hk.without_apply_rng(hk.transform(net))
    shapes = jax.eval_shape(made.init, jax.random.key(0), X.astype(np.float32))
    rng = np.random.default_rng(3)
    drawn = jax.tree.map(lambda s: rng.normal(size=s.shape), shapes)
    return made.apply, jax.tree.map(np.float32, drawn)


@pytest.mark.parametrize("build", [equinox_transformer, haiku_transformer])
def test_the_residual_width_of_a_transformer(build):
    fn, params = build()
    x = X.astype(np.float32)
    groups = jaxprune.trace(fn, params, x)
    assert all(group.exact for group in groups.values())
    width = next(g for g in groups.values() if any("norm" in m.path for m in g.members))
    assert width.size == 6
    masks = jaxprune.expand_masks(groups, halve(groups, 0))
    small = jaxprune.slice_params(params, masks)
    got = quick_jit(jaxprune.narrow(fn, masks))(small, x)
    expected = quick_jit(fn)(jaxprune.apply_masks(params, masks), x)
    assert difference(got, expected) < TOLERANCE
