"""Global sparse momentum: can training itself carry the weights that can go to zero?

Question   A trained net goes on under global sparse momentum, and then all weights but
           a sixtieth or a tenth are cut, without fine-tuning. What does the cut cost?
           Is the net better than one of the same size by magnitude pruning (in one shot
           or gradually) and fine-tuning, at equal epochs? Are the weights it finds
           better lottery tickets than the largest of the trained net?
Command    jaxprune run gsm --net lenet300         (--quick for a first look)
           jaxprune run gsm --net resnet8
Time       see docs/gsm.md, which `python -m experiments.gsm.report` makes from
           experiments/gsm/study.json
Expected   LeNet-300-100 on MNIST at 60x: 98.19 -> 98.18 %, as a ticket 98.22 %, where
           the ticket by magnitude has 97.39 %; ResNet-56 on CIFAR-10 at 10x: 94.05 ->
           93.80 % (the paper). `--dataset cifar10` runs the ResNet with the settings of
           the authors' code; it was not run here
Leaves     runs/gsm-digits-NET: results.json
Papers     Ding et al., Global Sparse Momentum SGD for Pruning Very Deep Neural
           Networks, NeurIPS 2019, https://arxiv.org/abs/1909.12778; Zhu and Gupta, To
           Prune, or Not to Prune, 2017, https://arxiv.org/abs/1710.01878; Frankle and
           Carbin, The Lottery Ticket Hypothesis, 2019, https://arxiv.org/abs/1803.03635

Budgets are of kernel weights, ranked over all layers together in every arm. Global
sparse momentum and both ways of magnitude pruning begin with the same trained net, get
the same epochs and draw as many hyper-parameters for each budget, which are trained
with one seed on 80 % of the training images; the best on the other 20 % is used.
Tickets are trained from the initial weights, as the dense net was. The test set is read
by the tables alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

from experiments.harness.methods import Subject, subject_of
from experiments.harness.runs import Job, Run, Tick, open_run
from experiments.harness.training import (
    PRNG,
    Fit,
    State,
    best,
    cosine,
    fit,
    held_out,
    judged,
    make_step,
)
from jaxprune import apply_masks
from jaxprune.cli._main import UsageError, known
from jaxprune.core._packing import pack_masks
from jaxprune.data import CLASSIFICATION, Dataset, load
from jaxprune.display import interval
from jaxprune.models import LeNet300, cifar_resnet
from jaxprune.training import global_sparse_momentum, hold_masks, winning_ticket

FACTORS = (60, 10)  # times fewer weights
VALIDATION_SEED = 100
ARMS = ("gsm", "one_shot", "gradual")  # that draw hyper-parameters
TICKETS = ("gsm ticket", "magnitude ticket")
PRUNING_PART = 0.5  # of the epochs; then gradual pruning has reached its budget

Hyper = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Scale:
    """What suits a data set.

    Attributes:
        nets: name -> ``num_classes -> module``.
        pretraining: epochs of the dense net, and of a ticket.
        epochs: epochs after.
        batch_size: images in a step.
        usual: hyper-parameters of the dense net and of tickets.
        sparse: hyper-parameters that global sparse momentum tries.
        rates: learning rates that magnitude pruning tries; as many.
    """

    nets: Mapping[str, Callable[..., Any]]
    pretraining: int
    epochs: int
    batch_size: int
    usual: Hyper
    sparse: tuple[Hyper, ...]
    rates: tuple[float, ...]


def hyper_of(rate: float, decay: float, momentum: float) -> Hyper:
    """The numbers by name."""
    return {"learning_rate": rate, "weight_decay": decay, "momentum": momentum}


def _resnet(depth: int, *widths: int) -> Callable[..., Any]:
    return functools.partial(cifar_resnet, depth, widths=widths, shortcut="projection")


# A passive weight falls like exp(-rate * decay * steps / (1 - momentum)). The authors
# train 66 000 and more steps; with 1700 the decay has to be that much stronger.
SMALL = Scale(
    nets={"lenet300": LeNet300, "resnet8": _resnet(8, 8, 16, 32)},
    pretraining=20,
    epochs=40,
    batch_size=32,
    usual=hyper_of(0.1, 5e-4, 0.9),
    sparse=(
        hyper_of(0.02, 2e-3, 0.99),
        hyper_of(0.02, 5e-3, 0.99),
        hyper_of(0.02, 1e-2, 0.99),
        hyper_of(0.02, 2e-2, 0.99),
    ),
    rates=(0.02, 0.05, 0.1, 0.2),
)
# The authors' code; 100 epochs at 0.1 for the dense net are 500 there.
CIFAR = Scale(
    nets={"resnet56": _resnet(56, 16, 32, 64)},
    pretraining=500,
    epochs=600,
    batch_size=64,
    usual=hyper_of(0.1, 1e-4, 0.9),
    sparse=(hyper_of(5e-3, 1e-4, 0.98),),
    rates=(5e-3,),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What ``jaxprune run gsm`` understands."""

    dataset: str = "digits"
    """digits, shapes32 (these two need no network), mnist, cifar10 or cifar100."""
    net: str = ""
    """lenet300 or resnet8, on CIFAR resnet56; by default the first of these."""
    seeds: int = 5
    """How many nets are trained and cut."""
    epochs: int | None = None
    """Epochs of the dense net, and twice as many after; by default what suits."""
    quick: bool = False
    """Less of everything: one seed, 3 epochs, one try."""
    out: Path | None = None
    """Folder of the run; by default runs/gsm-DATASET-NET."""
    data_dir: Path | None = None
    """Where data sets are prepared; by default $JAXPRUNE_DATA or ~/.cache/jaxprune."""

    def __post_init__(self) -> None:
        known("data set", self.dataset, CLASSIFICATION)
        if self.net:
            known("net", self.net, (CIFAR if self.on_cifar else SMALL).nets)
        if self.seeds < 1:
            raise UsageError(f"--seeds must be at least 1, got {self.seeds}")

    @property
    def on_cifar(self) -> bool:
        """Whether the settings of the paper's largest runs here apply."""
        return self.dataset.startswith("cifar")

    @property
    def scale(self) -> Scale:
        """What suits the data set, or what was asked for."""
        scale = CIFAR if self.on_cifar else SMALL
        net = self.net or next(iter(scale.nets))
        scale = dataclasses.replace(scale, nets={net: scale.nets[net]})
        if epochs := 3 if self.quick else self.epochs:
            scale = dataclasses.replace(scale, pretraining=epochs, epochs=2 * epochs)
        if self.quick:
            tries = {"sparse": scale.sparse[:1], "rates": scale.rates[-1:]}
            scale = dataclasses.replace(scale, **tries)
        return scale


