"""One model before the judge: what can be cut, and does the rest compute the same?"""

import collections
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

import jaxprune
from benchmarks import machine
from benchmarks.third_party.models import Model, randomized

SEEDS = (0, 1)
REPEATS = 3

# Every program runs a few times: compiling quickly matters more than running so.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def judged(build: Callable[[], Model]) -> dict[str, Any]:
    """The row of a model, or the exception that was raised on the way."""
    try:
        return row(build())
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {first}"[:200]}


def row(model: Model) -> dict[str, Any]:
    """What `trace` finds, how long it takes, and what the cut model computes.

    "difference" is the largest entry of narrowed minus masked, over the largest entry
    of the output, leaf by leaf, the worst of all seeds; "change" is how far the masked
    output is from the uncut one, measured alike: where it is 0 the first says nothing.
    """
    variables = randomized(model.variables)
    groups = jaxprune.trace(model.apply_fn, variables, *model.args)
    exact = [name for name, group in groups.items() if group.exact]
    found = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables)),
        "groups": len(groups),
        "exact": len(exact),
        "can_be_cut": _share_cut(groups, exact, variables),
        "inexact": _reasons(groups[name].why for name in groups if name not in exact),
        "pinned": _pinned(groups),
        "seconds": times(model, variables),
    }
    if exact:
        found["difference"], found["change"] = differences(
            model, variables, groups, exact
        )
    return found


def differences(
    model: Model, variables: Any, groups: jaxprune.Groups, names: list[str]
) -> tuple[float, float]:
    """Narrowed against masked, and masked against uncut; the worst of the seeds."""
    masked = _jit(
        lambda v, masks, *a: model.apply_fn(jaxprune.apply_masks(v, masks), *a)
    )
    gaps, changes = [], []
    for seed in SEEDS:
        masks = jaxprune.expand_masks(groups, halves(groups, names, seed))
        small = jaxprune.slice_params(variables, masks)
        narrowed = _jit(jaxprune.narrow(model.apply_fn, masks))(small, *model.args)
        expected = masked(variables, masks, *model.args)
        gaps.append(difference(narrowed, expected))
        uncut = masked(variables, jax.tree.map(np.ones_like, masks), *model.args)
        changes.append(difference(expected, uncut))
    if not np.isfinite(changes).all():
        raise FloatingPointError("the model itself returns numbers that are not finite")
    return float(np.max(gaps)), float(np.max(changes))


def halves(
    groups: jaxprune.Groups, names: list[str], seed: int
) -> dict[str, np.ndarray]:
    """A random half of the units of each of these groups is kept."""
    rng = np.random.default_rng(seed)
    sizes = {name: groups[name].size for name in names}
    return {name: rng.permutation(size) >= size // 2 for name, size in sizes.items()}


def difference(got: Any, expected: Any) -> float:
    """Largest difference of two trees, each leaf relative to its largest entry.

    >>> difference({"a": np.array([1.0, 4.0])}, {"a": np.array([2.0, 4.0])})
    0.25
    """
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return float(np.max([_gap(np.asarray(a), np.asarray(b)) for a, b in pairs]))


def _gap(got: np.ndarray, expected: np.ndarray) -> float:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    largest = float(np.abs(expected).max(initial=0))
    return float(np.abs(got - expected).max(initial=0)) / (largest or 1.0)


def times(model: Model, variables: Any) -> dict[str, Any]:
    """Medians of `jax.make_jaxpr` and of `trace`, each of a function new to JAX."""
    calls = {
        "make_jaxpr": lambda fn: jax.make_jaxpr(fn)(variables, *model.args),
        "trace": lambda fn: jaxprune.trace(fn, variables, *model.args),
    }
    taken: dict[str, list[machine.Seconds]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            new = lambda *args: model.apply_fn(*args)
            taken[name].append(machine.timed(lambda: call(new))[1])  # noqa: B023
    return {name: machine.summary(each) for name, each in taken.items()}


def _share_cut(groups: jaxprune.Groups, names: list[str], variables: Any) -> float:
    """The fraction of all numbers that are gone if all of these groups are."""
    none = {name: np.zeros(groups[name].size, bool) for name in names}
    return jaxprune.sparsity(jaxprune.expand_masks(groups, none), variables)


def _pinned(groups: jaxprune.Groups) -> list[dict[str, Any]]:
    """For every reason: how many axes, and the first of them; most axes first."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for pin in groups.pinned:
        found[shortened(pin.why)].append(f"{pin.path}:{pin.axis}")
    ranked = sorted(found.items(), key=lambda item: -len(item[1]))
    return [{"why": why, "axes": len(at), "first": at[0]} for why, at in ranked]


def _reasons(reasons: Iterable[str]) -> list[dict[str, Any]]:
    counted = collections.Counter(map(shortened, reasons)).most_common()
    return [{"why": why, "groups": number} for why, number in counted]


def shortened(why: str) -> str:
    """A reason without the place in the program, which is a path of this machine.

    >>> shortened("it is indexed by data (gather at models.py:12 (Net.__call__))")
    'it is indexed by data (gather)'
    >>> shortened("coupled to the output/0 of apply_fn")
    'coupled to the output of apply_fn'
    """
    why, *place = re.split(r",? at \S*\.py\b", why)
    open_ = place and why.count("(") > why.count(")")
    return re.sub(r"(output|input args)(/\d+)+", r"\1", why.strip() + ")" * bool(open_))
