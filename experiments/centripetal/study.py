"""Centripetal SGD: train units to be equal, merge them, and lose nothing.

Question   A trained net is drawn into clusters of equal filters and trimmed to 5/8 and
           3/8 of its width. Is trimming without loss? Is the small net better than one
           cut by L1 norm and fine-tuned, and than one of that width trained from
           scratch, at equal epochs? Does it help to train a wide net into a narrow one
           from the start? Does it matter who is drawn to whom?
Command    jaxprune run centripetal --net resnet8  (--quick for a first look)
           jaxprune run centripetal --net mlp
Time       see docs/centripetal.md, which `python -m experiments.centripetal.report`
           makes from experiments/centripetal/study.json
Expected   ResNet-56 on CIFAR-10 at 5/8 of its width: 93.39 -> 93.44 % (the paper; the
           seeds are not said). `--dataset cifar10` runs with the settings of the
           authors' code; it was not run here
Leaves     runs/centripetal-digits-NET: results.json
Papers     Ding et al., Centripetal SGD for Pruning Very Deep Convolutional Networks
           With Complicated Structure, CVPR 2019, https://arxiv.org/abs/1904.03837

The ResNet has projections, so every stage is one residual stream that several layers
write; the MLP has dense layers, which the paper leaves alone. All arms get the same
epochs in all: `pretraining` and `epochs` more. Every arm draws as many hyper-parameters
and trains them with one seed on 80 % of the training images at 3/8 of the width; the
best on the other 20 % is used at both widths. The test set is read by the tables alone.
Scratch and L1 nets of a width are the same program, and so are all C-SGD runs:
hyper-parameters and clusters are in their state.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

import jaxprune
from experiments.harness.methods import Subject, filter_norms, subject_of
from experiments.harness.pages import percent
from experiments.harness.runs import Job, Run, Tick, open_run
from experiments.harness.training import (
    PRNG,
    Fit,
    State,
    accuracy,
    best,
    cosine,
    fit,
    held_out,
    judged,
    make_step,
)
from jaxprune import clusters, select
from jaxprune.cli._main import UsageError, known
from jaxprune.data import CLASSIFICATION, Dataset, load
from jaxprune.models import LeNet300, cifar_resnet
from jaxprune.training import centripetal

SHARES = (5 / 8, 3 / 8)  # of the width
MOMENTUM = 0.9
VALIDATION_SEED = 100
# Who draws hyper-parameters; the ways of clustering share those of "centripetal".
ARMS = ("centripetal", "redundant", "l1", "scratch")
CLUSTERINGS = ("k_means", "even", "imbalanced")


@dataclasses.dataclass(frozen=True)
class Scale:
    """What suits a data set.

    Attributes:
        net: "resnet" and its depth, or "mlp".
        widths: of its stages or layers.
        pretraining: epochs before there are clusters.
        epochs: epochs after.
        batch_size: images in a step.
        weight_decay: of kernels, in all arms.
        rates: learning rates that L1 and scratch nets try.
        pulls: learning rates and strengths that centripetal SGD tries; as many.
    """

    net: str = "resnet8"
    widths: tuple[int, ...] = (8, 16, 32)
    pretraining: int = 20
    epochs: int = 20
    batch_size: int = 32
    weight_decay: float = 5e-4
    rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    pulls: tuple[tuple[float, float], ...] = (
        (0.05, 0.3),
        (0.1, 0.3),
        (0.2, 0.3),
        (0.1, 1.0),
    )


# The authors' code: 600 epochs at 5e-2, then 600 at 3e-2; weight decay 1e-4. They train
# 470 000 steps; a run of 900 needs a pull that is stronger by as much to end as equal.
CIFAR = Scale("resnet56", (16, 32, 64), 600, 600, 64, 1e-4, (3e-2,), ((3e-2, 3e-3),))
SMALL = {
    "resnet8": Scale(),
    "mlp": Scale(
        "mlp",
        (32, 16),
        rates=(0.01, 0.02, 0.05, 0.1),
        pulls=((0.02, 1.0), (0.05, 0.3), (0.05, 1.0), (0.1, 0.3)),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What ``jaxprune run centripetal`` understands."""

    dataset: str = "digits"
    """digits, shapes32 (these two need no network), mnist, cifar10 or cifar100."""
    net: str = "resnet8"
    """resnet8 or mlp; on CIFAR it is ResNet-56."""
    seeds: int = 5
    """How many nets are trained and trimmed."""
    epochs: int | None = None
    """Epochs before and after clustering; by default what suits the data set."""
    quick: bool = False
    """Less of everything: one seed, 3 epochs, one try."""
    out: Path | None = None
    """Folder of the run; by default runs/centripetal-DATASET-NET."""
    data_dir: Path | None = None
    """Where data sets are prepared; by default $JAXPRUNE_DATA or ~/.cache/jaxprune."""

    def __post_init__(self) -> None:
        known("data set", self.dataset, CLASSIFICATION)
        known("net", self.net, SMALL)
        if self.seeds < 1:
            raise UsageError(f"--seeds must be at least 1, got {self.seeds}")

    @property
    def scale(self) -> Scale:
        """What suits the data set, or what was asked for."""
        scale = CIFAR if self.dataset.startswith("cifar") else SMALL[self.net]
        epochs = 3 if self.quick else self.epochs
        if epochs:
            scale = dataclasses.replace(scale, pretraining=epochs, epochs=epochs)
        if self.quick:
            scale = dataclasses.replace(
                scale, rates=scale.rates[-2:-1], pulls=scale.pulls[-1:]
            )
        return scale


