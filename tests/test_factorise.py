"""Kernels in factors compute what their product would, in any program.

The oracle is the untouched function on the product of the factors; that the product is
the best of its rank is held against singular values of matrices taken apart by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_same, quick_jit, total
from jax import lax
from jax.extend.core import check_jaxpr

import jaxprune
from jaxprune.core._leaves import named_leaves


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def conv(**options):
    numbers = options.pop("numbers", ("NHWC", "HWIO", "NHWC"))
    options = {"window_strides": (1, 1), "padding": "SAME", **options}

    def apply(params, x):
        made = lax.conv_general_dilated(
            x, params["w"], dimension_numbers=numbers, **options
        )
        return jnp.tanh(made)

    return apply


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["w"] + params["b"][None])
    return hidden @ params["out"].T


@jax.jit
def attention(params, x):
    q, k, v = (jnp.einsum("bse,ehd->bshd", x, params[n]) for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k), -1)
    return jnp.einsum("bhst,bthd,hde->bse", weights, v, params["o"])


def layers(params, x):
    def body(x, layer):
        return x + jnp.tanh(x @ layer["w"].astype(x.dtype) + layer["b"][None]), None

    return lax.scan(jax.checkpoint(body), x, params, reverse=True)[0]


def recurrent(params, x):
    def body(h, x):
        h = jnp.tanh(x @ params["w"] + h @ params["h"])
        return h, h

    return lax.scan(body, jnp.zeros((x.shape[1], 5)), x)[1]


STRIDED = {"window_strides": (2, 1), "padding": [(1, 0), (2, 1)]}
DILATED = {"padding": "VALID", "rhs_dilation": (1, 2)}
TRANSPOSED = {"lhs_dilation": (2, 2), "padding": [(1, 1), (2, 2)]}
GROUPED = {"feature_group_count": 2, **STRIDED}
TORCH = {"numbers": ("NCHW", "OIHW", "NHWC")}
IMAGE = normal(2, 7, 6, 4)
KERNEL = {"w": normal(3, 3, 4, 8)}
GROUPS = {"w": normal(3, 3, 2, 8)}

# function, params, input, options, shapes of the factors of w
CASES = {
    "dense": (
        mlp,
        {"w": normal(6, 9), "b": normal(9), "out": normal(5, 9)},
        normal(3, 6),
        {"ranks": {"w": 4, "out": 3}},
        ((6, 4), (4, 9)),
    ),
    "attention": (
        attention,
        {"q": normal(6, 2, 4), "k": normal(6, 2, 4, seed=1),
         "v": normal(6, 2, 4, seed=2), "o": normal(2, 4, 6)},
        0.3 * normal(2, 3, 6),
        {"ranks": 4},
        None,
    ),
    "experts": (
        lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]),
        {"w": normal(3, 6, 4)},
        normal(3, 2, 6),
        {"ranks": 2},
        ((3, 6, 2), (3, 2, 4)),
    ),
    "kernel first": (
        lambda p, x: jax.vmap(lambda x: p["w"] @ x)(x),
        {"w": normal(7, 6)},
        normal(2, 6),
        {"ranks": 4},
        ((6, 4), (4, 7)),
    ),
    "scan": (
        layers,
        {"w": normal(3, 5, 5), "b": normal(3, 5)},
        normal(2, 5),
        {"ranks": 2},
        ((3, 5, 2), (3, 2, 5)),
    ),
    "recurrent": (
        recurrent,
        {"w": normal(4, 5), "h": normal(5, 5)},
        normal(3, 2, 4),
        {"ranks": {"*": 2}},
        ((4, 2), (2, 5)),
    ),
    "conv": (conv(**STRIDED), KERNEL, IMAGE, {"ranks": 4}, ((3, 3, 4, 4), (1, 1, 4, 8))),
    "conv transposed": (conv(**TRANSPOSED), KERNEL, IMAGE, {"ranks": 4}, None),
    "conv OIHW": (
        conv(**TORCH),
        {"w": normal(8, 4, 3, 3)},
        normal(2, 4, 5, 6),
        {"ranks": 0.5},
        ((4, 4, 3, 3), (8, 4, 1, 1)),
    ),
    "grouped": (conv(**GROUPED), GROUPS, IMAGE, {"ranks": 2}, ((3, 3, 2, 4), (1, 1, 2, 8))),
    "spatial": (
        conv(**DILATED), KERNEL, IMAGE,
        {"ranks": 6, "kind": "spatial"}, ((3, 1, 4, 6), (1, 3, 6, 8)),
    ),
    "spatial grouped": (
        conv(**GROUPED), GROUPS, IMAGE, {"ranks": 2, "kind": "spatial"}, None
    ),
    "spatial transposed": (
        conv(**TRANSPOSED), KERNEL, IMAGE, {"ranks": 4, "kind": "spatial"}, None
    ),
    "depthwise": (
        conv(**STRIDED), KERNEL, IMAGE,
        {"ranks": 2, "kind": "depthwise"}, ((1, 1, 4, 16), (3, 3, 2, 8)),
    ),
    "basis": (
        conv(**STRIDED), KERNEL, IMAGE,
        {"ranks": 6, "kind": "basis", "basis_size": 2}, ((3, 3, 2, 6), (1, 1, 12, 8)),
    ),
    "basis OIHW": (
        conv(**TORCH),
        {"w": normal(8, 4, 3, 3)},
        normal(2, 4, 5, 6),
        {"ranks": 6, "kind": "basis", "basis_size": 2},
        None,
    ),
    "basis dense": (
        lambda p, x: jnp.tanh(x @ p["w"]),
        {"w": normal(6, 5)},
        normal(3, 6),
        {"ranks": 2, "kind": "basis", "basis_size": 3},
        ((3, 2), (2, 2, 5)),
    ),
}  # fmt: skip


def made(name):
    apply_fn, params, x, options, _ = CASES[name]
    return apply_fn, params, x, jaxprune.factorise(apply_fn, params, x, **options)


@pytest.mark.parametrize("name", CASES)
def test_factors_compute_what_their_product_does(name):
    """B1, in value and slope; no array of the kernel's size is made on the way."""
    apply_fn, params, x, small = made(name)
    shapes = CASES[name][-1]
    if shapes is not None:
        pair = small.variables["w"]
        assert (pair["first"].shape, pair["second"].shape) == shapes
    jaxpr = jax.make_jaxpr(small.apply_fn)(small.variables, x)
    check_jaxpr(getattr(jaxpr, "jaxpr", jaxpr))
    whole = small.compose(small.variables)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, params)

    def both(apply, variables):
        out = apply(variables, x)
        return out, jax.grad(lambda x: total(apply(variables, x)))(x)

    expected = quick_jit(lambda v: both(apply_fn, v))(whole)
    assert_same(quick_jit(lambda v: both(small.apply_fn, v))(small.variables), expected)


