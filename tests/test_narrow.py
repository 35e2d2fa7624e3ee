"""`narrow` is a citizen: same signature, every JAX transformation, clear refusals."""

import collections
import functools
import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_same, halve, quick_jit
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from zoo import MODELS, random_variables, weights

import jaxprune
from jaxprune.coupling import _walk as walk_module
from jaxprune.models import cifar_resnet
from jaxprune.narrowing import _narrow as narrow_module
from jaxprune.program import _jaxprs

X = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def mlp(p, x, scale=2.0):
    """A docstring."""
    h = jnp.tanh(x @ p["w1"] + p["b1"][None]) * scale
    return h @ p["w2"]


PARAMS = weights(w1=(4, 8), b1=(8,), w2=(8, 3))
GROUPS = jaxprune.trace(mlp, PARAMS, X)
MASKS = jaxprune.expand_masks(GROUPS, halve(GROUPS, 0))
SMALL = jaxprune.slice_params(PARAMS, MASKS)
EXPECTED = mlp(jaxprune.apply_masks(PARAMS, MASKS), X)


def counted(fn):
    """`fn`, and the list of the calls of its Python body."""
    calls = []

    @functools.wraps(fn)
    def body(*args, **kwargs):
        calls.append(args)
        return fn(*args, **kwargs)

    return body, calls


# --- signature and arguments ---------------------------------------------------------


def test_the_signature_is_that_of_the_function():
    small_mlp = jaxprune.narrow(mlp, MASKS)
    assert inspect.signature(small_mlp) == inspect.signature(mlp)
    assert (small_mlp.__name__, small_mlp.__doc__) == ("mlp", "A docstring.")


def test_arguments_by_name_and_default():
    small_mlp = jaxprune.narrow(mlp, MASKS)
    assert_same(small_mlp(SMALL, X), EXPECTED)
    assert_same(small_mlp(SMALL, x=X), EXPECTED)
    assert_same(small_mlp(SMALL, X, 4.0), 2.0 * EXPECTED)
    assert_same(small_mlp(SMALL, X, scale=jnp.asarray(4.0)), 2.0 * EXPECTED)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(8, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, name="head")(x)


def net_variables():
    shapes = jax.eval_shape(lambda key: Net().init(key, X, False), jax.random.key(0))
    return random_variables(shapes)


def test_linen_apply_itself_with_its_static_arguments():
    variables = net_variables()
    groups = jaxprune.trace(Net().apply, variables, X, train=False)
    assert {n: g.size for n, g in groups.items()} == {"params/dense/kernel:1": 8}
    masks = jaxprune.expand_masks(groups, halve(groups, 0))
    small = jaxprune.slice_params(variables, masks)
    masked = jaxprune.apply_masks(variables, masks)
    small_apply = jaxprune.narrow(Net().apply, masks)
    assert_same(small_apply(small, X, train=False), Net().apply(masked, X, train=False))
    options = {
        "train": True,
        "mutable": ["batch_stats"],
        "rngs": {"dropout": jax.random.key(5)},
    }
    out, updates = small_apply(small, X, **options)
    expected, stats = Net().apply(masked, X, **options)
    assert_same(out, expected)
    assert_same(
        updates, jaxprune.slice_params(stats, {"batch_stats": masks["batch_stats"]})
    )
    # The new statistics are variables of the small model.
    again = small_apply({**small, **updates}, X, train=False)
    assert again.shape == (3, 3)


def test_a_static_argument_is_told_by_its_type():
    def fn(p, x, kind):
        h = jnp.tanh(x @ p["w1"] + p["b1"][None])
        return h @ p["w2"] * {bool: 1.0, int: 2.0, float: 3.0}[type(kind)]

    small_fn = jaxprune.narrow(fn, MASKS)
    one, two, three = (small_fn(SMALL, X, kind) for kind in (True, 1, 1.0))
    assert_same(two, 2.0 * one)
    assert_same(three, 3.0 * one)


