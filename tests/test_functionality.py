"""Units that do the same: images, contribution, clusters, and what replaces what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import Page, check_alone

import jaxprune
from jaxprune import display, recipes, scores
from jaxprune.select import clusters
from jaxprune.statistics import taps

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def hidden(params, x):
    numbers = ("NWC", "WIO", "NWC")
    made = jax.lax.conv_general_dilated(
        x, params["a"], (1,), "VALID", dimension_numbers=numbers
    )
    return jnp.tanh(made)


def readout(params, made):
    return jnp.einsum("btc,tcn->bn", made, params["b"])


def net(params, x):
    return readout(params, hidden(params, x))


# Filters 4 and 5 are those of 1 and 2 again, at other sizes of their readers.
PARAMS = {"a": normal(3, 2, 6), "b": normal(5, 6, 3)}
PARAMS["a"][:, :, 4:] = PARAMS["a"][:, :, 1:3]
X, Y = normal(5, 7, 2), normal(5, 3)
GROUPS = jaxprune.trace(net, PARAMS, X, roles=True)
NAME = "a:2"


def loss(params, batch):
    x, y = batch
    return jnp.square(net(params, x) - y).sum(1).mean()


def test_images_are_those_of_a_loop_of_gradient_steps():
    found = taps.exciting_inputs(
        net, GROUPS, PARAMS, X, key=jax.random.key(1), steps=3, rate=0.5, together=4
    )
    starts = jax.random.normal(jax.random.key(1), (6, 1, 7, 2))
    for unit in (0, 3):
        x = starts[unit]
        for _ in range(3):
            slope = jax.grad(lambda x, k=unit: hidden(PARAMS, x)[..., k].mean())(x)
            x = x + 0.5 * slope / jnp.sqrt(jnp.square(slope).mean())
        np.testing.assert_allclose(found[NAME][unit], x[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="example has dtype int64; ascent needs"):
        taps.exciting_inputs(
            net, GROUPS, PARAMS, np.zeros((1, 7, 2), int), key=jax.random.key(0)
        )


def test_contribution_is_the_mean_norm_of_the_gradient_by_a_map():
    batches = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    found = scores.contribution(GROUPS, loss, PARAMS, batches, progress=False)

    def of_map(made, y):
        return jnp.square(readout(PARAMS, made[None])[0] - y).sum()

    each = [
        np.linalg.norm(jax.grad(of_map)(hidden(PARAMS, x[None])[0], y), axis=0)
        for x, y in zip(X, Y, strict=True)
    ]
    np.testing.assert_allclose(found[NAME], np.mean(each, 0), rtol=1e-5)


def test_contribution_follows_scans():
    def turned(params, x):
        def step(carry, _):
            return jnp.tanh(carry @ params["w"]), None

        return jax.lax.scan(step, x @ params["v"], None, 2)[0] @ params["u"]

    params = {"v": normal(3, 4), "w": normal(4, 4), "u": normal(4, 1)}
    x = normal(2, 3)
    groups = jaxprune.trace(turned, params, x)
    (name,) = groups
    found = scores.contribution(
        groups, lambda p, x: turned(p, x).mean(), params, [x], progress=False
    )

    def shifted(shifts, x):  # what every product takes in, changed by itself
        h = x @ params["v"]
        for shift in shifts[:2]:
            h = jnp.tanh((h + shift[None]) @ params["w"])
        return ((h + shifts[2][None]) @ params["u"]).mean()

    slopes = [jax.grad(shifted)(jnp.zeros((3, 4)), row[None]) for row in x]
    expected = np.mean([np.sqrt(np.square(s).sum(0)) for s in slopes], 0)
    np.testing.assert_allclose(found[name], expected, rtol=1e-5)


def test_planted_twins_share_a_cluster_and_every_cluster_keeps_a_unit():
    batches = [(X, Y)]
    found = recipes.functionality(
        GROUPS,
        net,
        loss,
        PARAMS,
        X,
        batches,
        key=jax.random.key(0),
        sparsity=1 / 3,
        count=4,
        steps=60,
        progress=False,
    )
    ids, keep, felt = found.clusters[NAME], found.keep[NAME], found.contribution[NAME]
    assert ids[1] == ids[4] and ids[2] == ids[5] and len(set(ids.tolist())) == 4
    assert set(ids[keep].tolist()) == set(ids.tolist()) and keep.sum() == 4
    for cluster in set(ids.tolist()):
        own = np.flatnonzero(ids == cluster)
        assert keep[own[np.argmax(felt[own])]]


def test_images_go_into_the_report(tmp_path):
    images = {NAME: RNG.normal(size=(6, 1, 5, 5, 1))}
    ids, keep = {NAME: np.array([0, 1, 2, 0, 1, 2])}, {NAME: np.arange(6) < 3}
    figure = display.functions_figure(images, ids, keep)
    frames = [
        (axes.get_title(), axes.spines["left"].get_edgecolor()[1] > 0.3)
        for axes in figure.axes
        if axes.get_images()
    ]
    assert frames == [(str(k), kept) for k in range(3) for kept in (True, False)]
    pruned = jaxprune.prune(net, PARAMS, X, sparsity=0.5)
    path = tmp_path / "report.html"
    pruned.report(path, latency=False, figures={"What filters look for": figure})
    page = Page(path.read_text())
    check_alone(page)
    assert page.tags.count("image") == 6 and "What filters look for" in page.text
    with pytest.raises(
        ValueError, match=r"images\[a:2\] have the shape \(7, 2, 1, 1\)"
    ):
        display.functions_figure({NAME: np.ones((6, 7, 2, 1, 1))}, ids, keep)


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_a_cut_within_clusters_is_the_best_of_all_with_these_counts(gone):
    ids = np.array([0, 0, 0, 1, 1, 2])
    values = np.array([0.3, 0.1, 0.2, 0.6, 0.5, 0.05])
    keep = clusters.within_clusters(
        GROUPS, {NAME: values}, {NAME: ids}, sparsity=gone / 6
    )[NAME]
    expected = {1: [1], 2: [1, 4], 3: [1, 2, 4]}[gone]
    assert np.flatnonzero(~keep).tolist() == expected


def test_the_elbow_finds_what_was_planted():
    middles = np.array([[0.0, 9.0], [9.0, 0.0], [-9.0, -9.0]])
    groups = jaxprune.trace(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
        {"a": normal(2, 24), "b": normal(24, 1)},
        normal(1, 2),
    )
    rows = middles[np.arange(24) % 3] + 0.1 * RNG.normal(size=(24, 2))
    ids = clusters.by_features(groups, {"a:1": rows})["a:1"]
    np.testing.assert_array_equal(ids, np.arange(24) % 3)
    few = clusters.by_features(groups, {"a:1": rows}, most={"a:1": 2})["a:1"]
    assert len(set(few.tolist())) == 2


def test_what_does_not_fit_is_refused():
    values, ids = {NAME: np.arange(6.0)}, {NAME: np.arange(6)}
    with pytest.raises(ValueError, match="a:2 is to lose 3 of 6 units, but it has 6"):
        clusters.within_clusters(GROUPS, values, ids, sparsity=0.5)
    with pytest.raises(ValueError, match="a:2 has no clusters; leave it out"):
        clusters.within_clusters(GROUPS, values, {}, sparsity={NAME: 0.5})
    with pytest.raises(ValueError, match=r"clusters\[a:2\] has shape \(2,\)"):
        clusters.within_clusters(GROUPS, values, {NAME: ids[NAME][:2]}, sparsity=0.5)
    with pytest.raises(ValueError, match=r"features\[a:2\] has 2 rows, but the group"):
        clusters.by_features(GROUPS, {NAME: np.ones((2, 1))})
    with pytest.raises(ValueError, match=r"features\[a:2\] are not finite"):
        clusters.by_features(GROUPS, {NAME: np.full((6, 1), np.nan)})
    with pytest.raises(
        ValueError, match="count of a:2 must be 1 to 6, its units, got 7"
    ):
        clusters.by_features(GROUPS, {NAME: np.ones((6, 1))}, count=7)


def test_of_alike_units_the_one_with_the_largest_score_stays():
    ids = {NAME: np.array([0, 1, 2, 3, 1, 2])}
    large = {NAME: np.array([1.0, 1.0, 5.0, 1.0, 3.0, 5.0])}
    merged = jaxprune.merge(PARAMS, GROUPS, ids, large)
    kept = merged.masks["a"].reshape(-1, 6).any(0)
    assert np.flatnonzero(kept).tolist() == [0, 2, 3, 4]
    np.testing.assert_array_equal(merged.variables["a"], PARAMS["a"][..., kept])
    made = jaxprune.narrow(net, merged.masks)(merged.variables, X)
    np.testing.assert_allclose(made, net(PARAMS, X), atol=1e-5)
    with pytest.raises(ValueError, match=r"scores\[a:2\] must be 6 finite numbers"):
        jaxprune.merge(PARAMS, GROUPS, ids, {NAME: np.ones(5)})
