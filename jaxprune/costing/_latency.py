"""Latency tables: measured time as a cost, usable wherever a cost is."""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._groups import Groups
from jaxprune.core._limits import fraction, selected
from jaxprune.core._masks import expand_masks
from jaxprune.core._progress import tracked
from jaxprune.core._types import ApplyFn, Array, PyTree
from jaxprune.costing._polynomial import Cost, Sizes
from jaxprune.coupling._trace import trace
from jaxprune.narrowing._narrow import narrow
from jaxprune.program._jaxprs import is_array
from jaxprune.surgery._slicing import slice_params

Measure = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], float]


class Curve(NamedTuple):
    """A function by its points, linear in between, constant beyond.

    Attributes:
        x: ascending.
        y: as many.
    """

    x: np.ndarray
    y: np.ndarray

    def __call__(self, at: Any) -> Any:
        """The value; traced where `at` is."""
        if isinstance(at, jax.Array):
            return jnp.interp(at, jnp.asarray(self.x), jnp.asarray(self.y))
        return float(np.interp(float(at), self.x, self.y))


@dataclasses.dataclass(frozen=True, eq=False)
class LatencyTable(Cost):
    """Seconds of one call as a function of group sizes, from measurements.

    With ``r_g`` the time when group g alone is narrowed, relative to the whole
    program, the estimate is ``calibration(product of r_g)``. The calibration makes it
    exact where all groups are narrowed alike; where one group alone is, it is as close
    as the calibration is to the identity near 1. In between it is an estimate: measure
    what you decide for.

    Attributes:
        sizes: group name -> full size.
        curves: group name -> relative time over its size.
        calibration: seconds over the product of the relative times.
        measured: every measurement: sizes and seconds.
    """

    sizes: Mapping[str, int]
    curves: Mapping[str, Curve]
    calibration: Curve
    measured: tuple[tuple[Mapping[str, int], float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", MappingProxyType(dict(self.sizes)))

    def __reduce__(self) -> Any:  # a read-only mapping cannot be pickled
        fields = dict(self.sizes), self.curves, self.calibration, self.measured
        return LatencyTable, fields

    def value(self, sizes: Sizes | None = None) -> Any:
        """Estimated seconds; see `Cost.value`."""
        point = self.filled(sizes)
        relative = [curve(point[name]) for name, curve in self.curves.items()]
        return self.calibration(math.prod(relative, start=1.0))


def latency_table(
    apply_fn: ApplyFn,
    variables: PyTree,
    *args: PyTree,
    groups: Groups | None = None,
    shares: Sequence[float] = (0.25, 0.5, 0.75),
    only: str | Sequence[str] | None = None,
    multiple_of: int = 1,
    measure: Measure | None = None,
    progress: bool | None = None,
    **kwargs: PyTree,
) -> LatencyTable:
    """Measures how long narrowed programs take, for a cost of real seconds.

    Every group is narrowed alone to each share of its units, and all groups together;
    each width is compiled and timed, so this takes as many compilations as there are
    groups times shares. Times are made monotone (isotonic regression): fewer units
    are never slower.

    Args:
        apply_fn: the function; its first argument is the variables.
        variables: its variables, arrays.
        *args: further arguments, arrays; what takes time with the shapes of these.
        groups: what `trace` returned for the same arguments; None to trace here.
        shares: fractions of the units that stay, in (0, 1).
        only: names, labels or patterns of the groups to measure; the others are
            taken to cost nothing of their own. None for all.
        multiple_of: measured widths are multiples of this, where a group has as many.
        measure: ``measure(fn, args, kwargs) -> seconds`` of one call; None for the
            median of the calls that fit in a fifth of a second, at least five, after
            compilation by `jax.jit`.
        progress: show a progress bar? None for on a terminal.
        **kwargs: further keyword arguments.

    Returns:
        A cost for `to_budget` and all that takes one.

    Raises:
        ValueError: if a share is out of range or a pattern matches no group.

    Example:
        Here a clock that counts multiply-adds, for the same numbers everywhere.

        >>> import jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))}
        >>> def clock(fn, args, kwargs):
        ...     return 1e-9 * jaxprune.costs(fn, *args, **kwargs).multiply_adds
        >>> table = latency_table(mlp, params, jnp.ones((1, 3)), measure=clock)
        >>> print(f"{table.full:.1e}", f"{table.value({'w1:1': 5}):.1e}")
        4.0e-08 2.5e-08

    References:
        Yang et al., `NetAdapt <https://arxiv.org/abs/1804.03230>`_, 2018 (measured
        tables of layers)
    """
    if groups is None:
        groups = trace(apply_fn, variables, *args, **kwargs)
    for share in shares:
        if not 0 < fraction("a share", share) < 1:
            raise ValueError(f"a share of units must be in (0, 1), got {share}")
    names = selected(groups, only)
    run = measure or seconds_per_call

    def timed(widths: tuple[int, ...]) -> float:
        keep = {
            name: _first(groups[name].size, n, groups[name].blocks)
            for name, n in zip(names, widths, strict=True)
        }
        masks = expand_masks(groups, keep)
        small = slice_params(variables, masks)
        return run(narrow(apply_fn, masks), (small, *args), kwargs)

    full = tuple(groups[name].size for name in names)
    grid = [
        _widths(groups[name].size, shares, multiple_of * groups[name].blocks)
        for name in names
    ]
    alone = [
        [(*full[:k], n, *full[k + 1 :]) for n in own] for k, own in enumerate(grid)
    ]
    together = list(zip(*grid, strict=True)) or [full]
    every = list(dict.fromkeys([full, *itertools.chain(*alone), *together]))
    times = {w: timed(w) for w in tracked(every, "latency table", progress)}
    curves = {
        name: _monotone(grid[k], [times[widths] / times[full] for widths in alone[k]])
        for k, name in enumerate(names)
    }
    products = [
        math.prod(curves[name](n) for name, n in zip(names, widths, strict=True))
        for widths in together
    ]
    return LatencyTable(
        {name: group.size for name, group in groups.items()},
        curves,
        _monotone(products, [times[widths] for widths in together]),
        tuple((dict(zip(names, w, strict=True)), t) for w, t in times.items()),
    )


def seconds_per_call(
    fn: ApplyFn, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
) -> float:
    """Median seconds of a compiled call."""
    arrays, static = _parted((args, kwargs))
    compiled = jax.jit(lambda found: _called(fn, found, static)).lower(arrays).compile()
    jax.block_until_ready(compiled(arrays))
    times: list[float] = []
    while len(times) < 5 or sum(times) < 0.2:
        start = time.perf_counter()
        jax.block_until_ready(compiled(arrays))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _parted(tree: PyTree) -> tuple[list[Any], Any]:
    """The array leaves, and everything else with its place."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    rest = [None if is_array(leaf) else (leaf,) for leaf in leaves]
    return arrays, (rest, treedef)


def _called(fn: ApplyFn, arrays: list[Array], static: Any) -> Any:
    rest, treedef = static
    found = iter(arrays)
    leaves = [next(found) if leaf is None else leaf[0] for leaf in rest]
    args, kwargs = treedef.unflatten(leaves)
    return fn(*args, **kwargs)


def _first(size: int, left: int, blocks: int) -> np.ndarray:
    """Keeps the first units of every block."""
    return np.tile(np.arange(size // blocks) < left // blocks, blocks)


def _widths(size: int, shares: Sequence[float], multiple: int) -> list[int]:
    """The widths to measure, ascending, the full one last."""
    rounded = [max(round(share * size / multiple), 1) * multiple for share in shares]
    return sorted(min(n, size) for n in (*rounded, size))


def _monotone(x: Sequence[float], y: Sequence[float]) -> Curve:
    """The closest curve that never falls; equal points share their mean."""
    from scipy.optimize import isotonic_regression  # slow to import, seldom used

    points, place = np.unique(np.asarray(x, float), return_inverse=True)
    count = np.bincount(place)
    mean = np.bincount(place, weights=np.asarray(y, float)) / count
    return Curve(points, isotonic_regression(mean, weights=count).x)
