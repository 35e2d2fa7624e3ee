import itertools
import typing

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quick_jit

import jaxprune
from jaxprune import scores
from jaxprune.core._groups import Group, Groups, Member
from jaxprune.core._leaves import named_leaves
from jaxprune.scores import _unit_sums as unit_sums

pytestmark = pytest.mark.once

SCORES = {
    "magnitude": scores.magnitude,
    "l1": scores.l1,
    "l2": scores.l2,
    "lp": lambda params: scores.lp(params, 3.0),
    "lamp": scores.lamp,
    # This generator compiles in no time.
    "random": lambda params: scores.random(params, jax.random.key(0, impl="rbg")),
    "batch_norm_scale": scores.batch_norm_scale,
    "activation_probability": scores.activation_probability,
}
KEEP_DTYPE = ("magnitude", "l1", "l2", "batch_norm_scale")


@pytest.fixture
def variables():
    return jax.tree.map(jnp.asarray, chain.variables())


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    shapes = {"bias": (4,), "kernel": (6, 4), "scale": (4,)}
    return {n: jnp.array(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_finite_like_params_and_compiles_to_itself(name, layer):
    score, paths = SCORES[name], named_leaves(layer)
    plain = named_leaves(score(layer))
    compiled = named_leaves(quick_jit(score)(layer))
    assert plain.keys() == compiled.keys() and plain.keys() <= paths.keys()
    for path, values in plain.items():
        assert values.shape == paths[path].shape and values.dtype == jnp.float32
        assert np.isfinite(values).all() and (values >= 0).all()
        np.testing.assert_allclose(values, compiled[path], rtol=2e-6)


@pytest.mark.parametrize("name", SCORES)
def test_every_score_takes_bfloat16_and_counts_in_float32(name, layer):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    found, expected = named_leaves(SCORES[name](half)), named_leaves(SCORES[name](wide))
    for path, values in found.items():
        kept = jnp.bfloat16 if name in KEEP_DTYPE else jnp.float32
        assert values.dtype == kept
        np.testing.assert_array_equal(values.astype(jnp.float32), expected[path])


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_finite_on_zeros_and_on_a_single_weight(name):
    for leaf in (jnp.zeros((6, 4)), jnp.ones((1, 1))):
        params = {"scale": leaf, "bias": leaf}
        for values in jax.tree.leaves(SCORES[name](params)):
            assert np.isfinite(values).all()
    assert (SCORES["lamp"]({"w": jnp.zeros((6, 4))})["w"] == 0).all()


@pytest.mark.parametrize("name", [name for name in SCORES if name != "random"])
def test_every_score_goes_with_its_weight(name, layer):
    order = np.array([2, 0, 3, 1])
    before = named_leaves(SCORES[name](layer))
    after = SCORES[name](jax.tree.map(lambda leaf: leaf[..., order], layer))
    for path, values in named_leaves(after).items():
        np.testing.assert_allclose(values, before[path][..., order], rtol=1e-6)


def test_lp_is_a_power_and_its_sum_a_norm(variables):
    units = scores.group_scores(chain.groups(), scores.lp(variables, 3.0), reduce="sum")
    for name, values in units.items():
        norms = [np.linalg.norm(unit_entries(name, u), 3) for u in range(len(values))]
        np.testing.assert_allclose(values ** (1 / 3), norms, rtol=1e-5)
    with pytest.raises(ValueError, match="p must be above 0, got 0"):
        scores.lp(variables, 0)


def brute_force_lamp(weights):
    squares = np.asarray(weights, np.float64).ravel() ** 2
    found = [
        square / max(squares[squares >= square].sum(), 1e-300) for square in squares
    ]
    return np.reshape(found, np.shape(weights))


@pytest.mark.parametrize("ties", [False, True])
def test_lamp_equals_the_published_formula(ties, variables):
    kernel = variables["params"]["conv2"]["kernel"]
    kernel = jnp.round(kernel) if ties else kernel
    found = scores.lamp({"kernel": kernel, "bias": jnp.ones(3)})
    assert found["bias"] is None
    np.testing.assert_allclose(found["kernel"], brute_force_lamp(kernel), rtol=1e-5)
    if not ties:
        assert found["kernel"].max() == 1.0


def test_activation_probability_equals_monte_carlo(key):
    gamma = jnp.array([1.0, -0.5, 2.0, 0.3, 0.0, 0.0, 0.0, 1e-30])
    beta = jnp.array([-0.7, 0.4, 0.0, 1.0, -0.1, 0.1, 0.0, -0.1])
    found = scores.activation_probability({"bn": {"scale": gamma, "bias": beta}})
    found = found["bn"]["scale"]
    draws = jax.random.normal(key, (100_000, 1)) * gamma[None] + beta[None]
    share = (draws > 0).mean(0)
    np.testing.assert_allclose(found, share, atol=5 * np.sqrt(0.25 / 1e5))
    np.testing.assert_array_equal(found[4:], [0, 1, 0, 0])


def test_activation_probability_pairs_the_leaves_of_a_layer():
    params = {
        "a": {"scale": jnp.array([2.0]), "bias": jnp.array([-2.0])},
        "b": {"scale": jnp.array([1.0])},
        "dense": {"bias": jnp.array([9.0])},
    }
    found = scores.activation_probability(params)
    assert found["dense"]["bias"] is None and found["a"]["bias"] is None
    np.testing.assert_allclose(found["a"]["scale"], [0.15865525], rtol=1e-6)
    np.testing.assert_allclose(found["b"]["scale"], [0.5])
    with pytest.raises(ValueError, match=r"no leaf is called 'gamma'.*bias, scale"):
        scores.activation_probability(params, scale="gamma")
    with pytest.raises(ValueError, match=r"'beta' lies beside one called 'scale'"):
        scores.activation_probability(params, bias="beta")


def brute_force_median(name, members=None):
    units = range(chain.groups()[name].size)
    vectors = [unit_entries(name, u, members) for u in units]
    return [sum(np.linalg.norm(v - w) for w in vectors) for v in vectors]


def test_geometric_median_equals_a_loop_over_pairs(variables):
    groups, choices = chain.groups(), {"all": None, "first": 1}
    found = quick_jit(
        lambda v: {m: scores.geometric_median(groups, v, members=m) for m in choices}
    )(variables)
    for members, most in choices.items():
        for name, values in found[members].items():
            expected = brute_force_median(name, most)
            np.testing.assert_allclose(values, expected, rtol=1e-5)


def one_leaf(size):
    group = Group("g", size, (Member("w", 0, np.arange(size)[:, None]),))
    return Groups({"g": group}, (), {"w": (size, 2)}, jax.tree.structure({"w": 0}))


def test_geometric_median_sees_signs():
    # Torch-Pruning's distances are of |w|: these four filters score the same there.
    filters = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    found = scores.geometric_median(one_leaf(4), {"w": filters})["g"]
    two, ten = np.sqrt(2), np.sqrt(10)
    np.testing.assert_allclose(
        found, [2 + two + ten, 2 + two + ten, 2 * two + 2, 2 * ten + 2], rtol=1e-6
    )


def test_geometric_median_of_close_filters_far_from_zero():
    # Distances 1 at offset 10^3: without centring, float32 has no digit left.
    filters = jnp.array([[1000.0, 1000.0], [1001.0, 1000.0], [1003.0, 1000.0]])
    found = scores.geometric_median(one_leaf(3), {"w": filters})["g"]
    np.testing.assert_allclose(found, [4, 3, 5], rtol=1e-5)


def test_geometric_median_of_a_single_unit_and_of_equal_units_is_zero():
    for size in (1, 3):
        filters = {"w": jnp.full((size, 2), 0.3)}
        found = scores.geometric_median(one_leaf(size), filters)["g"]
        np.testing.assert_array_equal(found, np.zeros(size))


def test_magnitude_is_the_absolute_value_and_skips_what_is_not_float():
    params = {
        "bf16": jnp.array([-2.0, 1.0], jnp.bfloat16),
        "complex": jnp.array([3.0 + 4.0j]),
        "int": jnp.arange(3),
        "key": jax.random.key(0),
    }
    found = scores.magnitude(params)
    assert found["int"] is None and found["key"] is None
    assert found["bf16"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["bf16"], np.array([2, 1], jnp.bfloat16))
    np.testing.assert_array_equal(found["complex"], [5.0])


def test_random_differs_by_leaf_and_key_and_is_uniform(key):
    params = {"a": jnp.zeros((100, 100)), "b": jnp.zeros((100, 100))}
    found = scores.random(params, key)
    assert not np.array_equal(found["a"], found["b"])
    assert not np.array_equal(found["a"], scores.random(params, jax.random.key(1))["a"])
    # Mean and variance of U[0, 1) within 5 standard errors of 10^4 draws.
    assert abs(found["a"].mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / 1e4)
    assert abs(found["a"].var() - 1 / 12) < 5 * np.sqrt(1 / 180 / 1e4)


def test_batch_norm_scale_scores_nothing_else(variables):
    found = named_leaves(scores.batch_norm_scale(variables))
    assert list(found) == ["params/bn/scale"]
    gamma = chain.variables()["params"]["bn"]["scale"]
    np.testing.assert_array_equal(found["params/bn/scale"], np.abs(gamma))
    nnx_like = {"bn": {"weight": {"value": jnp.array([-1.0])}}}
    found = scores.batch_norm_scale(nnx_like, name="weight")
    np.testing.assert_array_equal(found["bn"]["weight"]["value"], [1.0])
    with pytest.raises(
        ValueError, match=r"'gamma'.*called bias, kernel, mean, scale, var"
    ):
        scores.batch_norm_scale(variables, name="gamma")


def unit_entries(name, unit, members=None):
    """Every weight a unit occupies, found entry by entry; parameters only."""
    leaves, found = named_leaves(chain.variables()), []
    for member in chain.groups()[name].members[:members]:
        if not member.path.startswith("params/"):
            continue
        leaf = leaves[member.path]
        for entry in itertools.product(*map(range, leaf.shape)):
            found += [leaf[entry]] * list(member.index[unit]).count(entry[member.axis])
    return np.array(found, np.float64)


REDUCTIONS = {
    "l1": lambda w: np.abs(w).sum(),
    "l2": lambda w: np.sqrt((w**2).sum()),
    "sum": lambda w: w.sum(),
    "mean": lambda w: w.mean(),
    "max": lambda w: w.max(),
    "abs_of_sum": lambda w: abs(w.sum()),
    "square_of_sum": lambda w: w.sum() ** 2,
    "signed_sum": lambda w: w.sum(),
}
BY_SIGN = ("sum", "mean", "max")


def test_group_scores_equal_a_loop_over_entries(variables):
    groups = chain.groups()
    found = quick_jit(
        lambda v: {r: scores.group_scores(groups, v, reduce=r) for r in REDUCTIONS}
    )(variables)
    for reduce, expect in REDUCTIONS.items():
        for name, group in groups.items():
            expected = [expect(unit_entries(name, u)) for u in range(group.size)]
            np.testing.assert_allclose(
                found[reduce][name], expected, rtol=1e-5, atol=1e-6, err_msg=reduce
            )


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("block", [1, 7, 40, 1 << 18])
def test_scores_on_the_host_do_not_depend_on_how_memory_is_read(
    block, reduce, monkeypatch
):
    monkeypatch.setattr(unit_sums, "_BLOCK", block)
    leaf = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    leaf = np.abs(leaf) if reduce in BY_SIGN else leaf
    members = (Member("w", d, np.arange(n)[:, None]) for d, n in enumerate(leaf.shape))
    groups = {f"g{m.axis}": Group(f"g{m.axis}", len(m.index), (m,)) for m in members}
    traced = Groups(groups, (), {"w": leaf.shape}, jax.tree.structure({"w": 0}))
    found = scores.group_scores(traced, {"w": leaf}, reduce=reduce)
    for d, n in enumerate(leaf.shape):
        units = np.moveaxis(leaf.astype(np.float64), d, 0)
        expected = [REDUCTIONS[reduce](units[u]) for u in range(n)]
        np.testing.assert_allclose(found[f"g{d}"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("reduce", "order"), [("l1", 1), ("l2", 2)])
def test_magnitude_reduces_to_the_norm_of_the_unit(reduce, order, variables):
    found = quick_jit(
        lambda v: scores.group_scores(
            chain.groups(), scores.magnitude(v), reduce=reduce
        )
    )(variables)
    for name, group in chain.groups().items():
        norms = [
            np.linalg.norm(unit_entries(name, unit), order)
            for unit in range(group.size)
        ]
        np.testing.assert_allclose(found[name], norms, rtol=1e-5)


def test_first_member_is_the_classic_filter_norm(variables):
    found = scores.group_scores(chain.groups(), variables, members="first")
    kernel = chain.variables()["params"]["conv1"]["kernel"]
    filters = [np.linalg.norm(kernel[..., unit]) for unit in range(4)]
    np.testing.assert_allclose(found["conv1"], filters, rtol=1e-6)


def test_scores_of_the_params_collection_alone_give_the_same(variables):
    groups, options = chain.groups(), {"reduce": "l1"}
    score = quick_jit(
        lambda v: scores.group_scores(groups, scores.magnitude(v), **options)
    )
    whole, alone = score(variables), score(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, whole, alone)


def test_statistics_never_count(variables):
    groups = chain.groups()
    score = quick_jit(lambda v: scores.group_scores(groups, v))
    before = score(variables)
    stats = jax.tree.map(lambda leaf: leaf + 100.0, variables["batch_stats"])
    after = score({**variables, "batch_stats": stats})
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_units_keep_their_scores_under_permutation(variables):
    order = np.array([2, 0, 3, 1])
    kernels = {
        "bn": jax.tree.map(lambda leaf: leaf[order], variables["params"]["bn"]),
        "conv1": {"kernel": variables["params"]["conv1"]["kernel"][..., order]},
        "conv2": {"kernel": variables["params"]["conv2"]["kernel"][:, :, order]},
    }
    groups = chain.groups()
    score = quick_jit(lambda v: scores.group_scores(groups, v))
    before = score(variables["params"])
    after = score({**variables["params"], **kernels})
    np.testing.assert_allclose(after["conv1"], before["conv1"][order], rtol=1e-6)
    np.testing.assert_allclose(after["conv2"], before["conv2"], rtol=1e-6)


UNITS = {"a": [3.0, 1.0, 2.0, 1.0], "b": [0.5, 40.0, 7.0, 0.0]}


@pytest.mark.parametrize("normalize", typing.get_args(scores.Normalize))
def test_normalize_scales_every_group_alone(normalize):
    units = {name: jnp.array(values) for name, values in UNITS.items()}
    found = scores.normalized(units, normalize)
    for name, values in UNITS.items():
        values = np.array(values)
        expected = {
            "sum": values / values.sum(),
            "mean": values / values.mean(),
            "max": values / values.max(),
            "gaussian": (values - values.mean()) / values.std(),
            "lamp": brute_force_lamp(values),
        }[normalize]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", typing.get_args(scores.Normalize))
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_equal_scores_stay_equal_and_finite(normalize, value):
    found = scores.normalized({"a": jnp.full(4, value)}, normalize)["a"]
    if normalize == "gaussian":
        expected = 0.0
    else:
        scale = {"sum": 1 / 4, "lamp": 1 / 4}.get(normalize, 1.0)
        expected = scale if value else 0.0
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_low_precision_scores_accumulate_in_float32():
    # 2^12 ones: bfloat16 sums stall at 256.
    leaf = jnp.ones((4096, 2), jnp.bfloat16)
    group = Group("g", 2, (Member("w", 1, np.arange(2)[:, None]),))
    groups = Groups({"g": group}, (), {"w": leaf.shape}, jax.tree.structure({"w": 0}))
    found = scores.group_scores(groups, {"w": leaf}, reduce="signed_sum")["g"]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [4096.0, 4096.0])


def test_group_norm_of_a_dead_unit_has_gradient_zero(variables):
    dead = jax.tree.map(jnp.zeros_like, variables)
    total = lambda v: sum(  # noqa: E731
        s.sum() for s in scores.group_scores(chain.groups(), v).values()
    )
    for path, grad in named_leaves(quick_jit(jax.grad(total))(dead)).items():
        np.testing.assert_array_equal(grad, np.zeros(grad.shape), err_msg=path)


def test_group_scores_compile_to_themselves(variables):
    groups = chain.groups()
    found = quick_jit(lambda v: scores.group_scores(groups, v, normalize="sum"))
    plain = scores.normalized(scores.group_scores(groups, variables), "sum")
    for name, values in found(variables).items():
        np.testing.assert_allclose(values, plain[name], rtol=1e-6)


def test_group_scores_refuse(variables):
    groups = chain.groups()
    with pytest.raises(ValueError, match=r"group conv2 has no score: .*conv2/kernel"):
        scores.group_scores(groups, scores.batch_norm_scale(variables))
    with pytest.raises(ValueError, match=r"leaf conv9/kernel, which .* lack"):
        scores.group_scores(groups, {"conv9": {"kernel": jnp.ones(3)}})
    with pytest.raises(
        ValueError, match=r"scores\[params/dense/bias\].*\(4,\).*\(5,\)"
    ):
        scores.group_scores(groups, {"dense": {"bias": jnp.ones(4)}})
    with pytest.raises(ValueError, match=r"reduce must be one of .*got 'prod'"):
        scores.group_scores(groups, variables, reduce="prod")
    with pytest.raises(ValueError, match=r"normalize must be .*got 'median'"):
        scores.group_scores(groups, variables, normalize="median")
    with pytest.raises(ValueError, match=r"members must be .*got 'last'"):
        scores.group_scores(groups, variables, members="last")


def test_producers_are_all_that_write_a_unit():
    """On a residual stream two kernels write a unit; what reads it does not count."""

    def residual(params, x):
        x = x @ params["in"]
        return (x + jnp.tanh(x @ params["mid"])) @ params["out"]

    keys = jax.random.split(jax.random.key(3), 3)
    shapes = {"in": (3, 4), "mid": (4, 4), "out": (4, 2)}
    params = {
        name: jax.random.normal(key, shape)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    groups = jaxprune.trace(residual, params, jnp.ones((1, 3)), roles=True)
    (found,) = scores.group_scores(groups, params, members="producers").values()
    own, other = np.asarray(params["in"]), np.asarray(params["mid"])
    wanted = np.sqrt((own**2).sum(0) + (other**2).sum(0))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    # `prune` asks for the roles by itself, in every round.
    pruned = jaxprune.prune(
        residual, params, jnp.ones((1, 3)), sparsity=0.5, members="producers", rounds=2
    )
    kept = np.sort(np.argsort(wanted)[2:])
    np.testing.assert_array_equal(pruned.variables["in"], own[:, kept])
    with pytest.raises(ValueError, match=r"trace with roles=True"):
        scores.group_scores(
            jaxprune.trace(residual, params, jnp.ones((1, 3))),
            params,
            members="producers",
        )
