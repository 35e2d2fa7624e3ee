"""Prunability: does the share of weights that a net needs tell how it generalises?

Question   Over a family of nets that differ in width, depth, learning rate, amount of
           data and label noise: how well does the smallest fraction of weights that
           keeps the training loss rank the nets by their generalisation gap, beside
           margins, flatness and the sum of training losses?
Refuted    The claim that prunability predicts the gap better than flatness, if its rank
           correlation is not above that of flatness over all seeds together.
Command    python -m experiments.prunability.study     (--quick for a first look)
Leaves     experiments/prunability/study.json
Paper      Kuhn et al., Robustness to Pruning Predicts Generalization in Deep Neural
           Networks, https://arxiv.org/abs/2103.06002 (there on CIFAR-10 and SVHN, with
           convolutional nets)

Perceptrons on Fashion-MNIST at half its resolution, every combination of two values of
five settings, trained for the same number of steps with SGD. The gap is training minus
test accuracy, where test labels are as noisy as those of training. Every measure is
signed so that larger is said to go with a larger gap:

* prunability: by magnitude, the loss may grow by a tenth; "with slack" by 0.02 more;
* margin: minus the tenth percentile of the logit margins on the training data, over the
  product of the spectral norms of the layers;
* flatness: 1 / sigma^2, with sigma the largest noise, as a share of every weight, that
  lifts the mean training loss by no more than 0.1;
* sum of losses: of all training batches.

Rank correlation is Kendall's tau; "within" is its mean over pairs of nets that differ
in one setting alone (the granulated coefficient of Jiang et al., Fantastic
Generalization Measures, https://arxiv.org/abs/1912.02178).
"""

import argparse
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from experiments.budget.nets import cross_entropy, fashion
from experiments.harness.pages import write_compact
from jaxprune import recipes
from jaxprune.display import machine

RESULT = Path(__file__).with_suffix(".json")
FAMILY: Mapping[str, tuple[Any, Any]] = {
    "width": (16, 64),
    "depth": (1, 3),
    "rate": (0.02, 0.1),
    "examples": (500, 2000),
    "noise": (0.0, 0.2),
}
MEASURES = "prunability", "prunability, slack", "margin", "flatness", "sum of losses"
SEEDS, STEPS, BATCH, NOISES = 3, 1500, 64, 8


def main(seeds: int, steps: int, path: Path) -> None:
    """Trains what is missing of the family, all of one architecture at once."""
    found = json.loads(path.read_text()) if path.exists() else {"records": {}}
    train, test = fashion()
    data = tuple(each.reshape(len(each), -1) for each in (train[0], test[0]))
    for width, depth in itertools.product(FAMILY["width"], FAMILY["depth"]):
        others = list(
            itertools.product(*(FAMILY[k] for k in ("rate", "examples", "noise")))
        )
        cells = [(*other, seed) for other in others for seed in range(seeds)]
        names = [f"{width}/{depth}/{'/'.join(map(str, cell))}" for cell in cells]
        if all(name in found["records"] for name in names):
            continue
        noisy = [_noisy(train[1], test[1], cell[2], cell[3]) for cell in cells]
        nets, losses = _trained(width, depth, cells, steps, data[0], noisy)
        for k, name in enumerate(names):
            own = [{n: np.asarray(w[k]) for n, w in layer.items()} for layer in nets]
            x, labels = (data[0][: cells[k][1]], data[1]), noisy[k]
            labels = labels[0][: cells[k][1]], labels[1]
            found["records"][name] = _record(
                own, x, labels, float(losses[k]), cells[k][3]
            )
        print(names[0], found["records"][names[0]], flush=True)
        _write(path, found, seeds, steps)
    _write(path, found, seeds, steps)
    for name, row in found["summary"].items():
        print(name, row)


def _write(path: Path, found: dict[str, Any], seeds: int, steps: int) -> None:
    found |= {
        "command": "python -m experiments.prunability.study",
        "settings": {"seeds": seeds, "steps": steps, "family": dict(FAMILY)},
        "machine": machine(),
        "summary": summary(found["records"]),
    }
    write_compact(path, found)


def _noisy(train: Any, test: Any, share: float, seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)

    def turned(labels: np.ndarray) -> np.ndarray:
        other = rng.integers(0, 10, len(labels), dtype=labels.dtype)
        return np.where(rng.random(len(labels)) < share, other, labels)

    return turned(train), turned(test)


def predict(net: Sequence[Mapping[str, Any]], x: Any) -> Any:
    """A perceptron with ReLU."""
    for layer in net[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    return x @ net[-1]["w"] + net[-1]["b"][None]


def _start(key: jax.Array, sizes: Sequence[int]) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]