@pytest.mark.parametrize(
    "name",
    "dense attention experts scan grouped spatial depthwise basis".split(),
)
def test_ranks_are_groups_that_can_be_pruned(name):
    _, _, x, small = made(name)
    groups = jaxprune.trace(small.apply_fn, small.variables, x)
    ranks = [n for n in groups if "/first:" in n]
    assert len(ranks) == len(small.ranks)
    keep = {}
    for group in ranks:
        assert groups[group].exact, group
        keep[group] = np.arange(groups[group].size) % 2 == 0
    masks = jaxprune.expand_masks(groups, keep)
    sliced = jaxprune.slice_params(small.variables, masks)
    masked = jaxprune.apply_masks(small.variables, masks)
    expected = quick_jit(small.apply_fn)(masked, x)
    assert_same(quick_jit(jaxprune.narrow(small.apply_fn, masks))(sliced, x), expected)
    # A function of factors takes any rank.
    assert_same(small.apply_fn(sliced, x), expected)


def by_hand(kernel, name):
    """The matrices of a kernel, one after the other."""
    if name in ("dense", "experts", "scan", "recurrent"):
        return kernel.reshape(-1, *kernel.shape[-2:])
    if name == "conv":
        return [kernel.reshape(-1, 8)]
    if name == "grouped":
        return [kernel[..., :4].reshape(-1, 4), kernel[..., 4:].reshape(-1, 4)]
    if name == "spatial":
        blocks = [[kernel[:, :, c, n] for n in range(8)] for c in range(4)]
        return [np.block(blocks)]
    if name == "depthwise":
        return [kernel[..., n].reshape(9, 4) for n in range(8)]
    groups = [kernel[:, :, 2 * g : 2 * g + 2].reshape(-1, 8) for g in range(2)]
    return [np.concatenate(groups, 1)]  # basis


