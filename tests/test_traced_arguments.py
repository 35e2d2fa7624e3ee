"""What reads values says which argument is traced, instead of JAX's own error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.io import export, save_pruned, save_safetensors
from jaxprune.select import clusters, remove_one


def net(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


P = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
X = jnp.ones((1, 3))
GROUPS = jaxprune.trace(net, P, X, roles=True)
FLOPS = jaxprune.cost_model(net, P, X).flops
KEEP = {"a:1": np.arange(4) < 2}
MASKS = jaxprune.expand_masks(GROUPS, KEEP)
BATCH = {"loss_fn": lambda v, x: net(v, x).sum(), "score": "taylor"}
NAMES = {"a:1": jnp.ones(4)}

CALLS = {
    "prune": (lambda f, v: jaxprune.prune(net, v, X, sparsity=0.5), P, "variables[a]"),
    "batches": (
        lambda f, v: jaxprune.prune(net, P, X, sparsity=0.5, batches=[v], **BATCH),
        X,
        "batches[0]",
    ),
    "plans.save": (lambda f, v: jaxprune.plans.save(f, GROUPS, v), NAMES, "keep[a:1]"),
    "checkpoints.save": (
        lambda f, v: jaxprune.checkpoints.save(f, 1, v),
        P,
        "state[a]",
    ),
    "save_exported": (
        lambda f, v: export.save_exported(f, net, v, X),
        P,
        "variables[a]",
    ),
    "save_pruned": (lambda f, v: save_pruned(f, net, v, MASKS, X), P, "variables[a]"),
    "save_safetensors": (lambda f, v: save_safetensors(f, v), P, "variables[a]"),
    "k_means": (
        lambda f, v: clusters.k_means(GROUPS, v, sparsity=0.5),
        P,
        "variables[a]",
    ),
    "merge": (
        lambda f, v: jaxprune.merge(P, GROUPS, v),
        {"a:1": np.zeros(4, int)},
        "clusters[a:1]",
    ),
    "remove_one": (lambda f, v: remove_one(GROUPS, v, FLOPS), NAMES, "scores[a:1]"),
    "remove_one keep": (
        lambda f, v: remove_one(GROUPS, NAMES, FLOPS, v),
        {"a:1": jnp.ones(4, bool)},
        "keep[a:1]",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_traced_argument_is_named(name, tmp_path):
    call, argument, expected = CALLS[name]
    target = tmp_path / "target"

    def inside(value):
        call(target, value)

    with pytest.raises(TypeError) as error:
        jax.jit(inside)(argument)
    assert type(error.value) is TypeError
    assert f"{expected} is traced" in str(error.value)
    assert "jit, grad and vmap" in str(error.value)
    assert not target.exists()


def test_what_reads_no_values_still_works_on_traced_ones():
    def merged(variables):
        return jaxprune.merge(variables, GROUPS, {"a:1": np.zeros(4, int)}).variables

    def pruned(variables):
        score = {"a:1": np.arange(4.0)}
        return jaxprune.prune(net, variables, X, sparsity=0.5, score=score).variables

    for fn in (merged, pruned):
        jax.tree.map(np.testing.assert_allclose, jax.jit(fn)(P), fn(P))
