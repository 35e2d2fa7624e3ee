"""From a data set in memory to batches.

Both iterators speak of positions, not of images: ``dataset.images[index]`` is the
batch. Resuming in the middle of an epoch then costs nothing, and the images may as
well live on the device. A shuffled index is all the loader there is, since every
data set here fits in memory: worker processes (grain) would only add start-up time.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.data._specs import Dataset, Spec


def normalize(images: jax.typing.ArrayLike, spec: Spec) -> jax.Array:
    """Maps bytes to numbers of mean 0 and standard deviation 1 per channel.

    Args:
        images: uint8 ``[..., C]``.
        spec: whose mean and deviation, of images divided by 255.

    Returns:
        float32 ``[..., C]``, ``(images / 255 - mean) / std``.

    Raises:
        ValueError: if the last axis is not the spec's channels.

    Example:
        >>> import numpy as np
        >>> from jaxprune.data._specs import DATASETS
        >>> white = np.full((1, 8, 8, 1), 255, np.uint8)
        >>> float(normalize(white, DATASETS["digits"]).mean())  # (1 - .305) / .376
        1.84...
    """
    images = jnp.asarray(images)
    if images.shape[-1:] != (len(spec.mean),):
        raise ValueError(
            f"images of shape {images.shape} do not have the {len(spec.mean)} channels "
            f"of {spec.name} on their last axis"
        )
    over_channels = (1,) * (images.ndim - 1) + (-1,)
    mean = jnp.asarray(spec.mean, jnp.float32).reshape(over_channels)
    std = jnp.asarray(spec.std, jnp.float32).reshape(over_channels)
    return (images.astype(jnp.float32) / 255 - mean) / std


def crop_and_flip(
    images: jax.Array, offsets: jax.Array, flips: jax.Array, *, pad: int
) -> jax.Array:
    """Shifts each image within a border of zeros, then mirrors some.

    Args:
        images: ``[N, H, W, C]``.
        offsets: int ``[N, 2]``, rows and columns in ``[0, 2 * pad]``: where in the
            padded image the crop starts; ``pad`` leaves the image in place.
        flips: bool ``[N]``, True = mirrored left and right.
        pad: zeros added on each side.

    Returns:
        ``[N, H, W, C]`` of the same dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> image = jnp.arange(4).reshape(1, 2, 2, 1)
        >>> out = crop_and_flip(image, jnp.array([[1, 0]]), jnp.array([False]), pad=1)
        >>> out[0, :, :, 0].tolist()  # one step to the right
        [[0, 0], [0, 2]]
    """

    def one(image: jax.Array, offset: jax.Array, flip: jax.Array) -> jax.Array:
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        start = (offset[0], offset[1], jnp.zeros_like(offset[0]))
        crop = jax.lax.dynamic_slice(padded, start, image.shape)
        return jnp.where(flip, crop[:, ::-1], crop)

    return jax.vmap(one)(images, offsets, flips)


def augment(images: jax.typing.ArrayLike, key: jax.Array, spec: Spec) -> jax.Array:
    """Draws a random crop, and a mirror image where the spec has it, per image.

    Images are padded with zeros, which is black before `normalize` and not after:
    augment first. Pure and jit-able with the spec static.

    Args:
        images: ``[N, H, W, C]``.
        key: the key is consumed.
        spec: whose augmentation; without any, images come back as they are.

    Returns:
        ``[N, H, W, C]`` of the same dtype.

    Raises:
        ValueError: if the images are not a batch of the spec's shape.

    Example:
        >>> import jax
        >>> from jaxprune.data._specs import DATASETS
        >>> images = jax.numpy.ones((4, 32, 32, 3), "uint8")
        >>> draw = jax.jit(augment, static_argnames="spec")
        >>> draw(images, jax.random.key(0), DATASETS["cifar10"]).shape
        (4, 32, 32, 3)
    """
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[1:] != spec.image_shape:
        raise ValueError(
            f"images of shape {images.shape} are not a batch of {spec.name}: "
            f"expected [N, {', '.join(map(str, spec.image_shape))}]"
        )
    pad, count = spec.augmentation.pad, len(images)
    crop_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(crop_key, (count, 2), 0, 2 * pad + 1)
    rate = 0.5 if spec.augmentation.flip else 0.0
    flips = jax.random.bernoulli(flip_key, rate, (count,))
    return crop_and_flip(images, offsets, flips, pad=pad)


def _require_batch_size(dataset: Dataset, batch_size: int, most: int | None) -> None:
    if batch_size < 1 or (most is not None and batch_size > most):
        raise ValueError(
            f"batch_size={batch_size} does not fit the {len(dataset)} examples of "
            f"{dataset.spec.name}"
        )


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    drop_remainder: bool = True,
) -> Iterator[np.ndarray]:
    """Returns the positions of every batch of one epoch, shuffled.

    The order depends on ``(seed, epoch)`` and on nothing else: to resume, ask for
    the epoch again and skip the batches done (``itertools.islice``).

    Args:
        dataset: what to draw from.
        batch_size: examples per batch.
        seed: of the whole run.
        epoch: counted from 0; every epoch has its own order.
        drop_remainder: leave out the last, smaller batch, which would cost a second
            compilation. Which examples are left out changes with the epoch.

    Returns:
        Iterator of int arrays ``[batch_size]``.

    Raises:
        ValueError: if the batch size is below 1, or above the number of examples
            while the remainder is dropped.

    Example:
        >>> import numpy as np
        >>> from jaxprune.data._specs import DATASETS, Dataset
        >>> images, labels = np.zeros((5, 8, 8, 1), np.uint8), np.zeros(5, np.int32)
        >>> five = Dataset(DATASETS["digits"], images, labels)
        >>> epoch = batches(five, 2, seed=0, epoch=0, drop_remainder=False)
        >>> sorted(np.concatenate(list(epoch)).tolist())
        [0, 1, 2, 3, 4]
    """
    _require_batch_size(dataset, batch_size, len(dataset) if drop_remainder else None)
    order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
    stop = len(order) - len(order) % batch_size if drop_remainder else len(order)
    return (order[start : start + batch_size] for start in range(0, stop, batch_size))


def eval_batches(
    dataset: Dataset, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Returns the positions of every batch in order, all of one size.

    The last batch is filled up with position 0, so that one compiled program serves
    all; the mask tells these apart, and sums over it count every example once.

    Args:
        dataset: what to read.
        batch_size: examples per batch.

    Returns:
        Iterator of int positions ``[batch_size]`` and bool mask ``[batch_size]``,
        True = an example, False = filling.

    Raises:
        ValueError: if the batch size is below 1.

    Example:
        >>> import numpy as np
        >>> from jaxprune.data._specs import DATASETS, Dataset
        >>> images, labels = np.zeros((5, 8, 8, 1), np.uint8), np.zeros(5, np.int32)
        >>> five = Dataset(DATASETS["digits"], images, labels)
        >>> [(index.tolist(), mask.tolist()) for index, mask in eval_batches(five, 4)]
        [([0, 1, 2, 3], [True, True, True, True]),
         ([4, 0, 0, 0], [True, False, False, False])]
    """
    _require_batch_size(dataset, batch_size, None)
    rows = np.arange(-(-len(dataset) // batch_size) * batch_size)
    rows = rows.reshape(-1, batch_size)
    masks = rows < len(dataset)
    return zip(np.where(masks, rows, 0), masks, strict=True)