@pytest.mark.once
@pytest.mark.parametrize(
    "name",
    "dense experts scan recurrent conv grouped spatial depthwise basis".split(),
)
def test_products_are_the_nearest_of_their_rank(name):
    """Eckart and Young: what is missed is the tail of the singular values (R2)."""
    _, params, _, small = made(name)
    rank, got = small.ranks["w"], small.compose(small.variables)["w"]
    tails, norms = [], []
    pairs = zip(
        by_hand(np.asarray(params["w"]), name),
        by_hand(np.asarray(got), name),
        strict=True,
    )
    for whole, product in pairs:
        values = np.linalg.svd(whole, compute_uv=False)
        gap = np.linalg.norm(whole - product, 2)
        np.testing.assert_allclose(gap, values[rank], rtol=1e-3)
        tails.append((values[rank:] ** 2).sum())
        norms.append((values**2).sum())
    expected = np.sqrt(sum(tails) / sum(norms))
    np.testing.assert_allclose(small.errors["w"], expected, rtol=1e-3)


@pytest.mark.once
@pytest.mark.parametrize("kind", ["channel", "spatial", "depthwise", "basis"])
def test_full_rank_is_the_function_itself(kind):
    """B2: for a basis too, with as many filters as it has entries."""
    fn, options = conv(**STRIDED), {"basis_size": 2} if kind == "basis" else {}
    small = jaxprune.factorise(fn, KERNEL, IMAGE, ranks=1.0, kind=kind, **options)
    assert small.errors["w"] < 1e-6
    got = quick_jit(small.apply_fn)(small.variables, IMAGE)
    assert_same(got, quick_jit(fn)(KERNEL, IMAGE))


def test_a_basis_is_shared_by_layers():
    """B3: ``m p h w`` entries once, and ``s m`` an output of every layer."""

    def net(params, x):
        return conv()({"w": params["b"]}, conv()({"w": params["a"]}, x))

    params = {"a": normal(3, 3, 4, 4), "b": normal(3, 3, 4, 6)}
    options = {"ranks": 5, "kind": "basis", "basis_size": 2, "share": "*"}
    small = jaxprune.factorise(net, params, IMAGE, **options)
    p, m, s = 2, 5, 2
    sizes = sum(np.size(x) for x in jax.tree.leaves(small.variables))
    assert sizes == m * p * 9 + (4 + 6) * s * m
    assert set(small.variables["b"]) == {"second"}
    expected = quick_jit(net)(small.compose(small.variables), IMAGE)
    assert_same(quick_jit(small.apply_fn)(small.variables, IMAGE), expected)
    groups = jaxprune.trace(small.apply_fn, small.variables, IMAGE)
    assert {m.path for m in groups["a/first:3"].members} == {
        "a/first", "a/second", "b/second"
    }  # fmt: skip


