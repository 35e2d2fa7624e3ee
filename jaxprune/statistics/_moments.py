"""Second moments of what contractions take in, streamed over batches.

One statistic for all methods that fit a layer by least squares: LASSO channel pruning,
ThiNet, pruning with compensation and the optimal brain surgeon read it and nothing
else.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._groups import Groups
from jaxprune.core._names import matching
from jaxprune.core._types import PyTree
from jaxprune.program._jaxprs import trace_program
from jaxprune.statistics._contractions import Contraction, contractions
from jaxprune.statistics._streaming import Batches, shown, twice
from jaxprune.statistics.taps._named import call

ApplyFn = Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of the inputs of one contraction.

    K is the number of matrices that the parameter holds: 1 for a dense layer or an
    ordinary convolution; the groups of a convolution, the experts of a bank and the
    layers of a scan are several. D are the inputs that one output sums over; of a
    convolution the patch, channels before window.

    Attributes:
        name: the path of the parameter that the inputs are multiplied with;
            ``"path#2"`` and so on where other parts of it are used elsewhere.
        count: how many rows (tokens, patches, steps) of every matrix went in.
        mean: float64 ``[K, D]``.
        covariance: float64 ``[K, D, D]``, of the population: divided by `count`.
        at: int ``[K, D, N]``, where in the flattened parameter the weight of every
            input for every output is.
        units: group -> int ``[K, D]``, which unit of it every input is; -1 for none.
    """

    name: str
    count: int
    mean: np.ndarray
    covariance: np.ndarray
    at: np.ndarray
    units: Mapping[str, np.ndarray]

    @property
    def second(self) -> np.ndarray:
        """The second moments E[x xᵀ]: float64 ``[K, D, D]``."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]


def moments(
    apply_fn: ApplyFn,
    variables: PyTree,
    batches: Batches,
    *,
    layers: str | Sequence[str] | None = None,
    groups: Groups | None = None,
    memory: int = 2**28,
    progress: bool | None = None,
) -> Iterator[Moments]:
    r"""Mean and second moment of what every contraction takes in, layer by layer.

    .. math:: \mu = E[x], \qquad \Sigma = E[x x^T] - \mu \mu^T

    over all rows of all batches. A contraction is any product that sums activations
    against a parameter as it is or moved (transposed, reshaped, sliced, cast): dense
    layers, convolutions (by patches), einsums, projections of attention, banks of
    experts, layers inside ``lax.scan``. Sums are centred within a batch, and batches
    are combined in float64 on the host by Chan's formula, so large means cost no
    digits.

    Args:
        apply_fn: ``(variables, batch) -> anything``.
        variables: tree of arrays.
        batches: trees of arrays; read once for as many layers as `memory` holds, so a
            list or an object that can be iterated again if there is more than one pass.
        layers: paths of parameters or glob patterns; None for all contractions.
        groups: what `trace` returned for these variables; says which units inputs are.
        memory: bytes of sums that may be alive in one pass, at least one layer.
        progress: show a progress bar? None for on a terminal.

    Yields:
        `Moments`, in the order of the program.

    Raises:
        ValueError: if there are no batches, a pattern matches no contraction, or
            several passes are needed and `batches` is an iterator.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def linear(params, x):
        ...     return x @ params["w"] + params["b"]
        >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros((1, 3))}
        >>> [one] = moments(linear, params, [jnp.array([[1.0, 0.0], [3.0, 4.0]])])
        >>> one.name, one.count, one.mean
        ('w', 2, array([[2., 2.]]))
        >>> one.second
        array([[[5., 6.],
                [6., 8.]]])

    References:
        Chan et al., `Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances <http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf>`_,
        1979; Xie et al., `Pruning with Compensation
        <https://arxiv.org/abs/2108.13728>`_, 2021
    """
    first, again = peeked(batches)
    found = contractions(trace_program(apply_fn, variables, first))
    passes = list(_passes(chosen(found, layers), memory))
    if len(passes) > 1:
        twice(batches, "moments, which do not fit in one pass,")
    for held in passes:
        step = observing(apply_fn, [one.name for one in held])
        sums = streamed(step, (variables,), again, "moments", progress)
        for one, each in zip(held, sums, strict=True):
            units = {} if groups is None else one.units(groups)
            covariance = each.scatter / each.count
            yield Moments(one.name, each.count, each.mean, covariance, one.at, units)


def peeked(batches: Batches) -> tuple[PyTree, Batches]:
    """The first batch, and the batches with it still in front.

    Raises:
        ValueError: if there is none.
    """
    iterator = iter(batches)
    for first in iterator:
        if isinstance(batches, Iterator):
            rest: Any = itertools.chain([first], iterator)
            return first, rest
        return first, batches
    raise ValueError("batches is empty, so there is nothing to take moments of")


def chosen(
    found: Mapping[str, Contraction], layers: str | Sequence[str] | None
) -> list[Contraction]:
    """The contractions of these layers.

    Raises:
        ValueError: if a pattern matches none.
    """
    if layers is None:
        return list(found.values())
    names: set[str] = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        met = matching(pattern, found)
        if not met:
            raise ValueError(
                f"no contraction reads a parameter called {pattern!r}; those that are "
                f"read are {', '.join(found) or '(none)'}"
            )
        names.update(met)
    return [one for name, one in found.items() if name in names]


def _passes(layers: Sequence[Contraction], memory: int) -> Iterator[list[Contraction]]:
    """As many layers at a time as fit, at least one."""
    held, size = [], 0
    for one in layers:
        k, width, _ = one.at.shape
        need = 8 * k * width * width
        if held and size + need > memory:
            yield held
            held, size = [], 0
        held.append(one)
        size += need
    if held:
        yield held


class Sums(NamedTuple):
    """Centred sums of inputs x and targets y over rows.

    Attributes:
        count: how many rows of every matrix.
        mean: of x, ``[K, D]``.
        scatter: sums of (x - mean)(x - mean)ᵀ, ``[K, D, D]``.
        target: the mean of y, ``[K, N]``.
        cross: sums of (x - mean)(y - target)ᵀ, ``[K, D, N]``.
        spread: sums of (y - target)², ``[K, N]``.
    """

    count: Any
    mean: Any
    scatter: Any
    target: Any
    cross: Any
    spread: Any


def joint_sums(x: jax.Array, y: jax.Array) -> Sums:
    """The sums of one batch: x ``[K, rows, D]``, y ``[K, rows, N]``."""
    (x, mean), (y, target) = _centred(x), _centred(y)
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scatter, cross = dot("krd,kre->kde", x, x), dot("krd,krn->kdn", x, y)
    return Sums(x.shape[1], mean, scatter, target, cross, jnp.square(y).sum(1))


def _centred(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows without their mean, and the mean: a long sum is rounded, its rest is not."""
    mean = x.mean(1, keepdims=True)
    x = x - mean
    rest = x.mean(1, keepdims=True)
    return x - rest, (mean + rest)[:, 0]


