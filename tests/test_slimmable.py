"""Slimmable networks: every width is the pruned network that it stands for."""

import collections
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_same, quick_jit
from zoo import MODELS, random_variables, weights

import jaxprune
from jaxprune import search
from jaxprune.search import importance

pytestmark = pytest.mark.once

X = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def mlp(p, x):
    h = jnp.tanh(x @ p["w1"] + p["b1"][None])
    return h @ p["w2"]


PARAMS = weights(w1=(4, 8), b1=(8,), w2=(8, 3))
GROUPS = jaxprune.trace(mlp, PARAMS, X)
HIDDEN = "w1:1"


class Net(nn.Module):
    """A stream with a residual branch, a concatenation and BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)

        x = nn.relu(norm(nn.Conv(6, (3, 3), use_bias=False)(x)))
        y = nn.relu(norm(nn.Conv(4, (3, 3), use_bias=False)(x)))
        y = nn.Conv(4, (3, 3), feature_group_count=4, use_bias=False)(y)
        x = nn.relu(x + norm(nn.Conv(6, (1, 1), use_bias=False)(y)))
        x = jnp.concatenate([x, y], -1).reshape(x.shape[0], -1)
        return nn.Dense(3)(x)


@pytest.fixture(scope="module")
def net():
    net, x = Net(), np.random.default_rng(0).normal(size=(4, 4, 4, 2))
    x = jnp.asarray(x, jnp.float32)
    variables = random_variables(jax.eval_shape(net.init, jax.random.key(0), x))
    groups = jaxprune.trace(net.apply, variables, x)
    return net.apply, variables, x, groups


def nested_keeps(groups, seed, widths=3):
    """Random widths that nest: units in a random order, fewer and fewer of them."""
    rng = np.random.default_rng(seed)
    names = [n for n, g in groups.items() if g.exact and not g.ordered and g.size > 1]
    order = {name: rng.permutation(groups[name].size) for name in names}
    keeps = []
    for k in range(widths):
        count = {n: max(1, groups[n].size * (widths - k) // widths) for n in names}
        keeps.append({n: order[n] < count[n] for n in names})
    return keeps


def small(apply_fn, variables, groups, keep, *args):
    """What the pruned network computes."""
    masks = jaxprune.expand_masks(groups, keep)
    return quick_jit(jaxprune.narrow(apply_fn, masks))(
        jaxprune.slice_params(variables, masks), *args
    )


ZOO = (
    "chain",
    "decoder_grouped",
    "densenet",
    "depthwise",
    "grouped_convolution",
    "inception_flatten",
    "resnet_projection",
    "shufflenet",
    "stacked_layers",
    "vit",
)


@pytest.mark.parametrize("name", ZOO)
def test_sorting_changes_no_function_and_a_prefix_is_the_mask_before(name):
    """T1 and T2 of slimmable channel sorting, at the network's narrowest width."""
    built = MODELS[name].build()
    args = built.inputs(2, 0)
    groups = jaxprune.trace(built.apply_fn, built.variables, *args)
    keeps = nested_keeps(groups, 0, 2)
    slim = jaxprune.slimmable(built.apply_fn, built.variables, keeps, groups=groups)
    run = quick_jit(built.apply_fn)
    assert any((o != np.arange(len(o))).any() for o in slim.order.values())
    sorted_ones = jaxprune.permute(built.variables, groups, slim.order)
    assert_same(run(sorted_ones, *args), run(built.variables, *args))
    got = quick_jit(slim[1])(slim.variables, *args)
    assert_same(got, small(built.apply_fn, built.variables, groups, keeps[1], *args))
    assert_same(quick_jit(slim[0])(slim.variables, *args), run(built.variables, *args))


def test_every_width_is_its_pruned_network_also_where_the_widest_is_cut(net):
    apply_fn, variables, x, groups = net
    keeps = nested_keeps(groups, 1, 4)[1:]
    slim = jaxprune.slimmable(
        apply_fn, variables, keeps, groups=groups, private="batch_stats/*"
    )
    for i, keep in enumerate(keeps):
        expected = small(apply_fn, variables, groups, keep, x)
        assert_same(quick_jit(slim[i])(slim.variables, x), expected)
        alone = slim.at(i)
        assert_same(quick_jit(alone.apply_fn)(alone.variables, x), expected)
    # The widest net and the private statistics are all there is.
    whole = slim.at(0).variables["params"]
    assert jax.tree.map(np.shape, slim.variables["params"]) == jax.tree.map(
        np.shape, whole
    )
    held = [w.variables["batch_stats"] for w in map(slim.at, range(3))]
    sizes = [x.size for x in jax.tree.leaves(slim.variables["batch_stats"])]
    assert sum(sizes) == sum(x.size for each in held for x in jax.tree.leaves(each))


