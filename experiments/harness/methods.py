"""The three ways to train that the Batch Bridgeout paper compares, and its cut.

References:
    Khan and Stavness, `Pruning Convolutional Filters using Batch Bridgeout
    <https://arxiv.org/abs/2009.10893>`_, 2020
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from experiments.harness.quirks import restarted
from experiments.harness.training import PRNG, make_predict
from jaxprune import Groups, scores, select, training
from jaxprune.data import Dataset, Spec
from jaxprune.models import MODELS

METHODS = ("bridgeout", "dropout", "weight_decay")
DROPOUTS = ("dropout", "targeted_dropout")
FRACTIONS = tuple(i / 10 for i in range(10))


class Hyper(NamedTuple):
    """What is tuned; a method ignores what it does not have.

    Attributes:
        learning_rate: at the start; it falls to 0 along a cosine.
        weight_decay: all three methods decay all parameters.
        rate: drop probability, of weights (bridgeout) or of activations (dropout);
            the strength of a penalty.
        target: fraction that may be dropped, the weakest first.
        q: norm of the bridge penalty.
    """

    learning_rate: float
    weight_decay: float
    rate: float = 0.0
    target: float = 1.0
    q: float = 1.0


@dataclasses.dataclass(frozen=True)
class Subject:
    """One architecture, with what does not depend on how it was trained.

    Attributes:
        name: key of `MODELS`.
        net: the module without dropout, which is the one that is evaluated.
        init: jitted ``net.init``.
        groups: which filters can be cut, and what else goes with them.
        predict: ``(variables, data) -> logits``.
    """

    name: str
    net: nn.Module
    init: Callable[..., Any]
    groups: Groups
    predict: Callable[[Any, Dataset], np.ndarray]


def subject(name: str, spec: Spec) -> Subject:
    """Builds the architecture of that name for a data set and traces it."""
    return subject_of(name, MODELS[name](num_classes=spec.num_classes), spec)


def subject_of(name: str, net: nn.Module, spec: Spec) -> Subject:
    """Traces a net for a data set."""
    init, image = jax.jit(net.init), jnp.zeros((1, *spec.image_shape))
    shapes = jax.eval_shape(init, jax.random.key(0), image)
    groups = jaxprune.trace(net.apply, shapes, image, roles=True)
    return Subject(name, net, init, groups, make_predict(net.apply))


def training_net(name: str, method: str, hyper: Hyper, spec: Spec) -> nn.Module:
    """The module that is trained: with dropout if that is the method."""
    drop = {"dropout_rate": hyper.rate, "dropout_target": hyper.target}
    return MODELS[name](
        num_classes=spec.num_classes, **(drop if method in DROPOUTS else {})
    )


def optimizer(
    method: str,
    hyper: Hyper,
    learning_rate: optax.ScalarOrSchedule,
    seed: int = 0,
    *,
    clip: float | None = 5.0,
    fresh_every: int | None = None,
) -> optax.GradientTransformation:
    """SGD as in the paper, behind Batch Bridgeout if that is the method.

    Args:
        method: of `METHODS`, `NOISES` or `PENALTIES`.
        hyper: its numbers.
        learning_rate: number or schedule.
        seed: of the noise. It only enters the initial state: one compiled step serves
            all seeds.
        clip: norm to clip the gradient at, or None. Clipping is for Bridgeout, whose
            pull-back has heavy tails at small weights; the others hardly notice.
        fresh_every: steps after which the momentum starts from 0 again, or None.
    """
    momentum = optax.trace(0.9, nesterov=True)
    if fresh_every is not None:
        momentum = restarted(momentum, fresh_every)
    links = [
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.add_decayed_weights(hyper.weight_decay),
        optax.chain(momentum, optax.scale_by_learning_rate(learning_rate)),
    ]
    if method in NOISES:
        links.insert(0, NOISES[method](hyper, jax.random.key(seed, impl=PRNG)))
    if method in PENALTIES:  # part of the loss as weight decay is: behind the clip
        links.insert(1, PENALTIES[method](hyper))
    return optax.chain(*links)


def is_hidden_kernel(path: Any) -> bool:
    """Whether a path of `params` is that of a kernel, and not the classifier's.

    The name tells: biases of attention and position embeddings have several axes too.
    """
    return path[-1].key == "kernel" and path[0].key != "head"


def hidden_kernels(params: Any) -> Any:
    """True for kernels but the classifier's, which gets no noise in the paper."""
    return jax.tree.map_with_path(lambda path, _: is_hidden_kernel(path), params)


