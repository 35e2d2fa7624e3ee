"""Centripetal SGD against loops in numpy, the claims of the paper, and the contract."""

import itertools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contract import quick_jit
from zoo import MODELS, weights
from zoo.structures import STRUCTURES

import jaxprune
from jaxprune import clusters
from jaxprune.core._leaves import named_leaves
from jaxprune.training import CentripetalState, centripetal

pytestmark = pytest.mark.once

X = np.random.default_rng(7).normal(size=(5, 4)).astype(np.float32)
RATE, DECAY, PULL = 0.1, 0.05, 0.5
IDS = {"a:1": np.array([3, 1, 3, 3, 1, 8]), "e:1": np.array([0, 1, 0, 1])}


def mlp(p, x):
    h = jax.nn.relu(x @ p["a"] + p["bias"][None])
    return jax.nn.relu(h @ p["e"]) @ p["c"]


def loss(p):
    return ((mlp(p, X) - X[:, :2]) ** 2).mean()


grad = quick_jit(jax.grad(loss))


@pytest.fixture(scope="module")
def net():
    variables = weights(a=(4, 6), bias=(6,), e=(6, 4), c=(4, 2))
    variables["bias"] = np.linspace(0.1, 0.6, 6, dtype=np.float32)
    params = jax.tree.map(jnp.asarray, variables)
    return jaxprune.trace(mlp, params, X, roles=True), params


def trained(tx, params, steps, grads=grad):
    """The parameters of every step."""
    update = quick_jit(tx.update)
    state, path = tx.init(params), [params]
    for _ in range(steps):
        updates, state = update(grads(path[-1]), state, path[-1])
        path.append(optax.apply_updates(path[-1], updates))
    return path


def by_loops(groups, ids, params, grads, pull, share=0.1, decay=0.0):
    """The paper's formula, unit by unit, in float64."""
    weights = {k: np.array(v, np.float64) for k, v in named_leaves(params).items()}
    grads = {k: np.array(v, np.float64) for k, v in named_leaves(grads).items()}
    kernels = [name for name, w in weights.items() if w.ndim > 1 and "bias" not in name]
    out, force = {k: v.copy() for k, v in grads.items()}, dict.fromkeys(weights, None)
    center = {k: v.copy() for k, v in weights.items()}
    for name, numbers in ids.items():
        for m in groups[name].members:
            path = m.path.removeprefix("params/")
            if m.role != "producer" or path not in weights:
                continue
            for array in (out[path], center[path]):
                rows = np.moveaxis(array, m.axis, 0)
                before = rows.copy()
                for unit, own in enumerate(numbers):
                    mates = [k for k, other in enumerate(numbers) if other == own]
                    for slot, position in enumerate(m.index[unit]):
                        rows[position] = np.mean(
                            [before[m.index[k][slot]] for k in mates], axis=0
                        )
            force[path] = pull * (1.0 if path in kernels else share)
    for path, w in weights.items():
        if force[path] is not None:
            out[path] += force[path] * (w - center[path])
        if path in kernels:
            out[path] += decay * w
    return out


# -------------------------------------------------------------------- against the paper


def test_one_step_is_the_formula(net):
    groups, params = net
    tx = centripetal(groups, IDS, PULL, weight_decay=DECAY)
    updates, state = quick_jit(tx.update)(grad(params), tx.init(params), params)
    expected = by_loops(groups, IDS, params, grad(params), PULL, decay=DECAY)
    for name, update in updates.items():
        np.testing.assert_allclose(update, expected[name], atol=2e-6)
    np.testing.assert_array_equal(updates["c"] - DECAY * params["c"], grad(params)["c"])
    assert int(state.count) == 1


