"""The study of slimmable networks: arms within one budget, widths that cost no more."""

import json

import jax
import numpy as np
import pytest

from experiments.slimmable import bench as benches
from experiments.slimmable import report, study, widths
from jaxprune import search
from jaxprune.models import VGG, cifar_resnet

pytestmark = pytest.mark.once


def tiny(net):
    x = np.random.default_rng(0).normal(size=(256, 4, 4, 1)).astype(np.float32)
    data = x, np.arange(256, dtype=np.int32) % 10
    return benches.Bench(net, data, data)


@pytest.fixture(scope="module")
def vgg():
    return tiny(VGG(widths=(8, "M", 8), use_bias=False))


def fake_scores(groups, seed):
    rng = np.random.default_rng(seed)
    streams = {group.stream for group in groups.values()} - {""}
    return {  # the first layers matter more
        name: rng.uniform(size=groups[name].size) - 0.3 * k
        for k, name in enumerate(groups)
        if name not in streams
    }


def test_widths_of_pruning_cost_no_more_than_equal_shares_and_nest(vgg):
    like = widths.uniform(vgg)
    scored = [(vgg.groups, fake_scores(vgg.groups, seed)) for seed in (0, 1)]
    found = widths.pruned(vgg, scored, like)
    assert len(found) == len(widths.SHARES)
    for own, theirs in zip(found, like, strict=True):
        assert vgg.cost.value(own) <= vgg.cost.value(theirs)
    for i in range(2):
        assert all(found[i + 1][name] <= found[i][name] for name in found[0])
    assert found[2] != like[2]


def test_zero_padded_widths_cost_no_more_nest_and_fuse_their_writers():
    own = tiny(cifar_resnet(8, num_classes=10, widths=(4, 6, 8), shortcut="projection"))
    groups = own.traced(zero_padded=True).groups
    scored = [(groups, fake_scores(groups, seed)) for seed in (0, 1)]
    like = widths.uniform(own)
    found = widths.zero_padded(own, scored, like)
    costs = study.multiply_adds(own, found, zero_padded=True)
    for cost, theirs in zip(costs, like, strict=True):
        assert cost <= own.cost.value(theirs)
    for i, keep in enumerate(found):
        for name in groups:
            if i:
                assert not (keep[name] & ~found[i - 1][name]).any()
            writers = [n for n, group in groups.items() if group.stream == name]
            if writers:
                union = np.logical_or.reduce([keep[n] for n in writers])
                np.testing.assert_array_equal(keep[name], union)
    slim = own.slim(own.init(0), found, zero_padded=True)
    assert len(slim) == 3


def test_every_arm_spends_one_budget(vgg, monkeypatch):
    """Multiply-adds of all trainings of an arm, counted where they are trained."""
    spent = []

    def train(self, slim, steps, seed, **_):
        sizes = [dict(each) for each in slim.sizes]
        of_one = [self.cost.value(each) for each in sizes]
        spent.append(steps * benches.BATCH * float(sum(of_one)))
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: x + rng.uniform(size=x.shape), slim.variables)

    monkeypatch.setattr(benches.Bench, "train", train)
    monkeypatch.setattr(benches.Bench, "accuracies", lambda *_: [0.5])
    for arm in ("alone", "s_net", "equal_shares", "one_base", "sp_net", "iterative"):
        spent.clear()
        run = study.Run(vgg, 8, 0)
        record = study.one_arm(run, arm)
        assert 0.97 * run.budget < sum(spent) <= run.budget, arm
        if "found_for" in record:
            before = sum(spent[:-1]) / run.budget
            assert record["found_for"] == pytest.approx(before, abs=1e-3)


def test_gains_are_paired_by_seed():
    records = {}
    for seed in range(3):
        own = {arm: {"accuracy": [0.5 + 0.1 * seed] * 3} for arm in ("s_net", "alone")}
        own["sp_net"] = {"accuracy": [0.52 + 0.1 * seed] * 3}
        records[f"vgg/seed{seed}"] = own
    [found] = study.summary(records).values()
    assert found["seeds"] == {"s_net": 3, "alone": 3, "sp_net": 3}
    assert found["gains"]["sp_net over s_net"] == ["+2.0 [+2.0, +2.0]"] * 3
    assert study.summary({"vgg/seed0": records["vgg/seed0"]}) == {}


def test_statistics_and_norms_are_private_in_s_net(vgg):
    keeps = search.uniform(vgg.groups, widths.SHARES)
    slim = vgg.slim(vgg.init(0), keeps, (benches.STATS, benches.NORMS))
    norms = [path for path in vgg.groups.shapes if "bn" in path]
    assert sorted(slim.private) == sorted(norms)


def test_the_page_tells_gains_that_are_sure_and_what_widths_cost():
    record = {
        arm: {"accuracy": [own] * 3, "multiply_adds": costs}
        for arm, own, costs in (
            ("s_net", 0.5, [100, 50, 20]),
            ("sp_net", 0.52, [100, 45, 20]),
        )
    }
    found = {
        "command": "this command",
        "machine": {"cores": 2, "cpu": "a CPU", "versions": {"jax": "1"}},
        "settings": {"images": 9, "epochs": 4, "seeds": 5, "shares": [1.0, 0.75, 0.5]},
        "records": {f"vgg/seed{seed}": record for seed in range(2)},
    }
    text = "\n".join(report.page(found))
    assert (
        "| SP-Net, two bases | 52.0 ± 0.0 | 52.0 ± 0.0 | 52.0 ± 0.0 | 90%, 100%" in text
    )
    assert "| SP-Net, two bases over S-Net | **+2.0 [+2.0, +2.0]** |" in text
    assert "* SP-Net is better than S-Net: vgg: holds." in text
    assert "planned with 5 seeds" in text and "Not run: S-Net, taught" in text
    assert report.limits("+2.0 [-0.1, +4.1]") == (-0.1, 4.1)
    unsure = ["+1.0 [+0.5, +1.5]", "+1.0 [+0.5, +1.5]", "+2.0 [-0.1, +4.1]"]
    below = ["+1.0 [+0.5, +1.5]", "-1.0 [-1.5, -0.5]", "-2.0 [-4.1, -0.1]"]
    assert [report.verdict(each) for each in (unsure, below)] == [
        "not shown",
        "turned round",
    ]


def test_the_page_is_that_of_the_committed_results():
    found = json.loads(study.RESULT.read_text())
    assert report.PAGE.read_text() == "\n".join(report.page(found))
    assert found["summary"] == study.summary(found["records"])
