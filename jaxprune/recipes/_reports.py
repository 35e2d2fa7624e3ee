"""What the reports of `Pruned` and `Rounds` show, gathered."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxprune.core._extras import needing
from jaxprune.core._leaves import named_leaves
from jaxprune.core._progress import tracked
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.costing._latency import seconds_per_call

if TYPE_CHECKING:
    from jaxprune.display import Stage
    from jaxprune.recipes._pruned import Pruned
    from jaxprune.recipes._rounds import Rounds


def report_pruned(
    path: str | Path,
    pruned: "Pruned",
    title: str,
    metrics: Mapping[str, object],
    latency: bool,
    figures: Mapping[str, Any],
) -> None:
    """Writes the report of a pruned function, see `Pruned.report`."""
    with needing("reports", "report"):
        from jaxprune.display import Stage

    # Where the original is not at hand there is nothing to compare with.
    if latency and pruned.seconds is None and pruned.args and not pruned.is_program:
        pruned = pruned.measured()
    found = {name: ends for name, *ends in pruned.counted_costs}
    before, after = _ends(metrics)
    stages = []
    for at, (name, own) in enumerate({"before": before, "after": after}.items()):
        seconds = found["seconds"][at] if "seconds" in found else None
        spent = found["parameters"][at], found["FLOPs"][at]
        kept = _kept(pruned) if at else 1.0
        stages.append(Stage(name, kept, *spent, seconds, own))
    _write(path, [stages], pruned, title, pruned.call, figures)


def report_rounds(
    path: str | Path,
    runs: "Sequence[Rounds]",
    title: str,
    metric: str,
    latency: bool,
    progress: bool | None,
) -> None:
    """Writes the report of runs of rounds, see `Rounds.report`."""
    with needing("reports", "report"):
        import jaxprune.display  # noqa: F401  what is missing is told before measuring

    times: dict[tuple[int, int], float] = {}
    if latency:
        places = [(k, each.round) for k, run in enumerate(runs) for each in run.history]
        for at, number in tracked(places, "latency", progress):
            times[at, number] = _seconds(runs[at].load(number))
    stages = [_stages(run, metric, times, at) for at, run in enumerate(runs)]
    _write(path, stages, runs[0].last, title, runs[0].call, {})


def _stages(
    run: "Rounds", metric: str, times: Mapping[Any, float], at: int
) -> "list[Stage]":
    from jaxprune.display import Stage

    return [
        Stage(
            f"round {entry.round}" if entry.round else "before the first cut",
            entry.kept,
            entry.parameters,
            entry.flops,
            times.get((at, entry.round)),
            {} if entry.metric is None else {metric: entry.metric},
        )
        for entry in run.history
    ]


def _ends(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics before, where they are known, and after."""
    before, after = {}, {}
    for name, value in metrics.items():
        pair = (None, value) if np.ndim(value) == 0 else tuple(value)
        numbers = [each for each in pair if isinstance(each, str) is False]
        if len(pair) != 2 or pair[1] is None or len(numbers) != 2:
            raise ValueError(
                f"metrics[{name!r}] must be the number after the cut, or (before, "
                f"after), got {value!r}"
            )
        if pair[0] is not None:
            before[name] = float(pair[0])
        after[name] = float(pair[1])
    return before, after


def _kept(pruned: "Pruned") -> float:
    units = sum(group.size for group in pruned.groups.values())
    return sum(int(kept.sum()) for kept in pruned.plan.values()) / max(units, 1)


def _seconds(pruned: "Pruned") -> float:
    args, kwargs = jax.tree.map(zeros, (pruned.args, dict(pruned.kwargs)))
    return seconds_per_call(pruned.apply_fn, (pruned.variables, *args), kwargs)


def zeros(leaf: PyTree) -> Any:
    """Zeros like a shape; keys for a shape of keys; anything else as it is."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), leaf.shape)
    return jax.numpy.zeros(leaf.shape, leaf.dtype)


def _write(
    path: str | Path,
    runs: "Sequence[Sequence[Stage]]",
    pruned: "Pruned",
    title: str,
    call: str,
    figures: Mapping[str, Any],
) -> None:
    from jaxprune.display import command, write_report

    shapes = {name: np.shape(x) for name, x in named_leaves(pruned.variables).items()}
    write_report(
        path,
        runs,
        pruned.groups,
        pruned.plan,
        shapes,
        title=title,
        call=call,
        command=command(),
        figures=figures,
    )


def as_call(
    name: str,
    apply_fn: ApplyFn,
    args: Sequence[PyTree],
    options: Mapping[str, object],
    defaults: Mapping[str, object],
) -> str:
    """A call as Python text, with the options that are not the default.

    Args:
        name: of the function that is called.
        apply_fn: the function that it is given.
        args: its example arguments.
        options: of the call.
        defaults: name -> what an option is if it is not given.

    Example:
        >>> as_call("jaxprune.prune", len, [np.ones((1, 3))], {"sparsity": 0.5,
        ...         "score": "l2"}, {"score": "l2"})
        'jaxprune.prune(len, variables, float64[1, 3], sparsity=0.5)'
    """
    given = [
        f"{option}={_text(value)}"
        for option, value in options.items()
        if not _is(value, defaults.get(option))
    ]
    words = [_text(apply_fn), "variables", *map(_text, args), *given]
    return f"{name}({', '.join(words)})"


def _is(value: object, default: object) -> bool:
    plain = str, int, float, bool, tuple, type(None)
    return value is default or (isinstance(value, plain) and value == default)


def _text(value: Any) -> str:
    """A value as Python has it; arrays by their shapes, what is long as ``...``."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if callable(value):
        owner = getattr(value, "__self__", None)
        names = type(value).__name__, getattr(value, "__name__", "")
        if owner is not None and not isinstance(owner, type | type(jax)):
            return f"{type(owner).__name__}.{names[1]}"
        return getattr(value, "__qualname__", names[0])
    text = repr(value)
    return text if len(text) <= 60 else "..."