def test_a_static_argument_may_be_unhashable():
    def fn(p, x, options):
        return mlp(p, x, options.factor)

    class Options:
        __hash__ = None
        factor = 2.0

    assert_same(jaxprune.narrow(fn, MASKS)(SMALL, X, Options()), EXPECTED)


# --- tracing happens once ------------------------------------------------------------


def test_the_body_runs_once_for_each_shape(monkeypatch):
    body, calls = counted(mlp)
    restrict, restrictions = counted(narrow_module.restrict)
    monkeypatch.setattr(narrow_module, "restrict", restrict)
    small_mlp = jaxprune.narrow(body, MASKS)
    for _ in range(3):
        small_mlp(SMALL, X)
    assert len(calls) == len(restrictions) == 1
    small_mlp(SMALL, X[:2])
    small_mlp(SMALL, X[:2])
    assert len(calls) == len(restrictions) == 2
    small_mlp(SMALL, X, scale=3.0)
    small_mlp(SMALL, X, scale=3.0)
    assert len(calls) == len(restrictions) == 3


def test_jit_and_grad_do_not_trace_again():
    body, calls = counted(mlp)
    small_mlp = jaxprune.narrow(body, MASKS)
    jitted = jax.jit(small_mlp)
    for _ in range(3):
        jitted(SMALL, X)
    assert len(calls) == 1
    slope = jax.jit(jax.grad(lambda p, x: small_mlp(p, x).sum()))
    for _ in range(3):
        slope(SMALL, X)
    assert len(calls) == 1  # the same program, differentiated
    jitted(SMALL, X[:1])
    assert len(calls) == 2


def test_a_program_is_walked_once_for_trace_and_narrow(monkeypatch):
    body, _ = counted(mlp)
    walk, walks = counted(walk_module._walk_program)
    monkeypatch.setattr(walk_module, "_walk_program", walk)
    first = jaxprune.trace(body, PARAMS, X)
    pinned = jaxprune.trace(body, PARAMS, X, pin=["w1:1"])
    again = jaxprune.trace(body, PARAMS, X)
    assert (list(first), list(pinned), list(again)) == (["w1:1"], [], ["w1:1"])
    assert_same(jaxprune.narrow(body, MASKS)(SMALL, X), EXPECTED)
    assert len(walks) == 1
    jaxprune.trace(body, PARAMS, X[:2])
    assert len(walks) == 2


def test_tracers_that_a_function_closes_over_do_not_stay():
    @jax.jit
    def outer(shift):
        def shifted(p, x):
            return mlp(p, x + shift)

        assert list(jaxprune.trace(shifted, PARAMS, X)) == ["w1:1"]
        out = jaxprune.narrow(shifted, MASKS)(SMALL, X)
        known = _jaxprs._JITTED[id(shifted), None].values()
        assert [walks for _, walks in known] == [{}] * len(known)
        return out

    assert_same(outer(jnp.float32(0)), EXPECTED)


# --- transformations -----------------------------------------------------------------


def test_under_jit_grad_and_jvp():
    small_mlp = jaxprune.narrow(mlp, MASKS)

    def loss(fn, p):
        return jnp.sin(fn(p, X)).sum()

    assert_same(jax.jit(small_mlp)(SMALL, X), EXPECTED)
    got = jax.jit(jax.grad(functools.partial(loss, small_mlp)))(SMALL)
    full = jax.grad(functools.partial(loss, mlp))(jaxprune.apply_masks(PARAMS, MASKS))
    assert_same(got, jaxprune.slice_params(full, MASKS))
    _, slope = jax.jvp(lambda x: small_mlp(SMALL, x), (X,), (X,))
    masked = jaxprune.apply_masks(PARAMS, MASKS)
    assert_same(slope, jax.jvp(lambda x: mlp(masked, x), (X,), (X,))[1])
    hessian = jax.hessian(lambda x: small_mlp(SMALL, x).sum())(X[:1])
    assert_same(hessian, jax.hessian(lambda x: mlp(masked, x).sum())(X[:1]))


