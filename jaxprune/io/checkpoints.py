"""Checkpoints: numbered steps in a folder that outlive kills and damaged files.

A step is validated, then written aside and renamed, and only then are the steps that it
replaces deleted: a refused argument, a full disk or a kill at any moment leaves the
steps before it as they are. Orbax writes the arrays. It does not notice a flipped bit
in array data, so a checksum of every leaf lies beside them, and `restore_latest` walks
back to the newest step that still is what was saved. One process at a time writes to a
folder (several of one `jax.distributed` job count as one).
"""

import json
import math
import operator
import os
import re
import shutil
import threading
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxprune.core import named_leaves
from jaxprune.core._checks import refuse_traced
from jaxprune.core._types import Array, PyTree
from jaxprune.io._checksums import MODULUS, local_checksum
from jaxprune.io._files import as_os_error, first_line, hold, regular_size, turn
from jaxprune.io._files import release as release

FORMAT = 2

# Steps are folders named by their number. Beside them, while one is replaced: `.new`
# is complete and newer than the step itself, `.old` is what it replaces, `.gone` is
# being deleted; Orbax adds a suffix of its own while it writes.
_NEW, _OLD, _GONE = ".new", ".old", ".gone"
_STEP = re.compile(r"(\d+)(\.new|\.old)?")
_LEFTOVER = re.compile(r"\d+(\.new|\.old)?(\.gone|\.orbax-checkpoint-tmp.*)")


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
    meta: object = None,
    *,
    keep: int = 3,
) -> None:
    """Writes one step, atomically; returns when it is on disk.

    The step becomes the newest: steps of the same or a higher number, left behind by
    a run that was resumed further back, are deleted once it is complete. Arrays may
    span processes: then every process calls this, with the same arguments.

    Args:
        folder: one folder per run; made if missing. This process stays its only
            writer until it ends, or until ``release(folder)``.
        step: number of the step, an int of 0 or more.
        state: tree of arrays, typed keys and Python numbers; arrays may be empty.
        meta: anything JSON can hold: what has to be known before the arrays, such as
            the units that a pruned model keeps. Keys come back as strings, tuples as
            lists.
        keep: how many of the newest steps stay.

    Raises:
        ValueError: if `step` or `keep` is out of range, or two leaves have one path.
        TypeError: if `step` or `keep` is no int, a leaf is no array or number, or
            `meta` is nothing that JSON can hold.
        OSError: if another process writes to the folder, or the disk is full; the
            steps before this one are then still there.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> folder = tempfile.mkdtemp()
        >>> save(folder, 1, {"w": jnp.ones(2)}, {"lr": 0.5})
        >>> restore_latest(folder, {"w": jnp.zeros(2)})
        Restored(step=1, state={'w': Array([1., 1.], dtype=float32)}, meta={'lr': 0.5})
    """
    step, keep = _natural("step", step), _natural("keep", keep)
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep=}")
    refuse_traced("checkpoints.save", state=state)
    meta = _as_json(meta)
    arrays, leaves = _described(state)
    folder = Path(folder).absolute()
    with turn(folder):
        _on_first_process(lambda: _open(folder))
        replaces = (folder / str(step)).exists()
        path = folder / (f"{step}{_NEW}" if replaces else str(step))
        try:
            _write(path, arrays, _sealed(leaves, meta))
        except Exception as error:
            _on_first_process(lambda: _tidy(folder))
            raise as_os_error(
                error, f"checkpoint {step} could not be written to {folder}"
            ) from error
        _on_first_process(lambda: _settle(folder, step, keep))


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
    folder = Path(folder).absolute()
    seen, problems = None, []
    # Read again if a writer replaced steps meanwhile: then what failed was not damaged.
    while (there := _steps(folder)) != seen:
        seen = there
        problems = []
        for step, path in there:
            try:
                sealed = _read_sealed(path)
            except Exception as error:  # Orbax has no common type for damage.
                problems.append((step, error))
                continue
            target = like(sealed["meta"]) if callable(like) else like
            _check_like(folder, sealed["leaves"], target)
            try:
                state = _read_state(path, target, sealed["leaves"])
            except Exception as error:
                _refuse_topology(folder, error)
                problems.append((step, error))
                continue
            _warn_damaged(folder, problems)
            return Restored(step, state, sealed["meta"])
    _warn_damaged(folder, problems)
    return None


def restore_exactly(folder: str | os.PathLike[str], step: int, like: PyTree) -> PyTree:
    """The state of one step.

    Raises:
        ValueError: if it was saved with other leaves, shapes or dtypes.
        Exception: whatever a damaged step makes Orbax raise.
    """
    path = Path(folder).absolute() / str(step)
    sealed = _read_sealed(path)
    _check_like(path, sealed["leaves"], like)
    return _read_state(path, like, sealed["leaves"])


