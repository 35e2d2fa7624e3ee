"""A pruned model in one folder: its variables, what was cut, and its program.

The variables go through Orbax, the program through `jax.export`. With the original
function the folder is loaded as that function narrowed; without it, as the exported
program, which needs nothing of the model's source.
"""

import ast
import dataclasses
import importlib.metadata
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxprune.core import Groups, named_leaves
from jaxprune.core._checks import refuse_traced
from jaxprune.core._layer_masks import recalled
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.io import checkpoints
from jaxprune.io._files import first_line
from jaxprune.io._folders import naming_damage, read_folder, write_folder
from jaxprune.io._groups import groups_as_json, groups_from_json
from jaxprune.io._programs import check_agreement, on_device, random_batch, shapes_of
from jaxprune.io._trees import describe, rebuild
from jaxprune.io.export import (
    any_batch,
    deserialized,
    on_all_platforms,
    read_npy,
    serialized,
    verify_program,
    write_bytes,
    write_npz,
)
from jaxprune.narrowing import narrow
from jaxprune.program._jaxprs import is_array

FORMAT = 1

_KIND, _ABOUT = "pruned model", "pruned.json"
_PROGRAM, _MASKS, _VARIABLES = "program.jaxexport", "masks.npz", "variables"
_INDICES = "indices.npz"
_VERSIONS = ("jaxprune", "jax", "numpy")


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A pruned model that was read from a folder.

    Attributes:
        apply_fn: ``(variables, *args) -> outputs``: the original function narrowed,
            or the exported program.
        variables: its variables.
        masks: what was kept, like the original variables, True = kept.
        groups: what `trace` found in the original, or None if they were not saved.
        plan: which units were cut (see `jaxprune.plans.from_json`), or None.
        facts: what was saved beside them.
        args: the example arguments, shapes and dtypes where they are arrays; () if they
            are not known.
        kwargs: example keyword arguments.
    """

    apply_fn: ApplyFn
    variables: PyTree
    masks: PyTree
    groups: Groups | None
    plan: object
    facts: Mapping[str, Any]
    args: tuple[PyTree, ...] = ()
    kwargs: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)


def save_pruned(
    folder: str | Path,
    apply_fn: ApplyFn,
    variables: PyTree,
    masks: PyTree,
    *args: PyTree,
    groups: Groups | None = None,
    plan: object = None,
    facts: Mapping[str, object] | None = None,
    tolerance: float | None = None,
    **kwargs: PyTree,
) -> None:
    """Writes a pruned model; what the folder held before is replaced at the end.

    The program takes a batch of any size where every array of `args` has the batch as
    its leading axis and no example depends on the others, which is tried; otherwise
    it takes exactly the shapes of `args`. It is compared with `apply_fn` on random
    inputs before anything is written.

    Args:
        folder: made if missing.
        apply_fn: the narrowed function.
        variables: its variables, sliced.
        masks: what was kept, like the original variables, True = kept; concrete.
        *args: example arguments, arrays or shapes; without any, no program is saved,
            and the folder can be loaded with the original function only. What is no
            array is built into the program.
        groups: what `trace` found in the original.
        plan: which units were cut, as `jaxprune.plans.as_json` returns it.
        facts: JSON-like facts, such as the accuracy.
        tolerance: see `jaxprune.io.save_exported`.
        **kwargs: further arguments without arrays, built into the program.

    Raises:
        ValueError: if the program cannot be exported or computes something else, a
            keyword argument is an array, or the folder holds something else.
        OSError: if it cannot be written; what was there before is still there.

    Example:
        >>> import tempfile, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
        >>> x = jnp.ones((1, 3))
        >>> small = jaxprune.prune(mlp, params, x, sparsity=0.5)
        >>> folder = tempfile.mkdtemp()
        >>> save_pruned(folder, small.apply_fn, small.variables, small.masks, x)
        >>> program = load_pruned(folder)  # the original function is not needed
        >>> program.apply_fn(program.variables, jnp.ones((5, 3))).shape
        (5, 2)
        >>> load_pruned(folder, mlp).variables["w1"].shape
        (3, 2)
    """
    refuse_traced("save_pruned", variables=variables, masks=masks, args=args)
    leaves = named_leaves(variables)
    kept = {name: np.asarray(mask) for name, mask in named_leaves(masks).items()}
    about: dict[str, Any] = {
        "format": FORMAT,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "variables": [_signature(name, leaf) for name, leaf in leaves.items()],
        "tree": describe(variables),
        "masks": [[name, list(mask.shape)] for name, mask in kept.items()],
        "masks tree": describe(masks),
        "plan": plan,
        "facts": dict(facts or {}),
    }
    json.dumps(about)  # what is no JSON is told before anything is written
    writers: dict[str, Callable[[Path], None]] = {
        _VARIABLES: partial(_write_variables, leaves=list(leaves.values())),
        _MASKS: partial(write_npz, leaves=kept),
    }
    if groups is not None:
        about["groups"], indices = groups_as_json(groups)
        about["indices"] = [list(index.shape) for index in indices]
        named = {str(number): index for number, index in enumerate(indices)}
        writers[_INDICES] = partial(write_npz, leaves=named)
    if args:
        about["program"], blob = _program(apply_fn, variables, args, kwargs, tolerance)
        writers[_PROGRAM] = partial(write_bytes, content=blob)
    write_folder(Path(folder), _ABOUT, about, writers)


def load_pruned(
    folder: str | Path,
    apply_fn: ApplyFn | None = None,
    *,
    like: PyTree | None = None,
) -> Loaded:
    """Reads what `save_pruned` wrote.

    Args:
        folder: what it wrote to.
        apply_fn: the original function, to be narrowed; None for the exported
            program.
        like: tree (of anything) whose containers the variables and masks take; by
            default dicts, lists and tuples.

    Returns:
        The model; its variables are those that were saved, bit by bit.

    Raises:
        ValueError: if the folder holds no pruned model, or is damaged: the text says
            which file; or if it holds no program and `apply_fn` is not given.
    """
    folder = Path(folder)
    names = {_VARIABLES: True, _MASKS: True, _INDICES: False, _PROGRAM: False}
    about, files = read_folder(folder, _KIND, _ABOUT, names)
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has format {about.get('format')}, this version reads {FORMAT}"
        )
    if apply_fn is None and _PROGRAM not in files:
        raise ValueError(
            f"{folder} was saved without example arguments, so it holds no program: "
            "give the original function as apply_fn"
        )
    with naming_damage(folder, _KIND):
        variables = _read_variables(files[_VARIABLES], about)
        masks = _read_masks(files[_MASKS], about)
        groups = _read_groups(files, about)
        if groups is not None and any(group.layers > 1 for group in groups.values()):
            masks = jax.tree.map(recalled, masks)
        program = None
        if apply_fn is None:
            program = _call(about["program"], deserialized(files[_PROGRAM]))
    if like is not None:
        variables, masks = (_in_tree(folder, t, like) for t in (variables, masks))
    chosen = program if apply_fn is None else narrow(apply_fn, masks)
    assert chosen is not None
    call = _example(about["program"]) if "program" in about else ((), {})
    if apply_fn is not None and call[0]:
        _check_same_results(folder, chosen, variables, call, about["program"])
    told = about["plan"], about["facts"]
    return Loaded(chosen, variables, masks, groups, *told, *call)


# ------------------------------------------------------------------------------ program


def _program(
    apply_fn: ApplyFn,
    variables: PyTree,
    args: Sequence[PyTree],
    kwargs: Mapping[str, PyTree],
    tolerance: float | None,
) -> tuple[dict[str, Any], bytes]:
    """What the JSON says of the program, and the program."""
    for name, leaf in named_leaves(dict(kwargs)).items():
        if is_array(leaf):
            raise ValueError(
                f"the keyword argument {name} is an array; give arrays by position, "
                "so that the exported program takes them"
            )
    built_in = [None if _all_arrays(arg) else repr(arg) for arg in args]
    given = [arg for arg, text in zip(args, built_in, strict=True) if text is None]

    def of_arrays(variables: PyTree, *arrays: PyTree) -> Any:
        rest = iter(arrays)
        whole = [
            next(rest) if text is None else arg
            for arg, text in zip(args, built_in, strict=True)
        ]
        return apply_fn(variables, *whole, **kwargs)

    about: dict[str, Any] = {
        "built in": built_in,
        "keywords": {name: repr(value) for name, value in kwargs.items()},
        "inputs": [describe(arg) for arg in given],
        "example": [_described(leaf) for leaf in jax.tree.leaves(given)],
    }
    outputs = jax.eval_shape(of_arrays, shapes_of(variables), *map(shapes_of, given))
    about["outputs"] = describe(outputs)
    about["results"] = [_described(leaf) for leaf in jax.tree.leaves(outputs)]
    flat = _flat(of_arrays, variables, given)
    leaves, inputs = jax.tree.leaves(variables), jax.tree.leaves(given)
    try:
        program = any_batch(flat, leaves, *inputs)
        verify_program(program, flat, leaves, *inputs, tolerance=tolerance)
        about["batch"] = "any"
    except Exception as error:  # tracing at one example may raise anything
        program = _fixed(flat, leaves, inputs, tolerance)
        about["batch"] = f"fixed: {first_line(error)}"
    about["shapes"] = [str(aval) for aval in program.in_avals[len(leaves) :]]
    return about, serialized(program)


def _fixed(
    flat: Callable[..., object], leaves: list[PyTree], inputs: list[Any], tolerance: Any
) -> jax.export.Exported:
    """The program for exactly these shapes."""
    program = on_all_platforms(flat, shapes_of(leaves), *shapes_of(inputs))
    drawn = [
        random_batch([leaf], leaf.shape[0], seed=number)[0]
        if leaf.ndim and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else _as_array(leaf)
        for number, leaf in enumerate(inputs)
    ]
    expected = jax.jit(flat)(leaves, *drawn)
    found = list(jax.jit(program.call)(leaves, *drawn))
    check_agreement("the exported program", expected, found, tolerance)
    return program


def _as_array(leaf: PyTree) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return _keys(str(leaf.dtype), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _flat(
    of_arrays: Callable[..., object], variables: PyTree, given: Sequence[object]
) -> Callable[..., list[Any]]:
    """Takes and returns leaves, so that no container has to be known to JAX."""
    treedef, argdef = jax.tree.structure(variables), jax.tree.structure(tuple(given))

    def flat(leaves: list[PyTree], *inputs: PyTree) -> list[Any]:
        args = argdef.unflatten(inputs)
        return jax.tree.leaves(of_arrays(treedef.unflatten(leaves), *args))

    return flat


def _call(about: Mapping[str, Any], program: jax.export.Exported) -> ApplyFn:
    """The exported program with the signature of the narrowed function."""
    flat = jax.jit(program.call)
    built_in, outputs = about["built in"], about["outputs"]
    keywords, inputs = about["keywords"], about["inputs"]

    def apply_fn(variables: PyTree, *args: PyTree, **kwargs: PyTree) -> Any:
        if len(args) != len(built_in):
            raise TypeError(
                f"the exported program takes {len(built_in)} arguments after the "
                f"variables, got {len(args)}"
            )
        said = [repr(a) for a, text in zip(args, built_in, strict=True) if text]
        fixed = [text for text in built_in if text]
        other = {name: repr(value) for name, value in kwargs.items()}
        if said != fixed or not other.items() <= keywords.items():
            raise TypeError(
                "the exported program has these arguments built in: "
                f"{', '.join([*fixed, *(f'{k}={v}' for k, v in keywords.items())])}; "
                "load it with the original function to change them"
            )
        given = [a for a, text in zip(args, built_in, strict=True) if not text]
        for number, (arg, structure) in enumerate(zip(given, inputs, strict=True)):
            if describe(arg) != structure:
                raise TypeError(
                    f"array argument {number} was saved as {structure}, got "
                    f"{describe(arg)}"
                )
        shapes = [_described(leaf) for leaf in jax.tree.leaves(given)]
        if about["batch"] != "any" and shapes != about["shapes"]:
            raise ValueError(
                "the exported program takes a batch of one size, "
                f"{', '.join(about['shapes'])}, got {', '.join(shapes)}; load it with "
                "the original function for other sizes"
            )
        found = flat(jax.tree.leaves(variables), *jax.tree.leaves(given))
        return rebuild(outputs, iter(found))

    return apply_fn


def _example(about: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call; none if one that is built in cannot be read back."""
    try:
        leaves = iter([_shape(text) for text in about["example"]])
        inputs = iter([rebuild(structure, leaves) for structure in about["inputs"]])
        args = tuple(
            next(inputs) if text is None else ast.literal_eval(text)
            for text in about["built in"]
        )
        keywords = about["keywords"].items()
        return args, {name: ast.literal_eval(text) for name, text in keywords}
    except (KeyError, ValueError, SyntaxError):
        return (), {}


