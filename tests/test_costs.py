import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.costing import costs

pytestmark = pytest.mark.once


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def conv(x, kernel, stride=1, padding="SAME", **options):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **options,
    )


def max_pool(x):
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")


def test_vgg16_has_its_published_costs():
    """Simonyan and Zisserman 2014, configuration D: 138 357 544 weights, 15.5 G."""
    widths = [
        64,
        64,
        0,
        128,
        128,
        0,
        256,
        256,
        256,
        0,
        512,
        512,
        512,
        0,
        512,
        512,
        512,
        0,
    ]
    dense = [7 * 7 * 512, 4096, 4096, 1000]
    convs = list(itertools.pairwise([3, *filter(None, widths)]))
    params = {
        "convs": [(shaped(3, 3, i, o), shaped(o)) for i, o in convs],
        "dense": [(shaped(i, o), shaped(o)) for i, o in itertools.pairwise(dense)],
    }

    def vgg(variables, x):
        convs = iter(variables["params"]["convs"])
        for width in widths:
            if width:
                kernel, bias = next(convs)
                x = jax.nn.relu(conv(x, kernel) + bias[None, None, None])
            else:
                x = max_pool(x)
        x = x.reshape(x.shape[0], -1)
        for kernel, bias in variables["params"]["dense"]:
            x = x @ kernel + bias[None]
        return x

    found = costs(vgg, {"params": params, "stats": shaped(7)}, shaped(1, 224, 224, 3))
    assert found.parameters == 138_357_544
    assert found.multiply_adds == 15_470_264_320
    assert found.flops == 2 * found.multiply_adds
    assert found.largest_activation_bytes == 224 * 224 * 64 * 4


def test_mobilenet_has_its_published_costs():
    """Howard et al. 2017, table 4: 569 million mult-adds, 4.2 million parameters."""
    blocks = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
    blocks += [(256, 512, 2), *[(512, 512, 1)] * 5, (512, 1024, 2), (1024, 1024, 1)]
    params = {
        "stem": shaped(3, 3, 3, 32),
        "blocks": [(shaped(3, 3, 1, i), shaped(1, 1, i, o)) for i, o, _ in blocks],
        "head": shaped(1024, 1000),
    }

    def mobilenet(params, x):
        x = conv(x, params["stem"], 2)
        for (depthwise, pointwise), (width, _, stride) in zip(
            params["blocks"], blocks, strict=True
        ):
            x = conv(x, depthwise, stride, feature_group_count=width)
            x = conv(x, pointwise)
        return x.mean((1, 2)) @ params["head"]

    found = costs(mobilenet, params, shaped(1, 224, 224, 3))
    assert round(found.multiply_adds / 1e6) == 569
    assert round(found.parameters / 1e6, 1) == 4.2


NETS = {
    "conv": lambda p, x: conv(conv(x, p["a"], padding="VALID"), p["b"], 2, "VALID"),
    "grouped": lambda p, x: conv(x, p["g"], padding="VALID", feature_group_count=2),
    "depthwise": lambda p, x: conv(x, p["d"], padding="VALID", feature_group_count=4),
    "dilated": lambda p, x: conv(x, p["a"], padding="VALID", rhs_dilation=(2, 2)),
    "dense": lambda p, x: jnp.einsum("bhwc,cd->bhwd", x, p["w"]),
    "batched": lambda p, x: jnp.einsum("bhwc,bhvc->bhwv", x, x),
    "two axes": lambda p, x: jnp.tensordot(x, p["b"], ((2, 3), (0, 2))),
}


@pytest.mark.parametrize("name", NETS)
def test_flops_equal_what_xla_counts_without_padding(name):
    params = {
        "a": shaped(3, 3, 4, 6),
        "b": shaped(9, 3, 6, 5) if name == "two axes" else shaped(3, 3, 6, 5),
        "g": shaped(3, 3, 2, 6),
        "d": shaped(3, 3, 1, 8),
        "w": shaped(4, 7),
    }
    x = shaped(2, 9, 9, 6 if name == "two axes" else 4)
    counted = jax.jit(NETS[name]).lower(params, x).cost_analysis()
    assert costs(NETS[name], params, x).flops == counted["flops"]