# ---------------------------------------------------------------------------- arguments


def _natural(name: str, value: SupportsIndex) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an int, got {value!r} of type {type(value).__name__}"
        ) from None
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {name}={number}")
    return number


def _as_json(meta: object) -> Any:
    """What will be read back: tuples become lists, keys strings."""
    try:
        return json.loads(json.dumps(meta))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"meta must be what JSON can hold: {error}") from error


def _described(state: PyTree) -> tuple[list[Any], list[dict[str, Any]]]:
    """The arrays that Orbax writes, and what the JSON says of every leaf, in order.

    Python numbers and arrays without entries, which Orbax does not take, are wholly
    described by the JSON.
    """
    named = named_leaves(state)
    for path, leaf in named.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{path} is a ShapeDtypeStruct, which has no values to save; such "
                "leaves are for restore_latest(folder, like)"
            )
    leaves = [{"path": path, **_signature(path, leaf)} for path, leaf in named.items()]
    for about, leaf in zip(leaves, named.values(), strict=True):
        if isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic):
            about["value"] = leaf
    arrays = [
        np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
        for about, leaf in zip(leaves, named.values(), strict=True)
        if _in_arrays(about)
    ]
    stored = [about for about in leaves if _in_arrays(about)]
    for about, total in zip(stored, _checksums(arrays), strict=True):
        about["sum"] = total
    return arrays, leaves


def _signature(path: str, leaf: PyTree) -> dict[str, Any]:
    if isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic):
        return {"shape": [], "dtype": f"Python {type(leaf).__name__}"}
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(
            f"{path} is of type {type(leaf).__name__}; a checkpoint holds arrays, "
            "typed keys and Python numbers, and meta the rest"
        )
    objects = isinstance(leaf.dtype, np.dtype) and leaf.dtype.kind in "OUSMm"
    if objects or leaf.dtype == jax.dtypes.float0:
        raise TypeError(
            f"{path} has dtype {leaf.dtype}, which a checkpoint cannot hold"
        )
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _in_arrays(about: Mapping[str, Any]) -> bool:
    return not about["dtype"].startswith("Python ") and math.prod(about["shape"]) > 0


# ---------------------------------------------------------------------------- processes


def _on_first_process(act: Callable[[], None]) -> None:
    """Runs what changes the folder once; where it fails, every process raises."""
    if jax.process_count() == 1:
        act()
        return
    problem = None
    if jax.process_index() == 0:
        try:
            act()
        except Exception as error:
            problem = error
    if multihost_utils.broadcast_one_to_all(np.int32(problem is not None)):
        raise problem or OSError("process 0 could not write; its own error says why")


def _checksums(arrays: Sequence[Array]) -> list[int]:
    """The checksum of every array, added up over all processes."""
    sums = [local_checksum(leaf) for leaf in arrays]
    if jax.process_count() == 1:
        return sums
    # What every process holds by itself is the same everywhere: counted once.
    first = jax.process_index() == 0
    mine = [
        part if first or not getattr(leaf, "is_fully_addressable", True) else 0
        for part, leaf in zip(sums, arrays, strict=True)
    ]
    words = np.array(mine, np.uint64).view(np.uint32)  # 64 bits are off by default
    parts = np.asarray(multihost_utils.process_allgather(words)).view(np.uint64)
    return [sum(map(int, column)) % MODULUS for column in parts.T]


def _all_processes(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).all())


# -------------------------------------------------------------------------------- files


