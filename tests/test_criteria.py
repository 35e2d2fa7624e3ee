"""The comparison of criteria: one net end to end, and the committed tables."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.criteria import leave_one_out
from experiments.criteria import study as criteria
from experiments.harness import methods
from experiments.harness.methods import Hyper
from jaxprune.data import DATASETS, Dataset
from jaxprune.models import VGG

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
COMMITTED = json.loads(Path(criteria.__file__).with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def record():
    """Two classes told apart by brightness, a net of two layers."""
    labels = np.arange(256, dtype=np.int32) % 2
    noise = np.random.default_rng(0).integers(0, 100, (256, 8, 8, 1))
    images = (noise + 150 * labels[:, None, None, None]).astype(np.uint8)
    data = Dataset(DATASETS["digits"], images, labels)
    net = functools.partial(VGG, widths=(4, "M", 6))
    some = ("random", "l2", "mean_activation")
    # optax's schedules need JAX's own promotion rules
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(methods, "MODELS", {"tiny": net})
        patch.setattr(criteria, "CRITERIA", {n: criteria.CRITERIA[n] for n in some})
        subject = methods.subject("tiny", data.spec)
        facts = {"epochs": 6, "batch_size": 64}
        hyper = Hyper(0.1, 1e-3)
        return criteria.one_net(facts, subject, hyper, data, data, 0, lambda: None)


def test_no_cut_is_above_its_budget_and_every_way_is_tried(record):
    assert record["dense"] > 0.9  # chance is 0.5
    for name in ("random", "l2", "mean_activation"):
        for way in criteria.WAYS:
            for budget, cell in zip(criteria.BUDGETS, record[name][way], strict=True):
                assert 0 < cell["flops"] <= budget
                assert 0 <= cell["accuracy"] <= 1


def test_criteria_are_compared_at_the_same_flops(record):
    for way in ("uniform", "reversed"):
        at = [[c["flops"] for c in record[name][way]] for name in ("random", "l2")]
        assert at[0] == at[1]


def test_the_tables_are_those_of_the_committed_run(tmp_path):
    criteria.write_tables(tmp_path / "table.md", COMMITTED)
    document = (ROOT / "docs" / "criteria.md").read_text()
    rows = [
        row for row in (tmp_path / "table.md").read_text().split("\n") if "±" in row
    ]
    # 2 nets, 3 ways
    assert len(rows) == 6 * len(criteria.CRITERIA)
    for row in rows:
        assert row.rstrip() in document


def test_the_committed_run_is_of_five_seeds_and_says_where():
    assert COMMITTED["settings"]["seeds"] == 5
    assert COMMITTED["machine"]["versions"]["jax"]
    assert COMMITTED["command"]


def test_the_page_shows_what_leaving_units_out_says():
    document = (ROOT / "docs" / "criteria.md").read_text()
    found = json.loads(Path(leave_one_out.__file__).with_suffix(".json").read_text())
    assert leave_one_out.table(found["records"]) in document
    expected = [
        f"{net}/seed{seed}"
        for net in leave_one_out.SUBJECTS
        for seed in range(leave_one_out.SEEDS)
    ]
    assert list(found["records"]) == expected
