"""Try-and-learn: does an agent cut within the bound, and better than by magnitude?

Question   Agents learn which filters of a trained net to keep; a drop bound says how
           much accuracy they may spend. Is the measured drop within the bound, on the
           images the agents see and on test images? Does a larger bound cut more? Is
           the net they leave better than one with as many filters in every layer chosen
           by magnitude, or by chance? Does the order of the layers matter? Do agents
           cut by magnitude? How long does the search take, and how fast is the result?
Refuted    The bound, if the mean drop on the held-out images is above it. The choice,
           if the 95 % interval of "agents, less magnitude" on test images, paired by
           seed, is not above 0. The order, if "low to high" is not above the others.
Command    python -m experiments.try_and_learn.study   (--quick: one seed, a few
           updates, not recorded; what is recorded is not done again)
Expected   paper: the drop stays near the bound; pruned SegNet +2.1 points of pixel
           accuracy where magnitude loses 3.0; norms of kept and cut filters overlap;
           low to high is the best order
Leaves     experiments/try_and_learn/study.json
Paper      Huang et al., Learning to Prune Filters in Convolutional Neural Networks,
           https://arxiv.org/abs/1801.07365

Two nets: a VGG on Fashion-MNIST at half its resolution, whose metric is accuracy, and
a SegNet on drawn scenes, whose metric is the accuracy of pixels. Agents are rewarded on
training images held out from training; test images only judge. All arms cut the same
groups in rounds, with the same fine-tuning after every cut: in "magnitude" and "random"
another criterion chooses, in each layer as many as the agents kept with the same seed.
Candidates are measured without fine-tuning, and agents get fewer updates than in the
paper (`UPDATES`; 100 and 200 there), which bounds what they can find.
"""

import argparse
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from experiments.batch_bridgeout.comparison import halved
from experiments.harness.measure import latency_ms
from experiments.harness.runs import Run, open_run
from jaxprune import recipes, scores
from jaxprune.data import Dataset, load, normalize
from jaxprune.models import VGG, SegNet

FOLDER = Path("runs/try_and_learn")
SEEDS, BATCH, RATE, DECAY = 5, 64, 4e-3, 1e-4
STEPS = 60  # of training after every cut
ORDERS = ("high_to_low", "sensitivity", "joint")


class Bench(NamedTuple):
    """What is pruned.

    Attributes:
        net: the architecture.
        name: of the data set.
        parts: splits to train on, to reward agents on, and to judge by.
        halve: whether images are halved.
        epochs: of training.
        bounds: drops allowed, in points; orders are compared at the last.
        updates: of every agent.
        at_once: images in a batch of the reward.
        orders: of the layers that are tried beside "low_to_high".
    """

    net: nn.Module
    name: str
    parts: tuple[str, str, str]
    halve: bool
    epochs: int
    bounds: tuple[float, ...]
    updates: int
    at_once: int
    orders: tuple[str, ...] = ()


BENCHES: Mapping[str, Bench] = {
    "vgg": Bench(
        VGG(widths=(8, 8, "M", 16, 16, "M", 32, 32), use_bias=False),
        "fashion_mnist",
        ("train[:6000]", "train[6000:6512]", "test[:2000]"),
        halve=True,
        epochs=6,
        bounds=(0.5, 1.0, 2.0),
        updates=50,
        at_once=512,
        orders=ORDERS,
    ),
    "segnet": Bench(
        SegNet(5, stages=((8, 8), (16, 16)), use_bias=False),
        "scenes",
        ("train[:2500]", "train[2500:2628]", "test[:500]"),
        halve=False,
        epochs=20,
        bounds=(2.0,),
        updates=50,
        at_once=128,
    ),
}
QUICK = {"epochs": 2, "updates": 6, "orders": ("joint",)}


class Split(NamedTuple):
    """Normalised images and their labels."""

    x: jax.Array
    y: jax.Array


def main(
    benches: Mapping[str, Bench] = BENCHES, seeds: int = SEEDS, folder: Path = FOLDER
) -> None:
    """Computes every record that is missing."""
    settings = {
        "seeds": seeds,
        "steps": STEPS,
        **{name: bench._replace(net=None)._asdict() for name, bench in benches.items()},
    }
    with open_run(folder, settings) as run:
        for name, bench in benches.items():
            subject = None
            for seed in range(seeds):
                if f"{name}/{seed}/speed" not in run.results["records"]:
                    subject = subject or Subject(bench)
                    one_seed(run, f"{name}/{seed}", subject, seed)
        run.close()


