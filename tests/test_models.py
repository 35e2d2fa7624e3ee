"""Reference models against published sizes, numpy loops and hand-cut twins.

Big nets are only traced (`jax.eval_shape`); strict promotion fails while tracing too.
"""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy import special

from jaxprune.models import (
    MODELS,
    VGG,
    LeNet5,
    LeNet300,
    MobileNetV1,
    MobileNetV2,
    ResNet,
    TargetedDropout,
    ViT,
    WideResNet,
    cifar_resnet,
    cifar_vgg,
    imagenet_resnet,
    imagenet_vgg,
    vgg_widths,
    wide_resnet,
)
from jaxprune.models._layers import conv, glorot_relu
from jaxprune.models._vit import SelfAttention

pytestmark = pytest.mark.once

CIFAR, IMAGENET, MNIST, DIGITS = (32, 32, 3), (224, 224, 3), (28, 28, 1), (8, 8, 1)

# Inputs and parameter counts. The ImageNet numbers are those of the published weights
# (torchvision, timm); the others follow from the tables of the papers by hand below.
PUBLISHED = {
    "lenet300": (MNIST, 266_610),
    "lenet5": (MNIST, 431_080),
    "vgg11_bn": (CIFAR, 9_231_114),
    "vgg13_bn": (CIFAR, 9_416_010),
    "vgg16_bn": (CIFAR, 14_728_266),
    "vgg19_bn": (CIFAR, 20_040_522),
    "vgg16_bn_imagenet": (IMAGENET, 138_365_992),
    "vgg19_bn_imagenet": (IMAGENET, 143_678_248),
    "vgg_digits": (DIGITS, 72_890),
    "resnet20": (CIFAR, 269_722),
    "resnet32": (CIFAR, 464_154),
    "resnet56": (CIFAR, 853_018),
    "resnet110": (CIFAR, 1_727_962),
    "resnet_digits": (DIGITS, 77_754),
    "resnet18": (IMAGENET, 11_689_512),
    "resnet34": (IMAGENET, 21_797_672),
    "resnet50": (IMAGENET, 25_557_032),
    "wrn28_10": (CIFAR, 36_479_194),
    "bridgeout_vgg16": (CIFAR, 14_728_266),
    "bridgeout_resnet28": (CIFAR, 514_218),
    "bridgeout_wrn28_10": (CIFAR, 36_489_290),
    "mobilenet_v1": (IMAGENET, 4_231_976),
    "mobilenet_v2": (IMAGENET, 3_504_872),
    "segnet": (CIFAR, 29_449_932),  # by hand in test_segmentation, with the nets below
    "fcn32s": (CIFAR, 134_346_581),
    "fcn8s": (CIFAR, 134_346_581 + (512 + 256 + 2) * 21),
    "segnet_scenes": (CIFAR, 37_380),
    "vit_b16": (IMAGENET, 86_567_656),
    "vit_tiny": (IMAGENET, 5_717_416),
}

# One small net of each family on 8x8 (LeNet-5: 16x16) images with 2 channels.
SMALL = {
    "lenet300": LeNet300(3, widths=(6, 5)),
    "lenet5": LeNet5(3, widths=(3, 4), head_widths=(5,)),
    "vgg": VGG(3, widths=(6, "M", 8), head_widths=(5,), pool="flatten"),
    "resnet": ResNet((1, 1), (4, 6), 3),
    "bottleneck": ResNet((1, 1), (16, 24), 3, bottleneck=True, stem="imagenet"),
    "wrn": WideResNet((1, 1), (4, 6), 3, stem_width=4),
    "mobilenet_v1": MobileNetV1(3, widths=(4, 6), strides=(1, 2), stem_width=4),
    "mobilenet_v2": MobileNetV2(
        3, (1, 2), (4, 6), (1, 2), (1, 2), stem_width=4, head_width=8
    ),
    "vit": ViT(3, patch_size=4, width=8, depth=2, num_heads=2, head_dim=4, mlp_width=6),
}
WITH_BATCH_NORM = [name for name in SMALL if name not in ("lenet300", "lenet5", "vit")]


@cache
def shapes_of(model, shape, dtype=jnp.float32):
    images = jax.ShapeDtypeStruct((1, *shape), dtype)
    return jax.eval_shape(model.init, jax.random.key(0), images), images


def count(model, shape):
    variables, _ = shapes_of(model, shape)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def images_for(name, batch=4):
    side = 16 if name == "lenet5" else 8
    images = np.random.default_rng(1).normal(size=(batch, side, side, 2))
    return jnp.asarray(images, jnp.float32)


def random_variables(model, images, seed=0):
    """Draws every leaf, BatchNorm's too, so that no unit is neutral by accident."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            fan_in = max(1, leaf.size // leaf.shape[-1]) if name == "kernel" else 4
            values = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        return jnp.asarray(values, leaf.dtype)

    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.tree_util.tree_map_with_path(draw, variables)


@partial(jax.jit, static_argnums=0)
def evaluate(model, variables, images):
    return model.apply(variables, images)


def train_step(model, variables, images, seed=0):
    """Logits in train mode and the new BatchNorm statistics."""
    rngs = {"dropout": jax.random.key(seed)}
    apply = partial(model.apply, train=True, rngs=rngs, mutable=["batch_stats"])
    logits, mutated = jax.jit(apply)(variables, images)
    return logits, mutated.get("batch_stats", {})


def intermediates(model, variables, images):
    """Outputs of every submodule in eval mode, by path; the net's own as "logits"."""
    apply = partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    _, captured = jax.jit(apply)(variables, images)
    flat = flatten_dict(captured["intermediates"], sep="/")
    return {
        path.removesuffix("/__call__").replace("__call__", "logits"): np.asarray(
            value[0]
        )
        for path, value in flat.items()
    }


