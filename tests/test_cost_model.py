"""Cost models against brute force: slice the variables, narrow the function, count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quick_jit
from zoo import MODELS

import jaxprune
from jaxprune.costing import Polynomial, cost_model, costs

pytestmark = pytest.mark.once

# Where `narrow` runs other equations than the program, activations are only close.
OTHER_EQUATIONS = {
    "dropout_train": "random numbers are drawn at full size",
    "noise": "random numbers are drawn at full size",
    "resnet_zero_pad": "scattered positions are picked after padding",
    "associative_scan": "scattered positions are picked after padding",
    "shufflenet": "a shuffle that is no grid any more is one gather",
    "cond": "the branches are equally dear",
    "switch": "its index is clamped once more",
}


def kept_sizes(keep):
    return {name: int(units.sum()) for name, units in keep.items()}


def random_keep(groups, seed):
    rng = np.random.default_rng(seed)
    return {
        name: rng.permutation(group.size) < rng.integers(1, group.size + 1)
        for name, group in groups.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_cost_is_what_the_narrowed_program_costs(name):
    built = MODELS[name].build()
    args = built.inputs(2, 0)
    groups = jaxprune.trace(built.apply_fn, built.variables, *args)
    model = cost_model(built.apply_fn, built.variables, *args, groups=groups)
    keep = random_keep(groups, 0)
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(built.variables, masks)
    narrowed = jaxprune.narrow(built.apply_fn, masks)
    full = costs(built.apply_fn, built.variables, *args)
    cut = costs(narrowed, small, *args)
    for expected, sizes in ((full, None), (cut, kept_sizes(keep))):
        assert model.parameters.value(sizes) == expected.parameters
        assert model.multiply_adds.value(sizes) == expected.multiply_adds
        bits = model.bit_operations(8, 4, 0.5).value(sizes)
        assert bits == pytest.approx(expected.bit_operations(8, 4, 0.5), rel=1e-12)
        assert isinstance(model.multiply_adds.value(sizes), int)
        if name in OTHER_EQUATIONS and expected is cut:
            continue
        assert model.activation_bytes.value(sizes) == expected.activation_bytes
        largest = model.largest_activation_bytes.value(sizes)
        assert largest == expected.largest_activation_bytes
    assert model.exact == (name not in ("uneven_split", "cond")), model.why
    assert cut.parameters < full.parameters


CONV = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def residual(params, x):
    """One group of 8 channels, which meets itself in the kernel of a branch."""
    x = jax.lax.conv_general_dilated(x, params["stem"], (1, 1), "SAME", **CONV)
    y = jax.lax.conv_general_dilated(x, params["branch"], (1, 1), "SAME", **CONV)
    return (x + y).mean((1, 2)) @ params["head"]


RESIDUAL = {
    "stem": jnp.ones((1, 1, 1, 8)),
    "branch": jnp.ones((3, 3, 8, 8)),
    "head": jnp.ones((8, 1)),
}
IMAGE = jnp.ones((1, 9, 9, 1))


def test_a_group_that_meets_itself_saves_less_than_its_gradient_says():
    """729 n^2: the gradient at 8 is 11 664, a channel saves 10 935; plus 81 and 1."""
    model = cost_model(residual, RESIDUAL, IMAGE)
    (name,) = model.sizes
    work = model.multiply_adds
    assert str(work) == f"82 {name} + 729 {name}^2"
    assert float(work.gradient()[name]) == 11_664 + 82
    assert work.without_one(name) == 10_935 + 82
    assert work.without_one(name, {name: 3}) == 729 * (9 - 4) + 82


def test_a_gradient_is_the_difference_where_no_group_meets_itself():
    model = cost_model(mlp, MLP, jnp.ones((5, 3)))
    sizes = {name: max(size // 2, 1) for name, size in model.sizes.items()}
    slopes = model.multiply_adds.gradient(sizes)
    for name in sizes:
        exact = model.multiply_adds.without_one(name, sizes)
        assert float(slopes[name]) == pytest.approx(exact, rel=1e-5)


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"][None])
    return jax.nn.relu(hidden @ params["w2"]) @ params["w3"]


MLP = {
    "w1": jnp.ones((3, 8)),
    "b1": jnp.ones(8),
    "w2": jnp.ones((8, 6)),
    "w3": jnp.ones((6, 2)),
}


def test_a_cost_is_a_penalty_that_trains_under_jit():
    model = cost_model(mlp, MLP, jnp.ones((5, 3)))
    budget = 0.5 * model.multiply_adds.full

    @quick_jit
    def step(gates):
        def penalty(gates):
            sizes = {name: jax.nn.sigmoid(g).sum() for name, g in gates.items()}
            return jax.nn.relu(model.multiply_adds.value(sizes) / budget - 1)

        slope = jax.grad(penalty)(gates)
        return jax.tree.map(lambda g, s: g - 0.3 * s, gates, slope)

    gates = {name: jnp.full(size, 1.0) for name, size in model.sizes.items()}
    for _ in range(150):
        gates = step(gates)
    sizes = {name: float(jax.nn.sigmoid(g).sum()) for name, g in gates.items()}
    assert model.multiply_adds.value(sizes) == pytest.approx(budget, rel=0.02)
    assert not any(np.isnan(g).any() for g in gates.values())


def test_traced_values_are_the_exact_ones():
    model = cost_model(mlp, MLP, jnp.ones((5, 3)))
    for cost in (
        model.parameters,
        model.multiply_adds,
        model.activation_bytes,
        model.largest_activation_bytes,
        model.bit_operations(8, 8),
    ):
        sizes = {"w1:1": 5, "w2:1": 3}
        traced = {name: jnp.asarray(n) for name, n in sizes.items()}
        value = quick_jit(cost.value)(traced)
        assert float(value) == pytest.approx(cost.value(sizes), rel=1e-6)
        assert set(cost.gradient(sizes)) == {"w1:1", "w2:1"}


def test_savings_of_all_groups_at_once_are_the_differences():
    built = MODELS["gru"].build()
    model = cost_model(built.apply_fn, built.variables, *built.inputs(1, 0))
    sizes = np.array(list(model.sizes.values()))
    steps = np.minimum(2, sizes - 1)
    for cost in (model.multiply_adds, model.activation_bytes, model.bit_operations()):
        now = dict(zip(model.sizes, sizes.tolist(), strict=True))
        found = cost.savings(sizes, steps)
        for k, name in enumerate(now):
            less = {**now, name: now[name] - int(steps[k])}
            expected = cost.value(now) - cost.value(less)
            assert found[k] == pytest.approx(expected, rel=1e-9)


def test_bit_operations_are_the_published_formula():
    """m n (f b_a b_w + b_a + b_w + log2 n), by hand for two layers."""
    found = costs(mlp, MLP, jnp.ones((1, 3)))
    expected = sum(
        m * n * (0.2 * 6 * 5 + 6 + 5 + np.log2(n)) for n, m in ((3, 8), (8, 6), (6, 2))
    )
    assert found.bit_operations(6, 5, 0.2) == pytest.approx(expected)


def test_units_that_weigh_differently_are_said_and_averaged():
    def some(params, x):  # only the first five units are read once more
        hidden = x @ params["w1"]
        return hidden @ params["w2"] + 2 * hidden[:, :5].sum(1, keepdims=True)

    params = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 1))}
    groups = jaxprune.trace(some, params, jnp.ones((2, 3)))
    model = cost_model(some, params, jnp.ones((2, 3)), groups=groups)
    assert not model.exact and "w1:1 hold unequal shares" in model.why
    values = []
    for left_out in range(8):
        masks = jaxprune.expand_masks(groups, {"w1:1": np.arange(8) != left_out})
        small = jaxprune.slice_params(params, masks)
        found = costs(jaxprune.narrow(some, masks), small, jnp.ones((2, 3)))
        values.append(found.activation_bytes)
        assert found.multiply_adds == model.multiply_adds.value({"w1:1": 7})
    mean = model.activation_bytes.value({"w1:1": 7})
    assert len(set(values)) == 2 and np.mean(values) == pytest.approx(mean)


def test_blocks_that_lose_units_of_their_own_cost_as_much():
    def net(p, x):
        heads = jnp.tanh((x @ p["v"]).reshape(2, 3, 5)).reshape(2, 15)
        return heads @ p["out"]

    params = {"v": jnp.ones((6, 15)), "out": jnp.ones((15, 4))}
    x = jnp.ones((2, 6))
    groups = jaxprune.trace(net, params, x, pin=["out:1"], balanced=["v:1#2"])
    assert [group.blocks for group in groups.values()] == [1, 3]
    model = cost_model(net, params, x, groups=groups)
    rng = np.random.default_rng(0)
    for left in (2, 4):
        units = np.concatenate([rng.permutation(5) < left for _ in range(3)])
        masks = jaxprune.expand_masks(groups, {"v:1#2": units})
        small = jaxprune.slice_params(params, masks)
        found = costs(jaxprune.narrow(net, masks), small, x)
        sizes = {"v:1#2": 3 * left}
        assert model.parameters.value(sizes) == found.parameters
        assert model.multiply_adds.value(sizes) == found.multiply_adds


def test_what_cannot_be_is_refused():
    model = cost_model(mlp, MLP, jnp.ones((5, 3)))
    with pytest.raises(
        ValueError, match="'w9:1', which does not exist.*are w1:1, w2:1"
    ):
        model.parameters.value({"w9:1": 3})
    with pytest.raises(ValueError, match="'x', which does not exist"):
        model.parameters.without_one("x")

    def tied(params, x):  # w1 and w2 share their units here, not there
        hidden = x @ params["w1"] + params["b1"][None]
        return (hidden[:, :6] + x @ params["w2"][:3]) @ params["w3"]

    groups = jaxprune.trace(mlp, MLP, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="couples units of .* hold apart, or pins"):
        cost_model(tied, MLP, jnp.ones((5, 3)), groups=groups)


def test_pinned_axes_cost_what_they_cost():
    groups = jaxprune.trace(mlp, MLP, jnp.ones((5, 3)), pin=["w2:1"])
    model = cost_model(mlp, MLP, jnp.ones((5, 3)), groups=groups)
    assert list(model.sizes) == ["w1:1"]
    assert str(model.parameters) == "12 + 10 w1:1"
    assert isinstance(model.parameters, Polynomial)
    assert model.flops.full == 2 * model.multiply_adds.full
