"""Weights as a safetensors file, which many other programs read."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune.core import named_leaves
from jaxprune.core._checks import refuse_traced
from jaxprune.core._extras import needing
from jaxprune.core._types import PyTree
from jaxprune.io._checksums import local_checksum
from jaxprune.io._files import first_line, read_regular, write_atomically
from jaxprune.io._folders import sealed
from jaxprune.io._programs import on_device
from jaxprune.io._trees import describe, rebuild

_KEY = "jaxprune"
_DTYPES = {
    "BOOL": np.bool_,
    "BF16": jnp.bfloat16,
    "C64": np.complex64,
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
}
_MOST_BYTES = 2**40


class Weights(NamedTuple):
    """What a safetensors file holds.

    Attributes:
        variables: the arrays, in the tree that was saved; path -> array if another
            program wrote the file.
        plan: which units were cut (see `jaxprune.plans.from_json`), or None.
        facts: what was saved beside them.
    """

    variables: PyTree
    plan: object
    facts: Mapping[str, Any]


def save_safetensors(
    path: str | Path,
    variables: PyTree,
    *,
    plan: object = None,
    facts: Mapping[str, object] | None = None,
) -> None:
    """Writes arrays under their paths; other programs read them as a flat dict.

    The content is read back and compared bit by bit before the file is written.

    Args:
        path: the file; replaced as a whole.
        variables: tree of arrays.
        plan: which units were cut, as `jaxprune.plans.as_json` returns it.
        facts: JSON-like facts, such as the accuracy.

    Raises:
        ValueError: if the format does not hold a leaf's dtype, or two leaves have one
            path.
        ModuleNotFoundError: if safetensors is missing.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> path = tempfile.mkdtemp() + "/weights.safetensors"
        >>> save_safetensors(path, {"dense": {"kernel": jnp.ones(2)}})
        >>> load_safetensors(path).variables
        {'dense': {'kernel': Array([1., 1.], dtype=float32)}}

    References:
        `safetensors <https://huggingface.co/docs/safetensors>`_
    """
    refuse_traced("save_safetensors", variables=variables)
    library = _library()
    arrays = {
        name: np.asarray(leaf, order="C")
        for name, leaf in named_leaves(variables).items()
    }
    for name, array in arrays.items():
        if array.dtype not in map(np.dtype, _DTYPES.values()):
            raise ValueError(f"{name} has dtype {array.dtype}, unknown to safetensors")
    if "__metadata__" in arrays:
        raise ValueError("safetensors keeps the name __metadata__ for itself")
    about = {
        "tree": describe(variables),
        "sums": {name: local_checksum(array) for name, array in arrays.items()},
        "plan": plan,
        "facts": dict(facts or {}),
    }
    content = library.numpy.save(arrays, {_KEY: json.dumps(sealed(about))})
    again, _ = _arrays(library, content)
    for name, array in arrays.items():
        other = again.get(name)
        if other is None or other.shape != array.shape or other.dtype != array.dtype:
            raise ValueError(f"safetensors does not keep the leaf {name}")
        if other.tobytes() != array.tobytes():
            raise ValueError(f"safetensors changes the leaf {name}")
    write_atomically(path, content)


def load_safetensors(path: str | Path) -> Weights:
    """Reads what `save_safetensors` wrote, or any other safetensors file.

    Args:
        path: the file.

    Returns:
        The arrays, the plan and the facts.

    Raises:
        ValueError: if the file is damaged; the text names the array where one is.
        ModuleNotFoundError: if safetensors is missing.
    """
    library, path = _library(), Path(path)
    try:
        arrays, text = _arrays(library, read_regular(path, _MOST_BYTES))
        found = {name: on_device(array) for name, array in arrays.items()}
        if text is None:
            return Weights(found, None, {})
        about = json.loads(text)
        if sealed(about) != about:
            raise ValueError("its description is not what was saved")
        for name, total in about["sums"].items():
            if local_checksum(arrays[name]) != total:
                raise ValueError(f"{name} is not what was saved")
        leaves = iter([found[name] for name in about["sums"]])
        return Weights(rebuild(about["tree"], leaves), about["plan"], about["facts"])
    except OSError:
        raise
    except Exception as error:  # the library's own error is a bare Exception
        raise ValueError(f"{path} is damaged: {first_line(error)}") from error


def _library() -> Any:
    with needing("safetensors files", "export"):
        import_module("safetensors.numpy")
        return import_module("safetensors")


def _arrays(library: Any, content: bytes) -> tuple[dict[str, np.ndarray], str | None]:
    """The arrays of a file, and what this package wrote beside them."""
    arrays = {}
    for name, about in library.deserialize(content):
        if about["dtype"] not in _DTYPES:
            raise ValueError(f"{name} has the unknown dtype {about['dtype']}")
        flat = np.frombuffer(bytes(about["data"]), _DTYPES[about["dtype"]])
        arrays[name] = flat.reshape(about["shape"])
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return arrays, header.get("__metadata__", {}).get(_KEY)
