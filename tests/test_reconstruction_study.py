"""The study of repairs from data, at toy size, and what is committed of it."""

import json

import jax
import numpy as np
import pytest

from experiments.reconstruction import study

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def bench():
    made = study.Bench("vgg_digits")
    made.train = tuple(each[:64] for each in made.train)
    made.test = tuple(each[:40] for each in made.test)
    made.batches = [made.train[0][:32], made.train[0][32:]]
    return made


def test_methods_meet_the_same_budget_and_are_recorded(bench):
    variables = bench.net.init(jax.random.key(0), bench.train[0][:1])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = {m: bench.record(variables, m, 0.3, 0) for m in ("pfp + fit", "thinet")}
    for record in found.values():
        assert 0.2 < record["cost"] <= 0.3
        assert all(0 <= record[k] <= 1 for k in ("at once", "fine-tuned"))
    records = {f"net/seed0/0.3/{m}": record for m, record in found.items()}
    assert study.summary(records)["net/0.3/thinet"]["cost"] == found["thinet"]["cost"]
    widths = bench.even(0.3 * bench.cost.full)
    shares = [n / bench.groups[name].size for name, n in widths.items()]
    assert np.ptp(shares) < 0.1


def test_the_committed_run_has_its_seeds_and_says_where_it_is_from():
    found = json.loads(study.RESULT.read_text())
    seeds = found["settings"]["seeds"]
    assert seeds == study.SEEDS and found["machine"]["versions"]["jax"]
    for net in study.RUN:
        for budget, method in [(b, m) for b in study.BUDGETS for m in study.METHODS]:
            rows = [
                found["records"][f"{net}/seed{s}/{budget}/{method}"]
                for s in range(seeds)
            ]
            assert all(0.9 * budget < row["cost"] <= budget for row in rows)
            mean = np.mean([row["at once"] for row in rows])
            assert found["summary"][f"{net}/{budget}/{method}"]["at once"] == round(
                float(mean), 4
            )
