"""Labels of groups: what a person calls them, and that patterns mean them too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import MODELS

import jaxprune
from jaxprune.core._names import matching, nearest

pytestmark = pytest.mark.once


@functools.cache
def traced(name, **options):
    built = MODELS[name].build()
    return jaxprune.trace(
        built.apply_fn, built.variables, *built.inputs(2, 0), **options
    )


# Read off the architectures by hand.
LABELS = {
    "vit": [
        "residual stream",
        "block/attention heads",
        "block/attention/query head_dim",
        "block/attention/value head_dim",
        "block hidden",
    ],
    "resnet_projection": [
        "residual stream",
        "in0 channels",
        "in1 channels",
        "out1 channels",
    ],
    "resnet_identity": ["residual stream"],
    "lstm": ["embed hidden", "cell state", "dense hidden"],
    "stacked_layers": ["residual stream", "layers hidden"],
    "squeeze_excite": ["conv channels", "reduce channels"],
    "equinox": [
        "conv channels",
        "conv channels #2",
        "mlp/layers/0 hidden",
        "mlp/layers/1 hidden",
    ],
    "fused_qkv": ["qkv heads", "qkv head_dim"],
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_what_a_person_says(name):
    assert [group.label for group in traced(name).values()] == LABELS[name]


def test_two_streams_have_two_labels():
    labels = [group.label for group in traced("encoder_decoder").values()]
    assert len(set(labels)) == len(labels)
    assert {"embed_source residual stream", "embed_target residual stream"} <= {*labels}


def test_a_label_finds_its_group_and_patterns_mean_both():
    groups = traced("vit")
    heads = "params/block/attention/query/kernel:1"
    assert groups["block/attention heads"] is groups[heads]
    with pytest.raises(KeyError, match="block heads"):
        groups["block heads"]
    assert matching("*heads", groups) == [heads]
    assert matching("block hidden", groups) == ["params/block/up/kernel:1"]
    assert matching("*query*", groups) == [heads, heads[:-1] + "2"]
    assert nearest("residual steam", groups) == "; did you mean residual stream?"
    assert "params/block/up/kernel:1  block hidden" in repr(groups)


def test_options_by_group_take_labels():
    groups = traced("vit")
    scores = {name: np.arange(float(g.size)) for name, g in groups.items()}
    up = "params/block/up/kernel:1"
    keep = jaxprune.select.per_group(groups, scores, sparsity={"block hidden": 0.5})
    assert keep[up].sum() == 5 and len(keep) == 1
    only = jaxprune.select.per_group(groups, scores, sparsity=0.5, only="*hidden")
    np.testing.assert_array_equal(only[up], keep[up])
    with pytest.raises(ValueError, match="did you mean block hidden"):
        jaxprune.select.per_group(groups, scores, sparsity=0.5, only="blok hidden")


@pytest.mark.parametrize("kept", ["residual stream", "*heads", "*head_dim"])
def test_what_is_pinned_by_label_is_no_group(kept):
    groups = traced("vit")
    gone = set(matching(kept, groups))
    pinned = traced("vit", pin=kept)
    assert set(pinned) == set(groups) - gone
    assert {m.path for n in gone for m in groups[n].members} <= {
        pin.path for pin in pinned.pinned
    }


def test_a_pin_that_means_nothing_suggests_a_label():
    with pytest.raises(ValueError, match="did you mean residual stream"):
        traced("vit", pin="residual steam")


def net(params, x):
    for block in params:
        x = x + jax.nn.relu(x @ block["up"]) @ block["down"]
    return x


def test_blocks_that_repeat_are_one_row_with_one_label():
    block = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    text = repr(jaxprune.trace(net, [block] * 3, jnp.ones((1, 4))))
    assert "{0..2}/up:1  {0..2} hidden" in text
