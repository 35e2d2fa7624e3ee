"""Parameters spread over devices: the same numbers, and nothing large is gathered.

conftest.py makes eight devices of the processor.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_same, quick_jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import scores, select
from jaxprune.scores._lamp import ranked_in_turns
from jaxprune.training import (
    bridgeout,
    centripetal,
    current_masks,
    global_sparse_momentum,
    noisy_params,
    rigl,
)

COLLECTIVE = r"\b(all-\w+|collective-\w+|reduce-scatter)"
NOT_OPTIMISED = {"xla_backend_optimization_level": 0}


def mesh(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
    )


def placed(tree, where, specs):
    return {
        name: jax.device_put(leaf, NamedSharding(where, specs[name]))
        for name, leaf in tree.items()
    }


def program(fn, *args):
    """Compiled, and its text."""
    compiled = jax.jit(fn).lower(*args).compile(NOT_OPTIMISED)
    return compiled, compiled.as_text()


def all_gathered(text):
    """Type and size of all that is gathered."""
    found = re.findall(r"= \(?([a-z0-9]+)\[([0-9,]*)\][^=]*all-gather", text)
    return [(t, np.prod([int(n) for n in s.split(",") if n])) for t, s in found]


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


# --- narrow --------------------------------------------------------------------------


def mlp(p, x):
    return jnp.tanh(x @ p["w1"] + p["b1"][None]) @ p["w2"]


@pytest.fixture(scope="module")
def cut():
    """Parameters, masks, and rows of inputs."""
    rng = np.random.default_rng(1)
    shapes = {"w1": (4, 8), "b1": (8,), "w2": (8, 3)}
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    rows = normal(rng, 6, 4)
    groups = jaxprune.trace(mlp, params, rows)
    keep = {"w1:1": np.array([1, 0, 1, 1, 0, 1, 0, 0], bool)}
    return groups, params, jaxprune.expand_masks(groups, keep), rows


def test_variables_over_devices_are_scored_and_sliced_where_they_lie(cut):
    groups, params, masks, rows = cut
    specs = {"w1": P(None, "data"), "b1": P("data"), "w2": P("data")}
    put = placed(params, mesh(data=2), specs)
    for options in ({}, {"reduce": "l1", "normalize": "gaussian"}):
        found, expected = (
            scores.group_scores(groups, scores.magnitude(p), **options)
            for p in (put, params)
        )
        np.testing.assert_allclose(found["w1:1"], expected["w1:1"], rtol=1e-5)
    small = jaxprune.slice_params(put, masks)
    assert_same(small, jaxprune.slice_params(params, masks))
    assert len(small["w1"].sharding.device_set) == 2
    got = quick_jit(jaxprune.narrow(mlp, masks))(small, rows)
    assert_same(got, mlp(jaxprune.apply_masks(params, masks), rows))


# --- scores --------------------------------------------------------------------------


def net(p, x):
    return jnp.tanh(x @ p["w1"]) @ p["w2"]


def loss(p, x):
    return jnp.square(net(p, x)).sum(1).mean()


@pytest.fixture(scope="module")
def split():
    """Parameters on one device and on eight, batches, and how the latter are split."""
    rng = np.random.default_rng(0)
    plain = {"w1": normal(rng, 3, 32), "w2": normal(rng, 32, 2)}
    batches = [normal(rng, 6, 3), normal(rng, 6, 3)]
    specs = {"w1": P(None, "model"), "w2": P("model", None)}
    return plain, placed(plain, mesh(model=8), specs), batches, specs


def test_no_score_gathers_parameters(split):
    _, params, (batch, _), _ = split
    key = jax.random.key(0)

    def every(params, batch):
        fisher = scores.fisher(loss, params, [batch])
        return {
            "magnitude": scores.magnitude(params),
            "lp": scores.lp(params, 3.0),
            "random": scores.random(params, key),
            "taylor": scores.taylor(loss, params, [batch]),
            "snip": scores.snip(loss, params, [batch]),
            "grasp": scores.grasp(loss, params, [batch]),
            "fisher": fisher,
            "obd": scores.obd(params, fisher),
            "hessian": scores.hessian_diagonal(loss, params, [batch], key),
            "movement": scores.movement(params, jax.grad(loss)(params, batch)),
        }

    _, text = program(every, params, batch)
    assert "all-reduce" in text
    assert "all-gather" not in text and "all-to-all" not in text


def test_scores_of_split_parameters_are_the_same(split):
    plain, params, batches, specs = split
    groups = jaxprune.trace(net, plain, batches[0])
    for score in (
        lambda p: scores.taylor(loss, p, batches),
        lambda p: scores.wanda(net, p, batches),
        lambda p: scores.mean_activation(groups, net, p, batches),
        lambda p: scores.group_fisher(groups, loss, p, batches),
        lambda p: scores.contribution(groups, loss, p, batches),
    ):
        got, expected = score(params), score(plain)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, expected
        )
    found = scores.taylor(loss, params, batches)
    assert all(found[name].sharding.spec == specs[name] for name in specs)


# --- selection -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_selection_exchanges_counts_alone(kind):
    rng = np.random.default_rng(0)
    host = {
        "a": normal(rng, 32, 24),
        "c": rng.choice(3, size=(16, 8)).astype(np.float32) * np.float32(1e-9),
    }
    specs = {"a": P("data", "model"), "c": P(None, "model")}
    where = mesh(kind, data=2, model=2)
    put = placed(host, where, specs)
    with jax.set_mesh(where):
        compiled, text = program(lambda s: select.across_leaves(s, sparsity=0.6), put)
        masks = compiled(put)
    assert set(re.findall(COLLECTIVE, text)) <= {"all-reduce", "all-gather"}
    for dtype, size in all_gathered(text):  # counts, of every device
        assert dtype == "u32" and size <= 8
    for name, mask in select.across_leaves(host, sparsity=0.6).items():
        np.testing.assert_array_equal(masks[name], mask)
        assert masks[name].sharding.spec == specs[name]
    outside = select.per_leaf({"c": put["c"]}, sparsity=0.6)["c"]
    assert outside.sharding.spec == specs["c"]
    np.testing.assert_array_equal(outside, select.per_leaf(host, sparsity=0.6)["c"])


# --- optimisers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "collectives"),
    [
        ({"relative": False, "target_fraction": 1.0}, set()),
        # The scale of the kernel, and the ranks of its inputs, are sums.
        ({}, {"all-reduce"}),
    ],
)
def test_bridgeout_needs_no_communication_but_sums(how, collectives):
    tx = bridgeout(0.3, 1.5, **how)

    def step(params, state):
        noisy = noisy_params(params, state)
        return noisy, tx.update(noisy, state, params)

    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 8, 16))}
    expected = quick_jit(step)(params, tx.init(params))
    specs = {"kernel": P(None, None, "data", "model")}
    split = placed(params, mesh(data=2, model=2), specs)
    compiled, text = program(step, split, tx.init(split))
    assert set(re.findall(COLLECTIVE, text)) == collectives
    got = compiled(split, tx.init(split))
    assert got[0]["kernel"].sharding.is_equivalent_to(split["kernel"].sharding, 4)
    close = {"rtol": 1e-5, "atol": 1e-6}  # sums in another order
    np.testing.assert_allclose(got[0]["kernel"], expected[0]["kernel"], **close)
    np.testing.assert_allclose(got[1][0]["kernel"], expected[1][0]["kernel"], **close)


def test_rigl_gathers_counts_alone():
    host = {"w": normal(np.random.default_rng(0), 64, 32)}
    params = placed(host, mesh(data=2, model=2), {"w": P("data", "model")})
    tx = rigl(optax.sgd(0.1, momentum=0.9), 0.75, every=1, start=0)

    def run(params, opt_state):
        grads = {"w": jnp.sin(3 * params["w"])}
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    expected = quick_jit(run)(host, tx.init(host))
    compiled, text = program(run, params, tx.init(params))
    assert all(size <= 64 for _, size in all_gathered(text))
    got = compiled(params, tx.init(params))
    np.testing.assert_array_equal(
        current_masks(*got)["w"], current_masks(*expected)["w"]
    )
    np.testing.assert_allclose(got[0]["w"], expected[0]["w"], rtol=1e-6)
    assert not got[0]["w"].is_fully_replicated
    assert not got[1].masks.bits["w"].is_fully_replicated


def test_centripetal_and_global_sparse_momentum():
    """With a typed key around."""
    rng = np.random.default_rng(0)
    params = {"a": normal(rng, 4, 8), "b": normal(rng, 8, 4)}

    def relu_net(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    groups = jaxprune.trace(relu_net, params, np.ones((1, 4), np.float32), roles=True)
    ids = jaxprune.clusters.even(groups, sparsity=0.5)
    tx = optax.chain(
        centripetal(groups, ids, 0.5),
        global_sparse_momentum(0.3, weight_decay=0.1),
        optax.sgd(0.1, momentum=0.9),
    )

    @quick_jit
    def step(p, state, key):
        grads = jax.tree.map(lambda w: w * jax.random.normal(key, w.shape), p)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state, jax.random.split(key)[0]

    def trained(tree):
        state, key = tx.init(tree), jax.random.key(0)
        for _ in range(3):
            tree, state, key = step(tree, state, key)
        return tree

    specs = {"a": P("data", "model"), "b": P("model")}
    got = trained(placed(params, mesh(data=2, model=2), specs))
    assert not got["a"].is_fully_replicated
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, trained(params)
    )


# --- slices and LAMP of sharded leaves ------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_cut_axis_stays_sharded(kind):
    where = mesh(kind, fsdp=2, tensor=4)
    rng = np.random.default_rng(0)
    host = {"w": normal(rng, 16, 32), "b": normal(rng, 32), "both": normal(rng, 32, 3)}
    specs = {"w": P("fsdp", "tensor"), "b": P("tensor"), "both": P(("fsdp", "tensor"))}
    put = placed(host, where, specs)
    for kept, both in ((16, P(("fsdp", "tensor"))), (12, P("fsdp")), (5, P())):
        keep = np.arange(32) < kept
        masks = {"w": keep[None], "b": keep, "both": keep[:, None]}
        small = jaxprune.slice_params(put, masks)
        expected = jaxprune.slice_params(host, masks)
        jax.tree.map(np.testing.assert_array_equal, small, expected)
        tensor = "tensor" if kept % 4 == 0 else None
        wanted = {"w": P("fsdp", tensor), "b": P(tensor), "both": both}
        for name, spec in wanted.items():
            ours = small[name].sharding
            assert ours.is_equivalent_to(NamedSharding(where, spec), small[name].ndim)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_lamp_passes_shards_on_and_gathers_nothing(kind):
    where = mesh(kind, fsdp=2, tensor=4)
    leaf = normal(np.random.default_rng(0), 16, 8)
    leaf[:2] = 0.5  # ties
    for spec in (P("fsdp", "tensor"), P("tensor"), P(None, ("tensor", "fsdp"))):
        put = jax.device_put(leaf, NamedSharding(where, spec))
        found = scores.lamp({"w": put})["w"]
        assert found.sharding.is_equivalent_to(put.sharding, 2)
        np.testing.assert_allclose(found, scores.lamp({"w": leaf})["w"], rtol=1e-5)
    ranked = ranked_in_turns(put.sharding)
    text = ranked.lower(put).compile(NOT_OPTIMISED).as_text()
    assert not all_gathered(text) and "collective-permute" in text