def _check_same_results(
    folder: Path, narrowed: ApplyFn, variables: PyTree, call: Any, about: Any
) -> None:
    """Raises if the function cannot be the one that was pruned."""
    args, kwargs = call
    try:
        found = jax.eval_shape(
            lambda variables, *args: narrowed(variables, *args, **kwargs),
            shapes_of(variables),
            *args,
        )
    except Exception as error:  # whatever the user's function raises
        cause = f"it raises {type(error).__name__}: {first_line(error)}"
    else:
        results = [_described(leaf) for leaf in jax.tree.leaves(found)]
        if results == about.get("results", results):
            return
        cause = f"it returns {', '.join(results)}, not {', '.join(about['results'])}"
    raise ValueError(
        f"apply_fn is not the function whose pruning {folder} holds: for the saved "
        f"example {cause}; give the original function, not a narrowed one, or none "
        "for the program in the folder"
    )


def _described(leaf: PyTree) -> str:
    return f"{leaf.dtype}[{','.join(map(str, np.shape(leaf)))}]"


def _shape(text: str) -> jax.ShapeDtypeStruct:
    """The shape and dtype of what is `_described`."""
    dtype, _, dims = text.removesuffix("]").partition("[")
    shape = tuple(int(length) for length in dims.split(",") if length)
    like = _blank(dtype, shape)
    return jax.ShapeDtypeStruct(shape, like.dtype)