def replaced(variables, **leaves):
    """Sets leaves of the parameters to a constant; `__` in a name stands for `/`."""
    flat = flatten_dict(variables["params"], sep="/")
    for name, constant in leaves.items():
        path = name.replace("__", "/")
        flat[path] = jnp.full_like(flat[path], constant)
    return {**variables, "params": unflatten_dict(flat, sep="/")}


def relu(x):
    return np.maximum(x, 0)


def numpy_batch_norm(x, variables, path):
    params = flatten_dict(variables["params"], sep="/")
    stats = flatten_dict(variables["batch_stats"], sep="/")
    scale = params[f"{path}/scale"] / np.sqrt(stats[f"{path}/var"] + 1e-5)
    shifted = x - np.asarray(stats[f"{path}/mean"])
    return shifted * np.asarray(scale) + np.asarray(params[f"{path}/bias"])


# ---------------------------------------------------------------- parameter counts


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_the_published_ones(name):
    shape, expected = PUBLISHED[name]
    assert count(MODELS[name](), shape) == expected


def basic_resnet_count(blocks, bias, projection):
    """Parameters of a CIFAR ResNet of widths 16, 32, 64, counted layer by layer."""
    images = 3
    total = images * 9 * 16 + 2 * 16 + bias * 16
    channels = 16
    for width, size in zip((16, 32, 64), blocks, strict=True):
        for _ in range(size):
            total += 9 * channels * width + 9 * width * width
            total += 2 * (2 * width + bias * width)
            if projection and channels != width:
                total += channels * width + 2 * width + bias * width
            channels = width
    return total + 64 * 10 + 10


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (MODELS["resnet56"](), basic_resnet_count((9, 9, 9), 0, False)),
        (MODELS["resnet56"](shortcut="projection"), basic_resnet_count((9,) * 3, 0, 1)),
        (MODELS["bridgeout_resnet28"](), basic_resnet_count((3, 4, 6), 1, True)),
    ],
)
def test_resnet_counts_follow_from_the_layer_table(model, expected):
    assert count(model, CIFAR) == expected


def test_vgg_count_follows_from_the_layer_table():
    widths = [16, 16, 32, 32, 64, 64]
    expected = sum(
        9 * before * after + 3 * after
        for before, after in zip([1, *widths], widths, strict=False)
    )
    assert count(MODELS["vgg_digits"](), DIGITS) == expected + 64 * 10 + 10


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (imagenet_vgg(16, batch_norm=False), IMAGENET, 138_357_544),
        (imagenet_resnet(101), IMAGENET, 44_549_160),
        (wide_resnet(16, 8), CIFAR, 10_961_370),
        (wide_resnet(40, 4), CIFAR, 8_949_210),
        (MobileNetV2(width_multiplier=0.5), IMAGENET, 1_968_680),
        (ViT(width_multiplier=0.5), IMAGENET, 22_050_664),  # ViT-S/16
    ],
)
def test_other_sizes_of_a_family_match_published_counts(model, shape, expected):
    assert count(model, shape) == expected


@pytest.mark.parametrize(
    ("multiplier", "millions"), [(0.25, 0.5), (0.5, 1.3), (0.75, 2.6)]
)
def test_mobilenet_v1_multipliers_match_the_paper(multiplier, millions):
    model = MobileNetV1(width_multiplier=multiplier)
    assert round(count(model, IMAGENET) / 1e6, 1) == millions


# ---------------------------------------------------------- shapes, dtypes, contract


@pytest.mark.parametrize("name", MODELS)
def test_every_constructor_takes_the_common_fields(name):
    fields = {"num_classes": 7, "dropout_rate": 0.5, "dtype": jnp.bfloat16}
    model = MODELS[name](**fields)
    assert {field: getattr(model, field) for field in fields} == fields


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_logits_have_the_compute_dtype_and_variables_are_float32(name, dtype):
    model = SMALL[name].clone(dtype=dtype, num_classes=7, dropout_rate=0.5)
    if hasattr(model, "dropout_target"):
        model = model.clone(dropout_target=0.5)
    images = images_for(name)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.eval_shape(model.apply, variables, images)
    assert (logits.shape, logits.dtype) == ((4, 7), dtype)

    rngs = {"dropout": jax.random.key(0)}
    apply = partial(model.apply, train=True, rngs=rngs, mutable=["batch_stats"])
    logits, mutated = jax.eval_shape(apply, variables, images)
    assert (logits.shape, logits.dtype) == ((4, 7), dtype)
    assert mutated.get("batch_stats") == variables.get("batch_stats")


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16])
@pytest.mark.parametrize("name", ["lenet300", "vgg", "vit"])
def test_images_of_any_type_are_cast(name, dtype):
    model = SMALL[name]
    variables, images = shapes_of(model, (8, 8, 2), dtype=dtype)
    assert jax.eval_shape(model.apply, variables, images).dtype == jnp.float32


@pytest.mark.parametrize("name", ["vgg", "vit"])
def test_bfloat16_logits_are_near_float32_logits(name):
    images = images_for(name)
    variables = random_variables(SMALL[name], images)
    exact = evaluate(SMALL[name], variables, images)
    low = evaluate(SMALL[name].clone(dtype=jnp.bfloat16), variables, images)
    error = np.abs(np.asarray(low, np.float32) - exact).max()
    assert 0 < error < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("name", SMALL)
