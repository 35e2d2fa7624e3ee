"""Batch Bridgeout: do filters become dispensable if their weights are trained noisy?

Question   Filters are cut in one shot, the same share of every layer, lowest L2 norm
           first, and nothing is fine-tuned. How much accuracy is left after training
           with Batch Bridgeout, with dropout, and with weight decay alone?
Command    jaxprune run batch_bridgeout            (--quick for a first look)
Time       not measured since the study changed; 4 minutes before (2 CPU cores)
Expected   area under accuracy against cut: Batch Bridgeout above dropout and above
           weight decay (the paper's figures). This is the study of `comparison` at the
           size of a coffee break; what that found is in docs/batch_bridgeout.md
Leaves     runs/batch_bridgeout-digits: report.html, results.json, curves.png, model/
Paper      Khan and Stavness, Pruning Convolutional Filters using Batch Bridgeout, 2020,
           https://arxiv.org/abs/2009.10893 (CIFAR, 230 epochs)

With `--dataset cifar10` or `cifar100` this is the paper's run: VGG-16-BN, the 28-layer
ResNet and WRN-28-10, 230 epochs at batch 128, random crops of 4-pixel borders and
mirroring, channels normalised, learning rate 0.1 that falls by 0.2 after 60, 120, 160
and 200 epochs, weight decay 5e-4; the report draws the paper's curves
beneath ours (paper.json). Not run here: no GPU. Expected time for
--seeds 3: 18 hours on one A100, an estimate from FLOPs. A step costs 3 forward passes;
50 000 images x 230 epochs x 3 methods x 3 seeds make 0.19 exaFLOP for the VGG, 0.04 for
the ResNet, 3.70 for the WRN (`training_flops`), assumed at 60 TFLOP/s, 0.4 of the
A100's TF32 peak: 1, 0.2 and 17 hours. The rounds of fine-tuning, on one net, are left
out, and the ResNet is too small to keep such a GPU busy.

As in the paper: SGD with Nesterov momentum; one draw of noise per layer and mini-batch,
targeted at the weakest kernels; the first convolution is noised and cut too, the
classifier is not cut. Unlike it: a filter is cut with its BatchNorm, so that it emits
zero and not a constant; channels on a residual stream are cut together; the last epoch
counts, not the best on the test set; momentum lasts from epoch to epoch (`--quirks`
names what is to be done as in the authors' code); the incomplete last batch of an epoch
is left out; their rate of dropout is not on record, so it is that of Batch Bridgeout.
On other data the learning rate falls along a cosine, the weight decay of all arms
follows from one exposure (`--exposure`: sum over steps of learning rate * weight decay
/ (1 - momentum); the paper's is 14.5), and dropout has the rate that `comparison`
chose.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxprune
from experiments.batch_bridgeout.report import summarize, write_report
from experiments.batch_bridgeout.settings import (
    Settings,
    learning_rates,
    settings_for,
)
from experiments.harness.measure import difference, latency_ms, slice_difference
from experiments.harness.methods import (
    METHODS,
    Subject,
    area,
    kernel_sizes,
    one_shot_masks,
    optimizer,
    perturb,
    shares_of,
    subject,
    training_net,
)
from experiments.harness.quirks import (
    OF_MASKS,
    QUIRKS,
    keep_best,
    quirky_masks,
    read_best,
)
from experiments.harness.runs import Job, Run, Tick, open_run
from experiments.harness.training import (
    Fit,
    State,
    accuracy,
    fit,
    make_predict,
    make_step,
    start,
)
from jaxprune.cli._main import UsageError, known
from jaxprune.data import CLASSIFICATION, Dataset, batches, load, normalize
from jaxprune.io.export import load_exported, save_exported
from jaxprune.models import MODELS, VGG

SIZES_AT = (0.0, 0.3, 0.6)  # cuts whose size and speed are measured
LATENCY_BATCHES = (1, 64)
RECALIBRATION = 512  # training images for BatchNorm's statistics after a cut
PROBES = 32  # test images on which every sliced net is compared with the masked one
FINE_TUNING_RATE = 0.2  # learning rate of a round, as a share of that of training


@dataclasses.dataclass(frozen=True)
class Config:
    """What ``jaxprune run batch_bridgeout`` understands."""

    dataset: str = "digits"
    """digits, shapes32 (these two need no network), mnist, fashion_mnist, cifar10 or
    cifar100."""
    models: tuple[str, ...] = ()
    """Architectures; by default a VGG and a ResNet that suit the data set."""
    seeds: int | None = None
    """How many times each method trains each architecture; by default 3."""
    epochs: int | None = None
    """Passes over the training set; by default what suits the data set."""
    batch_size: int | None = None
    """Images in a step; by default what suits the data set."""
    rounds: int | None = None
    """Rounds of cutting and fine-tuning, by default 4; the last has cut 80 % of all
    filters."""
    exposure: float | None = None
    """How strongly all methods decay weights; by default 5, the paper's is 14.5."""
    quirks: tuple[str, ...] = ()
    """What else to do as the authors' code does: fresh_momentum, best_test_epoch,
    kernels_alone, scales_too (experiments/harness/quirks.py says what they are)."""
    quick: bool = False
    """Less of what is not given: one architecture, one seed, 20 epochs, one round; and
    4 cuts."""
    out: Path | None = None
    """Folder of the run; by default runs/batch_bridgeout-DATASET. The same command
    goes on where it stopped."""
    data_dir: Path | None = None
    """Where data sets are prepared; by default $JAXPRUNE_DATA or ~/.cache/jaxprune."""

    def __post_init__(self) -> None:
        known("data set", self.dataset, CLASSIFICATION)
        for model in self.models:
            known("model", model, MODELS)
        for quirk in self.quirks:
            known("quirk", quirk, QUIRKS)
        for name in ("seeds", "epochs", "batch_size", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} must be at least 1, got {value}")
        if self.exposure is not None and not 0 < self.exposure < float("inf"):
            raise UsageError(f"--exposure must be above 0, got {self.exposure}")


