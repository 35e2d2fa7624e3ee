"""Data sets by name, in memory: loading, augmentation, batches.

`digits` and `shapes32` need no network; the others are downloaded on first use.
Reading needs ``pip install 'jaxprune[experiments]'``, and never TensorFlow.
"""

from jaxprune.data._loading import load
from jaxprune.data._pipeline import augment, batches, eval_batches, normalize
from jaxprune.data._specs import DATASETS, Augmentation, Dataset, Spec

__all__ = [
    "DATASETS",
    "Augmentation",
    "Dataset",
    "Spec",
    "augment",
    "batches",
    "eval_batches",
    "load",
    "normalize",
]
