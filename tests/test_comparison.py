"""The study at equal weight decay: its control, its choices, its page."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.batch_bridgeout import comparison, comparison_report, shuffled
from experiments.batch_bridgeout.comparison import Cell
from experiments.harness import noisy_nets
from experiments.harness.methods import Hyper, filter_norms

pytestmark = pytest.mark.once

HYPER = Hyper(0.1, 0.0, rate=0.5, target=0.5, q=1.5)


def test_pooling_is_that_of_flax():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)

    def loss(pool, x):
        return jnp.sum(pool(x) ** 3)

    def flax_pool(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    np.testing.assert_array_equal(noisy_nets.pooled(x), flax_pool(x))
    ours, theirs = (
        jax.grad(loss, 1)(pool, x) for pool in (noisy_nets.pooled, flax_pool)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_shuffled_targets_are_as_many_but_not_the_weak_ones():
    """At rate 0.5 the noise is +-|w|^(q/2) on the targets: half of each filter."""
    w = np.random.default_rng(0).normal(size=(3, 3, 40, 30)).astype(np.float32)
    params = {"conv1": {"kernel": w}, "head": {"kernel": w[0, 0]}}
    noisy = shuffled.shuffled_noise(params, jax.random.key(0), HYPER)
    np.testing.assert_array_equal(noisy["head"]["kernel"], w[0, 0])
    noise = np.asarray(noisy["conv1"]["kernel"]) - w
    size = np.abs(w) ** 0.75
    hit = noise != 0
    np.testing.assert_allclose(np.abs(noise)[hit], size[hit], rtol=1e-3)
    np.testing.assert_array_equal(hit, np.broadcast_to(hit[0, 0], hit.shape))
    np.testing.assert_array_equal(hit[0, 0].sum(0), 20)
    norms = np.sqrt(np.square(w).sum((0, 1)))
    weak = norms < np.sort(norms, axis=0)[20]
    # Chance is a half; targets that are not shuffled would agree everywhere.
    assert 0.4 < (weak == hit[0, 0]).mean() < 0.6


def test_in_their_order_the_targets_are_the_weak_inputs():
    w = np.random.default_rng(1).normal(size=(3, 3, 8, 5)).astype(np.float32)
    norms = np.sqrt(np.square(w).sum((0, 1), keepdims=True))
    weak = norms < np.sort(norms, axis=2)[:, :, [6]]
    found = shuffled.permuted_targets(jnp.asarray(w), 0.75, np.arange(8))
    np.testing.assert_array_equal(found, weak)
    grey = shuffled.permuted_targets(jnp.asarray(w[:, :, :1]), 0.75, np.arange(9))
    taps = np.abs(w[:, :, :1])
    order = np.sort(taps.reshape(9, 5), axis=0)[6]
    np.testing.assert_array_equal(found.shape, (1, 1, 8, 5))
    np.testing.assert_array_equal(grey, taps < order)


def test_a_weight_without_gradient_shrinks_by_the_exposure():
    steps, rate = 4000, 0.1  # in fewer steps momentum lags behind, and overshoots
    decay = comparison.decay(2.0, rate, steps)
    weight, velocity = 1.0, 0.0
    for step in range(steps):
        now = 0.5 * rate * (1 + np.cos(np.pi * step / steps))
        velocity = decay * weight + comparison.MOMENTUM * velocity
        weight -= now * (decay * weight + comparison.MOMENTUM * velocity)
    assert np.log(weight) == pytest.approx(-2.0, rel=0.03)


def test_enough_accuracy_uncut_comes_before_the_area():
    weak, good = {"accuracy": [0.9, 0.9, 0.9]}, {"accuracy": [0.96, 0.3, 0.1]}
    better = {"accuracy": [0.96, 0.5, 0.1]}
    ranked = sorted([good, weak, better], key=lambda t: comparison.merit(t, 0.95))
    assert ranked == [weak, good, better]


@pytest.fixture(scope="module")
def committed():
    return json.loads(comparison_report.RESULT.read_text())


def test_the_committed_study_is_that_of_the_program(committed):
    assert committed["settings"] == json.loads(json.dumps(comparison.settings()))
    chosen = {}
    for name, record in committed["records"].items():
        if name.startswith(("tried/", "compensated/")) or name == "matched":
            continue
        dataset, net, exposure, arm, _ = name.split("/")
        cell = Cell(dataset, net, float(exposure[1:]), arm)
        assert cell in comparison.CELLS
        hyper = Hyper(**record["hyper"])
        steps = (
            comparison.EPOCHS[dataset] * {"digits": 44, "fashion_mnist": 62}[dataset]
        )
        decay = comparison.decay(cell.exposure, comparison.peak(net), steps)
        assert hyper.weight_decay == pytest.approx(decay)
        numbers = (hyper.rate, hyper.target, hyper.q)
        assert chosen.setdefault(arm, numbers) == numbers  # the same everywhere
        assert record["area"] == pytest.approx(np.mean(record["one_shot"]))


def test_the_page_is_made_of_the_committed_results(committed):
    found = json.loads(comparison_report.DEFAULTS.read_text())
    page = comparison_report.page(committed, found)
    assert page == comparison_report.PAGE.read_text()
    cell = Cell("digits", "vgg", 14.5, "bridgeout")
    ours, theirs = (
        [committed["records"][c.seed(s)]["area"] for s in range(comparison.SEEDS)]
        for c in (cell, cell._replace(arm="weight_decay"))
    )
    assert f"| {np.mean(np.subtract(ours, theirs)):+.3f} [" in page


def test_as_it_comes_bridgeout_ends_within_three_points_of_plain_sgd():
    records = json.loads(comparison_report.DEFAULTS.read_text())["records"]
    settings: dict[str, list[float]] = {}
    for name, plain in records.items():
        if "/plain SGD/" in name:
            ours = records[name.replace("plain SGD", "as it comes")]
            settings.setdefault(name.rpartition("/")[0], []).append(ours - plain)
    assert len(settings) == 20
    for name, gains in settings.items():
        assert len(gains) == 5 and np.mean(gains) > -0.03, name


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("arm", ["bridgeout", "shuffled", "dropout"])
def test_one_training_is_looked_at_from_all_sides(arm, monkeypatch, data_dir):
    """A toy: what comes out, and that the same seed gives the same again."""
    monkeypatch.setenv("JAXPRUNE_DATA", str(data_dir))
    monkeypatch.setitem(comparison.EPOCHS, "digits", 1)
    monkeypatch.setattr(comparison, "FRACTIONS", (0.0, 0.5))
    monkeypatch.setattr(comparison, "TUNED_AT", (0.5,))
    monkeypatch.setattr(comparison, "BATCH", 256)
    monkeypatch.setitem(
        comparison.NETS,
        "toy",
        lambda **kw: noisy_nets.NoisyVGG(widths=(4, "M", 6), **kw),
    )
    cell = Cell("digits", "toy", 5.0, arm)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found, again = (comparison.judged(cell, (0.3, 0.75, 1.5), 0) for _ in range(2))
        here = comparison.bench("digits", "toy")
        variables = here.trained(cell, (0.3, 0.75, 1.5), 0)
    assert found == again
    assert [len(found[kind]) for kind in comparison_report.KINDS] == [2, 2, 2, 1]
    assert found["one_shot"][0] == found["fisher"][0]  # nothing is cut
    norms = filter_norms(here.subject.groups, variables["params"])
    assert {len(norm) for norm in norms.values()} == {4, 6}
