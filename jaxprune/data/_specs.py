"""What a data set is: its facts, its images in memory, and the list of names."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What `augment` draws anew for every image.

    Attributes:
        pad: zeros added on each side before a random crop back to the size.
        flip: mirror left and right with probability one half.
    """

    pad: int = 0
    flip: bool = False


@dataclasses.dataclass(frozen=True)
class Spec:
    """The facts of one data set; hashable, so a static argument under ``jax.jit``.

    Attributes:
        name: the TFDS name, also its folder in the data directory.
        num_classes: labels are ``0 .. num_classes - 1``.
        image_shape: ``(height, width, channels)``.
        label_shape: of the labels of an image: ``()``, or ``(height, width)`` where
            every pixel has one.
        mean: per channel, of training images divided by 255.
        std: per channel, of training images divided by 255.
        augmentation: what training draws for every image.
        builder: ``"module:Class"`` of the TFDS builder, imported when needed.
        sources: archives that the builder downloads; empty if it needs none.
        package: Debian package that holds these archives, "" if there is none.
        package_folder: where that package puts them.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    builder: str
    sources: tuple[str, ...] = ()
    package: str = ""
    package_folder: str = ""
    label_shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split, in memory.

    Attributes:
        spec: the facts of the data set it comes from.
        images: uint8 ``[N, H, W, C]``, read-only.
        labels: int32 ``[N, *label_shape]``, read-only.
    """

    spec: Spec
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.labels)


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

_SPECS = (
    Spec(
        name="digits",
        num_classes=10,
        image_shape=(8, 8, 1),
        mean=(0.3054,),
        std=(0.3760,),
        augmentation=Augmentation(pad=1),
        builder="jaxprune.data._digits:Digits",
    ),
    Spec(
        name="shapes32",
        num_classes=16,
        image_shape=(32, 32, 3),
        mean=(0.5001, 0.4992, 0.4995),
        std=(0.2277, 0.2269, 0.2272),
        augmentation=Augmentation(pad=4, flip=True),
        builder="jaxprune.data._synthetic:Shapes32",
    ),
    Spec(
        name="scenes",
        num_classes=5,
        image_shape=(32, 32, 3),
        mean=(0.4974, 0.5006, 0.4976),
        std=(0.2240, 0.2262, 0.2243),
        augmentation=Augmentation(),
        builder="jaxprune.data._scenes:Scenes",
        label_shape=(32, 32),
    ),
    Spec(
        name="mnist",
        num_classes=10,
        image_shape=(28, 28, 1),
        mean=(0.1307,),
        std=(0.3081,),
        augmentation=Augmentation(pad=2),
        builder="jaxprune.data._archives:Mnist",
        sources=(
            _MNIST + "train-images-idx3-ubyte.gz",
            _MNIST + "train-labels-idx1-ubyte.gz",
            _MNIST + "t10k-images-idx3-ubyte.gz",
            _MNIST + "t10k-labels-idx1-ubyte.gz",
        ),
    ),
    Spec(
        name="fashion_mnist",
        num_classes=10,
        image_shape=(28, 28, 1),
        mean=(0.2860,),
        std=(0.3530,),
        augmentation=Augmentation(pad=2, flip=True),
        builder="jaxprune.data._archives:FashionMnist",
        sources=(
            _FASHION + "train-images-idx3-ubyte.gz",
            _FASHION + "train-labels-idx1-ubyte.gz",
            _FASHION + "t10k-images-idx3-ubyte.gz",
            _FASHION + "t10k-labels-idx1-ubyte.gz",
        ),
        package="dataset-fashion-mnist",
        package_folder="/usr/share/datasets/fashion-mnist",
    ),
    # The deviations that the CIFAR-10 literature divides by are the mean of the
    # per-image deviations; over all pixels they are .247 .243 .262. Kept as they
    # are so that published settings mean the same here.
    Spec(
        name="cifar10",
        num_classes=10,
        image_shape=(32, 32, 3),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        augmentation=Augmentation(pad=4, flip=True),
        builder="jaxprune.data._archives:Cifar10",
        sources=(_CIFAR + "cifar-10-binary.tar.gz",),
    ),
    Spec(
        name="cifar100",
        num_classes=100,
        image_shape=(32, 32, 3),
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        augmentation=Augmentation(pad=4, flip=True),
        builder="jaxprune.data._archives:Cifar100",
        sources=(_CIFAR + "cifar-100-binary.tar.gz",),
    ),
)

DATASETS: Mapping[str, Spec] = MappingProxyType({spec.name: spec for spec in _SPECS})
"""Every data set that `load` knows, by name."""

CLASSIFICATION: Mapping[str, Spec] = MappingProxyType(
    {name: spec for name, spec in DATASETS.items() if not spec.label_shape}
)
"""Those with one label an image."""
