"""Safe defaults: what does a budget alone leave of a net?

Question   A person gives `select.to_budget` scores and a budget, nothing else. Which
           rule, by which groups compete, leaves the most accuracy, over several nets
           and scores, without fine-tuning? How much must a group keep at least?
Command    python -m experiments.budget.study       (a cut that is recorded is not done
           again; nets are kept in runs/budget-nets)
Leaves     experiments/budget/study.json
Papers     named at `select.to_budget`

Five nets (two LeNet-300-100, a VGG, a ResNet-8 and a ViT, on digits and Fashion-MNIST)
are cut to 60 % and 35 % of their multiply-adds with L2, Taylor and group Fisher scores.
Every rule is a method, a normalisation of the scores of each group, and the largest
share that a group may lose. "default" gives none of these; "default, 4 rounds" cuts in
four steps and computes the scores anew on what is left, as ``prune(rounds=4)`` does.
"""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune
from experiments.budget.nets import NETS, Split, cross_entropy, trained
from experiments.harness.pages import write_compact
from jaxprune import scores, select
from jaxprune.costing import Cost
from jaxprune.display import machine

RESULT = Path(__file__).with_suffix(".json")
FOLDER = Path("runs", "budget-nets")
SEEDS, BUDGETS, CALIBRATION = 5, (0.6, 0.35), 512
FLOORS = (1.0, 0.9, 0.8)
NORMS = (None, "mean", "max", "lamp")
RULES: Sequence[tuple[str, Any, float]] = (
    *itertools.product(("greedy", "global"), NORMS, FLOORS),
    ("uniform", None, 1.0),
    ("default", None, 0.0),
    ("default, 4 rounds", None, 0.0),
)
SCORES = ("l2", "taylor", "group_fisher")


def main() -> None:
    """Makes what is missing of the result, and saves it net by net."""
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"records": {}}
    found |= {
        "command": "python -m experiments.budget.study",
        "settings": {"seeds": SEEDS, "budgets": BUDGETS, "cost": "multiply-adds"},
        "machine": machine(),
    }
    for name, seed in itertools.product(NETS, range(SEEDS)):
        _one_net(name, seed, found["records"])
        write_compact(RESULT, found | {"summary": summary(found["records"])})
    for rule, values in summary(found["records"]).items():
        print(f"{rule:18}", *[f"{k} {v:.3f}" for k, v in values.items()])


def _one_net(name: str, seed: int, records: dict[str, Any]) -> None:
    keys = {score: f"{name}/seed{seed}/{score}" for score in SCORES}
    if all(set(map(title, RULES)) <= set(records.get(k, {})) for k in keys.values()):
        return
    subject = _subject(name, seed)
    for score, key in keys.items():
        record = records.setdefault(key, {})
        for rule in RULES:
            if title(rule) not in record:
                record[title(rule)] = [
                    _accuracy(subject, cut(subject, score, rule, budget))
                    for budget in BUDGETS
                ]
    print(name, seed, flush=True)


class Subject(NamedTuple):
    """A trained net, its groups and costs, and what its units score."""

    net: Any
    variables: Any
    data: tuple[Split, Split]
    groups: jaxprune.Groups
    cost: Cost
    scores: Mapping[str, Any]


def _subject(name: str, seed: int) -> Subject:
    net, data = NETS[name].make(), NETS[name].data()
    variables, example = trained(name, seed, FOLDER), data[0][0][:1]
    groups = jaxprune.trace(net.apply, variables, example)
    cost = jaxprune.cost_model(net.apply, variables, example, groups=groups)
    found = scored(net, groups, variables, *data[0])
    return Subject(net, variables, data, groups, cost.multiply_adds, found)


def title(rule: tuple[str, Any, float]) -> str:
    """How a rule is called in the result."""
    method, norm, floor = rule
    known = method in ("greedy", "global")
    return method if not known else f"{method}, {norm or 'plain'}, {floor}"


def calibration(net: Any, variables: Any, images: Any, labels: Any) -> tuple[Any, Any]:
    """The loss of variables and a batch, and the batches that scores see."""
    starts = range(0, CALIBRATION, 128)
    batches = [(jnp.asarray(images[k:][:128]), labels[k:][:128]) for k in starts]

    def loss_fn(variables: Any, batch: Any) -> jax.Array:
        return cross_entropy(net.apply(variables, batch[0]), batch[1])

    return loss_fn, batches


def scored(net: Any, groups: Any, variables: Any, images: Any, labels: Any) -> Any:
    """Name -> scores of units, from the weights and from training examples."""
    loss_fn, batches = calibration(net, variables, images, labels)
    data = loss_fn, variables, batches
    taylor = scores.taylor(*data, progress=False)
    found = {
        "l2": scores.group_scores(groups, variables),
        "taylor": scores.group_scores(groups, taylor, reduce="sum"),
        "group_fisher": scores.group_fisher(groups, *data, progress=False),
    }
    return jax.device_get(found)


def cut(subject: Subject, score: str, rule: Any, budget: float) -> Any:
    """The decision by this rule."""
    method, norm, floor = rule
    if method == "default, 4 rounds":
        return _in_rounds(subject, score, budget)
    spend = {"budget": budget * subject.cost.full}
    given = subject.groups, subject.scores[score], subject.cost
    if method == "default":
        return select.to_budget(*given, **spend)
    scaled = jax.device_get(scores.normalized(given[1], norm))
    limits = {"method": method, "max_sparsity": floor}
    return select.to_budget(given[0], scaled, given[2], **spend, **limits)


def _in_rounds(subject: Subject, score: str, budget: float) -> Any:
    net, variables, (train, _) = subject.net, subject.variables, subject.data
    loss_fn, batches = calibration(net, variables, *train)
    pruned = jaxprune.prune(
        net.apply,
        variables,
        train[0][:1],
        budget=budget,
        cost="multiply_adds",
        score=score,
        loss_fn=loss_fn,
        batches=batches,
        rounds=4,
        exact=False,  # masked, not narrowed, as the others
        recalibrate=False,
        progress=False,
    )
    return pruned.plan


def _accuracy(subject: Subject, keep: Any) -> list[float]:
    """Of the cut net, and the smallest share that a group keeps."""
    groups, (_, test) = subject.groups, subject.data
    masks = jaxprune.expand_masks(groups, keep)
    cut_net = jaxprune.apply_masks(subject.variables, masks)
    logits = _apply(subject.net, cut_net, test[0])
    right = float((np.asarray(logits).argmax(-1) == test[1]).mean())
    return [round(right, 4), round(min(float(k.mean()) for k in keep.values()), 4)]


@functools.partial(jax.jit, static_argnums=0)
def _apply(net: Any, variables: Any, images: Any) -> Any:
    return net.apply(variables, images)


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
            for score in SCORES
        }
        by_score = {s: round(float(np.mean(own)), 3) for s, own in of_score.items()}
        every = list(means.values())
        extremes = {"all": float(np.mean(every)), "worst": min(every)}
        found[rule] = by_score | {k: round(v, 3) for k, v in extremes.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]["all"]))


if __name__ == "__main__":
    main()