class Task(NamedTuple):
    """One architecture, trained once."""

    model: str
    method: str
    seed: int

    @property
    def arm(self) -> str:
        """What the task shares with those of other seeds."""
        return f"{self.model}/{self.method}"

    @property
    def name(self) -> str:
        """Names the record and the checkpoints."""
        return f"{self.arm}/seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all tasks share.

    Attributes:
        settings: what was asked for.
        train: training set.
        test: test set; nothing is chosen on it.
        folder: of the run.
        subjects: architectures by name.
        steps: the compiled step of every arm.
        locks: by task; who comes second reads what the first has trained.
    """

    settings: Settings
    train: Dataset
    test: Dataset
    folder: Path
    subjects: Mapping[str, Subject]
    steps: Mapping[str, Callable[..., State]]
    locks: Mapping[str, threading.Lock]

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return len(self.train) // self.settings.batch_size

    @property
    def image(self) -> jax.Array:
        """One image, as a net takes it."""
        return normalize(self.test.images[:1], self.test.spec)


def main(config: Config) -> None:
    """Runs the experiment, or what is left of it."""
    _refuse_large_batches(config)
    settings = settings_for(
        config.dataset,
        config.models,
        seeds=config.seeds,
        epochs=config.epochs,
        batch_size=config.batch_size,
        rounds=config.rounds,
        quick=config.quick,
        exposure=config.exposure,
        quirks=config.quirks,
    )
    name = f"batch_bridgeout-{config.dataset}" + ("-quick" if config.quick else "")
    with open_run(config.out or Path("runs", name), settings.as_json()) as run:
        if not run.finished:
            train, test = (
                load(config.dataset, split, data_dir=config.data_dir)
                for split in ("train", "test")
            )
            work(run, settings, train, test)
        run.say(f"report: {write_report(run.folder, run.results)}")


def _refuse_large_batches(config: Config) -> None:
    """Before a folder is made for a run that cannot take a step."""
    if config.batch_size is not None:
        examples = len(load(config.dataset, "train", data_dir=config.data_dir))
        if config.batch_size > examples:
            raise UsageError(
                f"--batch-size {config.batch_size} is more than the {examples} "
                f"training images of {config.dataset}"
            )


def work(run: Run, settings: Settings, train: Dataset, test: Dataset) -> None:
    """Trains, cuts and slices; prunes in rounds; measures; exports."""
    tasks = [
        Task(model, method, seed)
        for seed in range(settings.seeds)  # outermost: see `jobs`
        for model in settings.models
        for method in METHODS
    ]
    bench = set_up(settings, train, test, run.folder, tasks)
    run.each("train, cut, slice", jobs(bench, tasks), tell)
    # Alone, so that nothing disturbs the clock.
    for model in settings.models:
        task = Task(model, "bridgeout", 0)
        run.once(f"sizes/{model}", partial(sizes, bench, task))
    run.once("export", partial(export, run.folder / "model", bench, tasks[0]))
    run.close(summary=summarize(run.results))


def set_up(
    settings: Settings, train: Dataset, test: Dataset, folder: Path, tasks: list[Task]
) -> Bench:
    """Builds and traces the nets; nothing is compiled yet."""
    subjects = {model: subject(model, train.spec) for model in settings.models}
    locks = {task.name: threading.Lock() for task in tasks}
    bench = Bench(settings, train, test, folder, subjects, {}, locks)
    steps = {task.arm: training_step(bench, task) for task in tasks if task.seed == 0}
    return dataclasses.replace(bench, steps=steps)


def jobs(bench: Bench, tasks: list[Task]) -> dict[str, Job]:
    """Everything that can run side by side, in the order in which it should start.

    What starts together are different programs to compile. The rounds, which are one
    long chain, start as soon as the net they begin with is trained.
    """
    settings = bench.settings
    ticks = settings.epochs + len(settings.fractions)
    each = {t.name: Job(partial(train_and_cut, bench, t), ticks) for t in tasks}
    ticks = len(settings.round_sparsities) * settings.round_epochs
    rounds = {"rounds": Job(partial(prune_in_rounds, bench, tasks[0]), ticks)}
    first = {task.name: each[task.name] for task in tasks if task.seed == 0}
    return first | rounds | each


def tell(name: str, record: Any) -> str:
    """A line for the screen about a finished job."""
    if name == "rounds":
        last = record[-1]
        cut_share = f"{100 * last['sparsity']:.0f} % of filters cut"
        return f"rounds: {cut_share}, accuracy {last['after']:.3f}"
    return f"{name}: accuracy {record['accuracy'][0]:.3f}, area {record['area']:.3f}"


# ----------------------------------------------------------------------- one-shot cuts


def training_step(bench: Bench, task: Task) -> Callable[..., State]:
    """The step of the task's arm, for all its seeds."""
    hyper, spec = bench.settings.hyper[task.arm], bench.train.spec
    net = training_net(task.model, task.method, hyper, spec)
    tx = training_tx(bench, task)
    return make_step(net.apply, tx, bench.train, perturb(task.method))