def _all_arrays(arg: object) -> bool:
    leaves = jax.tree.leaves(arg)
    flags = {is_array(leaf) for leaf in leaves}
    if flags == {True, False}:
        raise ValueError(
            "an argument mixes arrays with other leaves; give them one by one"
        )
    return flags == {True}


# ------------------------------------------------------------------------------- arrays


def _signature(name: str, leaf: PyTree) -> dict[str, Any]:
    return {"path": name, "shape": list(np.shape(leaf)), "dtype": str(leaf.dtype)}


def _write_variables(path: Path, leaves: list[PyTree]) -> None:
    checkpoints.save(path, 0, leaves)
    checkpoints.release(path)


def _read_variables(path: Path, about: Mapping[str, Any]) -> PyTree:
    like = [_blank(leaf["dtype"], tuple(leaf["shape"])) for leaf in about["variables"]]
    try:
        restored = checkpoints.restore_exactly(path, 0, like)
    except Exception as error:  # Orbax has no common type for damage
        raise ValueError(f"{path.name}: {first_line(error)}") from error
    return rebuild(about["tree"], iter([on_device(leaf) for leaf in restored]))


def _blank(dtype: str, shape: tuple[int, ...]) -> Any:
    if dtype.startswith("key<"):
        return _keys(dtype, shape)
    return np.zeros(shape, jnp.dtype(dtype))


