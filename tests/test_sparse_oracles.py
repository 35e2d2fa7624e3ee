"""Masks against published rules, written again as loops in numpy.

The rules are those of jaxpruner (Lee et al., 2023, https://arxiv.org/abs/2304.14082):
same weights, same gradients, same masks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import quick_jit

from jaxprune import select
from jaxprune.training import (
    current_masks,
    dynamic_network_surgery,
    gradual_pruning,
    grow_and_prune,
    iterative_hard_thresholding,
    iterative_soft_shrinkage,
    masked_params,
    rigl,
    sparse_evolutionary_training,
    straight_through,
    threshold_pruning,
)
from jaxprune.training.schedules import cubic, narang
from jaxprune.training.sparse import _rules as rules

pytestmark = pytest.mark.once

SHAPES = {"conv": (3, 4, 10), "dense": (12, 6)}


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {p: scale * rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}


# --- the published rules -------------------------------------------------------------


def topk(scores, sparsity):
    """The highest ``round((1 - sparsity) n)``, at least one; the earlier on ties."""
    flat = scores.ravel()
    ones = max(1, int(np.round(np.float32(flat.size * (1 - np.float32(sparsity))))))
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:ones]] = True
    return mask.reshape(scores.shape)


def topk_global(scores, sparsity):
    """Every leaf over its norm, all in one vector, in the order of their names."""
    names = sorted(scores)
    normed = [scores[p] / (np.linalg.norm(scores[p]) + 1e-8) for p in names]
    mask = topk(np.concatenate([x.ravel() for x in normed]), sparsity)
    ends = np.cumsum([scores[p].size for p in names])[:-1]
    parts = np.split(mask, ends)
    return {p: m.reshape(scores[p].shape) for p, m in zip(names, parts, strict=True)}


def topk_n_of_m(scores, n, m):
    """Ranks in every run of m along the last axis: on ties the later one stays."""
    ranks = scores.reshape(-1, m).argsort(kind="stable").argsort(kind="stable")
    return (ranks >= m - n).reshape(scores.shape)


def topk_block(scores, sparsity, height, width, pool):
    rows, columns = (
        -(-n // b) for n, b in zip(scores.shape, (height, width), strict=True)
    )
    pooled = np.zeros((rows, columns), np.float32)
    for i, j in np.ndindex(rows, columns):
        tile = scores[height * i : height * (i + 1), width * j : width * (j + 1)]
        pooled[i, j] = getattr(tile, pool)()
    mask = topk(pooled, sparsity).repeat(height, 0).repeat(width, 1)
    return mask[: scores.shape[0], : scores.shape[1]]


def published_cubic(target, step, start, end):
    progress = np.clip(step + 1 - start, 0, end - start) / (end - start)
    return target * (1 - (1 - progress) ** 3)


def drop_and_grow(mask, weights, grow, drop):
    active = int(mask.sum())
    left = max(1, int(np.round(active * (1 - drop))))
    lowest = np.abs(weights).min() - 1
    order = np.argsort(-np.where(mask, np.abs(weights), lowest).ravel(), kind="stable")
    stays = np.zeros(mask.size, bool)
    stays[order[:left]] = True
    scores = np.where(stays, grow.max() + 1, grow.ravel())
    new = np.zeros(mask.size, bool)
    new[np.argsort(-scores, kind="stable")[:active]] = True
    return new.reshape(mask.shape)


def erdos_renyi(shapes, sparsity):
    """The loop of the authors: whoever would pass density 1 is dense."""
    dense = set()
    while True:
        rest = [p for p in shapes if p not in dense]
        size = {p: int(np.prod(s)) for p, s in shapes.items()}
        zeros = {p: int(np.floor(sparsity * n)) for p, n in size.items()}
        ones = sum(size[p] - zeros[p] for p in rest) - sum(zeros[p] for p in dense)
        raw = {p: sum(shapes[p]) / size[p] for p in rest}
        scale = ones / sum(raw[p] * size[p] for p in rest)
        if max(raw.values()) * scale <= 1:
            break
        dense |= {p for p in rest if raw[p] == max(raw.values())}
    return {p: 0.0 if p in dense else 1 - scale * raw[p] for p in shapes}


# --- ours, in the loop ---------------------------------------------------------------


def follow(tx, steps):
    """Yields count, weights, gradients; masks and weights after the step."""
    params = jax.tree.map(jnp.asarray, draw(0))
    opt_state = tx.init(params)
    step = quick_jit(tx.update)
    params = masked_params(params, opt_state)
    for count in range(steps):
        before, grads = params, draw(50 + count)
        updates, opt_state = step(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        masks = current_masks(params, opt_state)
        yield (
            count,
            *(
                {p: np.asarray(x) for p, x in tree.items()}
                for tree in (before, grads, masks, params)
            ),
        )


def assert_same(got, expected):
    for path in SHAPES:
        np.testing.assert_array_equal(got[path], expected[path], err_msg=path)


SGD = optax.sgd(0.1)


def test_magnitude_with_the_polynomial_schedule():
    # Their progress is one step ahead.
    schedule = cubic(0.8, start=1, end=9)
    tx = gradual_pruning(SGD, schedule, every=2, start=2, until=10)
    refreshed = 0
    for count, before, _, masks, _ in follow(tx, 12):
        if count % 2 == 0 and 2 <= count <= 10:
            sparsity = published_cubic(0.8, count, 2, 10)
            assert_same(
                masks, {p: topk(np.abs(w), sparsity) for p, w in before.items()}
            )
            refreshed += 1
    assert refreshed == 5 and not masks["conv"].all()


@pytest.mark.parametrize("score", ["magnitude", "saliency"])
def test_global_scores_over_their_norms(score):
    across = functools.partial(select.across_leaves, normalize=True)
    tx = gradual_pruning(SGD, 0.6, start=2, until=2, score=score, selection=across)
    for count, before, grads, masks, _ in follow(tx, 3):
        if count == 2:
            scores = {
                p: np.abs(w) if score == "magnitude" else np.abs(w * grads[p])
                for p, w in before.items()
            }
            assert_same(masks, topk_global(scores, 0.6))


def test_random_scores_are_zero_where_weights_are_gone(monkeypatch):
    """In a refresh nothing that is gone outranks what is there."""
    scores = {k: {p: np.abs(x) for p, x in draw(900 + k).items()} for k in (0, 1)}
    calls = iter((0, 1))
    monkeypatch.setattr(
        rules.scoring,
        "random",
        lambda *_: jax.tree.map(jnp.asarray, scores[next(calls)]),
    )
    params = jax.tree.map(jnp.asarray, draw(0))
    budget = rules.budget_of(lambda count: 0.3 + 0.3 * count, select.per_leaf, None)
    renew = rules.keep_best(budget, "random", regrow=False)
    masks = {p: jnp.ones(s, bool) for p, s in SHAPES.items()}
    for count in (0, 1):
        moment = rules.Moment(params, params, masks, {}, count, jax.random.key(0))
        expected = {
            p: topk(np.where(masks[p], scores[count][p], 0), 0.3 + 0.3 * count)
            for p in SHAPES
        }
        masks = renew(moment)
        assert_same(masks, expected)


def test_erk():
    shapes = {"a": (3, 3, 3, 16), "b": (3, 3, 16, 32), "c": (40, 10), "d": (32, 32)}
    leaves = {p: np.zeros(s, np.float32) for p, s in shapes.items()}
    rng = np.random.default_rng(0)
    for sparsity in (0.5, 0.9):
        theirs, ours = (
            erdos_renyi(shapes, sparsity),
            select.erk(leaves, sparsity=sparsity),
        )
        for path, leaf in leaves.items():
            # We meet the total exactly, in whole weights; they round every leaf.
            assert abs(theirs[path] - ours[path]) * leaf.size < 2
        scores = {p: rng.random(s).astype(np.float32) for p, s in shapes.items()}
        masks = select.per_leaf(scores, sparsity=theirs)
        for path, x in scores.items():
            np.testing.assert_array_equal(masks[path], topk(x, theirs[path]))


@pytest.mark.parametrize("method", ["SET", "RigL"])
def test_drop_and_grow(method, monkeypatch):
    first, random = ({p: np.abs(x) for p, x in draw(k).items()} for k in (77, 78))
    # At the start, while the rule is checked, and while the step is traced.
    calls = iter((first, random, random))
    monkeypatch.setattr(
        rules.scoring, "random", lambda *_: jax.tree.map(jnp.asarray, next(calls))
    )
    make = {"SET": sparse_evolutionary_training, "RigL": rigl}[method]
    drop = optax.linear_schedule(0.5, 0.1, 8)
    tx = make(SGD, {"conv": 0.7, "dense": 0.5}, drop=drop, every=3, until=6)
    masks = {"conv": topk(first["conv"], 0.7), "dense": topk(first["dense"], 0.5)}
    for count, before, grads, found, after in follow(tx, 9):
        if count in (3, 6):
            grow = random if method == "SET" else jax.tree.map(np.abs, grads)
            share = np.float32(drop(count))
            new = {
                p: drop_and_grow(masks[p], before[p], grow[p], share) for p in SHAPES
            }
            assert count == 6 or any((new[p] != masks[p]).any() for p in SHAPES)
            masks = new
            # The gradient step is skipped, and what is new starts from zero.
            expected = {p: np.where(masks[p], before[p], 0) for p in SHAPES}
            jax.tree.map(np.testing.assert_array_equal, after, expected)
        assert_same(found, masks)


@pytest.mark.parametrize("pattern", ["weights", "n of m", "blocks"])
def test_straight_through_masks_of_every_forward_pass(pattern):
    if pattern == "weights":
        tx = straight_through(SGD, 0.75)
        rule = functools.partial(topk, sparsity=0.75)
    elif pattern == "n of m":
        n_of_m = functools.partial(select.n_of_m, n=1, m=2, axis=-1)
        tx, rule = (
            straight_through(SGD, selection=n_of_m),
            lambda x: topk_n_of_m(x, 1, 2),
        )
    else:
        blocks = functools.partial(select.blocks, shape=(5, 4), pool="max")
        tx = straight_through(SGD, {"dense": 0.5}, selection=blocks)
        rule = functools.partial(
            topk_block, sparsity=0.5, height=5, width=4, pool="max"
        )
    for _, before, grads, masks, after in follow(tx, 3):
        for path in ["dense"] if pattern == "blocks" else SHAPES:
            np.testing.assert_array_equal(masks[path], rule(np.abs(after[path])))
            # All weights are trained.
            step = before[path] - np.float32(0.1) * grads[path]
            np.testing.assert_allclose(after[path], step, rtol=1e-6)


def test_the_one_rule_that_differs_is_ties_of_n_of_m():
    scores = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(topk_n_of_m(scores, 2, 4), [[0, 0, 1, 1]])
    ours = select.n_of_m({"w": scores}, 2, 4, axis=-1)["w"]
    np.testing.assert_array_equal(ours, [[1, 1, 0, 0]])
    ours = select.n_of_m({"w": scores[:, ::-1]}, 2, 4, axis=-1)["w"][:, ::-1]
    np.testing.assert_array_equal(ours, topk_n_of_m(scores, 2, 4))


# --- identities ----------------------------------------------------------------------


def test_thresholds_of_narang():
    limit = narang(0.9, start=0, ramp=2, end=6, frequency=2)
    masks = {p: np.ones(s, bool) for p, s in SHAPES.items()}
    for count, before, _, found, _ in follow(
        threshold_pruning(SGD, limit, every=2, until=6), 8
    ):
        if count % 2 == 0 and count <= 6:
            least = np.float32(limit(count))
            masks = {p: masks[p] & (np.abs(before[p]) >= least) for p in SHAPES}
        assert_same(found, masks)
    assert 0.4 < 1 - masks["conv"].mean() < 0.9


def test_thresholds_in_deviations_are_those_of_what_is_left():
    masks = {p: np.ones(s, bool) for p, s in SHAPES.items()}
    tx = threshold_pruning(SGD, 0.5, every=1, in_deviations=True)
    for _, before, _, found, _ in follow(tx, 3):
        masks = {
            p: masks[p] & (np.abs(before[p]) >= 0.5 * before[p][masks[p]].std())
            for p in SHAPES
        }
        assert_same(found, masks)


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_surgery_is_a_threshold_with_hysteresis(margin):
    start = draw(0)
    scale = {p: np.abs(w).mean() + 0.3 * np.abs(w).std() for p, w in start.items()}
    masks, back = {p: np.ones(s, bool) for p, s in SHAPES.items()}, 0
    tx = dynamic_network_surgery(optax.sgd(0.5), 0.3, margin=margin)
    for _, before, grads, found, after in follow(tx, 4):
        old = masks
        masks = {
            p: np.where(
                np.abs(after[p]) < (1 - margin) * scale[p],
                False,
                (np.abs(after[p]) >= (1 + margin) * scale[p]) | old[p],
            )
            for p in SHAPES
        }
        assert_same(found, masks)
        back += sum((~old[p] & masks[p]).sum() for p in SHAPES)
        dense = {p: before[p] - np.float32(0.5) * grads[p] for p in SHAPES}
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6), after, dense
        )
    assert back > 0, "some return"


def test_soft_shrinkage_settles_at_its_fixed_point():
    """-rate G alpha / (1 - alpha) for a constant gradient."""
    tx = iterative_soft_shrinkage(optax.sgd(0.01), 0.5)
    params = {"w": jnp.array([[5.0, 0.1], [-0.2, -7.0]])}
    grads = {"w": jnp.array([[0.0, 0.1], [-0.2, 0.0]])}
    opt_state, step = tx.init(params), quick_jit(tx.update)
    for _ in range(400):
        updates, opt_state = step(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    fixed = -0.01 * np.array([0.1, -0.2]) * 0.95 / 0.05
    got = [params["w"][0, 1], params["w"][1, 0]]
    np.testing.assert_allclose(got, fixed, rtol=1e-4)
    np.testing.assert_array_equal(np.diag(params["w"]), [5.0, -7.0])


def test_shrinkage_of_one_is_the_optimiser_and_of_zero_is_thresholding():
    plain = quick_jit(SGD.update)
    for _, before, grads, _, after in follow(
        iterative_soft_shrinkage(SGD, 0.5, shrinkage=1.0), 2
    ):
        updates, _ = plain(grads, SGD.init(before), before)
        expected = optax.apply_updates(jax.tree.map(jnp.asarray, before), updates)
        jax.tree.map(np.testing.assert_array_equal, after, expected)
    for _, before, grads, masks, after in follow(
        iterative_hard_thresholding(SGD, 0.5), 4
    ):
        for path in SHAPES:
            moved = before[path] - np.float32(0.1) * grads[path]
            np.testing.assert_array_equal(masks[path], topk(np.abs(moved), 0.5))
            np.testing.assert_allclose(
                after[path], np.where(masks[path], moved, 0), rtol=1e-6
            )


def test_in_a_round_every_weight_is_dense_once():
    tx = grow_and_prune(SGD, 0.5, parts={"conv": 0, "dense": 1}, every=2, rounds=1)
    dense = {p: np.zeros(s, int) for p, s in SHAPES.items()}
    for count, before, _, masks, _ in follow(tx, 6):
        for path, part in (("conv", 0), ("dense", 1)):
            if count < 4 and count // 2 == part:
                assert masks[path].all()
                dense[path] += 1
            else:
                assert (~masks[path]).sum() == masks[path].size // 2
            if count in (2, 4) and count // 2 - 1 == part:  # pruned back by magnitude
                np.testing.assert_array_equal(
                    masks[path], topk(np.abs(before[path]), 0.5)
                )
    assert all((turns == 2).all() for turns in dense.values())
