"""Scores of odd numbers (tiny, huge, signed, complex) and odd leaves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quick_jit

import jaxprune
from jaxprune import scores
from jaxprune.scores._published import OF_UNITS

pytestmark = pytest.mark.once

BY_SIGN = ("sum", "mean", "max")


def two_layers(p, x):
    return jax.nn.relu(x @ p["w1"]) @ p["w2"]


def layers(scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"w1": (3, 6), "w2": (6, 2)}
    return {n: (rng.normal(size=s) * scale).astype(dtype) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def hidden():
    return jaxprune.trace(two_layers, layers(), jnp.ones((1, 3)))


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e20])
def test_norms_do_not_leave_the_range_of_their_numbers(scale, hidden):
    params, plain = layers(scale), layers()
    expected = scores.group_scores(hidden, plain)["w1:1"] * np.float32(scale)
    traced = quick_jit(lambda p: scores.group_scores(hidden, p))
    for found in (scores.group_scores(hidden, params), traced(params)):
        np.testing.assert_allclose(found["w1:1"], expected, rtol=1e-6)
    for normalize in ("lamp", "gaussian"):
        given = [scores.group_scores(hidden, p, normalize=normalize)["w1:1"]
                 for p in (params, plain)]  # fmt: skip
        np.testing.assert_allclose(*given, rtol=1e-4)
    given = [scores.geometric_median(hidden, p)["w1:1"] for p in (params, plain)]
    np.testing.assert_allclose(given[0] / np.float32(scale), given[1], rtol=1e-4)
    given = [scores.lamp(p)["w1"] for p in (params, plain)]
    np.testing.assert_allclose(*given, rtol=1e-5)


def test_one_tiny_unit_among_large_ones_has_its_norm(hidden):
    params = layers()
    for name, place in (("w1", np.s_[:, 1:3]), ("w2", np.s_[1:3])):
        params[name][place] *= np.float32(1e-24)
    wide = {n: w.astype(np.float64) for n, w in params.items()}
    expected = np.sqrt((wide["w1"] ** 2).sum(0) + (wide["w2"] ** 2).sum(1))
    traced = quick_jit(lambda p: scores.group_scores(hidden, p))
    for found in (scores.group_scores(hidden, params), traced(params)):
        np.testing.assert_allclose(found["w1:1"], expected, rtol=1e-6)


def test_the_norm_has_the_gradient_of_a_norm(hidden):
    slopes = jax.grad(lambda p: scores.group_scores(hidden, p)["w1:1"].sum())(layers())
    norms = scores.group_scores(hidden, layers())["w1:1"]
    np.testing.assert_allclose(slopes["w1"], layers()["w1"] / norms[None], rtol=1e-5)


def test_signed_scores_are_not_ranked_by_sign_unless_told_to(hidden):
    live_and_dead = {"w1": np.zeros((3, 6), np.float32), "w2": np.ones((6, 2)) * 0.0}
    live_and_dead["w1"][:, 0] = -2.0  # matters, and is negative
    for reduce in BY_SIGN:
        for kind in (np.asarray, jnp.asarray):
            given = jax.tree.map(
                lambda x, kind=kind: kind(x, np.float32), live_and_dead
            )
            with pytest.raises(ValueError, match=r"scores\[w1\] are negative for some"):
                scores.group_scores(hidden, given, reduce=reduce)
    found = scores.group_scores(hidden, live_and_dead, reduce="abs_of_sum")["w1:1"]
    assert found.argmax() == 0
    found = scores.group_scores(hidden, live_and_dead, reduce="signed_sum")["w1:1"]
    assert found.argmin() == 0


def test_every_score_of_weights_has_its_published_reduction(hidden):
    named = {n for n in dir(scores) if n.islower() and not n.startswith("_")}
    of_units = {"geometric_median", *OF_UNITS}
    tools = {"group_scores", "normalized"}
    # LAMP of units is a normalisation of their norms
    assert named - of_units - tools - {"lamp"} == set(scores.REDUCTIONS)
    for reduce in scores.REDUCTIONS.values():
        scores.group_scores(hidden, scores.magnitude(layers()), reduce=reduce)


def test_scalars_integers_keys_and_functions_have_their_one_rule():
    params = {
        "scale": np.array(-2.0, np.float32),
        "count": np.arange(3),
        "flag": np.array([True]),
        "key": jax.random.key(0),
        "activation": jax.nn.relu,
    }
    for score in (scores.l1, scores.l2, lambda p: scores.lp(p, 1.0)):
        found = score(params)
        assert found.pop("scale") == 2.0
        assert set(found.values()) == {None}
    assert set(scores.lamp(params).values()) == {None}
    found = scores.batch_norm_scale({"norm": {"scale": jnp.float32(-3.0)}})
    assert found["norm"]["scale"] == 3.0


TEXTS = np.array(["a", "b"])


@pytest.mark.parametrize("leaf", ["text", 3, 2.0, [1.0, 2.0], True, TEXTS])
def test_what_is_no_array_is_refused_by_path(leaf, hidden):
    match = r"params\[w(/0)?\] is a [\w <]+, not an array; convert numbers and lists"
    for score in (
        scores.l1,
        scores.lamp,
        lambda p: scores.random(p, jax.random.key(0)),
    ):
        with pytest.raises(TypeError, match=match):
            score({"w": leaf})
    with pytest.raises(TypeError, match=r"scores\[w1(/0)?\] is a "):
        scores.group_scores(hidden, {"w1": leaf})
    with pytest.raises(TypeError, match="shapes without values"):
        scores.l1({"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_a_group_of_integers_has_no_score(hidden):
    integers = jax.tree.map(lambda w: w.astype(np.int8), layers())
    with pytest.raises(ValueError, match="w1:1 has no score.*only leaves of floating"):
        scores.group_scores(hidden, integers)


def complex_net(p, x):
    return jnp.abs(x @ p["w1"]) @ p["w2"]


def test_complex_weights_count_with_their_absolute_values():
    parts = layers(), layers()
    w1 = (parts[0]["w1"] + 1j * parts[1]["w1"][::-1]).astype(np.complex64)
    params, x = {"w1": w1, "w2": parts[0]["w2"]}, jnp.ones((2, 3), jnp.complex64)
    groups = jaxprune.trace(complex_net, params, x)
    real = scores.magnitude(params)
    for reduce in ("l1", "l2"):
        expected = scores.group_scores(groups, real, reduce=reduce)["w1:1"]
        score = lambda p, r=reduce: scores.group_scores(groups, p, reduce=r)  # noqa: E731
        for found in (score(params), quick_jit(score)(params)):
            assert found["w1:1"].dtype == np.float32
            np.testing.assert_allclose(found["w1:1"], expected, rtol=1e-6)
    with pytest.raises(TypeError, match=r"scores\[w1\] are complex64.*cannot rank"):
        scores.group_scores(groups, params, reduce="mean")


def test_taylor_of_complex_weights_is_the_change_of_the_loss():
    w = np.array([[1 + 2j, -1 + 0.5j]], np.complex64)
    x = [jnp.array([[1 - 1j], [2 + 0.5j]], jnp.complex64)]

    def loss_fn(p, batch):
        return jnp.mean(jnp.abs(batch @ p["w"]) ** 2)

    found = scores.taylor(loss_fn, {"w": w}, x, form="signed", progress=False)["w"]
    # the loss is quadratic in each weight alone, so its slope is twice its share
    alone = [loss_fn({"w": w * np.eye(2, dtype=np.complex64)[k]}, x[0]) for k in (0, 1)]
    np.testing.assert_allclose(found[0], 2 * np.array(alone), rtol=1e-5)
    with pytest.raises(TypeError, match="w is complex64, but fisher is defined for"):
        scores.fisher(loss_fn, {"w": w}, x)


def test_modules_with_functions_among_their_leaves_are_scored():
    net = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    apply_fn = lambda m, x: jax.vmap(m)(x)  # noqa: E731
    x = jnp.ones((5, 3))
    groups = jaxprune.trace(apply_fn, net, x)
    loss_fn = lambda m, batch: jnp.mean(apply_fn(m, batch) ** 2)  # noqa: E731
    found = scores.taylor(loss_fn, net, [x], progress=False)
    assert found.activation is None and found.layers[0].weight.shape == (4, 3)
    assert scores.group_scores(groups, found, reduce="sum")
    assert scores.group_fisher(groups, loss_fn, net, [x], progress=False)
    # a tree of scores that could be called is not called
    cut = jaxprune.prune(apply_fn, net, x, sparsity=0.5, score=scores.l2(net))
    assert cut.variables.layers[0].weight.shape == (2, 3)