def test_under_vmap_over_inputs_and_over_variables():
    small_mlp = jaxprune.narrow(mlp, MASKS)
    rows = jax.vmap(lambda x: small_mlp(SMALL, x[None])[0])(X)
    assert_same(rows, EXPECTED)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2.0 * leaf]), SMALL)
    got = jax.vmap(small_mlp, in_axes=(0, None))(several, X)
    assert_same(got[0], EXPECTED)
    assert_same(got[1], small_mlp(jax.tree.map(lambda leaf: 2.0 * leaf, SMALL), X))


def test_inside_scan_with_the_variables_as_carry():
    small_mlp = jaxprune.narrow(mlp, MASKS)

    def descend(fn, p):
        slope = jax.grad(lambda p: (fn(p, X) ** 2).mean())

        def step(p, _):
            p = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, p, slope(p))
            return p, fn(p, X)

        return lax.scan(step, p, length=4)

    got, outs = jax.jit(functools.partial(descend, small_mlp))(SMALL)
    expected, masked_outs = descend(
        lambda p, x: mlp(jaxprune.apply_masks(p, MASKS), x), PARAMS
    )
    assert_same(outs, masked_outs)
    assert_same(got, jaxprune.slice_params(expected, MASKS))


@jax.custom_vjp
def tripled(h):
    return 3.0 * h


tripled.defvjp(lambda h: (tripled(h), h), lambda h, g: (5.0 * g * jnp.cos(h),))


