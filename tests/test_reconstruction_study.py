"""The study of repairs from data, at toy size, and what is committed of it."""

import jax
import numpy as np
import pytest

from experiments.reconstruction import study


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