@pytest.mark.once
def test_the_norm_loss_is_least_at_the_factors():
    """Of the distance to the kernels: its slope is 0, and not elsewhere."""
    options = {"ranks": 5, "kind": "basis", "basis_size": 2}
    small = jaxprune.factorise(conv(), KERNEL, IMAGE, **options)

    def norm_loss(variables):
        return jnp.square(small.compose(variables)["w"] - KERNEL["w"]).sum()

    def largest(variables):
        slopes = jax.tree.leaves(jax.grad(norm_loss)(variables))
        return max(float(jnp.abs(slope).max()) for slope in slopes)

    assert largest(small.variables) < 1e-4
    assert largest(jax.tree.map(lambda w: 1.1 * w, small.variables)) > 0.1


def test_it_composes_with_the_rest(tmp_path):
    """Optimiser states, costs, checkpoints, export; and the other order with narrow."""
    fn, params, x, small = made("dense")
    groups = jaxprune.trace(small.apply_fn, small.variables, x)
    # The hidden layer is a group as before; both kinds are cut together.
    keep = {"w/first:1": np.arange(4) > 0, "w/second:1": np.arange(9) > 3}
    masks = jaxprune.expand_masks(groups, keep)
    sliced = jaxprune.slice_params(small.variables, masks)
    tx = optax.adam(0.1)
    opt_state = jaxprune.slice_opt_state(tx, tx.init(small.variables), masks)
    assert jax.tree.map(jnp.shape, opt_state) == jax.tree.map(
        jnp.shape, tx.init(sliced)
    )
    narrowed = jaxprune.narrow(small.apply_fn, masks)
    found = jaxprune.costs(narrowed, sliced, x)
    assert found.parameters == 6 * 3 + 3 * 5 + 5 + 5 * 3 + 3 * 5
    assert found.multiply_adds == 3 * (6 * 3 + 3 * 5 + 5 * 3 + 3 * 5)
    jaxprune.checkpoints.save(tmp_path / "run", 1, sliced)
    got = jaxprune.checkpoints.restore_exactly(tmp_path / "run", 1, sliced)
    jax.tree.map(np.testing.assert_array_equal, got, sliced)
    jaxprune.export.save_exported(tmp_path / "net", narrowed, sliced, x)
    loaded = jaxprune.export.load_exported(tmp_path / "net")
    assert_same(loaded(x), narrowed(sliced, x))

    # A narrowed function is factorised like any other.
    groups = jaxprune.trace(fn, params, x)
    masks = jaxprune.expand_masks(groups, {"w:1": np.arange(9) > 3})
    cut = jaxprune.slice_params(params, masks)
    again = jaxprune.factorise(jaxprune.narrow(fn, masks), cut, x, ranks={"w": 2})
    whole = jaxprune.unslice_params(again.compose(again.variables), masks)
    assert_same(again.apply_fn(again.variables, x), fn(whole, x))


def test_it_is_a_transformation():
    """Under vmap and jit, on other batches and dtypes, with static arguments."""

    def net(params, x, *, flag=False, mode="a"):
        return mlp(params, x) if flag and mode == "b" else jnp.zeros(())

    _, params, x, _ = made("dense")
    small = jaxprune.factorise(net, params, x, ranks={"w": 4}, flag=True, mode="b")
    call = lambda x: small.apply_fn(small.variables, x, flag=True, mode="b")  # noqa: E731
    whole = small.compose(small.variables)
    batches = jnp.stack([x[:2], 2 * x[:2]])
    expected = jax.vmap(lambda x: mlp(whole, x))(batches)
    assert_same(jax.jit(jax.vmap(call))(batches), expected)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small.variables)
    out = small.apply_fn(half, x.astype(jnp.bfloat16), flag=True, mode="b")
    assert out.dtype == jnp.bfloat16
    assert small.apply_fn(small.variables, x).shape == ()