def training_tx(bench: Bench, task: Task) -> optax.GradientTransformation:
    """The optimiser of a task; its seed enters the initial state only."""
    settings, steps = bench.settings, bench.steps_per_epoch
    hyper = settings.hyper[task.arm]
    return optimizer(
        task.method,
        hyper,
        learning_rates(settings, hyper.learning_rate, steps),
        task.seed,
        clip=None,
        fresh_every=steps if "fresh_momentum" in settings.quirks else None,
    )


def trained(bench: Bench, task: Task, tick: Tick = lambda: None) -> Any:
    """The trained variables; from their checkpoint if they were trained before."""
    settings, net = bench.settings, bench.subjects[task.model]
    folder = bench.folder / "checkpoints" / task.name
    best = folder.with_name(f"{folder.name}-best")
    how = Fit(settings.epochs, settings.batch_size, task.seed, folder)
    ask = {}
    if "best_test_epoch" in settings.quirks:
        ask["after"] = keep_best(best, partial(test_accuracy, bench, task))
    with bench.locks[task.name]:
        state = start(net.init, training_tx(bench, task), bench.train, task.seed)
        state = fit(bench.steps[task.arm], state, bench.train, how, tick, **ask)
        saved = read_best(best, state.variables)
    return jax.device_get(saved.state if saved else state.variables)


