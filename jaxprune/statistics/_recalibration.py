"""BatchNorm statistics anew: what a pruned network needs before it is judged."""

import functools
import types
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def recalibrate(
    apply_fn: Callable[..., Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    collection: str = "batch_stats",
    **kwargs: Any,
) -> Any:
    """Replaces running statistics by their plain average over some batches.

    After a cut the means and variances that BatchNorm has stored are those of another
    network. A few batches through the network in training mode, without a gradient,
    are enough to measure them again, and this alone often brings back much of the
    accuracy. Every batch counts the same, whatever the momentum of the layers: a
    layer's update ``m * old + (1 - m) * batch`` is affine in the old value, so running
    it from 0 gives ``(1 - m) * batch``, and running it once from a large number gives
    ``m``.

    Args:
        apply_fn: a Flax module's ``apply``, that function narrowed, or anything called
            alike: ``apply_fn(variables, *batch, mutable=[collection], **kwargs)``
            returns ``(output, {collection: new values})``. Compiled once and kept for
            as long as the function (or the object whose method it is) lives: hold on
            to a narrowed function to use it again.
        variables: mapping of collections, with `collection` among them; already sliced
            or masked. Not changed.
        batches: inputs, each an array or a tuple of positional arguments; all of one
            shape, or each shape compiles. Statistics are averages over these, so draw
            them from the training set; a few hundred examples and more are usual.
        collection: where the running statistics live.
        **kwargs: passed on, ``train=True`` if none are given. Where training mode draws
            random numbers, give ``rngs`` too. Arrays in them may differ from call to
            call; everything else is part of the program.

    Returns:
        Variables like `variables` with new values in `collection`.

    Raises:
        ValueError: if there is no such collection, no batch, or `apply_fn` leaves a
            statistic as it was (so it does not run in training mode).
        TypeError: if a keyword argument holds something that is neither an array nor
            hashable.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> net = nn.BatchNorm(momentum=0.9)
        >>> variables = net.init(jax.random.key(0), jnp.ones((2, 1)), True)
        >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [8.0]])]
        >>> new = recalibrate(net.apply, variables, batches, use_running_average=False)
        >>> stats = new["batch_stats"]  # of means 1 and 6, of variances 1 and 4
        >>> print(f"{stats['mean'][0]:.4f} {stats['var'][0]:.4f}")
        3.5000 2.5000

    References:
        Yu and Huang, `Universally Slimmable Networks and Improved Training Techniques
        <https://arxiv.org/abs/1903.05134>`_, 2019, Sec. 4.2 (post-statistics)

        Li et al., `EagleEye: Fast Sub-net Evaluation for Efficient Neural Network
        Pruning <https://arxiv.org/abs/2007.02491>`_, 2020 (adaptive BatchNorm)
    """
    if collection not in variables:
        raise ValueError(
            f"variables hold no {collection!r}, only {sorted(variables)}; a network "
            "without BatchNorm needs no recalibration"
        )
    fixed, arrays = _split(kwargs or {"train": True})
    program = _program(apply_fn)
    updated_from = functools.partial(program, collection, fixed, arrays)
    zeros = jax.tree.map(jnp.zeros_like, variables[collection])
    momentum, total, count = None, zeros, 0
    for batch in batches:
        batch = batch if isinstance(batch, tuple) else (batch,)
        fresh = updated_from(zeros, variables, batch)
        if momentum is None:
            momentum = _momentum(updated_from, fresh, variables, batch)
        total = jax.tree.map(jnp.add, total, fresh)
        count += 1
    if momentum is None:
        raise ValueError("batches are empty; give at least one batch of inputs")
    _refuse_still(momentum, collection)
    means = jax.tree.map(lambda s, m: s / (count * (1 - m)), total, momentum)
    return {**variables, collection: means}


# (id of a function's owner, the function if that is a method) -> compiled program.
_PROGRAMS: dict[tuple[int, Any], Callable[..., Any]] = {}


def _program(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`_updated_from` for this function, compiled; forgotten when the function is.

    As a static argument the function would live as long as JAX's cache, and with it
    the program of every subnet that was ever looked at.
    """
    owner = getattr(apply_fn, "__self__", apply_fn)
    key = (id(owner), getattr(apply_fn, "__func__", None))
    if key not in _PROGRAMS:
        is_method = isinstance(apply_fn, types.MethodType)
        refer = weakref.WeakMethod if is_method else weakref.ref
        program = functools.partial(_updated_from, refer(apply_fn))
        _PROGRAMS[key] = jax.jit(program, static_argnums=(0, 1))
        weakref.finalize(owner, _PROGRAMS.pop, key, None)
    return _PROGRAMS[key]


def _updated_from(
    refer: Callable[[], Any],
    collection: str,
    fixed: tuple[Any, tuple[Any, ...]],
    arrays: list[Any],
    stats: Any,
    variables: Any,
    batch: tuple[Any, ...],
) -> Any:
    """What a step in training mode makes of running statistics `stats`."""
    structure, others = fixed
    leaves = [o if a is None else a for a, o in zip(arrays, others, strict=True)]
    kwargs = jax.tree.unflatten(structure, leaves)
    held = {**variables, collection: stats}
    _, new = refer()(held, *batch, mutable=[collection], **kwargs)
    return new[collection]


_ARRAY = "an array"  # stands in `fixed` where one is


def _split(kwargs: Any) -> tuple[tuple[Any, tuple[Any, ...]], list[Any]]:
    """Structure and what is no array, hashable; and the arrays, None between them."""
    leaves, structure = jax.tree.flatten(kwargs)
    arrays = [x if isinstance(x, jax.Array | np.ndarray) else None for x in leaves]
    for path, leaf in jax.tree.leaves_with_path(kwargs):
        if not isinstance(leaf, jax.Array | np.ndarray | Hashable):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"keyword argument {name} is a {type(leaf).__name__}, which is neither "
                "an array nor hashable, so a compiled program cannot depend on it; "
                "close over it in apply_fn"
            )
    others = (x if a is None else _ARRAY for x, a in zip(leaves, arrays, strict=True))
    return (structure, tuple(others)), arrays


def _momentum(updated_from: Any, fresh: Any, variables: Any, batch: Any) -> Any:
    """The share of the old value in an update, per leaf."""
    # Far above the statistics, so that the difference keeps all its digits.
    probe = jax.tree.map(
        lambda s: jnp.full_like(s, 1e4) * (1 + jnp.abs(s).max()), fresh
    )
    probed = updated_from(probe, variables, batch)
    shares = jax.tree.map(lambda new, s, old: (new - s) / old, probed, fresh, probe)
    return jax.tree.map(jnp.mean, shares)


def _refuse_still(momentum: Any, collection: str) -> None:
    still = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, share in jax.tree.leaves_with_path(momentum)
        if not share < 1 - 1e-6
    ]
    if still:
        raise ValueError(
            f"apply_fn does not update {collection}/{still[0]} ({len(still)} such); "
            "does it run in training mode? Give the keyword arguments that say so, "
            "such as train=True"
        )
