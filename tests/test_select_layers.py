"""How a budget is shared among layers, against the published rules."""

import itertools

import chain
import jax
import numpy as np
import pytest

from jaxprune import select
from jaxprune.core._masks import expand_masks
from jaxprune.scores import group_scores, magnitude

pytestmark = pytest.mark.once


def removed(shares, sizes):
    counts = {name: share * sizes[name] for name, share in shares.items()}
    assert all(abs(n - round(n)) < 1e-6 for n in counts.values()), "whole counts"
    return {name: round(n) for name, n in counts.items()}


KERNELS = {
    "conv1": np.zeros((3, 3, 3, 16)),
    "conv2": np.zeros((3, 3, 16, 32)),
    "dense": np.zeros((128, 10)),
    "bias": np.zeros(10),
}
SIZES = {name: leaf.size for name, leaf in KERNELS.items() if leaf.ndim > 1}


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.95])
def test_erk_is_the_rule_of_rigl(sparsity):
    """The loop of Evci et al.: layers whose density would pass 1 are dense."""
    raw = {n: sum(KERNELS[n].shape) / KERNELS[n].size for n in SIZES}
    dense = set()
    while True:
        rest = [n for n in SIZES if n not in dense]
        left = (1 - sparsity) * sum(SIZES.values()) - sum(SIZES[n] for n in dense)
        scale = left / sum(raw[n] * SIZES[n] for n in rest) if rest else 0
        over = {n for n in rest if scale * raw[n] > 1}
        if not over:
            break
        dense |= {max(over, key=lambda n: raw[n])}
    expected = {n: 0.0 if n in dense else 1 - scale * raw[n] for n in SIZES}
    found = select.erk(KERNELS, sparsity=sparsity)
    assert list(found) == list(expected)
    for name, share in found.items():
        assert abs(share - expected[name]) * SIZES[name] <= 1
    total = sum(removed(found, SIZES).values())
    assert total == round(sparsity * sum(SIZES.values()))


@pytest.mark.parametrize("how", [select.uniform, select.erk])
def test_shares_meet_the_budget_within_the_limits(how):
    options = {"max_sparsity": {"conv1": 0.25}, "min_keep": {"dense": 400}}
    found = how(KERNELS, sparsity=0.7, **options)
    gone = removed(found, SIZES)
    assert sum(gone.values()) == round(0.7 * sum(SIZES.values()))
    assert gone["conv1"] <= 0.25 * SIZES["conv1"]
    assert SIZES["dense"] - gone["dense"] >= 400
    scores = {
        name: np.random.default_rng(0).random(x.shape) for name, x in KERNELS.items()
    }
    masks = select.per_leaf(scores, sparsity=found)
    assert {n: int((~masks[n]).sum()) for n in SIZES} == gone
    with pytest.raises(ValueError, match=r"asks for 5\d+ of \d+, but the limits leave"):
        how(KERNELS, sparsity=0.9, min_keep=300)
    assert set(how(KERNELS, sparsity=0.5, only="conv*")) == {"conv1", "conv2"}


def test_uniform_is_uniform_where_nothing_forbids():
    found = select.uniform(KERNELS, sparsity=0.9)
    for name, share in found.items():
        assert abs(share - 0.9) * SIZES[name] <= 1


def test_groups_share_by_their_kernels():
    groups = chain.groups()
    sizes = {name: group.size for name, group in groups.items()}
    found = select.erk(groups, sparsity=0.4)
    assert sum(removed(found, sizes).values()) == round(0.4 * sum(sizes.values()))
    # conv2 has the largest kernel, so the lowest density.
    assert max(found, key=lambda name: found[name]) == "conv2"
    scores = group_scores(groups, chain.variables())
    keep = select.per_group(groups, jax.device_get(scores), sparsity=found)
    assert {n: int((~k).sum()) for n, k in keep.items()} == removed(found, sizes)


