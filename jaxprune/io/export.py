"""Export: a model as a folder that runs without the code that made it.

A folder holds the compiled function (StableHLO by `jax.export`, any batch size, CPU,
GPU and TPU), the parameters (npz) and what they are (JSON). Whoever loads it needs JAX
and nothing of the model's source; the pruned program is part of the function.
"""

import dataclasses
import importlib.metadata
import math
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxprune.core import named_leaves
from jaxprune.core._checks import refuse_traced
from jaxprune.core._extras import needing
from jaxprune.core._types import PyTree
from jaxprune.io._folders import naming_damage, read_folder, write_folder
from jaxprune.io._programs import (
    batch_size,
    check_agreement,
    each_example,
    random_batch,
    shapes_of,
    with_batch,
    without_folders,
)

PLATFORMS = ("cpu", "cuda", "tpu")

_FUNCTION, _PARAMETERS, _FACTS = "function.jaxexport", "parameters.npz", "model.json"
_VERSIONS = ("jaxprune", "jax", "numpy")
_LONGEST_HEADER = 4096


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model read back from a folder; call it with the batched arguments.

    Attributes:
        call: jit-compiled ``(variables, *args) -> outputs`` for any batch size.
        variables: the parameters, in the tree they were saved in.
        facts: what was saved beside them.
    """

    call: Callable[..., PyTree]
    variables: PyTree
    facts: Mapping[str, Any]

    def __call__(self, *args: PyTree) -> PyTree:
        """Computes the outputs for a batch of any size."""
        return self.call(self.variables, *args)


def save_exported(
    path: str | Path,
    apply_fn: Callable[..., PyTree],
    variables: PyTree,
    *args: PyTree,
    facts: Mapping[str, object] | None = None,
    tolerance: float | None = None,
) -> None:
    """Writes a model that computes every example of a batch by itself.

    `apply_fn` is traced for a batch of one and mapped over the batch, so whatever it
    does (`jaxprune.narrow` included) meets concrete shapes only, and the exported
    function takes any batch size. Before anything is written, it is compared with
    `apply_fn` on random inputs of two batch sizes.

    Args:
        path: the folder; made if missing. What was exported to it before is replaced
            once the new files are complete.
        apply_fn: ``(variables, *args) -> outputs``; every array in `args` and in the
            outputs has the batch as its leading axis, and no example's output may
            depend on the others (evaluation mode).
        variables: tree of arrays that the function keeps separate, so that they can
            be read, replaced or quantised.
        *args: example arguments, arrays or ShapeDtypeStructs; only the shapes behind
            the leading axis and the dtypes matter, and the values of integers, from
            which the random inputs are drawn.
        facts: JSON-like facts to keep with the model, such as its accuracy.
        tolerance: largest difference allowed, relative to the largest entry of an
            output; by default 2e-5, for 16-bit floats 3e-2.

    Raises:
        ValueError: if an argument has no leading axis, the exported function computes
            something else, or the folder holds something else.
        OSError: if the folder cannot be written; what it held is then still there.
        ModuleNotFoundError: if flatbuffers is missing.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> folder = tempfile.mkdtemp()
        >>> variables = {"w": jnp.array([[1.0], [2.0]])}
        >>> save_exported(folder, lambda v, x: x @ v["w"], variables, jnp.ones((1, 2)))
        >>> load_exported(folder)(jnp.ones((3, 2))).shape
        (3, 1)

    References:
        `Exporting and serializing staged-out computations
        <https://docs.jax.dev/en/latest/export/export.html>`_
    """
    refuse_traced("save_exported", variables=variables, args=args)
    leaves = named_leaves(variables)
    program = any_batch(apply_fn, variables, *args)
    verify_program(program, apply_fn, variables, *args, tolerance=tolerance)
    about = {
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "platforms": list(PLATFORMS),
        "inputs": [str(aval) for aval in program.in_avals[len(leaves) :]],
        "outputs": [str(aval) for aval in program.out_avals],
        "parameters": {path: str(leaf.dtype) for path, leaf in leaves.items()},
        "facts": dict(facts or {}),
    }
    blob = serialized(program)
    writers = {
        _FUNCTION: lambda path: write_bytes(path, blob),
        _PARAMETERS: partial(write_npz, leaves=leaves),
    }
    write_folder(Path(path), _FACTS, about, writers)


def load_exported(path: str | Path) -> Exported:
    """Reads what `save_exported` wrote.

    Args:
        path: the folder.

    Returns:
        The model; ``model(*args)`` computes its outputs.

    Raises:
        ValueError: if the folder is not complete, or a file in it is damaged: the
            text names it. Nothing but these files is read, and of them not more than
            the function's own shapes need.
    """
    folder = Path(path)
    needed = {_FUNCTION: True, _PARAMETERS: True}
    about, files = read_folder(folder, "exported model", _FACTS, needed)
    with naming_damage(folder, "exported model"):
        # Made by a newer JAX, it may be refused here; JAX says so itself.
        program = deserialized(files[_FUNCTION])
        variables = read_variables(files[_PARAMETERS], about["parameters"], program)
        return Exported(jax.jit(program.call), variables, about["facts"])


def any_batch(
    apply_fn: Callable[..., PyTree], variables: PyTree, *args: PyTree
) -> jax.export.Exported:
    """`apply_fn` as StableHLO, for a batch of any size on any platform.

    Args:
        apply_fn: ``(variables, *args) -> outputs``.
        variables: arrays or shapes.
        *args: arrays or shapes, with the batch as leading axis.

    Returns:
        The exported function of all arguments.
    """
    batch_size(args)
    (batch,) = jax.export.symbolic_shape("batch")
    inputs = shapes_of(variables), *with_batch(args, batch)
    return on_all_platforms(each_example(apply_fn), *inputs)


def on_all_platforms(
    function: Callable[..., object], *shapes: PyTree
) -> jax.export.Exported:
    """The function as StableHLO, for arguments of these shapes."""
    with without_folders():
        return jax.export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)


def verify_program(
    program: jax.export.Exported,
    apply_fn: Callable[..., PyTree],
    variables: PyTree,
    *args: PyTree,
    tolerance: float | None = None,
) -> float:
    """Compares an exported function with the one it was made from.

    Returns:
        The largest difference on random inputs of two batch sizes, relative to the
        largest entry of each output.

    Raises:
        ValueError: if it is larger than `tolerance`.
    """
    size = batch_size(args)
    worst, call, own = 0.0, jax.jit(program.call), jax.jit(apply_fn)
    for batch in (max(size, 1), max(size, 1) + 1):
        inputs = random_batch(args, batch, seed=batch)
        expected, found = own(variables, *inputs), call(variables, *inputs)
        leaves = jax.tree.leaves(found)
        gap = check_agreement("the exported program", expected, leaves, tolerance)
        worst = max(worst, gap)
    return worst


def serialized(program: jax.export.Exported) -> bytes:
    """The program as bytes.

    Raises:
        ModuleNotFoundError: if flatbuffers is missing.
    """
    with needing("exported programs", "export"):
        return bytes(program.serialize())


def deserialized(path: Path) -> jax.export.Exported:
    """The program that a file holds; its checksum is known to be right."""
    return jax.export.deserialize(bytearray(path.read_bytes()))


def write_bytes(path: Path, content: bytes) -> None:
    """As a function of the path, for `write_folder`."""
    path.write_bytes(content)


def write_npz(path: Path, leaves: Mapping[str, object]) -> None:
    """As `numpy.savez`, which takes no leaf named ``file`` or ``allow_pickle``."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, leaf in leaves.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, _storable(leaf), allow_pickle=False)


