"""Hyper-parameters for `batch_bridgeout`: the same search for every method.

Question  Which learning rate, weight decay, rate, target and q does each method get?
Command   python -m experiments.batch_bridgeout.search
Time      about 6 minutes on 2 cores
Leaves    experiments/batch_bridgeout/search.json, which the experiment reads; runs/ has
          what is found so far, and the same command goes on from there

On every net, every method trains 6 candidates drawn from its space, then 6 drawn near
the best 2 of these, each with one seed on the first 80 % of the training set; the best
two are trained with a second seed. Chosen is the largest mean area under the
accuracy-against-cut curve on the other 20 %, among those that are right on 95 % of it
uncut: noise or decay strong enough to make a net of a few filters would win the area
alone. The test set is never read, and the seeds are none of the experiment's. The
ranges were narrowed after a wider first look, for all methods alike.
"""

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness.methods import (
    FRACTIONS,
    METHODS,
    Hyper,
    Subject,
    one_shot_masks,
    optimizer,
    perturb,
    subject,
    training_net,
)
from experiments.harness.pages import write_compact
from experiments.harness.runs import Job, Run, Tick, open_run
from experiments.harness.training import Fit, accuracy, fit, make_step, start
from jaxprune import apply_masks
from jaxprune.data import Dataset, load

RESULT = Path(__file__).with_suffix(".json")
NETS = ("vgg_digits", "resnet_digits")
EPOCHS, BATCH_SIZE = 30, 32
CANDIDATES, PARENTS, FINALISTS = 6, 2, 2
LEAST_ACCURACY = 0.95
TARGETS = {"bridgeout": (0.5, 0.75, 0.9), "dropout": (0.5, 0.75, 1.0)}
NORMS = (1.0, 1.5)
FIRST_SEED, MORE_SEEDS = 1000, (1001,)


def draw(method: str, rng: np.random.Generator) -> Hyper:
    """Draws a candidate from the space of a method."""
    learning_rate, weight_decay = (
        float(np.exp(rng.uniform(np.log(low), np.log(high))))
        for low, high in ((0.05, 0.4), (2e-3, 2e-2))
    )
    rate = rng.uniform(0.1, 0.5)
    target = rng.choice(TARGETS.get(method, (1.0,)))
    return tidy(method, learning_rate, weight_decay, rate, target, rng.choice(NORMS))


def draw_near(method: str, parent: Hyper, rng: np.random.Generator) -> Hyper:
    """Draws a candidate near another; what is a choice is drawn anew one time in 4."""
    fresh = draw(method, rng)
    return tidy(
        method,
        parent.learning_rate * np.exp(0.35 * rng.standard_normal()),
        parent.weight_decay * np.exp(0.5 * rng.standard_normal()),
        np.clip(parent.rate + 0.08 * rng.standard_normal(), 0.02, 0.7),
        fresh.target if rng.random() < 0.25 else parent.target,
        fresh.q if rng.random() < 0.25 else parent.q,
    )


def tidy(method: str, *numbers: float) -> Hyper:
    """Rounds to two digits, and leaves out what the method does not have."""
    used = {"bridgeout": 5, "dropout": 4, "weight_decay": 2}[method]
    return Hyper(*(float(f"{number:.2g}") for number in numbers[:used]))