def operations(compiled):
    pattern = r"^\s*(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\("
    return collections.Counter(re.findall(pattern, compiled.as_text(), re.MULTILINE))


def test_a_width_is_slices_of_the_weights_no_gather_and_no_copy():
    """Of a plain residual net; its hand-built twin has as many copies: none."""

    def net(p, x):
        conv = jax.lax.conv_general_dilated
        spec = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(conv(x, p["a"], (1, 1), "SAME", dimension_numbers=spec))
        y = jax.nn.relu(conv(x, p["b"], (1, 1), "SAME", dimension_numbers=spec))
        x = x + conv(y, p["c"], (1, 1), "SAME", dimension_numbers=spec)
        return x.mean((1, 2)) @ p["d"]

    shapes = {"a": (3, 3, 2, 8), "b": (3, 3, 8, 6), "c": (3, 3, 6, 8), "d": (8, 3)}
    params, x = weights(**shapes), jnp.ones((2, 4, 4, 2))
    groups = jaxprune.trace(net, params, x)
    keeps = nested_keeps(groups, 0)
    slim = jaxprune.slimmable(net, params, keeps, groups=groups)
    for i, run in enumerate(slim.compile(x)):
        found = operations(run)
        assert not {"gather", "copy", "dynamic-slice", "concatenate"} & set(found)
        assert_same(run(slim.variables, x), small(net, params, groups, keeps[i], x))


def test_switching_widths_compiles_nothing(net):
    apply_fn, variables, x, groups = net
    slim = jaxprune.slimmable(
        apply_fn, variables, nested_keeps(groups, 2), groups=groups
    )
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    slim.variables["params"]  # a tree of its own
    variables = jax.tree.map(jnp.asarray, slim.variables)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        runs = slim.compile(x)
        assert len(compiled) == len(runs) == 3
        outs = [runs[i](variables, x) for i in (0, 2, 1, 0, 1, 2)]
        assert len(compiled) == 3
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert_same(outs[0], outs[3])


def test_the_width_is_static_under_jit_or_data_under_switch(net):
    apply_fn, variables, x, groups = net
    keeps = nested_keeps(groups, 3)
    slim = jaxprune.slimmable(
        apply_fn, variables, keeps, groups=groups, private="batch_stats/*"
    )
    static = jax.jit(lambda v, x, i: slim[i](v, x), static_argnums=2)
    chosen = jax.jit(slim.switch)
    for i in range(3):
        expected = slim[i](slim.variables, x)
        assert_same(static(slim.variables, x, i), expected)
        assert_same(chosen(i, slim.variables, x), expected)


def test_statistics_are_private_and_matter_and_scales_are_shared(net):
    """T5."""
    apply_fn, variables, x, groups = net
    slim = jaxprune.slimmable(
        apply_fn,
        variables,
        nested_keeps(groups, 4, 2),
        groups=groups,
        private="batch_stats/*",
    )
    scales = slim.variables["params"]["BatchNorm_0"]
    assert {name: leaf.shape for name, leaf in scales.items()} == {
        "bias": (6,),
        "scale": (6,),
    }
    held = slim.variables
    for i in range(2):
        _, new = slim[i](held, x, train=True, mutable=["batch_stats"])
        held = slim.write(held, i, new)
    means = [held["batch_stats"]["BatchNorm_0"]["mean"][i] for i in range(2)]
    assert means[1].shape < means[0].shape
    # The first layer's input is the same at every width, its statistics are not
    # those of the last: the branch reads fewer channels.
    last = held["batch_stats"]["BatchNorm_2"]
    size = last["mean"][1].size
    other = jax.tree.map(lambda x: x, held)
    other["batch_stats"]["BatchNorm_2"] = {
        name: (own[0], own[0][:size]) for name, own in last.items()
    }
    gap = jnp.abs(slim[1](held, x) - slim[1](other, x)).max()
    assert gap > 1e-3
    assert_same(slim[0](held, x), slim[0](other, x))


def test_what_is_written_to_shared_leaves_is_the_prefix():
    slim = jaxprune.slimmable(mlp, PARAMS, [{HIDDEN: 8}, {HIDDEN: 3}], groups=GROUPS)
    own = slim.at(1).variables
    new = slim.write(slim.variables, 1, {"w2": own["w2"] + 1})
    np.testing.assert_allclose(new["w2"][:3], own["w2"] + 1, rtol=1e-6)
    np.testing.assert_array_equal(new["w2"][3:], slim.variables["w2"][3:])
    with pytest.raises(ValueError, match=r"w2 has shape \(3, 3\) at width 1, but"):
        slim.write(slim.variables, 1, {"w2": slim.variables["w2"]})
    with pytest.raises(ValueError, match="width 1 has no leaf 'w3'; did you mean w"):
        slim.write(slim.variables, 1, {"w3": own["w2"]})


