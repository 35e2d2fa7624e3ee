"""The stock TFDS data sets MNIST, Fashion-MNIST and CIFAR, without TensorFlow.

Name, version, features and example keys are those of the stock builders, so the
files are interchangeable: what either prepares (as array_record), the other reads.
The stock builders open archives through ``tf.io.gfile`` and encode images through
``tf.image``; here the archive is read by the standard library and PIL encodes.
"""

import contextlib
import gzip
import hashlib
import math
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorflow_datasets.image_classification import cifar, mnist

from jaxprune.data._specs import DATASETS

# Ten times the largest of these data sets.
MOST_BYTES = 2 * 10**9

_DAMAGE = tarfile.TarError, zlib.error, EOFError, ValueError, gzip.BadGzipFile

_Examples = Iterator[tuple[int, dict[str, Any]]]


def read_tar(path: str | os.PathLike[str], most: int = MOST_BYTES) -> dict[str, bytes]:
    """Reads every file of an archive, by base name; writes nothing to disk.

    Args:
        path: the archive.
        most: how many bytes its files may have together.

    Returns:
        Base name -> content.

    Raises:
        ValueError: if it is damaged, holds more than `most` bytes, or two files of
            one base name.
    """
    files: dict[str, bytes] = {}
    total = 0
    with _naming(path), tarfile.open(path) as archive:
        for member in archive:
            total += member.size
            if total > most:
                raise ValueError(f"its files have more than {most} bytes")
            if not member.isreg():
                continue
            name = Path(member.name).name
            if name in files:
                raise ValueError(f"two of its files are named {name}")
            content = archive.extractfile(member)
            files[name] = content.read() if content else b""
    return files