def main(config: Config) -> None:
    """Runs the experiment, or what is left of it."""
    scale, seeds = config.scale, 1 if config.quick else config.seeds
    facts = {
        "dataset": config.dataset,
        "seeds": seeds,
        "shares": SHARES,
        **dataclasses.asdict(scale),
    }
    name = f"centripetal-{config.dataset}-{scale.net}"
    name += "-quick" if config.quick else ""
    with open_run(config.out or Path("runs", name), facts) as run:
        if not run.finished:
            train, test = (
                load(config.dataset, split, data_dir=config.data_dir)
                for split in ("train", "test")
            )
            bench = Bench(scale, train)
            records = run.results["records"]
            tries = {"tune/dense": _tuning(bench, train, "dense", {})}
            run.each("tune the wide net", tries, _tell_tuning)
            wide = best(records["tune/dense"])
            tries = {f"tune/{arm}": _tuning(bench, train, arm, wide) for arm in ARMS}
            run.each("tune", tries, _tell_tuning)
            hyper = {arm: best(records[f"tune/{arm}"]) for arm in ("dense", *ARMS)}
            jobs = {
                f"seed{s}": _judging(bench, hyper, train, test, s) for s in range(seeds)
            }
            run.each("train, trim, judge", jobs, _tell)
            run.put("costs", bench.costs())
            run.close(hyper=hyper)
        _print(run)


# ------------------------------------------------------------------------ the programs


def sgd(
    learning_rate: Any, steps: Any, weight_decay: Any, first: Any = None
) -> optax.GradientTransformation:
    """SGD behind a link, or with weight decay; the numbers may be traced."""
    decay = optax.add_decayed_weights(
        weight_decay, lambda params: jax.tree.map(lambda w: w.ndim > 1, params)
    )
    return optax.chain(
        first or decay,
        optax.trace(MOMENTUM, nesterov=True),
        optax.scale_by_schedule(cosine(learning_rate, steps)),
    )


def build(net: str, widths: Sequence[int], classes: int) -> nn.Module:
    """The net of that name at these widths."""
    if net == "mlp":
        return LeNet300(classes, widths=widths)
    depth = int(net.removeprefix("resnet"))
    shortcut = "projection"
    return cifar_resnet(depth, widths=widths, shortcut=shortcut, num_classes=classes)


