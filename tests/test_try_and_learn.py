"""Agents that try cuts: against enumeration, planted units and nets cut by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import recipes, search
from jaxprune.recipes import _trials
from jaxprune.search import _reinforce

pytestmark = pytest.mark.once

# --- the reward (C1) and the estimator (C5) -------------------------------------------


def value(metric, kept, size=8, bound=2.0):
    return float(search.reward(metric, kept, size, baseline=90.0, drop_bound=bound))


def test_the_reward_is_the_published_algebra():
    assert value(88.0, 2) == 0 and value(75.0, 8) == 0  # at the bound, or nothing cut
    np.testing.assert_allclose(value(89.0, 2), 0.5 * np.log(4), rtol=1e-6)
    np.testing.assert_allclose(value(91.0, 2), 1.5 * np.log(4), rtol=1e-6)
    drops = [value(p, 3) for p in (80.0, 87.0, 89.0, 90.0, 92.0)]
    assert drops == sorted(drops) and drops[0] < 0
    good, bad = ([value(p, k) for k in (7, 4, 1)] for p in (89.5, 80.0))
    assert good == sorted(good) and bad == sorted(bad, reverse=True)


def enumerated(logits, world):
    """The gradient of the expected reward, by summing over all actions."""
    actions = np.array(list(itertools.product([False, True], repeat=len(logits))))
    rewards = jnp.array([world(action) for action in actions], jnp.float32)

    def expected(logits):
        p = jax.nn.sigmoid(logits)[None]
        return (jnp.where(actions, p, 1 - p).prod(1) * rewards).sum()

    return actions, rewards, jax.grad(expected)(logits)


@pytest.mark.parametrize(
    ("units", "count", "form", "share"),
    [(3, 2, "mean", 1 / 2), (3, 2, "leave_one_out", 1.0), (2, 3, "mean", 2 / 3)],
)
def test_the_estimator_is_the_gradient_over_all_actions(units, count, form, share):
    """The mean over all joint draws of M candidates; no sampling."""
    logits = jnp.array([0.3, -1.2, 0.8])[:units]
    weights = np.array([1.0, 2.5, -0.5])[:units]

    def world(action):  # with the repair of an empty decision inside, as in a search
        stays = np.asarray(_reinforce.repaired(jnp.asarray(action), logits))
        return value(90.0 - 2 + float(weights @ stays), int(stays.sum()), units)

    actions, rewards, exact = enumerated(logits, world)
    p = np.asarray(jax.nn.sigmoid(logits))
    chance = np.where(actions, p, 1 - p).prod(1)
    joint = np.array(list(itertools.product(range(2**units), repeat=count)))
    slope = jax.vmap(
        jax.grad(lambda at: _reinforce.surrogate(*at, form)),
    )
    each = slope(
        (
            jnp.broadcast_to(logits, (len(joint), units)),
            jnp.asarray(actions, jnp.float32)[joint],
            rewards[joint],
        )
    )[0]
    mean = (chance[joint].prod(1)[:, None] * np.asarray(each)).sum(0)
    np.testing.assert_allclose(mean, share * np.asarray(exact), rtol=1e-4, atol=1e-6)


def test_a_row_of_no_units_keeps_the_likeliest():
    logits = jnp.array([-3.0, -1.0, -2.0])
    found = _reinforce.repaired(jnp.array([[False] * 3, [True, False, False]]), logits)
    assert found.tolist() == [[False, True, False], [True, False, False]]


# --- planted units (C2 to C4) ---------------------------------------------------------

X = jax.random.normal(jax.random.key(3), (64, 5))


def mlp(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


def planted():
    """Of 12 hidden units 5 have no effect, and the largest norms."""
    first, second = jax.random.split(jax.random.key(4))
    w1 = jax.random.normal(first, (5, 12))
    w2 = jnp.sign(jax.random.normal(second, (12, 4))) * 3
    useless = np.array([1, 4, 5, 8, 11])
    return {"w1": w1.at[:, useless].mul(10.0), "w2": w2.at[useless].set(0.0)}, useless


PARAMS, USELESS = planted()
TARGET = mlp(PARAMS, X)


def closeness(params, batch):
    """Minus the error in percent of the variance."""
    x, y = batch
    return -100 * jnp.mean((mlp(params, x) - y) ** 2) / jnp.var(TARGET)


BATCHES = [(X[:32], TARGET[:32]), (X[32:], TARGET[32:])]
GROUPS = jaxprune.trace(mlp, PARAMS, X, roles=True)


def learn(**options):
    options = {"drop_bound": 2.0, "updates": 120, "learning_rate": 0.03, **options}
    return recipes.learn_keep(GROUPS, PARAMS, closeness, BATCHES, **options)


def test_useless_units_are_found_and_essential_ones_kept():
    options = {"candidates": 8, "advantage": "leave_one_out", "drop_bound": 10.0}
    found = learn(**options, updates=300, learning_rate=0.01)
    kept = found.keep["w1:1"]
    assert found.decision == "likeliest"
    assert kept[np.setdiff1d(np.arange(12), USELESS)].all()
    assert (~kept[USELESS]).sum() >= 4
    assert found.rewards[-20:].mean() > found.rewards[:20].mean()
    assert found.probabilities["w1:1"][kept].min() > 0.5
    # It does not cut by magnitude: what it drops has the largest norms.
    norms = np.linalg.norm(PARAMS["w1"], axis=0)
    assert norms[~kept].min() > norms[kept].max()


def test_the_drop_of_the_cut_net_is_within_the_bound():
    def lossy(params, batch):  # every unit matters, some little
        return closeness({**params, "w2": params["w2"] * graded}, batch)

    graded = jnp.linspace(0.02, 1.0, 12)[:, None]
    whole = {**PARAMS, "w2": jnp.ones((12, 4))}
    sizes = []
    for bound in (1.0, 30.0):
        found = [
            recipes.learn_keep(
                GROUPS,
                whole,
                lossy,
                BATCHES,
                drop_bound=bound,
                updates=60,
                learning_rate=0.03,
                key=jax.random.key(seed),
            )
            for seed in range(2)
        ]
        for one in found:
            masks = jaxprune.expand_masks(GROUPS, one.keep)
            small = jaxprune.slice_params(whole, masks)
            cut = jaxprune.narrow(lossy, masks)
            metric = np.mean([float(cut(small, batch)) for batch in BATCHES])
            np.testing.assert_allclose(metric, one.metric, rtol=1e-3)
            assert one.baseline - metric <= bound * (1 + 1e-3)
        sizes.append(np.mean([one.keep["w1:1"].sum() for one in found]))
    assert sizes[1] <= sizes[0]  # C3: a larger bound cuts no less


def test_what_is_worth_nothing_is_not_cut():
    essential = {**PARAMS, "w1": PARAMS["w1"][:, :2], "w2": jnp.ones((2, 4))}
    y = mlp(essential, X)
    found = recipes.learn_keep(
        jaxprune.trace(mlp, essential, X),
        essential,
        lambda params, x: -100 * jnp.mean((mlp(params, x) - y) ** 2),
        [X],
        drop_bound=1e-3,
        updates=3,
        agent=search.Agent(initial=0.01),
    )
    assert found.decision == "nothing cut" and found.keep["w1:1"].all()
    assert found.reward == 0 and found.metric == found.baseline


def test_patience_ends_a_search_and_keys_decide_it():
    one, same, other = (
        learn(updates=9, patience=2, key=jax.random.key(k)) for k in (1, 1, 2)
    )
    assert len(one.rewards) <= 9
    np.testing.assert_array_equal(one.rewards, same.rewards)
    assert not np.array_equal(one.rewards[0], other.rewards[0])


def test_a_long_row_is_read_by_convolutions():
    agent = search.Agent(channels=(2, 3), hidden=4, initial=0.8)
    matrix = jax.random.normal(jax.random.key(0), (6, 30))
    params = agent.init(jax.random.key(1), matrix)
    assert [p["kernel"].shape for p in params["convolutions"]] == [
        (7, 7, 1, 2),
        (7, 7, 2, 3),
    ]
    assert params["dense"][0]["kernel"].shape == (2 * 8 * 3, 4)  # 6 x 30 halved twice
    odds = agent(params, matrix)
    np.testing.assert_allclose(odds, agent(params, 100 * matrix), rtol=1e-4)
    slope = jax.grad(lambda p: agent(p, matrix).sum())(params)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slope))


# --- candidates side by side are the nets cut by hand ----------------------------------


def residual(p, x):
    h = jax.nn.relu(x @ p["stem"])
    h = h + jax.nn.relu(h @ p["a"]) @ p["b"]
    return h @ p["head"]


def concatenating(p, x):
    h = jnp.concatenate([jax.nn.relu(x @ p["stem"]), x @ p["skip"]], -1)
    return jax.nn.relu(h @ p["a"]) @ p["head"]


def attention(p, x):
    q, k, v = (jnp.einsum("td,dhe->hte", x, p[n]) for n in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("hte,hse->hts", q, k), -1)
    return jnp.einsum("hts,hse,hed->td", weights, v, p["o"])


def branching(p, x):
    h = lax_cond(p, x)
    return h @ p["head"]


def lax_cond(p, x):
    return jax.lax.cond(
        x.sum() > 0, lambda h: jax.nn.relu(h @ p["a"]) @ p["b"], lambda h: h, x
    )


NETS = {
    "residual": (residual, {"stem": (4, 6), "a": (6, 5), "b": (5, 6), "head": (6, 3)}),
    "concatenating": (
        concatenating,
        {"stem": (4, 5), "skip": (4, 3), "a": (8, 4), "head": (4, 2)},
    ),
    "heads": (attention, {**dict.fromkeys("qkv", (4, 3, 2)), "o": (3, 2, 4)}),
    "branches": (branching, {"a": (4, 6), "b": (6, 4), "head": (4, 2)}),
}


def made(shapes):
    keys = jax.random.split(jax.random.key(5), len(shapes))
    return {
        n: jax.random.normal(k, s) / 2
        for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }


@pytest.mark.parametrize("tuned", [0, 3])
@pytest.mark.parametrize("name", NETS)
def test_candidates_are_the_nets_cut_by_hand(name, tuned):
    """One vmapped program against narrow, slice and a loop over steps."""
    net, shapes = NETS[name]
    params, xs = made(shapes), jax.random.normal(jax.random.key(6), (4, 7, 4))
    goals = [net(params, x) + 1 for x in xs]
    groups = jaxprune.trace(net, params, xs[0], roles=True)

    def loss_fn(params, batch):
        return jnp.mean((net(params, batch[0]) - batch[1]) ** 2)

    def metric_fn(params, batch):
        return -loss_fn(params, batch)

    batches, tx = list(zip(xs, goals, strict=True)), optax.sgd(0.05, momentum=0.9)
    how = recipes.FineTune(loss_fn, tx, batches, tuned) if tuned else None
    names = list(groups)
    assert len(names) >= 1
    measure = _trials.measured(groups, names, params, metric_fn, batches[:2], how)
    rng = np.random.default_rng(0)
    keeps = {n: rng.random((3, groups[n].size)) < 0.6 for n in names}
    for kept in keeps.values():
        kept[:, 0] = True
    seen = _trials.fresh_batches(how, 0)
    held = _trials.stacked(batches[:2])
    found = jax.jit(jax.vmap(lambda k: measure(k, params, seen, held)))(
        {n: jnp.asarray(kept) for n, kept in keeps.items()}
    )
    for k in range(3):
        masks = jaxprune.expand_masks(groups, {n: keeps[n][k] for n in names})
        small = jaxprune.slice_params(params, masks)
        loss, state = jaxprune.narrow(loss_fn, masks), tx.init(small)
        for batch in batches[:tuned]:
            updates, state = tx.update(jax.grad(loss)(small, batch), state, small)
            small = optax.apply_updates(small, updates)
        expected = -np.mean([float(loss(small, batch)) for batch in batches[:2]])
        np.testing.assert_allclose(found[k], expected, rtol=2e-4)


def test_fewer_at_once_are_the_same_candidates():
    whole, one = (learn(updates=3, at_once=n) for n in (None, 2))
    np.testing.assert_allclose(whole.rewards, one.rewards, rtol=1e-4, atol=1e-5)


# --- whole nets -----------------------------------------------------------------------


def deep(params, x):
    return jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["b"]) @ params["c"]


DEEP = made({"a": (5, 8), "b": (8, 6), "c": (6, 3)})
DEEP["c"] = DEEP["c"].at[:3].set(0.0)
GOAL = deep(DEEP, X)
DATA = [(X[k : k + 16], GOAL[k : k + 16]) for k in (0, 16, 32, 48)]


def deep_loss(params, batch):
    return jnp.mean((deep(params, batch[0]) - batch[1]) ** 2)


def run(**options):
    options = {"updates": 6, "drop_bound": 5.0, "learning_rate": 0.1, **options}
    return recipes.try_and_learn(
        deep,
        DEEP,
        X,
        metric=lambda apply, p, batch: -100 * jnp.mean((apply(p, batch[0]) - batch[1]) ** 2),
        batches=DATA[:2],
        loss_fn=deep_loss,
        data=DATA,
        tx=optax.sgd(0.02, momentum=0.9),
        steps=3,
        **options,
    )  # fmt: skip


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    whole = run(fine_tune=1)
    assert [entry.steps for entry in whole.history] == [0, 3, 3]

    def killed(number, found):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(fine_tune=1, folder=tmp_path, learned=killed)
    rounds = []
    again = run(fine_tune=1, folder=tmp_path, learned=lambda n, _: rounds.append(n))
    assert rounds == [2]  # the first is not searched again
    for one, other in zip(
        jax.tree.leaves((whole.last.variables, whole.last.masks)),
        jax.tree.leaves((again.last.variables, again.last.masks)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"with decide=.*drop_bound"):
        run(fine_tune=1, folder=tmp_path, drop_bound=7.0)


def test_orders():
    def searched(**options):
        met = []
        found = run(learned=lambda n, one: met.append(list(one.keep)), **options)
        return met, found

    assert searched()[0] == [["a:1"], ["b:1"]]
    assert searched(order="high_to_low")[0] == [["b:1"], ["a:1"]]
    assert searched(order="joint")[0] == [["a:1", "b:1"]]
    assert searched(order="sensitivity")[0][0] == [["b:1"]][0]  # half of it is useless
    met, found = searched(order=["b:1"], baseline="current")
    assert met == [["b:1"]] and found.last.variables["a"].shape == (5, 8)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="drop_bound must be above 0, got 0"):
        learn(drop_bound=0)
    with pytest.raises(ValueError, match=r"drop_bound must be above 0, got -1"):
        run(drop_bound=-1)
    with pytest.raises(ValueError, match=r"only names 'w1:'.*did you mean w1:1"):
        learn(only="w1:")
    with pytest.raises(ValueError, match="compares candidates: give 2 or more"):
        learn(candidates=1, advantage="leave_one_out")
    with pytest.raises(ValueError, match="order must be 'low_to_high'"):
        run(order="sideways")
    with pytest.raises(ValueError, match="baseline must be 'original'"):
        run(baseline="best")
    with pytest.raises(ValueError, match=r"batch 1 has shapes \[\(3, 5\)"):
        _trials.stacked([X[:4], X[:3]])
    with pytest.raises(ValueError, match=r"initial must be in \(0, 1\)"):
        search.Agent(initial=1.0)


def test_rounds_take_another_way_to_decide():
    def halve(number, masks, params):
        assert (masks is None) == (number == 1)
        size = params["a"].shape[1]
        return {"a:1": np.arange(size) < size // 2}

    options = {"tx": optax.sgd(0.1), "data": DATA, "loss_fn": deep_loss, "steps": 1}
    found = jaxprune.rounds(deep, DEEP, X, rounds=2, decide=halve, **options)
    assert found.last.variables["a"].shape == (5, 2)
    np.testing.assert_array_equal(found.last.plan["a:1"], np.arange(8) < 2)
    for wrong, text in (
        ({"b:2": np.ones(6, bool)}, "decide names the group 'b:2', .*did you mean b:1"),
        ({"a:1": np.ones(3, bool)}, r"shape \(3,\) for the group a:1, of which 8"),
    ):
        with pytest.raises(ValueError, match=text):
            jaxprune.rounds(
                deep, DEEP, X, rounds=1, decide=lambda *_, w=wrong: w, **options
            )
    with pytest.raises(ValueError, match=r"sparsity=0.5 and decide= both"):
        jaxprune.rounds(deep, DEEP, X, rounds=1, sparsity=0.5, decide=halve, **options)


def test_no_group_is_emptied_where_several_are_decided_together():
    rest = dict.fromkeys("measure weights held agent tx drop_bound advantage".split())
    trial = _trials._Trial(sizes={"a": 2, "b": 3}, candidates=1, at_once=None, **rest)
    logits = jnp.array([-2.0, -1.0, 5.0, -3.0, -3.0])
    keep = trial.split(trial.repaired(logits > 0, logits))
    assert keep["a"].tolist() == [False, True]
    assert keep["b"].tolist() == [True, False, False]
