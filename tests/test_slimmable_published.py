"""SP-Net with the paper's settings: schedules, crops, and the pipeline at toy size."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.slimmable import published
from jaxprune.models import VGG, cifar_resnet

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


def test_learning_rates_are_those_of_the_paper():
    rate = published.SETTINGS["imagenet2012", "resnet50"].base.schedule(10)
    found = [float(rate(10 * epoch + 1)) for epoch in (0, 29, 30, 50, 70, 80)]
    expected = [0.1, 0.1, 0.02, 0.004, 8e-4, 1.6e-4]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    rate = published.SETTINGS["imagenet2012", "mobilenet_v2"].joint.schedule(10)
    found = [float(rate(step)) for step in (0, 25, 50, 1500)]
    np.testing.assert_allclose(found, [0, 0.04, 0.08, 0], atol=1e-6)


@pytest.mark.parametrize("key", published.SETTINGS, ids="-".join)
def test_every_narrower_width_has_a_base_and_a_ratio(key):
    own = published.SETTINGS[key]
    assert len(own.bases) == len(own.ratios)
    assert list(own.bases) == sorted(own.bases, reverse=True)
    assert max(own.bases) <= own.widest
    assert own.net(10).num_classes == 10
    # Joint training can start from the widest base only if that is the widest net.
    assert not own.pretrained or own.bases[0] == own.widest


def test_crops_are_parts_of_the_image():
    """Of an image whose red is the column and whose green is the row."""
    columns, rows = np.meshgrid(np.arange(60), np.arange(40))
    image = np.stack([4 * columns, 4 * rows, 0 * rows], -1).astype(np.uint8)

    def places(crop):
        plain = (crop * published.STD + published.MEAN) * 255 / 4
        return plain[..., 0], plain[..., 1]

    x, y = places(published.middle_crop(image, 8))
    np.testing.assert_allclose([x.mean(), y.mean()], [29.5, 19.5], atol=0.2)
    np.testing.assert_allclose(np.ptp(y) * 8 / 7, 40 * 224 / 256, rtol=0.1)
    flipped = 0
    for _ in range(40):
        crop = published.random_crop(image, 8, RNG)
        assert crop.shape == (8, 8, 3) and crop.dtype == np.float32
        x, y = places(crop)
        steps = np.diff(x, axis=1)
        assert (steps > 0).all() or (steps < 0).all()
        flipped += (steps < 0).all()
        wide, high = np.ptp(x) * 8 / 7, np.ptp(y) * 8 / 7
        assert 0.06 < wide * high / 2400 <= 1.05
        assert 0.6 < wide / high < 1.5
    assert 8 < flipped < 32


def examples(number):
    return [
        (RNG.integers(0, 256, (9 + row % 3, 10, 3), np.uint8), row % 3)
        for row in range(number)
    ]


def toy(key, net, **changes):
    own = dataclasses.replace(published.SETTINGS[key], net=net, batch=8, **changes)
    return published.Streamed(own, 3, examples(16), examples(5), size=8, most=2)


def test_the_pipeline_runs_with_labels_smoothed_and_widths_that_nest():
    bench = toy(
        ("cifar10", "vgg"),
        lambda classes: VGG(classes, (8, "M", 8), use_bias=False),
        smoothing=0.1,
    )
    [_, labels] = next(bench.batches(1, 0))
    np.testing.assert_allclose(np.unique(labels), [0.1 / 3, 0.9 + 0.1 / 3], rtol=1e-5)
    scales = bench.init(0)["params"]["bn1"]["scale"]
    np.testing.assert_array_equal(scales, 0.5)
    with jax.numpy_dtype_promotion("standard"):  # the schedules of optax
        found = published.sp_net(bench, 0)
    assert len(found["accuracy"]) == len(found["widths"]) == 3
    assert all(round(5 * own) / 5 == own for own in found["accuracy"])
    wide, middle, narrow = found["widths"]
    assert wide == dict.fromkeys(wide, 8)
    assert all(narrow[name] <= middle[name] <= 8 for name in wide)
    assert sum(narrow.values()) < sum(middle.values()) < 16


def test_writers_of_streams_are_pruned_by_themselves_where_the_paper_does(monkeypatch):
    bench = toy(
        ("cifar10", "resnet50"),
        lambda classes: cifar_resnet(
            8, num_classes=classes, widths=(4, 6, 8), shortcut="projection"
        ),
    )

    def untrained(self, slim, *_):
        rng = np.random.default_rng(0)
        return jax.tree.map(lambda x: x + rng.uniform(size=x.shape), slim.variables)

    monkeypatch.setattr(published.Streamed, "fit", untrained)
    monkeypatch.setattr(published.Streamed, "accuracies", lambda *_: [0.0] * 3)
    widths = published.sp_net(bench, 0)["widths"]
    groups = bench.traced(zero_padded=True).groups
    writers = [name for name, group in groups.items() if group.stream]
    assert writers
    for own in widths:
        for name in writers:
            assert own[name] <= own[groups[name].stream]
    assert any(
        own[name] < own[groups[name].stream] for own in widths for name in writers
    )
