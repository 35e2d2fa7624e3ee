"""Nets that label pixels: against numpy loops, published sizes and the contract."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_same, halve

import jaxprune
from jaxprune import recipes
from jaxprune.models import FCN, MODELS, SegNet
from jaxprune.models import _segmentation as segmentation

pytestmark = pytest.mark.once

SMALL = {
    "segnet": SegNet(3, stages=((4, 5), (6,))),
    "fcn": FCN(
        3, ("M", 4, "M", 6), head_widths=(5, 4), head_window=3, skips=1, batch_norm=True
    ),
}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12, 3)), jnp.float32)


def drawn(net, seed=0):
    """Variables of which no leaf is neutral by accident."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), IMAGES)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.float32(rng.uniform(0.2, 0.8, s.shape)), shapes)


def signed(variables, seed=1):
    """Kernels of either sign, so that ReLU and pooling have something to choose."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x * jnp.float32(rng.choice([-1, 1], x.shape)) if x.ndim == 4 else x,
        variables,
    )


def test_unpooling_puts_values_where_the_maxima_were():
    rng = np.random.default_rng(2)
    x = rng.integers(0, 4, (2, 4, 6, 3)).astype(np.float32)  # many ties
    small = rng.normal(size=(2, 2, 3, 3)).astype(np.float32)
    expected = np.zeros_like(x)
    for n, i, j, c in itertools.product(*map(range, small.shape)):
        window = x[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        row, column = divmod(int(window.argmax()), 2)  # the first, row by row
        expected[n, 2 * i + row, 2 * j + column, c] = small[n, i, j, c]
    places = segmentation.where_largest(jnp.asarray(x))
    np.testing.assert_array_equal(segmentation.unpool(small, places), expected)


def test_segnet_has_the_layers_of_the_paper():
    """3x3 convolutions with bias; all but the last with BatchNorm's two vectors."""
    encoder = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    widths = [3, *encoder, *encoder[::-1][1:], 64]
    pairs = list(itertools.pairwise(widths))
    assert len(pairs) == 26
    expected = sum(9 * a * b + 3 * b for a, b in pairs[:-1]) + 9 * 64 * 12 + 12
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(MODELS["segnet"]().init, jax.random.key(0), images)
    assert sum(s.size for s in jax.tree.leaves(shapes["params"])) == expected


def test_fcn_holds_the_published_share_in_its_dense_layers():
    """87.8 %, counted with the upsampling kernel, which is fixed here (1801.07365)."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(MODELS["fcn32s"]().init, jax.random.key(0), images)
    sizes = {n: sum(s.size for s in d.values()) for n, d in params["params"].items()}
    share = (sizes["dense1"] + sizes["dense2"]) / (sum(sizes.values()) + 64**2 * 21**2)
    assert round(100 * share, 1) == 87.8


@pytest.mark.parametrize("name", SMALL)
def test_half_of_every_group_can_be_cut(name):
    net, variables = SMALL[name], signed(drawn(SMALL[name]))
    groups = jaxprune.trace(net.apply, variables, IMAGES)
    masks = jaxprune.expand_masks(groups, halve(groups, 0))
    small = jaxprune.slice_params(variables, masks)
    out = jaxprune.narrow(net.apply, masks)(small, IMAGES)
    assert out.shape == (2, 8, 12, 3)
    assert_same(out, net.apply(jaxprune.apply_masks(variables, masks), IMAGES))


def test_a_pruned_segnet_has_a_hand_built_twin():
    net = SMALL["segnet"]
    variables = drawn(net)
    groups = jaxprune.trace(net.apply, variables, IMAGES)
    assert len(groups) == 4  # what is unpooled has the units of the pooled
    masks = jaxprune.expand_masks(groups, halve(groups, 1))
    small = jaxprune.slice_params(variables, masks)
    width = {k: v["kernel"].shape[3] for k, v in small["params"].items() if "conv" in k}
    stages = ((width["encoder1_conv1"], width["encoder1_conv2"]),)
    stages += ((width["encoder2_conv1"],),)
    decoder = ((width["decoder2_conv1"],), (width["decoder1_conv1"],))
    twin = SegNet(3, stages, decoder)
    narrow = jaxprune.narrow(net.apply, masks)
    assert_same(twin.apply(small, IMAGES), narrow(small, IMAGES))


def test_scores_of_earlier_poolings_begin_at_0():
    net = SMALL["fcn"]
    params = net.init(jax.random.key(0), IMAGES)["params"]
    assert not params["skip1"]["kernel"].any()


def test_an_agent_finds_what_a_segmentation_net_does_without():
    net = SegNet(3, stages=((4,), (6,)))
    variables = signed(drawn(net, 3), 4)
    deep = "params/encoder2_conv1/kernel:3"
    reads = variables["params"]["decoder2_conv1"]
    reads["kernel"] = reads["kernel"].at[:, :, :3].set(0.0)
    truth = net.apply(variables, IMAGES).argmax(-1)

    def accuracy(variables, images):  # of pixels, in points
        return 100 * (net.apply(variables, images).argmax(-1) == truth).mean()

    groups = jaxprune.trace(net.apply, variables, IMAGES, roles=True)
    found = recipes.learn_keep(
        groups, variables, accuracy, [IMAGES], only=deep, drop_bound=5.0,
        updates=100, advantage="leave_one_out",
    )  # fmt: skip
    assert found.keep[deep][3:].all() and found.keep[deep][:3].sum() <= 1
    assert round(found.metric, 3) == 100


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: SegNet(stages=((4, 0),)), r"stages\[0\]\[1\] must be a positive int"),
        (
            lambda: SegNet(stages=((4,), (6,)), decoder=((5,), (4,))),
            r"decoder\[0\] must end with the 4 filters of the encoder's stage above it",
        ),
        (lambda: SegNet(stages=((4,), (6,)), decoder=((4,),)), "decoder must have a"),
        (
            lambda: FCN(widths=(4, "M"), skips=1),
            "below the 1 poolings of widths, got 1",
        ),
        (
            lambda: SMALL["segnet"].init(jax.random.key(0), IMAGES[:, :6]),
            "2 poolings need images whose sides are divisible by 4, got 6x12",
        ),
    ],
)
def test_mistakes_say_what_is_wrong(build, text):
    with pytest.raises(ValueError, match=text):
        build()