def deep(p, x):
    """Calls of every kind: custom derivatives, remat, a scan, a table."""
    h = jax.nn.relu(x @ p["w1"]) + jnp.arange(8.0)[None] * p["b1"][None]
    step = lambda h, _: (jnp.tanh(h * p["b1"][None] + h), None)  # noqa: E731
    h, _ = lax.scan(jax.checkpoint(step), h, length=2)
    return tripled(h) @ p["w2"]


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("fn", [mlp, deep])
def test_under_shard_map(fn, devices):
    """Rows over devices; the gradient of the variables adds up over all of them."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    rows = np.concatenate([X, 1 - X])
    over, whole = PartitionSpec("data"), PartitionSpec()

    def slopes(fn, p, x):
        return jax.grad(lambda *args: jnp.sin(fn(*args)).sum(), argnums=(0, 1))(p, x)

    def sharded(fn, out_specs):
        specs = {"in_specs": (whole, over), "out_specs": out_specs}
        return quick_jit(jax.shard_map(fn, mesh=mesh, **specs))

    small_fn = jaxprune.narrow(fn, MASKS)
    masked = jaxprune.apply_masks(PARAMS, MASKS)
    out = sharded(small_fn, over)(SMALL, rows)
    assert len(out.sharding.device_set) == devices
    assert_same(out, fn(masked, rows))
    of_fn = functools.partial(slopes, small_fn)
    of_small, of_rows = sharded(of_fn, (whole, over))(SMALL, rows)
    of_full, expected = quick_jit(functools.partial(slopes, fn))(masked, rows)
    assert_same(of_rows, expected)
    assert_same(of_small, jaxprune.slice_params(of_full, MASKS))


def test_export_and_back():
    small_mlp = jaxprune.narrow(mlp, MASKS)
    exported = jax.export.export(jax.jit(small_mlp))(SMALL, X)
    restored = jax.export.deserialize(exported.serialize())
    assert_same(restored.call(SMALL, X), EXPECTED)


def test_donated_variables():
    small_mlp = jaxprune.narrow(mlp, MASKS)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(p, x):
        slope = jax.grad(lambda p: (small_mlp(p, x) ** 2).mean())(p)
        return jax.tree.map(lambda leaf, g: leaf - 0.1 * g, p, slope)

    given = jax.tree.map(jnp.array, SMALL)
    new = step(given, X)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, SMALL)


def test_from_shapes_alone():
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), SMALL
    )
    out = jax.eval_shape(jaxprune.narrow(mlp, MASKS), shapes, X)
    assert (out.shape, out.dtype) == ((3, 3), jnp.float32)


def test_a_value_of_an_outer_program_may_be_closed_over():
    @jax.jit
    def outer(factor, p, x):
        return jaxprune.narrow(lambda p, x: mlp(p, x) * factor, MASKS)(p, x)

    assert_same(outer(2.0, SMALL, X), 2.0 * EXPECTED)
    assert_same(outer(3.0, SMALL, X), 3.0 * EXPECTED)


def test_a_second_round_narrows_the_narrowed():
    first = jaxprune.narrow(mlp, MASKS)
    groups = jaxprune.trace(first, SMALL, X)
    assert {n: (g.size, g.exact) for n, g in groups.items()} == {"w1:1": (4, True)}
    masks = jaxprune.expand_masks(groups, halve(groups, 1))
    smaller = jaxprune.slice_params(SMALL, masks)
    assert smaller["w1"].shape == (4, 2)
    expected = first(jaxprune.apply_masks(SMALL, masks), X)
    assert_same(jaxprune.narrow(first, masks)(smaller, X), expected)


@pytest.mark.parametrize("name", ["resnet_projection", "vit", "gru", "shufflenet"])
def test_two_rounds_of_a_model(name):
    built = MODELS[name].build()
    variables, apply_fn, args = built.variables, built.apply_fn, built.inputs(2, 0)
    for seed in range(2):
        groups = jaxprune.trace(apply_fn, variables, *args)
        keep = {
            n: np.random.default_rng(seed).permutation(g.size) >= min(1, g.size - 1)
            for n, g in groups.items()
            if g.exact
        }
        masks = jaxprune.expand_masks(groups, keep)
        expected = jax.jit(apply_fn)(jaxprune.apply_masks(variables, masks), *args)
        variables = jaxprune.slice_params(variables, masks)
        apply_fn = jaxprune.narrow(apply_fn, masks)
        assert_same(jax.jit(apply_fn)(variables, *args), expected)


def test_other_dtypes_and_containers():
    p = tuple(jnp.asarray(PARAMS[name], jnp.bfloat16) for name in ("w1", "w2"))
    p = (p[0], [p[1]])

    def fn(p, x):
        w1, (w2,) = p
        return jax.nn.relu(x @ w1) @ w2

    x = jnp.asarray(X, jnp.bfloat16)
    groups = jaxprune.trace(fn, p, x)
    assert {n: g.size for n, g in groups.items()} == {"0:1": 8}
    masks = jaxprune.expand_masks(groups, halve(groups, 0))
    got = jaxprune.narrow(fn, masks)(jaxprune.slice_params(p, masks), x)
    expected = fn(jaxprune.apply_masks(p, masks), x)
    assert got.dtype == jnp.bfloat16
    gap = jnp.abs(got.astype(jnp.float32) - expected.astype(jnp.float32)).max()
    assert gap < 2e-2 * jnp.abs(expected.astype(jnp.float32)).max()


def test_masks_that_cut_nothing():
    masks = jax.tree.map(lambda _: np.array(True), PARAMS)
    assert_same(jaxprune.narrow(mlp, masks)(PARAMS, X), mlp(PARAMS, X))


def test_masks_may_have_the_full_shape_of_their_leaf():
    full = jax.tree.map(lambda m, p: np.broadcast_to(m, p.shape), MASKS, PARAMS)
    assert_same(jaxprune.narrow(mlp, full)(SMALL, X), EXPECTED)


# --- whole branches ------------------------------------------------------------------


def test_cutting_every_unit_of_a_branch_leaves_the_rest():
    built = MODELS["resnet_projection"].build()
    args = built.inputs(2, 0)
    groups = jaxprune.trace(built.apply_fn, built.variables, *args)
    keep = {"params/in0/kernel:3": np.zeros(6, bool)}
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(built.variables, masks)
    assert small["params"]["in0"]["kernel"].size == 0
    got = jax.jit(jaxprune.narrow(built.apply_fn, masks))(small, *args)
    masked = jaxprune.apply_masks(built.variables, masks)
    assert_same(got, jax.jit(built.apply_fn)(masked, *args))


# --- refusals ------------------------------------------------------------------------


def masks_of(**masks):
    return {**jax.tree.map(lambda _: np.array(True), PARAMS), **masks}


def cut(size, *gone):
    keep = np.ones(size, bool)
    keep[list(gone)] = False
    return keep


def test_masks_must_be_concrete_and_boolean():
    @jax.jit
    def inside(masks, p):
        return jaxprune.narrow(mlp, masks)(p, X)

    with pytest.raises(TypeError, match=r"masks\['b1'\] is a tracer, but narrow"):
        inside(jax.tree.map(jnp.asarray, MASKS), SMALL)
    with pytest.raises(
        TypeError, match=r"masks\['w1'\] has dtype float32, expected bool"
    ):
        jaxprune.narrow(mlp, masks_of(w1=np.ones((4, 8), np.float32)))


def test_variables_must_be_sliced_with_these_masks():
    small_mlp = jaxprune.narrow(mlp, MASKS)
    with pytest.raises(
        ValueError,
        match=r"variables\['b1'\] axis 0 has size 8, expected 4 after slicing 8; they "
        r"have not been sliced with these masks \(see slice_params\)",
    ):
        small_mlp(PARAMS, X)
    other = jaxprune.expand_masks(GROUPS, {"w1:1": cut(8, 1)})
    with pytest.raises(ValueError, match="were they sliced with other masks"):
        small_mlp(jaxprune.slice_params(PARAMS, other), X)
    with pytest.raises(
        ValueError, match="variables lack b1, w2; .* made for the same model"
    ):
        small_mlp({"w1": SMALL["w1"]}, X)


def test_masks_that_tear_coupled_axes_apart_name_both():
    torn = masks_of(w1=cut(8, 0)[None], b1=cut(8, 0), w2=cut(8, 1)[:, None])
    small = jaxprune.slice_params(PARAMS, torn)
    with pytest.raises(
        ValueError, match=r"(w1 axis 1|b1 axis 0) and w2 axis 0 are cou"
    ):
        jaxprune.narrow(mlp, torn)(small, X)
    half = masks_of(w1=cut(8, 0)[None])
    with pytest.raises(ValueError, match=r"w1 axis 1 and (b1|w2) axis 0 are coupled"):
        jaxprune.narrow(mlp, half)(jaxprune.slice_params(PARAMS, half), X)


def test_an_axis_of_the_input_cannot_be_cut():
    masks = masks_of(w1=cut(4, 1)[:, None])
    with pytest.raises(ValueError, match=r"args/1 axis 1.*w1 axis 0|w1 axis 0.*args/1"):
        jaxprune.narrow(mlp, masks)(jaxprune.slice_params(PARAMS, masks), X)


def test_a_pinned_axis_says_why():
    def fn(p, x):
        h = lax.sort(x @ p["w1"], dimension=1)
        return h @ p["w2"]

    p = weights(w1=(4, 8), w2=(8, 3))
    masks = {"w1": cut(8, 1)[None], "w2": cut(8, 1)[:, None]}
    with pytest.raises(
        ValueError,
        match=r"w1 axis 1: the mask cuts 1 of 8 positions, but this axis cannot be "
        r"cut: values are sorted along this axis \(sort at test_narrow.py:\d+ \(.*fn\)\)",
    ):
        jaxprune.narrow(fn, masks)(jaxprune.slice_params(p, masks), X)


def test_a_cut_across_heads_says_that_it_is_no_product():
    def fn(p, x):
        h = (x @ p["w1"]).reshape(3, 2, 4)
        return jnp.einsum("bhd,hdo->bo", jnp.tanh(h), p["w2"])

    p = weights(w1=(4, 8), w2=(2, 4, 3))
    masks = {"w1": cut(8, 1)[None], "w2": np.array(True)}
    with pytest.raises(ValueError, match="w2 axis 1|do not form a product"):
        jaxprune.narrow(fn, masks)(jaxprune.slice_params(p, masks), X)


# --- what the compiler sees ----------------------------------------------------------


def opcodes(fn, *args):
    """How often each instruction stands in the compiled program."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    return collections.Counter(re.findall(r"= \S+ ([a-z][a-z0-9-]*)\(", text))


@pytest.fixture(scope="module")
def resnet():
    net = cifar_resnet(8, inner_widths=(8,) * 3)
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    variables = random_variables(jax.eval_shape(net.init, jax.random.key(0), x))
    return net, variables, x


def test_a_narrowed_resnet_compiles_to_what_a_small_one_compiles_to(resnet):
    net, variables, x = resnet
    groups = jaxprune.trace(net.apply, variables, x)
    inner = [n for n in groups if re.search(r"block\d_\d/conv1/kernel:3$", n)]
    assert {n: groups[n].size for n in inner} == dict.fromkeys(inner, 8)
    assert len(inner) == 3
    masks = jaxprune.expand_masks(groups, halve(groups, 0, inner))
    small = jaxprune.slice_params(variables, masks)
    built = cifar_resnet(8, inner_widths=(4,) * 3)
    shapes = jax.eval_shape(built.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, small)
    narrowed = opcodes(jaxprune.narrow(net.apply, masks), small, x)
    assert narrowed == opcodes(built.apply, small, x)
    assert narrowed["convolution"] > 0 or narrowed["custom-call"] > 0


def test_a_resnet_cut_everywhere_holds_no_gather(resnet):
    net, variables, x = resnet
    groups = jaxprune.trace(net.apply, variables, x)
    masks = jaxprune.expand_masks(groups, halve(groups, 0))
    small = jaxprune.slice_params(variables, masks)
    found = opcodes(jaxprune.narrow(net.apply, masks), small, x)
    assert found["gather"] == found["dynamic-slice"] == found["scatter"] == 0
    assert found["fusion"] > 0


def decoder(p, ids, queries=2):
    """One layer of a decoder: grouped queries, a gated unit, a tied embedding."""
    x = p["embedding"][ids]
    q, k, v = ((x @ p[name]).reshape(*x.shape[:2], -1, 8) for name in ("q", "k", "v"))
    q = q.reshape(*x.shape[:2], k.shape[2], queries, 8)
    scores = jax.nn.softmax(jnp.einsum("btkgd,bskd->bkgts", q, k))
    mixed = jnp.einsum("bkgts,bskd->btkgd", scores, v)
    x = x + mixed.reshape(*x.shape[:2], -1) @ p["out"]
    x = x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
    return x @ p["embedding"].T


def test_a_narrowed_decoder_compiles_to_what_a_small_one_compiles_to():
    kernels = dict.fromkeys(("k", "v"), (16, 16))
    glu = {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}
    p = weights(embedding=(11, 16), q=(16, 32), out=(32, 16), **kernels, **glu)
    ids = np.arange(10, dtype=np.int32).reshape(2, 5)
    groups = jaxprune.trace(decoder, p, ids)
    assert {n: g.size for n, g in groups.items()}["q:1"] == 2  # kv heads
    masks = jaxprune.expand_masks(groups, halve(groups, 0, ["q:1", "gate:1"]))
    small = jaxprune.slice_params(p, masks)
    assert (small["q"].shape, small["k"].shape) == ((16, 16), (16, 8))
    narrowed = opcodes(jaxprune.narrow(decoder, masks), small, ids)
    assert narrowed == opcodes(decoder, small, ids)
    assert narrowed["gather"] == 1  # the embedding's own