def test_a_count_keeps_the_units_that_matter_most():
    scores = {HIDDEN: np.array([3.0, 9, 1, 4, 8, 2, 0, 7])}
    slim = jaxprune.slimmable(
        mlp, PARAMS, [{HIDDEN: 8}, {HIDDEN: 3}], groups=GROUPS, order=scores
    )
    assert slim.order[HIDDEN].tolist() == [1, 4, 7, 3, 0, 5, 2, 6]
    keep = {HIDDEN: np.isin(np.arange(8), [1, 4, 7])}
    assert_same(slim[1](slim.variables, X), small(mlp, PARAMS, GROUPS, keep, X))
    # Bools come first: the unit of the last width leads, whatever its score.
    only = np.arange(8) == 6
    mixed = [{HIDDEN: 8}, {HIDDEN: 3}, {HIDDEN: only}]
    slim = jaxprune.slimmable(mlp, PARAMS, mixed, groups=GROUPS, order=scores)
    assert slim.order[HIDDEN][:3].tolist() == [6, 1, 4]


def test_units_behind_batch_norm_are_rated_by_its_scale_others_by_their_norm(net):
    _, variables, _, groups = net
    found = importance(groups, variables)
    by_size = {group.size: found[name] for name, group in groups.items()}
    scale = variables["params"]["BatchNorm_1"]["scale"]
    np.testing.assert_allclose(by_size[4], np.abs(scale), rtol=1e-6)
    squares = sum(
        np.square(PARAMS[n]).sum(axis) for n, axis in (("w1", 0), ("b1", ()), ("w2", 1))
    )
    np.testing.assert_allclose(
        importance(GROUPS, PARAMS)[HIDDEN], np.sqrt(squares), rtol=1e-5
    )


def test_gradients_reach_the_shared_weights_through_their_prefix():
    slim = jaxprune.slimmable(mlp, PARAMS, [{HIDDEN: 8}, {HIDDEN: 3}], groups=GROUPS)
    grads = jax.grad(lambda v: slim[1](v, X).sum())(slim.variables)
    assert np.abs(grads["w1"][:, :3]).min() > 0
    assert np.abs(grads["w1"][:, 3:]).max() == 0


def test_a_balanced_group_keeps_the_first_units_of_every_block():
    built = MODELS["grouped_convolution"].build()
    args = built.inputs(2, 0)
    trace = jaxprune.trace(built.apply_fn, built.variables, *args, balanced="*")
    names = {n: g for n, g in trace.items() if g.blocks > 1}
    assert names
    keeps = [
        {n: g.size for n, g in names.items()},
        {n: g.blocks for n, g in names.items()},
    ]
    slim = jaxprune.slimmable(built.apply_fn, built.variables, keeps, groups=trace)
    best = importance(trace, built.variables)
    keep = {
        n: (b := best[n].reshape(g.blocks, -1)) == b.max(1, keepdims=True)
        for n, g in names.items()
    }
    keep = {n: k.ravel() for n, k in keep.items()}
    expected = small(built.apply_fn, built.variables, trace, keep, *args)
    assert_same(slim[1](slim.variables, *args), expected)


def shifted(p, x):
    h = jnp.tanh(x @ p["w1"])
    return jnp.cumsum(h, 1) @ p["w2"]


def test_units_with_a_place_of_their_own_keep_it():
    params = weights(w1=(4, 8), w2=(8, 3))
    groups = jaxprune.trace(shifted, params, X)
    assert groups[HIDDEN].ordered
    slim = jaxprune.slimmable(
        shifted, params, [{HIDDEN: 8}, {HIDDEN: 5}], groups=groups
    )
    keep = {HIDDEN: np.arange(8) < 5}
    assert_same(slim[1](slim.variables, X), small(shifted, params, groups, keep, X))
    odd = {HIDDEN: np.arange(8) % 2 == 1}
    with pytest.raises(
        ValueError, match="units of w1:1 cannot be reordered: units may"
    ):
        jaxprune.slimmable(shifted, params, [{HIDDEN: 8}, odd], groups=groups)


EVEN = np.arange(8) % 2 == 0


