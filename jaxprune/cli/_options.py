"""The options of the commands for a person's own model."""

import dataclasses
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from jaxprune.recipes._targets import CostName

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
class _Cut:
    """What `prune` and `run` share."""

    model: Positional[str]
    """module:factory; it returns (apply_fn, variables, args[, batches[, loss]])."""
    out: Path
    """The folder to write."""
    variables: Path | None = None
    """A checkpoint to take the variables from."""
    budget: str | None = None
    """What may be left: 0.5, 50%, 1.5M, 3ms."""
    cost: CostName = "flops"
    """What the budget is of."""
    sparsity: float | None = None
    """Instead of a budget: the fraction of units to remove from every group."""
    score: str = "l2"
    """How units are ranked: l1, l2, taylor, group_fisher, wanda, ..."""
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
    recalibrate: bool = True
    """Measure BatchNorm's statistics anew where there are batches."""
    html: Path | None = None
    """Also write a report, with the latency."""
    json: bool = False
    """Print JSON."""
    quiet: bool = False
    """Print nothing."""


@dataclasses.dataclass(frozen=True)
class Prune(_Cut):
    """Cuts a model and writes the smaller one into a folder."""

    rounds: int = 1
    """In how many steps to cut."""


@dataclasses.dataclass(frozen=True)
class Run(_Cut):
    """Cuts in rounds and trains in between, by Adam on the factory's loss and batches.

    The folder holds the run and, in `last` and `best`, what `jaxprune export` reads.
    The same command goes on where it stopped.
    """

    rounds: int = 4
    """How many times to cut."""
    steps: int = 500
    """How many steps to train in every round."""
    learning_rate: float = 1e-3
    """Of Adam."""
    schedule: Literal["geometric", "linear"] = "geometric"
    """Leave the same fraction in every round, or remove the same amount."""


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
