import chain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import apply_masks, expand_masks
from jaxprune.surgery._slicing import slice_opt_state, slice_params, unslice_params


def by_hand(leaf, mask):
    """apply, then delete every index whose mask is all False, axis after axis."""
    mask = np.broadcast_to(mask, leaf.shape)
    leaf = np.where(mask, leaf, np.zeros((), leaf.dtype))
    for axis in range(leaf.ndim):
        dead = [i for i in range(leaf.shape[axis]) if not mask.take(i, axis).any()]
        leaf, mask = np.delete(leaf, dead, axis), np.delete(mask, dead, axis)
    return leaf


def structured():
    return expand_masks(chain.groups(), chain.random_keep())


def with_unstructured_rest(seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda mask, leaf: mask & (rng.random(leaf.shape) < 0.7),
        structured(),
        chain.variables(),
    )


@pytest.mark.parametrize("masks", [structured(), with_unstructured_rest()])
@pytest.mark.parametrize("to", [np.asarray, jnp.asarray])
def test_slice_is_apply_then_delete(masks, to):
    variables = jax.tree.map(to, chain.variables())
    small = named_leaves(slice_params(variables, masks, mixed=True))
    smaller = 0
    for path, leaf in named_leaves(variables).items():
        expected = by_hand(np.asarray(leaf), named_leaves(masks)[path])
        np.testing.assert_array_equal(small[path], expected, err_msg=path)
        assert isinstance(small[path], type(leaf))
        smaller += small[path].shape != leaf.shape
    assert smaller == len(small)


def test_dtypes_weak_types_and_untouched_leaves_survive():
    weak = jax.jit(lambda: jnp.broadcast_to(jnp.asarray(1.0), (3,)))()
    assert weak.weak_type
    params = {
        "bf16": jnp.ones(3, jnp.bfloat16),
        "np16": np.ones(3, jnp.bfloat16),
        "int": jnp.ones(3, jnp.int8),
        "weak": weak,
        "key": jax.random.key(0),
    }
    mask = np.array([True, False, True])
    masks = dict.fromkeys(params, mask) | {"key": np.array(True)}
    small = slice_params(params, masks)
    back = unslice_params(small, masks)
    assert small["key"] is params["key"] and back["key"] is params["key"]
    for name in ("bf16", "np16", "int", "weak"):
        assert small[name].shape == (2,) and back[name].shape == (3,)
        assert small[name].dtype == back[name].dtype == params[name].dtype
    assert small["weak"].weak_type and back["weak"].weak_type


def test_abstract_leaves_give_abstract_leaves():
    masks = with_unstructured_rest()
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, chain.variables()))
    small = slice_params(chain.variables(), masks, mixed=True)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), small)
    abstract_small = slice_params(abstract, masks, mixed=True)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_small) == shapes
    assert jax.tree.leaves(abstract_small)[0].sharding is None
    assert unslice_params(abstract_small, masks) == abstract


def test_values_may_be_traced_but_masks_may_not():
    variables, masks = chain.variables(), structured()
    inside = jax.jit(lambda v: slice_params(v, masks))(variables)
    jax.tree.map(np.testing.assert_array_equal, inside, slice_params(variables, masks))
    with pytest.raises(TypeError, match=r"masks\[batch_stats/bn/mean\] is traced"):
        jax.jit(slice_params)(variables, masks)
    with pytest.raises(TypeError, match=r"masks\[batch_stats/bn/mean\] is traced"):
        jax.jit(unslice_params)(inside, masks)


@pytest.mark.parametrize("masks", [structured(), with_unstructured_rest()])
@pytest.mark.parametrize("to", [np.asarray, jnp.asarray])
def test_unslice_inverts_slice_on_what_is_kept(masks, to):
    variables = jax.tree.map(to, chain.variables())
    small = slice_params(variables, masks, mixed=True)
    back = unslice_params(small, masks)
    jax.tree.map(np.testing.assert_array_equal, back, apply_masks(variables, masks))
    again = slice_params(back, masks, mixed=True)
    jax.tree.map(np.testing.assert_array_equal, again, small)


def test_unslice_ignores_what_training_put_on_removed_entries():
    masks = {"w": np.array([[True, False], [True, True], [False, False]])}
    back = unslice_params({"w": np.full((2, 2), 7.0)}, masks)
    np.testing.assert_array_equal(back["w"], [[7, 0], [7, 7], [0, 0]])


def test_masks_of_single_weights_do_not_cut_shapes():
    weights = np.array([[True, False], [False, False], [True, True]])
    params = {"a": np.ones((3, 2)), "b": np.ones(2)}
    masks = {"a": weights, "b": np.array(True)}
    with pytest.raises(
        ValueError,
        match=r"masks\[a\] removes single weights.*masks\[a\] whole .*axis 0",
    ):
        slice_params(params, masks)
    assert slice_params(params, masks, mixed=True)["a"].shape == (2, 2)
    # nothing is cut: the same as apply_masks
    masks["a"] = weights | np.eye(3, 2, dtype=bool)
    jax.tree.map(
        np.testing.assert_array_equal,
        slice_params(params, masks),
        apply_masks(params, masks),
    )


