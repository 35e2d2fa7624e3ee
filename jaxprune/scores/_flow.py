"""Synaptic flow: what a network's weights let through, without any data."""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxprune.core._checks import check_leaves
from jaxprune.core._leafwise import is_float, real_dtype
from jaxprune.core._leaves import keystr, named_leaves, parameter_paths
from jaxprune.core._types import ApplyFn, Array, PyTree
from jaxprune.program._jaxprs import is_array
from jaxprune.scores._published import of_weights
from jaxprune.statistics._streaming import joined


@of_weights("sum")
def synflow(
    apply_fn: ApplyFn, variables: PyTree, *args: PyTree, **kwargs: PyTree
) -> PyTree:
    """The share of the synaptic flow that runs through every weight.

    R is the sum of the outputs of the network with ``|w|`` for every variable and ones
    for every input; the score is ``|w| dR/d|w|``, divided by R. With ReLU and no
    biases R is linear in every layer, so the scores of a layer sum to 1, and those of
    the weights into a unit to those of the weights out of it.

    Flow grows by orders of magnitude from layer to layer, so outside of jit it is
    computed in float64.

    Args:
        apply_fn: the function; its first argument is the variables. BatchNorm must be
            in inference mode.
        variables: its variables; statistics count with their absolute values too, as
            in the paper's code.
        *args: example arguments, arrays or shapes (a batch of one is enough). Their
            floating leaves are replaced by ones.
        **kwargs: further example arguments, treated alike.

    Returns:
        Tree like `variables` of float32 or wider, None for leaves that are not
        floating point or not trained.

    Raises:
        ValueError: if the flow overflows or is 0 (outside of jit).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, -3.0]]), "w2": jnp.array([[-1.0], [1.0]])}
        >>> synflow(mlp, params, jnp.ones((1, 1)))
        {'w1': Array([[0.25, 0.75]], dtype=float32), 'w2': Array([[0.25],
               [0.75]], dtype=float32)}

    References:
        Tanaka et al., `Pruning neural networks without any data by iteratively
        conserving synaptic flow <https://arxiv.org/abs/2006.05467>`_, 2020
    """
    check_leaves(variables, "variables")
    inputs = (args, kwargs)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((variables, inputs))):
        return _flow(apply_fn, variables, inputs)[1]
    with jax.enable_x64(True):
        doubled = jax.tree.map(_double, variables)
        total, scores = _flow(apply_fn, doubled, jax.tree.map(_double, inputs))
        if not jnp.isfinite(total) or total == 0:
            raise ValueError(
                f"the synaptic flow is {float(total)}: the network "
                + ("lets nothing through" if total == 0 else "overflows its dtype")
            )
        return jax.tree.map(_like, scores, _parameters(variables))


def _flow(
    apply_fn: ApplyFn, variables: PyTree, inputs: PyTree
) -> tuple[jax.Array, PyTree]:
    """R, and the share of every floating leaf."""
    args, kwargs = jax.tree.map(_ones, inputs)
    absolute = jax.tree.map(_absolute, variables)

    def flow(floats: PyTree) -> jax.Array:
        out = apply_fn(joined(floats, absolute), *args, **kwargs)
        smooth = [leaf for leaf in jax.tree.leaves(out) if is_float(leaf)]
        wide = jnp.result_type(float)
        total = jnp.zeros((), wide)
        return sum((jnp.real(leaf).astype(wide).sum() for leaf in smooth), total)

    sizes = _parameters(absolute)
    total, slopes = jax.jit(jax.value_and_grad(flow))(sizes)
    share = lambda w, slope: (w * slope).astype(total.dtype) / total  # noqa: E731
    return total, jax.tree.map(share, sizes, slopes)


def _parameters(variables: PyTree) -> PyTree:
    """The floating leaves that are trained; None for the others."""
    chosen = parameter_paths(named_leaves(variables))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if keystr(path) in chosen and is_float(leaf) else None,
        variables,
    )


def _absolute(leaf: PyTree) -> PyTree:
    return jnp.abs(leaf) if is_float(leaf) else leaf


def _ones(leaf: PyTree) -> PyTree:
    if not is_array(leaf):
        return leaf
    one = jnp.ones if is_float(leaf) else jnp.zeros
    return one(leaf.shape, leaf.dtype)


def _double(leaf: PyTree) -> PyTree:
    if not is_array(leaf) or not is_float(leaf):
        return leaf
    is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
    dtype = jnp.complex128 if is_complex else jnp.float64
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype)
    return jnp.asarray(leaf, dtype)


def _like(score: jax.Array, leaf: Array) -> jax.Array:
    return score.astype(real_dtype(leaf.dtype))
