"""Slimmable Pruned Networks: are widths that pruning finds better than equal shares?

Question   One set of weights at three widths. At equal FLOPs and equal epochs in all,
           is SP-Net (counts found by pruning several trained bases, joint fine-tuning)
           better than S-Net (the same share of every layer)? Than S-Net with the same
           teacher? Does it matter that there are several bases? What does sharing the
           weights cost against networks trained one by one?
Refuted    if the gain of SP-Net over S-Net with the same teacher is not above 0 by its
           95 % interval over paired seeds, at the narrower widths
Command    python -m experiments.slimmable.study [--nets vgg resnet mobilenet]
           [--seeds 5] [--epochs 8]    (--quick: a tiny run that is not recorded)
Expected   paper: SP-Net above S-Net by 1.2 to 1.5 points (ResNet-50), 0.9 to 4.4 (VGG),
           1.4 to 3.1 (MobileNetV2), ImageNet, at equal FLOPs
Leaves     experiments/slimmable/study.json, after every arm; what is recorded is not
           done again
Papers     Kuratsu and Nakamura, Slimmable Pruned Neural Networks, 2022,
           https://arxiv.org/abs/2212.03415; Yu et al., Slimmable Neural Networks, 2018,
           https://arxiv.org/abs/1812.08928

Fashion-MNIST at half its resolution, the first 8000 images to train on, the first 2000
test images to judge by; nothing is tuned. Every arm trains `epochs` in all. SP-Net has
half of them for the bases and half for joint fine-tuning, which starts from the widest
base; the other arms train jointly, or each width alone, all the time. Bases train with
the L1 penalty of scales. A width of SP-Net has at most the multiply-adds of that of
S-Net: the keep ratio of its base is found by bisection.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from experiments.budget.nets import fashion
from experiments.harness.pages import gain, percent, write_compact
from jaxprune import search
from jaxprune.display._report import machine
from jaxprune.models import VGG, MobileNetV2, cifar_resnet
from jaxprune.training import bridge_penalty

RESULT = Path(__file__).with_suffix(".json")
SHARES = (1.0, 0.75, 0.5)  # of S-Net
BASES = (1.0, 0.75)  # of SP-Net: width 1 comes from the first, width 2 from the second
BATCH, RATE, DECAY, PENALTY = 64, 0.05, 1e-4, 1e-4
STATS, NORMS = "batch_stats/*", "params/*bn*"
ALPHA = 0.9
ARMS = ("alone", "s_net", "s_net_taught", "one_base", "sp_net")

NETS: Mapping[str, Callable[[], nn.Module]] = {
    "vgg": lambda: VGG(widths=(16, 16, "M", 32, 32, "M", 64, 64), use_bias=False),
    "resnet": lambda: cifar_resnet(8, num_classes=10, shortcut="projection"),
    "mobilenet": lambda: MobileNetV2(
        num_classes=10,
        stage_sizes=(1, 2, 2),
        widths=(8, 12, 24),
        strides=(1, 2, 2),
        expansions=(1, 4, 4),
        stem_width=8,
        stem_stride=1,
        head_width=64,
    ),
}

Counts = Sequence[Mapping[str, int]]


class Bench:
    """A net, its data and its groups.

    Attributes:
        net: the module.
        groups: its units.
        cost: its multiply-adds.
    """

    def __init__(self, name: str, images: int | None = None) -> None:
        self.net = NETS[name]()
        (x, y), (x_test, y_test) = fashion()
        self.train_set = jnp.asarray(x[:images]), jnp.asarray(y[:images])
        self.test_set = jnp.asarray(x_test[:images]), y_test[:images]
        one = self.train_set[0][:1]
        shapes = jax.eval_shape(self.net.init, jax.random.key(0), one)
        self.groups = jaxprune.trace(self.net.apply, shapes, one)
        self.cost = jaxprune.cost_model(
            self.net.apply, shapes, one, groups=self.groups
        ).multiply_adds

    def init(self, seed: int) -> Any:
        """Variables before training."""
        return self.net.init(jax.random.key(seed), self.train_set[0][:1])

    def slim(self, variables: Any, keeps: Counts, private: Any = STATS) -> Any:
        """The net at these widths."""
        return jaxprune.slimmable(
            self.net.apply, variables, keeps, groups=self.groups, private=private
        )

    def train(
        self, slim: Any, epochs: int, seed: int, alpha: float = 0.0, l1: float = 0.0
    ) -> Any:
        """The variables of all widths after joint training."""
        images, labels = self.train_set
        steps = len(images) // BATCH
        scales = jax.tree.map_with_path(
            lambda path, _: "scale" in jax.tree_util.keystr(path),
            slim.variables["params"],
        )
        kernels = jax.tree.map(lambda leaf: leaf.ndim > 1, slim.variables["params"])
        tx = optax.chain(
            optax.add_decayed_weights(DECAY, kernels),
            bridge_penalty(l1, mask=scales) if l1 else optax.identity(),
            optax.sgd(
                optax.cosine_decay_schedule(RATE, steps * epochs), 0.9, nesterov=True
            ),
        )
        step = search.joint_step(slim, tx, _forward, alpha=alpha)

        def epoch(state: Any, order: jax.Array) -> Any:
            def one(state: Any, rows: jax.Array) -> Any:
                return step(state, (images[rows], labels[rows]))

            return jax.lax.scan(one, state, order)[0]

        run = jax.jit(epoch, donate_argnums=0)
        state = search.joint_state(slim, tx, jax.random.key(seed))
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            order = rng.permutation(len(images))[: steps * BATCH]
            state = run(state, order.reshape(steps, BATCH))
        return state.variables

    def accuracies(self, slim: Any, variables: Any) -> list[float]:
        """Of every width, on the test images."""
        images, labels = self.test_set
        every = [jax.jit(run)(variables, images).argmax(-1) for run in slim]
        return [round(float((np.asarray(own) == labels).mean()), 4) for own in every]


def _forward(apply_fn: Any, variables: Any, batch: Any) -> Any:
    return apply_fn(variables, batch[0], train=True, mutable=["batch_stats"])


def bases(bench: Bench, epochs: int, seed: int) -> list[Any]:
    """Trained networks of several widths, and the scales of their BatchNorm."""
    found = []
    for share in BASES:
        keeps = search.uniform(bench.groups, (share,))
        slim = bench.slim(bench.init(seed), keeps)
        alone = slim.at(0, bench.train(slim, epochs, seed, l1=PENALTY))
        one = bench.train_set[0][:1]
        groups = jaxprune.trace(alone.apply_fn, alone.variables, one)
        scores = search.importance(groups, alone.variables)
        found.append((groups, scores, alone.variables))
    return found


def pruned_counts(bench: Bench, made: Sequence[Any], like: Counts) -> Counts:
    """Counts of every width, each from its base, within the cost of these widths."""
    found: list[Mapping[str, int]] = []
    for (groups, scores, _), width in zip(made, like[1:], strict=True):
        budget = bench.cost.value(width)

        def widths(ratio: float, own: Any = (groups, scores)) -> Any:
            counts = search.threshold_counts(own[0], own[1], keep_ratio=ratio)
            return search.multi_base(bench.groups, [*found, counts])[-1]

        low, high = 0.01, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            fits = bench.cost.value(widths(middle)) <= budget
            low, high = (middle, high) if fits else (low, middle)
        found.append(widths(low))
    return search.multi_base(bench.groups, found)


def arm(bench: Bench, name: str, epochs: int, seed: int, made: Any) -> dict[str, Any]:
    """One arm: accuracies and costs of its widths, the widest first."""
    keeps: Counts = search.uniform(bench.groups, SHARES)
    start = bench.init(seed)
    if name == "alone":
        accuracies = []
        for each in keeps:
            slim = bench.slim(start, [each])
            accuracies += bench.accuracies(slim, bench.train(slim, epochs, seed))
    elif name.startswith("s_net"):
        slim = bench.slim(start, keeps, (STATS, NORMS))
        alpha = ALPHA if name == "s_net_taught" else 0.0
        accuracies = bench.accuracies(slim, bench.train(slim, epochs, seed, alpha))
    else:
        own = made if name == "sp_net" else [made[0], made[0]]
        keeps = pruned_counts(bench, own, keeps)
        slim = bench.slim(made[0][2], keeps)
        trained = bench.train(slim, epochs - epochs // 2, seed, ALPHA, PENALTY)
        accuracies = bench.accuracies(slim, trained)
    costs = [int(bench.cost.value(each)) for each in keeps]
    return {"accuracy": accuracies, "multiply_adds": costs}


def one_seed(
    bench: Bench, epochs: int, seed: int, record: dict[str, Any], save: Any
) -> None:
    """All arms of a seed that are not recorded yet."""
    made = None
    for name in ARMS:
        if name in record:
            continue
        if made is None and name in ("one_base", "sp_net"):
            made = bases(bench, epochs // 2, seed)
        record[name] = arm(bench, name, epochs, seed, made)
        save()


def summary(records: Mapping[str, Any]) -> dict[str, Any]:
    """Net -> arm -> accuracy by width, and the gains of SP-Net, paired by seed."""
    found: dict[str, Any] = {}
    for net in NETS:
        seeds = [r for key, r in records.items() if key.startswith(f"{net}/")]
        seeds = [r for r in seeds if set(ARMS) <= set(r)]
        if len(seeds) < 2:
            continue
        by_arm = {
            name: [[r[name]["accuracy"][i] for r in seeds] for i in range(len(SHARES))]
            for name in ARMS
        }
        found[net] = {
            "seeds": len(seeds),
            **{name: [percent(w) for w in widths] for name, widths in by_arm.items()},
            "sp_net against": {
                name: [
                    gain(a, b)
                    for a, b in zip(by_arm["sp_net"], by_arm[name], strict=True)
                ]
                for name in ARMS[:-1]
            },
        }
    return found


def main() -> None:
    """Makes what is missing of the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="tiny, not recorded")
    options = parser.parse_args()
    found: dict[str, Any] = {"records": {}}
    if RESULT.exists() and not options.quick:
        found = json.loads(RESULT.read_text())
        if found["settings"]["epochs"] != options.epochs:
            raise SystemExit(f"{RESULT} was made with other epochs; move it away")

    def save() -> None:
        found["command"] = "python -m experiments.slimmable.study"
        found["settings"] = {
            "epochs": options.epochs,
            "shares": SHARES,
            "bases": BASES,
            "images": 256 if options.quick else 8000,
        }
        found["machine"] = machine()
        found["summary"] = summary(found["records"])
        if not options.quick:
            write_compact(RESULT, found)

    for net in options.nets:
        bench = Bench(net, 256 if options.quick else None)
        for seed in range(1 if options.quick else options.seeds):
            record = found["records"].setdefault(f"{net}/seed{seed}", {})
            one_seed(bench, 2 if options.quick else options.epochs, seed, record, save)
            told = {name: own["accuracy"] for name, own in record.items()}
            print(net, seed, told, flush=True)
    save()
    print(json.dumps(found["summary"], indent=1))


if __name__ == "__main__":
    main()
