"""Criteria: which score finds the filters that a trained net can spare?

Question   Filters are cut from a trained net in one shot, down to the same FLOPs for
           every criterion, and nothing is fine-tuned. Which criterion leaves the most
           accuracy, and is each better than chance and than its own reverse?
Command    jaxprune run criteria                   (--quick for a first look)
Leaves     runs/criteria-digits: results.json, table.md
Papers     named at each score in `jaxprune.scores`; the controls are those of Li et
           al., Pruning Filters for Efficient ConvNets, 2017,
           https://arxiv.org/abs/1608.08710

Two ways to spread the budget. "uniform": every layer keeps the same fraction, so all
criteria get the same widths and only the order within a layer counts. "greedy": the
units that score least for the FLOPs they save go first (Aflalo et al., Knapsack
Pruning, 2020, https://arxiv.org/abs/2002.08258), scores divided by the mean of their
layer. The controls are random scores, and every score with its sign turned.
The criteria see training images only; the test set is read once, by the tables.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.table

import jaxprune
from experiments.batch_bridgeout.settings import settings_for
from experiments.harness.methods import Subject, optimizer, subject
from experiments.harness.runs import Job, Run, Tick, open_run
from experiments.harness.training import Fit, accuracy, fit, make_step, start
from jaxprune import scores, select
from jaxprune.cli._main import UsageError, known
from jaxprune.data import CLASSIFICATION, Dataset, load, normalize
from jaxprune.display import interval
from jaxprune.models import MODELS

BUDGETS = (0.75, 0.5, 0.25)  # of the FLOPs of the dense net
WAYS = ("uniform", "reversed", "greedy")
CALIBRATION, BATCH = 512, 128  # training images that the criteria see

UnitScores = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """What ``jaxprune run criteria`` understands."""

    dataset: str = "digits"
    """digits, shapes32 (these two need no network), mnist, cifar10 or cifar100."""
    models: tuple[str, ...] = ()
    """Architectures; by default a VGG and a ResNet that suit the data set."""
    seeds: int = 5
    """How many times each architecture is trained."""
    epochs: int | None = None
    """Passes over the training set; by default what suits the data set."""
    quick: bool = False
    """Less of everything: one architecture, one seed, 4 epochs."""
    out: Path | None = None
    """Folder of the run; by default runs/criteria-DATASET."""
    data_dir: Path | None = None
    """Where data sets are prepared; by default $JAXPRUNE_DATA or ~/.cache/jaxprune."""

    def __post_init__(self) -> None:
        known("data set", self.dataset, CLASSIFICATION)
        for model in self.models:
            known("model", model, MODELS)
        if self.seeds < 1:
            raise UsageError(f"--seeds must be at least 1, got {self.seeds}")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained net and what the criteria may look at.

    Attributes:
        net: the architecture.
        variables: after training.
        images: normalised training images ``[CALIBRATION, H, W, C]``.
        labels: int32 ``[CALIBRATION]``.
        seed: of the training, and of what is random in a criterion.
    """

    net: Subject
    variables: Any
    images: jax.Array
    labels: np.ndarray
    seed: int

    @property
    def key(self) -> jax.Array:
        """For what is random in a criterion."""
        return jax.random.key(self.seed)

    @property
    def batches(self) -> list[tuple[jax.Array, np.ndarray]]:
        """Batches of images and labels."""
        begins = range(0, len(self.images), BATCH)
        return [
            (self.images[k : k + BATCH], self.labels[k : k + BATCH]) for k in begins
        ]

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Mean cross-entropy with the statistics of BatchNorm fixed."""
        images, labels = batch
        logits = self.net.net.apply({**self.variables, "params": params}, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return loss.mean()

    def of_units(self, weights: Any, reduce: scores.Reduce) -> UnitScores:
        """Scores of weights, added up over what every unit occupies."""
        return scores.group_scores(self.net.groups, weights, reduce=reduce)

    def gradient(self, score: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A score that streams gradients of the loss."""
        params = self.variables["params"]
        return score(self.loss, params, self.batches, *args, progress=False, **kwargs)

    def activation(self, score: Callable[..., UnitScores]) -> UnitScores:
        """A score that streams activations."""
        groups, apply_fn = self.net.groups, self.net.net.apply
        images = [images for images, _ in self.batches]
        return score(groups, apply_fn, self.variables, images, progress=False)


