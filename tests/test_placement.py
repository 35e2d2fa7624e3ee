from typing import get_args

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import scores
from jaxprune.core import _placement as placement
from jaxprune.core._placement import (
    all_placed_like,
    empty,
    on_all_cores,
    on_host,
    placed_like,
)

WIDTH = 13  # in no other test: what is compiled for it is compiled here


@pytest.fixture
def compiled():
    """How often the compiler has run since the test began."""
    durations = []

    def listen(name, duration, **kwargs):
        if "backend_compile" in name:
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield durations
    jax.monitoring.unregister_event_duration_listener(listen)


def mlp(params, x):
    y = x @ params["up"] * params["scale"][None] + params["bias"][None]
    return jax.nn.relu(y) @ params["down"]


def numbers():
    rng = np.random.default_rng(0)
    shapes = {"up": (3, WIDTH), "scale": (WIDTH,), "bias": (WIDTH,), "down": (WIDTH, 2)}
    return {name: rng.standard_normal(s, np.float32) for name, s in shapes.items()}


@pytest.mark.parametrize("scope", ["group", "global"])
@pytest.mark.parametrize(
    "score", ["l1", "l2", "lamp", "batch_norm_scale", "geometric_median"]
)
def test_pruning_on_the_host_compiles_nothing(score, scope, compiled):
    params = jax.device_put(numbers())
    x = np.zeros((1, 3), np.float32)
    pruned = jaxprune.prune(
        mlp, params, x, sparsity=0.5, score=score, scope=scope, normalize="mean"
    )
    assert pruned.variables["up"].shape == (3, WIDTH // 2 + 1)
    assert not compiled
    jax.jit(lambda p: p + 1)(params["up"])
    assert compiled  # the listener does listen


@pytest.mark.parametrize("reduce", get_args(scores.Reduce))
def test_numpy_and_one_program_score_alike(reduce, compiled):
    # Without signs, as some ways to reduce ask.
    weights = jax.device_put(jax.tree.map(np.abs, numbers()))
    params = {**weights, "scale": np.full(WIDTH, 2, np.float32)}
    groups = jaxprune.trace(mlp, params, np.zeros((1, 3), np.float32))
    found = scores.group_scores(groups, params, reduce=reduce)["up:1"]
    assert isinstance(found, jax.Array) and found.dtype == jnp.float32
    assert not compiled
    weak = {**params, "scale": jnp.full(WIDTH, 2.0)}  # typed weakly: JAX's alone
    compiled.clear()
    expected = scores.group_scores(groups, weak, reduce=reduce)["up:1"]
    assert len(compiled) == 1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", get_args(scores.Normalize))
def test_numpy_and_one_program_normalize_alike(normalize, compiled):
    units = {"a": numbers()["bias"], "b": np.zeros(4, np.float32)}
    found = scores.normalized(units, normalize)
    assert not compiled
    expected = jax.jit(lambda u: scores.normalized(u, normalize))(units)
    for name in units:
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "score", [scores.magnitude, lambda p: scores.lp(p, 3.0), scores.lamp]
)
def test_numpy_and_one_program_rate_weights_alike(score, compiled):
    weak = {"a": jnp.full((2, 3), -2.0), "b": jnp.full((4, 3), 0.5)}
    strong = {name: np.asarray(leaf) for name, leaf in weak.items()}
    compiled.clear()
    found = score(strong)
    assert not compiled
    expected = score(weak)
    assert len(compiled) <= 1  # all leaves in one program
    for name in weak:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


def test_what_numpy_can_read():
    array = jnp.ones(3)
    assert on_host(array, np.ones(2), np.float32(1)) and on_host()
    assert not on_host(jax.random.key(0)) and not on_host(1.0)
    assert not on_host(jnp.asarray(1.0))  # weakly typed
    assert not jax.vmap(lambda x: jnp.asarray(on_host(x)))(array).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_jax_takes_an_empty_array_over(dtype):
    array = empty((3, 5), jnp.dtype(dtype))
    assert array.shape == (3, 5) and array.dtype == dtype
    array[:] = 1
    taken = placed_like(array, jnp.ones(2))
    assert taken.unsafe_buffer_pointer() == array.ctypes.data
    assert not taken.committed and (np.asarray(taken) == 1).all()
    device = jax.devices()[0]
    like = jax.device_put(jnp.ones(2), device)
    assert placed_like(np.ones(3, np.float32), like).committed


def test_each_array_goes_where_its_leaf_lies():
    committed = jax.device_put(jnp.ones(2), jax.devices()[0])
    leaves = [jnp.ones(1), committed, np.ones(1), committed]
    arrays = [np.full(2, k, np.float32) for k in range(4)]
    placed = all_placed_like(arrays, leaves)
    assert [array.committed for array in placed] == [False, True, False, True]
    np.testing.assert_array_equal([array[0] for array in placed], range(4))
    assert all_placed_like([], []) == []


@pytest.mark.parametrize("large", [1, 5, 1 << 18])
def test_all_cores_give_what_one_gives(large, monkeypatch):
    monkeypatch.setattr(placement, "_LARGE", large)
    items = [np.full(n, float(n)) for n in (3, 9, 0, 4, 7)]
    sizes = [item.size for item in items]
    assert on_all_cores(np.sum, items, sizes) == [9.0, 81.0, 0.0, 16.0, 49.0]
    assert on_all_cores(np.sum, [], []) == []
    with pytest.raises(ZeroDivisionError):
        on_all_cores(lambda n: 1 // n, [1, 2, 0], [9, 9, 9])


def test_slices_and_scores_are_the_same_on_all_cores(monkeypatch):
    variables, groups = chain.variables(), chain.groups()
    masks = jaxprune.expand_masks(groups, chain.random_keep())

    def both():
        found = jaxprune.group_scores(groups, variables)
        return jaxprune.slice_params(variables, masks), found

    one = both()
    monkeypatch.setattr(placement, "_LARGE", 1)
    jax.tree.map(np.testing.assert_array_equal, both(), one)