def _trained(
    width: int, depth: int, cells: Sequence[Any], steps: int, x: Any, noisy: Any
) -> tuple[Any, Any]:
    """The nets of these cells side by side, and the sums of their training losses."""
    sizes = (x.shape[1], *[width] * depth, 10)
    most = max(FAMILY["examples"])
    images = jnp.asarray(x[:most])
    labels = jnp.stack([jnp.asarray(each[0][:most]) for each in noisy])
    orders = []
    for _, examples, _, seed in cells:
        rng = np.random.default_rng(seed)
        epochs = -(-steps * BATCH // examples)
        order = np.concatenate([rng.permutation(examples) for _ in range(epochs)])
        orders.append(order[: steps * BATCH].reshape(steps, BATCH))

    @jax.jit
    @jax.vmap
    def train(key: jax.Array, rate: Any, order: Any, labels: Any) -> Any:
        tx = optax.sgd(lambda _: rate, momentum=0.9)

        def step(state: Any, index: jax.Array) -> Any:
            net, opt_state = state
            loss = lambda net: cross_entropy(predict(net, images[index]), labels[index])  # noqa: E731
            value, grads = jax.value_and_grad(loss)(net)
            updates, opt_state = tx.update(grads, opt_state, net)
            return (optax.apply_updates(net, updates), opt_state), value

        net = _start(key, sizes)
        (net, _), losses = jax.lax.scan(step, (net, tx.init(net)), order)
        return net, losses.sum()

    keys = jnp.stack([jax.random.key(seed) for *_, seed in cells])
    rates = jnp.array([rate for rate, *_ in cells])
    return jax.device_get(train(keys, rates, jnp.asarray(np.stack(orders)), labels))


@jax.jit
def _loss(net: Any, x: Any, y: Any) -> jax.Array:
    return cross_entropy(predict(net, x), y)


@jax.jit
def _shaken(net: Any, x: Any, y: Any, sigma: Any, key: jax.Array) -> jax.Array:
    """The mean loss under noise on every weight, as a share of it."""

    def one(key: jax.Array) -> jax.Array:
        leaves, tree = jax.tree.flatten(net)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            w * (1 + sigma * jax.random.normal(k, w.shape))
            for k, w in zip(keys, leaves, strict=True)
        ]
        return cross_entropy(predict(tree.unflatten(drawn), x), y)

    return jax.lax.map(one, jax.random.split(key, NOISES)).mean()


def _record(net: Any, x: Any, y: Any, losses: float, seed: int) -> dict[str, float]:
    """The gap, and all measures, of one net."""
    logits = [np.asarray(predict(net, each)) for each in x]
    right = [float((z.argmax(1) == t).mean()) for z, t in zip(logits, y, strict=True)]
    loss = functools.partial(_loss, x=x[0], y=y[0])
    own = logits[0][np.arange(len(y[0])), y[0]]
    rest = np.where(np.arange(10) == y[0][:, None], -np.inf, logits[0]).max(1)
    norms = np.prod([np.linalg.norm(layer["w"], 2) for layer in net])
    low, high, whole = 0.0, 4.0, float(loss(net))
    for _ in range(12):
        middle = (low + high) / 2
        shaken = _shaken(net, x[0], y[0], middle, jax.random.key(seed))
        low, high = (middle, high) if float(shaken) <= whole + 0.1 else (low, middle)
    slack = recipes.prunability(loss, net, slack=0.02)
    return {
        "gap": right[0] - right[1],
        "train": right[0],
        "test": right[1],
        "loss": whole,
        "prunability": recipes.prunability(loss, net),
        "prunability, slack": slack,
        "margin": -float(np.quantile(own - rest, 0.1) / norms),
        "flatness": 1 / max(low, 1e-3) ** 2,
        "sum of losses": losses,
    }


def summary(records: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Kendall's tau of every measure with the gap: over all, by seed, and within."""
    cells = {tuple(key.split("/")): record for key, record in records.items()}
    seeds = sorted({cell[-1] for cell in cells})
    found = {}
    for measure in MEASURES:
        by_seed = [
            _tau(measure, [r for cell, r in cells.items() if cell[-1] == seed])
            for seed in seeds
        ]
        signs = [
            np.sign(a[measure] - b[measure]) * np.sign(a["gap"] - b["gap"])
            for (c, a), (d, b) in itertools.combinations(cells.items(), 2)
            if sum(x != y for x, y in zip(c, d, strict=True)) == 1 and c[-1] == d[-1]
        ]
        found[measure] = {
            "all": round(_tau(measure, list(cells.values())), 3),
            "seeds": [round(t, 3) for t in by_seed],
            "within": round(float(np.mean(signs)), 3) if signs else None,
        }
    return found


def _tau(measure: str, records: Sequence[Mapping[str, float]]) -> float:
    pairs = [[r[k] for r in records] for k in (measure, "gap")]
    return float(scipy.stats.kendalltau(*pairs).statistic)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    short = (1, 60, options.out or Path("runs", "prunability-quick.json"))
    whole = (SEEDS, STEPS, options.out or RESULT)
    main(*(short if options.quick else whole))