def _params(t: Trained) -> Any:
    return t.variables["params"]


def _group_fisher(t: Trained) -> UnitScores:
    def loss(variables: Any, batch: Any) -> jax.Array:
        return t.loss(variables["params"], batch)

    batches = t.batches
    return scores.group_fisher(t.net.groups, loss, t.variables, batches, progress=False)


def _obd(t: Trained) -> UnitScores:
    curvature = t.gradient(scores.hessian_diagonal, t.key)
    return t.of_units(scores.obd(_params(t), curvature), "signed_sum")


CRITERIA: dict[str, Callable[[Trained], UnitScores]] = {
    "random": lambda t: {
        name: jax.random.uniform(jax.random.fold_in(t.key, k), (group.size,))
        for k, (name, group) in enumerate(t.net.groups.items())
    },
    "l1": lambda t: t.of_units(scores.l1(_params(t)), "l1"),
    "l2": lambda t: t.of_units(scores.l2(_params(t)), "l2"),
    "batch_norm_scale": lambda t: t.of_units(scores.batch_norm_scale(_params(t)), "l1"),
    "activation_probability": lambda t: t.of_units(
        scores.activation_probability(_params(t)), "mean"
    ),
    "geometric_median": lambda t: scores.geometric_median(t.net.groups, _params(t)),
    "taylor": lambda t: t.of_units(t.gradient(scores.taylor), "sum"),
    "taylor, summed": lambda t: t.of_units(
        t.gradient(scores.taylor, form="signed"), "abs_of_sum"
    ),
    "fisher": lambda t: t.of_units(
        scores.obd(_params(t), t.gradient(scores.fisher)), "sum"
    ),
    "group_fisher": _group_fisher,
    # A control: signed scores, ranked by sign. `leave_one_out` has them without it.
    "obd, by sign": _obd,
    "grasp, by sign": lambda t: t.of_units(t.gradient(scores.grasp), "signed_sum"),
    "mean_activation": lambda t: t.activation(scores.mean_activation),
    "apoz": lambda t: t.activation(scores.apoz),
    "entropy": lambda t: t.activation(scores.entropy),
}


def main(config: Config) -> None:
    """Runs the experiment, or what is left of it."""
    settings = settings_for(
        config.dataset,
        config.models,
        seeds=config.seeds,
        epochs=config.epochs,
        batch_size=None,
        rounds=1,
        quick=config.quick,
    )
    hyper = {m: settings.hyper[f"{m}/weight_decay"] for m in settings.models}
    facts = {
        "dataset": config.dataset,
        "models": settings.models,
        "seeds": settings.seeds,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "budgets": BUDGETS,
        "hyper": {m: h._asdict() for m, h in hyper.items()},
    }
    name = f"criteria-{config.dataset}" + ("-quick" if config.quick else "")
    with open_run(config.out or Path("runs", name), facts) as run:
        if not run.finished:
            train, test = (
                load(config.dataset, split, data_dir=config.data_dir)
                for split in ("train", "test")
            )
            nets = {model: subject(model, train.spec) for model in settings.models}
            jobs = {
                f"{model}/seed{seed}": Job(
                    partial(
                        one_net, facts, nets[model], hyper[model], train, test, seed
                    ),
                    settings.epochs + len(CRITERIA),
                )
                for seed in range(settings.seeds)
                for model in settings.models
            }
            run.each("train, score, cut", jobs, _tell)
            run.close(summary=summarize(run.results))
        _print(run)


