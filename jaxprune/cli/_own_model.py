"""`jaxprune inspect`, `prune`, `run`, `export`: for a person's own model."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
import rich.table

from jaxprune.cli._factories import Model, load_model
from jaxprune.cli._options import Export, Inspect, Prune, Run
from jaxprune.cli._words import UsageError
from jaxprune.core import Groups
from jaxprune.core._kept import as_text, quantity


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

    _check_target(config)
    made = load_model(config.model, config.variables)
    options = _cut_options(config, made) | {"rounds": config.rounds}
    pruned = _told(jaxprune.prune, made, **options)
    _saved(pruned, config.out)
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


def run(config: Run) -> None:
    """Cuts in rounds, trains in between, and saves the last net and the best."""
    import optax

    import jaxprune

    _check_target(config)
    made = load_model(config.model, config.variables)
    if made.batches is None or made.loss_fn is None:
        raise UsageError(
            f"{config.model} returned no batches and loss to train on; expected "
            "(apply_fn, variables, example args, batches, loss_fn)"
        )
    made = made._replace(batches=list(made.batches))
    found = _told(
        jaxprune.rounds,
        made,
        **_cut_options(config, made),
        tx=optax.adam(config.learning_rate),
        data=made.batches,
        steps=config.steps,
        rounds=config.rounds,
        schedule=config.schedule,
        evaluate="loss",
        folder=config.out / "rounds",
    )
    for name, pruned in {"last": found.last, "best": found.best}.items():
        _saved(pruned, config.out / name)
    if config.html is not None:
        with _missing():
            found.report(config.html, title=config.model, metric="minus the loss")
    history = [dataclasses.asdict(entry) for entry in found.history]
    if config.json:
        print(json.dumps({"history": history, "out": str(config.out)}, indent=1))
    elif not config.quiet:
        print(_rounds_table(history))
        print(f"written to {config.out / 'last'} and {config.out / 'best'}")


def _rounds_table(history: Sequence[Mapping[str, Any]]) -> str:
    table = rich.table.Table(box=rich.box.HORIZONTALS)
    for head in ("round", "loss", "units left", "parameters", "FLOPs"):
        table.add_column(head, justify="right")
    for row in history:
        numbers = quantity(row["parameters"]), quantity(row["flops"])
        left = f"{row['kept']:.0%}"
        table.add_row(str(row["round"]), f"{-row['metric']:.4g}", left, *numbers)
    return as_text(table)


def _check_target(config: Prune | Run) -> None:
    if (config.budget is None) == (config.sparsity is None):
        raise UsageError("give either --budget or --sparsity")
    if config.out.exists() and not config.out.is_dir():
        raise UsageError(f"{config.out} is a file; give another --out")


def _cut_options(config: Prune | Run, made: Model) -> dict[str, Any]:
    names = (
        "budget cost sparsity score pin min_keep multiple_of max_sparsity recalibrate"
    )
    return {
        **{name: getattr(config, name) for name in names.split()},
        "only": config.only or None,
        "batches": made.batches,
        "loss_fn": made.loss_fn,
        "progress": False if config.quiet or config.json else None,
    }


def _saved(pruned: Any, folder: Path) -> None:
    try:
        pruned.save(folder)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error).splitlines()[0]) from error


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
    if config.format not in ("stablehlo", "safetensors") and original is None:
        raise UsageError(f"--format {config.format} needs --model module:factory")
    if config.format != "safetensors" and not args:
        raise UsageError(
            f"{config.folder} does not say how the function is called; give --model "
            "module:factory"
        )
    try:
        if config.format == "safetensors":
            io.save_safetensors(config.out, loaded.variables, plan=loaded.plan)
        else:
            stablehlo = config.format == "stablehlo"
            name = "save_exported" if stablehlo else f"save_{config.format}"
            getattr(io, name)(config.out, loaded.apply_fn, loaded.variables, *args)
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(str(error).splitlines()[0]) from error
    if not config.quiet:
        print(f"written to {config.out}")


def _told(run: Callable[..., object], made: Model, **options: object) -> Any:
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
