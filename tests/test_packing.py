"""Packed masks: what goes in comes out, at one bit per weight, sliced or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.core._masks import apply_masks
from jaxprune.core._packing import PackedMasks, pack_masks, slice_packed, unpack_masks
from jaxprune.surgery._slicing import slice_params

pytestmark = pytest.mark.once

SHAPES = [(7,), (1, 1), (5, 10), (8, 3), (64, 9, 3, 3), (3, 0)]


def random_mask(shape, seed=0):
    return np.random.default_rng(seed).random(shape) < 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape):
    mask, params = {"w": random_mask(shape)}, {"w": np.zeros(shape, np.float32)}
    packed = pack_masks(mask, params)
    bits = packed.bits["w"]
    assert bits.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack_masks(packed, params)["w"], mask["w"])
    again = pack_masks(unpack_masks(packed, params), params, like=packed)
    np.testing.assert_array_equal(again.bits["w"], bits)


def test_one_bit_per_weight_where_eight_divides_an_axis():
    for shape in ((8, 3), (64, 9, 3, 3), (3, 3, 64, 128), (784, 300)):
        like = [jax.ShapeDtypeStruct(shape, bool)]
        bits = jax.eval_shape(pack_masks, like, like).bits[0]
        assert bits.size * 8 == np.prod(shape)
    # Along the last axis the bytes are numpy's.
    mask = random_mask((5, 24))
    bits = pack_masks([mask], [mask]).bits[0]
    np.testing.assert_array_equal(bits, np.packbits(mask, axis=-1))


def test_broadcast_masks_stay_as_they_are():
    params = {"a": np.zeros((3, 3, 4, 8)), "b": np.zeros(8), "c": np.zeros(())}
    masks = {"a": random_mask((1, 1, 1, 8)), "b": np.array(True), "c": np.array(True)}
    packed = pack_masks(masks, params)
    for name in masks:
        assert packed.bits[name].dtype == bool
        assert packed.bits[name].shape == masks[name].shape
        np.testing.assert_array_equal(unpack_masks(packed, params)[name], masks[name])


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((6, 24), (1,)), ((24, 6), (0, 1)), ((9, 5), (1,)), ((3, 16, 5), (0, 1))],
    ids=str,
)
def test_slicing_packed_is_packing_sliced(shape, axes):
    params, mask = {"w": np.ones(shape, np.float32)}, {"w": random_mask(shape)}
    cut = np.array(True)
    for axis in axes:
        keep = random_mask(shape[axis], seed=axis + 1)
        keep[0] = True
        cut = cut & keep.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    small = slice_params(params, {"w": cut})
    packed = slice_packed(pack_masks(mask, params), {"w": cut})
    expected = slice_params(apply_masks(params, mask), {"w": cut})["w"]
    np.testing.assert_array_equal(unpack_masks(packed, small)["w"], expected != 0)
    # A second round of slicing works on the first.
    half = {"w": np.arange(expected.shape[0]).reshape(-1, *[1] * (cut.ndim - 1)) < 2}
    again = slice_packed(packed, half)
    smaller = slice_params(small, half)
    np.testing.assert_array_equal(unpack_masks(again, smaller)["w"], expected[:2] != 0)


def test_slicing_broadcast_masks():
    mask = np.array([[True, False, True, True]])
    packed = PackedMasks({"w": jnp.asarray(mask), "b": jnp.array(True)})
    cut = {"w": np.array([[True], [False]]) & mask, "b": mask[0]}
    small = slice_packed(packed, cut).bits
    assert small["w"].shape == (1, 3) and small["b"].shape == ()


def test_errors_name_the_leaf():
    packed = pack_masks({"w": random_mask((5, 16))}, {"w": np.zeros((5, 16))})
    with pytest.raises(ValueError, match=r"of w has shape \(5, 2\), but a leaf of .*3"):
        unpack_masks(packed, {"w": np.zeros((5, 24))})
    with pytest.raises(ValueError, match="differ in v, w; was the"):
        unpack_masks(packed, {"v": np.zeros((5, 16))})
    with pytest.raises(
        ValueError, match=r"of w has 5 entries on axis 0, but masks\[w\] has 4"
    ):
        slice_packed(packed, {"w": np.array([[True], [True], [False], [True]])})
    with pytest.raises(ValueError, match="removes the whole leaf"):
        slice_packed(packed, {"w": np.array(False)})