def main(config: Config) -> None:
    """Runs the experiment, or what is left of it."""
    scale, seeds = config.scale, 1 if config.quick else config.seeds
    (net,) = scale.nets
    told = {f.name: getattr(scale, f.name) for f in dataclasses.fields(scale)}
    del told["nets"]
    facts = {
        "dataset": config.dataset,
        "net": net,
        "seeds": seeds,
        "factors": FACTORS,
        **told,
    }
    name = f"gsm-{config.dataset}-{net}" + ("-quick" if config.quick else "")
    with open_run(config.out or Path("runs", name), facts) as run:
        if not run.finished:
            train, test = (
                load(config.dataset, split, data_dir=config.data_dir)
                for split in ("train", "test")
            )
            bench = Bench(scale, net, train)
            tries = {
                f"tune/{factor}x/{arm}": _tuning(bench, train, arm, factor)
                for factor in FACTORS
                for arm in ARMS
            }
            run.each("tune", tries, lambda name, tried: f"{name}: {best(tried)}")
            hyper = {
                name.removeprefix("tune/"): best(run.results["records"][name])
                for name in tries
            }
            jobs = {
                f"seed{seed}": _judging(bench, hyper, train, test, seed)
                for seed in range(seeds)
            }
            run.each("train, cut, judge", jobs, _tell)
            run.close(hyper=hyper, weights=bench.weights)
        _print(run)


# ------------------------------------------------------------------------ the programs


