import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune

pytestmark = pytest.mark.once


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
        table = jnp.arange(4.0)[None]
        return jax.nn.softmax(x @ params["w1"] + table) @ params["w2"]

    params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
    with pytest.raises(
        ValueError, match=r"exact=False.*w1:1: a maximum over this axis"
    ):
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


# --- what a person has --------------------------------------------------------------

BATCHES = [
    (x, x @ jnp.ones((3, 2))) for x in jax.random.normal(jax.random.key(7), (3, 16, 3))
]


def loss_fn(variables, batch):
    return jnp.mean((mlp(variables, batch[0]) - batch[1]) ** 2)


def check_contract(pruned, variables):
    masked = mlp(jaxprune.apply_masks(variables, pruned.masks), X)
    np.testing.assert_allclose(pruned(X), masked, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("score", "rounds"),
    [
        ("taylor", 3),
        ("snip", 1),
        ("grasp", 1),
        ("fisher", 1),
        ("group_fisher", 1),
        ("wanda", 3),
        ("mean_activation", 1),
        ("apoz", 3),
        ("entropy", 1),
    ],
)
def test_scores_from_data_meet_a_budget_in_one_call(params, score, rounds):
    pruned = jaxprune.prune(
        mlp,
        params,
        X,
        budget=0.5,
        score=score,
        loss_fn=loss_fn,
        batches=BATCHES,
        rounds=rounds,
    )
    assert 0.3 < pruned.costs.flops / pruned.costs_before.flops <= 0.5
    check_contract(pruned, params)


def test_a_named_score_is_what_its_function_returns(params):
    pruned = jaxprune.prune(
        mlp, params, X, sparsity=0.5, score="taylor", loss_fn=loss_fn, batches=BATCHES
    )
    weights = jaxprune.scores.taylor(loss_fn, params, BATCHES)
    units = jaxprune.group_scores(pruned.groups, weights, reduce="sum")
    keep = jaxprune.select.per_group(pruned.groups, units, sparsity=0.5)
    for name, kept in keep.items():
        np.testing.assert_array_equal(pruned.plan[name], kept)


@pytest.mark.parametrize(
    "cost", ["flops", "multiply_adds", "parameters", "bytes", "activation_bytes"]
)
def test_budgets_are_met(params, cost):
    pruned = jaxprune.prune(mlp, params, X, budget=0.6, cost=cost)
    counted = {"bytes": "parameters"}.get(cost, cost)
    before, after = (getattr(c, counted) for c in (pruned.costs_before, pruned.costs))
    assert 0.3 < after / before <= 0.6
    absolute = jaxprune.prune(
        mlp, params, X, budget=after * (4 if cost == "bytes" else 1), cost=cost
    )
    assert absolute.variables["w2"].shape == pruned.variables["w2"].shape


def test_a_budget_of_seconds_takes_a_measured_table(params):
    def clock(fn, args, kwargs):
        return 1e-9 * jaxprune.costs(fn, *args, **kwargs).multiply_adds

    table = jaxprune.latency_table(mlp, params, X, measure=clock)
    pruned = jaxprune.prune(mlp, params, X, budget="0.1us", cost=table)
    assert table.value({n: int(k.sum()) for n, k in pruned.plan.items()}) <= 100e-9


def test_rounds_score_what_is_left(params):
    """Of two equal units one can stand for both: only a second look sees that."""
    seen = []

    def score(variables):
        seen.append(variables["w1"].shape)
        return jax.tree.map(jnp.abs, variables)

    pruned = jaxprune.prune(mlp, params, X, sparsity=0.5, score=score, rounds=4)
    assert seen == [(3, 8), (3, 7), (3, 6), (3, 5)]
    assert pruned.variables["w1"].shape == (3, 4)
    check_contract(pruned, params)


def test_sparsity_by_name_or_pattern(params):
    pruned = jaxprune.prune(mlp, params, X, sparsity={"w*": 0.25, "w1:1": 0.5})
    assert pruned.variables["w2"].shape == (4, 3)
    assert jaxprune.prune(mlp, params, X, sparsity={"w2:1": 0.5}).variables[
        "w2"
    ].shape == (8, 2)


def test_a_name_in_full_is_taken_before_a_pattern():
    params = {f"layer[{k}]": jnp.full((3, 3), k + 1.0) for k in range(3)}
    params["layer0"] = jnp.ones((3, 3))

    def net(params, x):
        for name in ("layer[0]", "layer0", "layer[1]", "layer[2]"):
            x = jnp.tanh(x @ params[name])
        return x

    groups = jaxprune.trace(net, params, X, pin=["layer[0]"])
    assert list(groups) == ["layer0:1", "layer[1]:1"]
    pruned = jaxprune.prune(net, params, X, sparsity={"layer[0]:1": 0.5})
    assert {n for n, kept in pruned.plan.items() if not kept.all()} == {"layer[0]:1"}


