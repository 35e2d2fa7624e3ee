"""The study and the benchmark of ranks, at toy size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ranks
from experiments.rank_pruning import study
from jaxprune.models import VGG

pytestmark = pytest.mark.once


def test_filters_and_factors_come_to_their_budget():
    rng = np.random.default_rng(0)
    labels = np.arange(32) % 2
    images = rng.normal(size=(32, 6, 6, 1)) + labels[:, None, None, None]
    split = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
    bench = study.Bench(
        net=VGG(2, widths=(4, 8, "M", 8), use_bias=False), epochs=1, tuning=1, batch=8
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        one = study.OneSeed(bench, study.Data(split, split), 0)
        net = one.trained("TRP with nuclear norm")
        found = one.record(one.arms["filters and channel"], net, 0.6)
    assert 0.3 < found["multiply-adds"] <= 0.6
    assert 0 <= found["cut"] <= 100 and 0 <= found["tuned"] <= 100


def test_the_net_by_hand_is_the_factorised_one():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = ranks.factors(1, 1, (4, 6))
    assert found["difference"] < 1e-4
    # The same operations: a factorised net costs what one written by hand does.
    assert found["compiled"]["factorised"] == found["compiled"]["by hand"]
    assert found["inference"]["ratio"]["wall"] > 0