def test_every_repetition_of_a_scan_counts():
    def rnn(w, x):
        return jax.lax.scan(lambda h, _: (h @ w, h.sum()), x, None, length=10)

    found = costs(rnn, shaped(8, 8), shaped(3, 8))
    assert found.multiply_adds == 10 * 3 * 8 * 8
    assert found.activation_bytes == 10 * (3 * 8 + 1) * 4
    nested = lambda w, x: jax.lax.scan(  # noqa: E731
        lambda h, _: (rnn(w, h)[0], None), x, None, length=4
    )
    assert costs(nested, shaped(8, 8), shaped(3, 8)).multiply_adds == 40 * 3 * 8 * 8


def test_a_cond_costs_its_most_expensive_branch_and_a_while_loop_one_round():
    def branches(w, x):
        return jax.lax.cond(x.sum() > 0, lambda: x, lambda: x @ w @ w)

    assert costs(branches, shaped(8, 8), shaped(3, 8)).multiply_adds == 2 * 3 * 8 * 8

    def loop(w, x):
        return jax.lax.while_loop(lambda h: h.sum() > 0, lambda h: h @ w, x)

    assert costs(loop, shaped(8, 8), shaped(3, 8)).multiply_adds == 3 * 8 * 8


def layer(w, x):
    return jnp.tanh(x @ w)


@jax.custom_jvp
def with_jvp(w, x):
    return layer(w, x)


@jax.custom_vjp
def with_vjp(w, x):
    return layer(w, x)


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), tangents[1]))
with_vjp.defvjp(lambda w, x: (with_vjp(w, x), None), lambda _, g: (None, g))


@pytest.mark.parametrize(
    "wrapped", [jax.jit(layer), jax.checkpoint(layer), with_jvp, with_vjp]
)
def test_wrappers_are_transparent(wrapped):
    twice = lambda w, x: wrapped(w, wrapped(w, x))  # noqa: E731
    plain = lambda w, x: layer(w, layer(w, x))  # noqa: E731
    x, w = shaped(3, 8), shaped(8, 8)
    assert costs(twice, w, x) == costs(plain, w, x)
    assert costs(twice, w, x).activation_bytes == 4 * 3 * 8 * 4


def test_what_reaches_no_output_costs_nothing():
    def wasteful(w, x):
        del_me = x @ w @ w
        return x @ w + 0 * del_me.shape[0]

    found = costs(wasteful, shaped(8, 8), shaped(3, 8))
    assert found.multiply_adds == 3 * 8 * 8


def test_transposed_convolution_counts_every_input_position_once():
    # The gradient of a strided convolution is transposed and costs the same.
    kernel, x = shaped(2, 2, 3, 5), shaped(1, 8, 8, 3)
    forward = functools.partial(conv, stride=2, padding="VALID")
    once = costs(lambda k, x: forward(x, k), kernel, x).multiply_adds

    def to_input(k, y):
        return jax.linear_transpose(lambda x: forward(x, k), x)(y)

    assert costs(to_input, kernel, shaped(1, 4, 4, 5)).multiply_adds == once
    assert once == 4 * 4 * 5 * 2 * 2 * 3


