"""Names for the activations of a program: the layers that make them, and scopes.

A layer is what holds parameters: the part of a parameter's path before its last. Where
its parameters first meet a value that depends on the arguments is the layer's input,
where they last do its output. So activations have names in any framework, and nothing
has to be registered. `jax.named_scope` (which Flax Linen opens for every module) and
`checkpoint_name` name further ones.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import DropVar, Literal

from jaxprune.core._leaves import parameter_paths
from jaxprune.program._interpret import Passage, interpret, through
from jaxprune.program._jaxprs import Program, opened, variable_path
from jaxprune.program._types import Equation, Jaxpr
from jaxprune.program.primitives import declaration
from jaxprune.statistics.taps._program import Site, inner_program

INPUT = ":input"


class Kind(NamedTuple):
    """What a value depends on.

    Attributes:
        data: on the arguments?
        owners: if not, the parameters that it is made of.
        moved: are they only moved, their values as they were?
    """

    data: bool
    owners: frozenset[str] = frozenset()
    moved: bool = False


def _either(a: Kind, b: Kind) -> Kind:
    """The kind of what may be either of two values."""
    if a.data or b.data:
        return Kind(True)
    return Kind(False, a.owners | b.owners, a.moved and b.moved)


@dataclasses.dataclass
class Call:
    """One use of a layer: the parameters met so far, and where."""

    met: set[str]
    source: Site
    result: Site


class Found(NamedTuple):
    """A site with the shape of what is read there, stacked over the scans around it."""

    site: Site
    shape: jax.ShapeDtypeStruct


def variable_kinds(program: Program) -> list[Kind]:
    """The kind of every input: the first argument holds the variables."""
    own = [variable_path(path) for path in program.paths]
    chosen = parameter_paths(path for path in own if path is not None)
    return [
        Kind(False, frozenset([path]), moved=True)
        if path in chosen
        else Kind(path is None)
        for path in own
    ]


def named_sites(program: Program) -> dict[str, Found]:
    """Every name of a program, in the order of the program, and where it is."""
    walk = Naming()
    walk.run(program.closed, variable_kinds(program), ())
    sites: dict[Site, list[str]] = {}
    for layer, calls in walk.calls.items():
        for k, call in enumerate(calls):
            number = f"#{k + 1}" if k else ""
            sites.setdefault(call.source, []).append(layer + number + INPUT)
            sites.setdefault(call.result, []).append(layer + number)
    for name, site in _markers(program.closed):
        sites.setdefault(site, []).append(name)
    for name, site in _scopes(program.closed):
        if site not in sites:  # most scopes are layers
            sites[site] = [name]
    found: dict[str, Found] = {}
    for site in sorted(sites, key=lambda site: (site.path, not site.operand)):
        for name in sites[site]:
            found[_free(name, found)] = Found(site, _shape(program.closed, site))
    return found


def _free(name: str, taken: dict[str, Found]) -> str:
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name}#{count}"
    return free


def layer_of(path: str) -> str:
    """The layer that a parameter belongs to; a parameter without one is its own.

    Example:
        >>> layer_of("params/block/conv/kernel"), layer_of("conv/kernel/value")
        ('block/conv', 'conv')
        >>> layer_of("w1")
        'w1'
    """
    path = path.removeprefix("params/").removesuffix("/value")
    return path.rpartition("/")[0] or path


class Naming:
    """Follows kinds through a program and notes where layers meet data.

    Attributes:
        calls: layer -> its uses, in order.
        kinds: path of an equation -> the kinds of its operands.
    """

    def __init__(self) -> None:
        self.calls: dict[str, list[Call]] = {}
        self.kinds: dict[tuple[int, ...], list[Kind]] = {}

    def run(
        self, jaxpr: Jaxpr, ins: Sequence[Kind], path: tuple[int, ...]
    ) -> list[Kind]:
        """Walks a program whose inputs are of these kinds; returns its results'."""

        def step(number: int, eqn: Equation, kinds: list[Kind]) -> list[Kind]:
            return self._equation(eqn, kinds, (*path, number))

        return interpret(opened(jaxpr)[0], ins, step, lambda var: Kind(False))

    def _equation(self, eqn: Equation, kinds: list[Kind], path: tuple[int, ...]) -> Any:
        program = inner_program(eqn)
        self.kinds[path] = kinds
        if program is not None:
            return through(eqn, kinds, self._passage(program, path))
        data = any(kind.data for kind in kinds)
        owners = frozenset().union(*(k.owners for k in kinds if not k.data))
        if data and owners and eqn.primitive.name not in ("while", "cond"):
            self._meet(eqn, kinds, owners, path)
        made = [kind for kind in kinds if kind.owners]
        known = declaration(eqn)
        moves = known is not None and known.moves
        moved = moves and all(kind.moved for kind in made)
        kind = Kind(True) if data else Kind(False, owners, moved and bool(owners))
        return [kind] * len(eqn.outvars)

    def _passage(self, program: Any, path: tuple[int, ...]) -> Passage[Kind]:
        """How kinds pass through inner programs; of a loop the last turn counts."""
        before = {layer: len(calls) for layer, calls in self.calls.items()}

        def run(number: int, kinds: list[Kind]) -> list[Kind]:
            for layer, calls in self.calls.items():
                del calls[before.get(layer, 0) :]
            return self.run(program, kinds, path)

        return Passage(run, _either)

    def _meet(
        self,
        eqn: Equation,
        kinds: list[Kind],
        owners: frozenset[str],
        path: tuple[int, ...],
    ) -> None:
        if len(eqn.outvars) != 1 or isinstance(eqn.outvars[0], DropVar):
            return
        first = next(k for k, kind in enumerate(kinds) if kind.data)
        source, result = Site(path, first, operand=True), Site(path, 0)
        for layer in dict.fromkeys(layer_of(owner) for owner in sorted(owners)):
            own = {owner for owner in owners if layer_of(owner) == layer}
            calls = self.calls.setdefault(layer, [])
            if calls and not own & calls[-1].met:
                calls[-1].met |= own
                calls[-1].result = result
            else:
                calls.append(Call(own, source, result))


