"""Checkpoints: numbered steps in a folder that outlive kills and damaged files.

Orbax writes a step aside and renames it when complete, so a kill at any moment leaves
the steps before it intact. It does not notice a flipped bit in array data, though:
a checksum of every leaf lies beside the arrays, and `restore_latest` walks back to the
newest step that still is what was saved.
"""

import json
import os
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import PyTree


class Restored(NamedTuple):
    """One checkpoint.

    Attributes:
        step: its number.
        state: tree like the one that was asked for.
        meta: what was saved beside it.
    """

    step: int
    state: PyTree
    meta: Any


def save(
    folder: str | os.PathLike[str],
    step: int,
    state: PyTree,
    meta: Any = None,
    *,
    keep: int = 3,
) -> None:
    """Writes one step, atomically; returns when it is on disk.

    The step becomes the newest: steps of the same or a higher number, left behind by
    a run that was resumed further back, are deleted.

    Args:
        folder: one folder per run; made if missing.
        step: number of the step, 0 or more.
        state: tree of arrays, typed keys and Python numbers.
        meta: anything JSON can hold: what has to be known before the arrays, such as
            the units that a pruned model keeps.
        keep: how many of the newest steps stay.

    Raises:
        ValueError: if `step` or `keep` is out of range.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> folder = tempfile.mkdtemp()
        >>> save(folder, 1, {"w": jnp.ones(2)}, {"lr": 0.5})
        >>> restore_latest(folder, {"w": jnp.zeros(2)})
        Restored(step=1, state={'w': Array([1., 1.], dtype=float32)}, meta={'lr': 0.5})
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be 0 or more and keep 1 or more: {step=}, {keep=}")
    with _manager(folder, keep) as manager:
        for later in manager.all_steps():
            if later >= step:
                manager.delete(later)
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                meta=ocp.args.JsonSave(_sealed(_described(state), meta)),
            ),
        )


def restore_latest(
    folder: str | os.PathLike[str], like: PyTree | Callable[[Any], PyTree]
) -> Restored | None:
    """Reads the newest step whose arrays are those that were saved.

    A damaged step is passed over with a warning that says what is wrong with it.

    Args:
        folder: what `save` wrote to; may be missing.
        like: tree of arrays or ShapeDtypeStructs (with a sharding, if wanted) that
            the state is restored into; or a function from the step's `meta` to it,
            where shapes are only known from there.

    Returns:
        The step, or None if there is none.

    Raises:
        ValueError: if `like` has other leaves, shapes or dtypes than what was saved.

    Example:
        >>> restore_latest("/nowhere", {}) is None
        True
    """
    if not Path(folder).is_dir():
        return None
    with _manager(folder, keep=None) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                sealed = _read_sealed(manager, step)
            except Exception as error:  # Orbax has no common type for damage.
                _warn_damaged(folder, step, error)
                continue
            target = like(sealed["meta"]) if callable(like) else like
            _check_like(folder, sealed["leaves"], target)
            try:
                state = _read_state(manager, step, target, sealed["leaves"])
            except Exception as error:
                _warn_damaged(folder, step, error)
                continue
            return Restored(step, state, sealed["meta"])
    return None


def _manager(folder: str | os.PathLike[str], keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=keep is not None, enable_async_checkpointing=False
    )
    # Orbax wants an absolute path.
    return ocp.CheckpointManager(
        Path(folder).absolute(), options=options, item_names=("state", "meta")
    )


def _read_sealed(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    sealed = manager.restore(step, args=args)["meta"]
    if _sealed(sealed["leaves"], sealed["meta"])["crc32"] != sealed["crc32"]:
        raise OSError("its JSON is not what was saved")
    return sealed


def _read_state(
    manager: ocp.CheckpointManager,
    step: int,
    target: PyTree,
    leaves: Mapping[str, Mapping[str, Any]],
) -> PyTree:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    state = manager.restore(step, args=args)["state"]
    for path, found in _described(state).items():
        if found["crc32"] != leaves[path]["crc32"]:
            raise OSError(f"{path} is not what was saved")
    return state


def _described(state: PyTree) -> dict[str, dict[str, Any]]:
    """Path -> shape, dtype and checksum, as JSON holds them."""
    return {
        path: {**_signature(leaf), "crc32": zlib.crc32(_bytes(leaf))}
        for path, leaf in named_leaves(state).items()
    }


def _signature(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, bool | int | float):
        return {"shape": [], "dtype": type(leaf).__name__}
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _bytes(leaf: Any) -> bytes:
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.ascontiguousarray(np.asarray(leaf)).tobytes()


def _sealed(leaves: Mapping[str, Any], meta: Any) -> dict[str, Any]:
    content = {"leaves": leaves, "meta": meta}
    return {
        **content,
        "crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode()),
    }


def _check_like(folder: Any, saved: Mapping[str, Any], target: PyTree) -> None:
    """A wrong `like` is the caller's mistake, not damage to walk back from."""
    asked = {path: _signature(leaf) for path, leaf in named_leaves(target).items()}
    if different := sorted(saved.keys() ^ asked.keys()):
        side = "lacks" if different[0] in saved else "asks for"
        raise ValueError(
            f"like {side} the leaf {different[0]}, unlike the checkpoint in {folder}; "
            "was it saved with another model or optimiser?"
        )
    for path, wanted in asked.items():
        found = {"shape": saved[path]["shape"], "dtype": saved[path]["dtype"]}
        if found != wanted:
            raise ValueError(
                f"{path} was saved in {folder} as {found['dtype']}{found['shape']}, "
                f"but like asks for {wanted['dtype']}{wanted['shape']}; was it saved "
                "with other widths?"
            )


def _warn_damaged(folder: Any, step: int, error: Exception) -> None:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    warnings.warn(
        f"checkpoint {step} in {folder} is damaged and passed over: {reason}",
        stacklevel=3,
    )