def test_an_axis_that_dies_wholly_is_cut_to_nothing():
    small = slice_params({"w": np.ones((2, 3))}, {"w": np.zeros((2, 3), bool)})
    assert small["w"].shape == (0, 0)
    back = unslice_params(small, {"w": np.zeros((2, 3), bool)})
    np.testing.assert_array_equal(back["w"], np.zeros((2, 3)))
    columns = {"w": np.zeros((1, 3), bool)}
    small = slice_params({"w": np.ones((2, 3))}, columns)
    assert small["w"].shape == (2, 0)
    np.testing.assert_array_equal(unslice_params(small, columns)["w"], np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"masks\[w\].* removes the whole leaf"):
        unslice_params(small, {"w": np.array(False)})


def test_errors_name_path_axis_and_numbers():
    params = {"w": np.ones((2, 3))}
    with pytest.raises(ValueError, match=r"masks\[w\].*\(2, 4\).*\(2, 3\)"):
        slice_params(params, {"w": np.ones((2, 4), bool)})
    mask = np.array([[True, False, True]])
    with pytest.raises(ValueError, match=r"w axis 1 has size 3, but .* keeps 2 of 3"):
        unslice_params(params, {"w": mask})
    with pytest.raises(ValueError, match=r"masks\[w\] .*need the same axes"):
        unslice_params(params, {"w": mask[0]})


OPTIMISERS = {
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.3),
    "lion": optax.lion(0.1),
    "novograd": optax.novograd(0.1),
    "clip": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)),
    "inject": optax.inject_hyperparams(optax.adam)(0.1),
    "multi_steps": optax.MultiSteps(optax.adam(0.1), 2),
    "masked": optax.masked(
        optax.adam(0.1), lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)
    ),
    "partition": optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)},
        lambda p: jax.tree.map(lambda leaf: "a" if leaf.ndim > 1 else "b", p),
    ),
}


@pytest.fixture
def standard_promotion():
    """Optax itself mixes Python floats and int32 counters."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("name", "steps"), [(name, 2) for name in OPTIMISERS] + [("multi_steps", 3)]
)
def test_a_step_after_slicing_is_the_masked_step_sliced(name, steps):
    def two(tree):
        return {"kernel": tree["conv2"]["kernel"], "bias": tree["dense"]["bias"]}

    tx, masks = OPTIMISERS[name], two(with_unstructured_rest()["params"])
    params = jax.tree.map(jnp.asarray, two(chain.variables()["params"]))
    gradient = jax.grad(
        lambda p: sum(jnp.sum(jnp.sin(leaf + 1.0)) for leaf in jax.tree.leaves(p))
    )

    def step(params, opt_state, masks):
        updates, opt_state = tx.update(
            apply_masks(gradient(params), masks), opt_state, params
        )
        return apply_masks(optax.apply_updates(params, updates), masks), opt_state

    keep_all = jax.tree.map(lambda _: np.array(True), params)
    opt_state = tx.init(params)
    for _ in range(steps):
        params, opt_state = step(params, opt_state, keep_all)

    small = slice_params(params, masks, mixed=True)
    small_state = slice_opt_state(tx, opt_state, masks, mixed=True)
    like = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tx.init(small))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), small_state) == like

    small_masks = slice_params(
        jax.tree.map(
            lambda leaf, mask: np.broadcast_to(mask, leaf.shape), params, masks
        ),
        masks,
        mixed=True,
    )
    masked = apply_masks(params, masks)
    for _ in range(2):
        masked, opt_state = step(masked, opt_state, masks)
        small, small_state = step(small, small_state, small_masks)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), masked, params)
    assert max(jax.tree.leaves(moved)) > 0.01
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
        small,
        slice_params(masked, masks, mixed=True),
    )


def test_momentum_of_removed_entries_inside_a_kept_axis_is_dropped():
    tx = optax.sgd(0.1, momentum=0.9)
    ones = jax.tree.map(jnp.ones_like, tx.init({"w": jnp.zeros((2, 2))}))
    masks = {"w": np.array([[True, False], [True, True]])}
    small = slice_opt_state(tx, ones, masks)
    np.testing.assert_array_equal(small[0].trace["w"], [[1, 0], [1, 1]])


def test_a_state_that_cannot_be_mapped_is_refused():
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    masks = {"w": np.array([[True, False, True, True]]), "b": np.array(True)}
    factored = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    with pytest.raises(
        ValueError, match=r"opt_state keeps \(3,\) numbers for w.*factored"
    ):
        slice_opt_state(factored, factored.init(params), masks)
    for tx in (optax.lbfgs(), optax.sm3(0.1)):
        with pytest.raises(ValueError, match="cannot match opt_state with masks"):
            slice_opt_state(tx, tx.init(params), masks)
    adam = optax.adam(0.1)
    with pytest.raises(ValueError, match=r"variables instead of variables\['params'\]"):
        slice_opt_state(adam, adam.init(params), {"params": masks})
    with pytest.raises(TypeError, match=r"masks\[b\] is traced"):
        jax.jit(lambda masks: slice_opt_state(adam, adam.init(params), masks))(masks)


def test_an_optimiser_state_refuses_masks_of_single_weights_that_empty_a_column():
    params = {"w1": np.ones((4, 6)), "w2": np.ones((6, 3))}
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    masks["w1"][:, 3] = masks["w1"][0, 0] = False
    tx = optax.adam(0.1)
    state = tx.init(jax.tree.map(jnp.asarray, params))
    with pytest.raises(ValueError, match=r"masks\[w1\] removes single weights"):
        slice_opt_state(tx, state, masks)
    assert slice_opt_state(tx, state, masks, mixed=True)[0].mu["w1"].shape == (4, 5)