def one_net(
    facts: Mapping[str, Any],
    net: Subject,
    hyper: Any,
    train: Dataset,
    test: Dataset,
    seed: int,
    tick: Tick,
) -> dict[str, Any]:
    """Trains a net, and cuts it by every criterion, in every way, to every budget."""
    epochs, size = facts["epochs"], facts["batch_size"]
    schedule = optax.cosine_decay_schedule(
        hyper.learning_rate, epochs * (len(train) // size)
    )
    tx = optimizer("weight_decay", hyper, schedule, seed)
    state = start(net.init, tx, train, seed)
    step = make_step(net.net.apply, tx, train)
    state = fit(step, state, train, Fit(epochs, size, seed), tick)
    variables = jax.device_get(state.variables)
    chosen = np.random.default_rng(seed).permutation(len(train))[:CALIBRATION]
    images = normalize(jnp.asarray(train.images[chosen]), train.spec)
    trained = Trained(net, variables, images, train.labels[chosen], seed)
    model = jaxprune.cost_model(net.net.apply, variables, images[:1], groups=net.groups)
    record = {"dense": accuracy(net.predict(variables, test), test)}
    for name, criterion in CRITERIA.items():
        found = jax.device_get(criterion(trained))
        record[name] = {
            way: [cut(trained, found, model.flops, way, b, test) for b in BUDGETS]
            for way in WAYS
        }
        tick()
    return record


def cut(
    trained: Trained,
    found: UnitScores,
    flops: Any,
    way: str,
    budget: float,
    test: Dataset,
) -> dict[str, float]:
    """Accuracy after a cut down to this share of the FLOPs, and the share reached."""
    sign = -1.0 if way == "reversed" else 1.0
    scaled = {
        name: sign * values / max(np.abs(values).mean(), 1e-30)
        for name, values in found.items()
    }
    method = "greedy" if way == "greedy" else "uniform"
    keep = select.to_budget(
        trained.net.groups,
        scaled,
        flops,
        budget=budget * flops.full,
        method=method,
        max_sparsity=1.0,
    )
    masks = jaxprune.expand_masks(trained.net.groups, keep)
    logits = trained.net.predict(jaxprune.apply_masks(trained.variables, masks), test)
    return {
        "accuracy": accuracy(logits, test),
        "flops": float(keep.cost / flops.full),
    }


def summarize(results: Mapping[str, Any]) -> dict[str, Any]:
    """Model -> criterion -> way -> for every budget mean and 95 % interval."""
    settings, records = results["settings"], results["records"]

    def over_seeds(model: str, name: str, way: str, at: int) -> dict[str, float]:
        runs = [records[f"{model}/seed{s}"] for s in range(settings["seeds"])]
        return interval([run[name][way][at]["accuracy"] for run in runs])._asdict()

    return {
        model: {
            name: {
                way: [over_seeds(model, name, way, k) for k in range(len(BUDGETS))]
                for way in WAYS
            }
            for name in CRITERIA
        }
        for model in settings["models"]
    }


def _tell(name: str, record: Any) -> str:
    return f"{name}: accuracy {record['dense']:.3f} dense"


def _print(run: Run) -> None:
    """Prints the tables, and writes them into the folder of the run."""
    for model, criteria in run.results["summary"].items():
        for way in WAYS:
            rich.console.Console().print(_table(f"{model}, {way}", criteria, way))
    write_tables(run.folder / "table.md", run.results)


def write_tables(path: Path, results: Mapping[str, Any]) -> None:
    """Writes the tables in Markdown."""
    with path.open("w") as file:
        console = rich.console.Console(file=file, width=100)
        for model, criteria in summarize(results).items():
            for way in WAYS:
                file.write(f"\n{model}, {way}\n")
                console.print(_table(None, criteria, way, box=rich.box.MARKDOWN))


def _table(
    title: str | None, criteria: Mapping[str, Any], way: str, **style: Any
) -> rich.table.Table:
    """Test accuracy in % at each share of the dense FLOPs, with 95 % intervals."""
    table = rich.table.Table(title=title, **style)
    table.add_column("criterion")
    for budget in BUDGETS:
        table.add_column(f"{100 * budget:.0f} % of FLOPs", justify="right")
    for name, ways in criteria.items():
        table.add_row(name, *[_cell(found) for found in ways[way]])
    return table


def _cell(found: Mapping[str, float]) -> str:
    half = (found["high"] - found["low"]) / 2
    return f"{100 * found['mean']:.1f} ± {100 * half:.1f}"
