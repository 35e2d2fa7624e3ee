"""Training as every experiment here does it: one jitted step, a resumable loop.

The order of the batches and every random draw follow from the seed and the step, so a
run that was killed and resumed ends where an uninterrupted one ends.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.data import Dataset, augment, batches, eval_batches, normalize
from jaxprune.io import checkpoints
from jaxprune.recipes import State

# Hardware-friendly bits: compiles in half the time of the default generator.
PRNG = "rbg"

EVAL_BATCH = 512


@dataclasses.dataclass(frozen=True)
class Fit:
    """How long to train, and where the checkpoints go.

    Attributes:
        epochs: passes over the data.
        batch_size: examples per step.
        seed: of the batch order.
        folder: checkpoints, numbered by epoch; None for none.
        save_every_s: an epoch is saved if the last one saved is this old; the last
            epoch always is.
    """

    epochs: int
    batch_size: int
    seed: int
    folder: Path | None = None
    save_every_s: float = 60.0


def cosine(learning_rate: Any, steps: Any) -> Callable[[Any], Any]:
    """A schedule for `optax.scale_by_schedule`: minus a rate that falls to 0.

    The numbers may be traced, so that one program serves all learning rates.
    """

    def scale(count: Any) -> Any:
        done = jnp.minimum(count.astype(jnp.float32) / steps, 1.0)
        return -0.5 * learning_rate * (1 + jnp.cos(jnp.pi * done))

    return scale


def start(
    init: Callable[..., Any], tx: optax.GradientTransformation, data: Dataset, seed: int
) -> State:
    """Returns the state before the first step; `init` is a (jitted) Flax ``init``."""
    init_key, key = jax.random.split(jax.random.key(seed, impl=PRNG))
    variables = init(init_key, jnp.zeros((1, *data.spec.image_shape)))
    return State(variables, tx.init(variables["params"]), jnp.int32(0), key)


def make_step(
    apply_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    data: Dataset,
    perturb: Callable[[Any, Any], Any] = lambda params, opt_state: params,
) -> Callable[[State, np.ndarray, np.ndarray], State]:
    """Returns one step of training, compiled on first use.

    Args:
        apply_fn: a Flax module's ``apply``, or that function narrowed.
        tx: the optimiser.
        data: whose normalisation and augmentation.
        perturb: where the gradient is taken, from the clean parameters and the state
            of the optimiser (`jaxprune.noisy_params`).

    Returns:
        ``(state, images, labels) -> state`` for uint8 images ``[N, H, W, C]``.
    """

    @jax.jit
    def step(state: State, images: jax.Array, labels: jax.Array) -> State:
        crop, drop = jax.random.split(jax.random.fold_in(state.key, state.step))
        x = normalize(augment(images, crop, data.spec), data.spec)

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, new = apply_fn(
                {**state.variables, "params": params},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": drop},
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return loss.mean(), new

        params = state.variables["params"]
        where = perturb(params, state.opt_state)
        grads, new = jax.grad(loss_fn, has_aux=True)(where)
        updates, opt_state = tx.update(grads, state.opt_state, params)
        variables = {"params": optax.apply_updates(params, updates), **new}
        return State(variables, opt_state, state.step + 1, state.key)

    return step


def fit(
    step: Callable[[State, np.ndarray, np.ndarray], State],
    state: State,
    data: Dataset,
    how: Fit,
    tick: Callable[[], None] = lambda: None,
    after: Callable[[int, State], None] = lambda epoch, state: None,
) -> State:
    """Trains, from the newest checkpoint if there is one.

    Args:
        step: what `make_step` returned.
        state: before the first epoch; also says what the checkpoint looks like.
        data: what to train on.
        how: how long, and where the checkpoints go.
        tick: called for every epoch that is done; what it raises stops the run.
        after: called with the number of epochs that are done and the state, before
            the checkpoint; after a resumption it is called again for those since.

    Returns:
        The state after the last epoch.
    """
    done = 0
    if how.folder and (saved := checkpoints.restore_latest(how.folder, state)):
        done, state = saved.step, saved.state
    for _ in range(done):
        tick()
    last_save = time.monotonic()
    for epoch in range(done, how.epochs):
        for index in batches(data, how.batch_size, seed=how.seed, epoch=epoch):
            state = step(state, data.images[index], data.labels[index])
        jax.block_until_ready(state.step)
        after(epoch + 1, state)
        due = time.monotonic() - last_save >= how.save_every_s
        if how.folder and (due or epoch + 1 == how.epochs):
            checkpoints.save(how.folder, epoch + 1, state, keep=1)
            last_save = time.monotonic()
        tick()
    return state


def make_predict(
    apply_fn: Callable[..., Any],
) -> Callable[[Any, Dataset], np.ndarray]:
    """Returns a function from variables and a data set to logits, compiled once.

    Returns:
        ``(variables, data) -> float32 [N, classes]``.
    """
    logits = jax.jit(apply_fn)

    def predict(variables: Any, data: Dataset) -> np.ndarray:
        parts = [
            np.asarray(logits(variables, normalize(data.images[index], data.spec)))[
                mask
            ]
            for index, mask in eval_batches(data, min(EVAL_BATCH, len(data)))
        ]
        return np.concatenate(parts)

    return predict


def accuracy(logits: np.ndarray, data: Dataset) -> float:
    """The fraction of examples whose largest logit is at the label."""
    return float(np.mean(logits.argmax(-1) == data.labels))


def judged(logits: np.ndarray, data: Dataset) -> dict[str, float]:
    """Accuracy and mean cross-entropy, as ``accuracy`` and ``loss``."""
    loss = optax.softmax_cross_entropy_with_integer_labels(
        jnp.asarray(logits), jnp.asarray(data.labels)
    )
    return {"accuracy": accuracy(logits, data), "loss": float(loss.mean())}


def best(tries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of the most accurate try; of several, of that with the lowest loss.

    Args:
        tries: what `judged` said of each, and its ``hyper``.
    """
    return max(tries, key=lambda t: (t["accuracy"], -t["loss"]))["hyper"]


def held_out(data: Dataset) -> tuple[Dataset, Dataset]:
    """Four fifths to train on and a fifth to tune on, drawn at random, always alike."""
    rows, border = np.random.default_rng(0).permutation(len(data)), len(data) // 5
    inner, outer = (
        dataclasses.replace(data, images=data.images[part], labels=data.labels[part])
        for part in (rows[border:], rows[:border])
    )
    return inner, outer
