"""Does `jaxprune.bridgeout()` train as it comes, wherever plain SGD trains?

Question   With no argument, no clipping and the learning rates that plain SGD likes,
           how far below plain SGD, uncut, does Batch Bridgeout end? And the published
           noise, with the authors' numbers?
Command    python -m experiments.batch_bridgeout.defaults
Expected   within 3 points everywhere as it comes, the mean of 5 paired seeds; far
           below, somewhere, as published
Leaves     runs/batch_bridgeout-defaults/results.json (committed as defaults.json)
"""

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxprune
from experiments.batch_bridgeout.comparison import data
from experiments.harness.methods import Subject, subject_of
from experiments.harness.noisy_nets import NoisyVGG
from experiments.harness.runs import open_run
from experiments.harness.training import Fit, accuracy, fit, make_step, start
from jaxprune.models import LeNet300, ViT, cifar_resnet

FOLDER = Path("runs/batch_bridgeout-defaults")
SEEDS = 5
BATCH, EPOCHS = 32, {"digits": 30, "fashion_mnist": 20}
LONGER = {("digits", "vit"): 200 / 30, ("fashion_mnist", "vit"): 80 / 30}  # slow starts

VGG = functools.partial(NoisyVGG, widths=(16, 16, "M", 32, 32, "M", 64, 64))
VIT = functools.partial(
    ViT, width=32, depth=2, num_heads=4, head_dim=8, mlp_width=64, pool="mean"
)
NETS = {
    "lenet300": lambda side: LeNet300(),
    "vgg": lambda side: VGG(),
    "vgg_no_bn": lambda side: VGG(batch_norm=False),
    "resnet8": lambda side: cifar_resnet(8, shortcut="projection"),
    "vit": lambda side: VIT(num_classes=10, patch_size=side // 4),
}
# Learning rate and momentum that plain SGD likes, found with one seed of it alone.
RATES = {
    ("digits", "vit"): ((0.3, 0.0), (0.03, 0.9)),
    ("fashion_mnist", "vit"): ((0.5, 0.0), (0.1, 0.9)),
}
USUAL_RATES = ((0.1, 0.0), (0.02, 0.9))
ARMS = {
    "plain SGD": None,
    "as it comes": {},
    "as published": {"rate": 0.3, "relative": False},
}


class Cell(NamedTuple):
    """What one record is of."""

    dataset: str
    seed: int
    net: str
    arm: str
    rate: tuple[float, float]  # learning rate, momentum

    @property
    def name(self) -> str:
        """Of the record."""
        rate, momentum = self.rate
        return f"{self.dataset}/{self.net}/{self.arm}/{rate:g}/{momentum:g}/{self.seed}"


CELLS = [
    Cell(dataset, seed, net, arm, rate)
    for dataset, seed in itertools.product(EPOCHS, range(SEEDS))
    for arm, net in itertools.product(ARMS, NETS)
    for rate in RATES.get((dataset, net), USUAL_RATES)
]


def main(folder: Path = FOLDER) -> None:
    """Computes every record that is missing."""
    with open_run(folder, {"epochs": EPOCHS, "batch_size": BATCH}) as run:
        for cell in CELLS:
            found = run.once(cell.name, functools.partial(trained, cell))
            run.say(f"{cell.name}: {found:.3f}")
        run.close()


@functools.cache
def bench(dataset: str, net: str) -> tuple[Subject, Any, Any]:
    """A net, its training and its test images."""
    train, test = data(dataset)
    module = NETS[net](train.spec.image_shape[0])
    return subject_of(net, module, train.spec), train, test


def optimizer(arm: str, rate: Any, momentum: Any) -> optax.GradientTransformation:
    """What a person writes: ``optax.chain(jaxprune.bridgeout(), optax.sgd(...))``."""
    how = ARMS[arm]
    noise = [] if how is None else [jaxprune.bridgeout(**how)]
    sgd = optax.chain(optax.trace(momentum), optax.scale_by_learning_rate(rate))
    return optax.chain(*noise, sgd)


@functools.cache
def step(dataset: str, net: str, arm: str) -> Any:
    """One compiled step for all learning rates."""
    subject, train, _ = bench(dataset, net)
    plain = ARMS[arm] is None

    def run(numbers: tuple[Any, Any], *args: Any) -> Any:
        tx = optimizer(arm, *numbers)
        perturb = (lambda params, _: params) if plain else jaxprune.noisy_params
        return make_step(subject.net.apply, tx, train, perturb)(*args)

    return jax.jit(run)


def trained(cell: Cell) -> float:
    """Test accuracy after training."""
    subject, train, test = bench(cell.dataset, cell.net)
    state = start(subject.init, optimizer(cell.arm, *cell.rate), train, cell.seed)
    traced = tuple(jnp.float32(number) for number in cell.rate)
    one_step = functools.partial(step(cell.dataset, cell.net, cell.arm), traced)
    epochs = round(EPOCHS[cell.dataset] * LONGER.get((cell.dataset, cell.net), 1))
    state = fit(one_step, state, train, Fit(epochs, BATCH, cell.seed))
    return accuracy(subject.predict(jax.device_get(state.variables), test), test)


if __name__ == "__main__":
    main()
