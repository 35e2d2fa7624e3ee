"""The Bridgeout family side by side: which noise makes filters dispensable?

Question   Batch Bridgeout has relatives: one draw per example, noise by groups or on
           activations, its average in closed form, its penalty without noise. Which of
           them prepares a net for one-shot cuts, how do q and rate act, and what is
           left of the differences once BatchNorm is recalibrated or the net tuned?
Command    python -m experiments.batch_bridgeout.family
Time       95 minutes on one CPU core (Intel Xeon) of a busy machine, most of them for
           shapes32
Expected   area under accuracy against cut: Batch Bridgeout above dropout and above
           weight decay (the paper's order); smaller q, sparser weights. Measured: above
           dropout on the VGG (0.478, 0.335) and on shapes32 (0.220, 0.194), nowhere
           above weight decay (0.485, 0.216); on the dense net no clear difference
           (0.758, 0.735, 0.768); smaller q was not sparser
Leaves     experiments/batch_bridgeout/family.json and, from it, the tables and figures
           of docs/batch_bridgeout.md; runs/ has what is found so far, and the same
           command goes on from there
Papers     Khan and Stavness, Pruning Convolutional Filters using Batch Bridgeout, 2020,
           https://arxiv.org/abs/2009.10893; Khan, Shah, Stavness, Bridgeout, 2018,
           https://arxiv.org/abs/1804.08042

Three arenas: all methods on a dense net and all that need no layer of their own on a
small VGG, on digits and on shapes32, a task of 16 classes of textured shapes in
clutter. In each, every method draws the same number of hyper-parameters from its space,
trains them with one seed on 80 % of the training images, and keeps those with the
largest area under accuracy against cut on the other 20 %, among those accurate enough
uncut. These are trained with 5 seeds on all training images and judged on the test set,
which nothing was chosen on.

A new run takes the committed records of arenas that are as they were, so a changed
arena is all that is computed.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import methods
from experiments.harness.methods import FRACTIONS, Hyper, Subject, area, one_shot_masks
from experiments.harness.noisy_nets import LAYERS, NoisyMLP, NoisyVGG
from experiments.harness.pages import write_compact
from experiments.harness.runs import Run, open_run
from experiments.harness.training import Fit, State, accuracy, fit, make_step, start
from jaxprune import apply_masks, recalibrate
from jaxprune.data import Dataset, batches, load, normalize

RESULT = Path(__file__).with_suffix(".json")
PAPER = ("weight_decay", "dropout", "bridgeout")
WITHOUT_LAYERS = (
    *PAPER,
    "targeted_dropout",
    "untargeted_bridgeout",
    "dropconnect",
    "group_bridgeout",
    "bridge_penalty",
)
LINKS = (
    "targeted_dropout",
    "untargeted_bridgeout",
    "dropconnect",
    "group_bridgeout",
    "bridge_penalty",
    "group_lasso",
)
NORMS, RATES = (0.75, 1.0, 1.5, 2.0), (0.1, 0.3, 0.6)
FINE_TUNING_EPOCHS, FINE_TUNING_RATE = 2, 0.2  # of training's learning rate
RECALIBRATION = (4, 256)  # batches, images in each
SMALL_WEIGHT = 1e-3


@dataclasses.dataclass(frozen=True)
class Arena:
    """One net on one data set, and the methods that meet there.

    Attributes:
        net: ``num_classes -> module``, evaluated and, unless told otherwise, trained.
        dataset: name of the data set.
        methods: who takes part.
        epochs: passes over the training images.
        batch_size: images in a step.
        tries: hyper-parameters that every method draws.
        learning_rates: range, log-uniform.
        weight_decays: range, log-uniform.
        least: accuracy uncut below which no hyper-parameters are chosen.
        rates: range of drop probabilities, uniform.
        seeds: how often each method is judged.
        train: part of the training split.
        sweep: whether q and rate are swept.
        afterwards: methods that are also recalibrated after the cut.
        tuned: whether these are also tuned after the cut, which takes long.
    """

    net: Callable[..., nn.Module]
    dataset: str
    methods: tuple[str, ...]
    epochs: int
    batch_size: int
    tries: int
    learning_rates: tuple[float, float]
    weight_decays: tuple[float, float]
    least: float
    rates: tuple[float, float] = (0.1, 0.6)
    seeds: int = 5
    train: str = "100%"
    sweep: bool = False
    afterwards: tuple[str, ...] = ()
    tuned: bool = True


ARENAS = {
    "mlp": Arena(
        NoisyMLP,
        "digits",
        PAPER + LINKS + ("per_example", "fast", "sparseout"),
        epochs=40,
        batch_size=64,
        tries=10,
        learning_rates=(0.02, 0.3),
        weight_decays=(1e-4, 1e-2),
        least=0.92,
        sweep=True,
    ),
    "vgg": Arena(
        NoisyVGG,
        "digits",
        WITHOUT_LAYERS,
        epochs=24,
        batch_size=64,
        tries=8,
        learning_rates=(0.05, 0.4),
        weight_decays=(2e-3, 2e-2),
        least=0.95,
        afterwards=PAPER,
    ),
    "shapes32": Arena(
        partial(NoisyVGG, widths=(16, "M", 32, "M", 48, 48), stem_stride=2),
        "shapes32",
        WITHOUT_LAYERS,
        epochs=20,
        batch_size=128,
        tries=5,
        learning_rates=(0.1, 0.4),
        weight_decays=(3e-4, 3e-3),
        least=0.6,
        rates=(0.05, 0.3),
        afterwards=PAPER,
        tuned=False,
    ),
}

TARGETED = {
    "bridgeout": (0.5, 0.75, 0.9),
    "dropconnect": (0.5, 0.75, 1.0),
    "targeted_dropout": (0.5, 0.75, 0.9),
    "per_example": (0.75, 1.0),
}
# Log-uniform: the noise of a group is as large as its norm; penalties are not rates.
STRENGTHS = {
    "group_bridgeout": (3e-4, 3e-2),
    "bridge_penalty": (1e-5, 1e-3),
    "group_lasso": (1e-5, 1e-3),
}
HAS_NORM = {
    "bridgeout",
    "untargeted_bridgeout",
    "group_bridgeout",
    "bridge_penalty",
    "per_example",
    "fast",
    "sparseout",
}


def draw(method: str, arena: Arena, rng: np.random.Generator) -> Hyper:
    """Draws hyper-parameters from the space of a method."""

    def log_uniform(low: float, high: float) -> float:
        return float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.2g}")

    rates = [log_uniform(*arena.learning_rates), log_uniform(*arena.weight_decays)]
    if method == "weight_decay":
        return Hyper(*rates)
    if method in STRENGTHS:
        strength = log_uniform(*STRENGTHS[method])
    else:
        strength = float(f"{rng.uniform(*arena.rates):.2g}")
    target = float(rng.choice(TARGETED.get(method, (1.0,))))
    q = float(rng.choice((1.0, 1.5))) if method in HAS_NORM else 1.0
    return Hyper(*rates, strength, target, q)


# ---------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class Bench:
    """An arena with its data and its programs, compiled once.

    Attributes:
        arena: what was asked for.
        subject: the net as it is evaluated.
        train: training images.
        test: what the accuracies are of.
    """

    arena: Arena
    subject: Subject
    train: Dataset
    test: Dataset
    steps: dict[Any, Callable[..., State]] = dataclasses.field(default_factory=dict)

    def trained(self, method: str, hyper: Hyper, seed: int) -> Any:
        """The variables after training."""
        arena = self.arena
        tx = self.tx(method, hyper, seed)
        state = start(self.subject.init, tx, self.train, seed)
        how = Fit(arena.epochs, arena.batch_size, seed)
        state = fit(self.step(method, hyper), state, self.train, how)
        return jax.device_get(state.variables)

    def tx(self, method: str, hyper: Hyper, seed: int = 0) -> Any:
        """The optimiser; the learning rate falls along a cosine."""
        steps = self.arena.epochs * (len(self.train) // self.arena.batch_size)
        schedule = optax.cosine_decay_schedule(1.0, steps)
        rate = hyper.learning_rate
        noise = _traced_target(hyper) if method in methods.NOISES else hyper
        return methods.optimizer(method, noise, lambda n: rate * schedule(n), seed)

    def step(self, method: str, hyper: Hyper) -> Callable[..., State]:
        """The step of a method, compiled once for all its numbers."""
        if method not in self.steps:
            self.steps[method] = jax.jit(partial(self._traced_step, method))
        numbers = Hyper(*(jnp.float32(number) for number in hyper))
        return lambda *args: self.steps[method](numbers, *args)

    def _traced_step(self, method: str, hyper: Hyper, *args: Any) -> State:
        layer = "dropout" if method in methods.DROPOUTS else method
        layer = layer if layer in LAYERS else "plain"
        numbers = {"rate": hyper.rate, "target": hyper.target, "q": hyper.q}
        net = self.subject.net.clone(layer=layer, **numbers)
        perturb = methods.perturb(method)
        return make_step(net.apply, self.tx(method, hyper), self.train, perturb)(*args)

    def accuracies(self, variables: Any) -> list[float]:
        """Accuracy after each one-shot cut."""
        return [
            self.accuracy(apply_masks(variables, self.masks(variables, fraction)))
            for fraction in FRACTIONS
        ]

    def masks(self, variables: Any, fraction: float) -> Any:
        """Which weights a cut of this share of every layer leaves."""
        return one_shot_masks(self.subject, variables, fraction)

    def accuracy(self, variables: Any) -> float:
        """Accuracy on the test images."""
        return accuracy(self.subject.predict(variables, self.test), self.test)


def _traced_target(hyper: Hyper) -> Hyper:
    """With the target as an array: all states of a method look the same."""
    return hyper._replace(target=jnp.float32(hyper.target))


@functools.cache
def bench(name: str, validation: bool) -> Bench:
    """The bench of an arena, on the data to search or to judge with."""
    arena = ARENAS[name]
    train = load(arena.dataset, f"train[:{arena.train}]")
    if validation:
        border = len(train) * 4 // 5
        train, test = _part(train, slice(border)), _part(train, slice(border, None))
    else:
        test = load(arena.dataset, "test")
    net = arena.net(num_classes=train.spec.num_classes)
    return Bench(arena, methods.subject_of(name, net, train.spec), train, test)


def _part(data: Dataset, rows: slice) -> Dataset:
    return dataclasses.replace(data, images=data.images[rows], labels=data.labels[rows])


# ------------------------------------------------------------------- what is looked at


def search(run: Run, name: str, method: str) -> Hyper:
    """The best of the method's tries."""
    arena = ARENAS[name]
    rng = np.random.default_rng([list(ARENAS).index(name), *method.encode()])
    tries = []
    for index in range(arena.tries):
        hyper = draw(method, arena, rng)

        def curve(hyper: Hyper = hyper) -> dict[str, Any]:
            here = bench(name, validation=True)
            found = here.accuracies(here.trained(method, hyper, 1000))
            return {"hyper": hyper._asdict(), "accuracy": found}

        tries.append(run.once(f"{name}/{method}/try{index}", curve))
    return Hyper(**max(tries, key=partial(merit, arena))["hyper"])


