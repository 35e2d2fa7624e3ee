"""What `batch_bridgeout` runs with: settings by data set, hyper-parameters by arm."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxprune
from experiments.harness.methods import FRACTIONS, METHODS, Hyper
from jaxprune.data import DATASETS
from jaxprune.models import MODELS

SEARCHED = Path(__file__).with_name("search.json")

# The settings of the authors' code. Their rate for dropout is not on record, so it is
# that of Batch Bridgeout.
PAPER = {
    "bridgeout": Hyper(0.1, 5e-4, rate=0.3, target=0.75, q=1.5),
    "dropout": Hyper(0.1, 5e-4, rate=0.3),
    "weight_decay": Hyper(0.1, 5e-4),
}

SMALL = {"models": ("vgg_digits", "resnet_digits"), "epochs": 30, "batch_size": 32}
CIFAR = {
    "models": ("bridgeout_vgg16", "bridgeout_resnet28", "bridgeout_wrn28_10"),
    "epochs": 230,
    "batch_size": 128,
}
SUITABLE = {"digits": SMALL, "mnist": SMALL | {"epochs": 3, "batch_size": 128}}
LIKE_THE_PAPER = ("cifar10", "cifar100")

# The learning rate falls by this factor after so many of the paper's 230 epochs.
FALL, FALLS_AFTER = 0.2, (60, 120, 160, 200)

DEEPEST_ROUND = 0.8  # share of the filters that the last round has cut


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything the numbers depend on.

    Attributes:
        dataset: name of the data set.
        models: architectures.
        seeds: how many times each method trains each architecture.
        epochs: passes over the training set.
        batch_size: images in a step.
        fractions: shares of the filters that are cut in one shot.
        round_sparsities: share of the filters that each round has cut.
        round_epochs: passes over the training set after each round's cut.
        schedule: how the learning rate falls, "cosine" or "steps" (the paper's).
        clip: norm at which gradients are clipped, None for the paper's, not at all.
        quirks: names in `QUIRKS`, what else is done as in the authors' code.
        hyper: "model/method" -> its numbers.
    """

    dataset: str
    models: tuple[str, ...]
    seeds: int
    epochs: int
    batch_size: int
    fractions: tuple[float, ...]
    round_sparsities: tuple[float, ...]
    round_epochs: int
    schedule: str
    clip: float | None
    quirks: tuple[str, ...]
    hyper: Mapping[str, Hyper]

    def as_json(self) -> dict[str, Any]:
        """The settings with a name for every number."""
        named = {arm: hyper._asdict() for arm, hyper in self.hyper.items()}
        return dataclasses.asdict(dataclasses.replace(self, hyper=named))


def settings_for(
    dataset: str,
    models: tuple[str, ...] = (),
    *,
    seeds: int,
    epochs: int | None,
    batch_size: int | None,
    rounds: int,
    quick: bool,
    quirks: tuple[str, ...] = (),
) -> Settings:
    """Fills in what suits the data set; `quick` sets limits."""
    suits = SUITABLE.get(dataset, CIFAR)
    models, fractions = models or suits["models"], FRACTIONS
    epochs, batch_size = epochs or suits["epochs"], batch_size or suits["batch_size"]
    if quick:
        models, fractions = models[:1], FRACTIONS[::3]
        seeds, epochs, rounds = 1, min(epochs, 4), 1
    return Settings(
        dataset=dataset,
        models=models,
        seeds=seeds,
        epochs=epochs,
        batch_size=batch_size,
        fractions=fractions,
        round_sparsities=tuple(
            round(DEEPEST_ROUND * index / rounds, 3) for index in range(1, rounds + 1)
        ),
        round_epochs=max(1, epochs // 4),
        schedule="steps" if dataset in LIKE_THE_PAPER else "cosine",
        clip=None if dataset in LIKE_THE_PAPER else 5.0,
        quirks=tuple(sorted(set(quirks))),
        hyper=hyper_parameters(models),
    )


def learning_rates(
    settings: Settings, peak: float, steps_per_epoch: int
) -> optax.Schedule:
    """From the step to the learning rate.

    Shorter trainings than the paper's fall after the same shares of their epochs.
    """
    steps = settings.epochs * steps_per_epoch
    if settings.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, steps)
    falls = {round(steps * epochs / CIFAR["epochs"]): FALL for epochs in FALLS_AFTER}
    return optax.piecewise_constant_schedule(peak, falls)


def training_flops(settings: Settings, images: int) -> dict[str, int]:
    """FLOPs of all trainings of every model, rounds of fine-tuning left out.

    Counted as three times the forward pass: backwards, every convolution is one
    product for its input and one for its kernel.

    Args:
        settings: of the run.
        images: in the training set.
    """
    spec = DATASETS[settings.dataset]
    image = jnp.zeros((1, *spec.image_shape))
    found = {}
    for model in settings.models:
        net = MODELS[model](num_classes=spec.num_classes)
        shapes = jax.eval_shape(net.init, jax.random.key(0), image)
        passes = 3 * images * settings.epochs * settings.seeds * len(METHODS)
        found[model] = passes * jaxprune.costs(net.apply, shapes, image).flops
    return found


def hyper_parameters(models: tuple[str, ...]) -> dict[str, Hyper]:
    """The best of the search for nets that were searched, else the paper's."""
    searched = json.loads(SEARCHED.read_text())["candidates"]
    return {
        arm: Hyper(**searched[arm][0]["hyper"]) if arm in searched else PAPER[method]
        for model in models
        for method in METHODS
        for arm in [f"{model}/{method}"]
    }
