"""The study of repairs from data, at toy size, and what is committed of it."""

import json

import jax
import numpy as np
import pytest

from experiments.prunability import study as prunability
from experiments.reconstruction import bounds, page, study

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


def test_the_page_shows_the_committed_results():
    document = page.DOCUMENT.read_text()
    assert page.filled(document, page.texts()) == document


def test_a_sampled_layer_is_right_on_average_and_exact_for_one_sum():
    rng = np.random.default_rng(0)
    x, kernel = rng.random((5, 6)), rng.random((6, 3))
    unit = np.array([0, 0, 1, 1, 2, 2])
    part = bounds.by_unit(x, kernel, unit, 3)
    np.testing.assert_allclose(part.sum(0), (x @ kernel).ravel())
    # The sensitivities of a single sum are its parts, so every draw gives it back.
    one = part[:, :1]
    off, kept = bounds.sampled([one], one[:, 0] / one.sum(), 4, 50, rng)
    assert off.max() < 1e-6 and 0 < kept <= 1
    s = (part / part.sum(0)).max(1)
    few, many = (bounds.sampled([part], s, n, 200, rng)[0].mean() for n in (10, 1000))
    assert 0 < many < few / 5  # as one over the root of the draws


def test_rank_correlations_of_a_family_are_those_of_its_pairs():
    records = {}
    for k, width in enumerate((16, 64)):
        for j, noise in enumerate((0.0, 0.2)):
            measures = dict.fromkeys(prunability.MEASURES, -k - 2.0 * j)
            measures |= {"prunability": k + 2.0 * j, "margin": k - 2.0 * j}
            records[f"{width}/1/0.1/500/{noise}/0"] = measures | {"gap": k + 2.0 * j}
    found = prunability.summary(records)
    assert found["prunability"] == {"all": 1.0, "seeds": [1.0], "within": 1.0}
    assert found["flatness"]["all"] == found["flatness"]["within"] == -1.0
    # Right in width, wrong in noise: of 6 pairs 2 agree, of 4 that differ once also 2.
    assert found["margin"] == {"all": -0.333, "seeds": [-0.333], "within": 0.0}
