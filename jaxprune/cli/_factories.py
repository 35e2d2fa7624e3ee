"""A person's own model on the command line: ``module:factory``, and its variables."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxprune.cli._words import UsageError, known
from jaxprune.core import named_leaves
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.program._jaxprs import trace_program


class Model(NamedTuple):
    """What a factory returns.

    Attributes:
        apply_fn: the function; its first argument is the variables.
        variables: its variables.
        args: example arguments.
        batches: batches of data, or None.
        loss_fn: ``(variables, batch) -> scalar``, or None.
    """

    apply_fn: ApplyFn
    variables: PyTree
    args: tuple[PyTree, ...]
    batches: Any = None
    loss_fn: Any = None


_RETURNS = "(apply_fn, variables, example args[, batches[, loss_fn]])"


def load_model(spec: str, variables: Path | None = None) -> Model:
    """Calls a factory.

    Args:
        spec: ``module:factory``; modules of the working folder are found too.
        variables: a folder with variables to take instead of the factory's.

    Returns:
        What the factory made.

    Raises:
        UsageError: if the module or factory does not exist, raises, or returns
            something else; or the folder does not hold these variables.
    """
    made = _called(_factory(spec), spec)
    if not isinstance(made, tuple) or not 3 <= len(made) <= 5:
        kind = f"{len(made)} things" if isinstance(made, tuple) else type(made).__name__
        raise UsageError(f"{spec} returned {kind}; expected {_RETURNS}")
    apply_fn, tree, args, *rest = made
    if not callable(apply_fn):
        raise UsageError(
            f"{spec} returned a {type(apply_fn).__name__} first; expected {_RETURNS}"
        )
    args = args if isinstance(args, tuple) else (args,)
    _check_call(spec, apply_fn, tree, args)
    if variables is not None:
        tree = _restored(variables, tree)
    return Model(apply_fn, tree, args, *rest)


def _factory(spec: str) -> Any:
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise UsageError(
            f"{spec!r} is not of the form module:factory, such as my_model:make"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"there is no module {error.name!r} for {spec}") from error
    except Exception as error:  # whatever the user's module raises
        raise UsageError(f"{module_name} raised {_said(error)}") from error
    names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
    known(f"factory in {module_name}", name, names)
    return getattr(module, name)


def _called(factory: Callable[[], object], spec: str) -> Any:
    try:
        return factory()
    except Exception as error:  # whatever the user's code raises
        raise UsageError(f"{spec} raised {_said(error)}") from error


def _check_call(spec: str, apply_fn: Any, variables: PyTree, args: PyTree) -> None:
    """Raises unless the function can be called as the factory says."""
    try:
        trace_program(apply_fn, variables, *args)
    except Exception as error:  # whatever the user's function raises
        raise UsageError(
            f"the function of {spec} cannot be called with its variables and example "
            f"args: {_said(error)}"
        ) from error


def _said(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}"


def _restored(folder: Path, like: PyTree) -> PyTree:
    """Variables from a folder: a checkpoint of jaxprune or of Orbax."""
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        if any(path.name.isdigit() for path in folder.iterdir()):
            from jaxprune.io import checkpoints

            found = checkpoints.restore_latest(folder, shapes)
            restored = None if found is None else found.state
        else:
            restored = ocp.StandardCheckpointer().restore(folder.absolute(), shapes)
    except Exception as error:  # Orbax has no common type for damage
        raise UsageError(
            f"{folder} does not hold these variables: {_said(error)}"
        ) from error
    if restored is None:
        raise UsageError(f"{folder} holds no checkpoint that is whole")
    for path, leaf in named_leaves(restored).items():
        wanted = named_leaves(like)[path].shape
        if leaf.shape != wanted:
            raise UsageError(f"{path} in {folder} has shape {leaf.shape}, not {wanted}")
    return restored
