"""scenes: small pictures with a label for every pixel, drawn, not downloaded.

Two to four objects stand before a rippled background and cover one another: discs,
squares, triangles and crosses, as in shapes32. The label of a pixel is the object seen
there, 0 for none. Colours, textures, positions, sizes, tilts, the thin rods in front
(which changes no label), contrast and noise are drawn at random and say nothing.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxprune.data import _synthetic as drawing

CLASSES = ("background", *drawing.TEXTURES)
SPLIT_SIZES = {"train": 3_000, "test": 1_000}

_MOST = 3  # objects in a scene
_BLOCK = 500  # scenes drawn together; part of the definition, as the seed is
_SEED = 20_241


def draw(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws scenes.

    Args:
        n: how many.
        rng: the source of everything.

    Returns:
        Images, uint8 ``[n, 32, 32, 3]``, and labels, uint8 ``[n, 32, 32]``.

    Example:
        >>> import numpy as np
        >>> images, labels = draw(3, np.random.default_rng(0))
        >>> images.shape, labels.shape
        ((3, 32, 32, 3), (3, 32, 32))
    """
    ground, *_ = drawing.colours(rng, n)
    image = drawing.background(rng, ground)
    label = np.zeros(image.shape[:3], np.uint8)
    counts = rng.integers(1, _MOST + 1, n)
    for number in range(_MOST):
        seen, texture, cover = _object(image, rng, n)
        there = (number < counts)[:, None, None]
        image = np.where(there[..., None], seen, image)
        label = np.where(there & (cover > 0.5), texture[:, None, None], label)
    image = drawing.rods(image, rng, count=1, width=0.03)
    return drawing.photographed(image, rng), label.astype(np.uint8)


def _object(
    image: np.ndarray, rng: np.random.Generator, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The image with one more object; its label and what it covers."""
    _, *pair = drawing.colours(rng, n)
    shape = rng.integers(0, len(drawing.SHAPES), n)
    texture = rng.integers(0, len(drawing.TEXTURES), n)
    centre = (drawing.uniform(rng, -0.7, 0.7, n), drawing.uniform(rng, -0.7, 0.7, n))
    size = drawing.uniform(rng, 0.5, 0.9, n)
    seen, cover = drawing.painted(image, rng, (shape, texture), pair, centre, size)
    return seen, (texture + 1).astype(np.uint8), cover


class Scenes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Textured shapes in scenes, a label for every pixel; 3000 + 1000 images.

    The seed fixes the images: each block of 500 has a numpy generator of its own,
    seeded by (seed, split, block).
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        side = drawing.SIZE
        image, label = (
            tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes")
            for shape in ((side, side, 3), (side, side))
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Any]:
        del dl_manager  # nothing to download
        return {
            split: self._generate_examples(index, size)
            for index, (split, size) in enumerate(SPLIT_SIZES.items())
        }

    def _generate_examples(
        self, split: int, size: int
    ) -> Iterator[tuple[int, dict[str, object]]]:
        for start in range(0, size, _BLOCK):
            rng = np.random.default_rng((_SEED, split, start // _BLOCK))
            images, labels = draw(min(_BLOCK, size - start), rng)
            for row, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield start + row, {"image": image, "label": label}
