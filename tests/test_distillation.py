"""Losses of distillation against closed forms; the teacher never gets a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune.training import distillation, ema_teacher, teacher_params

pytestmark = pytest.mark.once


def logits(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def softmax(z):
    z = np.asarray(z, np.float64)
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


STUDENT, TEACHER = logits(0, 5, 3), logits(1, 5, 3)
LABELS = jnp.array([0, 2, 1, 1, 0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets_and_their_gradients(temperature):
    soft, own = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    square = temperature**2
    crossed = -square * (soft * np.log(own)).sum(-1)
    divergence = square * (soft * np.log(soft / own)).sum(-1)
    options = {"temperature": temperature}
    found = distillation.soft_cross_entropy(STUDENT, TEACHER, **options)
    np.testing.assert_allclose(found, crossed, rtol=1e-5)
    found = distillation.kl_divergence(STUDENT, TEACHER, **options)
    np.testing.assert_allclose(found, divergence, rtol=1e-4, atol=1e-6)
    for loss in (distillation.soft_cross_entropy, distillation.kl_divergence):
        ours, theirs = jax.grad(
            lambda s, t, loss=loss: loss(s, t, **options).sum(), (0, 1)
        )(STUDENT, TEACHER)
        np.testing.assert_allclose(ours, temperature * (own - soft), atol=1e-5)
        np.testing.assert_array_equal(theirs, 0)


def test_in_place_is_its_formula_and_stops_the_teacher():
    narrow = logits(2, 5, 3)

    def entropy(z):
        return -np.log(softmax(z))[np.arange(5), LABELS]

    def loss(wide, *others):
        return distillation.in_place([wide, *others], LABELS, alpha=0.9, temperature=2)

    soft = distillation.soft_cross_entropy
    expected = entropy(TEACHER)
    for z in (STUDENT, narrow):
        expected = expected + 0.9 * soft(z, TEACHER, temperature=2) + 0.1 * entropy(z)
    np.testing.assert_allclose(loss(TEACHER, STUDENT, narrow), expected, rtol=1e-5)
    # The widest learns what it would learn alone.
    with_others, alone = (
        jax.grad(lambda z, more=more: loss(z, *more).sum())(TEACHER)
        for more in ((STUDENT, narrow), ())
    )
    np.testing.assert_allclose(with_others, alone, atol=1e-6)
    soft_labels = jax.nn.one_hot(LABELS, 3)
    np.testing.assert_allclose(
        distillation.in_place([TEACHER, STUDENT], soft_labels),
        distillation.in_place([TEACHER, STUDENT], LABELS),
        rtol=1e-5,
    )


def test_block_wise_is_its_formula():
    small, large = logits(3, 2, 4, 3), logits(4, 2, 4, 5)
    same, other = logits(5, 2, 6), logits(6, 2, 6)
    m = logits(7, 3, 5)
    found = distillation.block_wise([small, same], [large, other], [m, None])
    expected = (
        ((small @ m - large) ** 2).mean((1, 2)) + ((same - other) ** 2).mean(1)
    ) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    slopes = jax.grad(
        lambda a, t, m: distillation.block_wise([a], [t], [m]).sum(), (0, 1, 2)
    )(small, large, m)
    assert float(jnp.abs(slopes[0]).max()) > 0 and float(jnp.abs(slopes[2]).max()) > 0
    np.testing.assert_array_equal(slopes[1], 0)


def test_the_teacher_is_an_average():
    tx = optax.chain(optax.sgd(0.5), ema_teacher(0.9))
    params = {"w": jnp.array([8.0])}
    opt_state, average = tx.init(params), 8.0
    for step in range(4):
        updates, opt_state = tx.update({"w": jnp.array([2.0])}, opt_state, params)
        params = optax.apply_updates(params, updates)
        slow = min(0.9, (1 + step) / (10 + step))
        average = slow * average + (1 - slow) * float(params["w"][0])
    np.testing.assert_allclose(teacher_params(opt_state)["w"], [average], rtol=1e-5)
    assert params["w"][0] == 4.0  # the updates pass


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: distillation.kl_divergence(STUDENT, TEACHER[:2]), "same batch"),
        (
            lambda: distillation.kl_divergence(STUDENT, TEACHER, temperature=0.0),
            "temperature must be above 0, got 0.0",
        ),
        (
            lambda: distillation.in_place([STUDENT], LABELS, alpha=2.0),
            "alpha must be in",
        ),
        (lambda: distillation.in_place([], LABELS), "widest first"),
        (lambda: distillation.block_wise([STUDENT], []), "got 1 of the student, 0 of"),
        (
            lambda: distillation.block_wise([STUDENT], [TEACHER[:, :2]]),
            r"block 0: .* \(give a projection",
        ),
        (
            lambda: distillation.block_wise([STUDENT], [TEACHER], [jnp.ones((2, 3))]),
            r"block 0: a projection of shape \(2, 3\) does not map the 3",
        ),
        (lambda: teacher_params(optax.sgd(0.1).init({})), "holds 0 states"),
    ],
)
def test_nonsense_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
