"""Nets of the studies in this folder: the small ones, and larger ones."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from experiments.budget.nets import NETS as SMALL
from experiments.budget.nets import Net, Split, fashion
from jaxprune.data import load, normalize
from jaxprune.models import MODELS, VGG


def whole(dataset: str) -> tuple[Split, Split]:
    """All of a data set, normalised, in memory."""
    splits = []
    for split in ("train", "test"):
        found = load(dataset, split)
        parts = [
            np.asarray(normalize(jnp.asarray(found.images[k : k + 1000]), found.spec))
            for k in range(0, len(found), 1000)
        ]
        splits.append((np.concatenate(parts), found.labels))
    return splits[0], splits[1]


NETS: Mapping[str, Net] = {
    **SMALL,
    "vgg_fashion": Net(
        lambda: VGG(num_classes=10, widths=(8, 8, "M", 16, 16, "M", 32, 32)),
        fashion,
        4,
    ),
    # Of the papers: PFP trains VGG-16 for 300 passes, residual nets for 182.
    "vgg16_cifar10": Net(
        lambda: MODELS["vgg16_bn"](num_classes=10), lambda: whole("cifar10"), 300
    ),
    "resnet56_cifar10": Net(
        lambda: MODELS["resnet56"](num_classes=10), lambda: whole("cifar10"), 182
    ),
}