def read_idx(path: str | os.PathLike[str], most: int = MOST_BYTES) -> np.ndarray:
    """Reads the gzipped IDX format of MNIST.

    Two zero bytes, a type code (8 = uint8), the rank, each dimension as a
    big-endian uint32, then the values in C order.

    Args:
        path: the gzipped file.
        most: how many bytes it may have unpacked.

    Returns:
        uint8 array of the shape that the header names.

    Raises:
        ValueError: if the file is not an IDX file of bytes, is damaged or too large.

    References:
        LeCun, Cortes and Burges, `The MNIST database of handwritten digits
        <https://yann.lecun.com/exdb/mnist>`_, 2010
    """
    with _naming(path), gzip.open(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most} bytes unpacked")
    if content[:3] != b"\0\0\x08":
        raise ValueError(
            f"{path} starts with {content[:3]!r}, an IDX file of bytes with "
            r"b'\x00\x00\x08'; is it another file?"
        )
    rank = content[3] if len(content) > 3 else 0
    start = 4 + 4 * rank
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
    if len(shape) != rank or len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} has {len(content) - start} bytes behind a header that says "
            f"{shape}; is it complete?"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Damage is told with the name of the file."""
    try:
        yield
    except (
        tarfile.TarError,
        zlib.error,
        EOFError,
        ValueError,
        gzip.BadGzipFile,
    ) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _mnist_examples(images: np.ndarray, labels: np.ndarray) -> _Examples:
    for key, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield key, {"image": Image.fromarray(image), "label": int(label)}


def _cifar_examples(
    prefix: str, contents: Sequence[bytes], label_keys: Sequence[str]
) -> _Examples:
    # A record is its labels, one byte each, then three planes of 32x32 bytes.
    records = np.frombuffer(b"".join(contents), np.uint8)
    records = records.reshape(-1, len(label_keys) + 3 * 32 * 32)
    labels, pixels = np.split(records, [len(label_keys)], axis=1)
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for key, (image, row) in enumerate(zip(images, labels, strict=True)):
        example: dict[str, Any] = dict(zip(label_keys, row.tolist(), strict=True))
        example["id"] = f"{prefix}{key:05d}"
        example["image"] = Image.fromarray(np.ascontiguousarray(image))
        yield key, example


class Mnist(mnist.MNIST, skip_registration=True):
    """MNIST, 60 000 + 10 000 grey images of 28x28 pixels."""

    SOURCES: tuple[str, ...] = DATASETS["mnist"].sources

    def _split_generators(self, dl_manager: Any) -> Any:  # the base says list
        train_images, train_labels, test_images, test_labels = (
            read_idx(path) for path in dl_manager.download(list(self.SOURCES))
        )
        return {
            "train": _mnist_examples(train_images, train_labels),
            "test": _mnist_examples(test_images, test_labels),
        }


class FashionMnist(mnist.FashionMNIST, skip_registration=True):
    """Fashion-MNIST, 60 000 + 10 000 grey images of 28x28 pixels, 10 classes.

    The archives have the names of MNIST's, and those of Debian's package differ from
    the published ones in their gzip headers: so a file that is already there is known
    by what it holds, and not by the checksum of the archive. One that holds something
    else is passed over.

    References:
        Xiao, Rasul and Vollgraf, `Fashion-MNIST: a Novel Image Dataset for
        Benchmarking Machine Learning Algorithms <https://arxiv.org/abs/1708.07747>`_,
        2017
    """

    SOURCES: tuple[str, ...] = DATASETS["fashion_mnist"].sources
    FOLDERS: tuple[str, ...] = (DATASETS["fashion_mnist"].package_folder,)
    # SHA-256 of the files inside the archives.
    CONTENTS: Mapping[str, str] = {
        "train-images-idx3-ubyte.gz": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte.gz": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    }

    def local_archives(self, downloads: Path) -> dict[str, Path]:
        """Returns where the archives are that need no download, by their address.

        Args:
            downloads: where TFDS downloads to; ``manual/fashion_mnist`` and ``manual``
                in it are searched, then the folder of Debian's package.
        """
        manual = downloads / "manual"
        folders = (manual / self.name, manual, *map(Path, self.FOLDERS))
        found = {}
        for source in self.SOURCES:
            name = Path(source).name
            candidates = (folder / name for folder in folders)
            right = (path for path in candidates if self._holds(path, name))
            if path := next(right, None):
                found[source] = path
        return found

    def _holds(self, path: Path, name: str) -> bool:
        if not path.is_file():
            return False
        try:
            with gzip.open(path) as file:
                content = file.read(MOST_BYTES)
        except (OSError, EOFError, zlib.error):  # a page saved under that name, a part
            return False
        return hashlib.sha256(content).hexdigest() == self.CONTENTS[name]

    def _split_generators(self, dl_manager: Any) -> Any:  # the base says list
        found = self.local_archives(Path(dl_manager.download_dir))
        missing = [source for source in self.SOURCES if source not in found]
        found |= zip(missing, dl_manager.download(missing), strict=True)
        train_images, train_labels, test_images, test_labels = (
            read_idx(found[source]) for source in self.SOURCES
        )
        return {
            "train": _mnist_examples(train_images, train_labels),
            "test": _mnist_examples(test_images, test_labels),
        }


class Cifar10(cifar.Cifar10, skip_registration=True):
    """CIFAR-10, 50 000 + 10 000 colour images of 32x32 pixels, 10 classes."""

    SOURCES: tuple[str, ...] = DATASETS["cifar10"].sources

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        (archive,) = dl_manager.download(list(self.SOURCES))
        files = read_tar(archive)
        layout = self._cifar_info
        features: Any = self.info.features
        for key, file in zip(layout.label_keys, layout.label_files, strict=True):
            features[key].names = files[file].decode().split()
        splits = ("train", layout.train_files), ("test", layout.test_files)
        return {
            split: _cifar_examples(
                f"{split}_", [files[name] for name in names], layout.label_keys
            )
            for split, names in splits
        }


class Cifar100(Cifar10, cifar.Cifar100, skip_registration=True):
    """CIFAR-100, as CIFAR-10 with 100 classes in 20 superclasses."""

    SOURCES: tuple[str, ...] = DATASETS["cifar100"].sources
