"""Second moments of the inputs of contractions, against loops in numpy."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune
from jaxprune.program._jaxprs import trace_program
from jaxprune.statistics import moments
from jaxprune.statistics._contractions import contractions

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


def normal(*shape, mean=0.0):
    return (RNG.normal(size=shape) + mean).astype(np.float32)


def check(one, rows):
    """Of every matrix the moments of its rows, counted in float64."""
    rows = np.asarray(rows, np.float64)
    assert one.count == rows.shape[1]
    np.testing.assert_allclose(one.mean, rows.mean(1), rtol=2e-6, atol=1e-6)
    second = np.einsum("krd,kre->kde", rows, rows) / rows.shape[1]
    np.testing.assert_allclose(one.second, second, rtol=2e-5, atol=2e-6)


def patches(x, kernel_shape, stride, padding, dilation=1, groups=1):
    """Every patch of ``[n, h, w, c]``, channels first, by a loop over places."""
    h, w, into, _ = kernel_shape
    (a, b), (c, d) = padding
    x = np.pad(x, ((0, 0), (a, b), (c, d), (0, 0)))
    tall, wide = (h - 1) * dilation + 1, (w - 1) * dilation + 1
    found = []
    for image in x:
        for i, j in itertools.product(
            range(0, image.shape[0] - tall + 1, stride),
            range(0, image.shape[1] - wide + 1, stride),
        ):
            seen = image[i : i + tall : dilation, j : j + wide : dilation]
            seen = seen.reshape(h, w, groups, into)
            found.append(seen.transpose(2, 3, 0, 1).reshape(groups, -1))
    return np.stack(found, 1)


def test_dense_layers_over_uneven_batches():
    def net(params, x):
        hidden = jax.nn.relu(x @ params["a"]["w"] + params["a"]["b"])
        return jnp.einsum("btd,nd->btn", hidden, params["out"])

    params = {
        "a": {"w": normal(3, 5), "b": normal(1, 1, 5)},
        "out": normal(2, 5),
    }
    batches = [normal(4, 2, 3, mean=30.0), normal(1, 2, 3)]
    groups = jaxprune.trace(net, params, batches[0])
    first, second = moments(net, params, iter(batches), groups=groups)
    assert (first.name, second.name) == ("a/w", "out")
    x = np.concatenate(batches).reshape(-1, 3)
    check(first, x[None])
    check(second, np.maximum(x @ params["a"]["w"] + params["a"]["b"][0, 0], 0)[None])
    assert first.units == {}
    assert second.units["a/w:1"].tolist() == [[0, 1, 2, 3, 4]]
    # The weights of a matrix are found where `at` says.
    np.testing.assert_array_equal(params["out"].ravel()[second.at[0]], params["out"].T)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [
        (1, ((1, 1), (1, 1)), 1, 1),
        (2, ((0, 1), (1, 0)), 1, 2),
        (1, ((2, 2), (2, 2)), 2, 4),
    ],
)
def test_convolutions_by_patches(stride, padding, dilation, groups):
    kernel, x = normal(3, 2, 4 // groups, 4), normal(2, 5, 4, 4)

    def conv(params, x):
        return lax.conv_general_dilated(
            x,
            params["w"],
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    [one] = moments(conv, {"w": kernel}, [x])
    rows = patches(x, kernel.shape, stride, padding, dilation, groups)
    check(one, rows)
    made = np.einsum("krd,kdn->rkn", rows, kernel.ravel()[one.at])
    expected = np.asarray(conv({"w": kernel}, x))
    np.testing.assert_allclose(made.reshape(-1, 4), expected.reshape(-1, 4), atol=1e-5)


def test_transposed_convolution():
    kernel, x = normal(3, 2, 3), normal(2, 4, 2)

    def conv(params, x):
        return lax.conv_transpose(
            x, params["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    [one] = moments(conv, {"w": kernel}, [x])
    matrix = kernel.ravel()[one.at[0]]
    out = np.asarray(conv({"w": kernel}, x), np.float64).reshape(-1, 3)
    np.testing.assert_allclose(one.mean[0] @ matrix, out.mean(0), atol=1e-6)
    second = matrix.T @ one.second[0] @ matrix
    np.testing.assert_allclose(second, out.T @ out / len(out), atol=1e-5)


def test_projections_of_attention():
    net = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    x = normal(2, 3, 4)
    variables = net.init(jax.random.key(0), x)

    def apply_fn(variables, x):
        return net.apply(variables, x)

    groups = jaxprune.trace(apply_fn, variables, x, roles=True)
    found = {one.name: one for one in moments(apply_fn, variables, [x], groups=groups)}
    assert set(found) == {
        f"params/{name}/kernel" for name in ("query", "key", "value", "out")
    }
    check(found["params/query/kernel"], x.reshape(1, -1, 4))
    read = jaxprune.taps.read(apply_fn, "out:input")
    _, notes = read(variables, x)
    check(found["params/out/kernel"], notes["out:input"].reshape(1, -1, 6))
    # Heads and the positions within them: every input is one of each.
    units = found["params/out/kernel"].units
    assert sorted(map(tuple, (np.array(list(units.values()))[:, 0].T).tolist())) == [
        (h, d) for h in range(2) for d in range(3)
    ]


def test_a_bank_of_experts_and_layers_under_a_scan():
    params = {"bank": normal(3, 4, 2), "layers": normal(5, 2, 2) / 2, "b": normal(5, 2)}

    def net(params, x):
        hidden = jnp.einsum("ebd,edf->ebf", x, params["bank"])

        def layer(h, own):
            w, b = own
            return jnp.tanh(h @ w.T + b[None]), None

        return lax.scan(layer, hidden.sum(0), (params["layers"], params["b"]))[0]

    x = normal(3, 6, 4)
    bank, layers = moments(net, params, [x])
    check(bank, x)
    h = np.einsum("ebd,edf->bf", x, params["bank"])
    rows = []
    for w, b in zip(params["layers"], params["b"], strict=True):
        rows.append(h)
        h = np.tanh(h @ w.T + b)
    check(layers, np.stack(rows))
    one = contractions(trace_program(net, params, x))["layers"]
    np.testing.assert_array_equal(
        one.kernel(params["layers"])[2], params["layers"][2].T
    )
    assert (
        one.bias.path == "b"
        and one.bias.at.tolist() == np.arange(10).reshape(5, 2).tolist()
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_a_recurrent_weight_is_met_at_every_step(reverse):
    params = {"w": normal(2, 2) / 2, "u": normal(4, 2, 2)}

    def net(params, x):
        def step(h, own):
            return jnp.tanh(h @ params["w"] + h @ own), h

        return lax.scan(step, x, params["u"], reverse=reverse)

    x = normal(3, 2)
    found = {one.name: one for one in moments(net, params, [x])}
    met = np.asarray(net(params, x)[1])
    check(found["w"], met.reshape(1, -1, 2))
    check(found["u"], met)


def test_biases_are_those_that_nothing_else_uses():
    def net(p, x):
        a = x @ p["a"] + p["shared"][None]
        b = x @ p["b"] + p["shared"][None]
        c = x @ p["c"] - p["mean"][None]
        d = x @ p["d"]
        e = x @ p["e"] + p["scalar"]
        return a, b, c, d + p["bias"][None], d, e

    names = "abcde"
    params = {name: normal(2, 3) for name in names}
    params |= {name: normal(3) for name in ("shared", "mean", "bias")}
    params["scalar"] = np.float32(1.0)
    found = contractions(trace_program(net, params, normal(4, 2)))
    biases = {name: found[name].bias and found[name].bias[::2] for name in names}
    assert biases == dict.fromkeys(names) | {"c": ("mean", -1)}


def test_what_else_uses_a_parameter_is_said():
    def tied(p, tokens):
        return jnp.tanh(p["embedding"][tokens]) @ p["embedding"].T

    found = contractions(trace_program(tied, {"embedding": normal(7, 3)}, np.arange(4)))
    assert "used by gather at test_moments.py" in found["embedding"].shared


def test_layers_are_chosen_and_split_into_passes():
    def net(params, x):
        for w in params:
            x = x @ w
        return x

    params, x = [normal(3, 3) for _ in range(3)], normal(5, 3)
    together = {one.name: one for one in moments(net, params, [x])}
    passes = moments(net, params, [x], memory=1, layers=["0", "[12]"])
    for one in passes:
        np.testing.assert_array_equal(one.second, together[one.name].second)
    with pytest.raises(ValueError, match="an iterator .* that is empty after one pass"):
        next(moments(net, params, iter([x]), memory=1))
    with pytest.raises(ValueError, match="no contraction reads .* 'w'; .* 0, 1, 2"):
        next(moments(net, params, [x], layers="w"))
    with pytest.raises(ValueError, match="batches is empty"):
        next(moments(net, params, []))


def test_sharded_batches_have_the_same_moments():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = normal(8, 3)
    [one] = moments(
        lambda p, x: x @ p["w"], {"w": normal(3, 2)}, [jax.device_put(x, spread)]
    )
    check(one, x[None])


def test_large_means_cost_no_digits():
    x = normal(400, 2) * 0.1 + 1000
    [one] = moments(lambda p, x: x @ p["w"], {"w": normal(2, 1)}, [x[:150], x[150:]])
    expected = np.cov(x.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(one.covariance[0], expected, rtol=2e-2, atol=2e-4)
