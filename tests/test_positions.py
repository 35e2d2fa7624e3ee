"""Positions: what is remembered of a mask is what reading it would tell."""

import gc
import itertools

import chain
import jax
import numpy as np
import pytest

import jaxprune.core._positions
from jaxprune.core._masks import expand_masks
from jaxprune.core._positions import axis_keep, keeps_whole_positions, outer_mask


def test_axis_keep_is_any_over_the_other_axes():
    rng = np.random.default_rng(0)
    mask = rng.random((3, 4, 5)) < 0.1
    mask[0] = mask[:, 1] = False
    mask[1, 0, :] = True
    for axis, kept in enumerate(axis_keep(mask, mask.shape)):
        alive = [mask.take(i, axis).any() for i in range(mask.shape[axis])]
        np.testing.assert_array_equal(np.array(alive) if kept is None else kept, alive)
    assert axis_keep(mask, mask.shape)[2] is None
    assert axis_keep(np.array(True), (3, 4)) == (None, None)
    rows, columns = axis_keep(np.zeros((1, 2), bool), (3, 2))
    assert rows is None  # a singleton axis says nothing about positions
    np.testing.assert_array_equal(columns, [False] * 2)


def keeps(size):
    """All, none and some of the positions of an axis."""
    rng = np.random.default_rng(size)
    return [np.ones(size, bool), np.zeros(size, bool), rng.random(size) < 0.6]


@pytest.mark.parametrize("axes", [(), (0,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_an_outer_mask_is_what_reading_it_tells(axes):
    shape = (5, 1, 7)
    for each in itertools.product(*(keeps(shape[axis]) for axis in axes)):
        cut = {axis: kept.copy() for axis, kept in zip(axes, each, strict=True)}
        mask = outer_mask(cut, 3)
        expected = np.ones(shape, bool)
        for axis, kept in zip(axes, each, strict=True):
            expected &= kept.reshape([-1 if d == axis else 1 for d in range(3)])
        np.testing.assert_array_equal(np.broadcast_to(mask, shape), expected)
        read = mask.copy()
        told, seen = axis_keep(mask, shape), axis_keep(read, shape)
        for one, other in zip(told, seen, strict=True):
            assert (one is None) == (other is None)
            np.testing.assert_array_equal(one, other)
        assert keeps_whole_positions(mask, told) == keeps_whole_positions(read, seen)


def test_whole_positions_by_hand():
    kept = np.array([True, False, True])
    mask = np.outer([True, True], kept)
    assert keeps_whole_positions(mask, axis_keep(mask, (2, 3)))
    mask[0, 0] = False
    assert not keeps_whole_positions(mask, axis_keep(mask, (2, 3)))


def test_what_is_remembered_cannot_be_changed():
    masks = expand_masks(chain.groups(), chain.random_keep())
    for mask in jax.tree.leaves(masks):
        if mask.ndim:
            with pytest.raises(ValueError, match="read-only"):
                mask[...] = True
            with pytest.raises(ValueError, match="cannot set WRITEABLE"):
                mask.flags.writeable = True


def test_nothing_is_remembered_of_masks_that_are_gone(quick_gc):
    before = len(jaxprune.core._positions._OUTER)
    masks = expand_masks(chain.groups(), chain.random_keep())
    assert len(jaxprune.core._positions._OUTER) > before
    del masks
    gc.collect()
    assert len(jaxprune.core._positions._OUTER) == before


def test_masks_that_outlive_the_names_of_the_module_go_in_silence(monkeypatch):
    """When a process ends, names are None before the last masks are gone."""
    table = jaxprune.core._positions._OUTER
    mask = outer_mask({0: np.array([True, False])}, 2)
    key = id(mask)
    assert key in table
    monkeypatch.setattr(jaxprune.core._positions, "_OUTER", None)
    del mask  # what raises in a callback is a warning, and so an error
    assert key not in table