def test_eval_ignores_dropout_and_reads_each_example_alone(name):
    images = images_for(name)
    variables = random_variables(SMALL[name], images)
    dropping = SMALL[name].clone(dropout_rate=0.9)
    trace = jax.make_jaxpr(SMALL[name].apply)(variables, images)
    assert str(jax.make_jaxpr(dropping.apply)(variables, images)) == str(trace)
    logits = evaluate(SMALL[name], variables, images)
    backwards = evaluate(SMALL[name], variables, images[::-1])
    np.testing.assert_allclose(backwards[::-1], logits, rtol=1e-4, atol=1e-5)
    assert np.ptp(np.asarray(logits), axis=0).min() > 1e-3


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_train_mode_moves_every_statistic_by_the_momentum(name):
    images = images_for(name)
    variables = random_variables(SMALL[name], images)
    old = variables["batch_stats"]

    @jax.jit
    def new_statistics(variables):
        nets = SMALL[name], SMALL[name].clone(bn_momentum=0.0)
        apply = (
            partial(net.apply, train=True, mutable=["batch_stats"]) for net in nets
        )
        return [step(variables, images)[1]["batch_stats"] for step in apply]

    new, batch = new_statistics(variables)
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, old, batch)
    check = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(check, new, expected)
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(batch), strict=True):
        assert np.all(np.asarray(before) != np.asarray(after))


