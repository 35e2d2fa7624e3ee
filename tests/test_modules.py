"""Modules from masks: equal to the masked original, sized as if built small."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_same, difference, quick_jit
from flax import nnx
from flax.training.train_state import TrainState

import jaxprune
from jaxprune.integrations import _nnx_layers
from jaxprune.integrations import linen as linen_modules
from jaxprune.integrations import nnx as nnx_modules


def new(build):
    """A module with random arrays, so that no zero bias or unit scale hides a cut."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(0)

    def fill(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(rng.uniform(0.2, 1.0, leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(fill, state))


def normal(*shape):
    return jnp.asarray(np.random.default_rng(7).normal(size=shape), jnp.float32)


def masks_for(model, x, keep, **kwargs):
    """Masks that keep so many units of each group, chosen at random."""
    groups = jaxprune.trace(*nnx_modules.nnx_apply(model), x, **kwargs)
    assert set(keep) <= set(groups), list(groups)
    assert all(0 < count < groups[name].size for name, count in keep.items())
    rng = np.random.default_rng(3)
    units = {n: rng.permutation(groups[n].size) < k for n, k in keep.items()}
    return jaxprune.expand_masks(groups, units)


def masked_output(model, masks, x):
    apply_fn, variables = nnx_modules.nnx_apply(model)
    return quick_jit(apply_fn)(jaxprune.apply_masks(variables, masks), x)


@quick_jit
def call(model, x):
    return model(x)


def sizes(model):
    """Every number and tuple of numbers that the layers remember."""
    found = {}
    for path, layer in nnx.iter_modules(model):
        for name, value in vars(layer).items():
            flat = value if isinstance(value, tuple) else (value,)
            if all(type(n) is int for n in flat):
                found[(*path, name)] = value
    return found


def shapes(model):
    return jax.tree.map(np.shape, nnx.to_pure_dict(nnx.state(model)))


def assert_built_like(small, build):
    built = nnx.eval_shape(build)
    assert sizes(small) == sizes(built)
    assert shapes(small) == shapes(built)


def assert_equal_params(a, b):
    a, b = (nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


class ConvNet(nnx.Module):
    def __init__(self, width=6, wider=8):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.body = nnx.List(
            [nnx.Conv(width, wider, (3, 3), use_bias=False, rngs=rngs)]
        )
        self.head = nnx.Linear(wider, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.drop(self.body[0](x).mean((1, 2))))


HALF = {"params/conv/kernel:3": 2, "params/body/0/kernel:3": 5}
IMAGES = normal(2, 8, 8, 3)


@pytest.fixture(scope="module")
def pruned_net():
    """(original, masks, small)"""
    model = new(ConvNet)
    masks = masks_for(model, IMAGES, HALF)
    return model, masks, nnx_modules.nnx_module(model, masks, IMAGES)


def test_a_module_is_cut_and_the_original_stays(pruned_net):
    model, masks, small = pruned_net
    assert isinstance(small, ConvNet)
    assert type(small.norm.mean) is nnx.BatchStat
    assert_built_like(small, lambda: ConvNet(2, 5))
    assert_built_like(model, ConvNet)
    assert not small.drop.deterministic and not small.norm.use_running_average
    quiet = nnx.clone(small)
    quiet.eval()
    assert_same(call(quiet, IMAGES), masked_output(model, masks, IMAGES))
    assert_equal_params(model, new(ConvNet))


def test_a_small_module_trains(pruned_net):
    small = nnx.clone(pruned_net[2])
    optimizer = nnx.Optimizer(small, optax.sgd(0.1), wrt=nnx.Param)
    mean, kernel = (np.asarray(v[...]) for v in (small.norm.mean, small.conv.kernel))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: (model(IMAGES) ** 2).mean())(model)
        optimizer.update(model, grads)
        return grads["conv"]["kernel"][...]

    gradient = step(small, optimizer)
    assert np.abs(gradient).max() > 0
    np.testing.assert_allclose(
        small.conv.kernel[...], kernel - 0.1 * np.asarray(gradient), rtol=1e-5
    )
    assert small.norm.mean.shape == (2,)
    assert not np.allclose(small.norm.mean[...], mean)


class Chain(nnx.Module):
    """Layers by name, called in order."""

    def __init__(self, **layers):
        self.order = tuple(layers)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def linear(width_in, width_out):
    return nnx.Linear(width_in, width_out, rngs=nnx.Rngs(0))


def conv(*args, **kwargs):
    return nnx.Conv(*args, rngs=nnx.Rngs(0), **kwargs)


def grouped(groups, width, multiple=2):
    return Chain(
        first=conv(3, width, 1),
        conv=conv(width, multiple * width, 3, feature_group_count=groups),
        last=conv(multiple * width, 3, 1),
    )


def transposed(width, flip):
    layer = nnx.ConvTranspose(width, 3, 3, transpose_kernel=flip, rngs=nnx.Rngs(0))
    return Chain(first=conv(3, width, 1), conv=layer)


def attention(heads, width=4, **kwargs):
    return nnx.MultiHeadAttention(
        heads, 3, heads * width, decode=False, rngs=nnx.Rngs(0), **kwargs
    )


def general(heads, width):
    ends = (3, (heads, width)), ((heads, width), 3)
    first, last = (
        nnx.LinearGeneral(*sizes, axis=axis, rngs=nnx.Rngs(0))
        for sizes, axis in zip(ends, (-1, (-2, -1)), strict=True)
    )
    return Chain(first=first, last=last)


def einsum(width):
    first = nnx.Einsum("abc,cd->abd", (3, width), (width,), rngs=nnx.Rngs(0))
    return Chain(first=first, last=linear(width, 3))


def between(layer, width):
    """A layer that keeps the width, between linear ones."""
    return Chain(
        first=linear(3, width), norm=layer, up=linear(width, 4), last=linear(4, 3)
    )


def group_norm(groups, width):
    return between(nnx.GroupNorm(width, groups, rngs=nnx.Rngs(0)), width)


def low_rank(width, rank):
    first = nnx.LoRALinear(3, width, lora_rank=rank, rngs=nnx.Rngs(0))
    return Chain(first=first, last=linear(width, 3))


def recurrent(cell, width):
    return Chain(rnn=nnx.RNN(cell(3, width, rngs=nnx.Rngs(0))), last=linear(width, 3))


class Tied(nnx.Module):
    def __init__(self, width):
        self.embed = nnx.Embed(7, width, rngs=nnx.Rngs(0))
        self.hidden = linear(width, width)

    def __call__(self, tokens):
        return self.embed.attend(nnx.relu(self.hidden(self.embed(tokens))))


class Twice(nnx.Module):
    """Two layers that share one kernel."""

    def __init__(self, width):
        self.first, self.same, self.last = (
            linear(3, width),
            linear(3, width),
            linear(width, 3),
        )
        self.same.kernel = self.first.kernel

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)) + self.same(-x))