def test_transposed_convolution_in_batch_groups_meets_its_own_channels():
    transposed = functools.partial(
        conv, padding=((0, 0), (0, 0)), lhs_dilation=(2, 2), batch_group_count=2
    )
    found = costs(transposed, shaped(4, 5, 5, 3), shaped(2, 2, 3, 6))
    assert found.multiply_adds == 4 * 5 * 5 * 3 * 2 * 2 * (6 // 2)


@pytest.mark.parametrize("groups", [1, 3])
def test_gradient_of_a_convolution_costs_as_much_as_the_convolution(groups):
    kernel, x = shaped(3, 3, 6 // groups, 9), shaped(2, 7, 7, 6)
    forward = functools.partial(conv, padding="VALID", feature_group_count=groups)
    once = costs(lambda k, x: forward(x, k), kernel, x).multiply_adds

    def to_kernel(x, y):
        return jax.linear_transpose(lambda k: forward(x, k), kernel)(y)

    assert costs(to_kernel, x, shaped(2, 5, 5, 9)).multiply_adds == once
    assert once == 2 * 5 * 5 * 9 * 9 * 6 // groups


def test_every_token_meets_one_expert_in_a_ragged_product():
    sizes = shaped(4, dtype=jnp.int32)
    found = costs(jax.lax.ragged_dot, shaped(10, 3), shaped(4, 3, 5), sizes)
    assert found.multiply_adds == 10 * 3 * 5

    def to_experts(x, sizes, y):
        product = lambda experts: jax.lax.ragged_dot(x, experts, sizes)  # noqa: E731
        return jax.linear_transpose(product, shaped(4, 3, 5))(y)

    found = costs(to_experts, shaped(10, 3), sizes, shaped(10, 5))
    assert found.multiply_adds == 10 * 3 * 5


def test_code_on_several_devices_counts_on_each():
    auto = jax.sharding.AxisType.Auto
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(auto,))
    rows = jax.sharding.PartitionSpec("data")
    whole = jax.sharding.PartitionSpec()
    split = jax.shard_map(
        lambda w, x: x @ w, mesh=mesh, in_specs=(whole, rows), out_specs=rows
    )
    assert costs(split, shaped(5, 6), shaped(8, 5)).multiply_adds == 8 * 5 * 6


def test_a_pallas_kernel_counts_once_per_grid_cell():
    pallas = pytest.importorskip("jax.experimental.pallas")

    def kernel(w, x, out):
        out[...] = x[...] @ w[...]

    def blocked(w, x):
        return pallas.pallas_call(
            kernel,
            grid=(4,),
            in_specs=[
                pallas.BlockSpec((16, 16), lambda i: (0, 0)),
                pallas.BlockSpec((8, 16), lambda i: (i, 0)),
            ],
            out_specs=pallas.BlockSpec((8, 16), lambda i: (i, 0)),
            out_shape=shaped(32, 16),
        )(w, x)

    found = costs(blocked, shaped(16, 16), shaped(32, 16))
    assert found.multiply_adds == 32 * 16 * 16
    assert found.activation_bytes == 32 * 16 * 4


def test_shapes_suffice_and_flags_stay_flags():
    def net(variables, x, *, train):
        return x @ variables["w"] @ (variables["w"] if train else variables["v"])

    # 10^12 weights: nothing of that size can have been allocated.
    variables = {"w": shaped(10**6, 10**6, dtype=jnp.bfloat16), "v": shaped(10**6, 1)}
    variables["v"] = shaped(10**6, 1, dtype=jnp.bfloat16)
    x = shaped(1, 10**6, dtype=jnp.bfloat16)
    found = costs(net, variables, x, train=False)
    assert found.parameters == 10**12 + 10**6
    assert found.multiply_adds == 10**12 + 10**6
    assert found.activation_bytes == 2 * (10**6 + 1)
    assert costs(net, variables, x, train=True).multiply_adds == 2 * 10**12


def test_a_scatter_costs_its_result_not_its_combining_function():
    found = costs(lambda w, rows, x: w.at[rows].add(x), *SCATTER)
    assert found.multiply_adds == 0
    assert found.largest_activation_bytes == 50 * 3 * 4
    indices = 100  # a few int32 and bool pairs
    assert 50 * 3 * 4 <= found.activation_bytes <= 50 * 3 * 4 + indices


SCATTER = (shaped(50, 3), shaped(2, dtype=jnp.int32), shaped(2, 3))


def test_keys_have_a_size():
    key = jax.eval_shape(lambda: jax.random.key(0))
    found = costs(lambda key: jax.random.split(key, 3), key)
    assert found.activation_bytes == 3 * 8


def test_slicing_half_of_a_hidden_layer_halves_its_costs():
    def mlp(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    full = {"a": np.ones((3, 8), np.float32), "b": np.ones((8, 2), np.float32)}
    half = {"a": full["a"][:, :4], "b": full["b"][:4]}
    before, after = (costs(mlp, p, shaped(5, 3)) for p in (full, half))
    assert after.parameters * 2 == before.parameters == 40
    assert after.multiply_adds * 2 == before.multiply_adds == 5 * 40
