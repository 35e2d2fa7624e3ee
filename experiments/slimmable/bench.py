"""Nets, data and training of the study of slimmable networks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from experiments.budget.nets import fashion
from jaxprune import search
from jaxprune.models import VGG, MobileNetV2, cifar_resnet
from jaxprune.training import bridge_penalty

BATCH, RATE, DECAY = 64, 0.05, 1e-4
STATS, NORMS = "batch_stats/*", "params/*bn*"

NETS: Mapping[str, Callable[[], nn.Module]] = {
    "vgg": lambda: VGG(widths=(8, 8, "M", 16, 16, "M", 32, 32), use_bias=False),
    "resnet": lambda: cifar_resnet(
        8, num_classes=10, widths=(8, 16, 32), shortcut="projection"
    ),
    "mobilenet": lambda: MobileNetV2(
        num_classes=10,
        stage_sizes=(1, 2, 1),
        widths=(8, 12, 24),
        strides=(1, 2, 1),
        expansions=(1, 4, 4),
        stem_width=8,
        stem_stride=2,
        head_width=64,
    ),
}

Counts = Mapping[str, int]
Widths = Sequence[Mapping[str, Any]]


class Traced:
    """A function of some sizes: its units and its multiply-adds.

    Attributes:
        groups: its units; with `zero_padded`, writers of streams are groups too.
        cost: its multiply-adds, by counts of units.
    """

    def __init__(
        self, apply_fn: Any, variables: Any, x: Any, *, zero_padded: bool = False
    ) -> None:
        writers = "*" if zero_padded else ()
        self.groups = jaxprune.trace(apply_fn, variables, x, writers=writers)
        self._costed = apply_fn, variables, x

    @cached_property
    def cost(self) -> Any:
        found = jaxprune.cost_model(*self._costed, groups=self.groups)
        return found.multiply_adds


class Bench:
    """A net and its data.

    Attributes:
        net: the module.
        train_set: images and labels.
        test_set: images and labels.
    """

    def __init__(self, net: nn.Module, train_set: Any, test_set: Any) -> None:
        self.net, self.train_set, self.test_set = net, train_set, test_set
        self._traced: dict[bool, Traced] = {}

    def traced(self, zero_padded: bool = False) -> Traced:
        """The net's units and multiply-adds."""
        if zero_padded not in self._traced:
            one = self.train_set[0][:1]
            shapes = jax.eval_shape(self.net.init, jax.random.key(0), one)
            self._traced[zero_padded] = Traced(
                self.net.apply, shapes, one, zero_padded=zero_padded
            )
        return self._traced[zero_padded]

    @property
    def groups(self) -> Any:
        """The net's units."""
        return self.traced().groups

    @property
    def cost(self) -> Any:
        """The net's multiply-adds."""
        return self.traced().cost

    def init(self, seed: int) -> Any:
        """Variables before training."""
        return self.net.init(jax.random.key(seed), self.train_set[0][:1])

    def slim(
        self,
        variables: Any,
        keeps: Widths,
        private: Any = STATS,
        *,
        zero_padded: bool = False,
        order: Any = None,
    ) -> Any:
        """The net at these widths."""
        return jaxprune.slimmable(
            self.net.apply,
            variables,
            keeps,
            groups=self.traced(zero_padded).groups,
            private=private,
            order=order,
        )

    def batches(self, steps: int, seed: int) -> Iterator[Any]:
        """Shuffled batches, epoch after epoch."""
        images, labels = self.train_set
        rng, rows = np.random.default_rng(seed), np.zeros(0, int)
        for _ in range(steps):
            if len(rows) < BATCH:
                rows = rng.permutation(len(images))
            now, rows = rows[:BATCH], rows[BATCH:]
            yield images[now], labels[now]

    def run(self, step: Any, state: Any, steps: int, seed: int) -> Any:
        """The variables after these steps."""
        step = jax.jit(step, donate_argnums=0)
        for batch in self.batches(steps, seed):
            state, _ = step(state, batch)
        return jax.block_until_ready(state.variables)

    def train(
        self,
        slim: Any,
        steps: int,
        seed: int,
        *,
        alpha: float = 0.0,
        l1: float = 0.0,
        track: bool = True,
    ) -> Any:
        """The variables of all widths after joint training."""
        tx = optimiser(slim.variables["params"], steps, l1)
        step = search.joint_step(slim, tx, forward, alpha=alpha, track=track)
        state = search.joint_state(slim, tx, jax.random.key(seed))
        return self.run(step, state, steps, seed)

    def accuracies(self, slim: Any, variables: Any) -> list[float]:
        """Of every width, on the test images."""
        images, labels = self.test_set

        @jax.jit
        def right(variables: Any, images: Any, labels: Any) -> Any:
            every = [run(variables, images).argmax(-1) == labels for run in slim]
            return jnp.stack(every).mean(-1)

        found = right(variables, images, labels)
        return [round(float(each), 4) for each in found]


def bench(name: str, images: int | None = None) -> Bench:
    """One of the nets, on Fashion-MNIST (the first images of it)."""
    (x, y), (x_test, y_test) = fashion()
    train_set, test_set = (x[:images], y[:images]), (x_test[:images], y_test[:images])
    return Bench(NETS[name](), train_set, test_set)


def optimiser(params: Any, steps: int, l1: float = 0.0) -> Any:
    """SGD with momentum and a cosine schedule; decay of kernels, L1 of scales."""
    scales = jax.tree.map_with_path(
        lambda path, _: "scale" in jax.tree_util.keystr(path), params
    )
    kernels = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    return optax.chain(
        optax.add_decayed_weights(DECAY, kernels),
        bridge_penalty(l1, mask=scales) if l1 else optax.identity(),
        optax.sgd(optax.cosine_decay_schedule(RATE, steps), 0.9, nesterov=True),
    )


def forward(apply_fn: Any, variables: Any, batch: Any) -> Any:
    """Logits in training mode, and new running averages."""
    return apply_fn(variables, batch[0], train=True, mutable=["batch_stats"])
