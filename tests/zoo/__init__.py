"""Tiny models of every architecture that the coupling engine must get right.

A model is a builder of ``(apply_fn, variables, inputs)`` under a name, with the groups
that a person reads off the architecture: name -> number of units that can be cut.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

MODELS: dict[str, "Model"] = {}


@dataclasses.dataclass(frozen=True)
class Built:
    """A model ready to run.

    Attributes:
        apply_fn: the function that is pruned.
        variables: its variables, every leaf random, numpy.
        inputs: ``(batch, seed) -> args``.
    """

    apply_fn: Callable[..., Any]
    variables: Any
    inputs: Callable[[int, int], tuple]


@dataclasses.dataclass(frozen=True)
class Model:
    """A named model and what a person expects of it.

    Attributes:
        name: unique.
        build: makes it.
        groups: group name -> number of units.
        inexact: the groups whose cut differs from masking.
        reverse: it has a reverse-mode derivative.
        mutated: it returns ``(result, new values of variables)``.
    """

    name: str
    build: Callable[[], Built]
    groups: Mapping[str, int]
    inexact: tuple[str, ...] = ()
    reverse: bool = True
    mutated: bool = False


def model(name: str, groups: Mapping[str, int], **options: Any):
    """Registers a builder that returns ``(apply_fn, variables, inputs)``."""

    def register(build: Callable[[], tuple]) -> Callable[[], tuple]:
        assert name not in MODELS, name
        made = functools.cache(lambda: Built(*build()))  # once a run
        MODELS[name] = Model(name, made, groups, **options)
        return build

    return register


def random_variables(shapes: Any, seed: int = 0) -> Any:
    """Random values for every leaf, so that nothing passes by being 0 or 1.

    Kernels keep the size of their inputs; variances are positive.
    """
    rng = np.random.default_rng(seed)

    def leaf(path: Any, like: Any) -> Any:
        shape, dtype = np.shape(like), np.result_type(like.dtype)
        if not np.issubdtype(dtype, np.floating):
            return np.zeros(shape, dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        draw = rng.normal(size=shape)
        if "/var" in name:
            draw = 0.5 + np.abs(draw)
        elif len(shape) >= 2:
            draw = draw / np.sqrt(np.prod(shape[:-1]))
        else:
            draw = (1.0 if name.endswith("scale") else 0.0) + 0.5 * draw
        return draw.astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def normal(*shape: int) -> Callable[[int, int], tuple]:
    """Inputs: one array ``[batch, *shape]``."""

    def inputs(batch: int, seed: int) -> tuple:
        rng = np.random.default_rng(1000 + seed)
        return (rng.normal(size=(batch, *shape)).astype(np.float32),)

    return inputs


def tokens(length: int, vocabulary: int) -> Callable[[int, int], tuple]:
    """Inputs: one array of token ids ``[batch, length]``."""

    def inputs(batch: int, seed: int) -> tuple:
        rng = np.random.default_rng(1000 + seed)
        return (rng.integers(vocabulary, size=(batch, length), dtype=np.int32),)

    return inputs


def linen(module: Any, inputs: Callable[[int, int], tuple], **kwargs: Any) -> tuple:
    """A Linen module as ``(apply_fn, variables, inputs)``."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(lambda *args: module.init(rngs, *args), *inputs(2, 0))

    def apply_fn(variables: Any, *args: Any) -> Any:
        return module.apply(variables, *args, **kwargs)

    return apply_fn, random_variables(shapes), inputs


def weights(seed: int = 0, **shapes: Any) -> Any:
    """Random parameters from a tree of shapes, for functions written by hand."""
    like = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return random_variables(like, seed)


from zoo import (  # noqa: E402
    attention,
    convolution,
    libraries,
    programs,
    recurrent,
)

__all__ = [
    "MODELS",
    "Built",
    "Model",
    "attention",
    "convolution",
    "libraries",
    "programs",
    "recurrent",
]
