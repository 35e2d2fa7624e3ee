"""Optax's whole list against `slice_opt_state`: exact, approximate, or refused.

Exact: one more step on sliced parameters is the step of the masked model, sliced.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import apply_masks
from jaxprune.surgery import slice_opt_state, slice_params

pytestmark = pytest.mark.once

SGD = optax.sgd(0.1, momentum=0.9)
KEY = jax.random.key(0)
SAM = optax.contrib.sam(  # hands nothing on
    optax.sgd(1e-2), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
)


def named(*names, rate=1e-2, where=optax):
    return {name: (getattr(where, name), (rate,)) for name in names}


def before(*links):
    return lambda: optax.chain(*links, SGD)


# Optimisers, wrappers, and links with a state or a mix of entries; how they are made.
EXACT = {
    **named(
        *("adabelief", "adadelta", "adagrad", "adam", "adamax", "adamaxw", "adamw"),
        *("adan", "amsgrad", "fromage", "lars", "lion", "nadam", "nadamw", "novograd"),
        *("optimistic_adam_v2", "optimistic_gradient_descent", "radam", "rmsprop"),
        *("rprop", "sgd", "sign_sgd", "signum", "yogi"),
    ),
    **named(
        *("acprop", "ademamix", "adopt", "cocob", "madgrad", "schedule_free_adamw"),
        *("schedule_free_sgd", "simplified_ademamix"),
        where=optax.contrib,
    ),
    "dadapt_adamw": (optax.contrib.dadapt_adamw, (1.0,)),
    "prodigy": (optax.contrib.prodigy, (1.0,)),
    "noisy_sgd": (lambda: optax.noisy_sgd(1e-2, eta=0.0, key=KEY), ()),
    "polyak_sgd": (optax.polyak_sgd, ()),
    "momo": (optax.contrib.momo, (1.0,)),
    "mechanize": (optax.contrib.mechanize, (optax.sgd(1.0),)),
    "schedule_free": (optax.contrib.schedule_free, (optax.sgd(1e-2), 1e-2)),
    "sam": (lambda: SAM, ()),
    "split_real_and_imaginary": (
        optax.contrib.split_real_and_imaginary,
        (optax.adam(1e-2),),
    ),
    "reduce_on_plateau": (before(optax.contrib.reduce_on_plateau()), ()),
    "normalize": (before(optax.contrib.normalize()), ()),
    "adaptive_grad_clip": (before(optax.adaptive_grad_clip(0.1)), ()),
    "add_noise": (before(optax.add_noise(0.0, 0.5, KEY)), ()),
    "apply_every": (lambda: optax.chain(optax.adam(1e-2), optax.apply_every(2)), ()),
    "apply_if_finite": (optax.apply_if_finite, (optax.adam(1e-2), 3)),
    "clip_by_global_norm": (before(optax.clip_by_global_norm(0.1)), ()),
    "ema": (before(optax.ema(0.9)), ()),
    "inject_hyperparams": (lambda: optax.inject_hyperparams(optax.adam)(1e-2), ()),
    "normalize_by_update_norm": (before(optax.normalize_by_update_norm()), ()),
    "scale_by_param_block_norm": (before(optax.scale_by_param_block_norm()), ()),
    "scale_by_trust_ratio": (before(optax.scale_by_trust_ratio()), ()),
}
APPROXIMATE = {
    "centralize": (before(optax.centralize()), ()),  # means over an axis
    "clip_by_block_rms": (before(optax.clip_by_block_rms(0.1)), ()),  # means
    "dog": (optax.contrib.dog, (1.0,)),  # distance from the dense start
    "dowg": (optax.contrib.dowg, (1.0,)),
    "lamb": named("lamb")["lamb"],  # momentum of removed weights in a norm
    "momo_adam": (optax.contrib.momo_adam, (1.0,)),  # momentum of removed weights
    "muon": named("muon", where=optax.contrib)["muon"],  # a factor of the shape
    "scale_by_param_block_rms": (before(optax.scale_by_param_block_rms()), ()),
}
REFUSED = {
    "adafactor": named("adafactor")["adafactor"],  # rows and columns
    "flatten": (optax.flatten, (optax.adam(1e-2),)),  # one vector
    "galore": (optax.contrib.galore, (1e-2, 2)),  # projections
    "lbfgs": (lambda: optax.lbfgs(1e-2, linesearch=None), ()),  # stacked history
    "scale_by_distance_over_gradients": (optax.scale_by_distance_over_gradients, ()),
    "sm3": named("sm3")["sm3"],  # maxima along axes
}
# Parts of the optimisers above; wrappers that hand on what is inside; links without a
# state or a statistic; and what needs more than gradients to take a step.
COVERED = {
    *(
        "scale_by_adadelta scale_by_adam scale_by_adamax scale_by_adan scale_by_amsgrad"
    ).split(),
    *("scale_by_belief scale_by_lbfgs scale_by_lion scale_by_novograd").split(),
    *(
        "scale_by_optimistic_gradient scale_by_polyak scale_by_radam scale_by_rms"
    ).split(),
    *("scale_by_rprop scale_by_rss scale_by_sm3 scale_by_stddev scale_by_yogi").split(),
    *("scale_by_acprop scale_by_ademamix scale_by_adopt scale_by_cocob").split(),
    *("scale_by_galore scale_by_madgrad scale_by_muon trace").split(),
    *("scale_by_simplified_ademamix scale_by_hutchinson_adam").split(),
    *("chain named_chain masked multi_transform partition freeze").split(),
    *("selective_transform conditionally_mask conditionally_transform").split(),
    *("inject_stateful_hyperparams with_extra_args_support maybe_update").split(),
    *("add_decayed_weights clip identity keep_params_nonnegative scale").split(),
    *("scale_by_learning_rate scale_by_schedule scale_by_sign set_to_zero").split(),
    *("stateless stateless_with_tree_map zero_nans measure_with_ema snapshot").split(),
    *("lookahead scale_by_backtracking_linesearch scale_by_zoom_linesearch").split(),
    *("optimistic_adam sophia hutchinson_estimator_diag_hessian dpsgd").split(),
    *("differentially_private_aggregate").split(),
}
KEEP = np.array([1, 0, 1, 1, 0, 1, 0, 1], bool)
MASKS = {"w1": KEEP[None], "b": KEEP, "w2": KEEP[:, None]}


@pytest.fixture(autouse=True)
def standard():
    """Optax itself mixes Python floats and int32 counters, and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def weights():
    rng = np.random.default_rng(0)
    shapes = {"w1": (5, 8), "b": (8,), "w2": (8, 3)}
    return {
        path: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for path, shape in shapes.items()
    }


