import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quick_jit
from zoo import MODELS

import jaxprune
from jaxprune import scores, taps

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(8, 4, 4, 2)).astype(np.float32)
LABELS = RNG.normal(size=(8, 3)).astype(np.float32)
BATCHES = [IMAGES[:3], IMAGES[3:6], IMAGES[6:]]


def conv(x, kernel):
    pads = [(1, 1), (1, 1)] if kernel.shape[0] == 3 else "VALID"
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def residual_net(params, x, gates=None):
    """A residual stream that two layers take in, a branch, and a flatten.

    The gates are written by hand: one ``[N, size]`` array per group, at every place
    where a convolution or dense layer takes the group in. Returns what these take in.
    """
    gates = gates or {}

    def gate(group, a):
        seen.setdefault(group, []).append(a)
        return a * gates[group][:, None, None] if group in gates else a

    seen = {}
    stream = jax.nn.relu(conv(x, params["stem"]))
    inner = jax.nn.relu(conv(gate("stem:3", stream), params["down"]))
    stream = stream + jnp.tanh(conv(gate("down:3", inner), params["up"]))
    flat = gate("stem:3", stream).reshape(len(x), -1)
    return flat @ params["head"], seen


def net(params, x):
    return residual_net(params, x)[0]


SHAPES = {
    "stem": (3, 3, 2, 5),
    "down": (1, 1, 5, 4),
    "up": (3, 3, 4, 5),
    "head": (80, 3),
}
PARAMS = {
    n: jnp.asarray(RNG.normal(size=s) * 0.3, jnp.float32) for n, s in SHAPES.items()
}


@pytest.fixture(scope="module")
def groups():
    return jaxprune.trace(net, PARAMS, IMAGES)


@pytest.fixture(scope="module")
def seen():
    """Group -> the activations of every site, numpy, ``[N, H, W, size]``."""
    found = quick_jit(residual_net)(PARAMS, IMAGES)[1]
    return jax.tree.map(lambda a: np.asarray(a, np.float64), found)


def loss_fn(params, batch):
    return jnp.square(net(params, batch["x"]) - batch["y"]).sum(1).mean()


PAIRS = [{"x": IMAGES[a:b], "y": LABELS[a:b]} for a, b in ((0, 3), (3, 6), (6, 8))]

SCORES = {
    "mean_activation": lambda g, p, x: scores.mean_activation(g, net, p, x),
    "apoz": lambda g, p, x: scores.apoz(g, net, p, x),
    "entropy": lambda g, p, x: scores.entropy(g, net, p, x, bins=4),
    "group_fisher": lambda g, p, x: scores.group_fisher(
        g, lambda p, x: jnp.square(net(p, x)).sum(1).mean(), p, x
    ),
    "geometric_median": lambda g, p, x: scores.geometric_median(g, p),
}


def permuted(params, order):
    rows = params["head"].reshape(4, 4, 5, 3)[:, :, order].reshape(80, 3)
    cut = {"stem": params["stem"][..., order], "up": params["up"][..., order]}
    return params | cut | {"down": params["down"][:, :, order], "head": rows}


@pytest.mark.parametrize("name", SCORES)
def test_every_score_of_units_keeps_the_contract(name, groups):
    compiled = quick_jit(lambda p: SCORES[name](groups, p, BATCHES[:1]))
    found = compiled(PARAMS)
    assert found.keys() == groups.keys()
    for path, values in found.items():
        assert values.shape == (groups[path].size,) and values.dtype == jnp.float32
        assert np.isfinite(values).all() and (values > 0).any() and (values >= 0).all()
    order = np.array([4, 2, 0, 3, 1])
    after = compiled(permuted(PARAMS, order))
    np.testing.assert_allclose(after["stem:3"], found["stem:3"][order], rtol=1e-3)
    np.testing.assert_allclose(after["down:3"], found["down:3"], rtol=1e-3)
    for values in compiled(jax.tree.map(jnp.zeros_like, PARAMS)).values():
        assert np.isfinite(values).all()


@pytest.mark.parametrize("name", SCORES)
def test_every_score_of_units_takes_bfloat16(name):
    def equal(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones((2, 1), jnp.bfloat16)}
    x = jnp.ones((2, 3), jnp.bfloat16)
    groups = jaxprune.trace(equal, params, x)
    data = {
        "mean_activation": lambda: scores.mean_activation(groups, equal, params, [x]),
        "apoz": lambda: scores.apoz(groups, equal, params, [x]),
        "entropy": lambda: scores.entropy(groups, equal, params, [x]),
        "group_fisher": lambda: scores.group_fisher(
            groups, lambda p, x: equal(p, x).sum(1).mean(), params, [x]
        ),
        "geometric_median": lambda: scores.geometric_median(groups, params),
    }
    expected = {"mean_activation": 3.0, "apoz": 1.0, "group_fisher": 4.5}
    (values,) = data[name]().values()
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, [expected.get(name, 0.0)] * 2)


