"""The smallest fraction that keeps the training loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import recipes, scores

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 6)).astype(np.float32)
PARAMS = {
    "w1": (RNG.normal(size=(6, 10)) * RNG.exponential(size=(6, 10))).astype(np.float32),
    "w2": RNG.normal(size=(10, 2)).astype(np.float32),
}


def net(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


TARGETS = net(PARAMS, X) + 0.3


@jax.jit
def loss(params):
    return jnp.square(net(params, X) - TARGETS).mean()


def test_it_is_the_first_violation_from_above_by_enumeration():
    found = recipes.prunability(loss, PARAMS, step=1 / 80, refine=0, tolerance=0.5)
    share = 1.0
    for kept in range(79, 0, -1):
        masks = jaxprune.select.across_leaves(
            scores.magnitude(PARAMS), sparsity=1 - kept / 80
        )
        if loss(jaxprune.apply_masks(PARAMS, masks)) > 1.5 * loss(PARAMS):
            break
        share = kept / 80
    assert found == pytest.approx(share) and 0 < found < 1


def test_tolerance_permutations_and_dead_units():
    limits = [recipes.prunability(loss, PARAMS, tolerance=t) for t in (0.05, 0.5, 5.0)]
    assert limits == sorted(limits, reverse=True) and limits[0] > limits[-1]
    order = RNG.permutation(10)
    turned = {"w1": PARAMS["w1"][:, order], "w2": PARAMS["w2"][order]}
    assert recipes.prunability(loss, turned, tolerance=0.5) == limits[1]
    wider = {
        "w1": np.pad(PARAMS["w1"], ((0, 0), (0, 10))),
        "w2": np.pad(PARAMS["w2"], ((0, 10), (0, 0))),
    }
    assert recipes.prunability(loss, wider, tolerance=0.5) < 0.6 * limits[1]
    slack = recipes.prunability(loss, PARAMS, tolerance=0.0, slack=100.0)
    assert slack < limits[0]


def test_another_cut_and_bad_numbers():
    def first(params, share):
        return {**params, "w1": params["w1"] * (np.arange(10) < 10 * share)}

    assert recipes.prunability(loss, PARAMS, cut=first, tolerance=1e6) < 0.01
    with pytest.raises(ValueError, match="tolerance must be at least 0, got -1"):
        recipes.prunability(loss, PARAMS, tolerance=-1)
    with pytest.raises(ValueError, match="step must be between 0 and 1, got 2"):
        recipes.prunability(loss, PARAMS, step=2)
    with pytest.raises(
        ValueError, match="the loss of the whole network must be finite, got nan"
    ):
        recipes.prunability(lambda p: np.nan, PARAMS)