def make_trial(
    the_net: Subject, method: str, train: Dataset, validation: Dataset
) -> Callable[[Hyper, int], list[float]]:
    """Returns ``(hyper, seed) -> accuracies at FRACTIONS``; compiles once if it can."""
    steps = EPOCHS * (len(train) // BATCH_SIZE)

    def tx(hyper: Hyper, seed: int = 0) -> optax.GradientTransformation:
        schedule = optax.cosine_decay_schedule(1.0, steps)
        return optimizer(
            method, hyper, lambda count: hyper.learning_rate * schedule(count), seed
        )

    @jax.jit
    def traced_step(state, images, labels, hyper):
        apply_fn = the_net.net.apply
        step = make_step(apply_fn, tx(hyper), train, perturb(method))
        return step(state, images, labels)

    @functools.cache
    def step_of(hyper: Hyper):
        if method == "dropout":  # Flax's rate is part of the program.
            net = training_net(the_net.name, method, hyper, train.spec)
            return make_step(net.apply, tx(hyper), train)
        numbers = _traceable(hyper)
        return lambda state, images, labels: traced_step(state, images, labels, numbers)

    # Under jit even a target of 1 is traced, so that all states look the same.
    begin = jax.jit(
        lambda hyper, seed: start(the_net.init, tx(hyper, seed), train, seed)
    )

    def trial(hyper: Hyper, seed: int) -> list[float]:
        state = begin(_traceable(hyper), seed)
        state = fit(step_of(hyper), state, train, Fit(EPOCHS, BATCH_SIZE, seed))
        variables = jax.device_get(state.variables)
        return [cut_accuracy(the_net, variables, validation, f) for f in FRACTIONS]

    return trial


def cut_accuracy(
    the_net: Subject, variables: Any, data: Dataset, fraction: float
) -> float:
    """Accuracy after cutting this share of every layer, without fine-tuning."""
    masks = one_shot_masks(the_net, variables, fraction)
    return accuracy(the_net.predict(apply_masks(variables, masks), data), data)


def _traceable(hyper: Hyper) -> Hyper:
    return Hyper(*(jnp.float32(number) for number in hyper))


def search(
    run: Run,
    the_net: Subject,
    method: str,
    train: Dataset,
    validation: Dataset,
    tick: Tick,
) -> list[dict[str, Any]]:
    """Returns every candidate of an arm with its curves, best first."""
    compute = make_trial(the_net, method, train, validation)

    def trial(hyper: Hyper, seed: int) -> list[float]:
        name = f"{the_net.name}/{method} {tuple(hyper)} seed {seed}"
        curve = run.once(name, lambda: compute(hyper, seed))
        tick()
        return curve

    rng = np.random.default_rng([METHODS.index(method), NETS.index(the_net.name)])

    def first_look(hyper: Hyper) -> dict[str, Any]:
        return {"hyper": hyper, "curves": [trial(hyper, FIRST_SEED)]}

    tried = [first_look(draw(method, rng)) for _ in range(CANDIDATES)]
    parents = sorted(tried, key=merit, reverse=True)[:PARENTS]
    for index in range(CANDIDATES):
        parent = parents[index % PARENTS]["hyper"]
        tried.append(first_look(draw_near(method, parent, rng)))
    tried.sort(key=merit, reverse=True)
    for candidate in tried[:FINALISTS]:
        candidate["curves"] += [trial(candidate["hyper"], seed) for seed in MORE_SEEDS]
    finalists = sorted(tried[:FINALISTS], key=merit, reverse=True)
    return [
        {
            "hyper": candidate["hyper"]._asdict(),
            "area": round(merit(candidate)[1], 4),
            "uncut": round(float(np.mean([c[0] for c in candidate["curves"]])), 4),
            "curves": [np.round(c, 4).tolist() for c in candidate["curves"]],
        }
        for candidate in finalists + tried[FINALISTS:]
    ]


def merit(candidate: dict[str, Any]) -> tuple[bool, float]:
    """Whether it is accurate enough uncut, then the area."""
    curves = np.asarray(candidate["curves"])
    return bool(curves[:, 0].mean() >= LEAST_ACCURACY), float(curves.mean())


def main() -> None:
    train, validation = (
        load("digits", part) for part in ("train[:80%]", "train[80%:]")
    )
    nets = {name: subject(name, train.spec) for name in NETS}
    settings = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "tries": 2 * CANDIDATES}
    trials = 2 * CANDIDATES + FINALISTS * len(MORE_SEEDS)
    with open_run(Path("runs", "batch_bridgeout_search"), settings) as run:
        arms = {
            f"{name}/{method}": Job(
                partial(search, run, nets[name], method, train, validation), trials
            )
            for method in METHODS
            for name in NETS
        }
        run.each("search", arms, lambda arm, found: f"{arm}: {found[0]['hyper']}")
        run.close()
    versions = run.results["machine"]["versions"]
    records = {arm: run.results["records"][arm] for arm in arms}
    write_compact(RESULT, settings | {"versions": versions, "candidates": records})


if __name__ == "__main__":
    main()
