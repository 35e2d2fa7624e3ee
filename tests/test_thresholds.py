"""The exact bisection against a sorted list: ties, caps, wide counts, infinities."""

import jax.numpy as jnp
import numpy as np
import pytest
from contract import quick_jit

from jaxprune.select import _thresholds as thresholds

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
SHAPES = [(7, 9), (1, 1), (40,), (3, 3, 2, 4)]
VALUES = {
    "normal": lambda shape: RNG.normal(size=shape),
    "ties": lambda shape: RNG.integers(-2, 3, shape),
    "equal": lambda shape: np.ones(shape),
    "zeros of both signs": lambda shape: RNG.choice([0.0, -0.0], shape),
    "extremes": lambda shape: RNG.choice(
        [np.inf, -np.inf, 1e-40, -1e-40, 3.4e38, 0.0, 1.0], shape
    ),
}


def ranked(leaves, count, caps):
    """The slow way: every entry of every leaf in one sorted list, the later first."""
    flat = [np.asarray(leaf, np.float64).ravel() for leaf in leaves]
    rows = sorted(
        (value, -k, -place) for k, x in enumerate(flat) for place, value in enumerate(x)
    )
    gone, lost = [np.zeros(x.size, bool) for x in flat], [0] * len(flat)
    for _, k, place in rows:
        if sum(lost) < count and lost[-k] < caps[-k]:
            gone[-k][-place] = True
            lost[-k] += 1
    return [x.reshape(np.shape(leaf)) for x, leaf in zip(gone, leaves, strict=True)]


@quick_jit
def together(leaves, count, caps):
    """With traced caps, so that one program serves all; the library's are static."""
    wide = thresholds.Wide(count >> 16, count & 0xFFFF)
    return thresholds.lowest_together(leaves, wide, list(caps))


@pytest.fixture
def _unclipped(monkeypatch):
    monkeypatch.setattr(thresholds, "_clipped", lambda wanted, most: wanted)


@pytest.mark.usefixtures("_unclipped")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, np.float32) for kind in VALUES]
    + [("ties", jnp.bfloat16), ("normal", np.float16)],
)
def test_the_lowest_together(kind, dtype):
    for _ in range(6):
        leaves = [VALUES[kind](shape).astype(dtype) for shape in SHAPES]
        caps = [int(RNG.integers(0, leaf.size + 1)) for leaf in leaves]
        count = int(RNG.integers(0, sum(caps) + 1))
        got = together(leaves, jnp.uint32(count), [jnp.uint32(cap) for cap in caps])
        for a, b in zip(got, ranked(leaves, count, caps), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", VALUES)
def test_the_lowest_of_each(kind):
    each = quick_jit(thresholds.lowest_each)
    leaves = [VALUES[kind](shape).astype(np.float32) for shape in SHAPES]
    for share in (0.0, 0.4, 1.0):
        counts = [round(share * leaf.size) for leaf in leaves]
        got = each(leaves, [jnp.uint32(count) for count in counts])
        for leaf, mask, count in zip(leaves, got, counts, strict=True):
            np.testing.assert_array_equal(mask, ranked([leaf], count, [count])[0])


def test_a_static_count_is_clipped_to_the_caps():
    gone = thresholds.lowest_together([jnp.array([3.0, 1.0, 2.0])], 3, [2])
    np.testing.assert_array_equal(gone[0], [False, True, True])


def test_nan_is_the_largest_number():
    scores = [jnp.array([jnp.nan, jnp.inf, 1.0, -jnp.nan])]
    for count, expected in ((1, [2]), (2, [1, 2]), (3, [1, 2, 3])):
        gone = thresholds.lowest_each(scores, [count])[0]
        np.testing.assert_array_equal(np.flatnonzero(gone), expected)


def test_the_entry_at_a_place():
    leaves = [RNG.normal(size=shape).astype(np.float32) for shape in SHAPES]
    ascending = np.sort(np.concatenate([leaf.ravel() for leaf in leaves]))
    for k in (0, 60, ascending.size - 1):
        assert thresholds.kth_lowest(leaves, k) == ascending[k]


def test_counts_above_32_bits_do_not_overflow():
    numbers = [2**32 - 1, 2**32 - 5, 70_000, 0, 2**31]
    wide = thresholds._sum(jnp.array(numbers, jnp.uint32))
    assert (int(wide.high) << 16) + int(wide.low) == sum(numbers)
    below = thresholds._difference(wide, thresholds.wide(2**32 + 123))
    assert (int(below.high) << 16) + int(below.low) == sum(numbers) - 2**32 - 123
    assert bool(thresholds._less(thresholds.wide(2**40), thresholds.wide(2**40 + 1)))
    assert not bool(thresholds._less(thresholds.wide(2**40), thresholds.wide(2**40)))
    clipped = thresholds._clipped(thresholds.wide(2**41), 2**40 + 7)
    assert (int(clipped.high) << 16) + int(clipped.low) == 2**40 + 7