def entries(seen, group):
    """Every activation of a group, ``[entries, size]``."""
    return np.concatenate([a.reshape(-1, a.shape[-1]) for a in seen[group]])


def test_means_and_zeros_are_those_of_all_that_layers_take_in(groups, seen):
    mean = scores.mean_activation(groups, net, PARAMS, BATCHES)
    nonzero = scores.apoz(groups, net, PARAMS, iter(BATCHES))
    for group in groups:
        every = entries(seen, group)
        np.testing.assert_allclose(mean[group], np.abs(every).mean(0), rtol=1e-5)
        np.testing.assert_allclose(nonzero[group], (every != 0).mean(0), rtol=1e-6)


def test_entropy_is_that_of_a_histogram(groups, seen):
    bins = 3
    found = scores.entropy(groups, net, PARAMS, BATCHES, bins=bins)
    for group, values in found.items():
        expected = np.zeros(groups[group].size)
        for site in seen[group]:
            for unit, pooled in enumerate(site.mean((1, 2)).T):
                share = np.histogram(pooled, bins)[0] / len(pooled)
                expected[unit] -= sum(p * np.log(p) for p in share if p) / len(
                    seen[group]
                )
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


def test_entropy_of_a_constant_channel_is_0():
    def biased(params, x):
        return jax.nn.relu(x @ params["a"] + params["b"][None]) @ params["c"]

    params = {
        "a": jnp.array([[0.0, 1.0]]),
        "b": jnp.array([0.7, 5.0]),
        "c": jnp.ones((2, 1)),
    }
    x = jnp.linspace(0.0, 1.0, 8)[:, None]
    groups = jaxprune.trace(biased, params, x)
    found = scores.entropy(groups, biased, params, [x], bins=8)["a:1"]
    np.testing.assert_allclose(found, [0.0, np.log(8)], rtol=1e-6)
    with pytest.raises(
        ValueError, match="bins must be a whole number of at least 2, got 1"
    ):
        scores.entropy(groups, biased, params, [x], bins=1)
    with pytest.raises(ValueError, match="batches is empty, so entropy"):
        scores.entropy(groups, biased, params, [])


def test_group_fisher_is_one_backward_pass_through_gates_of_ones(groups):
    """The published form: hand-written ``[N, size]`` gates, the summed loss."""

    def total(gates):
        out, _ = residual_net(PARAMS, IMAGES, gates)
        return jnp.square(out - LABELS).sum()

    ones = {"stem:3": jnp.ones((8, 5)), "down:3": jnp.ones((8, 4))}
    slopes = quick_jit(jax.grad(total))(ones)
    found = scores.group_fisher(groups, loss_fn, PARAMS, PAIRS)
    for group, slope in slopes.items():
        expected = np.square(np.asarray(slope, np.float64)).sum(0) / 16
        np.testing.assert_allclose(found[group], expected, rtol=1e-4)


def test_group_fisher_squares_after_coupled_sites_add_up(groups):
    """As vmap(grad) by a gate on the parameters that take the units in."""

    def of_example(gates, x, y):
        g = gates["stem:3"]
        rows = PARAMS["head"].reshape(16, 5, 3) * g[None, :, None]
        cut = {
            "down": PARAMS["down"] * g[None, None, :, None],
            "up": PARAMS["up"] * gates["down:3"][None, None, :, None],
            "head": rows.reshape(80, 3),
        }
        return jnp.square(net(PARAMS | cut, x[None]) - y[None]).sum()

    ones = {"stem:3": jnp.ones(5), "down:3": jnp.ones(4)}
    each = quick_jit(jax.vmap(jax.grad(of_example), (None, 0, 0)))(ones, IMAGES, LABELS)
    found = scores.group_fisher(groups, loss_fn, PARAMS, iter(PAIRS))
    for group, slope in each.items():
        expected = np.square(np.asarray(slope, np.float64)).sum(0) / 16
        np.testing.assert_allclose(found[group], expected, rtol=1e-4)
        batch_mean = np.square(np.asarray(slope, np.float64).mean(0)) / 2
        assert not np.allclose(found[group], batch_mean, rtol=0.1)


def test_group_fisher_of_a_dead_unit_is_0(groups):
    dead = PARAMS | {"up": PARAMS["up"].at[:, :, 2].set(0.0)}
    found = scores.group_fisher(groups, loss_fn, dead, PAIRS[:1])["down:3"]
    assert found[2] == 0 and (np.delete(found, 2) > 0).all()