def plain_sgd(
    learning_rate: Any, steps: Any, weight_decay: Any, momentum: Any
) -> optax.GradientTransformation:
    """SGD as usual; the numbers may be traced."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, _kernels),
        optax.trace(momentum, nesterov=True),
        optax.scale_by_schedule(cosine(learning_rate, steps)),
    )


def sparse_sgd(
    learning_rate: Any,
    steps: Any,
    weight_decay: Any,
    momentum: Any,
    nonzero_ratio: Any,
) -> optax.GradientTransformation:
    """Global sparse momentum; the numbers may be traced."""
    return optax.chain(
        global_sparse_momentum(nonzero_ratio, weight_decay=weight_decay),
        optax.trace(momentum),
        optax.scale_by_schedule(cosine(learning_rate, steps)),
    )


def _all(params: Any) -> Any:
    return jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda w: w.ndim > 1, params)


class Bench:
    """A net of an experiment and its steps, each compiled once.

    Attributes:
        scale: the settings.
        subject: the net.
        weights: entries of its kernels.
    """

    def __init__(self, scale: Scale, net: str, data: Dataset):
        self.scale, self._data = scale, data
        module = scale.nets[net](num_classes=data.spec.num_classes)
        self.subject: Subject = subject_of(net, module, data.spec)
        params = jax.eval_shape(lambda: self.init(0))["params"]
        self.weights = sum(w.size for w in jax.tree.leaves(params) if w.ndim > 1)
        apply_fn = module.apply
        self._steps = {
            sparse: make_step(apply_fn, self._tx(scale.usual, 1, sparse), data)
            for sparse in (None, 1.0)
        }

    def _tx(
        self, hyper: Hyper, steps: int, sparse: float | None
    ) -> optax.GradientTransformation:
        numbers = {**hyper, "steps": float(steps)}
        if sparse is None:
            return hold_masks(optax.inject_hyperparams(plain_sgd)(**numbers), _all)
        return optax.inject_hyperparams(sparse_sgd)(**numbers, nonzero_ratio=sparse)

    def init(self, seed: int) -> Any:
        """Variables before training."""
        image = jnp.zeros((1, *self._data.spec.image_shape))
        return self.subject.init(jax.random.key(seed, impl=PRNG), image)

    def begin(
        self, variables: Any, steps: int, seed: int, hyper: Hyper, sparse: float | None
    ) -> State:
        """The state before so many steps."""
        tx = self._tx(hyper, steps, sparse)
        key = jax.random.key(seed + 1000 * steps, impl=PRNG)
        opt_state = tx.init(variables["params"])
        return State(variables, opt_state, jnp.int32(0), key)

    def step(self, sparse: float | None) -> Callable[..., State]:
        """Masked SGD, or global sparse momentum."""
        return self._steps[None if sparse is None else 1.0]


@jax.jit
def _largest(params: Any, ratio: jax.Array) -> Any:
    masks = winning_ticket(params, params, ratio).masks
    return jax.tree.map(lambda w, m: jnp.broadcast_to(m, w.shape), params, masks)


class Trainer:
    """One seed: what it trains on, and where it is judged."""

    def __init__(
        self, bench: Bench, train: Dataset, test: Dataset, seed: int, tick: Tick
    ):
        self.bench, self.data, self.test = bench, train, test
        self.seed, self.tick, self.scale = seed, tick, bench.scale
        self.first = bench.init(seed)

    def dense(self) -> Any:
        """The net trained as usual."""
        return self.train(self.first, self.scale.pretraining, self.scale.usual)

    def train(
        self,
        variables: Any,
        epochs: int,
        hyper: Hyper,
        *,
        masks: Any = None,
        sparse: float | None = None,
        ratio_of: Callable[[int], float] | None = None,
    ) -> Any:
        """Trains for some epochs.

        Args:
            variables: to begin with.
            epochs: how many.
            hyper: the numbers.
            masks: which weights there are; None for all.
            sparse: share of active weights, for global sparse momentum.
            ratio_of: epoch -> share of weights that are left by magnitude.
        """
        size, step = self.scale.batch_size, self.bench.step(sparse)
        steps = epochs * (len(self.data) // size)
        state = self.bench.begin(variables, steps, self.seed, hyper, sparse)
        if masks is not None:
            state = self._held(state, masks)
        if ratio_of is None:
            how = Fit(epochs, size, self.seed)
            return self._end(fit(step, state, self.data, how, self.tick))
        for epoch in range(epochs):
            params = state.variables["params"]
            state = self._held(state, self.largest(params, ratio_of(epoch)))
            how = Fit(1, size, 1000 * self.seed + epoch)  # an order of its own
            state = fit(step, state, self.data, how, self.tick)
        return self._end(state)

    def _end(self, state: State) -> Any:
        return jax.device_get(state.variables)

    def _held(self, state: State, masks: Any) -> State:
        """Weights that the masks remove are zero and stay it."""
        params = apply_masks(state.variables["params"], masks)
        opt_state = state.opt_state._replace(masks=pack_masks(masks, params))
        variables = {**state.variables, "params": params}
        return state._replace(variables=variables, opt_state=opt_state)

    def largest(self, params: Any, ratio: float) -> Any:
        """Masks of this share of the kernels' weights, by magnitude."""
        return _largest(params, jnp.float32(ratio))

    def judged(self, variables: Any) -> dict[str, float]:
        """Accuracy and cross-entropy."""
        return judged(self.bench.subject.predict(variables, self.test), self.test)

    def cut(self, variables: Any, ratio: float) -> tuple[Any, Any]:
        """The net without its small weights, and the masks."""
        masks = self.largest(variables["params"], ratio)
        return {**variables, "params": apply_masks(variables["params"], masks)}, masks

    def arm(
        self, arm: str, base: Any, factor: float, hyper: Hyper
    ) -> tuple[dict[str, Any], Any]:
        """The record of an arm, and which weights it keeps."""
        epochs, ratio = self.scale.epochs, 1 / factor
        if arm == "gsm":
            end = self.train(base, epochs, hyper, sparse=ratio)
            small, masks = self.cut(end, ratio)
            before = self.judged(end)["accuracy"]
            return {"before": before, **self._counted(small)}, masks
        if arm == "one_shot":
            small, masks = self.cut(base, ratio)
            before = self.judged(small)["accuracy"]
            end = self.train(base, epochs, hyper, masks=masks)
            return {"untuned": before, **self._counted(end)}, masks
        last = max(1, round(PRUNING_PART * epochs) - 1)

        def ratio_of(epoch: int) -> float:
            return ratio + (1 - ratio) * (1 - min(epoch / last, 1)) ** 3

        end = self.train(base, epochs, hyper, ratio_of=ratio_of)
        return self._counted(end), None

    def ticket(self, masks: Any) -> dict[str, Any]:
        """Those weights, trained from where they began."""
        usual, epochs = self.scale.usual, self.scale.pretraining
        return self._counted(self.train(self.first, epochs, usual, masks=masks))

    def _counted(self, variables: Any) -> dict[str, Any]:
        kernels = [w for w in jax.tree.leaves(variables["params"]) if np.ndim(w) > 1]
        left = sum(int(np.count_nonzero(w)) for w in kernels)
        return {"weights": left, **self.judged(variables)}