def test_a_pin_may_be_one_pattern(params):
    assert list(jaxprune.trace(mlp, params, X, pin="w1:1")) == ["w2:1"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"multipleof": 2},
            TypeError,
            r"no option 'multipleof'; did you mean multiple_of\?.*kwargs={'multipleof'",
        ),
        (
            {"sparsity": {"w9:1": 0.5}},
            ValueError,
            "sparsity names 'w9:1', which matches none of the 2 groups",
        ),
        ({"sparsity": {"w1": 0.5}}, ValueError, r"did you mean w1:1\?"),
        ({"only": []}, ValueError, r"only=\(\) names no group"),
        ({"only": "w9*"}, ValueError, r"only names 'w9\*', which matches none"),
        ({"pin": "w1/kernel"}, ValueError, "pin pattern 'w1/kernel' matches no axis"),
        ({"pin": [3]}, TypeError, "pin takes patterns, which are text; got 3"),
        ({"sparsity": 1.0}, ValueError, "sparsity=1 cuts every unit"),
        ({"sparsity": None}, ValueError, "give sparsity=, .* or budget="),
        ({"budget": 0.5}, ValueError, "give only one"),
        (
            {"sparsity": None, "budget": 0.01},
            ValueError,
            r"cannot be met: .* of 256 \(9.4%\)",
        ),
        (
            {"sparsity": None, "budget": "3 weeks"},
            ValueError,
            "not a number with a unit",
        ),
        (
            {"sparsity": None, "budget": float("nan")},
            ValueError,
            "must be a positive number",
        ),
        (
            {"sparsity": None, "budget": 0.5, "cost": "flop"},
            ValueError,
            r"unknown cost 'flop'; did you mean flops\?",
        ),
        (
            {"score": "taylr"},
            ValueError,
            r"did you mean taylor\?.* look at data and need loss_fn and batches",
        ),
        ({"score": "taylor"}, ValueError, "differentiates a loss: give loss_fn"),
        ({"score": "apoz"}, ValueError, "looks at data: give batches"),
        (
            {"score": "apoz", "batches": X},
            TypeError,
            "batches is one array .*wrap a single batch",
        ),
        ({"score": "apoz", "batches": BATCHES[0]}, TypeError, "looks like one batch"),
        (
            {"score": "apoz", "batches": [{"image": X}]},
            ValueError,
            r"inputs=lambda batch: \(batch\['image'\],\)",
        ),
        (
            {"score": "apoz", "batches": iter(BATCHES), "rounds": 2},
            ValueError,
            "read 4 times",
        ),
        ({"rounds": 0}, ValueError, "rounds must be at least 1"),
        ({"exact": "no"}, TypeError, "exact must be True or False, got 'no'"),
        ({"recalibrate": 1}, TypeError, "recalibrate must be True or False, got 1"),
        (
            {"min_keep": {"w9*": 1}},
            ValueError,
            r"min_keep names 'w9\*', which matches none of the 2 groups",
        ),
        (
            {"sparsity": None, "budget": "3ms"},
            ValueError,
            "budget '3ms' is in seconds, but cost='flops'; give cost='seconds'",
        ),
        (
            {"score": "taylor", "loss_fn": lambda v, x: mlp(v, x), "batches": [X]},
            TypeError,
            r"loss_fn must return one floating-point number.* got float32\[2, 2\]",
        ),
        (
            {"scope": "global", "sparsity": {"w1:1": 0.5}},
            ValueError,
            "already says what every group loses",
        ),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:30],
)
def test_mistakes_are_told(params, options, error, text):
    options = {"sparsity": 0.5, **options}
    with pytest.raises(error, match=text):
        jaxprune.prune(mlp, params, X, **options)


def test_what_is_no_function_is_told(params):
    import flax.linen as nn
    from flax import nnx

    with pytest.raises(TypeError, match="Dense, a Linen module; pass its apply"):
        jaxprune.prune(nn.Dense(3), params, X, sparsity=0.5)
    with pytest.raises(
        TypeError, match=r"an NNX module; use jaxprune.integrations.nnx"
    ):
        jaxprune.prune(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), X, sparsity=0.5)
    with pytest.raises(TypeError, match="an NNX module; use"):
        jaxprune.trace(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), X)  # callable with X alone
    with pytest.raises(TypeError, match="Dense, a Linen module; pass its apply"):
        jaxprune.narrow(nn.Dense(3), params)
    with pytest.raises(TypeError, match="must be a function of variables"):
        jaxprune.prune(params, X, sparsity=0.5)
    with pytest.raises(TypeError, match="variables are missing"):
        jaxprune.prune(mlp, sparsity=0.5)


def test_a_cost_model_is_no_cost(params):
    groups = jaxprune.trace(mlp, params, X)
    model = jaxprune.cost_model(mlp, params, X)
    scores = jaxprune.group_scores(groups, params)
    with pytest.raises(
        TypeError, match="got a CostModel, which holds several: .*multiply_adds"
    ):
        jaxprune.select.to_budget(groups, scores, model, budget=10.0)
    with pytest.raises(
        ValueError,
        match=r"for that fraction of the whole give budget=0.05 \* cost.full",
    ):
        jaxprune.select.to_budget(groups, scores, model.flops, budget=0.05)


