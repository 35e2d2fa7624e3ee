"""Linear algebra under a batch that is cut: matrices stay, how many there are does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_same
from zoo import weights

import jaxprune

X = np.zeros((1,), np.float32)
SHAPES = {"a": (6, 3, 3), "b": (6, 3, 2), "v": (6, 3), "w": (6, 2)}
KEEP = np.array([True, False, True, False, False, True])


def positive(a):
    """Symmetric, and the identity where a is cut."""
    return jnp.einsum("nij,nkj->nik", a, a) + jnp.eye(3)[None]


def weighed(y, p):
    """Every matrix is weighed by v twice, every sum read by w."""
    return jnp.einsum("nij,ni,nj->n", y, p["v"], p["v"]) @ p["w"]


def triangular(p, x):
    y = jax.scipy.linalg.solve_triangular(positive(p["a"]), p["b"], lower=True)
    return jnp.einsum("nij,ni->n", y, p["v"]) @ p["w"]


def singular(p, x):
    y = jax.scipy.linalg.solve_triangular(p["a"], p["b"], lower=True)
    return jnp.einsum("nij,ni->n", y, p["v"]) @ p["w"]


FUNCTIONS = {
    "cholesky": lambda p, x: weighed(jnp.linalg.cholesky(positive(p["a"])), p),
    "qr": lambda p, x: weighed(jnp.linalg.qr(p["a"])[1], p),
    "eigh": lambda p, x: weighed(jnp.linalg.eigh(positive(p["a"]))[1] ** 2, p),
    "svd": lambda p, x: (
        jnp.einsum("ni,ni->n", jnp.linalg.svd(p["a"], compute_uv=False), p["v"])
        @ p["w"]
    ),
    "inv": lambda p, x: weighed(jnp.linalg.inv(positive(p["a"])), p),
    "solve": lambda p, x: (
        jnp.einsum("nij,ni->n", jnp.linalg.solve(positive(p["a"]), p["b"]), p["v"])
        @ p["w"]
    ),
    "triangular": triangular,
    "slogdet": lambda p, x: (
        (jnp.linalg.slogdet(positive(p["a"]))[1] * p["v"][:, 0]) @ p["w"]
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_batch_of_matrices_loses_some(name):
    fn, variables = FUNCTIONS[name], weights(**SHAPES)
    groups = jaxprune.trace(fn, variables, X)
    assert (groups["a:0"].size, groups["a:0"].exact) == (6, True)
    masks = jaxprune.expand_masks(groups, {"a:0": KEEP})
    small = jaxprune.slice_params(variables, masks)
    cut = jaxprune.apply_masks(variables, masks)
    assert small["a"].shape == (3, 3, 3)

    def slope(fn):
        return jax.jit(jax.value_and_grad(lambda v: fn(v, X).sum()))

    value, gradient = slope(fn)(cut)
    got, small_gradient = slope(jaxprune.narrow(fn, masks))(small)
    assert_same(got, value)
    assert_same(small_gradient, jaxprune.slice_params(gradient, masks))


def test_a_matrix_of_zeros_has_no_solution():
    groups = jaxprune.trace(singular, weights(**SHAPES), X)
    assert not groups["a:0"].exact
    assert "result is not finite (triangular_solve" in groups["a:0"].why
