"""The study of centripetal SGD: one seed end to end, and its page from its results."""

import itertools
import json

import jax
import numpy as np
import pytest

from experiments.centripetal import report as centripetal_report
from experiments.centripetal import study as centripetal
from experiments.centripetal.study import ARMS, SHARES, Bench, Scale, Trainer
from experiments.harness.training import best
from jaxprune.data import DATASETS, Dataset

pytestmark = pytest.mark.once

COMMITTED = json.loads(centripetal_report.RESULT.read_text())
# 2 steps are enough where a single step pulls all the way.
TINY = Scale("mlp", (8, 8), 1, 1, 32, 5e-4, (0.1,), ((0.1, 3.0),))


def dark_and_bright():
    labels = np.arange(64, dtype=np.int32) % 2
    noise = np.random.default_rng(0).integers(0, 100, (64, 8, 8, 1))
    images = (noise + 150 * labels[:, None, None, None]).astype(np.uint8)
    return Dataset(DATASETS["digits"], images, labels)


def test_an_arm_is_trimmed_to_the_width_it_says():
    """And the merged net is that of the constructor at this width."""
    data = dark_and_bright()
    with jax.numpy_dtype_promotion("standard"):
        trainer = Trainer(Bench(TINY, data), data, data, 0, lambda: None)
        base = trainer.bench.init(1.0, 0)
        record = trainer.arm(
            "even", base, SHARES[1], {"learning_rate": 0.1, "strength": 3}
        )
        small = trainer._cut(base, SHARES[1])
        expected = trainer.bench.init(SHARES[1], 0)
    assert 0 <= record["accuracy"] <= 1
    assert record["changed predictions"] <= 64
    assert jax.tree.map(np.shape, small) == jax.tree.map(np.shape, expected)


def test_the_committed_runs_are_of_five_seeds_and_one_budget():
    assert set(COMMITTED) <= set(centripetal.SMALL)
    for run in COMMITTED.values():
        assert run["settings"]["seeds"] == 5
        assert run["machine"]["versions"]["jax"] and run["command"]
        for arm in ("dense", *ARMS):
            tried = run["records"][f"tune/{arm}"]
            assert len(tried) == 4
            assert run["hyper"][arm] == best(tried)


def test_trimming_was_free():
    """Not one prediction of one image changed, in any net, arm, width and seed."""
    for run, share in itertools.product(COMMITTED.values(), SHARES):
        for arm in ("centripetal", "redundant", "even", "imbalanced"):
            whole, small, changed, error = (
                centripetal.over_seeds(run, share, arm, what)
                for what in (
                    "before",
                    "accuracy",
                    "changed predictions",
                    "output error",
                )
            )
            assert whole == small
            assert max(changed) == 0
            assert max(error) < 1e-4


def test_the_page_is_made_of_the_committed_results():
    page = centripetal_report.PAGE.read_text()
    assert "\n".join(centripetal_report.page(COMMITTED)) == page
    for run, share, arm in itertools.product(COMMITTED.values(), SHARES, ARMS):
        values = centripetal.over_seeds(run, share, arm, "accuracy")
        assert f"{100 * np.mean(values):.1f} ±" in page


def test_the_best_try_is_accurate_then_sure():
    tries = [(0.9, 0.3, "less sure"), (0.9, 0.2, "best"), (0.8, 0.1, "less accurate")]
    named = [{"accuracy": a, "loss": b, "hyper": c} for a, b, c in tries]
    assert best(named) == "best"


def test_settings_of_the_paper():
    scale = centripetal.Config(dataset="cifar10").scale
    assert (scale.net, scale.epochs, scale.batch_size) == ("resnet56", 600, 64)
    assert scale.pulls == ((3e-2, 3e-3),)
    with pytest.raises(ValueError, match="--seeds must be at least 1, got 0"):
        centripetal.Config(seeds=0)