FIRST = "params/first/kernel:"
EMBED = "params/embed/embedding:1"

# name: (before, after, how many units each group keeps)
LAYERS = {
    "groups": (lambda: grouped(3, 6), lambda: grouped(2, 4), {FIRST + "2#2": 2}),
    "channels of groups": (
        lambda: grouped(3, 6),
        lambda: grouped(3, 3, 4),
        {FIRST + "2": 1},
    ),
    "depthwise": (lambda: grouped(6, 6), lambda: grouped(4, 4), {FIRST + "2": 4}),
    "transposed": (
        lambda: transposed(6, False),
        lambda: transposed(4, False),
        {FIRST + "2": 4},
    ),
    "transposed, kernel flipped": (
        lambda: transposed(6, True),
        lambda: transposed(4, True),
        {FIRST + "2": 4},
    ),
    "tied embedding": (lambda: Tied(6), lambda: Tied(4), {EMBED: 4}),
    "shared kernel": (lambda: Twice(6), lambda: Twice(4), {FIRST + "1": 4}),
    "heads": (lambda: attention(4), lambda: attention(3), {"params/query/kernel:1": 3}),
    "head_dim": (
        lambda: attention(2),
        lambda: attention(2, 3),
        {"params/query/kernel:2": 3, "params/value/kernel:2": 3},
    ),
    "general": (
        lambda: general(4, 6),
        lambda: general(3, 2),
        {FIRST + "1": 3, FIRST + "2": 2},
    ),
    "einsum": (lambda: einsum(6), lambda: einsum(4), {FIRST + "1": 4}),
    "groups of a norm": (
        lambda: group_norm(3, 6),
        lambda: group_norm(2, 4),
        {FIRST + "1#2": 2},
    ),
    "instance norm": (
        lambda: between(nnx.InstanceNorm(6, rngs=nnx.Rngs(0)), 6),
        lambda: between(nnx.InstanceNorm(4, rngs=nnx.Rngs(0)), 4),
        {FIRST + "1": 4},
    ),
    "low rank": (
        lambda: low_rank(6, 4),
        lambda: low_rank(5, 2),
        {FIRST + "1": 5, "params/first/lora/lora_a:1": 2},
    ),
} | {
    cell.__name__: (
        lambda cell=cell: recurrent(cell, 6),
        lambda cell=cell: recurrent(cell, 4),
        None,
    )
    for cell in (nnx.GRUCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.SimpleCell)
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gets_the_sizes_of_one_built_small(name):
    before, after, keep = LAYERS[name]
    x = jnp.array([[1, 2, 6]]) if name == "tied embedding" else normal(2, 5, 3)
    model = new(before)
    if keep is None:
        (hidden,) = jaxprune.trace(*nnx_modules.nnx_apply(model), x)
        keep = {hidden: 4}
    masks = masks_for(model, x, keep)
    small = nnx_modules.nnx_module(model, masks, x)
    assert_built_like(small, after)
    assert_same(call(small, x), masked_output(model, masks, x))


def test_bfloat16_is_allowed_its_rounding():
    model = new(lambda: between(linear(6, 6), 6))
    for layer in (model.first, model.norm, model.up, model.last):
        layer.dtype = jnp.bfloat16
    x = normal(2, 3).astype(jnp.bfloat16)
    masks = masks_for(model, x, {FIRST + "1": 3})
    assert nnx_modules.nnx_module(model, masks, x).norm.in_features == 3


def test_bfloat16_hides_no_other_scale():
    model = new(lambda: between(nnx.RMSNorm(6, rngs=nnx.Rngs(0)), 6))
    for layer in (model.first, model.norm, model.up, model.last):
        layer.dtype = jnp.bfloat16
    x = normal(2, 3).astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        masks = masks_for(model, x, {FIRST + "1": 5})
    with (
        jax.numpy_dtype_promotion("standard"),  # the norm squares in float32
        pytest.raises(ValueError, match=r"RMSNorm.*num_features, 5 instead of 6"),
    ):
        nnx_modules.nnx_module(model, masks, x)


@pytest.mark.parametrize(
    ("keep", "options"),
    [
        ({"query": 3}, {}),
        ({"value": 3}, {}),
        ({"query": 2, "value": 3}, {"use_bias": False}),
        ({"query": 3, "value": 2}, {"dropout_rate": 0.1, "deterministic": True}),
    ],
    ids=str,
)
def test_queries_and_values_may_keep_other_numbers_of_dimensions(keep, options):
    model, x = new(lambda: attention(2, **options)), normal(2, 5, 3)
    masks = masks_for(model, x, {f"params/{n}/kernel:2": k for n, k in keep.items()})
    small = nnx_modules.nnx_module(model, masks, x)
    left = {"query": 4, "value": 4} | keep
    assert small.head_dim == left["query"] == small.key.out_features[-1]
    assert small.value.out_features[-1] == small.out.in_features[-1] == left["value"]
    assert_same(call(small, x), masked_output(model, masks, x))
    again = masks_for(small, x, {"params/query/kernel:1": 1})
    assert_same(
        call(nnx_modules.nnx_module(small, again, x), x), masked_output(small, again, x)
    )


def test_a_module_and_its_variables_stay_in_step(tmp_path):
    model, x = new(lambda: attention(2)), normal(2, 5, 3)
    found = nnx_modules.prune(model, x, sparsity={"params/query/kernel:2": 0.5})
    kernel = found.model.query.kernel
    kernel.set_value(kernel.get_value() * 3)  # training, in place
    trained = call(found.model, x)
    assert_same(found(x), trained)
    found.save(tmp_path / "small")
    apply_fn, _ = nnx_modules.nnx_apply(model)
    loaded = jaxprune.load(tmp_path / "small", apply_fn)
    assert_same(call(nnx_modules.pruned_model(model, loaded).model, x), trained)
    doubled = found.replace(variables=jax.tree.map(lambda v: 2 * v, found.variables))
    assert_same(call(doubled.model, x), doubled(x))
    again = jaxprune.prune(found, sparsity={"*value/kernel:2": 0.5})
    assert again.model.value.out_features == again.model.query.out_features == (2, 2)
    assert_same(call(again.model, x), masked_output(found.model, again.last_masks, x))


def test_abstract_queries_cannot_be_scaled():
    model, x = nnx.eval_shape(lambda: attention(2)), normal(2, 5, 3)
    keep = {"params/query/kernel:2": 3, "params/value/kernel:2": 3}
    masks = masks_for(new(lambda: attention(2)), x, keep)
    with pytest.raises(
        ValueError, match=r"multiplied by 0\.866, but they are abstract"
    ):
        nnx_modules.nnx_module(model, masks, x)


class Padded(nnx.Module):
    """A shortcut that pads with zeros up to a width, as in ResNet option A."""

    def __init__(self):
        self.first, self.wide, self.last = linear(3, 4), linear(4, 6), linear(6, 3)

    def __call__(self, x):
        x = self.first(x)
        missing = 6 - x.shape[-1]
        return self.last(self.wide(x) + jnp.pad(x, ((0, 0), (0, 0), (0, missing))))


class Divided(nnx.Module):
    """Divides by the width it finds."""

    def __init__(self):
        self.first, self.last = linear(3, 6), linear(6, 3)

    def __call__(self, x):
        x = self.first(x)
        return self.last(x / x.shape[-1])


class Remembering(nnx.Module):
    """Reshapes by a width that it remembers."""

    def __init__(self, width=6):
        self.width = width
        self.first, self.last = linear(3, width), linear(width, 3)

    def __call__(self, x):
        return self.last(self.first(x).reshape(-1, self.width))


REFUSED = {
    "layer norm": (
        lambda: between(nnx.LayerNorm(6, rngs=nnx.Rngs(0)), 6),
        FIRST + "1",
        r"norm \(LayerNorm\) computes with its num_features, 3 instead of 6",
    ),
    "rms norm": (
        lambda: between(nnx.RMSNorm(6, rngs=nnx.Rngs(0)), 6),
        FIRST + "1",
        r"norm \(RMSNorm\) computes with its num_features",
    ),
    "group norm": (
        lambda: group_norm(3, 12),
        FIRST + "1#2",
        r"norm \(GroupNorm\) computes with its group_size, 3 instead of 4",
    ),
    "normalized head_dim": (
        lambda: attention(2, normalize_qk=True),
        "params/query/kernel:2",
        r"key_ln \(LayerNorm\) computes .*itself \(MultiHeadAttention\) computes",
    ),
    "pad": (Padded, FIRST + "1", "raises .*a width written in the code of Padded"),
    "division": (Divided, FIRST + "1", "differs from narrow by .* code of Divided"),
    "reshape": (Remembering, FIRST + "1", "raises TypeError: .*fit_sizes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_module_computes_is_refused(name):
    build, group, message = REFUSED[name]
    model, x = new(build), normal(2, 5, 3)
    masks = masks_for(model, x, {group: 3})
    with pytest.raises(ValueError, match=f"{message}.*[Uu]se narrow instead"):
        nnx_modules.nnx_module(model, masks, x)


@pytest.mark.parametrize("name", ["layer norm", "group norm"])
def test_the_pin_that_a_refusal_names_helps(name):
    build, group, _ = REFUSED[name]
    model, x = new(build), normal(2, 5, 3)
    with pytest.raises(ValueError, match="Use narrow instead") as refusal:
        nnx_modules.nnx_module(model, masks_for(model, x, {group: 3}), x)
    pin = re.findall(r"'(params/\S+)'", str(refusal.value))
    pruned = jaxprune.prune(*nnx_modules.nnx_apply(model), x, sparsity=0.5, pin=pin)
    small = nnx_modules.nnx_module(model, pruned.masks, x)
    assert shapes(small) != shapes(model)
    assert_same(call(small, x), masked_output(model, pruned.masks, x))


def test_a_layer_of_ones_own_can_register_its_sizes():
    class Known(Remembering):
        pass

    @_nnx_layers.fit_sizes.register
    def _(layer: Known, kept):
        layer.width = layer.first.kernel.shape[-1]

    model, x = new(Known), normal(2, 5, 3)
    masks = masks_for(model, x, {FIRST + "1": 3})
    small = nnx_modules.nnx_module(model, masks, x)
    assert small.width == 3
    assert_same(call(small, x), masked_output(model, masks, x))


def test_zeros_in_the_weights_hide_nothing():
    model = new(lambda: between(nnx.LayerNorm(6, rngs=nnx.Rngs(0)), 6))
    model.last.kernel.set_value(jnp.zeros((4, 3)))
    masks = masks_for(model, IMAGES, {FIRST + "1": 3})
    with pytest.raises(ValueError, match="LayerNorm"):
        nnx_modules.nnx_module(model, masks, jnp.zeros((1, 3)))


def test_masks_may_come_from_any_way_to_split(pruned_net):
    model, masks, small = pruned_net
    quiet = nnx.clone(model)
    quiet.eval()
    graphdef, state = nnx.split(quiet)
    groups = jaxprune.trace(
        lambda state, x: nnx.merge(graphdef, state)(x), state, IMAGES
    )
    keep = {
        "conv/kernel:3": masks["batch_stats"]["norm"]["mean"],
        "body/0/kernel:3": masks["params"]["head"]["kernel"][:, 0],
    }
    for tree in (
        jaxprune.expand_masks(groups, keep),
        nnx.to_pure_dict(jaxprune.expand_masks(groups, keep)),
    ):
        again = nnx_modules.nnx_module(model, tree, IMAGES)
        assert sizes(again) == sizes(small)
        assert_equal_params(again, small)


def test_masks_for_another_model_are_errors(pruned_net):
    model, masks, _ = pruned_net
    missing = {name: masks[name] for name in masks if name != "batch_stats"}
    with pytest.raises(ValueError, match=r"no leaf for batch_stats/norm/mean"):
        nnx_modules.nnx_module(model, missing, IMAGES)
    unknown = masks | {"params": masks["params"] | {"tail": np.array(True)}}
    with pytest.raises(ValueError, match=r"a leaf params/tail, which the model does"):
        nnx_modules.nnx_module(model, unknown, IMAGES)
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda masks: nnx_modules.nnx_module(model, masks, IMAGES).head.kernel)(
            masks
        )


def test_nnx_apply_evaluates_without_noise():
    model = new(ConvNet)
    apply_fn, variables = nnx_modules.nnx_apply(model)
    assert set(variables) == {"params", "batch_stats", "rngs"}
    quiet = nnx.clone(model)
    quiet.eval()
    got = quick_jit(apply_fn)(variables, IMAGES)
    np.testing.assert_array_equal(got, call(quiet, IMAGES))
    assert not model.drop.deterministic


def test_nnx_apply_in_training_mode_returns_what_changed():
    model = new(ConvNet)
    apply_fn, variables = nnx_modules.nnx_apply(model, train=True)
    step = quick_jit(apply_fn)
    out, changed = step(variables, IMAGES)
    assert set(changed) == {"batch_stats", "rngs"}
    again, _ = step(variables | changed, IMAGES)
    assert difference(again, out) > 1e-2  # the mask of the dropout is another one
    expected = call_and_update(model, IMAGES)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    state = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert_same(changed["batch_stats"], state)


@nnx.jit
def call_and_update(model, x):
    return model(x)


def test_narrow_carries_statistics_and_noise_of_a_training_step():
    model = new(ConvNet)
    masks = masks_for(model, IMAGES, HALF)
    apply_fn, variables = nnx_modules.nnx_apply(model, train=True)
    small = jaxprune.slice_params(variables, masks)
    got = quick_jit(jaxprune.narrow(apply_fn, masks))(small, IMAGES)[1]["batch_stats"]
    masked = jaxprune.apply_masks(variables, masks)
    expected = quick_jit(apply_fn)(masked, IMAGES)[1]["batch_stats"]
    assert_same(got, jaxprune.slice_params(expected, masks["batch_stats"]))


def test_nnx_apply_takes_abstract_modules():
    groups = jaxprune.trace(*nnx_modules.nnx_apply(nnx.eval_shape(ConvNet)), IMAGES)
    assert [group.size for group in groups.values()] == [6, 8]


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(6, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.LayerNorm(name="layer_norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        self.sow("intermediates", "hidden", x)
        return nn.Dense(3, name="last")(x)


ROWS = normal(16, 4)


@pytest.fixture(scope="module")
def linen():
    """(original, variables, masks, small module, sliced variables)"""
    net = LinenNet()
    variables = quick_jit(net.init)(jax.random.key(0), ROWS)
    groups = jaxprune.trace(net.apply, variables, ROWS)
    keep = {"params/first/kernel:1": np.array([1, 0, 1, 1, 0, 1], bool)}
    masks = jaxprune.expand_masks(groups, keep)
    small = linen_modules.linen_module(net, masks)
    return net, variables, masks, small, jaxprune.slice_params(variables, masks)


def test_a_linen_module_applies_and_initialises(linen):
    net, variables, masks, small, sliced = linen
    masked = net.apply(jaxprune.apply_masks(variables, masks), ROWS)
    assert_same(small.apply(sliced, ROWS), masked)
    made = quick_jit(small.init)(jax.random.key(0), ROWS)
    assert jax.tree.structure(made) == jax.tree.structure(sliced)
    assert_same(made, sliced)
    assert "LinenNet" in repr(small)


def test_a_linen_module_trains_as_narrow_does(linen):
    net, _, masks, small, sliced = linen
    rngs, mutable = {"dropout": jax.random.key(5)}, ["batch_stats", "intermediates"]
    out, new = small.apply(sliced, ROWS, train=True, mutable=mutable, rngs=rngs)
    expected, updates = jaxprune.narrow(net.apply, masks)(
        sliced, ROWS, train=True, mutable=mutable, rngs=rngs
    )
    np.testing.assert_array_equal(out, expected)
    assert new["batch_stats"]["norm"]["mean"].shape == (4,)
    assert new["intermediates"]["hidden"][0].shape == (16, 4)
    assert jax.tree.structure(new) == jax.tree.structure(updates)
    jax.tree.map(np.testing.assert_array_equal, new, updates)


def test_a_linen_module_in_a_train_state(linen):
    net, variables, masks, small, sliced = linen
    traces = []

    def one_step(apply_fn, variables):
        def loss(params, state):
            traces.append(1)
            out = state.apply_fn(variables | {"params": params}, ROWS)
            return (out**2).mean()

        @quick_jit
        def step(state):
            return state.apply_gradients(grads=jax.grad(loss)(state.params, state))

        state = TrainState.create(
            apply_fn=apply_fn, params=variables["params"], tx=optax.sgd(0.1)
        )
        stepped = step(state)
        step(stepped)
        return stepped.params

    got = one_step(small.apply, sliced)
    assert len(traces) == 1  # the second step does not trace again
    masked = one_step(net.apply, jaxprune.apply_masks(variables, masks))
    assert_same(got, jaxprune.slice_params(masked, masks["params"]), floor=1e-2)


class Outer(nn.Module):
    backbone: nn.Module

    @nn.compact
    def __call__(self, x, *, train=False):
        a = self.backbone(x, train=train)
        return nn.Dense(2)(nn.relu(a) + self.backbone(-x, train=train))


def test_a_linen_module_inside_another(linen):
    net, _, masks, small, _ = linen
    whole, outer = Outer(net), Outer(small)
    variables = quick_jit(whole.init)(jax.random.key(1), ROWS)
    all_masks = jax.tree.map(lambda leaf: np.array(True), variables)
    for name in masks:
        all_masks[name]["backbone"] = masks[name]
    sliced = jaxprune.slice_params(variables, all_masks)
    made = quick_jit(outer.init)(jax.random.key(1), ROWS)
    assert_same(made, sliced)
    masked = jaxprune.apply_masks(variables, all_masks)
    assert_same(
        quick_jit(outer.apply)(sliced, ROWS), quick_jit(whole.apply)(masked, ROWS)
    )


def test_noise_inside_another_module_is_that_of_the_original():
    """Same streams by name, other draws at the second call."""

    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.Dense(32, name="first")(x)
            x = nn.Dropout(0.5, deterministic=not train)(x)
            return nn.Dense(3, name="last")(x)

    class Pair(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.inner(x, train=True), self.inner(x, train=True)

    net, x = Noise(), normal(4, 5)
    variables = net.init(jax.random.key(0), x, train=False)
    masks = jax.tree.map(lambda leaf: np.array(True), variables)
    small = linen_modules.linen_module(net, masks)
    inner = {"params": {"inner": variables["params"]}}
    rngs = {"dropout": jax.random.key(1)}
    first, second = Pair(small).apply(inner, x, rngs=rngs)
    expected, _ = Pair(net).apply(inner, x, rngs=rngs)
    assert_same(first, expected)
    assert difference(second, first) > 1e-2


def test_linen_errors(linen):
    _, variables, masks, small, sliced = linen
    with pytest.raises(ValueError, match="have not been sliced with these masks"):
        small.apply(variables, ROWS)
    with pytest.raises(ValueError, match="were the masks made for the same model"):
        small.apply({"params": sliced["params"]}, ROWS)
    with pytest.raises(TypeError, match="is a tracer"):
        jax.jit(lambda masks: linen_modules.linen_module(LinenNet(), masks))(masks)
