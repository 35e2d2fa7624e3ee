"""The control of the study: Batch Bridgeout that does not know which weights are weak.

As many weights of every filter get noise as in targeted Batch Bridgeout, of the same
law, but which ones is read off the wrong place: the targets of each kernel are permuted
along its inputs. The noise is added inside the function and differentiated through, as
the method was first written, so nothing here is shared with `jaxprune.bridgeout`.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.methods import Hyper, is_hidden_kernel


def shuffled_apply(apply_fn: Callable[..., Any], hyper: Hyper) -> Callable[..., Any]:
    """The function in training mode with noisy kernels, drawn from its dropout key."""

    def apply(variables: Any, *args: Any, rngs: Any, **kwargs: Any) -> Any:
        key = jax.random.fold_in(rngs["dropout"], 1)
        params = shuffled_noise(variables["params"], key, hyper)
        return apply_fn({**variables, "params": params}, *args, rngs=rngs, **kwargs)

    return apply


def shuffled_noise(params: Any, key: jax.Array, hyper: Hyper) -> Any:
    """Adds noise to all kernels but the classifier's."""

    def perturb(path: Any, w: jax.Array) -> jax.Array:
        if not is_hidden_kernel(path):
            return w
        stream = zlib.crc32(jax.tree_util.keystr(path).encode())
        order = np.random.default_rng(stream).permutation(math.prod(w.shape[:-1]))
        targets = permuted_targets(w, hyper.target, order)
        kept = jax.random.bernoulli(
            jax.random.fold_in(key, stream), 1 - hyper.rate, w.shape
        )
        xi = jnp.where(kept, hyper.rate / (1 - hyper.rate), -1.0)
        size = jnp.abs(jnp.where(w != 0, w, 1.0)) ** (hyper.q / 2)
        return w + jnp.where((w != 0) & targets, size * xi, 0.0)

    return jax.tree.map_with_path(perturb, params)


def permuted_targets(w: jax.Array, fraction: Any, order: np.ndarray) -> jax.Array:
    """Which weights get noise: those of weak inputs, moved along the inputs.

    Args:
        w: kernel ``[..., in, out]``; where ``in`` is 1 the weights are ranked instead.
        fraction: of the inputs of a filter that are weak.
        order: a permutation of at least as many numbers as there are inputs.
    """
    if w.shape[-2] == 1:
        flat = jnp.abs(w).reshape(-1, 1, w.shape[-1])
        return permuted_targets(flat.swapaxes(0, 1), fraction, order).reshape(w.shape)
    norms = jnp.sqrt(jnp.square(w).sum(tuple(range(w.ndim - 2)), keepdims=True))
    ranks = jnp.argsort(jnp.argsort(norms, axis=-2), axis=-2)
    count = jnp.floor(w.shape[-2] * jnp.float32(fraction) + 1e-4).astype(jnp.int32)
    weak = ranks < jnp.maximum(count, 1)
    return jnp.take(weak, np.argsort(order[: w.shape[-2]]), axis=-2)