def test_accuracy(bench: Bench, task: Task, variables: Any) -> float:
    """Accuracy on the test set."""
    logits = bench.subjects[task.model].predict(variables, bench.test)
    return accuracy(logits, bench.test)


def train_and_cut(bench: Bench, task: Task, tick: Tick) -> dict[str, Any]:
    """Accuracy of one trained net after each one-shot cut, masked and sliced."""
    net, test = bench.subjects[task.model], bench.test
    variables = trained(bench, task, tick)
    probe = normalize(test.images[:PROBES], test.spec)
    quirks = OF_MASKS & set(bench.settings.quirks)
    recalibration = [normalize(bench.train.images[:RECALIBRATION], test.spec)]
    accuracies, differences, recalibrated = [], [], []
    for fraction in bench.settings.fractions:
        masks = one_shot_masks(net, variables, fraction)
        if quirks:
            chain = isinstance(net.net, VGG)
            masks = quirky_masks(variables, fraction, quirks, chain=chain, masks=masks)
        masked = jaxprune.apply_masks(variables, masks)
        accuracies.append(accuracy(net.predict(masked, test), test))
        if "batch_stats" in variables:
            again = jaxprune.recalibrate(
                net.net.apply, masked, recalibration, train=True
            )
            recalibrated.append(accuracy(net.predict(again, test), test))
        if not quirks:
            apply_fn = net.net.apply
            differences.append(slice_difference(apply_fn, variables, masks, probe))
        tick()
    return {
        "accuracy": accuracies,
        "area": area(accuracies),
        "recalibrated": recalibrated,
        "difference": differences,
    }


def sizes(bench: Bench, task: Task) -> list[dict[str, Any]]:
    """Parameters, FLOPs and latency of the dense net and of some cuts, sliced."""
    net, variables = bench.subjects[task.model], trained(bench, task)
    rows, calls = [], {batch: {} for batch in LATENCY_BATCHES}
    for fraction in SIZES_AT:
        masks = one_shot_masks(net, variables, fraction)
        small = jax.device_put(jaxprune.slice_params(variables, masks))
        apply_fn = jaxprune.narrow(net.net.apply, masks)
        cost = jaxprune.costs(apply_fn, small, bench.image)
        rows.append(
            {"fraction": fraction, "parameters": cost.parameters, "flops": cost.flops}
        )
        for batch, named in calls.items():
            images = np.repeat(bench.image, batch, axis=0)
            named[fraction] = partial(jax.jit(apply_fn), small, jax.device_put(images))
    times = {str(batch): latency_ms(named) for batch, named in calls.items()}
    return [
        {**row, "latency_ms": {b: found[row["fraction"]] for b, found in times.items()}}
        for row in rows
    ]


# ------------------------------------------------------------- rounds with fine-tuning


def prune_in_rounds(bench: Bench, task: Task, tick: Tick) -> list[dict[str, Any]]:
    """Cuts, fine-tunes, cuts, ... with the momentum kept; what every round left."""
    run = rounds_of(bench, task, tick)
    numbers = range(1, len(run.history))  # round 0 is the net before the first cut
    return [one_round(bench, task, run, number) for number in numbers]