def merit(arena: Arena, tried: Mapping[str, Any]) -> tuple[float, float]:
    """How far it is below the least accuracy uncut, then the area."""
    return min(tried["accuracy"][0] - arena.least, 0.0), area(tried["accuracy"])


def judged(name: str, method: str, hyper: Hyper, seed: int) -> dict[str, Any]:
    """One training on all training images, looked at from all sides."""
    here = bench(name, validation=False)
    variables = here.trained(method, hyper, seed)
    curve = here.accuracies(variables)
    record = {
        "hyper": hyper._asdict(),
        "accuracy": curve,
        "area": area(curve),
        "sparsity": weight_sparsity(variables),
    }
    if method in here.arena.afterwards:
        record |= afterwards(here, variables, hyper, seed)
    return record


def weight_sparsity(variables: Any) -> dict[str, float]:
    """How sparse the kernels are that can be cut, without cutting.

    ``small`` is the share of weights below 1e-3. ``hoyer`` does not depend on scale: 0
    if all weights of a kernel are equally large, 1 if a single one is not zero; mean
    over kernels.
    """
    params = variables["params"]
    chosen = methods.hidden_kernels(params)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(chosen), strict=True)
    kernels = [np.abs(np.asarray(w, np.float64)).ravel() for w, yes in pairs if yes]
    every = np.concatenate(kernels)
    return {
        "small": float(np.mean(every < SMALL_WEIGHT)),
        "hoyer": float(np.mean([hoyer(kernel) for kernel in kernels])),
    }