def _keys(dtype: str, shape: tuple[int, ...]) -> jax.Array:
    names = {"fry": "threefry2x32", "urbg": "unsafe_rbg"}
    name = dtype.removeprefix("key<").removesuffix(">")
    return jax.random.split(jax.random.key(0, impl=names.get(name, name)), shape)


def _read_masks(path: Path, about: Mapping[str, Any]) -> PyTree:
    with zipfile.ZipFile(path) as archive:
        leaves = [
            read_npy(archive, name, jax.ShapeDtypeStruct(tuple(shape), np.bool_))
            for name, shape in about["masks"]
        ]
    return rebuild(about["masks tree"], iter(leaves))


def _read_groups(files: Mapping[str, Path], about: Mapping[str, Any]) -> Groups | None:
    if "groups" not in about:
        return None
    with zipfile.ZipFile(files[_INDICES]) as archive:
        indices = [
            read_npy(archive, str(number), jax.ShapeDtypeStruct(tuple(shape), np.int32))
            for number, shape in enumerate(about["indices"])
        ]
    return groups_from_json(about["groups"], indices)


def _in_tree(folder: Path, tree: PyTree, like: PyTree) -> PyTree:
    found, wanted = named_leaves(tree), named_leaves(like)
    if different := sorted(found.keys() ^ wanted.keys()):
        side = "lacks" if different[0] in found else "has"
        raise ValueError(
            f"like {side} the leaf {different[0]}, unlike the model in {folder}"
        )
    return jax.tree.structure(like).unflatten([found[name] for name in wanted])