class Subject:
    """A net, its data and what is compiled once."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.train, self.held, self.test = map(self._split, bench.parts)
        self.apply = bench.net.apply
        self.step = jax.jit(self._step)
        self.tx = optax.adamw(RATE / 4, weight_decay=DECAY)

    def _split(self, part: str) -> Split:
        data: Dataset = load(self.bench.name, part)
        data = halved(data) if self.bench.halve else data
        return Split(normalize(data.images, data.spec), jnp.asarray(data.labels))

    def data(self, seed: int) -> Callable[[int], tuple[Any, Any]]:
        """Batches by the number of the step."""

        def batch(number: int) -> tuple[Any, Any]:
            rng = np.random.default_rng((seed, number))
            index = rng.integers(len(self.train.y), size=BATCH)
            return self.train.x[index], self.train.y[index]

        return batch

    def loss(self, apply: Any, variables: Any, batch: Any) -> tuple[jax.Array, Any]:
        x, y = batch
        logits, new = apply(variables, x, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return loss.mean(), new

    def accuracy(self, apply: Any, variables: Any, batch: Any) -> jax.Array:
        """In points; of pixels, where these have labels."""
        x, y = batch
        return 100 * jnp.mean((apply(variables, x).argmax(-1) == y).astype(jnp.float32))

    def _step(self, rate: Any, state: Any, batch: Any) -> Any:
        variables, opt_state = state
        loss = functools.partial(self.loss, self.apply)
        grads, new = jax.grad(loss, has_aux=True)(variables, batch)
        params, tx = variables["params"], optax.adamw(rate, weight_decay=DECAY)
        updates, opt_state = tx.update(grads["params"], opt_state, params)
        return {"params": optax.apply_updates(params, updates), **new}, opt_state

    def trained(self, seed: int) -> Any:
        """Variables after training with a cosine schedule."""
        key = jax.random.key(seed)
        variables = jax.jit(self.bench.net.init)(key, self.train.x[:1])
        opt_state = optax.adamw(RATE).init(variables["params"])
        state, batch = (variables, opt_state), self.data(1000 + seed)
        total = self.bench.epochs * len(self.train.y) // BATCH
        rate = optax.cosine_decay_schedule(RATE, total)
        for number in range(total):
            state = self.step(jnp.float32(rate(number)), state, batch(number))
        return state[0]

    def judged(self, apply: Any, variables: Any) -> float:
        """Accuracy on test images."""
        accuracy = jax.jit(lambda v, part: self.accuracy(apply, v, part))
        parts = [
            Split(*(a[k : k + 500] for a in self.test))
            for k in range(0, len(self.test.y), 500)
        ]
        return float(np.mean([accuracy(variables, part) for part in parts]))

    def batches(self) -> list[tuple[Any, Any]]:
        """Those of the reward."""
        size = self.bench.at_once
        return [
            (self.held.x[k : k + size], self.held.y[k : k + size])
            for k in range(0, len(self.held.y), size)
        ]


def one_seed(run: Run, name: str, subject: Subject, seed: int) -> None:
    """All records of one trained net."""
    variables = subject.trained(seed)
    one = OneNet(subject, variables, seed)
    run.once(f"{name}/whole", one.whole)
    kept: dict[float, Any] = {}
    bounds = subject.bench.bounds
    for bound in bounds:
        record = run.once(f"{name}/agents/{bound:g}", lambda b=bound: one.agents(b))
        kept[bound] = record["kept"]
        for rule in ("magnitude", "random"):
            counts = functools.partial(one.by_rule, rule, record["kept"])
            run.once(f"{name}/{rule}/{bound:g}", counts)
        run.say(f"{name} bound {bound:g}: {record['test']:.1f}, {record['units']:.2f}")
    for order in subject.bench.orders:
        learn = functools.partial(one.agents, bounds[-1], order)
        run.once(f"{name}/{order}/{bounds[-1]:g}", learn)
    run.once(f"{name}/speed", lambda: one.speed(kept[bounds[-1]]))


class OneNet:
    """A trained net, to be cut in several ways."""

    def __init__(self, subject: Subject, variables: Any, seed: int) -> None:
        self.subject, self.variables, self.seed = subject, variables, seed
        self.image = subject.train.x[:1]
        trace = functools.partial(jaxprune.trace, subject.apply, variables, self.image)
        self.groups = trace(roles=True)
        self.cost = jaxprune.cost_model(
            subject.apply, variables, self.image, groups=self.groups
        ).multiply_adds
        self.norms = jax.device_get(
            scores.group_scores(self.groups, variables, members="producers")
        )

    def whole(self) -> dict[str, float]:
        """The net as it is, trained as long as the others are after their cuts."""
        subject = self.subject
        held = [subject.accuracy(subject.apply, self.variables, b) for b in self.held]
        more = self._rounds(decide=lambda number, masks, variables: {})
        return {
            "test": subject.judged(subject.apply, self.variables),
            "held": float(np.mean(held)),
            "longer": subject.judged(subject.apply, more.last.variables),
        }

    @property
    def held(self) -> list[tuple[Any, Any]]:
        return self.subject.batches()

    def agents(self, bound: float, order: str = "low_to_high") -> dict[str, Any]:
        """What agents leave, and whether they went by the norms."""
        subject, began = self.subject, time.perf_counter()
        run = recipes.try_and_learn(
            subject.apply,
            self.variables,
            self.image,
            metric=subject.accuracy,
            batches=self.held,
            drop_bound=bound,
            loss_fn=functools.partial(subject.loss, subject.apply),
            data=subject.data(self.seed),
            tx=subject.tx,
            steps=self._steps(order),
            order=order,  # pyright: ignore[reportArgumentType]
            updates=subject.bench.updates,
            advantage="leave_one_out",
            key=jax.random.key(self.seed),
            progress=False,
        )
        seconds = time.perf_counter() - began
        return {**self._record(run), "seconds": round(seconds, 1)}

    def by_rule(self, rule: str, kept: Mapping[str, Any]) -> dict[str, Any]:
        """As many units of every group as the agents kept, chosen by a rule."""
        rng = np.random.default_rng(self.seed)
        turns = list(self.groups)

        def decide(number: int, masks: Any, variables: Any) -> dict[str, np.ndarray]:
            name = turns[number - 1]
            if rule == "random":
                of = rng.random(self.groups[name].size)
            else:
                groups = self._left(masks, variables)
                found = scores.group_scores(groups, variables, members="producers")
                of = np.asarray(found[name])
            keep = np.zeros(len(of), bool)
            keep[np.argsort(-of, kind="stable")[: sum(kept[name])]] = True
            return {name: keep}

        return self._record(self._rounds(decide))

    def speed(self, kept: Mapping[str, Any]) -> dict[str, float]:
        """Milliseconds for 256 images, whole and pruned, taken in turns."""
        subject = self.subject
        x = subject.train.x[:256]
        keep = {n: np.asarray(k, bool) for n, k in kept.items()}
        masks = jaxprune.expand_masks(self.groups, keep)
        small = jaxprune.slice_params(self.variables, masks)
        whole = jax.jit(subject.apply)
        pruned = jax.jit(jaxprune.narrow(subject.apply, masks))
        found = latency_ms(
            {
                "whole": lambda: whole(self.variables, x),
                "pruned": lambda: pruned(small, x),
            }
        )
        share = self.cost.value({n: int(k.sum()) for n, k in keep.items()})
        return {**found, "multiply-adds": float(share / self.cost.full)}

    def _left(self, masks: Any, variables: Any) -> jaxprune.Groups:
        apply = self.subject.apply
        apply = apply if masks is None else jaxprune.narrow(apply, masks)
        return jaxprune.trace(apply, variables, self.image, roles=True)

    def _steps(self, order: str) -> int:
        """All arms train as long: a joint search has one round."""
        return STEPS * len(self.groups) if order == "joint" else STEPS

    def _rounds(self, decide: Any) -> Any:
        subject = self.subject
        return jaxprune.rounds(
            subject.apply,
            self.variables,
            self.image,
            tx=subject.tx,
            data=subject.data(self.seed),
            steps=[0, *[STEPS] * len(self.groups)],
            rounds=len(self.groups),
            decide=decide,
            loss_fn=functools.partial(subject.loss, subject.apply),
            recalibrate=False,
            progress=False,
        )

    def _record(self, run: Any) -> dict[str, Any]:
        last = run.last
        keep = jaxprune.surgery.units_kept(self.groups, last.masks)
        keep = {name: np.asarray(k, bool) for name, k in keep.items()}
        held = [
            self.subject.accuracy(last.apply_fn, last.variables, b) for b in self.held
        ]
        counts = {name: int(k.sum()) for name, k in keep.items()}
        whole = sum(group.size for group in self.groups.values())
        return {
            "test": self.subject.judged(last.apply_fn, last.variables),
            "held": float(np.mean(held)),
            "units": sum(counts.values()) / whole,
            "multiply-adds": float(self.cost.value(counts) / self.cost.full),
            "above": overlap(keep, self.norms),
            "kept": {name: k.astype(int).tolist() for name, k in keep.items()},
        }


def overlap(
    keep: Mapping[str, np.ndarray], norms: Mapping[str, np.ndarray]
) -> float | None:
    """How often a unit that was kept has a larger norm than one that was cut.

    Over all such pairs within a group: 1 for pruning by magnitude, 1/2 for a choice
    that does not look at norms. None if nothing, or everything, was cut.
    """
    pairs = [
        (norms[name][stays][:, None] > norms[name][~stays][None]).ravel()
        for name, stays in keep.items()
    ]
    found = np.concatenate([np.zeros(0), *pairs])
    return round(float(found.mean()), 4) if len(found) else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    if options.quick:
        quick = {name: bench._replace(**QUICK) for name, bench in BENCHES.items()}
        main(quick, 1, options.out.with_name(options.out.name + "-quick"))
    else:
        main(seeds=options.seeds, folder=options.out)