def _bridgeout(
    hyper: Hyper, key: jax.Array, *, relative: bool = False
) -> optax.GradientTransformation:
    return jaxprune.bridgeout(
        hyper.rate,
        hyper.q,
        target_fraction=hyper.target,
        relative=relative,
        mask=hidden_kernels,
        key=key,
    )


def _dropconnect(hyper: Hyper, key: jax.Array) -> optax.GradientTransformation:
    return training.dropconnect(
        hyper.rate, target_fraction=hyper.target, mask=hidden_kernels, key=key
    )


def _group_bridgeout(hyper: Hyper, key: jax.Array) -> optax.GradientTransformation:
    return training.group_bridgeout(hyper.rate, hyper.q, mask=hidden_kernels, key=key)


# Method -> (hyper, key) -> the noise on its weights.
NOISES: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "bridgeout": _bridgeout,
    "untargeted_bridgeout": _bridgeout,
    "relative_bridgeout": partial(_bridgeout, relative=True),
    "dropconnect": _dropconnect,
    "group_bridgeout": _group_bridgeout,
}

# Method -> hyper -> the penalty on its weights.
PENALTIES: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "bridge_penalty": lambda hyper: training.bridge_penalty(
        hyper.rate, hyper.q, mask=hidden_kernels
    ),
    "group_lasso": lambda hyper: training.group_lasso(hyper.rate, mask=hidden_kernels),
}


def perturb(method: str) -> Callable[[Any, Any], Any]:
    """Where the gradient is taken."""
    if method in NOISES:
        return jaxprune.noisy_params
    return lambda params, opt_state: params


def filter_norms(
    groups: Groups, params: Any, reduce: scores.Reduce = "l2"
) -> dict[str, np.ndarray]:
    """The L2 (or L1) norm of every filter: of all kernels that write the unit.

    That is one convolution in a plain chain. On a residual stream several write the
    same channel, and they are cut together.
    """
    norms = jaxprune.group_scores(
        groups, kernel_sizes(params), reduce=reduce, members="producers"
    )
    return {name: np.asarray(norm) for name, norm in norms.items()}


def kernel_sizes(params: Any) -> Any:
    """The magnitudes of kernels; None for everything else, which has no score."""

    def size(path: Any, leaf: Any) -> Any:
        return abs(leaf) if path[-1].key == "kernel" else None

    return jax.tree.map_with_path(size, params)


def lowest_filters(
    groups: Groups, params: Any, fraction: float
) -> dict[str, np.ndarray]:
    """`lowest_units` by `filter_norms`."""
    return lowest_units(groups, filter_norms(groups, params), fraction)


def lowest_units(
    groups: Groups, scores: Mapping[str, np.ndarray], fraction: float
) -> dict[str, np.ndarray]:
    """Cuts the same fraction of every layer, ``int(fraction * filters)`` of each.

    Returns:
        Group name -> bool ``[size]``, True = kept.
    """
    return select.per_group(groups, scores, sparsity=shares_of(groups, fraction))


def shares_of(groups: Groups, fraction: float) -> dict[str, float]:
    """The share of every group that is ``int(fraction * filters)`` of its filters."""
    # 0.1 is a little more than a tenth of 10 filters in floating point, or less.
    return {
        name: int(fraction * group.size + 1e-9) / group.size
        for name, group in groups.items()
    }


def one_shot_masks(subject: Subject, variables: Any, fraction: float) -> Any:
    """Masks that cut this fraction of every layer at once."""
    keep = lowest_filters(subject.groups, variables["params"], fraction)
    return jaxprune.expand_masks(subject.groups, keep)


def area(accuracies: Sequence[float]) -> float:
    """Area under accuracy against the share that is cut: the mean over `FRACTIONS`."""
    return float(np.mean(accuracies))
