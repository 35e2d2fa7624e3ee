"""Safe defaults: what does a budget alone leave of a net?

Question   A person gives `select.to_budget` scores and a budget, nothing else. Which
           rule, by which groups compete, leaves the most accuracy, over several nets
           and scores, without fine-tuning? How much must a group keep at least?
Command    python -m experiments.budget.study       (a cut that is recorded is not done
           again; nets are kept in runs/budget-nets)
Leaves     experiments/budget/study.json. Of what is committed, 3 seeds, only "default"
           was made by this command; the other rules by earlier copies of this code,
           with the same seeds. To be rerun.
Papers     named at `select.to_budget`

Five nets (two LeNet-300-100, a VGG, a ResNet-8 and a ViT, on digits and Fashion-MNIST)
are cut to 60 % and 35 % of their multiply-adds with L2, Taylor and group Fisher scores.
Every rule is a method, a normalisation of the scores of each group, and the largest
share that a group may lose. "default" gives none of these.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune
from experiments.budget.nets import NETS, cross_entropy, trained
from experiments.harness.pages import write_compact
from jaxprune import scores, select
from jaxprune.display import machine

RESULT = Path(__file__).with_suffix(".json")
FOLDER = Path("runs", "budget-nets")
SEEDS, BUDGETS, CALIBRATION = 3, (0.6, 0.35), 512
FLOORS = (1.0, 0.9, 0.8)
NORMS = (None, "mean", "max", "lamp")
RULES: Sequence[tuple[str, Any, float]] = (
    *itertools.product(("greedy", "global"), NORMS, FLOORS),
    ("uniform", None, 1.0),
    ("default", None, 0.0),
)


def main() -> None:
    """Makes what is missing of the result."""
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"records": {}}
    records = found["records"]
    for name in NETS:
        _one_net(name, records)
    found |= {
        "command": "python -m experiments.budget.study",
        "settings": {"seeds": SEEDS, "budgets": BUDGETS, "cost": "multiply-adds"},
        "machine": machine(),
        "summary": summary(records),
    }
    write_compact(RESULT, found)
    for rule, values in found["summary"].items():
        print(f"{rule:18}", *[f"{k} {v:.3f}" for k, v in values.items()])


def _one_net(name: str, records: dict[str, Any]) -> None:
    net, (train, test) = NETS[name].make(), NETS[name].data()
    predict = jax.jit(net.apply)
    groups = cost = None
    for seed in range(SEEDS):
        keys = [f"{name}/seed{seed}/{s}" for s in ("l2", "taylor", "group_fisher")]
        if all(set(map(title, RULES)) <= set(records.get(key, {})) for key in keys):
            continue
        variables = trained(name, seed, FOLDER)
        if groups is None:
            groups = jaxprune.trace(net.apply, variables, train[0][:1])
            cost = jaxprune.cost_model(
                net.apply, variables, train[0][:1], groups=groups
            ).multiply_adds
        every = scored(net, groups, variables, *train)
        for key in keys:
            units = every[key.rpartition("/")[2]]
            record = records.setdefault(key, {})
            for rule in RULES:
                if title(rule) not in record:
                    keeps = [cut(groups, units, cost, rule, b) for b in BUDGETS]
                    record[title(rule)] = [
                        _accuracy(predict, groups, variables, keep, test)
                        for keep in keeps
                    ]
        print(name, seed, flush=True)


def title(rule: tuple[str, Any, float]) -> str:
    """How a rule is called in the result."""
    method, norm, floor = rule
    known = method in ("uniform", "default")
    return method if known else f"{method}, {norm or 'plain'}, {floor}"


def scored(net: Any, groups: Any, variables: Any, images: Any, labels: Any) -> Any:
    """Name -> scores of units, from the weights and from training examples."""
    starts = range(0, CALIBRATION, 128)
    batches = [(jnp.asarray(images[k:][:128]), labels[k:][:128]) for k in starts]
    params = variables["params"]

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        logits = net.apply({**variables, "params": params}, batch[0])
        return cross_entropy(logits, batch[1])

    def of_variables(variables: Any, batch: Any) -> jax.Array:
        return loss_fn(variables["params"], batch)

    taylor = scores.taylor(loss_fn, params, batches, progress=False)
    fisher = scores.group_fisher(
        groups, of_variables, variables, batches, progress=False
    )
    found = {
        "l2": scores.group_scores(groups, params),
        "taylor": scores.group_scores(groups, taylor, reduce="sum"),
        "group_fisher": fisher,
    }
    return jax.device_get(found)


def cut(groups: Any, units: Any, cost: Any, rule: Any, budget: float) -> Any:
    """The decision by this rule."""
    method, norm, floor = rule
    spend = {"budget": budget * cost.full}
    if method == "default":
        return select.to_budget(groups, units, cost, **spend)
    scaled = jax.device_get(scores.normalized(units, norm))
    limits = {"method": method, "max_sparsity": floor}
    return select.to_budget(groups, scaled, cost, **spend, **limits)


def _accuracy(
    predict: Any, groups: Any, variables: Any, keep: Any, test: Any
) -> list[float]:
    """Of the cut net, and the smallest share that a group keeps."""
    masks = jaxprune.expand_masks(groups, keep)
    logits = predict(jaxprune.apply_masks(variables, masks), test[0])
    right = float((np.asarray(logits).argmax(-1) == test[1]).mean())
    return [round(right, 4), round(min(float(k.mean()) for k in keep.values()), 4)]


def summary(records: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Rule -> mean accuracy by score, over all, and of the worst net and score."""
    found = {}
    for rule in map(title, RULES):
        cells: dict[tuple[str, str], list[float]] = {}
        for key, record in records.items():
            net, _, score = key.split("/")
            of = [accuracy for accuracy, _ in record[rule]]
            cells.setdefault((net, score), []).extend(of)
        means = {cell: float(np.mean(values)) for cell, values in cells.items()}
        of_score = {
            score: [mean for (_, own), mean in means.items() if own == score]
            for score in ("l2", "taylor", "group_fisher")
        }
        by_score = {s: round(float(np.mean(own)), 3) for s, own in of_score.items()}
        every = list(means.values())
        extremes = {"all": float(np.mean(every)), "worst": min(every)}
        found[rule] = by_score | {k: round(v, 3) for k, v in extremes.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]["all"]))


if __name__ == "__main__":
    main()
