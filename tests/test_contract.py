"""The contract on every model of the zoo, and on programs composed at random."""

import hypothesis.strategies as st
import jax
import pytest
from contract import TOLERANCE, check_contract, difference, halve, largest, quick_jit
from hypothesis import given, settings
from zoo import MODELS
from zoo.composed import MOVES, compose

import jaxprune


@pytest.mark.parametrize("name", MODELS)
def test_narrow_equals_masked(name):
    model = MODELS[name]
    built = model.build()
    groups = check_contract(
        built.apply_fn,
        built.variables,
        built.inputs,
        mutated=model.mutated,
        reverse=model.reverse,
    )
    assert {n: group.size for n, group in groups.items()} == model.groups
    assert {n for n, group in groups.items() if not group.exact} == set(model.inexact)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(sorted(MOVES)), min_size=2, max_size=5))
def test_a_composed_program_keeps_the_contract(moves):
    apply_fn, variables, inputs = compose(moves)
    (x,) = inputs(2, 0)
    groups = jaxprune.trace(apply_fn, variables, x)
    assert groups  # at least the units of the first layer
    keep = halve(groups, 0)
    if not keep:
        return
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(variables, masks)
    got = quick_jit(jaxprune.narrow(apply_fn, masks))(small, x)
    expected = quick_jit(apply_fn)(jaxprune.apply_masks(variables, masks), x)
    assert largest(expected) > 1e-9  # products of small numbers are small
    assert difference(got, expected) < TOLERANCE


def test_every_move_can_be_composed_with_every_other():
    """A move keeps batch and time, and takes every width that another one leaves."""

    def width(moves):
        apply_fn, variables, inputs = compose(moves)
        assert jax.eval_shape(apply_fn, variables, *inputs(3, 0)).shape == (3, 4, 3)
        *_, last = variables.values()
        return last.shape[0]

    leaves = {width([move]): move for move in MOVES}
    assert set(leaves) == {4, 6, 8}
    for before in leaves.values():
        for move in MOVES:
            width([before, move])