def _open(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    hold(folder)
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Ends what a kill interrupted; only the writer may."""
    for path in sorted(folder.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)
    for path in sorted(folder.glob(f"*{_NEW}")):
        if _STEP.fullmatch(path.name):
            _replace(path.with_suffix(""), path)
    for path in sorted(folder.glob(f"*{_OLD}")):
        if _STEP.fullmatch(path.name):
            _delete(path)


def _replace(path: Path, new: Path) -> None:
    """`new` takes the place of `path`; at every moment one of them is complete."""
    if path.exists():
        old = path.with_suffix(_OLD)
        path.replace(old)
        new.replace(path)
        _delete(old)
    else:
        new.replace(path)


def _settle(folder: Path, step: int, keep: int) -> None:
    """A new step is complete: what it replaces and what is too old goes.

    Later steps go in ascending order, so that after a kill in between the newest is
    still one of a whole: either the last of them or the new one.
    """
    new = folder / f"{step}{_NEW}"
    if new.exists():
        _replace(folder / str(step), new)
    numbers = sorted({number for number, _ in _steps(folder)})
    older = [number for number in numbers if number <= step]
    for number in [n for n in numbers if n > step] + older[:-keep]:
        _delete(folder / str(number))


def _delete(path: Path) -> None:
    """Renamed first, so that no half of a step looks like one."""
    gone = path.with_name(path.name + _GONE)
    path.replace(gone)
    shutil.rmtree(gone)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """The complete steps, newest first."""
    ranks = {_NEW: 1, None: 0, _OLD: -1}
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), ranks[match[2]], path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _orbax() -> Any:
    """Imported when a checkpoint is read or written: it takes a second."""
    import orbax.checkpoint

    return orbax.checkpoint


# Orbax numbers its operations for the whole process and waits for signals by that
# number, so two saves at once in two threads take each other's.
_ONE_AT_A_TIME = threading.Lock()


def _write(path: Path, arrays: list[Array], sealed: dict[str, Any]) -> None:
    ocp = _orbax()
    items: dict[str, Any] = {"meta": ocp.args.JsonSave(sealed)}
    if arrays:
        items["state"] = ocp.args.StandardSave(arrays)
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    with _ONE_AT_A_TIME, checkpointer as orbax:
        orbax.save(path, args=ocp.args.Composite(**items))


def _restore(path: Path, **items: object) -> Any:
    ocp = _orbax()
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    with _ONE_AT_A_TIME, checkpointer as orbax:
        return orbax.restore(path, args=ocp.args.Composite(**items))


def _read_sealed(path: Path) -> dict[str, Any]:
    for file in path.rglob("*"):
        if not file.is_dir():
            regular_size(file)  # a device, read to its end, would fill the memory
    sealed = _restore(path, meta=_orbax().args.JsonRestore())["meta"]
    if not isinstance(sealed, dict) or sealed.get("format") != FORMAT:
        raise OSError(f"it is not a checkpoint of format {FORMAT}")
    if _sealed(sealed["leaves"], sealed["meta"])["crc32"] != sealed["crc32"]:
        raise OSError("its JSON is not what was saved")
    return sealed


def _sealed(leaves: Sequence[PyTree], meta: object) -> dict[str, Any]:
    content = {"format": FORMAT, "leaves": leaves, "meta": meta}
    text = json.dumps(content, sort_keys=True)
    return {**content, "crc32": zlib.crc32(text.encode())}


def _read_state(
    path: Path, target: PyTree, leaves: Sequence[Mapping[str, Any]]
) -> PyTree:
    """The state, in the structure of `target`.

    Raises:
        Exception: whatever Orbax raises, or an OSError for what is not as saved.
    """
    wanted = named_leaves(target)
    stored = [about for about in leaves if _in_arrays(about)]
    arrays, problem = [], None
    try:
        arrays = _read_arrays(path, [wanted[about["path"]] for about in stored])
    except Exception as error:
        problem = error
    if not _all_processes(problem is None):
        raise problem or OSError("another process could not read it")
    for about, total in zip(stored, _checksums(arrays), strict=True):
        if total != about["sum"]:
            raise OSError(f"{about['path']} is not what was saved")
    rest = iter(arrays)
    found = {
        about["path"]: next(rest) if _in_arrays(about) else _of_json(about, wanted)
        for about in leaves
    }
    return jax.tree.structure(target).unflatten(found[path] for path in wanted)


def _read_arrays(path: Path, wanted: list[Any]) -> list[Any]:
    if not wanted:
        return []
    ocp = _orbax()
    abstract = [
        np.asarray(leaf)  # comes back from numpy to numpy, whatever the devices
        if isinstance(leaf, np.ndarray | np.generic)
        else ocp.utils.to_shape_dtype_struct(leaf)
        for leaf in wanted
    ]
    return _restore(path, state=ocp.args.StandardRestore(abstract))["state"]


def _of_json(about: Mapping[str, Any], wanted: Mapping[str, Any]) -> Any:
    if "value" in about:
        return about["value"]
    like = wanted[about["path"]]
    if isinstance(like, np.ndarray):
        return np.zeros(like.shape, like.dtype)
    return jnp.zeros(like.shape, like.dtype, device=getattr(like, "sharding", None))


def _check_like(folder: Path, leaves: Sequence[PyTree], target: PyTree) -> None:
    """A wrong `like` is the caller's mistake, not damage to walk back from."""
    saved = {about["path"]: about for about in leaves}
    asked = {path: _signature(path, v) for path, v in named_leaves(target).items()}
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


def _refuse_topology(folder: Path, error: Exception) -> None:
    if "Topology mismatch" in str(error):
        raise ValueError(
            f"the checkpoint in {folder} was saved on other devices: give like arrays, "
            "or ShapeDtypeStructs with a sharding, that say where the state goes now"
        ) from error


def _warn_damaged(folder: Path, problems: Sequence[tuple[int, Exception]]) -> None:
    for step, error in problems:
        warnings.warn(
            f"checkpoint {step} in {folder} is damaged and passed over: "
            f"{first_line(error)}",
            stacklevel=3,
        )
