"""What `batch_bridgeout` runs with: settings by data set, hyper-parameters by arm."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxprune
from experiments.harness.methods import FRACTIONS, METHODS, Hyper
from jaxprune.data import DATASETS
from jaxprune.models import MODELS

# The settings of the authors' code. Their rate for dropout is not on record, so it is
# that of Batch Bridgeout.
PAPER = {
    "bridgeout": Hyper(0.1, 5e-4, rate=0.3, target=0.75, q=1.5),
    "dropout": Hyper(0.1, 5e-4, rate=0.3),
    "weight_decay": Hyper(0.1, 5e-4),
}
PAPER_EXPOSURE = 14.5  # of these, in 230 epochs of CIFAR at batch 128
# In short trainings the paper's costs accuracy uncut (docs/batch_bridgeout.md).
USUAL_EXPOSURE = 5.0

# Elsewhere the rate of dropout is what `comparison` chose, and the weight decay of all
# arms follows from the exposure. Nets without BatchNorm want a smaller learning rate.
SMALL_DROPOUT = 0.1
PEAK_WITHOUT_BATCH_NORM = 0.02
WITHOUT_BATCH_NORM = ("lenet300", "lenet5", "vit_b16", "vit_tiny")
MOMENTUM = 0.9

SMALL = {"models": ("vgg_digits", "resnet_digits"), "epochs": 30, "batch_size": 32}
CIFAR = {
    "models": ("bridgeout_vgg16", "bridgeout_resnet28", "bridgeout_wrn28_10"),
    "epochs": 230,
    "batch_size": 128,
}
SUITABLE = {
    "digits": SMALL,
    "mnist": SMALL | {"epochs": 3, "batch_size": 128},
    "fashion_mnist": SMALL | {"epochs": 5, "batch_size": 128},
}
TRAINING_IMAGES = {
    "digits": 1437,
    "shapes32": 16_000,
    "mnist": 60_000,
    "fashion_mnist": 60_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
}
LIKE_THE_PAPER = ("cifar10", "cifar100")
QUICK = {"seeds": 1, "epochs": 20, "rounds": 1}

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
        exposure: sum over steps of learning rate * weight decay / (1 - momentum), alike
            for all arms.
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
    exposure: float
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
    seeds: int | None,
    epochs: int | None,
    batch_size: int | None,
    rounds: int | None,
    quick: bool,
    exposure: float | None = None,
    quirks: tuple[str, ...] = (),
) -> Settings:
    """Fills in what is not given: what suits the data set, or less of it if `quick`."""
    suits = SUITABLE.get(dataset, CIFAR)
    usual = {"seeds": 3, "epochs": suits["epochs"], "rounds": 4}
    if quick:
        usual = {name: min(number, QUICK[name]) for name, number in usual.items()}
    like_the_paper = dataset in LIKE_THE_PAPER
    epochs, rounds = epochs or usual["epochs"], rounds or usual["rounds"]
    settings = Settings(
        dataset=dataset,
        models=models or (suits["models"][:1] if quick else suits["models"]),
        seeds=seeds or usual["seeds"],
        epochs=epochs,
        batch_size=batch_size or suits["batch_size"],
        fractions=FRACTIONS[::3] if quick else FRACTIONS,
        round_sparsities=tuple(
            round(DEEPEST_ROUND * index / rounds, 3) for index in range(1, rounds + 1)
        ),
        round_epochs=max(1, epochs // 4),
        schedule="steps" if like_the_paper else "cosine",
        exposure=exposure or (PAPER_EXPOSURE if like_the_paper else USUAL_EXPOSURE),
        quirks=tuple(sorted(set(quirks))),
        hyper={},
    )
    return dataclasses.replace(settings, hyper=hyper_parameters(settings))


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


def hyper_parameters(settings: Settings) -> dict[str, Hyper]:
    """The paper's numbers, or on small data those of the same protocol."""
    return {
        f"{model}/{method}": _numbers(settings, model, method)
        for model in settings.models
        for method in METHODS
    }


def _numbers(settings: Settings, model: str, method: str) -> Hyper:
    small = settings.dataset not in LIKE_THE_PAPER
    hyper = PAPER[method]
    if small and model in WITHOUT_BATCH_NORM:
        hyper = hyper._replace(learning_rate=PEAK_WITHOUT_BATCH_NORM)
    if small and method == "dropout":
        hyper = hyper._replace(rate=SMALL_DROPOUT)
    if small or settings.exposure != PAPER_EXPOSURE:
        steps = TRAINING_IMAGES[settings.dataset] // settings.batch_size
        rates = learning_rates(settings, hyper.learning_rate, steps)
        decay = decay_of(settings.exposure, rates, settings.epochs * steps)
        hyper = hyper._replace(weight_decay=decay)
    return hyper


def decay_of(exposure: float, rates: optax.Schedule, steps: int) -> float:
    """The weight decay that gives this exposure; see `Settings`.

    Where the gradient is zero, momentum applies every decay 1 / (1 - momentum) times,
    so that a weight shrinks by ``exp(-exposure)`` in all.
    """
    with jax.numpy_dtype_promotion("standard"):
        total = float(jnp.sum(jax.vmap(rates)(jnp.arange(max(steps, 1)))))
    return exposure * (1 - MOMENTUM) / total
