"""The study of slimmable networks: its arms meet the same costs, its gains are paired."""

import jax
import numpy as np
import pytest

import jaxprune
from experiments.slimmable import study
from jaxprune import search

pytestmark = pytest.mark.once


class Tiny(study.Bench):
    """A bench without data."""

    def __init__(self):
        self.net = study.VGG(widths=(8, "M", 8), use_bias=False)
        x = np.random.default_rng(0).normal(size=(64, 4, 4, 1)).astype(np.float32)
        self.train_set = x, np.arange(64, dtype=np.int32) % 10
        shapes = jax.eval_shape(self.net.init, jax.random.key(0), x[:1])
        self.groups = jaxprune.trace(self.net.apply, shapes, x[:1])
        self.cost = jaxprune.cost_model(
            self.net.apply, shapes, x[:1], groups=self.groups
        ).multiply_adds


def test_widths_of_pruning_cost_no_more_than_equal_shares_and_nest():
    bench = Tiny()
    rng = np.random.default_rng(0)
    scores = {  # the first layer matters more
        name: k + rng.uniform(size=bench.groups[name].size)
        for k, name in enumerate(reversed(list(bench.groups)))
    }
    like = search.uniform(bench.groups, study.SHARES)
    found = study.pruned_counts(bench, [(bench.groups, scores, None)] * 2, like)
    assert len(found) == len(study.SHARES)
    for own, theirs in zip(found, like, strict=True):
        assert bench.cost.value(own) <= bench.cost.value(theirs)
    for i in range(2):
        assert all(found[i + 1][name] <= found[i][name] for name in scores)
    assert found[2] != like[2]


def test_gains_are_paired_by_seed():
    records = {}
    for seed in range(3):
        own = {name: {"accuracy": [0.5 + 0.1 * seed] * 3} for name in study.ARMS}
        own["sp_net"] = {"accuracy": [0.52 + 0.1 * seed] * 3}
        records[f"vgg/seed{seed}"] = own
    [found] = study.summary(records).values()
    assert found["seeds"] == 3
    assert found["sp_net against"]["s_net"] == ["+2.0 [+2.0, +2.0]"] * 3
    assert study.summary({"vgg/seed0": records["vgg/seed0"]}) == {}


def test_statistics_and_norms_are_private_in_s_net():
    bench = Tiny()
    keeps = search.uniform(bench.groups, study.SHARES)
    slim = bench.slim(bench.init(0), keeps, (study.STATS, study.NORMS))
    norms = [path for path in bench.groups.shapes if "bn" in path]
    assert sorted(slim.private) == sorted(norms)