def rounds_of(bench: Bench, task: Task, tick: Tick = lambda: None) -> jaxprune.Rounds:
    """The rounds of the net of a task; once they are on disk nothing is computed."""
    settings, net = bench.settings, bench.subjects[task.model]
    tx, train = rounds_tx(bench, task), bench.train
    steps = settings.round_epochs * bench.steps_per_epoch

    def step(apply_fn: Any, state: State, batch: Any) -> State:
        return make_step(apply_fn, tx, train, perturb(task.method))(state, *batch)

    def evaluate(apply_fn: Any, variables: Any) -> float:
        return accuracy(make_predict(apply_fn)(variables, bench.test), bench.test)

    def score(variables: Any) -> Any:
        return {"params": kernel_sizes(variables["params"])}

    return jaxprune.rounds(
        net.net.apply,
        trained(bench, task),
        bench.image,
        tx=tx,
        data=ticking(round_batches(bench), bench.steps_per_epoch, tick),
        steps=[0] + [steps] * len(settings.round_sparsities),
        sparsity=[shares_of(net.groups, each) for each in settings.round_sparsities],
        score=score,
        members="producers",
        exact=False,
        step=step,
        evaluate=evaluate,
        folder=bench.folder / "checkpoints" / "rounds",
        key=start(net.init, tx, train, task.seed).key,
        progress=False,
    )


def rounds_tx(bench: Bench, task: Task) -> optax.GradientTransformation:
    """As in training, but the learning rate is lower and falls anew in every round."""
    settings, hyper = bench.settings, bench.settings.hyper[task.arm]
    steps, rounds = settings.round_epochs, len(settings.round_sparsities)
    steps *= bench.steps_per_epoch
    fall = optax.cosine_decay_schedule(FINE_TUNING_RATE * hyper.learning_rate, steps)
    ends = [steps * index for index in range(1, rounds)]
    schedule = optax.join_schedules([fall] * rounds, ends)
    return optimizer(task.method, hyper, schedule, task.seed, clip=None)


def round_batches(bench: Bench) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """Number of a step, of all rounds -> its images and labels."""
    settings, train = bench.settings, bench.train

    @functools.lru_cache(maxsize=1)
    def rows(epoch: int) -> list[np.ndarray]:
        done, within = divmod(epoch, settings.round_epochs)
        order = {"seed": 1001 + done, "epoch": within}
        return list(batches(train, settings.batch_size, **order))

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, within = divmod(step, bench.steps_per_epoch)
        index = rows(epoch)[within]
        return train.images[index], train.labels[index]

    return batch


def ticking(
    batch: Callable[[int], Any], steps_per_epoch: int, tick: Tick
) -> Callable[[int], Any]:
    """`batch`, and a tick for every epoch that begins, those before a kill at once."""
    epochs = 0

    def ticked(step: int) -> Any:
        nonlocal epochs
        while epochs <= step // steps_per_epoch:
            tick()
            epochs += 1
        return batch(step)

    return ticked


def one_round(
    bench: Bench, task: Task, run: jaxprune.Rounds, number: int
) -> dict[str, Any]:
    """What a round has cut and what it left."""
    test, dense = bench.test, bench.subjects[task.model]
    entry, small, before = run.history[number], run.load(number), run.load(number - 1)
    further = jaxprune.slice_params(small.masks, before.masks)
    predict = make_predict(small.apply_fn)
    cut = predict(jaxprune.slice_params(before.variables, further), test)
    full = jaxprune.unslice_params(small.variables, small.masks)
    found = predict(small.variables, test), dense.predict(full, test)
    return {
        "sparsity": bench.settings.round_sparsities[number - 1],
        "before": accuracy(cut, test),
        "after": entry.metric,
        "difference": difference(*found),
        "parameters": entry.parameters,
        "flops": entry.flops,
        "units": {
            name: [int(kept.sum()), len(kept)] for name, kept in small.plan.items()
        },
    }


def export(folder: Path, bench: Bench, task: Task) -> dict[str, Any]:
    """Writes the net of the last round for raw images, reads it back, compares."""
    last, test = rounds_of(bench, task).last, bench.test
    apply_fn, variables = last.apply_fn, last.variables
    logits = make_predict(apply_fn)(variables, test)
    save_exported(
        folder,
        lambda variables, images: apply_fn(variables, normalize(images, test.spec)),
        variables,
        test.images[:1],
        facts={"dataset": test.spec.name, "test accuracy": accuracy(logits, test)},
    )
    again = np.asarray(load_exported(folder)(test.images))
    return {
        "folder": folder.name,
        "bytes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        "accuracy": accuracy(again, test),
        "difference": difference(again, logits),
    }
