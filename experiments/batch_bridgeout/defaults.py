"""Does `jaxprune.bridgeout()` train as it comes, wherever plain SGD trains?

Question   With no argument, no clipping and the learning rates that plain SGD likes,
           how far below plain SGD, uncut, does Batch Bridgeout end? And the published
           noise, with the authors' numbers?
Command    python -m experiments.batch_bridgeout.defaults
Expected   within 3 points everywhere as it comes; far below, somewhere, as published
Leaves     runs/batch_bridgeout-defaults/results.json (committed as defaults.json)
"""

import functools
from pathlib import Path
from typing import Any

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
BATCH, EPOCHS = 32, {"digits": 30, "fashion_mnist": 20}
LONGER = {"vit": 80 / 30}  # it starts slowly

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
# Learning rate and momentum at which plain SGD trains.
RATES = {"vit": ((0.5, 0.0), (0.1, 0.9))}
USUAL_RATES = ((0.1, 0.0), (0.02, 0.9))
ARMS = {
    "plain SGD": None,
    "as it comes": {},
    "as published": {"rate": 0.3, "relative": False},
}


def main(folder: Path = FOLDER) -> None:
    """Computes every record that is missing."""
    with open_run(folder, {"epochs": EPOCHS, "batch_size": BATCH}) as run:
        for dataset in EPOCHS:
            for net in NETS:
                for arm in ARMS:
                    for rate in RATES.get(net, USUAL_RATES):
                        compute = functools.partial(trained, dataset, net, arm, rate)
                        found = run.once(key := name(dataset, net, arm, rate), compute)
                        run.say(f"{key}: {found:.3f}")
        run.close()


def name(dataset: str, net: str, arm: str, rate: tuple[float, float]) -> str:
    """Of a record."""
    return f"{dataset}/{net}/{arm}/{rate[0]:g}/{rate[1]:g}"


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


def trained(dataset: str, net: str, arm: str, numbers: tuple[float, float]) -> float:
    """Test accuracy after training."""
    subject, train, test = bench(dataset, net)
    state = start(subject.init, optimizer(arm, *numbers), train, 0)
    traced = tuple(jnp.float32(number) for number in numbers)
    one_step = functools.partial(step(dataset, net, arm), traced)
    epochs = round(EPOCHS[dataset] * LONGER.get(net, 1))
    state = fit(one_step, state, train, Fit(epochs, BATCH, 0))
    return accuracy(subject.predict(jax.device_get(state.variables), test), test)


if __name__ == "__main__":
    main()