def inner_programs(
    jaxpr: Jaxpr, path: tuple[int, ...] = (), scope: str = ""
) -> Iterator[tuple[Any, tuple[int, ...], str]]:
    """A program and all that taps may enter: (open jaxpr, path, scope around it)."""
    jaxpr, _ = opened(jaxpr)
    yield jaxpr, path, scope
    for k, eqn in enumerate(jaxpr.eqns):
        inner = inner_program(eqn)
        if inner is not None:
            yield from inner_programs(inner, (*path, k), _scope_of(eqn, scope))


def _scope_of(eqn: Equation, around: str) -> str:
    own = str(eqn.source_info.name_stack)
    return "/".join(filter(None, (around, own)))


def _markers(jaxpr: Jaxpr) -> Iterator[tuple[str, Site]]:
    """The values that `checkpoint_name` names."""
    for inner, path, _ in inner_programs(jaxpr):
        for k, eqn in enumerate(inner.eqns):
            if eqn.primitive.name == "name":
                yield eqn.params["name"], Site((*path, k), 0)


def _scopes(jaxpr: Jaxpr) -> Iterator[tuple[str, Site]]:
    """The result of every named scope: the last value that is used outside of it.

    A scope is closed and opened anew where equations outside of it lie in between.
    """
    for inner, path, around in inner_programs(jaxpr):
        scopes = [_scope_of(eqn, around).split("/") for eqn in inner.eqns]
        last_use = _last_uses(inner)
        depth = len(around.split("/")) if around else 0
        for start, stop, name in _stretches(scopes, depth):
            for k in reversed(range(start, stop)):
                outs = inner.eqns[k].outvars
                used = [j for j, v in enumerate(outs) if last_use.get(v, -1) >= stop]
                if used:
                    yield name, Site((*path, k), used[0])
                    break


def _last_uses(jaxpr: Jaxpr) -> dict[Any, int]:
    """The number of the last equation that reads a value; past the end for results."""
    last = {}
    for k, eqn in enumerate(jaxpr.eqns):
        last.update((v, k) for v in eqn.invars if not isinstance(v, Literal))
    count = len(jaxpr.eqns)
    last.update((v, count) for v in jaxpr.outvars if not isinstance(v, Literal))
    return last


def _stretches(scopes: list[list[str]], depth: int) -> Iterator[tuple[int, int, str]]:
    """(start, stop, name) of every unbroken run of equations in one scope."""
    open_at: list[int] = []
    before: list[str] = []
    for k, scope in enumerate([*scopes, []]):
        shared = _shared(before, scope)
        for level in reversed(range(max(shared, depth), len(before))):
            if before[level]:
                yield open_at[level], k, "/".join(before[: level + 1])
        open_at = [*open_at[:shared], *[k] * (len(scope) - shared)]
        before = scope


def _shared(a: list[str], b: list[str]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


def _shape(jaxpr: Jaxpr, site: Site) -> jax.ShapeDtypeStruct:
    lengths: list[int] = []
    for k in site.path[:-1]:
        eqn = opened(jaxpr)[0].eqns[k]
        if eqn.primitive.name == "scan":
            lengths.append(eqn.params["length"])
        jaxpr = inner_program(eqn)
    eqn = opened(jaxpr)[0].eqns[site.path[-1]]
    var = (eqn.invars if site.operand else eqn.outvars)[site.position]
    return jax.ShapeDtypeStruct((*lengths, *np.shape(var.aval)), var.aval.dtype)