def test_lamp_is_the_published_score():
    """Sorted ascending, u_k^2 over the sum of u_j^2 for j >= k; ranked globally."""
    rng = np.random.default_rng(0)
    scores = {"a": rng.normal(size=(6, 7)), "b": 9 * rng.normal(size=30)}
    rated = []
    for name, leaf in scores.items():
        ordered = np.sort(np.abs(leaf).ravel())
        rated += [
            (u**2 / sum(v**2 for v in ordered[k:]), name) for k, u in enumerate(ordered)
        ]
    lowest = sorted(rated)[: round(0.6 * 72)]
    found = select.lamp(magnitude(scores), sparsity=0.6)
    for name, leaf in scores.items():
        expected = sum(1 for _, own in lowest if own == name) / leaf.size
        assert found[name] == pytest.approx(expected)


def test_lamp_does_not_see_the_scale_of_a_layer():
    rng = np.random.default_rng(0)
    scores = {"a": rng.random(40), "b": rng.random(60)}
    scaled = {"a": scores["a"] * 1e6, "b": scores["b"]}
    assert select.lamp(scores, sparsity=0.5) == select.lamp(scaled, sparsity=0.5)
    zeros = {"a": np.zeros(10), "b": rng.random(10)}
    assert select.lamp(zeros, sparsity=0.45) == {"a": 0.9, "b": 0.0}


@pytest.mark.parametrize("seed", range(12))
def test_proportional_is_the_closest_whole_sharing(seed):
    rng = np.random.default_rng(seed)
    weights = {name: float(rng.integers(0, 6)) for name in "abc"}
    least = {name: int(rng.integers(0, 2)) for name in weights}
    most = {name: int(rng.integers(2, 7)) for name in weights}
    total = int(rng.integers(sum(least.values()), sum(most.values()) + 1))
    shares = np.array(list(weights.values()))
    target = shares / max(shares.sum(), 1) * total

    def distance(x):
        return float(np.square(target - np.array(x)).sum())

    ranges = [range(least[n], most[n] + 1) for n in weights]
    best = min(distance(x) for x in itertools.product(*ranges) if sum(x) == total)
    found = select.proportional(weights, total, most=most, least=least)
    assert sum(found.values()) == total
    assert all(least[n] <= found[n] <= most[n] for n in weights)
    assert distance(list(found.values())) == pytest.approx(best)


def test_proportional_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="9 units do not fit.*which hold 0 to 8"):
        select.proportional({"a": 1, "b": 1}, 9, most={"a": 4, "b": 4})
    with pytest.raises(ValueError, match="must be finite and not negative"):
        select.proportional({"a": -1, "b": 1}, 2, most={"a": 4, "b": 4})


@pytest.mark.parametrize("density", [0.1, 0.3, 0.6])
def test_widths_from_nonzeros_have_as_many_weights(density):
    """Layer by layer the dense kernel has the non-zeros of the sparse one."""
    groups, variables = chain.groups(), chain.variables()
    scores = magnitude(variables["params"])
    masks = {"params": select.per_leaf(scores, sparsity=1 - density)}
    masks["batch_stats"] = jax.tree.map(
        lambda _: np.array(True), variables["batch_stats"]
    )
    widths = select.widths_from_nonzeros(groups, masks)
    nonzero = jax.tree.map(np.count_nonzero, masks["params"])
    conv1 = nonzero["conv1"]["kernel"] / (9 * 2)
    assert widths["conv1"] == max(round(conv1), 1)
    conv2 = nonzero["conv2"]["kernel"] / (9 * widths["conv1"])
    assert widths["conv2"] == min(max(round(conv2), 1), 6)
    dense = nonzero["dense"]["kernel"] / (4 * widths["conv2"])
    assert widths["dense"] == min(max(round(dense), 1), 5)
    keep = select.to_sizes(groups, group_scores(groups, variables), widths)
    assert {name: int(k.sum()) for name, k in keep.items()} == widths
    expand_masks(groups, keep)


def test_widths_of_a_dense_network_are_its_own():
    groups, variables = chain.groups(), chain.variables()
    masks = jax.tree.map(lambda _: np.array(True), variables)
    sizes = {name: group.size for name, group in groups.items()}
    assert select.widths_from_nonzeros(groups, masks) == sizes
    with pytest.raises(ValueError, match="masks have no leaf params/conv1/kernel"):
        select.widths_from_nonzeros(groups, {"w": np.array(True)})
