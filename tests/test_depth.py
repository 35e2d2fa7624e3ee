"""Removing a branch is cutting every unit that writes to it: depth is just a group."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_same

import jaxprune


class Net(nn.Module):
    """A convolutional and an attention branch on one residual stream."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm():
            return nn.BatchNorm(use_running_average=not train)

        x = nn.relu(norm()(nn.Conv(8, (3, 3))(x)))
        y = nn.relu(norm()(nn.Conv(6, (3, 3))(x)))
        x = nn.relu(x + norm()(nn.Conv(8, (3, 3), name="last")(y)))
        x = x.reshape(x.shape[0], -1, 8)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return nn.Dense(3)(x.mean(1))


STREAM = "params/Conv_0/kernel:3"
CONV = "params/Conv_1/kernel:3"
HEADS = "params/attention/query/kernel:1"
X = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    shapes = jax.eval_shape(Net().init, jax.random.key(0), X)
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda s: rng.uniform(0.1, 0.6, s.shape).astype(np.float32), shapes
    )


@pytest.mark.parametrize("stream", [None, 4])
@pytest.mark.parametrize("branch", [CONV, HEADS])
def test_a_branch_without_units_is_gone(variables, branch, stream):
    groups = jaxprune.trace(Net().apply, variables, X)
    keep = {branch: np.zeros(groups[branch].size, bool)}
    if stream is not None:
        keep[STREAM] = np.arange(8) % 2 == 0
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(variables, masks)
    narrowed = jax.jit(jaxprune.narrow(Net().apply, masks))
    expected = Net().apply(jaxprune.apply_masks(variables, masks), X)
    assert_same(narrowed(small, X), expected)
    # The work of the branch is gone too, not only its weights.
    text = narrowed.lower(small, X).compile().as_text()
    assert text.count(" convolution(") == {CONV: 1, HEADS: 3}[branch]


def test_the_small_model_without_a_branch_trains(variables):
    groups = jaxprune.trace(Net().apply, variables, X)
    masks = jaxprune.expand_masks(groups, {CONV: np.zeros(6, bool)})
    small = jaxprune.slice_params(variables, masks)
    narrowed = jaxprune.narrow(Net().apply, masks)

    def loss(params):
        tree = {**small, "params": params}
        out, new = narrowed(tree, X, train=True, mutable=["batch_stats"])
        return jnp.square(out).sum(), new

    grads, new = jax.grad(loss, has_aux=True)(small["params"])
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, small["params"])
    stats = jax.tree.map(jnp.shape, new["batch_stats"])
    assert stats == jax.tree.map(jnp.shape, small["batch_stats"])
