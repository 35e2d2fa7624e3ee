"""The scan against a loop over groups and sparsities, one narrowed program each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import display, select
from jaxprune.recipes import plot_sensitivity
from jaxprune.scores import group_scores, magnitude

pytestmark = pytest.mark.once

SHAPES = {"w1": (6, 10), "b1": (10,), "w2": (10, 7), "w3": (7, 3)}


def net(params, x):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"][None])
    return jax.nn.relu(hidden @ params["w2"]) @ params["w3"]


def case():
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    x = rng.normal(size=(4, 8, 6)).astype(np.float32)
    y = rng.integers(3, size=(4, 8))
    groups = jaxprune.trace(net, params, x[0])
    scores = jax.device_get(group_scores(groups, magnitude(params)))
    return params, groups, scores, [(x[k], y[k]) for k in range(4)]


def accuracy(params, batch, fn=net):
    x, y = batch
    return (jnp.argmax(fn(params, x), axis=-1) == y).mean()


def margin(params, batch, fn=net):
    """Tells any two networks apart."""
    x, y = batch
    out = jax.nn.log_softmax(fn(params, x))
    return jnp.take_along_axis(out, y[:, None], axis=1).mean()


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_the_scan_is_the_loop_over_narrowed_programs(batch_size):
    params, groups, scores, data = case()
    points = [0.25, 0.5, 0.9]
    scan = jaxprune.sensitivity(
        margin,
        params,
        groups,
        scores,
        sparsities=points,
        data=data,
        batch_size=batch_size,
    )
    assert scan.groups == tuple(groups) == ("w1:1", "w2:1")
    for k, name in enumerate(groups):
        for j, sparsity in enumerate(points):
            keep = select.per_group(groups, scores, sparsity={name: sparsity})
            masks = jaxprune.expand_masks(groups, keep)
            small = jaxprune.slice_params(params, masks)
            narrowed = jaxprune.narrow(net, masks)
            expected = np.mean([margin(small, batch, narrowed) for batch in data])
            assert scan.value[k, j] == pytest.approx(expected, abs=1e-5)
            assert scan.sparsity[k, j] == pytest.approx(1 - keep[name].mean())
    whole = np.mean([margin(params, batch) for batch in data])
    assert scan.baseline == pytest.approx(whole, abs=1e-5)


def test_one_compiled_call_for_all_cuts_and_batches():
    params, groups, scores, data = case()
    traced = []

    def metric(params, batch):
        traced.append(1)
        return accuracy(params, batch)

    jaxprune.sensitivity(metric, params, groups, scores, data=data)
    assert len(traced) <= 2, "a remainder of the batch of cuts is traced once more"


def test_the_largest_sparsity_within_a_drop():
    scan = jaxprune.Sensitivity(
        ("a", "b", "c"),
        np.array([[0.2, 0.4, 0.6]] * 3),
        np.array([[0.9, 0.8, 0.1], [0.5, 0.9, 0.9], [0.95, 0.93, 0.91]]),
        0.92,
    )
    # b recovers, but not before it has lost too much.
    assert scan.within(0.03) == {"a": 0.2, "b": 0.0, "c": 0.6}
    assert scan.within(0.2) == {"a": 0.4, "b": 0.0, "c": 0.6}
    params, groups, scores, _ = case()
    shares = {"w1:1": 0.2, "w2:1": 0.0}
    keep = select.per_group(groups, scores, sparsity=shares)
    assert {n: int(k.sum()) for n, k in keep.items()} == {"w1:1": 8, "w2:1": 7}


def test_limits_and_patterns_of_the_selection_hold():
    params, groups, scores, data = case()
    scan = jaxprune.sensitivity(
        accuracy,
        params,
        groups,
        scores,
        sparsities=[0.5, 1.0],
        data=data,
        only="w1*",
        max_sparsity=0.7,
    )
    assert scan.groups == ("w1:1",)
    np.testing.assert_allclose(scan.sparsity, [[0.5, 0.7]])


def test_bad_input_is_refused():
    params, groups, scores, data = case()
    with pytest.raises(
        ValueError,
        match=r"must be one or more numbers in ascending order, got \[0.5, 0.1\]",
    ):
        jaxprune.sensitivity(accuracy, params, groups, scores, sparsities=[0.5, 0.1])
    with pytest.raises(ValueError, match="data has no batches"):
        jaxprune.sensitivity(accuracy, params, groups, scores, data=[])
    with pytest.raises(ValueError, match="scores have no entry for the group w2:1"):
        jaxprune.sensitivity(accuracy, params, groups, {"w1:1": scores["w1:1"]})


def test_its_plot_shows_every_group_from_the_baseline_on():
    scan = jaxprune.Sensitivity(
        ("a", "b"), np.array([[0.2, 0.4]] * 2), np.array([[0.9, 0.8], [0.7, 0.5]]), 0.92
    )
    figure = display.new_figure()
    (axes,) = figure.axes
    plot_sensitivity(axes, scan, ["#0067a5", "#f38400"])
    lines = axes.get_lines()
    assert [line.get_label() for line in lines[:2]] == ["a", "b"]
    np.testing.assert_allclose(lines[0].get_xdata(), [0.0, 0.2, 0.4])
    np.testing.assert_allclose(lines[1].get_ydata(), [0.92, 0.7, 0.5])
    assert "<svg" in display.as_svg(figure, "sensitivity of two groups")
