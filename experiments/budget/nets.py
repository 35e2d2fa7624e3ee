"""Five small nets, trained for a minute each without strong decay: no unit is dead.

Nets that decay has emptied, as those of ``jaxprune run batch_bridgeout``, cannot tell
one criterion from another: every one sees the dead units.
"""

import gzip
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.data import load, normalize
from jaxprune.models import VGG, LeNet300, ViT, cifar_resnet

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
BATCH, PEAK, DECAY = 32, 2e-3, 5e-4

Split = tuple[np.ndarray, np.ndarray]


def digits() -> tuple[Split, Split]:
    """Scikit-learn's digits, normalised: 1437 images to train on, 360 to test on."""
    train, test = (load("digits", split) for split in ("train", "test"))
    return tuple(  # pyright: ignore[reportReturnType]  # two of them
        (np.asarray(normalize(jnp.asarray(d.images), d.spec)), d.labels)
        for d in (train, test)
    )


def fashion() -> tuple[Split, Split]:
    """Fashion-MNIST at half its resolution: the first 8000 and 2000 images."""

    def read(name: str, start: int) -> np.ndarray:
        packed = (FASHION / f"{name}-ubyte.gz").read_bytes()
        return np.frombuffer(gzip.decompress(packed)[start:], np.uint8)

    def split(name: str, count: int) -> Split:
        images = read(f"{name}-images-idx3", 16).reshape(-1, 14, 2, 14, 2)[:count]
        pixels = (images.mean((2, 4))[..., None] / 255.0 - 0.286) / 0.353
        labels = read(f"{name}-labels-idx1", 8)[:count]
        return pixels.astype(np.float32), labels.astype(np.int32)

    return split("train", 8000), split("t10k", 2000)


class Net(NamedTuple):
    """An architecture, its data and how many passes over them it is trained for."""

    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Split, Split]]
    epochs: int


def _vit() -> nn.Module:
    sizes: dict[str, Any] = {"width": 32, "depth": 2, "num_heads": 4, "head_dim": 8}
    return ViT(num_classes=10, patch_size=2, mlp_width=64, pool="mean", **sizes)


NETS = {
    "lenet300": Net(LeNet300, digits, 20),
    "vgg_digits": Net(
        lambda: VGG(num_classes=10, widths=(16, 16, "M", 32, 32, "M", 64, 64)),
        digits,
        10,
    ),
    "resnet8": Net(
        lambda: cifar_resnet(8, num_classes=10, shortcut="projection"), digits, 10
    ),
    "vit": Net(_vit, digits, 40),
    "lenet_fashion": Net(LeNet300, fashion, 5),
}


def trained(name: str, seed: int, folder: Path, nets: Mapping[str, Net] = NETS) -> Any:
    """The variables of a net after training, kept in a folder."""
    path = folder / f"{name}-{seed}.pkl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(jax.device_get(_train(nets[name], seed))))
    return pickle.loads(path.read_bytes())


def _train(how: Net, seed: int) -> Any:
    net, (images, labels) = how.make(), how.data()[0]
    variables = net.init(jax.random.key(seed), images[:1])
    stats = {k: v for k, v in variables.items() if k != "params"}
    steps = len(images) // BATCH
    rate = optax.cosine_decay_schedule(PEAK, steps * how.epochs)
    tx = optax.adamw(rate, weight_decay=DECAY)
    x, y = jnp.asarray(images), jnp.asarray(labels)

    def step(state: Any, index: jax.Array) -> tuple[Any, None]:
        params, stats, opt_state = state

        def loss(params: Any) -> tuple[jax.Array, Any]:
            held = {"params": params, **stats}
            logits, new = net.apply(held, x[index], train=True, mutable=["batch_stats"])
            return cross_entropy(logits, y[index]), new

        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, {**stats, **new}, opt_state), None

    epoch = jax.jit(lambda state, order: jax.lax.scan(step, state, order)[0])
    state: Any = (variables["params"], stats, tx.init(variables["params"]))
    rng = np.random.default_rng(seed)
    for _ in range(how.epochs):
        order = rng.permutation(len(images))[: steps * BATCH].reshape(steps, BATCH)
        state = epoch(state, order)
    return {"params": state[0], **state[1]}


def cross_entropy(logits: Any, labels: Any) -> jax.Array:
    """The mean loss."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return loss.mean()
