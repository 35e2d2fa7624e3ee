import itertools

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.core._leaves import named_leaves, parameter_paths
from jaxprune.core._masks import apply_masks, expand_masks, sparsity

pytestmark = pytest.mark.once


def brute_force(groups, keep):
    """Entry by entry: dead if any unit that owns its position on any axis is dead."""
    masks = {path: np.ones(shape, bool) for path, shape in groups.shapes.items()}
    for name, units in keep.items():
        for member in groups[name].members:
            for unit, position in itertools.product(
                range(groups[name].size), range(member.repeats)
            ):
                if not units[unit]:
                    entry = [slice(None)] * masks[member.path].ndim
                    entry[member.axis] = member.index[unit, position]
                    masks[member.path][tuple(entry)] = False
    return masks


@pytest.mark.parametrize("seed", range(3))
def test_expand_masks_equals_entrywise_definition(seed):
    groups, keep = chain.groups(), chain.random_keep(seed)
    masks = named_leaves(expand_masks(groups, keep))
    for path, expected in brute_force(groups, keep).items():
        actual = np.broadcast_to(masks[path], expected.shape)
        np.testing.assert_array_equal(actual, expected, err_msg=path)


def test_masks_are_as_small_as_they_can_be():
    groups = chain.groups()
    keep = {"conv1": np.array([True, False, True, True]), "dense": np.ones(5, bool)}
    masks = expand_masks(groups, keep)
    assert jax.tree.structure(masks) == groups.treedef
    shapes = {path: mask.shape for path, mask in named_leaves(masks).items()}
    assert shapes == {
        "batch_stats/bn/mean": (4,),
        "batch_stats/bn/var": (4,),
        "params/bn/bias": (4,),
        "params/bn/scale": (4,),
        "params/conv1/kernel": (1, 1, 1, 4),
        "params/conv2/kernel": (1, 1, 4, 1),
        "params/dense/bias": (),
        "params/dense/kernel": (),
        "params/heads/kernel": (),
    }
    assert all(isinstance(mask, np.ndarray) for mask in jax.tree.leaves(masks))
    both = expand_masks(groups, chain.random_keep())
    assert both["params"]["conv2"]["kernel"].shape == (1, 1, 4, 6)


def test_a_position_needs_every_unit_that_lives_on_it():
    keep = {"head": np.array([True, False]), "head_dim": np.array([True, False, True])}
    masks = expand_masks(chain.groups(), keep)
    np.testing.assert_array_equal(
        masks["params"]["heads"]["kernel"], [[True, False, True, False, False, False]]
    )


def test_expand_masks_under_jit_equals_outside():
    groups, keep = chain.groups(), chain.random_keep()
    traced = named_leaves(jax.jit(lambda keep: expand_masks(groups, keep))(keep))
    for path, mask in named_leaves(expand_masks(groups, keep)).items():
        np.testing.assert_array_equal(traced[path], mask, err_msg=path)


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ({"conv3": np.ones(4, bool)}, ValueError, "'conv3'.*did you mean conv"),
        ({"conv1": np.ones(5, bool)}, ValueError, r"keep\[conv1\].*\(5,\).*4 units"),
        ({"conv1": np.ones(4)}, TypeError, r"keep\[conv1\] must be boolean.*float64"),
    ],
)
def test_expand_masks_refuses(keep, error, message):
    with pytest.raises(error, match=message):
        expand_masks(chain.groups(), keep)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_])
def test_apply_masks_keeps_dtype_and_selects(dtype):
    params = {"w": jnp.ones((2, 3), dtype), "b": jnp.ones(3, dtype)}
    masks = {"w": np.array([[True, False, True]]), "b": np.array(True)}
    masked = jax.jit(apply_masks)(params, masks)
    assert masked["w"].dtype == dtype
    np.testing.assert_array_equal(masked["w"], np.array([[1, 0, 1], [1, 0, 1]], dtype))
    np.testing.assert_array_equal(masked["b"], np.ones(3, dtype))


def test_removed_infinities_leave_neither_value_nor_gradient():
    params = {"w": jnp.array([1.0, jnp.inf, jnp.nan])}
    masks = {"w": np.array([True, False, False])}
    total = lambda p: jnp.sum(apply_masks(p, masks)["w"] ** 2)  # noqa: E731
    assert total(params) == 1.0
    np.testing.assert_array_equal(jax.grad(total)(params)["w"], [2.0, 0.0, 0.0])


def test_untouched_leaves_are_not_copied():
    params = {"w": jnp.ones(3)}
    assert apply_masks(params, {"w": np.array(True)})["w"] is params["w"]


def test_masks_must_fit_params():
    params = {"conv": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    kernel = {"kernel": np.ones((1, 3), bool)}
    with pytest.raises(ValueError, match=r"leaves without a mask: conv/bias"):
        apply_masks(params, {"conv": kernel})
    with pytest.raises(ValueError, match=r"masks without a leaf: conv/gate"):
        masks = {"bias": np.array(True), "gate": np.array(True)}
        apply_masks(params, {"conv": kernel | masks})
    with pytest.raises(ValueError, match=r"masks\[conv/kernel\].*\(1, 4\).*\(2, 3\)"):
        masks = {"kernel": np.ones((1, 4), bool), "bias": np.array(True)}
        apply_masks(params, {"conv": masks})
    with pytest.raises(ValueError, match=r"masks\[conv/kernel\].*\(3,\).*\(2, 3\)"):
        masks = {"kernel": np.ones(3, bool), "bias": np.array(True)}
        apply_masks(params, {"conv": masks})
    with pytest.raises(TypeError, match=r"masks\[conv/bias\] must be boolean"):
        apply_masks(params, {"conv": kernel | {"bias": np.ones(3)}})


def test_sparsity_counts_entries_of_the_full_shapes():
    groups, keep = chain.groups(), chain.random_keep()
    expected = list(brute_force(groups, keep).values())
    removed = sum((~mask).sum() for mask in expected)
    total = sum(mask.size for mask in expected)
    masks = expand_masks(groups, keep)
    assert sparsity(masks, chain.variables()) == removed / total
    on_device = jax.tree.map(jnp.asarray, masks)
    assert sparsity(on_device, jax.eval_shape(chain.variables)) == removed / total
    full = {"w": np.array([[True, False], [True, True]])}
    assert sparsity(full) == 0.25


def test_sparsity_never_guesses_what_a_broadcast_mask_stands_for():
    with pytest.raises(ValueError, match=r"masks\[w\].*\(1, 2\).*pass params"):
        sparsity({"w": np.ones((1, 2), bool)})
    with pytest.raises(TypeError, match=r"masks\[w\] is traced"):
        jax.jit(sparsity)({"w": np.ones(2, bool)})


def test_only_the_params_collection_holds_parameters():
    paths = ["batch_stats/bn/mean", "params/bn/scale", "params_ema/bn/scale"]
    assert parameter_paths(paths) == {"params/bn/scale"}
    assert parameter_paths(["conv/kernel", "params"]) == {"conv/kernel", "params"}