def _storable(leaf: PyTree) -> np.ndarray:
    """Numpy's file format knows no bfloat16 and the like: store their bits."""
    array = np.asarray(leaf)
    return array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array


def read_variables(
    path: Path, dtypes: Mapping[str, str], program: jax.export.Exported
) -> PyTree:
    """The parameters, each of the shape and dtype that the program asks for."""
    inputs = jax.tree.unflatten(program.in_tree, program.in_avals)
    wanted = jax.tree.leaves(inputs[0][0])
    if len(dtypes) != len(wanted):
        raise ValueError(f"it names {len(dtypes)} parameters, not {len(wanted)}")
    with zipfile.ZipFile(path) as archive:
        leaves = [
            read_npy(archive, name, aval)
            for name, aval in zip(dtypes, wanted, strict=True)
        ]
    return jax.tree.unflatten(jax.tree.structure(inputs[0][0]), leaves)


def read_npy(archive: zipfile.ZipFile, name: str, aval: Any) -> np.ndarray:
    """One array of what `write_npz` wrote, if it has the shape and size of `aval`."""
    stored = archive.getinfo(f"{name}.npy")
    nbytes = math.prod(aval.shape) * np.dtype(aval.dtype).itemsize
    if stored.file_size > nbytes + _LONGEST_HEADER:
        raise ValueError(f"{name} has {stored.file_size} bytes, not {nbytes}")
    with archive.open(stored) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    array = array.view(jnp.dtype(aval.dtype))
    if array.shape != aval.shape:
        raise ValueError(f"{name} has shape {array.shape}, not {aval.shape}")
    return array
