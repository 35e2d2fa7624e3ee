"""Activation maximisation: for every unit an input that it answers to most."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.core._groups import Groups
from jaxprune.core._types import ApplyFn, Array, PyTree
from jaxprune.program._jaxprs import trace_program
from jaxprune.statistics.taps._gates import observe


def exciting_inputs(
    apply_fn: ApplyFn,
    groups: Groups,
    variables: PyTree,
    example: Array,
    *,
    key: jax.Array,
    steps: int = 32,
    rate: float = 0.1,
    together: int = 64,
) -> dict[str, np.ndarray]:
    r"""For every unit an input that makes its mean activation large, by ascent.

    .. math:: X \leftarrow X + \eta \, \frac{\nabla_X \bar A_i(X)}{
        \operatorname{rms} \nabla_X \bar A_i(X)}

    from Gaussian noise. What a filter looks for is so seen as an image. A unit that
    answers to nothing near its noise keeps it.

    Args:
        apply_fn: ``(variables, batch) -> anything``.
        groups: what `trace` returned; the units that are looked at.
        variables: tree of arrays that `groups` was traced with.
        example: floating ``[B, ...]``; only its shape, but for B, and dtype matter.
        key: random key, consumed.
        steps: of the ascent.
        rate: the root mean square of a step, in units of the input.
        together: how many units ascend at once, which bounds the memory.

    Returns:
        Group name -> ``[size, ...]``, an input for every unit.

    Raises:
        TypeError: if the input is not floating.
        ValueError: if a group is in no activation.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def net(params, x):
        ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, -1.0]]), "w2": jnp.ones((2, 1))}
        >>> x = jnp.ones((1, 1))
        >>> groups = jaxprune.trace(net, params, x)
        >>> key = jax.random.key(0)
        >>> exciting_inputs(net, groups, params, x, key=key, rate=1.0)["w1:1"] > 0
        array([[ True],
               [False]])

    References:
        Erhan et al., `Visualizing Higher-Layer Features of a Deep Network
        <https://www.semanticscholar.org/paper/65d994fb778a8d9e0f632659fb33a082949a50d3>`_,
        2009; Qin et al., `Functionality-Oriented Convolutional Filter Pruning
        <https://arxiv.org/abs/1810.07322>`_, 2019
    """
    if not jnp.issubdtype(example.dtype, jnp.floating):
        raise TypeError(
            f"example has dtype {example.dtype}; ascent needs a floating input"
        )
    shape, sizes = (1, *example.shape[1:]), [group.size for group in groups.values()]

    def mean_activation(variables: PyTree, x: jax.Array, unit: jax.Array) -> jax.Array:
        program = trace_program(apply_fn, variables, x)
        found = observe(program, groups, lambda value: value, (variables, x))
        means = [
            sum(total / jnp.asarray(count, total.dtype) for total, count in sites)
            for sites in found.values()
        ]
        return jnp.concatenate(means)[unit]

    @jax.jit
    def ascended(variables: PyTree, starts: jax.Array) -> jax.Array:
        def ascend(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            unit, start = pair

            def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
                slope = jax.grad(mean_activation, 1)(variables, x, unit)
                size = jnp.sqrt(jnp.square(slope).mean())
                move = slope / jnp.where(size > 0, size, 1)
                return (x + rate * move).astype(x.dtype), None

            return lax.scan(step, start, None, steps)[0][0]

        units = jnp.arange(len(starts))
        return lax.map(ascend, (units, starts), batch_size=min(together, len(starts)))

    starts = jax.random.normal(key, (sum(sizes), *shape), example.dtype)
    images = np.asarray(ascended(variables, starts))
    parts = np.split(images, np.cumsum(sizes)[:-1])
    return dict(zip(groups, parts, strict=True))
