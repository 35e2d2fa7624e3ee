"""Pictures of what units look for."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

_KEPT, _CUT = "#15803d", "#b91c1c"


def functions_figure(
    images: Mapping[str, Any],
    clusters: Mapping[str, Any],
    keep: Mapping[str, Any],
    *,
    columns: int = 16,
    most: int = 64,
) -> Figure:
    """Draws the image that excites each unit, cluster by cluster.

    Units of a cluster stand side by side under its number; those that stay have a green
    frame, those that go a red one.

    Args:
        images: group name -> ``[size, H, W]`` or ``[size, H, W, C]``, as
            `recipes.functionality` finds them; of three channels as colours, else
            their mean.
        clusters: group name -> int ``[size]``.
        keep: group name -> bool ``[size]``, True = kept.
        columns: images in a line.
        most: of a larger group only so many units are drawn.

    Returns:
        A figure that belongs to no pyplot state.

    Raises:
        ValueError: if images are none.

    Example:
        >>> images = {"conv:3": np.random.default_rng(0).normal(size=(3, 1, 4, 4, 1))}
        >>> ids, keep = {"conv:3": np.array([0, 1, 0])}, {"conv:3": np.arange(3) < 2}
        >>> figure = functions_figure(images, ids, keep)
        >>> [axes.get_title() for axes in figure.axes if axes.get_title()]
        ['0', '0', '1']
    """
    if not images:
        raise ValueError("images is empty, so there is nothing to draw")
    orders = {
        name: np.argsort(np.asarray(clusters[name]), kind="stable")[:most]
        for name in images
    }
    lines = {name: -(-len(order) // columns) for name, order in orders.items()}
    heights = [0.25 + 0.75 * count for count in lines.values()]
    figure = Figure(figsize=(0.62 * columns, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(images), height_ratios=heights, squeeze=False)[:, 0]
    for part, (name, order) in zip(parts, orders.items(), strict=True):
        part.suptitle(name, x=0.01, ha="left", fontsize=8)
        cells = part.subplots(lines[name], columns, squeeze=False).ravel()
        for axes in cells[len(order) :]:
            axes.set_axis_off()
        for axes, unit in zip(cells, order, strict=False):
            axes.imshow(_shown(name, np.asarray(images[name][unit])), cmap="gray")
            axes.set_title(str(clusters[name][unit]), fontsize=6, pad=2)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color=_KEPT if keep[name][unit] else _CUT, linewidth=1.5)
    return figure


def _shown(name: str, image: np.ndarray) -> np.ndarray:
    """An image between 0 and 1."""
    image = image[0] if image.ndim in (3, 4) and image.shape[0] == 1 else image
    if image.ndim == 3 and image.shape[-1] != 3:
        image = image.mean(-1)
    if image.ndim not in (2, 3):
        raise ValueError(
            f"images[{name}] have the shape {image.shape}, which is no image of height "
            "and width"
        )
    low, high = image.min(), image.max()
    return (image - low) / (high - low or 1.0)
