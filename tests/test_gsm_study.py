"""The study of global sparse momentum: one seed end to end, and the committed page."""

import json

import jax
import numpy as np
import pytest

from experiments.gsm import report as gsm_report
from experiments.gsm import study as gsm
from experiments.gsm.study import (
    ARMS,
    FACTORS,
    TICKETS,
    Bench,
    Scale,
    Trainer,
    hyper_of,
)
from experiments.harness.training import best
from jaxprune.data import DATASETS, Dataset
from jaxprune.models import LeNet300

pytestmark = pytest.mark.once

COMMITTED = json.loads(gsm_report.RESULT.read_text())
HYPER = hyper_of(0.05, 1e-2, 0.9)
TINY = Scale(
    nets={"tiny": lambda num_classes: LeNet300(num_classes, widths=(16,))},
    pretraining=2,
    epochs=4,
    batch_size=32,
    usual=HYPER,
    sparse=(HYPER,),
    rates=(0.05,),
)


@pytest.fixture(scope="module")
def trainer():
    """Two classes told apart by brightness, a net of one hidden layer."""
    labels = np.arange(128, dtype=np.int32) % 2
    noise = np.random.default_rng(0).integers(0, 100, (128, 8, 8, 1))
    images = (noise + 150 * labels[:, None, None, None]).astype(np.uint8)
    data = Dataset(DATASETS["digits"], images, labels)
    with jax.numpy_dtype_promotion("standard"):
        return Trainer(Bench(TINY, "tiny", data), data, data, 0, lambda: None)


def test_every_arm_keeps_its_budget(trainer):
    with jax.numpy_dtype_promotion("standard"):
        base = trainer.dense()
        kept = {arm: trainer.arm(arm, base, 8, HYPER) for arm in ARMS}
        ticket = trainer.ticket(kept["gsm"][1])
    weights = trainer.bench.weights
    assert weights == 64 * 16 + 16 * 10
    for record, _ in kept.values():
        assert 0.9 * weights / 8 < record["weights"] <= weights / 8
        assert 0 <= record["accuracy"] <= 1
    kernels = [m for m in jax.tree.leaves(kept["gsm"][1]) if m.ndim > 1]
    assert sum(int(m.sum()) for m in kernels) == weights // 8
    assert ticket["weights"] <= weights / 8


def test_the_committed_runs_are_of_five_seeds_and_one_budget():
    assert set(COMMITTED) <= set(gsm.SMALL.nets)
    for run in COMMITTED.values():
        assert run["settings"]["seeds"] == 5
        assert run["machine"]["versions"]["jax"] and run["command"]
        assert len(run["hyper"]) == len(FACTORS) * len(ARMS)
        for name, hyper in run["hyper"].items():
            tried = run["records"][f"tune/{name}"]
            assert len(tried) == 4
            assert hyper == best(tried)
        for factor in FACTORS:
            for arm in (*ARMS, *TICKETS):
                for left in gsm.over_seeds(run, factor, arm, "weights"):
                    assert 0.95 * run["weights"] / factor < left
                    assert left <= run["weights"] / factor


def test_the_page_is_made_of_the_committed_results():
    page = gsm_report.PAGE.read_text()
    assert "\n".join(gsm_report.page(COMMITTED)) == page
    for run in COMMITTED.values():
        for factor in FACTORS:
            values = gsm.over_seeds(run, factor, "gsm ticket", "accuracy")
            assert f"{100 * np.mean(values):.1f} ±" in page


def test_settings_of_the_paper():
    scale = gsm.Config(dataset="cifar10").scale
    assert (scale.epochs, scale.batch_size) == (600, 64)
    assert scale.sparse == (hyper_of(5e-3, 1e-4, 0.98),)
    with pytest.raises(ValueError, match="no net 'resnet56'; did you mean resnet8"):
        gsm.Config(net="resnet56")
    with pytest.raises(ValueError, match="--seeds must be at least 1, got 0"):
        gsm.Config(seeds=0)
