"""`jaxprune inspect`, `prune`, `export`: for a person's own model."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from jaxprune.cli._factories import Model, load_model
from jaxprune.cli._words import UsageError
from jaxprune.core import Groups
from jaxprune.core._kept import quantity

Cost = Literal[
    "flops", "multiply_adds", "parameters", "bytes", "activation_bytes", "seconds"
]
Format = Literal["stablehlo", "safetensors", "tflite", "onnx"]


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Shows what of a model can be cut, what cannot and why, and what it costs."""

    model: Positional[str]
    """module:factory; it returns (apply_fn, variables, example args)."""
    pin: tuple[str, ...] = ()
    """Patterns of leaves or axes that must not be cut."""
    html: Path | None = None
    """Also write a page."""
    json: bool = False
    """Print JSON."""
    quiet: bool = False
    """Print nothing."""


@dataclasses.dataclass(frozen=True)
class Prune:
    """Cuts a model and writes the smaller one into a folder."""

    model: Positional[str]
    """module:factory; it returns (apply_fn, variables, args[, batches[, loss]])."""
    out: Path
    """The folder to write."""
    variables: Path | None = None
    """A checkpoint to take the variables from."""
    budget: str | None = None
    """What may be left: 0.5, 50%, 1.5M, 3ms."""
    cost: Cost = "flops"
    """What the budget is of."""
    sparsity: float | None = None
    """Instead of a budget: the fraction of units to remove from every group."""
    score: str = "l2"
    """How units are ranked: l1, l2, taylor, group_fisher, wanda, ..."""
    rounds: int = 1
    """In how many steps to cut."""
    only: tuple[str, ...] = ()
    """Patterns of groups to cut."""
    pin: tuple[str, ...] = ()
    """Patterns of leaves or axes that must not be cut."""
    min_keep: int | None = None
    """How many units every group keeps at least."""
    multiple_of: int | None = None
    """Kept counts are multiples of this."""
    max_sparsity: float | None = None
    """No group loses more than this fraction."""
    html: Path | None = None
    """Also write a report, with the latency before and after."""
    json: bool = False
    """Print JSON."""
    quiet: bool = False
    """Print nothing."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a pruned folder in a format that other programs read."""

    folder: Positional[Path]
    """What `jaxprune prune` wrote."""
    out: Path
    """The file or folder to write."""
    format: Format = "stablehlo"
    """Of the file."""
    model: str | None = None
    """module:factory of the original, which tflite and onnx need; stablehlo takes the
    program in the folder without."""
    quiet: bool = False
    """Print nothing."""


def inspect(config: Inspect) -> None:
    """Prints groups, pins and costs."""
    import jaxprune

    made = load_model(config.model)
    groups = _told(jaxprune.trace, made, pin=config.pin)
    spent = jaxprune.costs(made.apply_fn, made.variables, *made.args)
    if config.html is not None:
        _page(config.html, config.model, groups, spent)
    if config.json:
        print(json.dumps(_as_json(groups, spent), indent=1))
    elif not config.quiet:
        print(groups)
        if groups.pinned:
            print(groups.pinned)
        print(
            f"{quantity(spent.parameters)} parameters, {quantity(spent.flops)} FLOPs, "
            f"{quantity(spent.activation_bytes)} bytes of activations"
        )


def prune(config: Prune) -> None:
    """Cuts and saves."""
    import jaxprune

    made = load_model(config.model, config.variables)
    if (config.budget is None) == (config.sparsity is None):
        raise UsageError("give one of --budget and --sparsity")
    names = "budget cost sparsity score rounds pin min_keep multiple_of max_sparsity"
    options = {name: getattr(config, name) for name in names.split()}
    pruned = _told(
        jaxprune.prune,
        made,
        **options,
        only=config.only or None,
        batches=made.batches,
        loss_fn=made.loss_fn,
        progress=False if config.quiet or config.json else None,
    )
    pruned.save(config.out)
    if config.html is not None:
        with _missing():
            pruned.report(config.html, title=config.model)
    if config.json:
        before, after = (
            {"parameters": c.parameters, "flops": c.flops}
            for c in (pruned.costs_before, pruned.costs)
        )
        kept = {name: int(units.sum()) for name, units in pruned.plan.items()}
        found = {"before": before, "after": after, "kept": kept}
        print(json.dumps({**found, "out": str(config.out)}, indent=1))
    elif not config.quiet:
        print(pruned)
        print(f"written to {config.out}")


def export(config: Export) -> None:
    """Writes a pruned folder in another format."""
    from jaxprune import io

    original = load_model(config.model) if config.model else None
    apply_fn = original.apply_fn if original else None
    try:
        loaded = io.load_pruned(config.folder, apply_fn)
    except ValueError as error:
        raise UsageError(str(error)) from error
    args = original.args if original else loaded.args
    if config.format in ("tflite", "onnx") and original is None:
        raise UsageError(f"--format {config.format} needs --model module:factory")
    if config.format != "safetensors" and not args:
        raise UsageError(
            f"{config.folder} does not say how the function is called; give --model "
            "module:factory"
        )
    writers: dict[str, Callable[..., None]] = {
        "stablehlo": io.save_exported,
        "tflite": io.save_tflite,
        "onnx": io.save_onnx,
    }
    try:
        if config.format == "safetensors":
            io.save_safetensors(config.out, loaded.variables, plan=loaded.plan)
        else:
            writer = writers[config.format]
            writer(config.out, loaded.apply_fn, loaded.variables, *args)
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(str(error).splitlines()[0]) from error
    if not config.quiet:
        print(f"written to {config.out}")


def _told(run: Callable[..., Any], made: Model, **options: Any) -> Any:
    """Calls; what is wrong with the options is told in one line."""
    try:
        return run(made.apply_fn, made.variables, *made.args, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error).splitlines()[0]) from error


def _as_json(groups: Groups, spent: Any) -> dict[str, Any]:
    return {
        "groups": [
            {
                "name": group.name,
                "size": group.size,
                "exact": group.exact,
                "why": group.why,
                "members": [f"{m.path}:{m.axis}" for m in group.members],
            }
            for group in groups.values()
        ],
        "pinned": [
            {"path": p.path, "axis": p.axis, "positions": p.positions, "why": p.why}
            for p in groups.pinned
        ],
        "costs": {
            "parameters": spent.parameters,
            "flops": spent.flops,
            "activation_bytes": spent.activation_bytes,
        },
    }


def _page(path: Path, title: str, groups: Groups, spent: Any) -> None:
    """A page with what `inspect` prints, and the picture."""
    with _missing():
        from jaxprune import display

        values = {
            "title": title,
            "cards": {
                "parameters": quantity(spent.parameters),
                "FLOPs": quantity(spent.flops),
                "bytes of activations": quantity(spent.activation_bytes),
                "groups": len(groups),
            },
            "groups": list(groups.values()),
            "picture": display.groups_picture(groups),
            "pinned": display.reasons(groups),
            "command": display.command(),
            "facts": display.as_facts(display.machine()),
        }
        display.write_page(path, "inspect.html.jinja", values)


@contextlib.contextmanager
def _missing() -> Iterator[None]:
    """What a report needs and is not installed is told in one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(str(error)) from error
