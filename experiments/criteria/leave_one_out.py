"""Which criterion ranks units as the loss without them does?

Question   The loss with one unit removed, for every unit of a trained net, is the truth
           that criteria estimate. How well does each rank the units of a layer, and
           what does ranking by the sign of signed scores do?
Command    python -m experiments.criteria.leave_one_out     (after, or with the nets of,
           experiments.budget.study)
Leaves     experiments/criteria/leave_one_out.json
Papers     named at each score in `jaxprune.scores`

The nets (`experiments.budget.nets`) are trained without strong decay, so that no unit
is dead: where dead units are many, every sensible criterion finds them and all read the
same. Spearman's rank correlation with the rise of the training loss, averaged over the
layers of a net. Beside it the test accuracy after half of every layer is cut.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import jaxprune
from experiments.budget.nets import NETS, cross_entropy, trained
from experiments.budget.study import CALIBRATION, FOLDER
from experiments.harness.pages import write_compact
from jaxprune import scores, select
from jaxprune.display import machine
from jaxprune.statistics import taps

RESULT = Path(__file__).with_suffix(".json")
SUBJECTS, SEEDS = ("lenet300", "lenet_fashion"), 5


def main() -> None:
    """Makes what is missing of the result."""
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"records": {}}
    for name in SUBJECTS:
        for seed in range(SEEDS):
            if f"{name}/seed{seed}" not in found["records"]:
                found["records"][f"{name}/seed{seed}"] = one_net(name, seed)
                found |= {
                    "command": "python -m experiments.criteria.leave_one_out",
                    "machine": machine(),
                }
                write_compact(RESULT, found)
                print(name, seed, flush=True)
    print(table(found["records"]))


def one_net(name: str, seed: int) -> dict[str, Any]:
    """Criterion -> rank correlation, and accuracy with half of every layer cut."""
    net, (train, test) = NETS[name].make(), NETS[name].data()
    variables = trained(name, seed, FOLDER)
    groups = jaxprune.trace(net.apply, variables, train[0][:1])
    starts = range(0, CALIBRATION, 128)
    batches = [(jnp.asarray(train[0][k:][:128]), train[1][k:][:128]) for k in starts]

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        logits = net.apply({**variables, "params": params}, batch[0])
        return cross_entropy(logits, batch[1])

    rises = _rises(groups, loss_fn, variables["params"], batches)
    record: dict[str, Any] = {}
    for criterion, score in criteria(groups, loss_fn, net, variables, batches).items():
        units = {k: np.asarray(v) for k, v in score().items()}
        ranks = [scipy.stats.spearmanr(units[k], rises[k]).statistic for k in groups]
        keep = select.per_group(groups, units, sparsity=0.5)
        masks = jaxprune.expand_masks(groups, keep)
        logits = net.apply(jaxprune.apply_masks(variables, masks), test[0])
        right = float((np.asarray(logits).argmax(-1) == test[1]).mean())
        record[criterion] = [round(float(np.mean(ranks)), 4), round(right, 4)]
    return record


def _rises(groups: Any, loss_fn: Any, params: Any, batches: Any) -> Any:
    """Group -> the loss without each unit, less the loss with all."""
    gated = taps.gate(loss_fn, groups)

    def losses(which: str, batch: Any) -> jax.Array:
        alone = 1 - jnp.eye(groups[which].size)
        return jax.lax.map(lambda g: gated({which: g}, params, batch), alone)

    fast = jax.jit(losses, static_argnums=0)
    return {
        name: np.mean([fast(name, batch) for batch in batches], 0) for name in groups
    }


def criteria(
    groups: Any, loss_fn: Any, net: Any, variables: Any, batches: Any
) -> Mapping[str, Callable[[], Any]]:
    """Name -> how its scores of units come about."""
    params, quiet = variables["params"], {"progress": False}
    images = [images for images, _ in batches]

    def of_weights(score: Callable[[], Any], reduce: Any) -> Callable[[], Any]:
        return lambda: scores.group_scores(groups, score(), reduce=reduce)

    def taylor(form: Any) -> Callable[[], Any]:
        return lambda: scores.taylor(loss_fn, params, batches, form=form, **quiet)

    def hessian() -> Any:
        key = jax.random.key(0)
        diagonal = scores.hessian_diagonal(loss_fn, params, batches, key, **quiet)
        return scores.obd(params, diagonal)

    def fisher() -> Any:
        return scores.obd(params, scores.fisher(loss_fn, params, batches, **quiet))

    def grasp() -> Any:
        return scores.grasp(loss_fn, params, batches, **quiet)

    def of_variables(variables: Any, batch: Any) -> jax.Array:
        return loss_fn(variables["params"], batch)

    def activation() -> Any:
        return scores.mean_activation(groups, net.apply, variables, images, **quiet)

    return {
        "group_fisher": lambda: scores.group_fisher(
            groups, of_variables, variables, batches, **quiet
        ),
        "obd with fisher": of_weights(fisher, "abs_of_sum"),
        "obd": of_weights(hessian, "abs_of_sum"),
        "obd, by sign": of_weights(hessian, "signed_sum"),
        "taylor": of_weights(taylor("abs"), "sum"),
        "taylor, signed": of_weights(taylor("signed"), "abs_of_sum"),
        "grasp": of_weights(grasp, "abs_of_sum"),
        "grasp, by sign": of_weights(grasp, "signed_sum"),
        "mean_activation": activation,
        "l2": of_weights(lambda: scores.l2(params), "l2"),
        "l1": of_weights(lambda: scores.l1(params), "l1"),
        "geometric_median": lambda: scores.geometric_median(groups, params),
        "random": of_weights(lambda: scores.random(params, jax.random.key(1)), "mean"),
    }


def table(records: Mapping[str, Any]) -> str:
    """Rank correlations and accuracies in Markdown, means over the seeds."""
    names = list(dict.fromkeys(key.split("/")[0] for key in records))
    lines = ["| criterion | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for criterion in next(iter(records.values())):
        cells = []
        for name in names:
            own = [r[criterion] for k, r in records.items() if k.startswith(f"{name}/")]
            rank, right = np.mean(own, 0)
            cells.append(f"{rank:+.2f}, {100 * right:.1f} %")
        lines.append(f"| {criterion} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
