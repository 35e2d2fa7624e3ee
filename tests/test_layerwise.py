"""LASSO channel pruning, ThiNet and pruning with compensation, layer by layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import recipes

pytestmark = pytest.mark.once

RNG = np.random.default_rng(3)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def net(params, x):
    x = jax.nn.relu(x @ params["w1"] + params["b1"][None])
    x = jax.nn.relu(x @ params["w2"] + params["b2"][None])
    return x @ params["w3"] + params["b3"][None]


SIZES = (5, 12, 10, 3)
PARAMS = {f"w{k}": normal(*SIZES[k - 1 : k + 1]) for k in (1, 2, 3)}
PARAMS |= {f"b{k}": normal(SIZES[k]) for k in (1, 2, 3)}
X = normal(300, 5)
GROUPS = jaxprune.trace(net, PARAMS, X, roles=True)


def error(variables):
    return float(np.square(net(variables, X) - net(PARAMS, X)).mean())


@pytest.mark.parametrize(
    ("method", "share"), [("compensation", 0.6), ("lasso", 0.6), ("thinet", 1.0)]
)
def test_a_recipe_keeps_its_count_and_loses_less_than_the_cut(method, share):
    found = recipes.reconstruct(
        GROUPS, net, PARAMS, [X[:150], X[150:]], sparsity=0.5, method=method
    )
    assert {n: int(k.sum()) for n, k in found.keep.items()} == {"w1:1": 6, "w2:1": 5}
    cut = jaxprune.apply_masks(PARAMS, found.masks)
    assert error(found.variables) < share * error(cut)
    small = jaxprune.slice_params(found.variables, found.masks)
    made = jaxprune.narrow(net, found.masks)(small, X)
    np.testing.assert_allclose(made, net(found.variables, X), rtol=1e-4, atol=1e-4)


def test_thinet_is_the_loop_over_samples_and_its_scales_are_least_squares():
    found = recipes.reconstruct(
        GROUPS, net, PARAMS, [X], sparsity={"w2:1": 0.5}, method="thinet"
    )
    hidden = np.maximum(X @ PARAMS["w1"] + PARAMS["b1"], 0)
    hidden = np.maximum(hidden @ PARAMS["w2"] + PARAMS["b2"], 0).astype(np.float64)
    parts = hidden[:, :, None] * PARAMS["w3"]  # [rows, units, outputs]
    gone: list[int] = []
    for _ in range(5):
        open_units = [u for u in range(10) if u not in gone]
        lost = [np.square(parts[:, [*gone, u]].sum(1)).sum() for u in open_units]
        gone.append(open_units[int(np.argmin(lost))])
    kept = ~np.isin(np.arange(10), gone)
    np.testing.assert_array_equal(found.keep["w2:1"], kept)
    rows = parts[:, kept].transpose(0, 2, 1).reshape(-1, 5)
    scales = np.linalg.lstsq(rows, parts.sum(1).ravel(), rcond=None)[0]
    expected = PARAMS["w3"][kept] * scales[:, None]
    np.testing.assert_allclose(found.variables["w3"][kept], expected, rtol=1e-3)


def test_lasso_with_its_fit_loses_less_than_a_cut_by_norm_with_the_same_fit():
    found = recipes.reconstruct(
        GROUPS, net, PARAMS, [X], sparsity={"w2:1": 0.5}, method="lasso"
    )
    l1 = jaxprune.group_scores(
        GROUPS, jaxprune.scores.magnitude(PARAMS), reduce="l1", members="producers"
    )
    keep = jaxprune.select.per_group(GROUPS, l1, sparsity={"w2:1": 0.5})
    masks = jaxprune.expand_masks(GROUPS, keep)
    refit = jaxprune.compensate(GROUPS, net, PARAMS, masks, [X])
    assert error(found.variables) <= error(refit)


def test_layers_see_what_the_pruned_ones_before_them_make():
    """The last layer is the least squares fit on what is left before it."""
    found = recipes.reconstruct(GROUPS, net, PARAMS, [X], sparsity=0.5, ridge=1e-9)
    missing = np.asarray(net(PARAMS, X) - net(found.variables, X), np.float64)
    v = found.variables
    hidden = np.maximum(X @ v["w1"] + v["b1"], 0)
    hidden = np.maximum(hidden @ v["w2"] + v["b2"], 0)[:, found.keep["w2:1"]]
    np.testing.assert_allclose(missing.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(missing.T @ hidden / len(X), 0, atol=3e-3)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="stem")(x)
        x = x + nn.Conv(6, (3, 3), name="up")(
            nn.relu(nn.Conv(8, (3, 3), name="down")(x))
        )
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


def test_streams_that_several_layers_read_and_the_search_for_a_drop():
    """CP4: the metric does not fall by more than is allowed, on the data of the search."""
    model, x = Residual(), normal(24, 6, 6, 2)
    variables = model.init(jax.random.key(0), x)

    def apply_fn(variables, x):
        return model.apply(variables, x)

    groups = jaxprune.trace(apply_fn, variables, x, roles=True)
    before = apply_fn(variables, x)
    run = jax.jit(apply_fn)

    def evaluate(variables):
        return -jnp.square(run(variables, x) - before).mean() / before.var()

    found = recipes.search_with_compensation(
        groups, apply_fn, variables, [x], evaluate, drop=0.05, steps=3
    )
    assert len(found.metrics) == 1 + len(groups) and found.metrics[0] == 0
    assert float(evaluate(found.variables)) == pytest.approx(
        found.metrics[-1], abs=1e-5
    )
    assert found.metrics[-1] >= -0.05
    assert sum((~kept).sum() for kept in found.keep.values()) > 0
    nothing = recipes.search_with_compensation(
        groups, apply_fn, variables, [x], evaluate, drop=0.0, steps=1, max_sparsity=0.9
    )
    assert nothing.metrics[-1] == 0


def mixed(p, x):
    """What every head makes of its values, side by side: ``[..., heads, features]``."""
    q, k, v = (jnp.einsum("btd,dhf->bthf", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthf,bshf->bhts", q, k) / 2)
    return jnp.einsum("bhts,bshf->bthf", weights, v)


def attention(p, x):
    return jnp.einsum("bthf,hfn->btn", mixed(p, x), p["o"]) + p["b"][None, None]


def test_values_of_attention_are_ranked_as_by_brute_force():
    """A unit is a position of the values in every head: blocks of two inputs."""
    p = {name: normal(4, 2, 5) for name in "qkv"} | {"o": normal(2, 5, 3)}
    p["b"], x = normal(3), normal(9, 6, 4)
    groups = jaxprune.trace(attention, p, x, roles=True)
    (name,) = [
        n
        for n, g in groups.items()
        if any((m.path, m.axis) == ("o", 1) for m in g.members)
    ]
    found = recipes.reconstruct(groups, attention, p, [x], sparsity={name: 0.6})
    heads = np.asarray(mixed(p, x), np.float64).reshape(-1, 2, 5)
    heads -= heads.mean(0)
    outputs = np.einsum("rhf,hfn->rn", heads, p["o"].astype(np.float64))

    def loss(units):
        rows = heads[:, :, units].reshape(len(heads), -1)
        return np.square(outputs - rows @ np.linalg.lstsq(rows, outputs)[0]).sum()

    first = min(range(5), key=lambda u: loss([u]))
    second = min(set(range(5)) - {first}, key=lambda u: loss([first, u]))
    assert set(np.flatnonzero(found.keep[name])) == {first, second}
    missing = attention(found.variables, x) - attention(p, x)
    error = np.square(np.asarray(missing, np.float64)).sum()
    assert error == pytest.approx(loss([first, second]), rel=1e-3)


def test_sharded_variables_are_reconstructed_where_they_lie():
    devices = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    specs = {"w1": spec(None, "model"), "w2": spec("model"), "w3": spec("model")}
    place = {n: jax.sharding.NamedSharding(devices, s) for n, s in specs.items()}
    params = {n: jax.device_put(w, place.get(n)) for n, w in PARAMS.items()}
    share = {"w2:1": 0.5}
    found, plain = (
        recipes.reconstruct(GROUPS, net, p, [X], sparsity=share)
        for p in (params, PARAMS)
    )
    np.testing.assert_array_equal(found.keep["w2:1"], plain.keep["w2:1"])
    for name, leaf in plain.variables.items():
        np.testing.assert_allclose(found.variables[name], leaf, rtol=1e-3, atol=1e-4)
    for name, where in place.items():
        assert found.variables[name].sharding == where


def test_what_cannot_be_reconstructed_is_refused():
    with pytest.raises(ValueError, match="method must be one of .* did you mean lasso"):
        recipes.reconstruct(GROUPS, net, PARAMS, [X], sparsity=0.5, method="laso")
    with pytest.raises(ValueError, match="the group 'w9:1', which does not exist"):
        recipes.reconstruct(GROUPS, net, PARAMS, [X], sparsity={"w9:1": 0.5})
    with pytest.raises(ValueError, match="is an iterator .generator. that is empty"):
        recipes.reconstruct(GROUPS, net, PARAMS, (x for x in [X]), sparsity=0.5)
    with pytest.raises(ValueError, match="batches is empty"):
        recipes.reconstruct(GROUPS, net, PARAMS, [], sparsity=0.5)
    with pytest.raises(ValueError, match="drop must be at least 0"):
        recipes.search_with_compensation(
            GROUPS, net, PARAMS, [X], lambda v: 0.0, drop=-1.0
        )

    def gram(params, x):
        return (x @ params["q"]) @ (x @ params["k"]).T

    params = {"q": normal(5, 4), "k": normal(5, 4)}
    groups = jaxprune.trace(gram, params, X, roles=True)
    with pytest.raises(ValueError, match="q:1 cannot be reconstructed: k reads it oth"):
        recipes.reconstruct(groups, gram, params, [X], sparsity={"q:1": 0.5})
