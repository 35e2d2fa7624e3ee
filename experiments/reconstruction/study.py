"""Criteria and repairs from data: what is left of a net at equal FLOPs?

Question   A trained net is cut to a share of its multiply-adds. Which choice of units
           leaves the most accuracy at once: sensitivities with one error for the whole
           net (PFP), ranking by what compensation can explain (CaP), LASSO, ThiNet,
           merging units that are alike, one unit of every function, L1 norms, or
           chance? How much of it is the choice, and how much the fit of the layers
           that read what is left, which L1, PFP and chance get too? Does any of it
           outlast the same short fine-tuning? What is compensation against training
           the cut net as long as the net was trained?
Refuted    Compensation, if the fit gives back less than half of what the cut loses.
           PFP, if at equal FLOPs its accuracy is not above that of L1 without a fit.
           Choosing by data, if L1 or chance with the fit are as good as the recipes
           that choose. Similarity and functionality, if they are not above chance.
           "95 % less time and 90 % less data than retraining at a similar accuracy",
           if compensation takes more than 5 % of the processor time of retraining, or
           is more than a point below it, with less than 10 % of the data.
Command    python -m experiments.reconstruction.study   (what is recorded is not done
           again; nets are kept in runs/budget-nets; --dataset cifar10 is the papers')
Leaves     experiments/reconstruction/study.json; `page` makes docs of it
Papers     Liebenwein et al., Provable Filter Pruning, https://arxiv.org/abs/1911.07412;
           Xie et al., Pruning with Compensation, https://arxiv.org/abs/2108.13728;
           He et al., Channel Pruning, https://arxiv.org/abs/1707.06168; Luo et al.,
           ThiNet, https://arxiv.org/abs/1707.06342; channel similarity,
           https://arxiv.org/abs/1908.02620; Qin et al., Functionality-Oriented
           Convolutional Filter Pruning, https://arxiv.org/abs/1810.07322

PFP and similarity bring their own widths; all others keep the same share of every
group. Data for choosing and fitting are the same 512 training images. Fine-tuning is
the same for all: one pass over the training data with AdamW, masks held. BatchNorm's
statistics are measured anew on the 512 images for the column "recalibrated" and before
fine-tuning. "l1, retrained" is the cut by L1, trained as long as the net was. Seconds
are of the processor, for choosing and mending (of retraining: all of it); "compiling"
is the part that XLA took on the wall.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from experiments.budget.nets import BATCH, DECAY, PEAK, cross_entropy, trained
from experiments.harness.pages import write_compact
from experiments.reconstruction.nets import NETS
from jaxprune import recipes, scores, select
from jaxprune.display._report import machine
from jaxprune.select import clusters, provable

RESULT = Path(__file__).with_suffix(".json")
FOLDER = Path("runs", "budget-nets")
RUN = ("lenet_fashion", "lenet300")
CONVOLUTIONAL = ("vgg_fashion",)
OF_DATASET = {"cifar10": ("vgg16_cifar10", "resnet56_cifar10")}
SEEDS, BUDGETS, CALIBRATION = 5, (0.5, 0.3), 512
RETRAINED = "l1, retrained"
METHODS = (
    "random",
    "l1",
    "pfp",
    "random + fit",
    "l1 + fit",
    "pfp + fit",
    "compensation",
    "lasso",
    "thinet",
)
# Of nets with feature maps.
MORE = ("similarity", "functionality", "functionality + fit", RETRAINED)


def main(
    seeds: int = SEEDS,
    path: Path = RESULT,
    nets: tuple[str, ...] = (*CONVOLUTIONAL, *RUN),
) -> None:
    """Makes what is missing of the result, all seeds of a budget before the next."""
    found = json.loads(path.read_text()) if path.exists() else {"records": {}}
    records = found["records"]
    for name in nets:
        bench = None
        for budget, seed in itertools.product(BUDGETS, range(seeds)):
            cells = {m: f"{name}/seed{seed}/{budget}/{m}" for m in methods(name)}
            missing = {m: key for m, key in cells.items() if key not in records}
            if not missing:
                continue
            bench = bench or Bench(name)
            variables = trained(name, seed, FOLDER, NETS)
            records.setdefault(f"{name}/seed{seed}/whole", bench.accuracy(variables))
            for method, key in missing.items():
                records[key] = bench.record(variables, method, budget, seed)
                print(key, records[key], flush=True)
                _write(path, found, seeds)
    _write(path, found, seeds)
    for row, values in found["summary"].items():
        print(f"{row:36}", *[f"{k} {v:.3f}" for k, v in values.items()])


def methods(name: str) -> tuple[str, ...]:
    """What is compared on a net."""
    return METHODS + (() if name in RUN else MORE)


def _write(path: Path, found: dict[str, Any], seeds: int) -> None:
    found |= {
        "command": "python -m experiments.reconstruction.study",
        "settings": {"seeds": seeds, "budgets": BUDGETS, "calibration": CALIBRATION},
        "machine": machine(),
        "summary": summary(found["records"]),
    }
    write_compact(path, found)


class Bench:
    """A net, its data, its groups and what is compiled once."""

    def __init__(self, name: str) -> None:
        self.net, (self.train, self.test) = NETS[name].make(), NETS[name].data()
        self.epochs = NETS[name].epochs
        image = self.train[0][:1]
        shapes = jax.eval_shape(self.net.init, jax.random.key(0), image)
        self.groups = jaxprune.trace(self.apply, shapes, image, roles=True)
        model = jaxprune.cost_model(self.apply, shapes, image, groups=self.groups)
        self.cost = model.multiply_adds
        self.batches = [
            jnp.asarray(self.train[0][k : k + 128]) for k in range(0, CALIBRATION, 128)
        ]
        self.predict = jax.jit(self.apply)
        self.tune = jax.jit(self._tune)

    def apply(self, variables: Any, images: Any) -> Any:
        return self.net.apply(variables, images)

    def accuracy(self, variables: Any) -> float:
        logits = np.asarray(self.predict(variables, self.test[0]))
        return round(float((logits.argmax(-1) == self.test[1]).mean()), 4)

    def record(
        self, variables: Any, method: str, budget: float, seed: int
    ) -> dict[str, Any]:
        """One cut: accuracy at once, recalibrated and fine-tuned; cost and seconds."""
        choice = "l1" if method == RETRAINED else method
        with Spent() as spent:
            cut, masks = self.cut(variables, choice, budget * self.cost.full, seed)
        kept = jaxprune.surgery.units_kept(self.groups, masks)
        cost = self.cost.value({n: int(k.sum()) for n, k in kept.items()})
        fresh = jaxprune.apply_masks(self.recalibrated(cut), masks)
        epochs, peak = (self.epochs, PEAK) if method == RETRAINED else (1, PEAK / 4)
        with Spent() as training:
            tuned = self.trained_on(fresh, masks, seed, epochs, peak)
        if method == RETRAINED:
            spent = training
        return {
            "cost": round(float(cost / self.cost.full), 4),
            "at once": self.accuracy(cut),
            "recalibrated": self.accuracy(fresh),
            "fine-tuned": self.accuracy(tuned),
            "seconds": round(spent.seconds, 1),
            "compiling": round(spent.compiling, 1),
        }

    def trained_on(
        self, variables: Any, masks: Any, seed: int, epochs: int, peak: float
    ) -> Any:
        """The net after so many passes over the training data, masks held."""
        rng, count = np.random.default_rng(seed), len(self.train[0])
        orders = [
            rng.permutation(count)[: count // BATCH * BATCH] for _ in range(epochs)
        ]
        order = np.concatenate(orders).reshape(-1, BATCH)
        full = jax.tree.map(
            lambda m, w: np.broadcast_to(m, np.shape(w)), masks, dict(variables)
        )
        data = map(jnp.asarray, self.train)
        return jax.block_until_ready(self.tune(variables, full, order, peak, *data))

    def cut(
        self, variables: Any, method: str, budget: float, seed: int
    ) -> tuple[Any, Any]:
        """Variables of the whole shapes, 0 where masked, and the masks."""
        data = self.groups, self.apply, variables, self.batches
        if method in recipes.METHODS:
            sizes = self.even(budget)
            share = {n: 1 - k / self.groups[n].size for n, k in sizes.items()}
            found = recipes.reconstruct(
                *data, sparsity=share, method=method, progress=False
            )
            return found.variables, found.masks
        if method == "similarity":
            return self.merged(variables, budget)
        choice, fit = method.removesuffix(" + fit"), method.endswith(" + fit")
        masks = jaxprune.expand_masks(
            self.groups, self.chosen(choice, variables, budget, seed)
        )
        if fit:
            fitted = jaxprune.compensate(*data[:3], masks, self.batches, progress=False)
            return fitted, masks
        return jaxprune.apply_masks(variables, masks), masks

    def chosen(
        self, choice: str, variables: Any, budget: float, seed: int
    ) -> Mapping[str, Any]:
        """Which units stay, by a criterion alone."""
        if choice == "pfp":
            s = jax.device_get(
                scores.empirical_sensitivity(
                    self.groups, self.apply, variables, self.batches[:1], progress=False
                )
            )
            found = provable.allocate(self.groups, s, self.cost, budget=budget)
            return select.to_sizes(self.groups, s, found.sizes)
        if choice == "functionality":
            return self.of_functions(variables, budget, seed)
        if choice == "l1":
            of = scores.group_scores(
                self.groups,
                scores.magnitude(variables["params"]),
                reduce="l1",
                members="producers",
            )
        else:
            rng = np.random.default_rng(seed)
            of = {n: rng.random(group.size) for n, group in self.groups.items()}
        return select.to_sizes(self.groups, jax.device_get(of), self.even(budget))

    def merged(self, variables: Any, budget: float) -> tuple[Any, Any]:
        """Units whose activations are alike, as one: that of the largest scale."""
        apart = clusters.distances(
            self.groups, self.apply, variables, self.batches, progress=False
        )
        ids = clusters.similar(self.groups, apart, cost=self.cost, budget=budget)
        scale = scores.group_scores(
            self.groups, scores.batch_norm_scale(variables["params"]), reduce="l1"
        )
        found = jaxprune.merge(variables, self.groups, ids, jax.device_get(scale))
        return jaxprune.unslice_params(found.variables, found.masks), found.masks

    def of_functions(
        self, variables: Any, budget: float, seed: int
    ) -> Mapping[str, Any]:
        """Of every function, by images that excite filters, those that matter most."""
        sizes = self.even(budget)

        def loss(variables: Any, batch: Any) -> jax.Array:
            return cross_entropy(self.apply(variables, batch[0]), batch[1])

        labels = [self.train[1][k : k + 128] for k in range(0, CALIBRATION, 128)]
        batches = list(zip(self.batches, labels, strict=True))
        found = recipes.functionality(
            self.groups,
            self.apply,
            loss,
            variables,
            self.batches[0],
            batches,
            key=jax.random.key(seed),
            sparsity={n: 1 - k / self.groups[n].size for n, k in sizes.items()},
            progress=False,
        )
        return found.keep

    def even(self, budget: float) -> dict[str, int]:
        """The widths at which every group keeps the same share."""

        def widths(share: float) -> dict[str, int]:
            return {
                n: max(1, round(share * group.size)) for n, group in self.groups.items()
            }

        return select.bisect(widths, self.cost, budget=budget, low=0.0, high=1.0)

    def recalibrated(self, variables: Any) -> Any:
        if "batch_stats" not in variables:
            return variables
        calls = [(batch,) for batch in self.batches]
        return jaxprune.recalibrate(self.net.apply, variables, calls, train=True)

    def _tune(
        self, variables: Any, masks: Any, order: Any, peak: Any, x: Any, y: Any
    ) -> Any:
        stats = {k: v for k, v in variables.items() if k != "params"}
        rate = optax.cosine_decay_schedule(1.0, len(order))
        tx = optax.adamw(lambda step: peak * rate(step), weight_decay=DECAY)

        def step(state: Any, index: jax.Array) -> tuple[Any, None]:
            params, stats, opt_state = state

            def loss(params: Any) -> tuple[jax.Array, Any]:
                logits, new = self.net.apply(
                    {"params": params, **stats},
                    x[index],
                    train=True,
                    mutable=["batch_stats"],
                )
                return cross_entropy(logits, y[index]), new

            grads, new = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            params = jaxprune.apply_masks(params, masks["params"])
            return (params, {**stats, **new}, opt_state), None

        start = variables["params"], stats, tx.init(variables["params"])
        params, stats, _ = jax.lax.scan(step, start, order)[0]
        return {"params": params, **stats}


class Spent:
    """Seconds of the processor within a block, and those of them that XLA compiles.

    Attributes:
        seconds: of the processor.
        compiling: on the wall.
    """

    _sum = 0.0

    def __enter__(self) -> "Spent":
        self._began, self._before = time.process_time(), Spent._sum
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self._began
        self.compiling = Spent._sum - self._before

    @staticmethod
    def listen(event: str, seconds: float, **_: Any) -> None:
        """Adds up how long XLA compiles."""
        Spent._sum += seconds * event.endswith("backend_compile_duration")


jax.monitoring.register_event_duration_secs_listener(Spent.listen)


def summary(records: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Net, budget and method -> mean accuracies over seeds."""
    cells: dict[str, list[Any]] = {}
    for key, record in records.items():
        net, _, *rest = key.split("/")
        if rest != ["whole"]:
            cells.setdefault("/".join([net, *rest]), []).append(record)
    mean: Callable[[list[Any], str], float] = lambda rows, what: round(  # noqa: E731
        float(np.mean([row[what] for row in rows])), 4
    )
    columns = "cost", "at once", "recalibrated", "fine-tuned", "seconds", "compiling"
    return {
        key: {what: mean(rows, what) for what in columns if what in rows[0]}
        for key, rows in cells.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--net", action="append", choices=list(NETS))
    parser.add_argument("--dataset", choices=list(OF_DATASET), help="a paper's own")
    options = parser.parse_args()
    default = OF_DATASET.get(options.dataset, (*CONVOLUTIONAL, *RUN))
    main(options.seeds, options.out, tuple(options.net or default))