def used_twice(params, x):
    return x @ params["w"] @ params["w"].T


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (mlp, {"ranks": {"w": 7}}, "the rank of w must be between 1 and its full rank, 6"),
        (mlp, {"ranks": {"w": 0}}, "the rank of w must be between 1"),
        (mlp, {"ranks": {"w": 1.5}}, r"the rank of w as a fraction .* got 1.5"),
        (mlp, {"ranks": {"v": 2}}, "'v', which matches no leaf"),
        (mlp, {"ranks": {"outs": 2}}, "did you mean out"),
        (mlp, {"ranks": {"b": 1}}, "b cannot be factorised: it is read by add"),
        (used_twice, {"ranks": {"w": 1}}, "read along different axes by several"),
        (used_twice, {"ranks": {"out": 1}}, "out cannot be .* no contraction reads it"),
        (lambda p, x: x @ jnp.abs(p["w"]), {"ranks": {"w": 1}}, "it is read by abs"),
        (lambda p, x: x @ p["w"][:, :3], {"ranks": {"w": 1}}, "in part or repeatedly"),
        (lambda p, x: (x @ p["w"], p["w"]), {"ranks": {"w": 1}}, "returned by the fun"),
        (mlp, {"ranks": 1, "kind": "spatial"}, "no kernel to factorise.* is a matrix"),
        (mlp, {"ranks": 1, "kind": "svd"}, "kind must be one of channel"),
        (mlp, {"ranks": 1, "basis_size": 2}, 'are of kind="basis"'),
        (mlp, {"ranks": 1, "kind": "basis", "basis_size": 0}, "basis_size must be"),
        (
            mlp,
            {"ranks": {"w": 1}, "kind": "basis", "basis_size": 4},
            "6 inputs do not split into groups of basis_size=4",
        ),
        (
            mlp,
            {"ranks": 2, "kind": "basis", "share": "*"},
            "w cannot share the basis of out|out cannot share the basis of w",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(fn, options, message):
    _, params, x, _, _ = CASES["dense"]
    with pytest.raises(ValueError, match=message):
        jaxprune.factorise(fn, params, x, **options)


def test_bad_values_are_named():
    _, params, x, small = made("dense")
    with pytest.raises(TypeError, match="the rank of w must be an int, or a float"):
        jaxprune.factorise(mlp, params, x, ranks={"w": True})
    with pytest.raises(TypeError, match=r"w is a .*Tracer, but factorise needs values"):
        jax.jit(lambda p: jaxprune.factorise(mlp, p, x, ranks={"w": 1}).variables)(
            params
        )
    with pytest.raises(
        ValueError, match=r"\['out'\] was factorised and must hold first"
    ):
        small.apply_fn(params, x)
    with pytest.raises(ValueError, match="these are not the factorised variables"):
        small.apply_fn({"w": params["w"]}, x)
    with pytest.raises(ValueError, match="w holds entries that are not finite"):
        jaxprune.factorise(mlp, {**params, "w": params["w"] / 0}, x, ranks={"w": 1})
    # Another program, in which a kernel is read otherwise.
    flagged = lambda p, x, flag=False: x @ (p["w"] ** 2 if flag else p["w"])  # noqa: E731
    small = jaxprune.factorise(flagged, {"w": params["w"]}, x, ranks=2)
    with pytest.raises(
        ValueError, match="w was factorised, but in this call .* read by"
    ):
        small.apply_fn(small.variables, x, flag=True)


def test_untouched_equations_keep_their_names():
    """What no kernel meets is copied; factors get the line of their contraction."""
    _, _, x, small = made("dense")
    jaxpr = jax.make_jaxpr(small.apply_fn)(small.variables, x)
    [outer] = jaxpr.eqns
    inner = getattr(outer.params["jaxpr"], "jaxpr", outer.params["jaxpr"])
    names = [eqn.primitive.name for eqn in inner.eqns]
    assert names.count("dot_general") == 4
    assert "transpose" not in names  # of the kernel that is gone
    assert named_leaves(small.variables).keys() == {
        "b", "out/first", "out/second", "w/first", "w/second"
    }  # fmt: skip