def test_batch_statistics_are_those_of_the_layer_before():
    images = images_for("vgg")
    variables = random_variables(SMALL["vgg"], images)
    before = intermediates(SMALL["vgg"], variables, images)["conv1"]
    _, stats = train_step(SMALL["vgg"].clone(bn_momentum=0.0), variables, images)
    mean, var = before.mean((0, 1, 2)), before.var((0, 1, 2))
    np.testing.assert_allclose(stats["bn1"]["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["bn1"]["var"], var, rtol=1e-4)


def test_submodules_have_the_documented_names():
    expected = {
        "vgg": {"conv1", "bn1", "conv2", "bn2", "dense1", "head"},
        "resnet": {"conv1", "bn1", "block0_0", "block1_0", "head"},
        "wrn": {"conv1", "block0_0", "block1_0", "bn1", "head"},
        "vit": {"patch_embed", "cls_token", "pos_embed", "block0", "block1", "norm"}
        | {"head"},
    }
    for name, names in expected.items():
        variables, _ = shapes_of(SMALL[name], (8, 8, 2))
        assert set(variables["params"]) == names
    block = shapes_of(SMALL["resnet"], (8, 8, 2))[0]["params"]["block1_0"]
    shortcut = {"shortcut_conv", "shortcut_bn"}
    assert set(block) == {"conv1", "bn1", "conv2", "bn2"} | shortcut


# -------------------------------------------------------------- widths and depths


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_depth_counts_the_layers_with_weights(depth):
    widths = vgg_widths(depth)
    assert sum(width != "M" for width in widths) + 3 == depth
    assert widths.count("M") == 5


@pytest.mark.parametrize(
    ("model", "depth", "per_block"),
    [
        (cifar_resnet(32), 32, 2),
        (cifar_resnet(110), 110, 2),
        (imagenet_resnet(34), 34, 2),
        (imagenet_resnet(50), 50, 3),
        (imagenet_resnet(152), 152, 3),
        (MODELS["bridgeout_resnet28"](), 28, 2),
    ],
)
def test_resnet_depth_counts_the_layers_with_weights(model, depth, per_block):
    assert 2 + per_block * sum(model.stage_sizes) == depth


def test_explicit_widths_appear_in_the_kernels():
    model = VGG(widths=(45, 64, "M", 7), num_classes=3)
    params = shapes_of(model, (8, 8, 1))[0]["params"]
    assert params["conv1"]["kernel"].shape == (3, 3, 1, 45)
    assert params["conv3"]["kernel"].shape == (3, 3, 64, 7)
    assert params["head"]["kernel"].shape == (7, 3)


def test_width_multiplier_rounds_half_up_and_leaves_classes():
    model = VGG(widths=(5, "M", 6), num_classes=10, width_multiplier=0.5)
    params = shapes_of(model, (8, 8, 1))[0]["params"]
    assert params["conv1"]["kernel"].shape[-1] == 3
    assert params["head"]["kernel"].shape == (3, 10)


def test_mobilenet_v2_multiplier_rounds_to_eights_but_not_below_nine_tenths():
    model = MobileNetV2(width_multiplier=0.75)
    params = shapes_of(model, (32, 32, 3))[0]["params"]
    widths = [
        params[f"block{stage}_0"]["project"]["kernel"].shape[-1] for stage in (0, 1, 2)
    ]
    assert widths == [16, 24, 24]  # 12 -> 8 would lose a third; 18 -> 16 is too low
    assert params["head"]["kernel"].shape[0] == 1280


def cut(variables, cuts):
    """Keeps indices of some axes: `{path: {axis: indices}}`, paths from the root."""
    flat = flatten_dict(variables, sep="/")
    for path, axes in cuts.items():
        for axis, indices in axes.items():
            flat[path] = jnp.take(flat[path], np.asarray(indices), axis=axis)
    return unflatten_dict(flat, sep="/")


def silence(variables, cuts):
    """Zeroes, in `params` only, what `cut` would remove."""
    flat = flatten_dict(variables, sep="/")
    for path, axes in cuts.items():
        for axis, indices in axes.items():
            if path.startswith("params/"):
                kept = np.zeros(flat[path].shape[axis], bool)
                kept[np.asarray(indices)] = True
                index = [np.newaxis] * flat[path].ndim
                index[axis] = slice(None)
                flat[path] = jnp.where(kept[tuple(index)], flat[path], 0.0)
    return unflatten_dict(flat, sep="/")


def filters(module, bn, *consumers, keep, depthwise=None):
    """Cuts of one conv's filters, its BatchNorm, and the axes that read them."""
    cuts = {f"params/{module}/kernel": {3: keep}}
    norms = [bn]
    if depthwise is not None:
        conv_path, depthwise_bn = depthwise
        cuts[f"params/{conv_path}/kernel"] = {3: keep}
        norms.append(depthwise_bn)
    for norm in norms:
        cuts |= {f"params/{norm}/{leaf}": {0: keep} for leaf in ("scale", "bias")}
        cuts |= {f"batch_stats/{norm}/{leaf}": {0: keep} for leaf in ("mean", "var")}
    return cuts | {f"params/{path}/kernel": {2: keep} for path in consumers}


def attention(block, heads, query_dims, value_dims, units):
    """Cuts of one encoder block: heads, query/key and value channels, MLP units."""
    prefix = f"params/{block}/attention"
    cuts = {}
    for name, dims in (
        ("query", query_dims),
        ("key", query_dims),
        ("value", value_dims),
    ):
        cuts[f"{prefix}/{name}/kernel"] = {1: heads, 2: dims}
        cuts[f"{prefix}/{name}/bias"] = {0: heads, 1: dims}
    cuts[f"{prefix}/out/kernel"] = {0: heads, 1: value_dims}
    cuts[f"params/{block}/mlp1/kernel"] = {1: units}
    cuts[f"params/{block}/mlp1/bias"] = {0: units}
    cuts[f"params/{block}/mlp2/kernel"] = {0: units}
    return cuts


VGG_CUT = filters("conv1", "bn1", "conv2", keep=[0, 2, 5]) | {
    "params/conv1/bias": {0: [0, 2, 5]}
}
TWINS = {
    "lenet300": (
        LeNet300(3, widths=(6, 2)),
        {
            "params/dense2/kernel": {1: [1, 4]},
            "params/dense2/bias": {0: [1, 4]},
            "params/head/kernel": {0: [1, 4]},
        },
    ),
    "lenet5": (
        LeNet5(3, widths=(2, 4), head_widths=(5,)),
        {
            "params/conv1/kernel": {3: [0, 2]},
            "params/conv1/bias": {0: [0, 2]},
            "params/conv2/kernel": {2: [0, 2]},
        },
    ),
    "vgg": (SMALL["vgg"].clone(widths=(3, "M", 8)), VGG_CUT),
    "resnet": (
        SMALL["resnet"].clone(inner_widths=(2, 5)),
        filters("block0_0/conv1", "block0_0/bn1", "block0_0/conv2", keep=[1, 3])
        | filters(
            "block1_0/conv1", "block1_0/bn1", "block1_0/conv2", keep=[0, 1, 2, 4, 5]
        ),
    ),
    "bottleneck": (
        SMALL["bottleneck"].clone(inner_widths=((3, 4), (4, 6))),
        filters("block0_0/conv1", "block0_0/bn1", "block0_0/conv2", keep=[0, 1, 3])
        | filters(
            "block1_0/conv1", "block1_0/bn1", "block1_0/conv2", keep=[0, 1, 4, 5]
        ),
    ),
    "wrn": (
        SMALL["wrn"].clone(inner_widths=(3, 2)),
        filters("block0_0/conv1", "block0_0/bn2", "block0_0/conv2", keep=[0, 1, 3])
        | filters("block1_0/conv1", "block1_0/bn2", "block1_0/conv2", keep=[2, 5]),
    ),
    "mobilenet_v1": (
        SMALL["mobilenet_v1"].clone(widths=(3, 6)),
        filters(
            "block0/pointwise",
            "block0/bn2",
            "block1/pointwise",
            keep=[0, 2, 3],
            depthwise=("block1/depthwise", "block1/bn1"),
        ),
    ),
    "mobilenet_v2": (
        SMALL["mobilenet_v2"].clone(inner_widths=(4, 3, 12)),
        filters(
            "block1_0/expand",
            "block1_0/bn1",
            "block1_0/project",
            keep=[1, 4, 6],
            depthwise=("block1_0/depthwise", "block1_0/bn2"),
        ),
    ),
    "vit": (
        SMALL["vit"].clone(
            num_heads=(1, 2),
            head_dim=(3, 4),
            value_dim=(2, 4),
            mlp_width=(4, 6),
            attention_scale=4**-0.5,
        ),
        attention("block0", [1], [0, 2, 3], [1, 3], [0, 1, 3, 5]),
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_net_built_with_the_smaller_widths_equals_the_masked_net(name):
    small, cuts = TWINS[name]
    images = images_for(name)
    variables = random_variables(SMALL[name], images)
    masked = evaluate(SMALL[name], silence(variables, cuts), images)
    logits = evaluate(small, cut(variables, cuts), images)
    np.testing.assert_allclose(logits, masked, rtol=1e-4, atol=1e-5)
    whole = evaluate(SMALL[name], variables, images)
    assert np.abs(whole - masked).max() > 1e-3


# ------------------------------------------------------------------ layers, shortcuts


def numpy_conv(x, kernel, stride=1):
    """Square convolution padded on both sides, tap by tap; depthwise if HW1O."""
    size = kernel.shape[0]
    pad = size // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = (x.shape[1] - size) // stride + 1
    columns = (x.shape[2] - size) // stride + 1
    total = np.zeros((x.shape[0], rows, columns, kernel.shape[-1]))
    for row in range(size):
        for column in range(size):
            taps = x[:, row::stride, column::stride][:, :rows, :columns]
            if kernel.shape[2] == 1 != x.shape[-1]:
                total += taps * np.asarray(kernel[row, column, 0])
            else:
                total += np.einsum("nhwi,io->nhwo", taps, kernel[row, column])
    return total


def numpy_pool(x):
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def forward(name):
    """Outputs of all submodules, the parameters by path, and a BatchNorm by path."""
    images = images_for(name)
    variables = random_variables(SMALL[name], images)
    outputs = intermediates(SMALL[name], variables, images)
    flat = flatten_dict(variables["params"], sep="/")
    params = {path: np.asarray(leaf) for path, leaf in flat.items()}

    def norm(x, path):
        return numpy_batch_norm(x, variables, path)

    return np.asarray(images), outputs, params, norm


def dense(x, params, name):
    return x @ params[f"{name}/kernel"] + params[f"{name}/bias"]


near = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_pads_both_sides(stride):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 6, 6, 2)), rng.normal(size=(3, 3, 2, 3))
    variables = {"params": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    layer = conv(3, 3, stride=stride, use_bias=False)
    actual = layer.apply(variables, jnp.asarray(x, jnp.float32))
    near(actual, numpy_conv(x, kernel, stride))


def test_lenets_follow_the_layer_table():
    x, out, params, _ = forward("lenet300")
    x = x.reshape(len(x), -1)
    for name in ("dense1", "dense2"):
        x = relu(dense(x, params, name))
    near(out["logits"], dense(x, params, "head"))

    x, out, params, _ = forward("lenet5")
    assert out["conv1"].shape == (4, 12, 12, 3)
    assert out["conv2"].shape == (4, 2, 2, 4)
    x = numpy_pool(out["conv2"]).reshape(4, -1)
    near(out["logits"], dense(relu(dense(x, params, "dense1")), params, "head"))


def test_vgg_follows_the_layer_table():
    x, out, params, norm = forward("vgg")
    near(out["conv1"], numpy_conv(x, params["conv1/kernel"]) + params["conv1/bias"])
    x = numpy_pool(relu(norm(out["conv1"], "bn1")))
    near(out["conv2"], numpy_conv(x, params["conv2/kernel"]) + params["conv2/bias"])
    x = relu(norm(out["conv2"], "bn2")).reshape(4, -1)
    near(out["logits"], dense(relu(dense(x, params, "dense1")), params, "head"))


def test_residual_blocks_follow_the_paper():
    _, out, params, norm = forward("resnet")
    x, block = out["block0_0"], "block1_0"
    near(out[f"{block}/conv1"], numpy_conv(x, params[f"{block}/conv1/kernel"], 2))
    y = relu(norm(out[f"{block}/conv1"], f"{block}/bn1"))
    near(out[f"{block}/conv2"], numpy_conv(y, params[f"{block}/conv2/kernel"]))
    y = norm(out[f"{block}/conv2"], f"{block}/bn2")
    near(out[block], relu(y + out[f"{block}/shortcut_bn"]))
    near(out["logits"], dense(out[block].mean((1, 2)), params, "head"))

    _, out, params, norm = forward("bottleneck")
    x = out["block0_0"]
    for index, stride in ((1, 1), (2, 2), (3, 1)):
        kernel = params[f"{block}/conv{index}/kernel"]
        near(out[f"{block}/conv{index}"], numpy_conv(x, kernel, stride))
        x = relu(norm(out[f"{block}/conv{index}"], f"{block}/bn{index}"))


def test_imagenet_stem_follows_the_paper():
    x, out, params, norm = forward("bottleneck")
    near(out["conv1"], numpy_conv(x, params["conv1/kernel"], 2))
    x = np.pad(relu(norm(out["conv1"], "bn1")), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [x[:, r : r + 4 : 2, c : c + 4 : 2] for r in range(3) for c in range(3)]
    pooled = np.max(windows, axis=0)
    kernel = params["block0_0/conv1/kernel"]
    near(out["block0_0/conv1"], numpy_conv(pooled, kernel))


def test_wide_blocks_are_pre_activated():
    _, out, params, norm = forward("wrn")
    x, block = out["block0_0"], "block1_0"
    y = relu(norm(x, f"{block}/bn1"))
    near(out[f"{block}/conv1"], numpy_conv(y, params[f"{block}/conv1/kernel"], 2))
    y = relu(norm(out[f"{block}/conv1"], f"{block}/bn2"))
    near(out[f"{block}/conv2"], numpy_conv(y, params[f"{block}/conv2/kernel"]))
    near(out[block], out[f"{block}/conv2"] + out[f"{block}/shortcut_conv"])
    y = relu(norm(out[block], "bn1")).mean((1, 2))
    near(out["logits"], dense(y, params, "head"))


def test_mobilenet_blocks_follow_the_papers():
    _, out, params, norm = forward("mobilenet_v1")
    kernel = params["block1/depthwise/kernel"]
    near(out["block1/depthwise"], numpy_conv(out["block0"], kernel, 2))
    y = relu(norm(out["block1/depthwise"], "block1/bn1"))
    near(out["block1/pointwise"], numpy_conv(y, params["block1/pointwise/kernel"]))
    near(out["block1"], relu(norm(out["block1/pointwise"], "block1/bn2")))

    _, out, params, norm = forward("mobilenet_v2")
    block, kinds = "block1_0", (("expand", 1), ("depthwise", 2), ("project", 1))
    y = out["block0_0"]
    for index, (kind, stride) in enumerate(kinds, 1):
        kernel = params[f"{block}/{kind}/kernel"]
        near(out[f"{block}/{kind}"], numpy_conv(y, kernel, stride))
        linear = norm(out[f"{block}/{kind}"], f"{block}/bn{index}")
        y = relu(linear)  # ReLU6's cap has a test of its own
    near(out[block], linear)


def test_mobilenet_v2_caps_activations_at_six():
    images = images_for("mobilenet_v2")
    variables = random_variables(SMALL["mobilenet_v2"], images)
    variables = replaced(variables, bn2__scale=0, bn2__bias=50)
    out = intermediates(SMALL["mobilenet_v2"], variables, images)
    kernel = np.asarray(variables["params"]["head"]["kernel"])
    expected = 6 * kernel.sum(0) + np.asarray(variables["params"]["head"]["bias"])
    near(out["logits"], np.broadcast_to(expected, (4, 3)))


def test_glorot_relu_is_the_uniform_law_of_batch_bridgeout(key):
    kernel = np.asarray(glorot_relu(key, (3, 3, 16, 48), jnp.float32))
    bound = np.sqrt(2) * np.sqrt(6 / (9 * 16 + 9 * 48))
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    assert abs(kernel.std() / (bound / np.sqrt(3)) - 1) < 0.03


@pytest.mark.parametrize("shortcut", ["projection", "zero_pad"])
def test_a_silent_block_shows_its_widening_shortcut(shortcut):
    model = ResNet((1,), (7,), 3, strides=(2,), stem_width=4, shortcut=shortcut)
    images = images_for("resnet")
    variables = random_variables(model, images)
    variables = replaced(variables, block0_0__bn2__scale=0, block0_0__bn2__bias=0)
    outputs = intermediates(model, variables, images)
    stream = relu(outputs["bn1"])[:, ::2, ::2]
    if shortcut == "zero_pad":
        expected = np.zeros((*stream.shape[:3], 7))
        expected[..., 1:5] = stream
        assert "shortcut_conv" not in variables["params"]["block0_0"]
    else:
        kernel = variables["params"]["block0_0"]["shortcut_conv"]["kernel"][0, 0]
        linear = np.einsum("nhwi,io->nhwo", stream, kernel)
        expected = relu(numpy_batch_norm(linear, variables, "block0_0/shortcut_bn"))
    np.testing.assert_allclose(outputs["block0_0"], expected, rtol=1e-4, atol=1e-5)


def test_a_silent_block_of_one_shape_is_the_identity():
    model = ResNet((2,), (4,), 3, shortcut="identity")
    images = images_for("resnet")
    variables = random_variables(model, images)
    for block in ("block0_0", "block0_1"):
        silent = {f"{block}__bn2__scale": 0, f"{block}__bn2__bias": 0}
        variables = replaced(variables, **silent)
    outputs = intermediates(model, variables, images)
    # Equal, but for the rounding of two programs that XLA fuses differently.
    np.testing.assert_allclose(
        outputs["block0_1"], relu(outputs["bn1"]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("source", ["activation", "input"])
def test_wide_block_feeds_its_shortcut_from_the_chosen_place(source):
    model = WideResNet((1,), (6,), 3, stem_width=4, shortcut_from=source)
    images = images_for("wrn")
    variables = random_variables(model, images)
    variables = replaced(variables, block0_0__conv2__kernel=0)
    outputs = intermediates(model, variables, images)
    fed = outputs["conv1"]
    if source == "activation":
        fed = relu(numpy_batch_norm(fed, variables, "block0_0/bn1"))
    kernel = variables["params"]["block0_0"]["shortcut_conv"]["kernel"][0, 0]
    expected = np.einsum("nhwi,io->nhwo", fed, kernel)
    np.testing.assert_allclose(outputs["block0_0"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("strided", "inner_side"), [(1, 4), (2, 8)])
def test_wide_block_strides_in_the_chosen_convolution(strided, inner_side):
    model = SMALL["wrn"].clone(strided_conv=strided)
    variables, images = shapes_of(model, (8, 8, 2))
    apply = partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    _, captured = jax.eval_shape(apply, variables, images)
    block = captured["intermediates"]["block1_0"]
    assert block["conv1"]["__call__"][0].shape == (1, inner_side, inner_side, 6)
    assert block["__call__"][0].shape == (1, 4, 4, 6)


def test_inverted_residual_adds_its_input_where_shapes_agree():
    model = SMALL["mobilenet_v2"]
    images = images_for("mobilenet_v2")
    variables = random_variables(model, images)
    for block in ("block1_0", "block1_1"):
        silent = {f"{block}__bn3__scale": 0, f"{block}__bn3__bias": 1}
        variables = replaced(variables, **silent)
    outputs = intermediates(model, variables, images)
    assert np.all(outputs["block1_0"] == 1)  # stride 2: no sum
    assert np.all(outputs["block1_1"] == 2)


# --------------------------------------------------------------------- transformer


@pytest.mark.parametrize("scale", [None, 0.25])
def test_self_attention_equals_flax_attention(scale):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    ours = SelfAttention(2, 4, 4, scale, jnp.float32)
    variables = random_variables(ours, x)
    flax_attention = nn.MultiHeadDotProductAttention(num_heads=2)
    reference = variables["params"]
    if scale is not None:  # Flax's fixed 1 / sqrt(4), moved into the queries
        query = jax.tree.map(lambda leaf: leaf * scale * 2, reference["query"])
        reference = {**reference, "query": query}
    expected = flax_attention.apply({"params": reference}, x)
    np.testing.assert_allclose(ours.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_encoder_blocks_are_pre_normed():
    _, out, params, _ = forward("vit")
    x, block = out["block0"], "block1"

    def norm(x, name):
        normal = x - x.mean(-1, keepdims=True)
        normal /= np.sqrt((normal**2).mean(-1, keepdims=True) + 1e-6)
        return normal * params[f"{name}/scale"] + params[f"{name}/bias"]

    near(out[f"{block}/norm1"], norm(x, f"{block}/norm1"))
    y = x + out[f"{block}/attention"]
    hidden = dense(norm(y, f"{block}/norm2"), params, f"{block}/mlp1")
    hidden = hidden * (1 + special.erf(hidden / np.sqrt(2))) / 2
    near(out[block], y + dense(hidden, params, f"{block}/mlp2"))
    near(out["logits"], dense(norm(out[block], "norm")[:, 0], params, "head"))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_vit_without_positions_ignores_the_order_of_patches(pool):
    model = SMALL["vit"].clone(pool=pool)
    images = images_for("vit")
    # Swapping the halves of the rows swaps patches, whole.
    swapped = jnp.concatenate([images[:, 4:], images[:, :4]], axis=1)
    variables = random_variables(model, images)
    apply = partial(evaluate, model)
    assert np.abs(apply(variables, images) - apply(variables, swapped)).max() > 1e-2
    blind = replaced(variables, pos_embed=0)
    np.testing.assert_allclose(
        apply(blind, images), apply(blind, swapped), rtol=1e-4, atol=1e-5
    )


# ------------------------------------------------------------------------- dropout


def loop_targets(x, target):
    """Which feature maps of each example may be dropped, map by map."""
    targets = np.zeros((x.shape[0], x.shape[-1]), bool)
    for example in range(x.shape[0]):
        norms = [
            np.linalg.norm(x[example, ..., channel].ravel())
            for channel in range(x.shape[-1])
        ]
        limit = int(target * len(norms))
        threshold = sorted(norms)[limit] if limit < len(norms) else np.inf
        targets[example] = [norm < threshold for norm in norms]
    return targets


@pytest.mark.parametrize("target", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("shape", [(5, 4, 4, 7), (6, 9)])
def test_targeted_dropout_at_rate_one_removes_the_weakest_maps(shape, target, key):
    x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    layer = TargetedDropout(rate=1.0, target=target)
    y = layer.apply({}, jnp.asarray(x), train=True, rngs={"dropout": key})
    targets = loop_targets(x, target)
    assert targets.sum() == shape[0] * int(target * shape[-1])
    broadcast = targets.reshape(shape[0], *(1,) * (len(shape) - 2), shape[-1])
    np.testing.assert_array_equal(y, np.where(broadcast, 0, x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_targeted_dropout_drops_elements_at_the_rate_and_rescales(dtype, key):
    x = np.random.default_rng(3).uniform(0.5, 1.5, size=(4, 50, 50, 8))
    x = jnp.asarray(x * np.arange(1, 9), dtype)
    layer = TargetedDropout(rate=0.3, target=0.5)
    drop = jax.jit(partial(layer.apply, {}, train=True, rngs={"dropout": key}))
    assert drop(x).dtype == dtype
    y, x = np.asarray(drop(x), np.float64), np.asarray(x, np.float64)
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    survivors = y[..., :4] != 0
    expected = np.where(survivors, x[..., :4] / 0.7, 0)
    np.testing.assert_allclose(y[..., :4], expected, rtol=float(jnp.finfo(dtype).eps))
    # 40,000 draws: five standard deviations of the mean.
    assert abs(survivors.mean() - 0.7) < 5 * np.sqrt(0.3 * 0.7 / survivors.size)
    assert np.all(survivors.mean(axis=(1, 2)) < 1)  # elements, not whole maps
    assert np.all(survivors.mean(axis=(1, 2)) > 0)


def test_maps_that_tie_at_the_threshold_survive(key):
    x = jnp.ones((2, 3, 3, 6))
    layer = TargetedDropout(rate=1.0, target=0.5)
    np.testing.assert_array_equal(
        layer.apply({}, x, train=True, rngs={"dropout": key}), x
    )


@pytest.mark.parametrize("name", SMALL)
def test_no_dropout_stream_is_needed_without_dropout(name):
    images = images_for(name)
    variables, _ = shapes_of(SMALL[name], images.shape[1:])
    apply = partial(SMALL[name].apply, train=True, mutable=["batch_stats"])
    logits, _ = jax.eval_shape(apply, variables, images)
    assert logits.shape == (4, 3)


@pytest.mark.parametrize(
    ("name", "after_dropout"),
    [("vgg", "bn2"), ("resnet", "block0_0/bn2"), ("wrn", "block0_0/bn2")],
)
def test_dropout_at_rate_one_starves_the_layer_behind_it(name, after_dropout):
    model = SMALL[name].clone(dropout_rate=1.0, use_bias=False, bn_momentum=0.0)
    images = images_for(name)
    variables = random_variables(model, images)
    _, stats = train_step(model, variables, images)
    flat = flatten_dict(stats, sep="/")
    assert np.all(flat[f"{after_dropout}/mean"] == 0)
    assert np.all(flat[f"{after_dropout.replace('2', '1')}/mean"] != 0)


def test_dropout_at_rate_one_leaves_a_resnet_its_shortcuts():
    model = ResNet((2,), (4,), 3, dropout_rate=1.0, shortcut="identity")
    images = images_for("resnet")
    variables = random_variables(model, images)
    logits, _ = train_step(model, variables, images)
    stem = intermediates(model, variables, images)["conv1"]
    normal = (stem - stem.mean((0, 1, 2))) / np.sqrt(stem.var((0, 1, 2)) + 1e-5)
    params = jax.tree.map(np.asarray, variables["params"])
    bn, head = params["bn1"], params["head"]
    features = relu(normal * bn["scale"] + bn["bias"]).mean((1, 2))
    expected = features @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: VGG(widths=(8, "X")), r"widths\[1\] must be a positive int or \"M\""),
        (lambda: VGG(widths=(8, 0)), r"widths\[1\] must be a positive int, got 0"),
        (lambda: VGG(pool="max"), 'pool must be "mean" or "flatten", got \'max\''),
        (lambda: VGG(num_classes=0), "num_classes must be a positive int, got 0"),
        (lambda: VGG(width_multiplier=0), "width_multiplier must be positive, got 0"),
        (lambda: VGG(dropout_rate=1.5), r"dropout rate must be in \[0, 1\], got 1.5"),
        (lambda: LeNet5(dropout_target=-1), r"dropout target must be in \[0, 1\]"),
        (lambda: TargetedDropout(2.0), r"dropout rate must be in \[0, 1\], got 2.0"),
        (
            lambda: LeNet300(widths=(2.5,)),
            r"widths\[0\] must be a positive int, got 2.5",
        ),
        (lambda: cifar_vgg(12), r"VGG depth must be one of \[11, 13, 16, 19\], got 12"),
        (lambda: cifar_resnet(21), r"must be 6n \+ 2 .* got 21"),
        (lambda: imagenet_resnet(20), r"one of \[18, 34, 50, 101, 152\], got 20"),
        (lambda: wide_resnet(30), r"must be 6n \+ 4 .* got 30"),
        (
            lambda: ResNet((1, 1), (4,)),
            r"widths must have one entry per stage: expected 2 for"
            r" stage_sizes=\(1, 1\), got \(4,\)",
        ),
        (lambda: ResNet((1,), (4,), stem="big"), "stem must be one of"),
        (
            lambda: ResNet((1,), (4,), shortcut="B"),
            "shortcut must be one of .* got 'B'",
        ),
        (
            lambda: ResNet((2,), (4,), inner_widths=(3,)),
            "inner_widths must have one entry per block: expected 2, got 1",
        ),
        (
            lambda: ResNet((1,), (4,), inner_widths=((3, 3),)),
            r"inner_widths\[0\] must be an int or have 1 entries for a basic block",
        ),
        (
            lambda: ResNet((1,), (8,), bottleneck=True, inner_widths=((2, 0),)),
            r"inner_widths\[0\]\[1\] must be a positive int, got 0",
        ),
        (lambda: WideResNet(strided_conv=3), "strided_conv must be 1 or 2, got 3"),
        (lambda: WideResNet(shortcut_from="x"), "shortcut_from must be .* got 'x'"),
        (
            lambda: MobileNetV1(widths=(8, 8), strides=(1,)),
            "strides must have one entry per block: expected 2, got 1",
        ),
        (
            lambda: MobileNetV2(expansions=(1, 6)),
            "expansions must have one entry per stage: expected 7",
        ),
        (lambda: ViT(pool="max"), 'pool must be "cls" or "mean", got \'max\''),
        (
            lambda: ViT(num_heads=(12, 12)),
            "num_heads must have one entry per block: expected 12, got 2",
        ),
    ],
)
def test_bad_arguments_raise_at_construction(build, text):
    with pytest.raises(ValueError, match=text):
        build()


@pytest.mark.parametrize(
    ("model", "shape", "text"),
    [
        (LeNet300(), (28, 28), r"images must be \[batch, height, width, channels\]"),
        (LeNet5(), (8, 8, 1), "conv2 of LeNet5 needs at least 6x6 .* got 2x2"),
        (cifar_vgg(16), (8, 8, 3), "5 poolings need images of at least 32x32, got 8x8"),
        (
            ResNet((1, 1), (4, 8), shortcut="identity"),
            (8, 8, 3),
            "block1_0: shortcut 'identity' cannot join 4 channels to 8 with stride 2",
        ),
        (
            ResNet((1, 1), (8, 4), shortcut="zero_pad"),
            (8, 8, 3),
            "block1_0: shortcut 'zero_pad' cannot join 8 channels to 4 with stride 2",
        ),
        (ViT(), (30, 32, 3), "patches of 16x16 do not tile images of 30x32"),
    ],
)
def test_images_that_do_not_fit_raise(model, shape, text):
    with pytest.raises(ValueError, match=text):
        shapes_of(model, shape)
