import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"][None])
    return jax.nn.relu(hidden @ params["w2"]) @ params["w3"]


X = jnp.ones((2, 3))


@pytest.fixture
def params(key):
    shapes = {"w1": (3, 8), "b1": (8,), "w2": (8, 4), "w3": (4, 2)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def test_prune_equals_the_masked_model(params):
    pruned = jaxprune.prune(mlp, params, X, sparsity=0.5)
    assert pruned.variables["w2"].shape == (4, 2)
    masked = mlp(jaxprune.apply_masks(params, pruned.masks), X)
    np.testing.assert_allclose(
        pruned.apply_fn(pruned.variables, X), masked, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("score, order", [("l1", 1), ("l2", 2)])
def test_prune_removes_the_units_of_smallest_norm(params, score, order):
    pruned = jaxprune.prune(mlp, params, X, sparsity=0.5, score=score)
    every = np.concatenate([params["w1"], params["b1"][None], params["w2"].T])
    norms = np.linalg.norm(every, ord=order, axis=0)
    kept = np.sort(np.argsort(norms)[4:])
    np.testing.assert_array_equal(np.flatnonzero(pruned.masks["b1"]), kept)


def test_global_scope_meets_the_budget_over_all_groups(params):
    params["w3"] = params["w3"] * 100  # the second layer matters more
    pruned = jaxprune.prune(mlp, params, X, sparsity=0.5, scope="global")
    assert pruned.variables["w2"].shape == (2, 4)


def test_a_function_can_score(params):
    pruned = jaxprune.prune(
        mlp, params, X, sparsity=0.25, score=lambda p: jax.tree.map(jnp.negative, p)
    )
    assert pruned.variables["w1"].shape == (3, 6)


def test_scores_made_elsewhere_are_taken_as_they_are(params):
    units = {"w1:1": jnp.arange(8.0), "w2:1": jnp.array([3.0, 1.0, 2.0, 0.0])}
    pruned = jaxprune.prune(mlp, params, X, sparsity=0.5, score=units)
    np.testing.assert_array_equal(np.flatnonzero(pruned.masks["w3"][:, 0]), [0, 2])
    np.testing.assert_array_equal(np.flatnonzero(pruned.masks["b1"]), [4, 5, 6, 7])
    weights = {**jax.tree.map(jnp.zeros_like, params), "b1": jnp.arange(8.0)[::-1]}
    pruned = jaxprune.prune(mlp, params, X, sparsity=0.5, score=weights)
    np.testing.assert_array_equal(np.flatnonzero(pruned.masks["b1"]), [0, 1, 2, 3])


def test_geometric_median_keeps_one_of_two_equal_units(params):
    for name, axis in (("w1", 1), ("b1", 0), ("w2", 0)):
        values = jnp.moveaxis(params[name], axis, 0)
        values = values.at[4:].set(0.01 * values[4:])  # a cluster, and four apart
        params[name] = jnp.moveaxis(values, 0, axis)
    pruned = jaxprune.prune(mlp, params, X, sparsity=0.25, score="geometric_median")
    assert np.flatnonzero(~pruned.masks["b1"]).min() >= 4


def test_synaptic_flow_keeps_the_units_with_the_heaviest_paths(params):
    del params["b1"]
    net = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["w1"]) @ p["w2"]) @ p["w3"]  # noqa: E731
    pruned = jaxprune.prune(net, params, X, sparsity=0.5, score="synflow")
    one, two, three = (np.abs(params[n]) for n in ("w1", "w2", "w3"))
    paths = one.sum(0) * (two @ three).sum(1)
    kept = np.flatnonzero(pruned.masks["w1"][0])
    np.testing.assert_array_equal(kept, np.sort(np.argsort(paths)[4:]))


def test_lamp_ranks_units_across_groups_by_what_they_add_to_their_group(params):
    params["w3"] = params["w3"] * 100  # magnitude would empty the first layer first
    pruned = jaxprune.prune(mlp, params, X, sparsity=0.5, scope="global", score="lamp")
    groups = pruned.groups
    norms = jaxprune.group_scores(groups, jaxprune.scores.magnitude(params))
    lamp = {}
    for name, each in norms.items():
        squares = np.square(np.asarray(each, np.float64))
        lamp |= {
            (name, u): s / squares[squares >= s].sum() for u, s in enumerate(squares)
        }
    lowest = sorted(lamp, key=lamp.get)[:6]
    kept = {"w1:1": pruned.masks["b1"], "w2:1": pruned.masks["w3"][:, 0]}
    cut = {(name, u) for name in kept for u in np.flatnonzero(~kept[name])}
    assert cut == set(lowest)


def test_inexact_groups_are_cut_only_on_demand():
    def gate(params, x):
        return jax.nn.softmax(x @ params["w1"]) @ params["w2"]

    params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=r"exact=False.*w1:1: a maximum over it"):
        jaxprune.prune(gate, params, X, sparsity=0.5)
    pruned = jaxprune.prune(gate, params, X, sparsity=0.5, exact=False)
    assert pruned.variables["w1"].shape == (3, 2)


def test_error_texts(params):
    with pytest.raises(ValueError, match="unknown score 'l3'"):
        jaxprune.prune(mlp, params, X, sparsity=0.5, score="l3")
    with pytest.raises(ValueError, match="scope must be 'group' or 'global'"):
        jaxprune.prune(mlp, params, X, sparsity=0.5, scope="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"nothing can be cut: .*input args/1"):
        jaxprune.prune(
            lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, X, sparsity=0.5
        )
