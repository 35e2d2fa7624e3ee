"""Units with equal activations are merged first, and without loss."""

import jax
import numpy as np
import pytest

import jaxprune
from jaxprune.select import clusters

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def net(params, x):
    numbers = ("NWC", "WIO", "NWC")
    x = jax.lax.conv_general_dilated(
        x, params["a"], (1,), "SAME", dimension_numbers=numbers
    )
    x = jax.lax.conv_general_dilated(
        jax.nn.relu(x), params["b"], (1,), "SAME", dimension_numbers=numbers
    )
    return jax.nn.relu(x).mean(1) @ params["c"]


PARAMS = {"a": normal(3, 2, 6), "b": normal(3, 6, 5), "c": normal(5, 2)}
PARAMS["a"][:, :, 4] = PARAMS["a"][:, :, 1]
X = normal(7, 6, 2)
GROUPS = jaxprune.trace(net, PARAMS, X, roles=True)


def test_distances_are_those_of_the_activations():
    found = clusters.distances(GROUPS, net, PARAMS, [X[:3], X[3:]])
    hidden = np.maximum(
        jax.lax.conv_general_dilated(
            X, PARAMS["a"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        0,
    )
    padded = np.pad(hidden, ((0, 0), (1, 1), (0, 0))).astype(np.float64)
    seen = np.stack([padded[:, k : k + 6] for k in range(3)])  # every tap of the window
    apart = np.square(seen[..., :, None] - seen[..., None, :]).sum((0, 1, 2))
    expected = apart / (apart.sum() / 30)
    np.testing.assert_allclose(found["a:2"], expected, atol=1e-5)


def test_twins_are_merged_first_and_cost_nothing():
    found = clusters.distances(GROUPS, net, PARAMS, [X])
    ids = clusters.similar(GROUPS, found, threshold=1e-5)
    assert ids["a:2"].tolist() == [0, 1, 2, 3, 1, 4] and len(set(ids["b:2"])) == 5
    merged = jaxprune.merge(PARAMS, GROUPS, ids)
    y = jaxprune.narrow(net, merged.masks)(merged.variables, X)
    np.testing.assert_allclose(y, net(PARAMS, X), atol=1e-5)
    counts = [
        sum(
            len(set(own))
            for own in clusters.similar(GROUPS, found, threshold=t).values()
        )
        for t in (0.0, 0.5, 1.0, 5.0, 100.0)
    ]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 2


@pytest.mark.parametrize("linkage", ["average", "complete"])
def test_a_budget_is_met_by_one_threshold(linkage):
    found = clusters.distances(GROUPS, net, PARAMS, [X])
    cost = jaxprune.cost_model(net, PARAMS, X, groups=GROUPS).multiply_adds
    ids = clusters.similar(
        GROUPS, found, cost=cost, budget=0.5 * cost.full, linkage=linkage
    )
    sizes = {name: len(set(own.tolist())) for name, own in ids.items()}
    assert cost.value(sizes) <= 0.5 * cost.full
    merged = jaxprune.merge(PARAMS, GROUPS, ids)
    assert merged.variables["b"].shape == (3, sizes["a:2"], sizes["b:2"])
    with pytest.raises(ValueError, match="budget=1 cannot be met: with one cluster"):
        clusters.similar(GROUPS, found, cost=cost, budget=1)
    with pytest.raises(ValueError, match="give either threshold, or cost and budget"):
        clusters.similar(GROUPS, found)
