"""The study: does Batch Bridgeout make filters dispensable at equal weight decay?

Question   Weight decay alone kills filters, and the noise decides which and how many.
           How much of what Batch Bridgeout gains is the noise, once all arms decay
           alike? How much is left after recalibration, or a little fine-tuning?
Refuted    The paper is refuted here if, on both data sets, with the VGG with BatchNorm
           and at its own exposure D = 14.5, the area under accuracy against cut of
           targeted Batch Bridgeout (one shot, L2, nothing recalibrated) is not above
           that of weight decay, and of dropout, at the same D: if any of the four
           paired 95 % intervals has its upper end below 0, or all four hold 0.
Command    python -m experiments.batch_bridgeout.comparison   (goes on where it stopped)
           python -m experiments.batch_bridgeout.comparison_report   (makes the page)
Leaves     runs/batch_bridgeout-comparison/results.json; the second command copies it
           to comparison.json and writes docs/batch_bridgeout.md
Paper      Khan and Stavness, Pruning Convolutional Filters using Batch Bridgeout, 2020,
           https://arxiv.org/abs/2009.10893 (CIFAR, 230 epochs, D = 14.5 for all arms)

Protocol
    Exposure. D = sum over steps of learning rate * weight decay / (1 - momentum): where
    the gradient is zero a weight shrinks by exp(-D). D is an axis that is printed and
    never searched; the weight decay of every arm follows from it. "plain" has D = 0.
    Learning rate. One rule for all arms and nets: SGD with Nesterov momentum 0.9, peak
    0.1 (0.02 for nets without BatchNorm), falling along a cosine; no clipping.
    Numbers of a method. The published Bridgeout has those of the authors (rate 0.3, q
    1.5, and target 0.75 where it is targeted) and was never tuned here. The others,
    Bridgeout with noise relative to the kernel among them, choose among three settings
    on the VGG with BatchNorm, on a fifth of the training set of digits, at D = 14.5 and
    one seed: the largest area among those whose uncut accuracy is within 2 points of
    plain training (`chosen`). They are used everywhere else as they are. The bridge
    penalty has the strength to which untargeted noise of the authors' rate averages at
    the mean curvature of the kernels after an epoch of plain training (`matched`).
    Pairs. A seed fixes the initial weights and the order of the batches in all arms;
    intervals are of paired differences (Student's t, 5 seeds, not corrected for the
    number of comparisons).
    Curves. The same share of every layer is cut, 0 to 90 %: lowest L2 norm of a filter,
    one shot; the same with BatchNorm statistics recalibrated on 512 training images;
    lowest group Fisher, one shot; and L2 followed by one epoch of fine-tuning at a
    constant learning rate of 0.001 without decay or noise, the same for all arms. At
    four of the cuts also L2 followed by `jaxprune.compensate` and recalibration, both
    on the same 512 images, for weight decay and Batch Bridgeout at D = 5 and 14.5.
    Small. fashion_mnist is 2 000 training and 1 000 test images, halved to 14x14 in a
    border of 1.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from experiments.batch_bridgeout.shuffled import shuffled_apply
from experiments.harness import methods
from experiments.harness.methods import FRACTIONS, Hyper, Subject, area, subject_of
from experiments.harness.noisy_nets import NoisyVGG
from experiments.harness.runs import Run, open_run
from experiments.harness.training import (
    Fit,
    State,
    accuracy,
    fit,
    held_out,
    make_step,
    start,
)
from jaxprune import scores, taps
from jaxprune.data import Dataset, load, normalize
from jaxprune.models import WideResNet, cifar_resnet

FOLDER = Path("runs/batch_bridgeout-comparison")
MOMENTUM, BATCH = 0.9, 32
EPOCHS = {"digits": 20, "fashion_mnist": 15}
SEEDS = 5
TUNED_AT = (0.3, 0.5, 0.7, 0.9)
PAPER_EXPOSURE = 14.5

VGG = functools.partial(NoisyVGG, widths=(16, 16, "M", 32, 32, "M", 64, 64))
NETS: Mapping[str, Callable[..., Any]] = {
    "vgg": VGG,
    "vgg_no_bn": functools.partial(VGG, batch_norm=False),
    "resnet": functools.partial(cifar_resnet, 8, shortcut="projection"),
    "wrn": functools.partial(WideResNet, stage_sizes=(1, 1, 1), widths=(16, 32, 64)),
}

# (rate or strength, target, q); of several, one is chosen.
AUTHORS = (0.3, 0.75, 1.5)
SETTINGS: Mapping[str, tuple[tuple[float, float, float], ...]] = {
    "bridgeout": (AUTHORS,),
    "relative_bridgeout": (AUTHORS, (0.5, 0.75, 1.5), (0.7, 0.75, 1.5)),
    "shuffled": (AUTHORS,),
    "untargeted_bridgeout": ((0.3, 1.0, 1.5),),
    "dropout": ((0.1, 1.0, 2.0), (0.2, 1.0, 2.0), (0.3, 1.0, 2.0)),
    "targeted_dropout": ((0.15, 0.75, 2.0), (0.3, 0.75, 2.0), (0.5, 0.75, 2.0)),
    "dropconnect": ((0.1, 1.0, 2.0), (0.2, 1.0, 2.0), (0.3, 1.0, 2.0)),
    "group_bridgeout": ((0.001, 1.0, 1.5), (0.003, 1.0, 1.5), (0.01, 1.0, 1.5)),
    "bridge_penalty": ((0.3, 1.0, 1.5),),  # of the noise that it stands for: `matched`
}
NOTHING = {"plain", "weight_decay"}


class Cell(NamedTuple):
    """What the seeds of one number share."""

    dataset: str
    net: str
    exposure: float
    arm: str

    def seed(self, seed: int) -> str:
        """Name of a record."""
        return f"{self.dataset}/{self.net}/D{self.exposure:g}/{self.arm}/seed{seed}"


def _cells(
    dataset: str, net: str, exposures: tuple[float, ...], *arms: str
) -> list[Cell]:
    return [Cell(dataset, net, D, arm) for D in exposures for arm in arms]


BOTH = ("weight_decay", "bridgeout")
MAIN = (*BOTH, "dropout", "relative_bridgeout")
# In the order in which they run: what the question needs first.
CELLS: tuple[Cell, ...] = (
    *_cells("digits", "vgg", (0.0,), "plain"),
    *_cells("digits", "vgg", (14.5,), *MAIN),
    *_cells("fashion_mnist", "vgg", (14.5,), *BOTH, "dropout"),
    *_cells("digits", "vgg", (5.0, 45.0, 1.5), *BOTH),
    *_cells("digits", "vgg", (14.5,), "shuffled", "untargeted_bridgeout"),
    *_cells("digits", "resnet", (14.5,), *BOTH, "dropout"),
    *_cells("digits", "vgg_no_bn", (0.0,), "plain"),
    *_cells("digits", "vgg_no_bn", (14.5,), *BOTH, "relative_bridgeout", "dropout"),
    *_cells("digits", "vgg", (14.5,), "targeted_dropout"),
    *_cells("fashion_mnist", "vgg", (5.0,), *BOTH),
    *_cells("digits", "vgg_no_bn", (1.5,), *BOTH, "relative_bridgeout"),
    *_cells("digits", "wrn", (14.5,), *BOTH),
    *_cells("fashion_mnist", "vgg", (0.0,), "plain"),
    *_cells("digits", "resnet", (0.0,), "plain"),
    *_cells("digits", "vgg", (14.5,), "dropconnect", "group_bridgeout"),
    *_cells("digits", "vgg", (14.5,), "bridge_penalty"),
    *_cells("fashion_mnist", "vgg", (14.5,), "targeted_dropout", "relative_bridgeout"),
    *_cells("digits", "resnet", (14.5,), "targeted_dropout", "relative_bridgeout"),
    *_cells("digits", "wrn", (0.0,), "plain"),
    *_cells("digits", "wrn", (14.5,), "dropout"),
    *_cells("digits", "vgg", (1.5, 5.0, 45.0), "dropout"),
    *_cells("fashion_mnist", "vgg", (1.5, 45.0), *BOTH),
    *_cells("fashion_mnist", "resnet", (14.5,), *MAIN),
)
COMPENSATED: tuple[Cell, ...] = (
    *_cells("digits", "vgg", (14.5, 5.0), *BOTH),
    *_cells("fashion_mnist", "vgg", (5.0, 14.5), *BOTH),
    *_cells("digits", "resnet", (14.5,), *BOTH),
    *_cells("digits", "wrn", (14.5,), *BOTH),
)


def main(folder: Path = FOLDER, cells: tuple[Cell, ...] = CELLS) -> None:
    """Computes every record that is missing."""
    with open_run(folder, settings()) as run:
        for cell in cells:
            hyper = chosen(run, cell)
            for seed in range(SEEDS):
                compute = functools.partial(judged, cell, hyper, seed)
                found = run.once(name := cell.seed(seed), compute)
                run.say(f"{name}: {found['one_shot'][0]:.3f} {found['area']:.3f}")
        for cell in COMPENSATED if cells is CELLS else ():
            for seed in range(SEEDS):
                compute = functools.partial(compensated, cell, chosen(run, cell), seed)
                found = run.once(name := f"compensated/{cell.seed(seed)}", compute)
                run.say(f"{name}: {' '.join(f'{x:.3f}' for x in found)}")
        run.close()


def settings() -> dict[str, Any]:
    """What every record depends on."""
    return {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "settings": SETTINGS,
        "fractions": FRACTIONS,
        "tuned at": TUNED_AT,
    }


def peak(net: str) -> float:
    """The learning rate at the start."""
    return 0.02 if net == "vgg_no_bn" else 0.1


def decay(exposure: float, learning_rate: float, steps: int) -> float:
    """The weight decay that gives this exposure along a cosine of so many steps."""
    rates = 0.5 * learning_rate * (1 + np.cos(np.pi * np.arange(steps) / steps))
    return float(exposure * (1 - MOMENTUM) / rates.sum())


# --------------------------------------------------------------------- numbers, chosen


def chosen(run: Run, cell: Cell) -> tuple[float, float, float]:
    """The numbers of an arm: rate, target, q; see Protocol."""
    if cell.arm in NOTHING:
        return (0.0, 1.0, 1.5)
    if cell.arm == "bridge_penalty":
        return (run.once("matched", matched), 1.0, SETTINGS[cell.arm][0][2])
    if len(SETTINGS[cell.arm]) == 1:
        return SETTINGS[cell.arm][0]
    where = Cell("digits", "vgg", PAPER_EXPOSURE, cell.arm)
    plain = where._replace(exposure=0.0, arm="plain")
    least = tried(run, plain, (0.0, 1.0, 1.5))["accuracy"][0] - 0.02
    return max(
        SETTINGS[cell.arm], key=lambda numbers: merit(tried(run, where, numbers), least)
    )


def merit(record: Mapping[str, Any], least: float) -> tuple[float, float]:
    """How far the uncut accuracy is below the least, then the area."""
    return min(record["accuracy"][0] - least, 0.0), area(record["accuracy"])


def tried(run: Run, cell: Cell, numbers: tuple[float, float, float]) -> Any:
    """A curve on the held-out fifth."""

    def compute() -> dict[str, Any]:
        here = bench(cell.dataset, cell.net, True)
        variables = here.trained(cell, numbers, 1000)
        return {"accuracy": here.curve(variables, here.norms(variables))}

    words = ",".join(f"{number:g}" for number in numbers)
    return run.once(f"tried/{cell.arm}/{words}", compute)


def matched() -> float:
    """The strength of the penalty to which the authors' noise averages.

    To second order noise of rate p adds ``p / (1 - p) * h / 2 * |w|^q`` to the loss of
    a weight with curvature h: here the mean of the empirical Fisher diagonal over the
    convolutions, on 512 images after an epoch of plain training.
    """
    rate, _, q = SETTINGS["bridge_penalty"][0]
    here = bench("digits", "vgg", True)
    cell = Cell("digits", "vgg", 0.0, "plain")
    variables = here.trained(cell, (0.0, 1.0, q), 1000, epochs=1)
    images = normalize(here.train.images[:512], here.train.spec)
    data = [(images, jnp.asarray(here.train.labels[:512]))]
    found = scores.fisher(here.loss, variables, data, progress=False)
    kernels = [x.ravel() for x in jax.tree.leaves(found["params"]) if x.ndim == 4]
    return float(rate / (1 - rate) / 2 * jnp.concatenate(kernels).mean())


# ------------------------------------------------------------------------ one training


@dataclasses.dataclass(frozen=True)
class Bench:
    """A net on a data set, with its programs, compiled once.

    Attributes:
        dataset: its name.
        name: of the net.
        subject: the net as it is evaluated.
        train: training images.
        test: what the accuracies are of.
        steps: compiled steps.
    """

    dataset: str
    name: str
    subject: Subject
    train: Dataset
    test: Dataset
    steps: dict[Any, Callable[..., State]] = dataclasses.field(default_factory=dict)

    def hyper(self, cell: Cell, numbers: tuple[float, float, float]) -> Hyper:
        """Everything an arm trains with."""
        steps = EPOCHS[self.dataset] * (len(self.train) // BATCH)
        rate = peak(self.name)
        return Hyper(rate, decay(cell.exposure, rate, steps), *numbers)

    def trained(
        self,
        cell: Cell,
        numbers: tuple[float, float, float],
        seed: int,
        epochs: int | None = None,
    ) -> Any:
        """The variables after training, all of it unless told otherwise."""
        hyper = self.hyper(cell, numbers)
        tx = self.tx(cell.arm, hyper, seed)
        state = start(self.subject.init, tx, self.train, seed)
        how = Fit(epochs or EPOCHS[self.dataset], BATCH, seed)
        state = fit(self.step(cell.arm, hyper), state, self.train, how)
        return jax.device_get(state.variables)

    def tx(self, arm: str, hyper: Hyper, seed: int = 0) -> Any:
        """The optimiser; the learning rate falls along a cosine."""
        steps = EPOCHS[self.dataset] * (len(self.train) // BATCH)
        schedule = optax.cosine_decay_schedule(1.0, steps)
        peak_rate = hyper.learning_rate
        # The target is an array: plain training and all Bridgeouts are one program.
        noise = hyper._replace(target=jnp.float32(hyper.target))
        noise = noise if program(arm) in methods.NOISES else hyper
        return methods.optimizer(
            program(arm), noise, lambda n: peak_rate * schedule(n), seed, clip=None
        )

    def step(self, arm: str, hyper: Hyper) -> Callable[..., State]:
        """The step of an arm, compiled once for all its numbers."""
        static = () if self.takes_traced_rates else self.dropped(arm, hyper)
        key = program(arm), static
        if key not in self.steps:
            net = self.subject.net.clone(**dict(static))
            self.steps[key] = jax.jit(
                functools.partial(self._traced_step, program(arm), net)
            )
        numbers = Hyper(*(jnp.float32(number) for number in hyper))
        return lambda *args: self.steps[key](numbers, *args)

    @property
    def takes_traced_rates(self) -> bool:
        """Whether the rate of dropout need not be known to the compiler."""
        return isinstance(self.subject.net, NoisyVGG)

    @staticmethod
    def dropped(arm: str, hyper: Hyper) -> tuple[tuple[str, float], ...]:
        """Fields of a net with dropout."""
        if arm not in methods.DROPOUTS:
            return ()
        return ("dropout_rate", hyper.rate), ("dropout_target", hyper.target)

    def _traced_step(self, arm: str, net: Any, hyper: Hyper, *args: Any) -> State:
        if self.takes_traced_rates and arm in methods.DROPOUTS:
            rates = {"rate": hyper.rate, "target": hyper.target, "q": hyper.q}
            net = net.clone(layer="dropout", **rates)
        apply_fn = net.apply
        if arm == "shuffled":
            apply_fn = shuffled_apply(apply_fn, hyper)
        tx, perturb = self.tx(arm, hyper), methods.perturb(arm)
        return make_step(apply_fn, tx, self.train, perturb)(*args)

    # -------------------------------------------------------------- what is looked at

    def norms(self, variables: Any) -> dict[str, np.ndarray]:
        """The L2 norm of every filter."""
        return methods.filter_norms(self.subject.groups, variables["params"])

    def cut(
        self, variables: Any, scores: Mapping[str, np.ndarray], fraction: float
    ) -> tuple[Any, Any]:
        """Variables with the filters of the lowest scores masked, and the masks."""
        groups = self.subject.groups
        keep = methods.lowest_units(groups, scores, fraction)
        masks = jaxprune.expand_masks(groups, keep)
        return jaxprune.apply_masks(variables, masks), masks

    def accuracy(self, variables: Any) -> float:
        """Accuracy on the test images."""
        return accuracy(self.subject.predict(variables, self.test), self.test)

    def curve(self, variables: Any, scores: Mapping[str, np.ndarray]) -> list[float]:
        """Accuracy after each one-shot cut."""
        return [
            self.accuracy(self.cut(variables, scores, fraction)[0])
            for fraction in FRACTIONS
        ]

    def recalibrated(
        self, variables: Any, scores: Mapping[str, np.ndarray]
    ) -> list[float]:
        """The same with BatchNorm statistics measured anew after each cut."""
        images = normalize(self.train.images[:512], self.train.spec)
        found = []
        for fraction in FRACTIONS:
            masked, _ = self.cut(variables, scores, fraction)
            new = jaxprune.recalibrate(
                self.subject.net.apply, masked, [images], train=True
            )
            found.append(self.accuracy(new))
        return found

    def compensated(
        self, variables: Any, scores: Mapping[str, np.ndarray]
    ) -> list[float]:
        """Accuracy after a cut, `jaxprune.compensate` and recalibration."""
        apply_fn, groups = self.subject.net.apply, self.subject.groups
        images = normalize(self.train.images[:512], self.train.spec)
        batches, found = list(jnp.split(images, 4)), []
        for fraction in TUNED_AT:
            _, masks = self.cut(variables, scores, fraction)
            fitted = jaxprune.compensate(
                groups, apply_fn, variables, masks, batches, progress=False
            )
            fitted = jaxprune.recalibrate(apply_fn, fitted, [images], train=True)
            found.append(self.accuracy(fitted))
        return found

    def fisher(self, variables: Any) -> dict[str, np.ndarray]:
        """Group Fisher information of every unit, from 128 training images."""
        images = normalize(self.train.images[:128], self.train.spec)
        labels = jnp.asarray(self.train.labels[:128])
        if "fisher" not in self.steps:
            self.steps["fisher"] = jax.jit(self._fisher)
        return jax.device_get(self.steps["fisher"](variables, images, labels))

    def loss(self, variables: Any, batch: Any) -> jax.Array:
        """The mean loss over a batch."""
        images, labels = batch
        logits = self.subject.net.apply(variables, images)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return each.mean()

    def _fisher(self, variables: Any, images: Any, labels: Any) -> Any:
        gated = taps.gate(self.loss, self.subject.groups)

        def slope(gates: Any, image: jax.Array, label: jax.Array) -> Any:
            return jax.grad(gated)(gates, variables, (image[None], label[None]))

        ones = {name: jnp.ones(g.size) for name, g in self.subject.groups.items()}
        slopes = jax.vmap(slope, in_axes=(None, 0, 0))(ones, images, labels)
        return {name: jnp.square(x).mean(0) / 2 for name, x in slopes.items()}

    def tuned(
        self, variables: Any, scores: Mapping[str, np.ndarray], seed: int
    ) -> list[float]:
        """Accuracy after a cut and one epoch of the one recipe, at `TUNED_AT`."""
        tx = optax.chain(
            optax.trace(MOMENTUM, nesterov=True), optax.scale_by_learning_rate(0.001)
        )
        if "tuned" not in self.steps:
            one_step = make_step(self.subject.net.apply, tx, self.train)

            def masked(masks: Any, state: State, *batch: Any) -> State:
                state = one_step(state, *batch)
                return state._replace(
                    variables=jaxprune.apply_masks(state.variables, masks)
                )

            self.steps["tuned"] = jax.jit(masked)
        how, found = Fit(1, BATCH, 2000 + seed), []
        begin = start(self.subject.init, tx, self.train, seed)
        for fraction in TUNED_AT:
            masked, masks = self.cut(variables, scores, fraction)
            step = functools.partial(self.steps["tuned"], masks)
            state = fit(step, begin._replace(variables=masked), self.train, how)
            found.append(self.accuracy(jax.device_get(state.variables)))
        return found


def program(arm: str) -> str:
    """Which program trains an arm: without noise it is Bridgeout at the rate 0."""
    same = NOTHING | {"untargeted_bridgeout"}
    return "bridgeout" if arm in same else arm


@functools.cache
def bench(dataset: str, net: str, validation: bool = False) -> Bench:
    """The bench of a net on a data set, to choose numbers with or to judge with."""
    train, test = data(dataset)
    if validation:
        train, test = held_out(train)
    module = NETS[net](num_classes=train.spec.num_classes)
    return Bench(dataset, net, subject_of(net, module, train.spec), train, test)


def data(dataset: str) -> tuple[Dataset, Dataset]:
    """Training and test images, small enough for a CPU."""
    if dataset != "fashion_mnist":
        return load(dataset, "train"), load(dataset, "test")
    return tuple(
        halved(load(dataset, split)) for split in ("train[:2000]", "test[:1000]")
    )


def halved(data: Dataset) -> Dataset:
    """Images of half the side: means of 2x2 pixels, 28x28 within a border of 2."""
    images = np.pad(data.images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    n, height, width, channels = images.shape
    blocks = images.reshape(n, height // 2, 2, width // 2, 2, channels)
    images = np.round(blocks.mean((2, 4))).astype(np.uint8)
    spec = dataclasses.replace(
        data.spec,
        image_shape=images.shape[1:],
        augmentation=dataclasses.replace(data.spec.augmentation, pad=1),
    )
    return Dataset(spec, images, data.labels)


def judged(
    cell: Cell, numbers: tuple[float, float, float], seed: int
) -> dict[str, Any]:
    """One training, looked at from all sides."""
    here = bench(cell.dataset, cell.net)
    variables = here.trained(cell, numbers, seed)
    norms = here.norms(variables)
    one_shot = here.curve(variables, norms)
    record = {
        "hyper": here.hyper(cell, numbers)._asdict(),
        "area": area(one_shot),
        "one_shot": one_shot,
        "fisher": here.curve(variables, here.fisher(variables)),
        "tuned": here.tuned(variables, norms, seed),
    }
    if "batch_stats" in variables:
        record["recalibrated"] = here.recalibrated(variables, norms)
    return record


def compensated(
    cell: Cell, numbers: tuple[float, float, float], seed: int
) -> list[float]:
    """The same training once more, looked at after compensation."""
    here = bench(cell.dataset, cell.net)
    variables = here.trained(cell, numbers, seed)
    return here.compensated(variables, here.norms(variables))


if __name__ == "__main__":
    main()