def _combined(a: Sums | None, b: Sums) -> Sums:
    """The sums over the rows of both, by the formula of Chan et al."""
    b = Sums(int(b.count), *(np.asarray(leaf, np.float64) for leaf in b[1:]))
    if a is None or a.count == 0:
        return b
    if b.count == 0:
        return a
    count = a.count + b.count
    # With d the difference of the means, sums of squares about the common mean are S =
    # S_a + S_b + d dᵀ n_a n_b / n: no square of a mean is ever subtracted.
    share, weight = b.count / count, a.count * b.count / count
    x, y = b.mean - a.mean, b.target - a.target
    return Sums(
        count,
        a.mean + share * x,
        a.scatter + b.scatter + weight * x[:, :, None] * x[:, None, :],
        a.target + share * y,
        a.cross + b.cross + weight * x[:, :, None] * y[:, None, :],
        a.spread + b.spread + weight * y**2,
    )


def streamed(
    step: Callable[..., list[Sums]],
    trees: tuple[PyTree, ...],
    batches: Batches,
    title: str,
    progress: bool | None,
) -> list[Sums]:
    """``step(*trees, batch)`` over all batches, added up in float64 on the host.

    Raises:
        ValueError: if there are no batches (any more).
    """
    totals: list[Sums] | None = None
    for batch in shown(batches, title, progress):
        parts = step(*trees, batch)
        before = totals or [None] * len(parts)
        totals = [_combined(a, b) for a, b in zip(before, parts, strict=True)]
    if totals is None:
        raise ValueError(
            f"batches gave nothing in a pass of {title}, though there was a first "
            "batch; pass a list or an object whose __iter__ starts anew"
        )
    return list(map(_without_noise, totals))


def _without_noise(sums: Sums) -> Sums:
    """Inputs that are constant to float32's rounding vary by exactly 0."""
    variance = np.diagonal(sums.scatter, axis1=1, axis2=2) / max(sums.count, 1)
    moves = variance > 1e-13 * sums.mean**2
    scatter = sums.scatter * moves[:, :, None] * moves[:, None, :]
    return sums._replace(scatter=scatter, cross=sums.cross * moves[:, :, None])


def observing(apply_fn: ApplyFn, names: Sequence[str]) -> Callable[..., list[Sums]]:
    """A compiled step: the sums of the inputs of some contractions over a batch."""

    @jax.jit
    def step(variables: PyTree, batch: PyTree) -> list[Sums]:
        rows = inputs(apply_fn, names, variables, batch)
        return [joint_sums(x, x[:, :, :0]) for x in rows]

    return step


def inputs(
    apply_fn: ApplyFn, names: Sequence[str], variables: PyTree, batch: PyTree
) -> list[jax.Array]:
    """What contractions take in on one batch: ``[K, rows, D]`` of each.

    Raises:
        ValueError: if the program of this batch does not have them.
    """
    program = trace_program(apply_fn, variables, batch)
    found = contractions(program)
    for name in names:
        if name not in found:
            raise ValueError(
                f"{name} is read by a contraction on the first batch, but not on a "
                "later one; do batches have different structures?"
            )
    # Leaves that are laid side by side take in the same.
    taps = {tap.site: tap for name in names for tap in found[name].taps()}
    _, notes = call(program, list(taps.values()), variables, batch)
    return [found[name].rows(notes) for name in names]