@pytest.mark.parametrize(
    ("keeps", "options", "error", "text"),
    [
        ([], {}, ValueError, "keeps must be a sequence of widths, the widest first"),
        ({HIDDEN: 3}, {}, ValueError, "keeps must be a sequence of widths"),
        ([{HIDDEN: 8}, {}], {}, ValueError, r"keeps\[0\] cuts .* w1:1, but keeps\[1\]"),
        ([{"w1:2": 8}], {}, ValueError, r"keeps\[0\] names .* 'w1:2'.*mean w1:1"),
        ([{HIDDEN: 3}, {HIDDEN: 4}], {}, ValueError, r"keeps\[1\]\[w1:1\] keeps 4 un"),
        (
            [{HIDDEN: EVEN}, {HIDDEN: ~EVEN}],
            {},
            ValueError,
            "keeps unit 1, which keeps",
        ),
        ([{HIDDEN: 0}], {}, ValueError, r"keeps\[0\]\[w1:1\] must be .* at least 1"),
        ([{HIDDEN: 9}], {}, ValueError, "is 9, but the group has 8 units"),
        ([{HIDDEN: EVEN[:4]}], {}, ValueError, r"shape \(4,\), but the group has 8"),
        ([{HIDDEN: EVEN & ~EVEN}], {}, ValueError, "keeps 0 units of its 1 blocks"),
        ([{HIDDEN: EVEN * 1.0}], {}, TypeError, "must be bools .* float64"),
        ([{HIDDEN: True}], {}, TypeError, r"must be a count or bools \[8\], got True"),
        ([{HIDDEN: 2.5}], {}, ValueError, "must be a whole number"),
        ([{HIDDEN: 8}, None], {}, TypeError, r"keeps\[1\] must be a mapping.*NoneT"),
        ([{HIDDEN: 3}], {"private": "batch_stats/*"}, ValueError, "matches none of th"),
        ([{HIDDEN: 3}], {"order": {"w2:0": EVEN}}, ValueError, "order names the group"),
        ([{HIDDEN: 3}], {"order": {HIDDEN: EVEN[:2]}}, ValueError, "must be 8 finite"),
    ],
)
def test_bad_widths_are_refused_by_name(keeps, options, error, text):
    with pytest.raises(error, match=text):
        jaxprune.slimmable(mlp, PARAMS, keeps, groups=GROUPS, **options)


def test_bad_use_is_refused_by_name():
    slim = jaxprune.slimmable(mlp, PARAMS, [{HIDDEN: 8}, {HIDDEN: 2}], groups=GROUPS)
    with pytest.raises(IndexError, match="width 2 of 2 widths"):
        slim[2]
    with pytest.raises(TypeError, match="width is traced, .* call slim.switch"):
        jax.jit(lambda i: slim[i](slim.variables, X))(1)
    with pytest.raises(ValueError, match="do not have the structure of slim.variables"):
        slim[0]({"w1": PARAMS["w1"]}, X)
    with pytest.raises(TypeError, match="slimmable reads values, but variables"):
        jax.jit(lambda p: jaxprune.slimmable(mlp, p, [{HIDDEN: 2}], groups=GROUPS))(
            PARAMS
        )
    with pytest.raises(
        ValueError, match=r"order\[w1:1\] of shape \(2,\) is not a permuta"
    ):
        jaxprune.permute(PARAMS, GROUPS, {HIDDEN: [1, 0]})
    with pytest.raises(ValueError, match="'w2:1', which does not exist"):
        jaxprune.permute(PARAMS, GROUPS, {"w2:1": [1, 0]})
    with pytest.raises(TypeError, match="must be whole numbers"):
        jaxprune.permute(PARAMS, GROUPS, {HIDDEN: np.ones(8)})
    assert "2 widths of 8, 2 units in 1 groups" in repr(slim)


def shortcuts(p, x):
    """A block with a projection, then one with an identity."""
    h = jax.nn.relu(x @ p["stem"])
    h = jax.nn.relu(jnp.tanh(h @ p["up"]) @ p["body"] + h @ p["short"])
    h = jax.nn.relu(h + jnp.tanh(h @ p["up2"]) @ p["body2"])
    return h @ p["head"]


SHORTCUTS = weights(
    stem=(4, 6), up=(6, 5), body=(5, 8), short=(6, 8), up2=(8, 3), body2=(3, 8),
    head=(8, 2),
)  # fmt: skip


def zero_padded(seed):
    """Groups, and random writers with the streams that they leave, for 3 widths."""
    groups = jaxprune.trace(shortcuts, SHORTCUTS, X, writers="*")
    rng = np.random.default_rng(seed)
    names = [n for n, g in groups.items() if g.stream and "/" not in n]
    own = {(m.path, m.axis): n for n in names for m in groups[n].members[:1]
           if len(groups[n].members) == 1}  # fmt: skip
    order = {n: rng.permutation(groups[n].size) for n in own.values()}
    keeps = [{n: o < count for n, o in order.items()} for count in (6, 4, 2)]
    return groups, own, [search.fused(groups, keep) for keep in keeps]


