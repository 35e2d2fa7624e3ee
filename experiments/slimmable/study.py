"""Slimmable Pruned Networks: are widths that pruning finds better than equal shares?

Question   One set of weights at three widths. Every arm spends the same multiply-adds
           on training, those that find its widths included, and every width costs no
           more than the same share of every layer. Is SP-Net (counts found by pruning
           several trained bases, joint fine-tuning) better than S-Net? Than its own
           pipeline with equal shares? Are several bases better than one, and than
           pruning and tuning by turns? Zero padding match than shared masks? Widths of
           AutoSlim and BCNet than equal shares? What does sharing the weights cost?
Refuted    SP-Net's claim, if its gain over S-Net is not above 0 by the 95 % interval
           over paired seeds, at both narrower widths. Likewise each claim above, with
           the pairs of arms in PAIRS, which differ in one thing but the first
Command    python -m experiments.slimmable.study [--nets vgg resnet mobilenet]
           [--seeds 5] [--epochs 4]    (--quick: a tiny run that is not recorded)
Expected   paper: SP-Net above S-Net by 1.2 to 1.5 points (ResNet-50), 0.9 to 4.4 (VGG),
           1.4 to 3.1 (MobileNetV2), ImageNet, at equal FLOPs; multi-base above one-shot
           and iterative pruning; zero padding match above shared masks
Leaves     experiments/slimmable/study.json, after every arm; what is recorded is not
           done again
Papers     Kuratsu and Nakamura, Slimmable Pruned Neural Networks, 2022,
           https://arxiv.org/abs/2212.03415; Yu et al., Slimmable Neural Networks, 2018,
           https://arxiv.org/abs/1812.08928; Yu and Huang, AutoSlim, 2019,
           https://arxiv.org/abs/1903.11728; Su et al., BCNet, 2021,
           https://arxiv.org/abs/2105.10533

Fashion-MNIST at half its resolution, the first 8000 images to train on, the first 2000
test images to judge by; nothing is tuned. The budget is that of `epochs` of joint
training at the widths of S-Net. `alone`, `s_net` and `s_net_taught` spend it on the
weights. `equal_shares`, `one_base`, `iterative`, `sp_net` and `zero_padded` first train
a base for half of the epochs, with the L1 penalty of scales; a second base, or the
pruned first one, costs as many epochs again. `auto_slim` and `bcnet` spend half of the
budget on a network that is trained at many widths. What is left trains all widths
jointly, from the weights of the widest network so far. Where widths come from pruning,
the keep ratio of a base is found by bisection. AutoSlim and BCNet judge widths by the
loss on 256 images of the training set, in training mode.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.harness.pages import gain, percent, write_compact
from experiments.slimmable import widths
from experiments.slimmable.bench import (
    BATCH,
    NETS,
    NORMS,
    STATS,
    Bench,
    Widths,
    bench,
)
from experiments.slimmable.widths import BASES, PENALTY, SHARES, Found
from jaxprune.display._report import machine

RESULT = Path(__file__).with_suffix(".json")
ALPHA = 0.9
# The next ones are made once these are there for every net and seed.
PASSES = (
    ("s_net", "sp_net", "s_net_taught", "equal_shares"),
    ("alone", "one_base"),
    ("zero_padded", "iterative"),
    ("auto_slim", "bcnet"),
)
ARMS = tuple(arm for arms in PASSES for arm in arms)
PAIRS = (
    ("sp_net", "s_net"),
    ("sp_net", "s_net_taught"),
    ("s_net_taught", "s_net"),
    ("s_net_taught", "alone"),
    ("sp_net", "alone"),
    ("sp_net", "equal_shares"),
    ("one_base", "equal_shares"),
    ("sp_net", "one_base"),
    ("sp_net", "iterative"),
    ("zero_padded", "sp_net"),
    ("auto_slim", "s_net_taught"),
    ("bcnet", "s_net_taught"),
    ("sp_net", "auto_slim"),
    ("sp_net", "bcnet"),
)


class Run:
    """One net and seed: the budget, and the bases that its arms share."""

    def __init__(self, bench: Bench, epochs: int, seed: int) -> None:
        self.bench, self.epochs, self.seed = bench, epochs, seed
        self.like = widths.uniform(bench)
        images = epochs * len(bench.train_set[0])
        self.budget = images * widths.total_cost(bench, self.like)
        self._bases: dict[float, widths.Base] = {}

    def base(self, share: float) -> widths.Base:
        """Trained once for all arms; every arm pays for it."""
        if share not in self._bases:
            self._bases[share] = widths.base(
                self.bench, share, self.epochs / 2, self.seed
            )
        return self._bases[share]


def find(run: Run, arm: str) -> Found:
    """The widths of an arm and the weights that joint training starts from."""
    if arm == "auto_slim":
        return widths.greedy(run.bench, run.budget / 2, run.seed)
    if arm == "bcnet":
        return widths.evolved(run.bench, run.budget / 2, run.seed)
    first = run.base(BASES[0])
    if arm == "equal_shares":
        return Found(run.like, first.variables, first.spent)
    own, spent = [first, first], first.spent
    if arm == "iterative":
        scored = [widths.scores_of(run.bench, first)]
        found = widths.pruned(run.bench, scored, run.like[:2])
        turn = widths.fine_tuned(run.bench, first, found[1], run.epochs / 2, run.seed)
        own, spent = [first, turn], spent + turn.spent
    elif arm != "one_base":
        second = run.base(BASES[1])
        own, spent = [first, second], spent + second.spent
    padded = arm == "zero_padded"
    scored = [widths.scores_of(run.bench, each, zero_padded=padded) for each in own]
    count = widths.zero_padded if padded else widths.pruned
    keeps = count(run.bench, scored, run.like)
    return Found(keeps, first.variables, spent, zero_padded=padded)


def one_arm(run: Run, arm: str) -> dict[str, Any]:
    """Accuracies and costs of the widths of an arm, the widest first."""
    if arm == "alone":
        return alone(run)
    if arm.startswith("s_net"):
        found, private = Found(run.like, run.bench.init(run.seed), 0.0), (STATS, NORMS)
    else:
        found, private = find(run, arm), STATS
    slim = run.bench.slim(
        found.start,
        found.keeps,
        private,
        zero_padded=found.zero_padded,
        order=found.order,
    )
    costs = multiply_adds(run.bench, found.keeps, zero_padded=found.zero_padded)
    steps = int((run.budget - found.spent) / sum(costs)) // BATCH
    trained = run.bench.train(
        slim,
        steps,
        run.seed,
        alpha=0.0 if arm == "s_net" else ALPHA,
        l1=0.0 if arm.startswith("s_net") else PENALTY,
    )
    return {
        "accuracy": run.bench.accuracies(slim, trained),
        "multiply_adds": costs,
        "joint_steps": steps,
        "found_for": round(found.spent / run.budget, 3),
    }


def alone(run: Run) -> dict[str, Any]:
    """Every width of S-Net trained by itself."""
    accuracies: list[float] = []
    steps = run.epochs * len(run.bench.train_set[0]) // BATCH
    for each in run.like:
        slim = run.bench.slim(run.bench.init(run.seed), [each])
        trained = run.bench.train(slim, steps, run.seed)
        accuracies += run.bench.accuracies(slim, trained)
    costs = multiply_adds(run.bench, run.like)
    return {"accuracy": accuracies, "multiply_adds": costs, "steps": steps}


def multiply_adds(
    bench: Bench, keeps: Widths, *, zero_padded: bool = False
) -> list[int]:
    """Of an image at every width."""
    cost = bench.traced(zero_padded).cost
    return [
        int(
            cost.value(
                {name: int(sum(k) if zero_padded else k) for name, k in w.items()}
            )
        )
        for w in keeps
    ]


def applies(bench: Bench, arm: str) -> bool:
    """Is there anything to be pruned by itself?"""
    if arm != "zero_padded":
        return True
    return any(group.stream for group in bench.traced(True).groups.values())


def some_arms(
    run: Run, arms: tuple[str, ...], record: dict[str, Any], save: Callable[[], None]
) -> None:
    """These arms of a net and seed, where they are not recorded yet."""
    for arm in arms:
        if arm in record or not applies(run.bench, arm):
            continue
        start = time.process_time()
        record[arm] = one_arm(run, arm)
        record[arm]["cpu_seconds"] = round(time.process_time() - start, 1)
        save()


def summary(records: Mapping[str, Any]) -> dict[str, Any]:
    """Net -> arm -> accuracy by width, and gains paired by seed."""
    found: dict[str, Any] = {}
    for net in NETS:
        seeds = [r for key, r in records.items() if key.startswith(f"{net}/")]
        by_arm = {
            arm: [r[arm]["accuracy"] for r in seeds if arm in r]
            for arm in ARMS
            if sum(arm in r for r in seeds) > 1
        }
        gains = {}
        for ours, theirs in PAIRS:
            both = [r for r in seeds if ours in r and theirs in r]
            if len(both) > 1:
                accuracies = (
                    [r[arm]["accuracy"] for r in both] for arm in (ours, theirs)
                )
                pairs = zip(
                    *(zip(*own, strict=True) for own in accuracies), strict=True
                )
                gains[f"{ours} over {theirs}"] = [gain(a, b) for a, b in pairs]
        if by_arm:
            found[net] = {
                "seeds": {arm: len(own) for arm, own in by_arm.items()},
                "accuracy": {
                    arm: [percent(w) for w in zip(*own, strict=True)]
                    for arm, own in by_arm.items()
                },
                "gains": gains,
            }
    return found


def main() -> None:
    """Makes what is missing of the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="tiny, not recorded")
    options = parser.parse_args()
    images = 512 if options.quick else None
    found: dict[str, Any] = {"records": {}}
    if RESULT.exists() and not options.quick:
        found = json.loads(RESULT.read_text())
        if found["settings"]["epochs"] != options.epochs:
            raise SystemExit(f"{RESULT} was made with other epochs; move it away")

    def save() -> None:
        found["command"] = "python -m experiments.slimmable.study"
        found["settings"] = {
            "epochs": options.epochs,
            "seeds": options.seeds,
            "shares": SHARES,
            "bases": BASES,
            "images": images or 8000,
        }
        found["machine"] = machine()
        found["summary"] = summary(found["records"])
        if not options.quick:
            write_compact(RESULT, found)

    nets = {name: bench(name, images) for name in options.nets}
    runs: dict[str, Run] = {}
    for arms in PASSES:
        for seed in range(1 if options.quick else options.seeds):
            for name, own in nets.items():
                key = f"{name}/seed{seed}"
                run = runs.setdefault(key, Run(own, options.epochs, seed))
                record = found["records"].setdefault(key, {})
                some_arms(run, arms, record, save)
                print(
                    key, {arm: record[arm] for arm in arms if arm in record}, flush=True
                )
    save()
    print(json.dumps(found["summary"], indent=1))


if __name__ == "__main__":
    main()
