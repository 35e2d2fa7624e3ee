"""The contractions of a program, by the parameter that each reads.

Dense layers, convolutions, einsums, the projections of attention, banks of experts and
layers under a scan are one thing: activations summed against a parameter that is used
as it is, or moved. Positions of the parameter say which entry is which weight.
"""

import dataclasses
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._groups import Groups
from jaxprune.core._types import Array
from jaxprune.program._interpret import CALLS, REMATS, inner_jaxprs, interpret
from jaxprune.program._jaxprs import (
    Program,
    live_equations,
    opened,
    scan_counts,
    source_line,
    variable_path,
)
from jaxprune.program._types import Equation, Jaxpr
from jaxprune.program.primitives import declaration
from jaxprune.statistics._layout import as_matrices, as_rows, can_read, columns
from jaxprune.statistics._moved import moved
from jaxprune.statistics.taps._program import Site, Tap


class Bias(NamedTuple):
    """What is added to the outputs of a contraction.

    Attributes:
        path: the leaf.
        at: int ``[K, N]``, the position of every output's bias in the flattened leaf.
        sign: 1 if it is added, -1 if it is subtracted, as the running mean of a
            BatchNorm is.
    """

    path: str
    at: np.ndarray
    sign: int


class Stage(NamedTuple):
    """Blocks of a contraction that are met at one moment of the program.

    Attributes:
        order: of the stages of all contractions.
        blocks: the numbers, below K, that are met first at this stage.
        before: the leaves of the contractions that their inputs depend on.
    """

    order: int
    blocks: np.ndarray
    before: frozenset[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Contraction:
    """A sum of activations weighed by a parameter.

    Attributes:
        name: the path of the parameter; further contractions of other parts of it are
            ``"path#2"`` and so on.
        path: of the parameter.
        at: int ``[K, D, N]``, positions in the flattened parameter: of K matrices (1
            for a dense layer; the groups of a convolution, the experts of a bank, the
            layers under a scan) the weights of D inputs for N outputs.
        sites: where the activation is -> for everything that is met there, in the order
            of the rows, which of the K matrices it is multiplied with.
        bias: what is added to the outputs, if that is a parameter of its own.
        stages: when the program meets which of the matrices.
        shared: why the parameter cannot be changed for this contraction alone, or "".
        recurrent: do its inputs depend on what it made of earlier ones?
    """

    name: str
    path: str
    at: np.ndarray
    sites: Mapping[Site, np.ndarray]
    bias: Bias | None
    stages: tuple[Stage, ...]
    shared: str = ""
    recurrent: bool = False

    def taps(self) -> list[Tap]:
        """Taps that note the rows at every site."""
        return [
            Tap(site, functools.partial(_look, 1 - site.position), site)
            for site in self.sites
        ]

    def rows(self, notes: Mapping[Site, jax.Array]) -> jax.Array:
        """The inputs from the notes of the taps: ``[K, rows, D]``."""
        found = []
        for site, blocks in self.sites.items():
            _, n, width = (1, *notes[site].shape)[-3:]
            each = notes[site].reshape(len(blocks), n, width)
            if not np.array_equal(blocks, np.arange(len(self.at))):
                # Blocks may be met in any order, each several times: gathered block by
                # block.
                each = each[np.argsort(blocks, kind="stable")]
            found.append(each.reshape(len(self.at), -1, width))
        return jnp.concatenate(found, 1) if len(found) > 1 else found[0]

    def kernel(self, leaf: Array) -> Any:
        """The matrices ``[K, D, N]`` of the parameter's value."""
        return leaf.reshape(-1)[self.at]

    def fixed(self, leaf: Array) -> str:
        """Why this value of the parameter cannot be changed for it alone, or ""."""
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return f"its dtype is {leaf.dtype}, no floating point"
        return self.shared and f"it is also {self.shared}"

    def units(self, groups: Groups) -> dict[str, np.ndarray]:
        """Group -> int ``[K, D]``, the unit of every input; -1 where it has none.

        Of the groups that this contraction sums over.
        """
        shape = groups.shapes.get(self.path)
        if shape is None:
            return {}
        first, last = (np.unravel_index(self.at[:, :, n], shape) for n in (0, -1))
        found: dict[str, np.ndarray] = {}
        for name, group in groups.items():
            for member in group.members:
                if member.layers is not None:
                    continue  # the kernel of a layer is no parameter as it is
                along = first[member.axis] if member.path == self.path else None
                if along is None or not np.array_equal(along, last[member.axis]):
                    continue
                if (along == along[:, :1]).all():
                    continue  # every input of a matrix has the same position
                unit = np.full(shape[member.axis], -1)
                unit[member.index] = np.arange(group.size)[:, None]
                found[name] = np.maximum(found.get(name, -1), unit[along])
        return found


def _look(
    operand: int, value: jax.Array, eqn: Equation, operands: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    del operands
    return value, as_rows(eqn, operand, value)


def contractions(program: Program) -> dict[str, Contraction]:
    """Every contraction of a program that reads a parameter, in its order.

    Args:
        program: traced; the leaves of its first argument are the parameters.
    """
    walk = _Walk(program)
    found = sorted(_assembled(walk), key=lambda one: one.stages[0].order)
    return {one.name: one for one in found}


class _Held(NamedTuple):
    """Entries of a leaf, by their positions."""

    path: str
    at: np.ndarray


class _Joined(NamedTuple):
    """Entries of several leaves side by side, by their positions in all of them."""

    at: np.ndarray


class _Data(NamedTuple):
    """Any other value: what it depends on, and which outputs of a contraction it is."""

    before: frozenset[str] = frozenset()
    use: int | None = None
    at: np.ndarray | None = None


_Value: TypeAlias = _Held | _Joined | _Data


@dataclasses.dataclass
class _Use:
    """One meeting of an equation with a parameter.

    Attributes:
        site: the activation.
        steps: of the scans around it.
        path: of the parameter.
        at: its matrices.
        before: what the activation depends on.
        bias: path, positions, sign, and the equation that adds it.
        readers: how many equations read the result, moved or not.
        moves: how many of these only move it.
    """

    site: Site
    steps: tuple[int, ...]
    path: str
    at: np.ndarray
    before: frozenset[str]
    bias: tuple[str, np.ndarray, int, tuple[int, ...]] | None = None
    readers: int = 0
    moves: int = 0


class _Walk:
    """Follows positions through a program.

    Attributes:
        uses: the contractions met, in order; a scan meets its own once a step.
        others: path -> what else uses the parameter.
        biases: path -> the equations that add it to outputs.
        sizes: path -> size of every leaf.
        starts: path -> where every leaf starts if all are laid end to end.
        steps: of the scans around what is met now.
    """

    def __init__(self, program: Program) -> None:
        self.uses: list[_Use] = []
        self.others: dict[str, str] = {}
        self.biases: dict[str, set[tuple[int, ...]]] = {}
        self.sizes: dict[str, int] = {}
        self.starts: dict[str, int] = {}
        self.steps: tuple[int, ...] = ()
        ins: list[_Value] = []
        for path, var in zip(program.paths, program.jaxpr.invars, strict=True):
            own = variable_path(path)
            if own is None:
                ins.append(_Data())
                continue
            self.starts[own] = sum(self.sizes.values())
            self.sizes[own] = var.aval.size
            small = np.int32 if var.aval.size < 2**31 else np.int64
            at = np.arange(var.aval.size, dtype=small).reshape(var.aval.shape)
            ins.append(_Held(own, at))
        for value in self.run(program.closed, ins, ()):
            self.read_elsewhere(value, "returned by the function")

    def run(
        self, jaxpr: Jaxpr, ins: Sequence[_Value], path: tuple[int, ...]
    ) -> list[_Value]:
        jaxpr, _ = opened(jaxpr)
        live = {id(eqn) for eqn in live_equations(jaxpr)}

        def step(number: int, eqn: Equation, values: list[_Value]) -> Sequence[_Value]:
            if id(eqn) not in live:
                return [_Data()] * len(eqn.outvars)
            return self.equation(eqn, values, (*path, number))

        return interpret(jaxpr, ins, step, lambda var: _Data())

    def equation(
        self, eqn: Equation, values: list[_Value], path: tuple[int, ...]
    ) -> Sequence[_Value]:
        name = eqn.primitive.name
        if name in CALLS | REMATS:
            return self.run(inner_jaxprs(eqn)[0], values, path)
        if name == "scan":
            return self.scan(eqn, values, path)
        for made in (self.product, self.move, self.join, self.shift):
            found = made(eqn, values, path)
            if found is not None:
                return found
        for value in values:
            self.read_elsewhere(value, self.place(eqn))
        return [_Data(_before(values))] * len(eqn.outvars)

    def scan(
        self, eqn: Equation, values: list[_Value], path: tuple[int, ...]
    ) -> list[_Value]:
        consts, carries = scan_counts(eqn.params)
        carry, stacked = values[consts : consts + carries], values[consts + carries :]
        for value in carry:
            self.read_elsewhere(value, self.place(eqn))
        # A parameter that is carried may change from step to step: it is data from here
        # on.
        carry = [_Data(_before([value])) for value in carry]
        length, body = eqn.params["length"], inner_jaxprs(eqn)[0]
        made: list[_Value] = []
        steps = range(length)
        for k in reversed(steps) if eqn.params["reverse"] else steps:
            xs = [
                value._replace(at=value.at[k])
                if isinstance(value, _Held | _Joined)
                else _Data(value.before)
                for value in stacked
            ]
            self.steps = (*self.steps, k)
            outs = self.run(body, [*values[:consts], *carry, *xs], path)
            self.steps = self.steps[:-1]
            for value in outs:
                self.read_elsewhere(value, self.place(eqn))
            after: list[_Value] = [_Data(_before([value])) for value in outs]
            carry, made = after[:carries], after[carries:] or made
        for value in stacked:
            if not isinstance(value, _Held | _Joined):
                self.read_elsewhere(value, self.place(eqn))
        return [*carry, *(made or [_Data()] * (len(eqn.outvars) - carries))]

    def product(
        self, eqn: Equation, values: list[_Value], path: tuple[int, ...]
    ) -> list[_Value] | None:
        known = declaration(eqn)
        if known is None or not known.is_product or len(values) != 2:
            return None
        held = [k for k in (0, 1) if isinstance(values[k], _Held | _Joined)]
        if len(held) != 1 or not can_read(eqn, held[0]):
            return None
        [k] = held
        own, other = values[k], values[1 - k]
        assert not isinstance(own, _Data) and isinstance(other, _Data)
        site = Site(path, 1 - k, operand=True)
        at = as_matrices(eqn, k, own.at)
        if isinstance(own, _Joined):
            return self.products(at, site, other)
        self.read_elsewhere(other, "")
        self.uses.append(_Use(site, self.steps, own.path, at, other.before))
        before = other.before | {own.path}
        return [_Data(before, len(self.uses) - 1, columns(eqn, k))]

    def products(self, at: np.ndarray, site: Site, other: _Data) -> list[_Value] | None:
        """Of one matrix whose columns are of several leaves: a contraction of each."""
        found = list(self.owners(at))
        parts = [(own, part) for own, part in found if part is not None]
        if len(parts) < len(found):
            return None
        self.read_elsewhere(other, "")
        for own, part in parts:
            self.uses.append(_Use(site, self.steps, own, part, other.before))
        return [_Data(other.before | {own for own, _ in parts})]

    def owners(self, at: np.ndarray) -> Iterator[tuple[str, np.ndarray | None]]:
        """Leaf -> its columns of ``[K, D, N]``, of its own positions.

        None if it does not have columns of its own, each once.
        """
        paths, starts = list(self.starts), np.array(list(self.starts.values()))
        # Of leaves without entries, which start where the next does, the last is meant.
        owner = np.searchsorted(starts, at, side="right") - 1
        for number in np.unique(owner):
            own = owner == number
            columns = own.any((0, 1))
            part = at[:, :, columns] - starts[number]
            alone = own.all((0, 1))[columns].all()
            alone = alone and len(np.unique(part)) == part.size
            yield paths[number], part if alone else None

    def join(
        self, eqn: Equation, values: list[_Value], path: tuple[int, ...]
    ) -> list[_Value] | None:
        """Parameters that are laid side by side, as those of gates are."""
        if eqn.primitive.name != "concatenate" or len(values) < 2:
            return None
        held = [value for value in values if not isinstance(value, _Data)]
        if len(held) < len(values):
            return None
        parts = [
            value.at.astype(np.int64)
            + (self.starts[value.path] if isinstance(value, _Held) else 0)
            for value in held
        ]
        return [_Joined(np.concatenate(parts, eqn.params["dimension"]))]

    def move(
        self, eqn: Equation, values: list[_Value], path: tuple[int, ...]
    ) -> list[_Value] | None:
        at = getattr(values[0], "at", None) if values else None
        if at is None or any(getattr(v, "at", None) is not None for v in values[1:]):
            return None
        outs = moved(eqn, at)
        if outs is None:
            return None
        if isinstance(values[0], _Data):
            if len(outs) > 1:
                return None
            use = self.uses[values[0].use or 0]
            use.readers, use.moves = use.readers + 1, use.moves + 1
        return [values[0]._replace(at=out) for out in outs]

    def shift(
        self, eqn: Equation, values: list[_Value], path: tuple[int, ...]
    ) -> list[_Value] | None:
        """Outputs of a contraction that meet their bias."""
        name = eqn.primitive.name
        if name not in ("add", "add_any", "sub"):
            return None
        kinds = [isinstance(value, _Held) for value in values]
        if sum(kinds) != 1 or (name == "sub" and not kinds[1]):
            return None
        own, data = values[kinds.index(True)], values[kinds.index(False)]
        if not isinstance(data, _Data) or data.at is None or data.use is None:
            return None
        assert isinstance(own, _Held)
        use = self.uses[data.use]
        use.readers += 1
        self.biases.setdefault(own.path, set()).add(path)
        shape = eqn.outvars[0].aval.shape
        found = _by_column(data.at, own.at, shape, use.at.shape)
        if found is None:
            self.others[own.path] = self.place(eqn)
        else:
            use.bias = (own.path, found, -1 if name == "sub" else 1, path)
        return [_Data(data.before)]

    def read_elsewhere(self, value: _Value, where: str) -> None:
        """Notes that a value is used as what it is."""
        if isinstance(value, _Held):
            self.others.setdefault(value.path, where)
        elif isinstance(value, _Joined):
            for own, _ in self.owners(value.at.reshape(1, 1, -1)):
                self.others.setdefault(own, where)
        elif value.use is not None:
            self.uses[value.use].readers += 1

    def place(self, eqn: Equation) -> str:
        line = source_line(eqn)
        return f"used by {eqn.primitive.name}" + (f" at {line}" if line else "")


def _before(values: Sequence[object]) -> frozenset[str]:
    found = [v.before for v in values if isinstance(v, _Data)]
    return frozenset().union(*found)


def _by_column(
    column: np.ndarray, at: np.ndarray, shape: Any, sizes: Any
) -> np.ndarray | None:
    """The one position that meets every column, each its own; None if it is not so."""
    both = np.broadcast_arrays(np.broadcast_to(column, shape), at)
    # Along axes where neither changes one entry says all.
    still = [a == b == 0 for a, b in zip(*(x.strides for x in both), strict=True)]
    once = tuple([slice(0, 1) if same else slice(None) for same in still])
    column, at = (x[once].ravel() for x in both)
    k, _, n = sizes
    found = np.full(k * n, -1)
    found[column] = at
    alone = len(np.unique(found)) == len(found) and (found >= 0).all()
    return found.reshape(k, n) if alone and (found[column] == at).all() else None


def _assembled(walk: _Walk) -> Iterator[Contraction]:
    """Uses of the same matrices, put together."""
    by_path: dict[str, list[tuple[int, _Use]]] = {}
    for order, use in enumerate(walk.uses):
        by_path.setdefault(use.path, []).append((order, use))
    for path, uses in by_path.items():
        parts = _parts(uses)
        shared = walk.others.get(path, "")
        if not shared and _overlap(walk.sizes[path], parts):
            shared = "read along different axes by several contractions"
        for k, (numbers, part) in enumerate(parts):
            name = f"{path}#{k + 1}" if k else path
            yield _contraction(walk, name, numbers, part, shared)


Part = tuple[dict[Hashable, int], list[tuple[int, _Use]]]


def _parts(uses: list[tuple[int, _Use]]) -> list[Part]:
    """Sites that meet the same matrices, with a number for each of these."""
    sites: dict[Site, list[tuple[int, _Use]]] = {}
    for order, use in uses:
        sites.setdefault(use.site, []).append((order, use))
    found: dict[frozenset[Hashable], Part] = {}
    for each in sites.values():
        numbers: dict[Hashable, int] = {}
        for _, use in sorted(each, key=lambda pair: pair[1].steps):
            for key in map(_key, use.at):
                numbers.setdefault(key, len(numbers))
        found.setdefault(frozenset(numbers), (numbers, []))[1].extend(each)
    return list(found.values())


def _key(block: np.ndarray) -> Hashable:
    """Two matrices of one leaf with the same key hold the same weights."""
    corners = block[0, 0], block[0, -1], block[-1, 0], block[-1, -1]
    return (*map(int, corners), block.shape)


def _overlap(size: int, parts: Sequence[Part]) -> bool:
    """Is any entry two weights, so that one cannot change without the other?"""
    taken, weights = np.zeros(size, bool), 0
    for _, uses in parts:
        blocks = {_key(block): block for _, use in uses for block in use.at}
        for block in blocks.values():
            taken[block] = True
            weights += block.size
    return int(taken.sum()) < weights


def _contraction(
    walk: _Walk,
    name: str,
    numbers: dict[Hashable, int],
    uses: Sequence[tuple[int, _Use]],
    shared: str,
) -> Contraction:
    first = uses[0][1].at
    at = np.zeros((len(numbers), *first.shape[1:]), first.dtype)
    stages, seen, recurrent = [], set(), False
    for order, use in sorted(uses, key=lambda pair: pair[0]):
        blocks = [numbers[_key(block)] for block in use.at]
        at[blocks] = use.at
        recurrent |= use.path in use.before and not seen.isdisjoint(blocks)
        if new := [k for k in dict.fromkeys(blocks) if k not in seen]:
            stages.append(Stage(order, np.array(new), use.before))
        seen.update(blocks)
    sites: dict[Site, list[int]] = {}
    for _, use in sorted(uses, key=lambda pair: pair[1].steps):
        met = sites.setdefault(use.site, [])
        met += [numbers[_key(block)] for block in use.at]
    for met in sites.values():
        if len(set(np.bincount(met, minlength=len(numbers)).tolist())) > 1:
            shared = shared or "met a different number of times by its parts"
    held = {site: np.array(met) for site, met in sites.items()}
    bias = _bias(walk, numbers, [use for _, use in uses])
    path = uses[0][1].path
    return Contraction(name, path, at, held, bias, tuple(stages), shared, recurrent)


def _bias(
    walk: _Walk, numbers: dict[Hashable, int], uses: Sequence[_Use]
) -> Bias | None:
    """The bias of all uses, if each has the same and nothing else reads either."""
    found = [use.bias for use in uses if use.bias is not None]
    if len(found) < len(uses) or len({(b[0], b[2]) for b in found}) > 1:
        return None
    leaf, own, sign, _ = found[0]
    at = np.full((len(numbers), own.shape[1]), -1)
    for use, (_, own, _, _) in zip(uses, found, strict=True):
        blocks = [numbers[_key(block)] for block in use.at]
        if not ((at[blocks] == -1) | (at[blocks] == own)).all():
            return None
        at[blocks] = own
    alone = all(use.readers == use.moves + 1 for use in uses)
    alone = alone and walk.biases[leaf] == {b[3] for b in found}
    alone = alone and leaf not in walk.others
    return Bias(leaf, at, sign) if alone and len(np.unique(at)) == at.size else None
