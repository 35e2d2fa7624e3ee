"""Export: a model as a folder that runs without the code that made it.

A folder holds the compiled function (StableHLO by `jax.export`, any batch size, CPU,
GPU and TPU), the parameters (npz) and what they are (JSON). Whoever loads it needs JAX
and nothing of the model's source; the pruned program is part of the function.
"""

import dataclasses
import importlib.metadata
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import PyTree

PLATFORMS = ("cpu", "cuda", "tpu")

_FUNCTION, _PARAMETERS, _FACTS = "function.jaxexport", "parameters.npz", "model.json"
_VERSIONS = ("jaxprune", "jax", "numpy")


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

    def __call__(self, *args: Any) -> PyTree:
        """Computes the outputs for a batch of any size."""
        return self.call(self.variables, *args)


def save_exported(
    path: str | Path,
    apply_fn: Callable[..., PyTree],
    variables: PyTree,
    *args: Any,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model that computes every example of a batch by itself.

    `apply_fn` is traced for a batch of one and mapped over the batch, so whatever it
    does (`jaxprune.narrow` included) meets concrete shapes only, and the exported
    function takes any batch size.

    Args:
        path: the folder; made if missing, files in it are replaced.
        apply_fn: ``(variables, *args) -> outputs``; every array in `args` and in the
            outputs has the batch as its leading axis, and no example's output may
            depend on the others (evaluation mode).
        variables: tree of arrays that the function keeps separate, so that they can
            be read, replaced or quantised.
        *args: example arguments, arrays or ShapeDtypeStructs; only the shapes behind
            the leading axis and the dtypes matter.
        facts: JSON-like facts to keep with the model, such as its accuracy.

    Raises:
        ValueError: if an argument has no leading axis.

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
    exported = jax.export.export(jax.jit(_each_example(apply_fn)), platforms=PLATFORMS)(
        _abstract(variables), *_symbolic(args)
    )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # The facts come last: a folder that has them is complete.
    (folder / _FACTS).unlink(missing_ok=True)
    (folder / _FUNCTION).write_bytes(exported.serialize())
    leaves = named_leaves(variables)
    stored: dict[str, Any] = {path: _storable(leaf) for path, leaf in leaves.items()}
    with (folder / _PARAMETERS).open("wb") as file:
        np.savez(file, **stored)
    about = {
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "platforms": list(PLATFORMS),
        "inputs": [str(aval) for aval in exported.in_avals[len(leaves) :]],
        "outputs": [str(aval) for aval in exported.out_avals],
        "parameters": {path: str(leaf.dtype) for path, leaf in leaves.items()},
        "crc32": {name: _crc32(folder / name) for name in (_FUNCTION, _PARAMETERS)},
        "facts": dict(facts or {}),
    }
    (folder / _FACTS).write_text(json.dumps(about, indent=1) + "\n")


def load_exported(path: str | Path) -> Exported:
    """Reads what `save_exported` wrote.

    Args:
        path: the folder.

    Returns:
        The model; ``model(*args)`` computes its outputs.

    Raises:
        ValueError: if the folder is not complete, or a file in it is damaged.
    """
    folder = Path(path)
    if not (folder / _FACTS).is_file():
        raise ValueError(f"{folder} holds no exported model: {_FACTS} is missing")
    try:
        about = json.loads((folder / _FACTS).read_text())
        for name, expected in about["crc32"].items():
            if _crc32(folder / name) != expected:
                raise ValueError(f"{name} is not what was saved")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the exported model in {folder} is damaged: {error}"
        ) from error
    # Made by a newer JAX, it may be refused here; JAX says so itself.
    exported = jax.export.deserialize(bytearray((folder / _FUNCTION).read_bytes()))
    variables = _read_variables(folder / _PARAMETERS, about["parameters"], exported)
    return Exported(jax.jit(exported.call), variables, about["facts"])


def _each_example(apply_fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    def mapped(variables: PyTree, *args: Any) -> PyTree:
        def one(*example: Any) -> PyTree:
            batch_of_one = jax.tree.map(lambda x: x[None], example)
            return jax.tree.map(lambda y: y[0], apply_fn(variables, *batch_of_one))

        return jax.vmap(one)(*args)

    return mapped


def _symbolic(args: tuple[Any, ...]) -> Any:
    (batch,) = jax.export.symbolic_shape("batch")
    for name, leaf in named_leaves(args).items():
        if np.ndim(leaf) == 0:
            raise ValueError(
                f"args/{name} has no axes, but its leading one must be the batch; "
                "close over what is not batched"
            )
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), args
    )


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _storable(leaf: Any) -> np.ndarray:
    """Numpy's file format knows no bfloat16 and the like: store their bits."""
    array = np.asarray(leaf)
    return array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array


def _read_variables(path: Path, dtypes: Mapping[str, str], exported: Any) -> PyTree:
    with np.load(path) as stored:
        leaves = [
            stored[name].view(jax.numpy.dtype(dtype)) for name, dtype in dtypes.items()
        ]
    tree = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0][0]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _crc32(path: Path) -> int:
    return zlib.crc32(path.read_bytes())
