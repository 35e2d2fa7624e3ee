"""BatchNorm statistics anew: what a pruned network needs before it is judged."""

import functools
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._leaves import named_leaves
from jaxprune.core._limits import selected
from jaxprune.core._progress import tracked
from jaxprune.core._types import ApplyFn, Array, PyTree

Moments = Literal["average", "pooled"]


def recalibrate(
    apply_fn: ApplyFn,
    variables: PyTree,
    batches: Iterable[PyTree],
    *,
    collection: str = "batch_stats",
    moments: Moments = "average",
    only: str | Sequence[str] | None = None,
    progress: bool | None = None,
    **kwargs: PyTree,
) -> Any:
    """Replaces running averages by their values over some batches.

    After a cut the means and variances that BatchNorm has stored are those of another
    network. A few batches through the network in training mode, without a gradient,
    are enough to measure them again, and this alone often brings back much of the
    accuracy.

    The function's own update tells what is a running average: a leaf that becomes
    ``m * old + (1 - m) * batch`` with one ``m`` below 1, which probes of the function
    measure. So an update from 0 gives ``(1 - m) * batch``, and the momentum of a layer
    does not matter. Leaves that keep their value (a frozen BatchNorm) or only count
    stay as they are. Everything else, such as the singular vectors of SpectralNorm, is
    refused unless `only` leaves it out.

    The average of the variances of small batches is too small, by a factor of 7/8 for
    8 independent examples. ``moments="pooled"`` computes the variance of all examples
    together, ``mean(v_b + m_b^2) - mean(m_b)^2`` over batches b with the moments
    ``m_b`` and ``v_b``, which is exact for a layer whose input does not depend on the
    batch (the first), for updates with the biased variance, as in Flax.

    Args:
        apply_fn: a Flax module's ``apply``, that function narrowed, or anything called
            alike: ``apply_fn(variables, *batch, mutable=[collection], **kwargs)``
            returns ``(output, {collection: new values})``. Compiled once and kept for
            as long as the function (or the object whose method it is) lives: hold on
            to a narrowed function to use it again.
        variables: mapping of collections, with `collection` among them; already sliced
            or masked. Not changed.
        batches: inputs, each an array or a tuple of positional arguments; all of one
            shape, or each shape compiles. Draw them from the training set; a few
            hundred examples and more are usual.
        collection: where the running averages live.
        moments: "average": every batch counts the same, as in the references.
            "pooled": every example does, and the variances are those of all together;
            leaves called ``var`` are paired with the ``mean`` beside them.
        only: paths or patterns (as `fnmatch`) within the collection, such as
            ``"*/BatchNorm_*"``, of the leaves to recompute; None for all running
            averages. All others stay as they are.
        progress: show a progress bar? None for on a terminal.
        **kwargs: passed on, ``train=True`` if none are given. Where training mode draws
            random numbers, give ``rngs`` too. Arrays in them may differ from call to
            call; everything else is part of the program.

    Returns:
        Variables like `variables` with new values in `collection`.

    Raises:
        ValueError: if there is no such collection, no batch, a leaf that is no running
            average, or `apply_fn` updates none (so it does not run in training mode).
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
        >>> new = recalibrate(net.apply, variables, batches, moments="pooled",
        ...                   use_running_average=False)
        >>> print(f"{new['batch_stats']['var'][0]:.4f}")  # of 0, 2, 4 and 8
        8.7500

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
    if moments not in get_args(Moments):
        raise ValueError(f"moments must be one of {get_args(Moments)}, got {moments!r}")
    fixed, arrays = _split(kwargs or {"train": True})
    updated_from = functools.partial(_program(apply_fn), collection, fixed, arrays)
    stats = variables[collection]
    momentum: dict[str, Any] | None = None
    found: list[tuple[dict[str, Array], int]] = []
    for batch in tracked(batches, "recalibrate", progress):
        batch = batch if isinstance(batch, tuple) else (batch,)
        if momentum is None:
            update = functools.partial(_update, updated_from, variables, batch, stats)
            momentum = _momenta(update, named_leaves(stats), collection, only)
        zeros = {path: jnp.zeros_like(m) for path, m in momentum.items()}
        fresh = _update(updated_from, variables, batch, stats, zeros)
        of_batch = {path: fresh[path] / (1 - m) for path, m in momentum.items()}
        found.append((of_batch, len(jax.tree.leaves(batch)[0])))
    if momentum is None:
        raise ValueError("batches are empty; give at least one batch of inputs")
    pool = _pooled if moments == "pooled" else _averaged
    return {**variables, collection: _with(stats, pool(found))}


# (id of a function's owner, the function if that is a method) -> compiled program.
_PROGRAMS: dict[tuple[int, Any], Callable[..., Any]] = {}


def _program(apply_fn: ApplyFn) -> ApplyFn:
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
    fixed: tuple[object, tuple[object, ...]],
    arrays: list[Any],
    stats: PyTree,
    variables: PyTree,
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


def _split(kwargs: object) -> tuple[tuple[Any, tuple[Any, ...]], list[Any]]:
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


def _with(stats: PyTree, values: Mapping[str, Array]) -> Any:
    """The collection, with other values in some leaves."""
    leaves, treedef = jax.tree.flatten(stats)
    paths = named_leaves(stats)
    return treedef.unflatten(
        values.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)
    )


def _update(
    updated_from: Callable[..., object],
    variables: PyTree,
    batch: tuple[object, ...],
    stats: PyTree,
    values: Mapping[str, Array],
) -> dict[str, Array]:
    """Path -> what a step in training mode makes of it, from these values."""
    return named_leaves(updated_from(_with(stats, values), variables, batch))


# --- which leaves are running averages -----------------------------------------------

Update = Callable[[Mapping[str, Array]], dict[str, Array]]


def _momenta(
    update: Update, old: Mapping[str, Array], collection: str, only: Any
) -> dict[str, jax.Array]:
    """Path -> m at every entry, for the leaves that are to be recomputed.

    Raises:
        ValueError: if a leaf is neither a running average nor stays, or none is one.
    """
    before = update({})
    if list(before) != list(old):
        raise ValueError(
            f"apply_fn returns {collection} with the leaves {', '.join(before)}, but "
            f"variables hold {', '.join(old)}"
        )
    chosen = selected(old, only, f"leaves of {collection}")
    floats = [p for p in chosen if jnp.issubdtype(old[p].dtype, jnp.floating)]
    probes = {path: _probe(old[path], k) for k, path in enumerate(floats)}
    # A frozen layer hands its statistics on, so they must not be probed with the rest.
    after = update(probes)
    moving = {
        path: probe
        for path, probe in probes.items()
        if not (_same(after[path], probe) and _same(before[path], old[path]))
    }
    after = update(moving)
    shares = {p: _share(after[p] - before[p], moving[p] - old[p]) for p in moving}
    odd = [path for path, share in shares.items() if share is None]
    if odd:
        raise ValueError(_no_average(update, before, old, moving, odd, collection))
    # What only counts keeps all of its old value, and more.
    found = {p: m for p, m in shares.items() if m is not None and m < 1 - 1e-6}
    missing = [path for path in floats if path not in found]
    if missing and (only is not None or not found):
        raise ValueError(
            f"apply_fn does not update {collection}/{missing[0]} ({len(missing)} "
            "such); does it run in training mode? Give the keyword arguments that say "
            "so, such as train=True"
        )
    if not found:
        raise ValueError(f"{collection} holds no running average: {', '.join(old)}")
    return {path: jnp.full_like(old[path], share) for path, share in found.items()}


def _probe(leaf: Array, number: int) -> jax.Array:
    """Values far above the statistics, so that a difference keeps all its digits."""
    scale = 1e3 * (1 + jnp.abs(leaf).max(initial=0))
    factors = np.random.default_rng(number).uniform(1, 2, leaf.shape)
    return scale.astype(leaf.dtype) * jnp.asarray(factors, leaf.dtype)


def _same(left: Any, right: Any) -> bool:
    return bool((left == right).all())


def _share(change: Any, by: Any) -> float | None:
    """The share of the old value in the new one, if it is the same at all entries."""
    shares = np.asarray(change / by, np.float64)
    if not shares.size:
        return 1.0
    share = float(shares.mean())
    tolerance = 1e-4 + 16 * float(jnp.finfo(by.dtype).eps)
    even = bool((np.abs(shares - share) <= tolerance).all())
    return share if even and -tolerance <= share <= 1 + tolerance else None


def _no_average(
    update: Update,
    before: Mapping[str, Array],
    old: Mapping[str, Array],
    moving: Mapping[str, Array],
    odd: list[str],
    collection: str,
) -> str:
    """Which leaves are to blame: those that are no average of themselves alone."""
    own = []
    for path in odd:
        after = update({path: moving[path]})[path]
        if _share(after - before[path], moving[path] - old[path]) is None:
            own.append(path)
    told = ", ".join(f"{collection}/{path}" for path in (own or odd)[:3])
    return (
        f"{told} ({len(own or odd)} such) is not a running average (the new value is "
        "not m * old + (1 - m) * batch, for itself alone), so it cannot be recomputed; "
        "name the leaves to recompute with only=, all others stay as they are"
    )


# --- moments -------------------------------------------------------------------------


def _averaged(found: Sequence[tuple[Mapping[str, Array], int]]) -> dict[str, Array]:
    """The mean over batches."""
    first, *others = (values for values, _ in found)
    total = dict(first)
    for values in others:
        total = {path: total[path] + value for path, value in values.items()}
    return {path: value / len(found) for path, value in total.items()}


def _pooled(found: Sequence[tuple[Mapping[str, Array], int]]) -> dict[str, Array]:
    """The moments of all examples together."""
    shares = np.array([count for _, count in found], float)
    shares /= shares.sum()

    def mean(of: Callable[[Mapping[str, Array]], Any]) -> Any:
        values = [of(batch) for batch, _ in found]
        return sum(
            v * np.asarray(s, v.dtype) for v, s in zip(values, shares, strict=True)
        )

    first, pooled = found[0][0], {}
    for path in first:
        pooled[path] = mean(lambda batch, path=path: batch[path])
        layer, _, name = path.removesuffix("/value").rpartition("/")
        if name != "var":
            continue
        twin = (
            "/".join(filter(None, (layer, "mean")))
            + path[len(path.removesuffix("/value")) :]
        )
        if twin not in first:
            raise ValueError(
                f"{path} has no running mean called {twin} beside it, so the variance "
                "of all examples is unknown; use moments='average'"
            )

        def offset(batch: Mapping[str, Array], twin: str = twin) -> Any:
            # From the first batch's mean, so that what all share does not cancel.
            return batch[twin] - first[twin]

        between = mean(lambda batch: offset(batch) ** 2) - mean(offset) ** 2
        pooled[path] = pooled[path] + between
    return pooled