def test_every_transformation_of_optax_is_in_a_list():
    found = set()
    for module in (optax, optax.contrib):
        for name, fn in inspect.getmembers(module, inspect.isfunction):
            returns = str(inspect.signature(fn).return_annotation)
            if not name.startswith("_") and "GradientTransformation" in returns:
                found.add(name)
    listed = EXACT.keys() | APPROXIMATE.keys() | REFUSED.keys() | COVERED
    assert not found - listed, "try them, and say what slice_opt_state does"


def train(tx, params, opt_state, masks, steps):
    """Steps whose gradients and weights obey the masks."""

    def loss(p):
        return sum(jnp.sum(jnp.sin(w) + 0.25 * w**2) + 4.0 for w in p.values())

    for _ in range(steps):
        value, grads = jax.value_and_grad(loss)(params)
        grads = apply_masks(grads, masks)
        extra = {} if tx is SAM else {"value": value}
        updates, opt_state = optax.with_extra_args_support(tx).update(
            grads, opt_state, params, **extra
        )
        params = apply_masks(optax.apply_updates(params, updates), masks)
    return params, opt_state


def warm(tx):
    all_stay = jax.tree.map(lambda _: np.array(True), weights())
    return *train(tx, weights(), tx.init(weights()), all_stay, 2), all_stay


@pytest.mark.parametrize("name", [*EXACT, *APPROXIMATE])
def test_a_step_after_slicing(name):
    make, arguments = {**EXACT, **APPROXIMATE}[name]
    tx = make(*arguments)
    params, opt_state, all_stay = warm(tx)
    small = slice_params(params, MASKS)
    small_state = slice_opt_state(tx, opt_state, MASKS)
    facts = jax.tree.map(lambda x: (x.shape, x.dtype), small_state)
    like = jax.eval_shape(tx.init, small)
    assert facts == jax.tree.map(lambda x: (x.shape, x.dtype), like)
    if name in APPROXIMATE:
        return
    masked, _ = train(tx, apply_masks(params, MASKS), opt_state, MASKS, 2)
    after, _ = train(tx, small, small_state, all_stay, 2)
    for path, leaf in slice_params(masked, MASKS).items():
        np.testing.assert_allclose(after[path], leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sliced_is_refused(name):
    make, arguments = REFUSED[name]
    tx = make(*arguments)
    with pytest.raises(ValueError, match=r"cannot match opt_state|cannot slice"):
        slice_opt_state(tx, tx.init(weights()), MASKS)
