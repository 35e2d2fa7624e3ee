"""Rank against filters: what is left of a net at the same FLOPs?

Question   A trained net is brought to a share of its FLOPs by factors of low rank or by
           fewer filters. Does training that keeps kernels near low rank (TRP) save
           accuracy when they are factorised, and does its nuclear norm help? Are
           factors that are fitted to the inputs of every layer better than those of
           the kernels alone? Which kind of factors is best, are they better than
           filter pruning, and what do both together leave?
Refuted    TRP, if the 95 % interval of "TRP, less plain", without fine-tuning, paired
           by seed, is not above 0 at some budget. Ranks, if that of "channel, less
           filters", after fine-tuning, is not.
Command    python -m experiments.rank_pruning.study   (--quick: one seed, few steps, not
           recorded; what is recorded is not done again)
Expected   paper: TRP loses 1.2 to 1.3 points on CIFAR-10 at half of ResNet-20's FLOPs
           without fine-tuning, where plain training loses most of its accuracy
Leaves     experiments/rank_pruning/study.json
Paper      Xu et al., TRP: Trained Rank Pruning for Efficient Deep Neural Networks,
           https://arxiv.org/abs/2004.14566; Li et al., Learning Filter Basis,
           https://arxiv.org/abs/1908.08932

A VGG on Fashion-MNIST at half its resolution. Budgets are shares of the multiply-adds
of the whole net; every record says what it came to. "cut" is the accuracy on test
images as the net was cut, with running averages taken anew; "tuned" after the same
fine-tuning for all arms.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from experiments.batch_bridgeout.comparison import halved
from experiments.harness.runs import Run, open_run
from jaxprune import statistics
from jaxprune.data import load, normalize
from jaxprune.models import VGG
from jaxprune.training import trained_rank_pruning

FOLDER = Path("runs/rank_pruning")
SEEDS, RATE, DECAY = 5, 4e-3, 1e-4
EVERY, ENERGY, NUCLEAR = 20, 0.98, 3e-4  # the paper's
TRAININGS = {"plain": None, "TRP": 0.0, "TRP with nuclear norm": NUCLEAR}


class Bench(NamedTuple):
    """What is trained and cut.

    Attributes:
        net: the architecture.
        parts: of Fashion-MNIST, to train on and to judge by.
        epochs: of training.
        tuning: steps of fine-tuning after a cut.
        budgets: shares of the multiply-adds.
        batch: its size.
    """

    net: nn.Module = VGG(widths=(16, 16, "M", 32, 32, "M", 64, 64), use_bias=False)
    parts: tuple[str, str] = ("train[:6000]", "test[:2000]")
    epochs: int = 6
    tuning: int = 100
    budgets: tuple[float, ...] = (0.7, 0.5, 0.35)
    batch: int = 64


FULL = Bench()
QUICK = Bench(epochs=1, tuning=5, budgets=(0.5,), parts=("train[:1000]", "test[:500]"))


class Data(NamedTuple):
    """Normalised images and their labels, to train on and to judge by."""

    train: Any
    test: Any


def read(bench: Bench) -> Data:
    """The images of Fashion-MNIST."""
    found = []
    for part in bench.parts:
        data = halved(load("fashion_mnist", part))
        found.append((normalize(data.images, data.spec), jnp.asarray(data.labels)))
    return Data(*found)


def main(bench: Bench = FULL, seeds: int = SEEDS, folder: Path = FOLDER) -> None:
    """Computes every record that is missing."""
    settings = {"seeds": seeds, **bench._replace(net=None)._asdict()}
    with open_run(folder, settings) as run:
        data = read(bench)
        for seed in range(seeds):
            one_seed(run, OneSeed(bench, data, seed))
        run.close()


def one_seed(run: Run, one: "OneSeed") -> None:
    """All records of one seed: every way to cut, at every budget."""
    for training in TRAININGS:
        arms = one.arms if training == "plain" else {"channel": one.channel}
        names = {
            (arm, budget): f"{one.seed}/{training}/{arm}/{budget:g}"
            for arm in arms
            for budget in one.bench.budgets
        }
        if all(name in run.results["records"] for name in names.values()):
            continue
        net = one.trained(training)
        run.once(f"{one.seed}/{training}/whole", lambda net=net: one.whole(net))
        for (arm, budget), name in names.items():
            cut = functools.partial(one.record, arms[arm], net, budget)
            record = run.once(name, cut)
            run.say(f"{name}: {record['cut']:.1f}, tuned {record['tuned']:.1f}")


class Net(NamedTuple):
    """A function and its variables."""

    apply: Callable[..., Any]
    variables: Any


class OneSeed:
    """Nets trained with one seed, and ways to cut them."""

    def __init__(self, bench: Bench, data: Data, seed: int) -> None:
        self.bench, self.data, self.seed = bench, data, seed
        self.image = data.train[0][:1]
        self.arms: dict[str, Callable[[Net, float], Net]] = {
            "channel": self.channel,
            "spatial": functools.partial(self.factors, kind="spatial"),
            "basis": functools.partial(self.factors, kind="basis", basis_size=16),
            "on data": self.on_data,
            "filters": self.filters,
            "filters and channel": self.both,
        }

    def batch(self, number: int) -> tuple[Any, Any]:
        """Of the training images, by the number of the step."""
        x, y = self.data.train
        rng = np.random.default_rng((self.seed, number))
        index = rng.integers(len(y), size=self.bench.batch)
        return x[index], y[index]

    def trained(self, training: str) -> Net:
        """The net after training with a cosine schedule."""
        net = self.bench.net
        total = self.bench.epochs * len(self.data.train[1]) // self.bench.batch
        tx = optax.adamw(optax.cosine_decay_schedule(RATE, total), weight_decay=DECAY)
        strength = TRAININGS[training]
        if strength is not None:
            tx = trained_rank_pruning(
                tx, every=EVERY, energy=ENERGY, strength=strength, mask=convolutions
            )
        variables = jax.jit(net.init)(jax.random.key(self.seed), self.image)
        return self.fitted(Net(net.apply, variables), tx, total)

    def fitted(self, net: Net, tx: Any, steps: int, first: int = 0) -> Net:
        """The net after some steps."""

        @jax.jit
        def step(variables: Any, opt_state: Any, x: Any, y: Any) -> Any:
            def loss_fn(params: Any) -> Any:
                logits, new = net.apply(
                    {**variables, "params": params},
                    x,
                    train=True,
                    mutable=["batch_stats"],
                )
                loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
                return loss.mean(), new

            params = variables["params"]
            grads, new = jax.grad(loss_fn, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return {"params": optax.apply_updates(params, updates), **new}, opt_state

        state = net.variables, tx.init(net.variables["params"])
        for number in range(steps):
            state = step(*state, *self.batch(first + number))
        return net._replace(variables=state[0])

    def record(
        self, cut: Callable[[Net, float], Net], net: Net, budget: float
    ) -> dict[str, float]:
        """What a cut costs and leaves."""
        small = cut(net, budget)
        averaged = self.averaged(small)
        tx = optax.adamw(RATE / 4, weight_decay=DECAY)
        tuned = self.fitted(averaged, tx, self.bench.tuning, first=10**6)
        return {**self.whole(averaged, "cut"), "tuned": self.judged(tuned)}

    def whole(self, net: Net, name: str = "test") -> dict[str, float]:
        """Accuracy, and the cost as shares of the net as it was written."""
        variables = jax.eval_shape(self.bench.net.init, jax.random.key(0), self.image)
        full = jaxprune.costs(self.bench.net.apply, variables, self.image)
        here = jaxprune.costs(net.apply, net.variables, self.image)
        return {
            name: self.judged(net),
            "multiply-adds": here.multiply_adds / full.multiply_adds,
            "parameters": here.parameters / full.parameters,
        }

    def averaged(self, net: Net) -> Net:
        """With the running averages of what is left."""
        batches = [self.batch(2 * 10**6 + k)[0] for k in range(8)]

        found = jaxprune.recalibrate(net.apply, net.variables, batches, progress=False)
        return net._replace(variables=found)

    def judged(self, net: Net) -> float:
        """Accuracy on test images, in points."""
        x, y = self.data.test
        predict = jax.jit(lambda variables, x: net.apply(variables, x).argmax(-1))
        parts = [predict(net.variables, x[k : k + 500]) for k in range(0, len(y), 500)]
        return float(100 * jnp.mean(jnp.concatenate(parts) == y))

    def channel(self, net: Net, budget: float) -> Net:
        """A convolution to few channels and a pointwise one."""
        return self.factors(net, budget, kind="channel")

    def factors(
        self,
        net: Net,
        budget: float,
        kind: Any,
        basis_size: int | None = None,
        moments: Any = None,
    ) -> Net:
        """Kernels in factors, their ranks by the energy that they keep."""
        given = net.apply, net.variables, self.image
        how: Any = {"kind": kind, "basis_size": basis_size}
        ranks = jaxprune.factor_ranks(*given, budget=budget, **how)
        found = jaxprune.factorise(*given, ranks=ranks, moments=moments, **how)
        return Net(found.apply_fn, found.variables)

    def on_data(self, net: Net, budget: float) -> Net:
        """Channel factors, fitted to the inputs of every layer."""
        batches = [self.batch(3 * 10**6 + k)[0] for k in range(8)]
        moments = statistics.moments(net.apply, net.variables, batches, progress=False)
        return self.factors(net, budget, kind="channel", moments=moments)

    def filters(self, net: Net, budget: float) -> Net:
        """Fewer filters, those of the smallest norms gone."""
        found = jaxprune.prune(
            net.apply,
            net.variables,
            self.image,
            budget=budget,
            cost="flops",
            score="l2",
            recalibrate=False,
            progress=False,
        )
        return Net(found.apply_fn, found.variables)

    def both(self, net: Net, budget: float) -> Net:
        """Half of the way by filters, the other half by rank."""
        share = budget**0.5
        return self.channel(self.filters(net, share), share)


def convolutions(params: Any) -> Any:
    """The kernels of convolutions but for the first, as the authors choose."""
    kernels = [w for w in jax.tree.leaves(params) if w.ndim == 4]
    return jax.tree.map(lambda w: w.ndim == 4 and w is not kernels[0], params)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    if options.quick:
        main(QUICK, 1, options.out.with_name(options.out.name + "-quick"))
    else:
        main(seeds=options.seeds, folder=options.out)
