"""Criteria and repairs from data: what is left of a net at equal FLOPs?

Question   A trained net is cut to a share of its multiply-adds. Which choice of units
           leaves the most accuracy at once: sensitivities with one error for the whole
           net (PFP), ranking by what compensation can explain (CaP), LASSO, ThiNet, L1
           norms, or chance? How much of it is the choice, and how much the fit of the
           layers that read what is left, which L1 and chance get too? Does any of it
           outlast the same short fine-tuning?
Refuted    Compensation, if the fit gives back less than half of what the cut loses.
           PFP, if at equal FLOPs its accuracy is not above that of L1 without a fit.
           Choosing by data, if L1 or chance with the fit are as good as the recipes
           that choose.
Command    python -m experiments.reconstruction.study   (what is recorded is not done
           again; nets are kept in runs/budget-nets)
Leaves     experiments/reconstruction/study.json
Papers     Liebenwein et al., Provable Filter Pruning, https://arxiv.org/abs/1911.07412;
           Xie et al., Pruning with Compensation, https://arxiv.org/abs/2108.13728;
           He et al., Channel Pruning, https://arxiv.org/abs/1707.06168; Luo et al.,
           ThiNet, https://arxiv.org/abs/1707.06342

All methods but PFP, which brings its own, keep the same share of every group. Data for
choosing and fitting are the same 512 training images. Fine-tuning is the same for all:
one pass over the training data with AdamW, masks held. BatchNorm's statistics are
measured anew on the 512 images for the column "recalibrated" and before fine-tuning.
"""

import argparse
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
from experiments.budget.nets import BATCH, DECAY, NETS, PEAK, cross_entropy, trained
from experiments.harness.pages import write_compact
from jaxprune import recipes, scores, select
from jaxprune.display._report import machine
from jaxprune.select import provable

RESULT = Path(__file__).with_suffix(".json")
FOLDER = Path("runs", "budget-nets")
RUN = ("lenet_fashion", "lenet300")
SEEDS, BUDGETS, CALIBRATION = 5, (0.5, 0.3), 512
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


def main(seeds: int = SEEDS, path: Path = RESULT, nets: tuple[str, ...] = RUN) -> None:
    """Makes what is missing of the result."""
    found = json.loads(path.read_text()) if path.exists() else {"records": {}}
    records = found["records"]
    for name in nets:
        bench = None
        for seed in range(seeds):
            keys = {
                (b, m): f"{name}/seed{seed}/{b}/{m}" for b in BUDGETS for m in METHODS
            }
            if all(key in records for key in keys.values()):
                continue
            bench = bench or Bench(name)
            variables = trained(name, seed, FOLDER)
            records.setdefault(f"{name}/seed{seed}/whole", bench.accuracy(variables))
            for (budget, method), key in keys.items():
                if key not in records:
                    records[key] = bench.record(variables, method, budget, seed)
            _write(path, found, seeds)
            print(name, seed, flush=True)
    _write(path, found, seeds)
    for row, values in found["summary"].items():
        print(f"{row:36}", *[f"{k} {v:.3f}" for k, v in values.items()])


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
        began = time.perf_counter()
        cut, masks = self.cut(variables, method, budget * self.cost.full, seed)
        seconds = time.perf_counter() - began
        kept = jaxprune.surgery.units_kept(self.groups, masks)
        spent = self.cost.value({n: int(k.sum()) for n, k in kept.items()})
        fresh = jaxprune.apply_masks(self.recalibrated(cut), masks)
        order = np.random.default_rng(seed).permutation(len(self.train[0]))
        order = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
        full = jax.tree.map(
            lambda m, w: np.broadcast_to(m, np.shape(w)), masks, dict(fresh)
        )
        tuned = self.tune(fresh, full, order, *map(jnp.asarray, self.train))
        return {
            "cost": round(float(spent / self.cost.full), 4),
            "at once": self.accuracy(cut),
            "recalibrated": self.accuracy(fresh),
            "fine-tuned": self.accuracy(tuned),
            "seconds": round(seconds, 1),
        }

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

    def _tune(self, variables: Any, masks: Any, order: Any, x: Any, y: Any) -> Any:
        stats = {k: v for k, v in variables.items() if k != "params"}
        tx = optax.adamw(
            optax.cosine_decay_schedule(PEAK / 4, len(order)), weight_decay=DECAY
        )

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
    columns = ("cost", "at once", "recalibrated", "fine-tuned")
    return {
        key: {what: mean(rows, what) for what in columns} for key, rows in cells.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--net", action="append", choices=list(NETS))
    options = parser.parse_args()
    main(options.seeds, options.out, tuple(options.net or RUN))