class Bench:
    """The nets of an experiment and their steps, each compiled once.

    Attributes:
        scale: the settings.
        dense: the wide net.
        groups: its units and their roles.
    """

    def __init__(self, scale: Scale, data: Dataset):
        self.scale, self._data = scale, data
        self.dense = self.net(1.0)
        image = jnp.zeros((1, *data.spec.image_shape))
        self.shapes = jax.eval_shape(self.dense.init, jax.random.key(0), image)
        net = self.dense.net
        self.groups = jaxprune.trace(net.apply, self.shapes, image, roles=True)

    @functools.cache  # noqa: B019 - a bench lives as long as the process
    def net(self, share: float) -> Subject:
        """The net of that share of the width."""
        widths = [round(share * width) for width in self.scale.widths]
        module = build(self.scale.net, widths, self._data.spec.num_classes)
        return subject_of(f"{share}", module, self._data.spec)

    @functools.cache  # noqa: B019
    def step(self, share: float, drawn: bool = False) -> Callable[..., State]:
        """One step of a net of that width, by SGD or by centripetal SGD."""
        tx = self.tx({"learning_rate": 1.0}, 1, self.some_clusters if drawn else None)
        return make_step(self.net(share).net.apply, tx, self._data)

    @functools.cached_property
    def some_clusters(self) -> Mapping[str, np.ndarray]:
        """Those that the compiled step is made with; a state brings its own."""
        return clusters.even(self.groups, sparsity=0.5)

    def tx(
        self, hyper: Mapping[str, float], steps: int, ids: Any = None
    ) -> optax.GradientTransformation:
        """The optimiser; its numbers are in its state."""
        decay = self.scale.weight_decay
        if ids is None:
            return optax.inject_hyperparams(sgd)(
                learning_rate=hyper["learning_rate"],
                steps=float(steps),
                weight_decay=decay,
            )

        def drawn(learning_rate: Any, steps: Any, strength: Any) -> Any:
            link = centripetal(self.groups, ids, strength, weight_decay=decay)
            return sgd(learning_rate, steps, decay, link)

        return optax.inject_hyperparams(drawn)(
            learning_rate=hyper["learning_rate"],
            steps=float(steps),
            strength=hyper.get("strength", 0.0),
        )

    def train(
        self,
        variables: Any,
        data: Dataset,
        epochs: int,
        seed: int,
        hyper: Mapping[str, float],
        tick: Tick,
        share: float = 1.0,
        ids: Any = None,
    ) -> Any:
        """Trains for some epochs from these variables."""
        size = self.scale.batch_size
        tx = self.tx(hyper, epochs * (len(data) // size), ids)
        key = jax.random.key(seed + 1000 * epochs, impl=PRNG)
        start = State(variables, tx.init(variables["params"]), jnp.int32(0), key)
        step = self.step(share, ids is not None)
        end = fit(step, start, data, Fit(epochs, size, seed), tick)
        return jax.device_get(end.variables)

    def init(self, share: float, seed: int) -> Any:
        """Variables before training."""
        image = jnp.zeros((1, *self._data.spec.image_shape))
        return self.net(share).init(jax.random.key(seed, impl=PRNG), image)

    def costs(self) -> dict[str, Any]:
        """Parameters and FLOPs of every width."""
        image = jnp.zeros((1, *self._data.spec.image_shape))
        found = {}
        for share in (1.0, *SHARES):
            costs = jaxprune.costs(
                self.net(share).net.apply, self.init(share, 0), image
            )
            found[f"{share}"] = {"parameters": costs.parameters, "flops": costs.flops}
        return found


# ---------------------------------------------------------------------------- the arms


def judge(bench: Bench, share: float, variables: Any, test: Dataset) -> dict[str, Any]:
    """Accuracy and cross-entropy of a net."""
    return judged(bench.net(share).predict(variables, test), test)


def trimmed(
    bench: Bench, share: float, variables: Any, ids: Any, test: Dataset
) -> dict[str, Any]:
    """A net before and after its clusters are merged, on the same images."""
    before = bench.dense.predict(variables, test)
    merged = jaxprune.merge(variables, bench.groups, ids)
    after = bench.net(share).predict(merged.variables, test)
    whole = jax.tree.map(lambda w: float(np.square(w).sum()), variables["params"])
    return {
        "before": accuracy(before, test),
        "changed predictions": int((before.argmax(-1) != after.argmax(-1)).sum()),
        "output error": float(np.abs(before - after).max() / np.abs(before).max()),
        "deviation": float(sum(merged.deviation.values()))
        / sum(jax.tree.leaves(whole)),
        **judge(bench, share, merged.variables, test),
    }


def clustered(bench: Bench, way: str, variables: Any, share: float, seed: int) -> Any:
    """The clusters of a net."""
    if way == "k_means":
        return clusters.k_means(bench.groups, variables, sparsity=1 - share, seed=seed)
    return getattr(clusters, way)(bench.groups, sparsity=1 - share)


class Trainer:
    """One seed: what it trains on, and where it is judged."""

    def __init__(
        self, bench: Bench, train: Dataset, test: Dataset, seed: int, tick: Tick
    ):
        self.bench, self.data, self.test = bench, train, test
        self.seed, self.tick = seed, tick
        self.scale = bench.scale

    def base(self, hyper: Mapping[str, float]) -> Any:
        """The wide net, trained as usual."""
        begin = self.bench.init(1.0, self.seed)
        return self.train(begin, self.scale.pretraining, hyper)

    def arm(
        self, arm: str, base: Any, share: float, hyper: Mapping[str, float]
    ) -> dict[str, Any]:
        """The record of one arm at one width; a way of clustering is an arm too."""
        bench, scale = self.bench, self.scale
        if arm == "scratch":
            begin, epochs = (
                bench.init(share, self.seed),
                scale.pretraining + scale.epochs,
            )
            end = self.train(begin, epochs, hyper, share=share)
            return judge(bench, share, end, self.test)
        if arm == "l1":
            small = self._cut(base, share)
            cut = judge(bench, share, small, self.test)["accuracy"]
            end = self.train(small, scale.epochs, hyper, share=share)
            return {"cut": cut, **judge(bench, share, end, self.test)}
        if arm == "redundant":
            begin, epochs = bench.init(1.0, self.seed), scale.pretraining + scale.epochs
            ids = clustered(bench, "even", begin, share, self.seed)
        else:
            begin, epochs = base, scale.epochs
            way = "k_means" if arm == "centripetal" else arm
            ids = clustered(bench, way, base, share, self.seed)
        end = self.train(begin, epochs, hyper, ids=ids)
        return trimmed(bench, share, end, ids, self.test)

    def train(
        self, begin: Any, epochs: int, hyper: Mapping[str, float], **how: Any
    ) -> Any:
        return self.bench.train(
            begin, self.data, epochs, self.seed, hyper, self.tick, **how
        )

    def _cut(self, base: Any, share: float) -> Any:
        """The filters of the lowest L1 norm go, and what reads them."""
        groups = self.bench.groups
        norms = filter_norms(groups, base["params"], reduce="l1")
        keep = select.per_group(groups, norms, sparsity=1 - share)
        return jaxprune.slice_params(base, jaxprune.expand_masks(groups, keep))


def _tuning(bench: Bench, train: Dataset, arm: str, wide: Mapping[str, float]) -> Job:
    inner, outer = held_out(train)
    scale, begun = bench.scale, arm in ("centripetal", "l1")
    if arm in ("centripetal", "redundant"):
        drawn = [{"learning_rate": r, "strength": s} for r, s in scale.pulls]
    else:
        drawn = [{"learning_rate": rate} for rate in scale.rates]

    def compute(tick: Tick) -> list[dict[str, Any]]:
        trainer = Trainer(bench, inner, outer, VALIDATION_SEED, tick)
        base = trainer.base(wide) if begun else None
        found = []
        for hyper in drawn:
            record = (
                judge(bench, 1.0, trainer.base(hyper), outer)
                if arm == "dense"
                else trainer.arm(arm, base, SHARES[-1], hyper)
            )
            found.append({"hyper": hyper, **record})
        return found

    each = (scale.pretraining if not begun else 0) + scale.epochs * (arm != "dense")
    return Job(compute, len(drawn) * each + begun * scale.pretraining)


def _judging(
    bench: Bench,
    hyper: Mapping[str, Mapping[str, float]],
    train: Dataset,
    test: Dataset,
    seed: int,
) -> Job:
    scale = bench.scale
    after, whole = scale.epochs, scale.pretraining + scale.epochs

    def compute(tick: Tick) -> dict[str, Any]:
        trainer = Trainer(bench, train, test, seed, tick)
        base = trainer.base(hyper["dense"])
        longer = trainer.train(base, after, hyper["l1"])
        record: dict[str, Any] = {
            "dense": judge(bench, 1.0, base, test),
            "dense, longer": judge(bench, 1.0, longer, test),
        }
        for share in SHARES:
            arms = {arm: hyper[arm] for arm in ARMS}
            arms |= dict.fromkeys(CLUSTERINGS[1:], hyper["centripetal"])
            record[f"{share}"] = {
                arm: trainer.arm(arm, base, share, own) for arm, own in arms.items()
            }
        return record

    arms = len(SHARES) * (2 * whole + (2 + len(CLUSTERINGS) - 1) * after)
    return Job(compute, whole + arms)


# ------------------------------------------------------------------------- the reading


def over_seeds(results: Mapping[str, Any], share: float, arm: str, what: str) -> list:
    """One number per seed."""
    records, seeds = results["records"], results["settings"]["seeds"]
    return [records[f"seed{s}"][f"{share}"][arm][what] for s in range(seeds)]


def _tell_tuning(name: str, record: Any) -> str:
    return f"{name}: {best(record)}"


def _tell(name: str, record: Any) -> str:
    parts = [f"dense {record['dense']['accuracy']:.3f}"]
    for share in SHARES:
        arms = record[f"{share}"].items()
        told = ", ".join(f"{arm} {found['accuracy']:.3f}" for arm, found in arms)
        parts.append(f"at {share}: {told}")
    return f"{name}: {'; '.join(parts)}"


def _print(run: Run) -> None:
    table = rich.table.Table(title="test accuracy in %, mean ± half of a 95 % interval")
    table.add_column("arm")
    for share in SHARES:
        table.add_column(f"{share} of the width", justify="right")
    for arm in (*ARMS, *CLUSTERINGS[1:]):
        cells = [
            percent(over_seeds(run.results, share, arm, "accuracy")) for share in SHARES
        ]
        table.add_row(arm, *cells)
    rich.console.Console().print(table)