# ---------------------------------------------------------------------------- the jobs


def _tuning(bench: Bench, train: Dataset, arm: str, factor: int) -> Job:
    inner, outer = held_out(train)
    scale = bench.scale
    usual = {**scale.usual}
    tried = [{**usual, "learning_rate": rate} for rate in scale.rates]
    if arm == "gsm":
        tried = [{**hyper} for hyper in scale.sparse]

    def compute(tick: Tick) -> list[dict[str, Any]]:
        trainer = Trainer(bench, inner, outer, VALIDATION_SEED, tick)
        base = trainer.dense()
        return [
            {"hyper": hyper, **trainer.arm(arm, base, factor, hyper)[0]}
            for hyper in tried
        ]

    return Job(compute, scale.pretraining + len(tried) * scale.epochs)


def _judging(
    bench: Bench, hyper: Mapping[str, Hyper], train: Dataset, test: Dataset, seed: int
) -> Job:
    scale = bench.scale

    def compute(tick: Tick) -> dict[str, Any]:
        trainer = Trainer(bench, train, test, seed, tick)
        base = trainer.dense()
        record: dict[str, Any] = {"dense": trainer.judged(base)}
        for factor in FACTORS:
            found, masks = {}, {}
            for arm in ARMS:
                own = hyper[f"{factor}x/{arm}"]
                found[arm], masks[arm] = trainer.arm(arm, base, factor, own)
            # The largest weights of the trained net are those that one shot leaves.
            found["gsm ticket"] = trainer.ticket(masks["gsm"])
            found["magnitude ticket"] = trainer.ticket(masks["one_shot"])
            record[f"{factor}"] = found
        return record

    each = len(ARMS) * scale.epochs + len(TICKETS) * scale.pretraining
    return Job(compute, scale.pretraining + len(FACTORS) * each)


def over_seeds(
    results: Mapping[str, Any], factor: int, arm: str, what: str
) -> list[float]:
    """One number per seed."""
    records, seeds = results["records"], results["settings"]["seeds"]
    return [records[f"seed{s}"][f"{factor}"][arm][what] for s in range(seeds)]


def _tell(name: str, record: Any) -> str:
    parts = [f"dense {record['dense']['accuracy']:.3f}"]
    for factor in FACTORS:
        arms = record[f"{factor}"].items()
        told = ", ".join(f"{arm} {found['accuracy']:.3f}" for arm, found in arms)
        parts.append(f"{factor}x: {told}")
    return f"{name}: {'; '.join(parts)}"


def _print(run: Run) -> None:
    table = rich.table.Table(title="test accuracy, mean [95 % interval]")
    table.add_column("arm")
    for factor in FACTORS:
        table.add_column(f"{factor}x", justify="right")
    for arm in (*ARMS, *TICKETS):
        cells = []
        for factor in FACTORS:
            found = over_seeds(run.results, factor, arm, "accuracy")
            cells.append(str(interval(found)))
        table.add_row(arm, *cells)
    rich.console.Console().print(table)
