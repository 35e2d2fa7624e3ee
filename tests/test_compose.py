from functools import partial

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxprune import apply_masks
from jaxprune.surgery import compose_masks, slice_params, unslice_params


@st.composite
def two_cuts(draw):
    shape = draw(st.tuples(*[st.integers(2, 5)] * 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))

    kinds = draw(st.sampled_from([["whole", "units"], ["units", "entries"]]))

    def mask(shape):
        kind = draw(st.sampled_from(kinds))
        if kind == "whole":
            return np.array(True)
        if kind == "entries":
            return rng.random(shape) < 0.6
        lines = [np.ones(n, bool) for n in shape]
        for axis in rng.permutation(3)[: rng.integers(1, 4)]:
            lines[axis] = rng.random(shape[axis]) < 0.6
            lines[axis][rng.integers(shape[axis])] = True
        kept = np.einsum("i,j,k->ijk", *lines)
        for axis in range(3):
            if lines[axis].all() and draw(st.booleans()):
                kept = kept.max(axis=axis, keepdims=True)
        return kept

    params = {"w": rng.normal(size=shape)}
    first = {"w": mask(shape)}
    small = slice_params(params, first, mixed=True)["w"].shape
    hypothesis.assume(min(small) > 0)
    return params, first, {"w": mask(small)}, "whole" in kinds


@hypothesis.given(two_cuts())
@hypothesis.settings(max_examples=150, deadline=None)
def test_one_cut_after_the_other_is_one_cut(case):
    params, first, second, units = case
    cut = partial(slice_params, mixed=True)  # single entries go too
    small = cut(cut(params, first), second)
    full = unslice_params(unslice_params(small, second), first)
    composed = compose_masks(first, second)
    np.testing.assert_array_equal(apply_masks(params, composed)["w"], full["w"])
    if units:
        np.testing.assert_array_equal(cut(params, composed)["w"], small["w"])


def test_a_mask_of_other_variables_is_refused():
    first = {"w": np.array([True, False, True])}
    with pytest.raises(ValueError, match="size 3 on axis 0, but the first leaves 2"):
        compose_masks(first, {"w": np.array([True, False, True])})