def hoyer(weights: np.ndarray) -> float:
    """Hoyer's measure: (sqrt(n) - |w|_1 / |w|_2) / (sqrt(n) - 1)."""
    root, norm = np.sqrt(weights.size), np.linalg.norm(weights)
    return float((root - weights.sum() / norm) / (root - 1)) if norm else 1.0


def afterwards(
    here: Bench, variables: Any, hyper: Hyper, seed: int
) -> dict[str, list[float]]:
    """The same cuts, followed by what a user would do next.

    Compensation of the cut weights belongs between the cut and the recalibration.
    """
    found: dict[str, list[float]] = {"recalibrated": [], "fine_tuned": []}
    for fraction in FRACTIONS:
        masks = here.masks(variables, fraction)
        fresh = recalibrated_net(here, apply_masks(variables, masks), seed)
        found["recalibrated"].append(here.accuracy(fresh))
        if here.arena.tuned:
            tuned = fine_tuned(here, variables, masks, hyper, seed)
            found["fine_tuned"].append(here.accuracy(tuned))
    return {name: curve for name, curve in found.items() if curve}


def recalibrated_net(here: Bench, variables: Any, seed: int) -> Any:
    """With BatchNorm statistics of a few batches of training images."""
    count, size = RECALIBRATION
    indices = list(batches(here.train, size, seed=seed, epoch=0))[:count]
    images = [normalize(here.train.images[index], here.train.spec) for index in indices]
    return recalibrate(here.subject.net.apply, variables, images)


