"""Tricky structures: right, or refused with the reason; never wrong, never idle.

The expectations in `zoo.structures` are written by hand. A structure is right if
`trace` finds these groups, with these sizes, calls those inexact that are, and
narrowing a random half of every exact group equals masking it. Everything that cannot
be cut says why.
"""

import functools
from collections import Counter

import jax
import numpy as np
import pytest
from contract import TOLERANCE, difference, halve, largest
from zoo.structures import STRUCTURES

import jaxprune
from jaxprune.coupling._registry import RULES, Rule
from jaxprune.coupling.rules._factors import by_factors
from jaxprune.program.primitives import DECLARATIONS

# Axes that an input, an output or spatial axis of a convolution input holds go without saying.
# So does the axis of 3 in a fused kernel of q, k and v, whose other factors can be cut.
OBVIOUS = (
    "coupled to the input",
    "coupled to the output",
    "spatial axis of a convolution kernel",
    "spatial axis of a convolution input",
    "one factor of this axis",
    "an axis of size 1",
)


# Compiling is nearly all the time that these tests take.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def masked(apply_fn, variables, masks, args):
    return apply_fn(jaxprune.apply_masks(variables, masks), *args)


def gap(built, groups, keep, reference, seed):
    """Largest relative difference between the narrowed and the masked program."""
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(built.variables, masks)
    args = built.inputs(2, seed)
    expected = reference(built.variables, masks, args)
    got = quick_jit(jaxprune.narrow(built.apply_fn, masks))(small, *args)
    assert not largest(expected) < 1e-3  # nan where a masked unit is divided by
    return difference(got, expected)


def unexpected_groups(structure, groups):
    sizes = {name: group.size for name, group in groups.items()}
    if sizes != dict(structure.groups):
        yield f"groups {sizes}, expected {dict(structure.groups)}"
    why = {name: group.why for name, group in groups.items() if not group.exact}
    if set(why) != set(structure.inexact):
        yield f"inexact {why}, expected {dict(structure.inexact)}"
    for name, word in structure.inexact.items():
        if word not in why.get(name, ""):
            yield f"{name} is inexact because {why.get(name)!r}, expected {word!r}"


def unexpected_pins(structure, groups):
    pinned = {f"{pin.path}:{pin.axis}": pin.why for pin in groups.pinned}
    for name, word in structure.refused.items():
        if word not in pinned.get(name, ""):
            yield f"{name} is pinned because {pinned.get(name)!r}, expected {word!r}"
    for name, why in pinned.items():
        obvious = any(why.startswith(text) for text in OBVIOUS)
        if name not in structure.refused and not obvious:
            yield f"{name} is pinned: {why}"


def differences(structure, built, groups):
    """Compares narrowed and masked: equal for exact groups, different for others."""
    reference = quick_jit(functools.partial(masked, built.apply_fn))
    exact = [name for name, group in groups.items() if group.exact]
    for seed in (0, 1) if exact else ():
        found = gap(built, groups, halve(groups, seed), reference, seed)
        if not found < TOLERANCE:
            yield f"narrowed and masked differ by {found:.1e}"
    for name in structure.inexact:
        found = gap(built, groups, halve(groups, 0, [name]), reference, 0)
        if found < 10 * TOLERANCE:
            yield f"{name} is called inexact, but differs by {found:.1e} only"


def outcome(name):
    """Right, refused (what the structure is about, with the reason), or all wrongs."""
    structure = STRUCTURES[name]
    built = structure.build()
    groups = jaxprune.trace(built.apply_fn, built.variables, *built.inputs(2, 0))
    wrong = [
        *unexpected_groups(structure, groups),
        *unexpected_pins(structure, groups),
    ]
    wrong = wrong or list(differences(structure, built, groups))
    if wrong:
        return "; ".join(wrong)
    return "refused" if structure.subject_refused else "right"


EXPECTED = {
    name: "refused" if structure.subject_refused else "right"
    for name, structure in STRUCTURES.items()
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure(name):
    assert outcome(name) == EXPECTED[name]


# Torch-Pruning 1.6.1 was measured on 78 of the structures and is right on 22 of them.
RIVAL = {
    "right": 22,
    "wrong": 6,
    "idle": 16,
    "crash": 31,
    "hang": 1,
    "output": 2,
    "thread": 66,
}
SCORE = {"right": 134, "refused": 10}  # and 0 wrong


def test_score():
    """Of the outcomes that `test_structure` holds every structure to."""
    assert Counter(s.rival for s in STRUCTURES.values()) == RIVAL
    measured = [name for name, s in STRUCTURES.items() if s.rival != "thread"]
    assert Counter(EXPECTED[name] for name in measured) == {"right": 78}
    assert Counter(EXPECTED.values()) == SCORE


EVERY = np.arange(6)[:, None]
CELL = np.arange(36).reshape(6, 6)
BOTH = np.array([0, 6])  # a unit in each half of 12
ROWS = {  # (structure, group, leaf:axis) -> the positions of each of the 6 units
    ("flatten_nchw_4x4", "stem:0", "dense:0"): 16 * EVERY + np.arange(16),
    ("flatten_nhwc_of_nchw", "stem:0", "w:0"): EVERY + 6 * np.arange(16),
    ("concat_with_the_input", "stem:3", "w:2"): 3 + EVERY,
    ("concat_relu_of_both_signs", "stem:3", "w:2"): EVERY + BOTH,
    ("concat_swapped_slices", "stem:3", "w:2"): (EVERY - 2) % 6,
    ("flip_channels", "stem:3", "w:2"): 5 - EVERY,
    ("channel_shuffle", "stem:3", "w:2"): np.array([0, 2, 4, 1, 3, 5])[:, None],
    ("channel_repeat", "stem:3", "w:2"): 2 * EVERY + np.arange(2),
    ("space_to_depth", "stem:3", "deep:2"): 4 * EVERY + np.arange(4),
    ("swiglu_fused", "fused:1", "fused:1"): EVERY + BOTH,
    ("lstm_one_kernel", "input:1", "hidden:1"): EVERY + 6 * np.arange(4),
    ("gram_matrix", "stem:3", "w:0"): np.array(
        [sorted({*CELL[k], *CELL[:, k]}) for k in range(6)]
    ),
}


@pytest.mark.parametrize(("name", "group", "axis"), ROWS)
def test_positions(name, group, axis):
    built = STRUCTURES[name].build()
    groups = jaxprune.trace(built.apply_fn, built.variables, *built.inputs(2, 0))
    found = {f"{m.path}:{m.axis}": m.index for m in groups[group].members}
    np.testing.assert_array_equal(found[axis], ROWS[name, group, axis])


def test_the_checks_can_fail(monkeypatch):
    """A rule that is wrong in any way is seen."""
    rules = {
        "rev": lambda walk, eqn, value: value,  # forgets to reverse the labels
        "reduce_prod": by_factors,  # claims that zeros do not count
        "tanh": lambda walk, eqn, value: walk.unknown(eqn, value)[0],  # cuts nothing
    }
    for primitive, name, word in (
        ("rev", "flip_channels", "differ by"),
        ("reduce_prod", "product_over_channels", "inexact {}"),
        ("tanh", "own_parameters_linear", "has no rule"),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(RULES, primitive, Rule(rules[primitive]))
            if primitive == "reduce_prod":
                patched.setitem(DECLARATIONS, primitive, DECLARATIONS["reduce_sum"])
            assert word in outcome(name)
