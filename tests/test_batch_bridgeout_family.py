"""The study of the Bridgeout family: its measures, and its page from its results."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.batch_bridgeout import family
from experiments.batch_bridgeout import family_report as report
from experiments.harness import noisy_nets, runs


def test_hoyer_runs_from_equal_weights_to_a_single_one():
    assert family.hoyer(np.full(9, 0.3)) == pytest.approx(0.0, abs=1e-12)
    assert family.hoyer(np.eye(9)[0]) == pytest.approx(1.0)
    weights = np.array([3.0, 4.0, 0.0, 0.0])
    assert family.hoyer(weights) == pytest.approx((2 - 7 / 5) / (2 - 1))
    assert family.hoyer(10 * weights) == pytest.approx(family.hoyer(weights))


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


def test_what_is_accurate_enough_uncut_comes_before_the_area():
    arena = family.ARENAS["vgg"]
    weak = {"accuracy": [0.90, 0.9, 0.9]}
    good = {"accuracy": [0.96, 0.3, 0.1]}
    better = {"accuracy": [0.96, 0.5, 0.1]}
    ranked = sorted([good, weak, better], key=lambda t: family.merit(arena, t))
    assert ranked == [weak, good, better]


def test_every_draw_is_in_the_space_of_its_method():
    rng = np.random.default_rng(0)
    for arena in family.ARENAS.values():
        for method in arena.methods:
            hyper = family.draw(method, arena, rng)
            low, high = arena.learning_rates
            assert 0.99 * low <= hyper.learning_rate <= 1.01 * high
            assert hyper.target in family.TARGETED.get(method, (1.0,))


def test_arenas_that_are_as_they_were_are_taken_over(tmp_path):
    found = json.loads(family.RESULT.read_text())
    settings = found["settings"] | {"shapes32": {"epochs": -1}}
    with runs.open_run(tmp_path / "run", settings) as run:
        family.take_over(run, found)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    kept = {k: v for k, v in found["records"].items() if k[:8] != "shapes32"}
    assert results["records"] == kept != found["records"]
    assert results["taken over"]["arenas"] == ["mlp", "vgg"]


def test_the_committed_arenas_on_digits_are_those_of_the_file():
    found = json.loads(family.RESULT.read_text())["settings"]
    for name in ("mlp", "vgg"):
        arena = family.ARENAS[name]
        here = dataclasses.asdict(arena) | {"net": repr(arena.net(num_classes=10))}
        assert json.loads(json.dumps(here)) == found[name]


def test_the_page_is_made_of_the_committed_results():
    found = json.loads(family.RESULT.read_text())
    assert "\n".join(report.page(found)) == report.PAGE.read_text()
    areas = [
        found["records"][f"vgg/bridgeout/seed{seed}"]["area"]
        for seed in range(found["settings"]["vgg"]["seeds"])
    ]
    assert f"| bridgeout | {np.mean(areas):.3f} [" in report.PAGE.read_text()
    for arena, setting in found["settings"].items():
        for method in setting["methods"]:
            tries = [
                n for n in found["records"] if n.startswith(f"{arena}/{method}/try")
            ]
            assert len(tries) == setting["tries"]  # the same budget for all