# What traces: residual streams, concatenation, depthwise, flatten, heads, recurrence.
PROGRAMS = {
    "resnet_projection": MODELS,
    "densenet": MODELS,
    "depthwise_multiplier": MODELS,
    "flatten_nchw": MODELS,
    "vit": MODELS,
    "gru": MODELS,
    "swiglu_fused": STRUCTURES,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_any_program_is_the_formula_and_is_drawn_into_what_merges(name):
    built = PROGRAMS[name][name].build()
    args = built.inputs(2, 0)
    groups = jaxprune.trace(built.apply_fn, built.variables, *args, roles=True)
    ids = clusters.even(groups, sparsity=0.5)
    paths = jaxprune.core.parameter_paths(groups.shapes)
    params = {
        path.removeprefix("params/"): jnp.asarray(leaf)
        for path, leaf in named_leaves(built.variables).items()
        if path in paths
    }
    rng = np.random.default_rng(0)
    grads = {k: rng.normal(size=w.shape).astype(np.float32) for k, w in params.items()}
    tx = centripetal(groups, ids, PULL, vector_strength=1.0)
    state, update = tx.init(params), quick_jit(tx.update)
    updates, _ = update(grads, state, params)
    expected = by_loops(groups, ids, params, grads, PULL, share=1.0)
    for path, got in updates.items():
        np.testing.assert_allclose(got, expected[path], atol=1e-5, err_msg=path)
    # Pulled all the way in one step.
    zeros = jax.tree.map(jnp.zeros_like, params)
    pull, _ = update(zeros, state._replace(strength=jnp.float32(1)), params)
    met = optax.apply_updates(params, jax.tree.map(jnp.negative, pull))
    leaves = named_leaves(built.variables)
    prefix = "params/" if "params" in built.variables else ""
    leaves |= {prefix + path: np.asarray(w) for path, w in met.items()}
    off = jaxprune.deviation(
        jax.tree.structure(built.variables).unflatten(leaves.values()), groups, ids
    )
    before = jaxprune.deviation(built.variables, groups, ids)
    rest = statistics_deviation(built.variables, groups, ids)
    for name, value in off.items():
        assert float(before[name]) > 1e-3
        assert float(value) - rest[name] < 1e-6 * float(before[name]) + 1e-9


def statistics_deviation(variables, groups, ids):
    """What BatchNorm statistics contribute; the optimiser does not move them."""
    only = {k: v for k, v in variables.items() if k == "batch_stats"}
    found = jaxprune.deviation(only, groups, ids) if only else dict.fromkeys(ids, 0.0)
    return {name: float(value) for name, value in found.items()}


def test_k1_differences_shrink_by_one_factor_whatever_the_data(net):
    groups, params = net
    tx = optax.chain(
        centripetal(groups, IDS, PULL, weight_decay=DECAY), optax.sgd(RATE)
    )
    path = trained(tx, params, 12)
    factor = 1 - RATE * (DECAY + PULL)
    vector = 1 - RATE * 0.1 * PULL
    for before, after in itertools.pairwise(path):
        for leaf, i, j, f in (("a", 0, 2, factor), ("e", 1, 3, factor)):
            np.testing.assert_allclose(
                after[leaf][:, i] - after[leaf][:, j],
                f * (before[leaf][:, i] - before[leaf][:, j]),
                atol=1e-6,
            )
        b, a = before["bias"], after["bias"]
        np.testing.assert_allclose(a[0] - a[3], vector * (b[0] - b[3]), atol=1e-6)


def test_k2_the_mean_of_a_cluster_is_trained_by_sgd(net):
    """On the averaged gradient; the strength has no effect on it."""
    groups, params = net
    mates = [0, 2, 3]
    grads = lambda p: jax.tree.map(jnp.sin, p)  # noqa: E731 - any function of place
    ends = []
    for pull in (0.0, PULL):
        tx = optax.chain(
            centripetal(groups, IDS, pull, weight_decay=DECAY), optax.sgd(RATE)
        )
        before, after = trained(tx, params, 1, grads)
        mean, slope = (
            before["a"][:, mates].mean(1),
            grads(before)["a"][:, mates].mean(1),
        )
        expected = mean - RATE * (slope + DECAY * mean)
        ends.append(after["a"][:, mates].mean(1))
        np.testing.assert_allclose(ends[-1], expected, atol=1e-6)
    np.testing.assert_allclose(*ends, atol=1e-6)


def test_k3_averaged_gradients_alone_never_merge(net):
    groups, params = net
    path = trained(
        optax.chain(centripetal(groups, IDS, 0.0), optax.sgd(RATE)), params, 9
    )
    gap = [p["a"][:, 0] - p["a"][:, 2] for p in (path[0], path[-1])]
    np.testing.assert_allclose(*gap, atol=1e-6)
    assert np.abs(path[0]["a"] - path[-1]["a"]).max() > 0.01


def test_k4_trained_units_are_trimmed_without_loss(net):
    groups, params = net
    tx = optax.chain(
        centripetal(groups, IDS, 5.0, vector_strength=1.0), optax.sgd(RATE)
    )
    params = trained(tx, params, 60)[-1]
    merged = jaxprune.merge(params, groups, IDS)
    assert max(map(float, merged.deviation.values())) < 1e-10
    assert jaxprune.merge_error(mlp, params, merged, X).absolute < 1e-6
    assert merged.variables["e"].shape == (3, 2)


def test_k5_singletons_are_sgd_with_weight_decay(net):
    groups, params = net
    alone = clusters.even(groups, sparsity=0.0)
    ours = optax.chain(
        centripetal(groups, alone, PULL, weight_decay=DECAY),
        optax.sgd(RATE, momentum=0.9, nesterov=True),
    )
    kernels = {"a": True, "e": True, "c": True, "bias": False}
    plain = optax.chain(
        optax.add_decayed_weights(DECAY, kernels),
        optax.sgd(RATE, momentum=0.9, nesterov=True),
    )
    ends = trained(ours, params, 10)[-1], trained(plain, params, 10)[-1]
    chex.assert_trees_all_close(*ends, atol=1e-6)


def test_k6_the_deviation_falls_geometrically(net):
    groups, params = net
    names = {"e:1": IDS["e:1"]}  # a group without vectors
    link = centripetal(groups, names, PULL, weight_decay=DECAY)
    path = trained(optax.chain(link, optax.sgd(RATE)), params, 20)
    off = [float(jaxprune.deviation(p, groups, names)["e:1"]) for p in path]
    factor = (1 - RATE * (DECAY + PULL)) ** 2
    np.testing.assert_allclose(off, off[0] * factor ** np.arange(21), rtol=1e-4)
    # The larger root of x^2 - (1 + m - r e) x + m, about 1 - r e / (1 - m).
    m, small = 0.5, 0.01
    tx = optax.chain(centripetal(groups, names, PULL), optax.sgd(small, momentum=m))
    path = trained(tx, params, 40)
    off = [float(jaxprune.deviation(p, groups, names)["e:1"]) for p in path[-2:]]
    half = (1 + m - small * PULL) / 2
    root = half + np.sqrt(half**2 - m)
    assert off[1] / off[0] == pytest.approx(root**2, rel=1e-4)
    assert root == pytest.approx(1 - small * PULL / (1 - m), abs=2e-4)


# ------------------------------------------------------------------------- the contract


def test_contract(net, tmp_path):
    """Structure, dtypes, one trace for all clusters, bfloat16, a checkpoint."""
    groups, params = net
    tx = centripetal(groups, IDS, PULL, weight_decay=DECAY)
    traces = []

    @quick_jit
    def step(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params)

    state = tx.init(params)
    updates, after = step(grad(params), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    # Clusters are data: other ones in the state need no other program.
    others = {name: np.zeros_like(ids) for name, ids in IDS.items()}
    other = centripetal(groups, others, PULL).init(params)
    updates, _ = step(grad(params), other, params)
    expected = by_loops(groups, others, params, grad(params), PULL, decay=DECAY)
    np.testing.assert_allclose(updates["a"], expected["a"], atol=2e-6)
    assert len(traces) == 1

    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    updates, _ = quick_jit(tx.update)(half, tx.init(half), half)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, half)
    expected = by_loops(groups, IDS, half, half, PULL, decay=DECAY)
    np.testing.assert_allclose(updates["a"].astype("f"), expected["a"], rtol=0.01)

    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", after)
        saver.wait_until_finished()
        chex.assert_trees_all_equal(saver.restore(tmp_path / "state", after), after)


def test_equal_units_stay_equal_to_the_bit(net):
    groups, params = net
    same = {**params, "a": params["a"][:, [0, 1, 0, 0, 1, 5]]}
    same["bias"] = same["bias"][jnp.array([0, 1, 0, 0, 1, 5])]
    tx = optax.chain(centripetal(groups, IDS, PULL), optax.sgd(RATE, momentum=0.9))
    end = trained(tx, same, 5)[-1]
    for one, other in ((0, 2), (0, 3), (1, 4)):
        np.testing.assert_array_equal(end["a"][:, one], end["a"][:, other])
        assert end["bias"][one] == end["bias"][other]


def test_long_axes_are_averaged_by_segments(monkeypatch, net):
    groups, params = net
    tx = centripetal(groups, IDS, PULL, weight_decay=DECAY)
    short, _ = quick_jit(tx.update)(grad(params), tx.init(params), params)
    module = sys.modules["jaxprune.training._centripetal"]
    monkeypatch.setattr(module, "_SMALL_AXIS", 2)
    long, _ = quick_jit(tx.update)(grad(params), tx.init(params), params)
    chex.assert_trees_all_close(long, short, atol=1e-6)


def test_schedules_and_what_stands_around_it(net):
    groups, params = net
    tx = optax.chain(
        optax.clip_by_global_norm(1e3),
        centripetal(groups, IDS, lambda count: jnp.where(count < 2, 0.0, PULL)),
        optax.sgd(lambda count: RATE / (1 + count.astype(jnp.float32))),
    )
    path = trained(tx, params, 3)
    gaps = [p["a"][:, 0] - p["a"][:, 2] for p in path]
    np.testing.assert_allclose(gaps[2], gaps[0], atol=1e-6)
    np.testing.assert_allclose(
        gaps[3], (1 - RATE / 3 * PULL) * gaps[2], rtol=1e-4, atol=1e-7
    )


def test_the_state_outlives_merging(net):
    """Momentum is sliced, and goes on behind the link."""
    groups, params = net
    tx = optax.chain(centripetal(groups, IDS, PULL), optax.sgd(RATE, momentum=0.9))
    _, state = quick_jit(tx.update)(grad(params), tx.init(params), params)
    merged = jaxprune.merge(params, groups, IDS)
    sliced = jaxprune.slice_opt_state(tx, state, merged.masks)
    assert isinstance(sliced[0], CentripetalState)
    np.testing.assert_array_equal(
        sliced[1][0].trace["a"], state[1][0].trace["a"][:, np.array([0, 1, 5])]
    )
    after = optax.sgd(RATE, momentum=0.9)
    updates, _ = after.update(merged.variables, sliced[1], merged.variables)
    chex.assert_trees_all_equal_shapes(updates, merged.variables)
    with pytest.raises(ValueError, match="are these parameters merged already"):
        tx.update(merged.variables, sliced, merged.variables)


def test_errors(net):
    groups, params = net
    with pytest.raises(ValueError, match=r"clusters\[a:1\] has shape \(5,\).* 6 units"):
        centripetal(groups, {"a:1": np.arange(5)})
    with pytest.raises(ValueError, match=r"group 'a:0'.*did you mean a:1"):
        centripetal(groups, {"a:0": np.arange(4)})
    with pytest.raises(TypeError, match="must be integers, got float64"):
        centripetal(groups, {"a:1": np.ones(6)})
    with pytest.raises(ValueError, match="traced without roles=True"):
        centripetal(jaxprune.trace(mlp, params, X), IDS)
    for name in ("strength", "vector_strength", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            centripetal(groups, IDS, **{name: -1.0})
    tx = centripetal(groups, IDS)
    with pytest.raises(ValueError, match=r"tx.update\(grads, opt_state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(
        ValueError, match="params lack a, which produces the units of a:1"
    ):
        tx.init({"e": params["e"]})