def test_params_alone_are_told():
    variables = {"params": {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))}}
    net = lambda v, x: jax.nn.relu(x @ v["params"]["w1"]) @ v["params"]["w2"]  # noqa: E731
    pruned = jaxprune.prune(net, variables, X, sparsity=0.5)
    with pytest.raises(ValueError, match="got the collection 'params' alone"):
        pruned.apply_fn(pruned.variables["params"], X)


# --- the result -----------------------------------------------------------------------


def test_the_result_prints_as_a_table(params):
    pruned = jaxprune.prune(mlp, params, X, sparsity=0.5)
    lines = str(pruned).splitlines()
    assert len(lines) < 15 and lines[0] == "6 of 12 units kept in 2 groups"
    assert any(line.split() == ["8", "4", "50%", "w1:1"] for line in lines)
    assert (
        "parameters: 72 -> 28 (38.9%)" in lines and "FLOPs: 256 -> 96 (37.5%)" in lines
    )
    assert "seconds" in str(pruned.replace(seconds=(2e-3, 1e-3)))
    assert "<pre" in pruned._repr_html_() and "w1:1" in pruned._repr_html_()
    assert pruned.figure().axes


def test_the_result_can_be_pickled_and_copied(params):
    pruned = jaxprune.prune(mlp, params, X, sparsity=0.5)
    for other in (
        pickle.loads(pickle.dumps(pruned)),
        copy.copy(pruned),
        copy.deepcopy(pruned),
    ):
        np.testing.assert_array_equal(other(X), pruned(X))
        assert str(other) == str(pruned)
    again = pickle.loads(pickle.dumps(pruned.groups))
    assert again.treedef == pruned.groups.treedef and repr(again) == repr(pruned.groups)
    model = jaxprune.cost_model(mlp, params, X)
    assert pickle.loads(pickle.dumps(model)).flops.full == model.flops.full


def test_keys_among_the_variables_can_be_pickled(params):
    variables = {"params": params, "rngs": {"key": jax.random.key(3)}}
    pruned = jaxprune.prune(net_with_a_key, variables, X, sparsity=0.5)
    again = pickle.loads(pickle.dumps(pruned))
    np.testing.assert_array_equal(again(X), pruned(X))


def net_with_a_key(variables, x):
    noise = jax.random.normal(variables["rngs"]["key"], x.shape)
    return mlp(variables["params"], x + noise)


def test_pruning_a_pruned_one_gives_masks_of_the_original(params):
    once = jaxprune.prune(mlp, params, X, sparsity=0.5)
    twice = jaxprune.prune(once, sparsity=0.5)
    assert twice.variables["w1"].shape == (3, 2)
    assert twice.masks["w1"].shape == (1, 8)
    check_contract(twice, params)
    for small, kept in zip(
        jax.tree.leaves(twice.variables),
        jax.tree.leaves(jaxprune.slice_params(params, twice.masks)),
        strict=True,
    ):
        np.testing.assert_array_equal(small, kept)


def test_momentum_goes_along(params):
    tx = optax.adam(0.1)
    variables = {"params": params}
    net = lambda v, x: mlp(v["params"], x)  # noqa: E731
    pruned = jaxprune.prune(net, variables, X, sparsity=0.5)
    state = pruned.slice_opt_state(tx, tx.init(params))
    assert state[0].mu["w1"].shape == (3, 4)
    state = pruned.slice_opt_state(tx, tx.init(variables))
    assert state[0].mu["params"]["w1"].shape == (3, 4)
    further = jaxprune.prune(pruned, sparsity=0.5)
    assert further.slice_opt_state(tx, state)[0].mu["params"]["w1"].shape == (3, 2)


def test_trained_variables_take_the_place_of_the_old(params):
    pruned = jaxprune.prune(mlp, params, X, sparsity=0.5)
    zeros = jax.tree.map(jnp.zeros_like, pruned.variables)
    assert not pruned.replace(variables=zeros)(X).any()
    with pytest.raises(ValueError, match=r"the new b1 has shape \(8,\)"):
        pruned.replace(variables=params)


def test_batches_measure_batch_norm_anew():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
            return nn.Dense(2)(x)

    net = Net()
    variables = net.init(jax.random.key(0), X)
    options = {"sparsity": 0.5, "batches": BATCHES, "score": "apoz"}
    pruned = jaxprune.prune(net.apply, variables, X, **options)
    plain = jaxprune.prune(net.apply, variables, X, **options, recalibrate=False)
    inputs = [x for x, _ in BATCHES]
    expected = plain.recalibrate(inputs, train=True)
    for got, wanted in zip(
        jax.tree.leaves(pruned.variables),
        jax.tree.leaves(expected.variables),
        strict=True,
    ):
        np.testing.assert_array_equal(got, wanted)
    assert not np.allclose(
        pruned.variables["batch_stats"]["BatchNorm_0"]["mean"],
        plain.variables["batch_stats"]["BatchNorm_0"]["mean"],
    )
    with pytest.raises(ValueError, match=r"recalibrate={'train': True}"):
        jaxprune.prune(net.apply, variables, X, **options, recalibrate={"trian": True})
