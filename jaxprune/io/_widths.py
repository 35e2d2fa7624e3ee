"""Export of a slimmable network: all its widths over one set of weights."""

import dataclasses
import importlib.metadata
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export

from jaxprune.core import PyTree, named_leaves
from jaxprune.core._checks import refuse_traced
from jaxprune.io._folders import naming_damage, read_folder, write_folder
from jaxprune.io.export import (
    any_batch,
    read_variables,
    serialized,
    verify_program,
    write_npz,
)
from jaxprune.search import Slimmable

_FUNCTIONS, _PARAMETERS, _FACTS = "functions.zip", "parameters.npz", "widths.json"
_LARGEST = 2**30  # bytes of one function


@dataclasses.dataclass(frozen=True)
class ExportedWidths:
    """A slimmable network read back from a folder.

    Attributes:
        calls: for every width, the widest first, jit-compiled ``(variables, *args) ->
            outputs`` for any batch size.
        variables: of all widths, in the tree they were saved in.
        facts: what was saved beside them.
    """

    calls: tuple[Callable[..., PyTree], ...]
    variables: PyTree
    facts: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, i: int) -> Callable[..., PyTree]:
        return self.calls[i]


def save_widths(
    path: str | Path,
    slim: Slimmable,
    variables: PyTree,
    *args: object,
    facts: Mapping[str, object] | None = None,
    tolerance: float | None = None,
) -> None:
    """Writes a slimmable network: a program for every width, the weights once.

    Each program is compared with its width on random inputs, as `save_exported` does,
    before anything is written.

    Args:
        path: the folder; made if missing.
        slim: the network.
        variables: of all widths.
        *args: example arguments with the batch as leading axis, see `save_exported`.
        facts: JSON-like facts to keep with it, such as accuracies.
        tolerance: largest difference allowed, see `save_exported`.

    Raises:
        ValueError: if a program computes something else than its width, or the folder
            holds something else.
        OSError: if the folder cannot be written; what it held is then still there.
        ModuleNotFoundError: if flatbuffers is missing.

    Example:
        >>> import tempfile, jax.numpy as jnp, jaxprune
        >>> mlp = lambda params, x: x @ params["w1"] @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 2)), "w2": jnp.ones((2, 1))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> slim = jaxprune.slimmable(mlp, params, [{"w1:1": 2}, {"w1:1": 1}],
        ...                           groups=groups)
        >>> folder = tempfile.mkdtemp()
        >>> save_widths(folder, slim, slim.variables, jnp.ones((1, 1)))
        >>> again = load_widths(folder)
        >>> [float(run(again.variables, jnp.ones((1, 1)))[0, 0]) for run in again]
        [2.0, 1.0]
    """
    refuse_traced("save_widths", variables=variables, args=args)
    blobs = []
    for run in slim:
        program = any_batch(run, variables, *args)
        verify_program(program, run, variables, *args, tolerance=tolerance)
        blobs.append(serialized(program))
    leaves = named_leaves(variables)
    about = {
        "versions": {n: importlib.metadata.version(n) for n in ("jaxprune", "jax")},
        "widths": [dict(sizes) for sizes in slim.sizes],
        "parameters": {path: str(leaf.dtype) for path, leaf in leaves.items()},
        "facts": dict(facts or {}),
    }

    def write_functions(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for i, blob in enumerate(blobs):
                archive.writestr(str(i), blob)

    writers = {
        _FUNCTIONS: write_functions,
        _PARAMETERS: partial(write_npz, leaves=leaves),
    }
    write_folder(Path(path), _FACTS, about, writers)


def load_widths(path: str | Path) -> ExportedWidths:
    """Reads what `save_widths` wrote, without the code that made it.

    Args:
        path: the folder.

    Returns:
        The network; ``model[i](model.variables, *args)`` runs width i.

    Raises:
        ValueError: if the folder is not complete, or a file in it is damaged.
    """
    folder = Path(path)
    needed = {_FUNCTIONS: True, _PARAMETERS: True}
    about, files = read_folder(folder, "slimmable network", _FACTS, needed)
    with naming_damage(folder, "slimmable network"):
        programs = []
        with zipfile.ZipFile(files[_FUNCTIONS]) as archive:
            for i in range(len(about["widths"])):
                if archive.getinfo(str(i)).file_size > _LARGEST:
                    raise ValueError(f"the program of width {i} is too large")
                blob = bytearray(archive.read(str(i)))
                programs.append(jax.export.deserialize(blob))
        variables = read_variables(files[_PARAMETERS], about["parameters"], programs[0])
        calls = tuple(jax.jit(program.call) for program in programs)
        return ExportedWidths(calls, variables, about["facts"])
