"""Masks of single weights: per leaf, global, n of m, blocks; the exact threshold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quick_jit

from jaxprune import select
from jaxprune.core._masks import apply_masks
from jaxprune.select import _lowest as thresholds
from jaxprune.select import _thresholds as bisection
from jaxprune.statistics import taps

pytestmark = pytest.mark.once


def ranked(leaves, count, caps):
    """The slow way: every entry of every leaf in one sorted list."""
    flat = [np.asarray(leaf, np.float64).ravel() for leaf in leaves]
    rows = sorted(
        (value, -k, -place) for k, x in enumerate(flat) for place, value in enumerate(x)
    )
    gone, lost = [np.zeros(x.size, bool) for x in flat], [0] * len(flat)
    for _, k, place in ((value, -k, -place) for value, k, place in rows):
        if sum(lost) < count and lost[k] < caps[k]:
            gone[k][place] = True
            lost[k] += 1
    return [x.reshape(np.shape(leaf)) for x, leaf in zip(gone, leaves, strict=True)]


def cases(seed):
    """Leaves with many ties, negative scores, both zeros; caps and a count."""
    rng = np.random.default_rng(seed)
    leaves = []
    for shape in [(3, 4), (7,), (2, 2, 2)]:
        values = rng.integers(-3, 4, shape) * rng.choice([0.5, 100.0])
        leaves.append((values + rng.choice([0, 2]) * -1.0).astype(np.float32))
    caps = [int(rng.integers(0, x.size + 1)) for x in leaves]
    return leaves, int(rng.integers(0, sum(caps) + 1)), caps


@pytest.mark.parametrize("seed", range(40))
def test_lowest_is_the_sorted_list(seed):
    leaves, count, caps = cases(seed)
    got = thresholds.lowest(leaves, count, caps)
    for a, b in zip(got, ranked(leaves, count, caps), strict=True):
        np.testing.assert_array_equal(a, b)


def test_five_billion_weights_are_counted_in_full(monkeypatch):
    """From shapes: the budget of a net too large to allocate reaches the bisection."""
    seen = {}

    def spy(count):
        seen["count"] = count
        return bisection.Wide(jnp.uint32(count >> 16), jnp.uint32(count & 0xFFFF))

    monkeypatch.setattr(bisection, "wide", spy)
    leaf = jax.ShapeDtypeStruct((50_000, 50_000), jnp.float32)
    jax.eval_shape(
        lambda s: select.across_leaves(s, sparsity=0.5), {"a": leaf, "c": leaf}
    )
    assert seen["count"] in (2_500_000_000, 5_000_000_000 - 2)
    with pytest.raises(ValueError, match=r"\(70000, 70000\) has 4900000000 scores"):
        huge = jax.ShapeDtypeStruct((70_000, 70_000), jnp.float32)
        jax.eval_shape(lambda s: select.per_leaf(s, sparsity=0.5), {"a": huge})


@pytest.mark.parametrize("share", [0.0, 2e-5, 0.1, 0.3, 0.5, 0.9, 1 - 3e-5])
@pytest.mark.parametrize("kind", ["normal", "mostly zeros", "sorted", "two values"])
def test_the_threshold_is_an_entry_at_its_place(share, kind, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=90_000).astype(np.float32)
    values = {
        "normal": x,
        "mostly zeros": np.where(rng.random(x.size) < 0.8, 0, x).astype(np.float32),
        "sorted": np.sort(x),
        "two values": (x > 0.3).astype(np.float32),
    }[kind]
    monkeypatch.setattr(thresholds, "_SMALL", 1 << 9)
    monkeypatch.setattr(thresholds, "_CHUNK", 1 << 10)
    scores = {"a": values[:30_000].reshape(300, 100), "b": values[30_000:]}
    expected = np.sort(values)[round(share * values.size)]
    assert select.threshold(scores, sparsity=share, only="*") == expected
    masks = select.across_leaves(scores, sparsity=share, only="*")
    removed = sum(int((~mask).sum()) for mask in masks.values())
    assert removed == round(share * values.size)
    for name, mask in masks.items():
        # One entry of a leaf that is below throughout stays, and another goes for it.
        assert (scores[name][mask] < expected).sum() <= 1
        assert (scores[name][~mask] > expected).sum() <= 1


def test_a_bracket_that_misses_is_searched_again(monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.permutation(50_000).astype(np.float32)
    monkeypatch.setattr(thresholds, "_SMALL", 1 << 12)
    right = thresholds._bracket
    for wrong in [(10.0, 20.0), (40_000.0, 40_001.0), (7.0, 7.5)]:

        def bracket(sample, share, spread, wrong=wrong):
            return wrong if spread < 10 else right(sample, share, spread)

        monkeypatch.setattr(thresholds, "_bracket", bracket)
        for k in (0, 7, 10, 15, 20, 25_000, 40_000, 40_001, 49_999):
            assert thresholds.kth_smallest([values], k) == k


def test_infinite_scores_have_their_place():
    values = np.r_[np.full(300, -np.inf), np.arange(400.0), np.full(300, np.inf)]
    small, thresholds._SMALL = thresholds._SMALL, 100
    try:
        for k, expected in ((0, -np.inf), (299, -np.inf), (300, 0.0), (700, np.inf)):
            assert thresholds.kth_smallest([values], k) == expected
        with pytest.raises(FloatingPointError, match="NaN"):
            thresholds.kth_smallest([np.r_[values, np.nan]], 500)
    finally:
        thresholds._SMALL = small


def test_the_threshold_is_the_same_in_a_jit():
    rng = np.random.default_rng(0)
    scores = {"a": rng.normal(size=(20, 30)), "b": -np.abs(rng.normal(size=50))}
    scores = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), scores)
    inside = quick_jit(lambda s: select.threshold(s, sparsity=0.3))(scores)
    assert inside == select.threshold(scores, sparsity=0.3)


def test_the_smallest_numbers_are_not_zeros():
    tiny = np.float32(1e-45)
    scores = {"w": np.array([3 * tiny, 0.0, 2 * tiny, -tiny], np.float32)}
    for masks in (
        select.per_leaf(scores, sparsity=0.5),
        quick_jit(lambda s: select.per_leaf(s, sparsity=0.5))(scores),
    ):
        np.testing.assert_array_equal(masks["w"], [True, False, True, False])


def test_zeros_of_either_sign_are_equal():
    scores = {"w": np.array([0.0, -0.0, 0.0, -0.0], np.float32)}
    for masks in (
        select.per_leaf(scores, sparsity=0.5),
        quick_jit(lambda s: select.per_leaf(s, sparsity=0.5))(scores),
    ):
        np.testing.assert_array_equal(masks["w"], [True, True, False, False])


def test_a_leaf_of_small_scores_keeps_what_it_must_and_others_pay():
    scores = {"low": np.arange(20) * 1e-6, "high": 1.0 + np.arange(20)}
    masks = select.across_leaves(scores, sparsity=0.6)
    assert {k: int(m.sum()) for k, m in masks.items()} == {"low": 1, "high": 15}
    masks = select.across_leaves(scores, sparsity=0.4, max_sparsity={"low": 0.5})
    assert {k: int(m.sum()) for k, m in masks.items()} == {"low": 10, "high": 14}
    with pytest.raises(ValueError, match="36 of 40 entries.*leave only 34 to remove"):
        select.across_leaves(scores, sparsity=0.9, min_keep=3)


def test_a_traced_sparsity_follows_a_schedule():
    rng = np.random.default_rng(0)
    scores = {"a": rng.random((8, 9), np.float32), "b": rng.random(30, np.float32)}
    everywhere = quick_jit(lambda s: select.across_leaves(scores, sparsity=s, only="*"))
    each = quick_jit(lambda s: select.per_leaf(scores, sparsity=s, only="*"))
    for share in (0.0, 0.25, 0.8, 1.0):
        masks = everywhere(share)
        removed = sum(int((~mask).sum()) for mask in masks.values())
        assert removed == min(round(share * 102), 102 - 2)
        for name, mask in each(share).items():
            size = scores[name].size
            assert int((~mask).sum()) == min(round(share * size), size - 1)


def test_leaves_without_scores_are_left_alone():
    params = {"w": jnp.arange(6.0), "steps": jnp.array(3), "none": None}
    scores = {"w": jnp.arange(6.0), "steps": None, "none": None}
    masks = select.per_leaf(scores, sparsity=0.5)
    assert masks["steps"].shape == () and masks["steps"]
    # A leaf that is None in the parameters too has no mask to apply.
    del params["none"], masks["none"]
    np.testing.assert_array_equal(apply_masks(params, masks)["w"], [0, 0, 0, 3, 4, 5])


def test_biases_and_scales_are_left_alone_unless_asked_for():
    stacked = {"bias": np.ones((3, 4)), "scale": np.ones((3, 4))}
    scores = {"a": {"kernel": np.ones((4, 4)), "bias": np.ones(4)}, "b": stacked}
    masks = select.per_leaf(scores, sparsity=0.5)
    assert masks["a"]["kernel"].sum() == 8
    others = masks["a"]["bias"], masks["b"]["bias"], masks["b"]["scale"]
    assert all(mask.shape == () and mask for mask in others)
    masks = select.per_leaf(scores, sparsity=0.5, only="*")
    assert masks["a"]["bias"].sum() == 2 and masks["b"]["scale"].sum() == 6
    # scores of units: nothing here is a kernel
    assert select.per_leaf({"bias": np.ones(4)}, sparsity=0.5)["bias"].sum() == 2


def test_normalised_leaves_of_tiny_and_huge_weights_compete_alike():
    rng = np.random.default_rng(0)
    leaves = [rng.random((8, 8), np.float32) for _ in range(3)]
    scales = np.array([1e-25, 1, 1e20], np.float32)
    plain = dict(zip("abc", leaves, strict=True))
    scaled = {n: leaf * s for (n, leaf), s in zip(plain.items(), scales, strict=True)}
    for kind in (np.asarray, jnp.asarray):
        found = [
            select.across_leaves(jax.tree.map(kind, s), sparsity=0.4, normalize=True)
            for s in (plain, scaled)
        ]
        jax.tree.map(np.testing.assert_array_equal, *found)


def test_patterns_and_fractions_by_path():
    scores = {"a": {"kernel": np.arange(8.0), "bias": np.arange(4.0)}}
    masks = select.per_leaf(scores, sparsity=0.5, only="*/kernel")
    assert masks["a"]["bias"].shape == () and masks["a"]["kernel"].sum() == 4
    masks = select.per_leaf(scores, sparsity={"a/bias": 0.25})
    assert masks["a"]["kernel"].shape == () and masks["a"]["bias"].sum() == 3
    with pytest.raises(ValueError, match="'x' matches none of the 2 leaves: a/bias"):
        select.across_leaves(scores, sparsity=0.5, only="x")
    with pytest.raises(ValueError, match="must name leaves in full; a/bias is missing"):
        select.per_leaf(scores, sparsity={"*": 0.5})


@pytest.mark.parametrize(
    "how",
    [
        lambda s: select.per_leaf(s, sparsity=0.5, only="*"),
        lambda s: select.across_leaves(s, sparsity=0.5, only="*"),
        lambda s: select.n_of_m(s, 1, 2, axis=-1),
        lambda s: select.blocks(s, shape=(1, 2), sparsity=0.5),
        lambda s: select.threshold(s, sparsity=0.5, only="*"),
    ],
)
def test_nan_is_refused_outside_jit(how):
    scores = {"a": np.ones((2, 4)), "b": np.array([[1.0, np.nan, np.nan, 2.0]] * 2)}
    with pytest.raises(ValueError, match=r"scores\[b\] is NaN for 4 entries"):
        how(scores)


# --- patterns ------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (4, 4), (1, 1)])
@pytest.mark.parametrize("axis", [-2, 0, -1])
def test_n_of_m_keeps_the_best_of_every_run(n, m, axis):
    rng = np.random.default_rng(0)
    leaf = rng.permutation(3 * 10 * 7).reshape(3, 10, 7).astype(np.float32)
    mask = np.moveaxis(select.n_of_m({"w": leaf}, n, m, axis=axis)["w"], axis, -1)
    moved = np.moveaxis(leaf, axis, -1)
    for place in np.ndindex(mask.shape[:-1]):
        for start in range(0, mask.shape[-1], m):
            run = moved[place][start : start + m]
            best = np.sort(run)[-n:]
            np.testing.assert_array_equal(
                mask[place][start : start + m], np.isin(run, best)
            )
    inside = quick_jit(lambda s: select.n_of_m(s, n, m, axis=axis))({"w": leaf})
    np.testing.assert_array_equal(np.moveaxis(inside["w"], axis, -1), mask)


def test_n_of_m_leaves_other_leaves_alone_and_refuses_nonsense():
    scores = {"bias": np.ones(4), "kernel": np.ones((4, 1))}
    masks = select.n_of_m(scores, 2, 4, axis=-2)
    assert masks["bias"].shape == ()
    np.testing.assert_array_equal(masks["kernel"][:, 0], [True, True, False, False])
    with pytest.raises(ValueError, match=r"1 <= n <= m, got n=5 and m=4"):
        select.n_of_m(scores, 5, 4, axis=-2)


@pytest.mark.parametrize("pool", ["mean", "sum", "max"])
def test_blocks_go_whole_lowest_first(pool):
    rng = np.random.default_rng(0)
    leaf = rng.random((2, 5, 7)).astype(np.float32)
    masks = select.blocks({"w": leaf}, shape=(2, 3), sparsity=0.5, pool=pool)["w"]
    pooled, kept = [], []
    for k in range(2):
        for r in range(0, 5, 2):
            for c in range(0, 7, 3):
                place = k, slice(r, r + 2), slice(c, c + 3)
                pooled.append(getattr(leaf[place], pool)())
                assert len(np.unique(masks[place])) == 1, "a block is one piece"
                kept.append(bool(masks[place].flat[0]))
    expected = np.argsort(np.argsort(pooled)) >= round(0.5 * len(pooled))
    np.testing.assert_array_equal(kept, expected)


def test_blocks_across_leaves_and_under_jit():
    rng = np.random.default_rng(0)
    scores = {"a": rng.random((4, 6), np.float32), "b": rng.random((8, 4), np.float32)}
    options = {"shape": (2, 2), "sparsity": 0.5, "across": True}
    masks = select.blocks(scores, **options)
    blocks = sum(int((~mask).sum()) for mask in masks.values()) // 4
    assert blocks == round(0.5 * (6 + 8))
    inside = quick_jit(lambda s: select.blocks(s, **options))(scores)
    jax.tree.map(np.testing.assert_array_equal, inside, masks)
    with pytest.raises(ValueError, match=r"height and width of a block, got \(0, 2\)"):
        select.blocks(scores, shape=(0, 2), sparsity=0.5)
    with pytest.raises(ValueError, match="pool must be one of.*'median'"):
        select.blocks(scores, shape=(2, 2), sparsity=0.5, pool="median")


# --- along what a layer sums over ----------------------------------------------------


def attention(p, x):
    q = jnp.einsum("nf,fhd->nhd", x, p["q"])
    return jnp.einsum("nhd,hdf->nf", jnp.tanh(q), p["out"]) @ p["equinox"].T


ATTENTION = {"q": (8, 4, 2), "out": (4, 2, 8), "equinox": (3, 8)}


def test_runs_lie_along_the_contracted_axes_whatever_the_layout():
    rng = np.random.default_rng(0)
    scores = {name: rng.random(shape) for name, shape in ATTENTION.items()}
    axes = taps.contracted_axes(attention, scores, jnp.ones((1, 8)))
    assert axes == {"q": (0,), "out": (0, 1), "equinox": (1,)}
    masks = select.n_of_m(scores, 2, 4, axis=axes)
    # [runs, 4, outputs], heads and features of an output side by side
    runs = {
        "q": masks["q"].reshape(2, 4, 8),
        "out": masks["out"].reshape(2, 4, 8),
        "equinox": masks["equinox"].T.reshape(2, 4, 3),
    }
    for name, kept in runs.items():
        np.testing.assert_array_equal(kept.sum(1), 2, err_msg=name)
    by_hand = {"q": 0, "out": (0, 1), "equi*": -1}
    jax.tree.map(
        np.testing.assert_array_equal, select.n_of_m(scores, 2, 4, axis=by_hand), masks
    )
    with pytest.raises(ValueError, match="axis is missing: along which axis a layer"):
        select.n_of_m(scores, 2, 4)
    with pytest.raises(ValueError, match="axis names no axis of out, which only="):
        select.n_of_m(scores, 2, 4, axis={"q": 0}, only="out")


def test_contracted_axes_of_convolutions_scans_and_what_cannot_be_known():
    def conv(spec):
        return lambda p, x: jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", spec, "NHWC")
        )

    x, of = jnp.ones((1, 4, 4, 2)), taps.contracted_axes
    assert of(conv("HWIO"), {"w": jnp.ones((3, 3, 2, 5))}, x) == {"w": (0, 1, 2)}
    assert of(conv("OIHW"), {"w": jnp.ones((5, 2, 3, 3))}, x) == {"w": (2, 3, 1)}

    def layers(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    assert of(layers, {"w": jnp.ones((2, 4, 4))}, jnp.ones((1, 4))) == {"w": (1,)}

    def both_ways(p, x):
        return x @ p["w"] @ p["w"].T

    assert of(both_ways, {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))) == {}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_every_output_loses_as_many_weights(sparsity):
    scores = {"w": np.random.default_rng(0).random((3, 3, 4, 5), np.float32)}
    scores["w"][..., 0] = 1.0  # equal ones: the earlier stay
    how = {"sparsity": sparsity, "axis": {"w": (0, 1, 2)}}
    lines = select.per_output(scores, **how)["w"].reshape(36, 5)
    count = min(round(sparsity * 36), 35)
    for k in range(5):
        line = scores["w"].reshape(36, 5)[:, k]
        kept = np.sort(np.argsort(-line, kind="stable")[: 36 - count])
        np.testing.assert_array_equal(np.flatnonzero(lines[:, k]), kept)
    traced = quick_jit(lambda s: select.per_output(s, **how))(scores)["w"]
    np.testing.assert_array_equal(traced.reshape(36, 5), lines)


def test_together_too_kernels_go_and_what_has_no_score_is_named():
    scores = {"w": np.ones((2, 4)), "b": np.zeros(4), "key": jax.random.key(0)}
    masks = select.across_leaves(scores, sparsity=0.5)
    assert masks["w"].sum() == 4 and masks["b"].shape == masks["key"].shape == ()
    assert select.threshold(scores, sparsity=0.5) == 1
    for leaf, cause in (
        (jax.random.key(0), "a random key"),
        (jax.nn.relu, "not an array"),
        (jax.ShapeDtypeStruct((2, 2), np.float32), "a shape without values"),
    ):
        for how in (select.across_leaves, select.per_leaf, select.threshold):
            with pytest.raises(TypeError, match=rf"scores\[x\] is .*{cause}"):
                how({"x": leaf}, sparsity=0.5, only="*")


def test_a_kernel_without_an_axis_is_not_left_alone_silently():
    scores = {"w": np.ones((4, 4)), "tied": np.ones((4, 4)), "b": np.ones(4)}
    with pytest.raises(ValueError, match="names no axis of the kernel tied"):
        select.n_of_m(scores, 2, 4, axis={"w": 0})
    masks = select.n_of_m(scores, 2, 4, axis={"w": 0, "tied": ()})
    assert masks["w"].sum() == 8 and masks["tied"].shape == ()