@pytest.mark.parametrize("seed", range(2))
def test_writers_are_pruned_by_themselves_and_the_stream_keeps_the_union(seed):
    """T3 and T4 of zero padding match, on a projection and an identity shortcut."""
    groups, own, keeps = zero_padded(seed)
    body, short, last = (own[name, 1] for name in ("body", "short", "body2"))
    stream = groups[last].stream
    assert groups[body].stream == groups[short].stream == stream
    for keep in keeps:
        union = keep[body] | keep[short] | keep[last]
        np.testing.assert_array_equal(keep[stream], union)
        assert union.sum() <= keep[body].sum() + keep[short].sum() + keep[last].sum()
        # A dense net whose outputs are multiplied by the masks of their writers.
        p = {
            **SHORTCUTS,
            "body": SHORTCUTS["body"] * keep[body],
            "short": SHORTCUTS["short"] * keep[short],
            "body2": SHORTCUTS["body2"] * keep[last],
        }
        h = jax.nn.relu(X @ p["stem"])
        before = jnp.tanh(h @ p["up"]) @ p["body"] + h @ p["short"]
        assert np.abs(before[:, ~union]).max(initial=0) == 0
        expected = shortcuts(p, X)
        assert_same(small(shortcuts, SHORTCUTS, groups, keep, X), expected)
    # With equal masks it is ordinary pruning of the stream.
    same = keeps[0][body]
    equal = search.fused(groups, {body: same, short: same, last: same})
    plain = jaxprune.trace(shortcuts, SHORTCUTS, X)
    assert_same(
        small(shortcuts, SHORTCUTS, groups, equal, X),
        small(shortcuts, SHORTCUTS, plain, {"body:1": same}, X),
    )


def test_a_slimmable_network_with_zero_padding_is_its_pruned_networks():
    groups, _, keeps = zero_padded(2)
    keeps = [
        {**keep, "up:1": count} for keep, count in zip(keeps, (5, 3, 2), strict=True)
    ]
    slim = jaxprune.slimmable(shortcuts, SHORTCUTS, keeps, groups=groups)
    best = np.argsort(-importance(groups, SHORTCUTS)["up:1"], kind="stable")
    assert any((o != np.arange(len(o))).any() for o in slim.order.values())
    run = quick_jit(shortcuts)
    sorted_ones = jaxprune.permute(SHORTCUTS, groups, slim.order)
    assert_same(run(sorted_ones, X), run(SHORTCUTS, X))
    for i, keep in enumerate(keeps):
        keep = {**keep, "up:1": np.isin(np.arange(5), best[: keep["up:1"]])}
        expected = small(shortcuts, SHORTCUTS, groups, keep, X)
        assert_same(quick_jit(slim[i])(slim.variables, X), expected)
    writer = next(n for n, g in groups.items() if g.stream)
    with pytest.raises(ValueError, match="are added to a stream, .* follow its order"):
        jaxprune.permute(
            SHORTCUTS, groups, {writer: np.arange(groups[writer].size)[::-1]}
        )


def test_streams_need_writers():
    with pytest.raises(ValueError, match="keep names no writer of a stream"):
        search.fused(GROUPS, {HIDDEN: np.ones(8, bool)})


def test_an_export_holds_all_widths_over_one_set_of_weights(net, tmp_path):
    apply_fn, variables, x, groups = net
    slim = jaxprune.slimmable(
        apply_fn,
        variables,
        nested_keeps(groups, 5, 2),
        groups=groups,
        private="batch_stats/*",
    )
    jaxprune.io.save_widths(tmp_path, slim, slim.variables, x, facts={"epochs": 3})
    again = jaxprune.io.load_widths(tmp_path)
    assert len(again) == 2 and again.facts == {"epochs": 3}
    assert jax.tree.map(np.shape, again.variables) == jax.tree.map(
        np.shape, slim.variables
    )
    for i in range(2):
        assert_same(again[i](again.variables, x[:3]), slim[i](slim.variables, x[:3]))
    with np.load(next(tmp_path.glob("parameters*"))) as stored:
        assert len(stored.files) == len(jax.tree.leaves(slim.variables))
    with pytest.raises(
        ValueError, match="holds no slimmable network: .* does not exist"
    ):
        jaxprune.io.load_widths(tmp_path / "nothing")
