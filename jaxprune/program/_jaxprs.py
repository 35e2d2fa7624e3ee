"""Jaxprs of every supported JAX, read in one way, and the source line of an equation.

From JAX 0.11 on, ClosedJaxpr and Jaxpr are one class and `scan` names its operand
counts differently. Nothing else in the package looks at these differences.
"""

import dataclasses
import functools
import itertools
import pathlib
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import NamedSharding

from jaxprune.core._leaves import keystr, leaf_names
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.program._types import Atom, Equation, Jaxpr


def opened(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[Any, list[Any]]:
    """A jaxpr, closed or not, as (jaxpr with eqns, constants)."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def closed(
    like: Any,
    consts: Sequence[tuple[Any, Any]],
    invars: Sequence[Atom],
    outvars: Sequence[Atom],
    eqns: Sequence[Equation],
    effects: Set[Any],
) -> Any:
    """A closed jaxpr with the names of `like`, from constants (variable, value) on."""
    names = like.debug_info
    if len(invars) != len(like.invars):
        names = names._replace(arg_names=None)  # they are of other inputs
    jaxpr = like.replace(
        constvars=[var for var, _ in consts],
        invars=invars,
        outvars=outvars,
        eqns=eqns,
        effects={*like.effects, *effects},
        debug_info=names,
    )
    return ClosedJaxpr(jaxpr, [value for _, value in consts])


@jax.jit
def _one_to_two(x: jax.Array) -> Any:
    return x, x


def call(jaxpr: Any, operands: Sequence[PyTree]) -> list[PyTree]:
    """Runs a closed jaxpr as one call of jit, without tracing it again."""
    if getattr(jax.config, "jax_disable_jit"):  # noqa: B009
        return jaxpr_as_fun(jaxpr)(*operands)
    [eqn] = opened(jax.make_jaxpr(_one_to_two)(0))[0].eqns
    sizes = {1: len(operands), 2: len(opened(jaxpr)[0].outvars)}
    changed = {  # what a call says of each operand and of each result
        name: value[:1] * sizes[len(value)]
        for name, value in eqn.params.items()
        if isinstance(value, tuple) and len(value) in sizes
    }
    name = opened(jaxpr)[0].debug_info.func_name
    return bind(eqn, *operands, **changed, jaxpr=jaxpr, name=name)


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """(number of constants, number of carries) of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def bind(eqn: Equation, *operands: jax.Array, **changed: object) -> list[PyTree]:
    """Runs one equation, with these parameters changed; always a list of results."""
    with eqn.ctx.manager:
        params = eqn.primitive.get_bind_params(eqn.params | changed)
        outs = eqn.primitive.bind(*operands, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function; equal to another if JAX traced only once for both.

    Attributes:
        closed: the jaxpr with its constants.
        paths: name of every input leaf, aligned with invars.
        out_paths: name of every output leaf, aligned with outvars.
        out_tree: structure of the result.
        memory: for what is worth keeping of it as long as its function is there.
    """

    closed: Any
    paths: list[str]
    out_paths: list[str]
    out_tree: object
    memory: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def jaxpr(self) -> Any:
        """The open jaxpr; its invars are the array leaves of (args, kwargs)."""
        return opened(self.closed)[0]

    @property
    def lasting(self) -> bool:
        """May it be kept? Not if it holds tracers, which end with their trace."""
        return not any(isinstance(const, Tracer) for const in opened(self.closed)[1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @functools.cached_property
    def _key(self) -> Any:
        return id(self.closed), tuple(self.paths), tuple(self.out_paths), self.out_tree


def is_array(leaf: PyTree) -> bool:
    """Is this leaf traced? Everything else (bools, strings, numbers) is static."""
    return isinstance(leaf, (jax.ShapeDtypeStruct, np.ndarray, np.generic, jax.Array))


def variable_path(path: str) -> str | None:
    """The path within the first argument, if an input leaf is one of it."""
    head, _, rest = path.partition("/")
    first, _, own = rest.partition("/")
    return own if (head, first) == ("0", "0") else None


def input_name(path: str) -> str:
    """``args/1/x`` or ``kwargs/x`` for the path of an input leaf."""
    head, _, rest = path.partition("/")
    return f"{'args' if head == '0' else 'kwargs'}/{rest}"


def _jitted(
    fn: ApplyFn, tree: PyTree, static: Sequence[object]
) -> tuple[Any, dict[Any, Any]]:
    """`fn` of its array leaves alone, jitted, and what is remembered of its programs.

    One jitted function per (function, structure, static leaves), so that JAX's own
    cache makes the second trace of the same program free. 1, 1.0 and True are equal but
    not the same static leaf: their types are part of the key.

    All of this is forgotten with the function: it refers to the function weakly, so
    that neither it nor what it closes over lives longer than for its other users.
    """
    owner = getattr(fn, "__self__", fn)
    try:
        refer = (weakref.ref if owner is fn else weakref.WeakMethod)(fn)
        key = tree, tuple(static), tuple(map(type, static))
        hash(key)
    except TypeError:  # of what can be neither referred to nor hashed nothing is kept
        return _jit_flat(lambda: fn, fn, tree, static), {}
    place = id(owner), getattr(fn, "__func__", None)
    if place not in _JITTED:
        _JITTED[place] = {}
        weakref.finalize(owner, _JITTED.pop, place, None).atexit = False
    known = _JITTED[place]
    if key not in known:
        while len(known) >= _MOST:  # the oldest goes
            del known[next(iter(known))]
        known[key] = _jit_flat(refer, fn, tree, static), {}
    return known[key]


# (id of a function's owner, the function if that is a method) -> key -> `_jitted`
_JITTED: dict[tuple[int, Any], dict[Any, tuple[Any, dict[Any, Any]]]] = {}
_MOST = 4


def _jit_flat(
    refer: Callable[[], Any], fn: ApplyFn, tree: PyTree, static: Sequence[object]
) -> Any:
    def flat(*arrays: Any) -> Any:
        rest = iter(arrays)
        leaves = [next(rest) if leaf is _ARRAY else leaf for leaf in static]
        args, kwargs = jax.tree.unflatten(tree, leaves)
        return refer()(*args, **kwargs)

    flat.__name__ = getattr(fn, "__name__", type(fn).__name__)  # for profiles
    return jax.jit(flat)


_ARRAY = object()


def trace_program(fn: ApplyFn, *args: PyTree, **kwargs: PyTree) -> Program:
    """Traces `fn` from arrays or shapes; leaves that are no arrays are static."""
    flat, tree = jax.tree.flatten((args, kwargs))
    static = [_ARRAY if is_array(leaf) else leaf for leaf in flat]
    traced = [leaf is _ARRAY for leaf in static]
    avals = list(map(abstract, itertools.compress(flat, traced)))
    jitted, memory = _jitted(fn, tree, static)
    done = jitted.trace(*avals)
    closed, out_info = done.jaxpr, done.out_info
    if len(opened(closed)[0].invars) != len(avals):
        # `fn` closes over values of a program being traced: keep them as constants.
        inner: Any = jitted
        make = jax.make_jaxpr(inner.__wrapped__, return_shape=True)
        closed, out_info = make(*avals)
    outs, out_tree = jax.tree_util.tree_flatten_with_path(out_info)
    return Program(
        closed,
        list(itertools.compress(leaf_names((args, kwargs), tree), traced)),
        [keystr(path) for path, _ in outs],
        out_tree,
        memory,
    )


def abstract(
    leaf: PyTree, shape: tuple[int, ...] | None = None
) -> jax.ShapeDtypeStruct:
    """What is known of an array before it is there, at its own or another shape.

    Keeps what decides how JAX types a program: dtype, weak type and, inside
    `jax.shard_map`, along which axes of the mesh the array varies.
    """
    if type(leaf) is jax.ShapeDtypeStruct and leaf.sharding is None and shape is None:
        return leaf  # it is that already
    host = isinstance(leaf, (np.ndarray, np.generic))
    aval = jax.typeof(leaf) if host else getattr(leaf, "aval", leaf)
    options = {"weak_type": getattr(aval, "weak_type", False)}
    sharding = getattr(aval, "sharding", None)
    if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
        manual = getattr(aval, "manual_axis_type", None)
        options |= {"sharding": sharding, "manual_axis_type": manual}
    shape = np.shape(leaf) if shape is None else shape
    return jax.ShapeDtypeStruct(shape, aval.dtype, **options)


def live_equations(jaxpr: Jaxpr, used: list[bool] | None = None) -> Sequence[Equation]:
    """The equations that the used outputs (all, unless told) need, in order."""
    outs = jaxpr.outvars
    if used is None and len(jaxpr.eqns) == 1 and outs == jaxpr.eqns[0].outvars:
        return jaxpr.eqns  # what libraries wrap in a call
    needed = set(map(id, outs if used is None else itertools.compress(outs, used)))
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(map(id, eqn.outvars)):
            kept.append(eqn)
            needed.update(map(id, eqn.invars))
    return kept[::-1]


_LIBRARIES = ("jax", "jaxlib", "flax", "haiku", "equinox", "jaxprune", "functools.py")


def source_line(eqn: Equation) -> str:
    """``file.py:12 (function)`` of the user's line behind an equation, or ""."""
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    frames = getattr(traceback, "frames", None) or []
    for frame in frames:
        if not _is_library(frame.file_name):
            name = pathlib.PurePath(frame.file_name).name
            return f"{name}:{frame.line_num} ({frame.function_name})"
    return ""


@functools.cache
def _is_library(file_name: str) -> bool:
    path = pathlib.PurePath(file_name)
    if "site-packages" in path.parts:
        place = path.parts.index("site-packages") + 1
        package = "".join(path.parts[place : place + 1])
    else:
        package = path.name
    inside = "jaxprune" in path.parts[-3:-1]
    return not package or package in _LIBRARIES or "<" in file_name or inside