def fine_tuned(here: Bench, variables: Any, masks: Any, hyper: Hyper, seed: int) -> Any:
    """Trained on for a little with what is cut held at zero; same for all methods."""
    epochs, size = FINE_TUNING_EPOCHS, here.arena.batch_size
    steps = epochs * (len(here.train) // size)
    rate = FINE_TUNING_RATE * hyper.learning_rate
    schedule = optax.cosine_decay_schedule(1.0, steps)

    def tx(hyper: Hyper, rate: Any) -> optax.GradientTransformation:
        return methods.optimizer("weight_decay", hyper, lambda n: rate * schedule(n))

    if "fine tuning" not in here.steps:

        @jax.jit
        def step(numbers: Any, masks: Any, *args: Any) -> State:
            inner = make_step(here.subject.net.apply, tx(*numbers), here.train)
            state = inner(*args)
            return state._replace(variables=apply_masks(state.variables, masks))

        here.steps["fine tuning"] = step
    numbers = jax.tree.map(jnp.float32, (hyper, rate))
    begin = start(here.subject.init, tx(hyper, rate), here.train, seed)
    begin = begin._replace(variables=apply_masks(variables, masks))
    step = partial(here.steps["fine tuning"], numbers, masks)
    return fit(step, begin, here.train, Fit(epochs, size, 500 + seed)).variables


# ----------------------------------------------------------------------------- the run


def work(run: Run, name: str) -> None:
    """Everything in one arena."""
    arena = ARENAS[name]
    best = {method: search(run, name, method) for method in arena.methods}
    for method, hyper in best.items():
        for seed in range(arena.seeds):
            record = f"{name}/{method}/seed{seed}"
            run.once(record, partial(judged, name, method, hyper, seed))
        run.say(f"{name}/{method}: area {_mean_area(run, name, method):.3f} {hyper}")
    sweep = [(q, rate) for q in NORMS for rate in RATES] if arena.sweep else []
    for q, rate in sweep:
        hyper = best["bridgeout"]._replace(q=q, rate=rate)
        for seed in range(arena.seeds):
            record = f"{name}/sweep/q{q}/rate{rate}/seed{seed}"
            run.once(record, partial(judged, name, "bridgeout", hyper, seed))


def _mean_area(run: Run, name: str, method: str) -> float:
    records, seeds = run.results["records"], range(ARENAS[name].seeds)
    return float(np.mean([records[f"{name}/{method}/seed{s}"]["area"] for s in seeds]))


def main() -> None:
    settings = {
        name: dataclasses.asdict(arena) | {"net": repr(arena.net(num_classes=10))}
        for name, arena in ARENAS.items()
    }
    with open_run(Path("runs", "batch_bridgeout_family"), settings) as run:
        if not run.results["records"]:
            take_over(run, json.loads(RESULT.read_text()))
        for name in ARENAS:
            work(run, name)
        run.close()
    write_compact(RESULT, run.results)


def take_over(run: Run, committed: Mapping[str, Any]) -> None:
    """Copies the committed records of the arenas that are as they were.

    A run folder that is deleted, or of another machine, is not needed to change one
    arena; what is copied, and how long all of the committed run took, is noted.
    """
    settings, old = run.results["settings"], committed["settings"]
    same = [name for name in settings if old.get(name) == settings[name]]
    run.results["taken over"] = {"arenas": same, "seconds": committed["seconds"]}
    for name, record in committed["records"].items():
        if name.partition("/")[0] in same:
            run.put(name, record)


if __name__ == "__main__":
    main()
