"""Data sets by name, in memory: loading, augmentation, batches.

`digits`, `shapes32` and `scenes` need no network; the others are downloaded on first
use. In `scenes` every pixel has a label.
Reading needs ``pip install 'jaxprune[experiments]'``, and never TensorFlow.
"""

from jaxprune.data._loading import load
from jaxprune.data._pipeline import augment, batches, eval_batches, normalize
from jaxprune.data._specs import CLASSIFICATION, DATASETS, Augmentation, Dataset, Spec

__all__ = [
    "CLASSIFICATION",
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
