"""The contract of the engine, as one check.

``narrow(apply_fn, masks)(slice_params(v, masks), *args)`` equals
``apply_fn(apply_masks(v, masks), *args)`` to float rounding, in value and in gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import check_jaxpr

import jaxprune

TOLERANCE = 2e-5  # relative to the largest entry

# Every program runs once or twice: compiling quickly matters more than running so.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def halve(groups, seed, names=None):
    """A random half of the units of every exact group (or of `names`) is kept."""
    rng = np.random.default_rng(seed)
    chosen = [
        n for n, g in groups.items() if (g.exact if names is None else n in names)
    ]
    return {
        name: rng.permutation(groups[name].size) >= groups[name].size // 2
        for name in chosen
    }


def difference(got, expected, floor=0.0):
    """Largest difference of two trees, each leaf relative to its largest entry.

    A leaf below `floor` times the largest entry of the tree is measured against that.
    """
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    least = max(floor * largest(expected), 1e-30)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if b.size and b.dtype != jax.dtypes.float0:
            gap = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
            # np.maximum, unlike max, does not lose a nan.
            worst = np.maximum(worst, gap.max() / max(np.abs(b).max(), least))
    return float(worst)


def assert_same(got, expected, floor=0.0):
    """Equal to float rounding, and not because both are 0."""
    assert largest(expected) > 1e-3
    assert difference(got, expected, floor) < TOLERANCE


def largest(tree):
    """The largest entry of a tree."""
    leaves = [x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]
    return float(np.max([np.abs(x).max() for x in leaves if np.size(x)]))


def count(tree):
    return sum(np.size(leaf) for leaf in jax.tree.leaves(tree))


def total(out):
    """A number to differentiate: depends on every entry; entries that are 0 add 0."""
    floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sin(3.0 * x).sum() for x in floats)


def stack(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree, k):
    return jax.tree.map(lambda leaf: leaf[k], tree)


def slice_mutated(out, masks):
    """(result, new values of variables) of the masked model, the latter sliced."""
    result, new = out
    return result, jaxprune.slice_params(new, {name: masks[name] for name in new})


def derivative(fn, reverse):
    """Value and gradient, or value and derivative along a direction."""

    def backward(variables, direction, *args):
        def loss(variables):
            out = fn(variables, *args)
            return total(out), out

        grad = jax.value_and_grad(loss, has_aux=True, allow_int=True)
        (_, out), gradient = grad(variables)
        return out, gradient

    def forward(variables, direction, *args):
        return jax.jvp(lambda v: fn(v, *args), (variables,), (direction,))

    return backward if reverse else forward


def mapped(fn):
    """`fn` over stacked inputs."""
    return lambda variables, *stacked: jax.vmap(lambda *args: fn(variables, *args))(
        *stacked
    )


def check_types(fn, *args):
    """Every equation of the program makes what the program says that it makes."""
    program = jax.make_jaxpr(fn)(*args)
    check_jaxpr(getattr(program, "jaxpr", program))


def check_contract(apply_fn, variables, inputs, *, mutated=False, reverse=True):
    """Cuts half of all exact groups at random, several times, and compares.

    Seed 0 under jit and differentiation; seed 1 under jit and vmap, at another batch
    size; seed 2 under jit.

    Args:
        apply_fn: the function.
        variables: its variables, numpy.
        inputs: ``(batch, seed) -> args``.
        mutated: the function returns ``(result, new values of variables)``.
        reverse: differentiate backwards; forwards where a loop allows no more.

    Returns:
        The groups.
    """
    groups = jaxprune.trace(apply_fn, variables, *inputs(2, 0))

    def masked(pair, *args):
        return apply_fn(jaxprune.apply_masks(*pair), *args)

    def masked_slope(variables, masks, direction, *args):
        fn = derivative(lambda v, *args: masked((v, masks), *args), reverse)
        return fn(variables, direction, *args)

    masked_slope, masked_map = quick_jit(masked_slope), quick_jit(mapped(masked))

    def sliced(out):
        return slice_mutated(out, masks) if mutated else out

    for seed, batch in ((0, 2), (1, 3), (2, 2)):
        keep = halve(groups, seed)
        masks = jaxprune.expand_masks(groups, keep)
        small = jaxprune.slice_params(variables, masks)
        assert count(small) < count(variables)
        narrowed = jaxprune.narrow(apply_fn, masks)
        args = inputs(batch, seed)
        if seed == 1:
            stacked = stack(args, inputs(batch, seed + 1))
            got = quick_jit(mapped(narrowed))(small, *stacked)
            expected = masked_map((variables, masks), *stacked)
            for k in range(2):
                assert_same(unstack(got, k), sliced(unstack(expected, k)))
            continue
        out, slope = masked_slope(variables, masks, variables, *args)
        if seed == 2:
            check_types(narrowed, small, *args)
            assert_same(quick_jit(narrowed)(small, *args), sliced(out))
            continue
        got, small_slope = quick_jit(derivative(narrowed, reverse))(small, small, *args)
        assert_same(got, sliced(out))
        slope = jaxprune.slice_params(slope, masks) if reverse else sliced(slope)
        assert_same(small_slope, slope, floor=1e-2)
    return groups