@pytest.mark.parametrize("name", ["nnx_attention", "gru", "stacked_layers_remat"])
def test_group_fisher_follows_heads_scans_and_remat(name):
    """Against differences: a gate is a scaled row of the parameters that take it in."""
    built = MODELS[name].build()
    (x,) = built.inputs(3, 0)
    groups = jaxprune.trace(built.apply_fn, built.variables, x)
    gated = taps.gate(lambda v, x: built.apply_fn(v, x).sum(), groups)

    def loss(variables, x):
        return built.apply_fn(variables, x).sum()

    found = scores.group_fisher(groups, loss, built.variables, [x])
    ones = {name: jnp.ones(group.size) for name, group in groups.items()}
    along = quick_jit(lambda gates, x: gated(gates, built.variables, x))
    for name, values in found.items():
        up, down = (ones | {name: ones[name].at[0].add(step)} for step in (1e-2, -1e-2))
        each = [
            (along(up, x[n : n + 1]) - along(down, x[n : n + 1])) / 2e-2
            for n in range(3)
        ]
        expected = np.square(np.asarray(each, np.float64)).sum() / 6
        np.testing.assert_allclose(values[0], expected, rtol=3e-2, atol=1e-5)


def test_wanda_of_a_convolution_is_the_norm_of_every_patch_entry():
    found = scores.wanda(net, PARAMS, BATCHES)
    padded = np.pad(IMAGES.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    norms = np.zeros((3, 3, 2))
    for i, j, c in np.ndindex(norms.shape):
        norms[i, j, c] = np.sqrt((padded[:, i : i + 4, j : j + 4, c] ** 2).sum())
    expected = np.abs(PARAMS["stem"]) * norms[..., None]
    np.testing.assert_allclose(found["stem"], expected, rtol=1e-5)
    flat = np.asarray(quick_jit(residual_net)(PARAMS, IMAGES)[1]["stem:3"][1])
    norms = np.linalg.norm(flat.reshape(8, 80).astype(np.float64), axis=0)
    expected = np.abs(PARAMS["head"]) * norms[:, None]
    np.testing.assert_allclose(found["head"], expected, rtol=1e-5)


def test_wanda_sees_through_moves_scans_and_leaves_the_rest():
    def step(h, x, params):
        return jnp.tanh(x @ params["a"] + h @ params["b"].T.astype(jnp.float32))

    def fn(params, x):
        last, hs = jax.lax.scan(
            lambda h, x: (step(h, x, params), h),
            jnp.zeros((len(x), 4)),
            x.swapaxes(0, 1),
        )
        return (last * params["scale"][None]) @ jnp.square(params["squared"]), hs

    params = {
        "a": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
        "b": jnp.asarray(RNG.normal(size=(4, 4)), jnp.bfloat16),
        "scale": jnp.ones(4),
        "squared": jnp.ones((4, 2)),
    }
    x = RNG.normal(size=(2, 5, 3)).astype(np.float32)
    found = scores.wanda(fn, params, [x[:1], x[1:]])
    assert found["scale"] is None and found["squared"] is None
    norms = np.linalg.norm(x.reshape(10, 3), axis=0)
    np.testing.assert_allclose(
        found["a"], np.abs(params["a"]) * norms[:, None], rtol=1e-5
    )
    hidden = np.asarray(fn(params, x)[1]).reshape(10, 4)
    norms = np.linalg.norm(hidden, axis=0)
    expected = np.abs(np.asarray(params["b"], np.float32)) * norms[None]
    np.testing.assert_allclose(found["b"], expected, rtol=1e-2)
    with pytest.raises(ValueError, match="no parameter is multiplied with activations"):
        scores.wanda(lambda p, x: x * p["scale"].sum(), params, [x])


def test_a_grouped_convolution_takes_in_the_channels_of_a_group():
    def grouped(params, x):
        h = jax.nn.relu(conv(x, params["a"]))
        h = jax.lax.conv_general_dilated(
            h, params["b"], (1, 1), "VALID", feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return jax.nn.relu(h).mean((1, 2)) @ params["c"]

    shapes = {"a": (1, 1, 2, 6), "b": (1, 1, 3, 4), "c": (4, 2)}
    params = {
        n: jnp.asarray(RNG.normal(size=s), jnp.float32) for n, s in shapes.items()
    }
    groups = jaxprune.trace(grouped, params, IMAGES)
    found = scores.mean_activation(groups, grouped, params, [IMAGES])
    h = np.abs(np.asarray(jax.nn.relu(conv(IMAGES, params["a"])))).mean((0, 1, 2))
    inner = [name for name in groups if groups[name].members[-1].path == "b"]
    assert [groups[name].size for name in inner] == [3]  # one channel of each group
    np.testing.assert_allclose(found[inner[0]], h.reshape(2, 3).mean(0), rtol=1e-5)


def test_groups_without_an_activation_are_refused():
    def gathered(params, x):
        return (jnp.square(params["a"]) @ params["b"]).sum() * x

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    groups = jaxprune.trace(gathered, params, jnp.ones(2))
    with pytest.raises(ValueError, match=r"group a:0 is in no activation"):
        scores.apoz(groups, gathered, params, [jnp.ones(2)])
