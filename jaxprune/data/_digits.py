"""digits: scikit-learn's bundled handwritten digits, written as TFDS files."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

TEST_SIZE = 360
_SEED = 0


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """1797 images of 8x8 pixels: 1437 to train on, 360 to test on.

    The split is stratified and the same for everybody: scikit-learn's
    ``train_test_split`` with seed 0. Grey values 0..16 become 0..255, rounded;
    ``round(image * 16 / 255)`` gives the originals back.

    References:
        Alpaydin and Kaynak, `Optical Recognition of Handwritten Digits
        <https://doi.org/10.24432/C50P49>`_, 1998
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding="bytes")
        label = tfds.features.ClassLabel(num_classes=10)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8x8 grey, as bundled with scikit-learn.",
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.24432/C50P49",
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Any]:
        del dl_manager  # nothing to download
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        rows = np.arange(len(labels))
        train, test = train_test_split(
            rows, test_size=TEST_SIZE, stratify=labels, random_state=_SEED
        )
        return {
            "train": self._generate_examples(np.asarray(train), images, labels),
            "test": self._generate_examples(np.asarray(test), images, labels),
        }

    def _generate_examples(
        self, rows: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, object]]]:
        for row in rows.tolist():
            yield row, {"image": images[row], "label": int(labels[row])}
