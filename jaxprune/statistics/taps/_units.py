"""Where a program sums over the units of groups.

What a unit does to the result, it does where its axis is summed away: in the products
and reductions that run over it. The labels that `trace` puts on every axis say where
that is, so these sites need no names.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune.core._groups import Group, Groups
from jaxprune.coupling._labels import Axis, Value, is_live
from jaxprune.coupling._solution import Solution
from jaxprune.coupling._solve import solve
from jaxprune.coupling._walk import Step, Walked, walk_program
from jaxprune.program._jaxprs import Program, variable_path
from jaxprune.program.primitives import Signature, declaration
from jaxprune.program.primitives import signature as signature_of
from jaxprune.statistics.taps._names import Kind, Naming, variable_kinds
from jaxprune.statistics.taps._program import Site, inner_program


class UnitSite(NamedTuple):
    """Where an equation sums over the units of a group.

    Attributes:
        site: the operand.
        axis: which axis of it the units are on.
        units: int ``[n]``, the unit of every position of the axis; the size of the
            group where a position is of no unit of it.
        product: is it one factor of a product (not a plain reduction)?
        data: does the operand depend on the arguments?
        shape: of the operand.
        steps: how often the equation runs: the lengths of the scans around it.
    """

    site: Site
    axis: int
    units: np.ndarray
    product: bool
    data: bool
    shape: tuple[int, ...]
    steps: int = 1


def unit_sites(
    program: Program, groups: Groups, chosen: Collection[str]
) -> dict[str, list[UnitSite]]:
    """For every chosen group, where a program sums over its units.

    Raises:
        ValueError: if the program has none of the parameters of a group, or sums over
            its units where taps cannot act.
    """
    paths = [path for path in map(variable_path, program.paths) if path is not None]
    ledger, walked = walk_program(program, len(paths))
    solution = solve(ledger)
    known = dict(zip(paths, walked.ins, strict=False))
    places = _Places(solution, groups, known)
    naming = Naming()
    naming.run(program.closed, variable_kinds(program), ())
    found: dict[str, list[UnitSite]] = {name: [] for name in chosen}
    for met in _summed(walked, naming.kinds, (), 1, None):
        within = None if met.within is None else {n for n, _ in places.on(met.within)}
        for name, units in places.on(met.value.axes[met.axis]):
            if name not in found or (within is not None and name not in within):
                continue
            if met.closed:
                raise ValueError(
                    f"group {name} is used inside {met.closed}, where taps cannot act"
                )
            if not _taken(found[name], met, units, groups[name].size):
                found[name].append(_site(met, units))
    return found


class _Met(NamedTuple):
    """An axis of an operand that an equation sums over."""

    site: Site
    value: Value
    axis: int
    product: bool
    data: bool
    steps: int
    closed: str | None  # the primitive around it that taps cannot enter
    within: Axis | None  # if given, only units that are on this axis too are summed


def _site(met: _Met, units: np.ndarray) -> UnitSite:
    shape = met.value.shape
    return UnitSite(met.site, met.axis, units, met.product, met.data, shape, met.steps)


def _taken(sites: list[UnitSite], met: _Met, units: np.ndarray, size: int) -> bool:
    """Has the other factor of the same product these units already?"""
    return any(
        site.site.path == met.site.path
        and site.site.position != met.site.position
        and np.isin(site.units[site.units < size], units).any()
        for site in sites
    )


def _summed(
    walked: Walked,
    kinds: Mapping[tuple[int, ...], list[Kind]],
    path: tuple[int, ...],
    steps: int,
    closed: str | None,
) -> Iterator[_Met]:
    """Every operand axis that some equation sums over; data before parameters."""
    numbers = {id(eqn): k for k, eqn in enumerate(walked.jaxpr.eqns)}
    for step in walked.steps:
        here = (*path, numbers.get(id(step.eqn), -1))
        name = step.eqn.primitive.name
        enters = inner_program(step.eqn) is not None
        times = step.eqn.params["length"] if name == "scan" else 1
        for sub in step.subs:
            inside = closed or (None if enters else name)
            yield from _summed(sub, kinds, here, steps * times, inside)
        known, signature = declaration(step.eqn), signature_of(step.eqn)
        if known is None or signature is None:
            continue
        found = [
            (k, axis)
            for k in range(len(step.ins))
            for axis in signature.contracted_axes(k)
        ]
        data = [kind.data for kind in kinds.get(here, [])] or [True] * len(step.ins)
        for k, axis in sorted(found, key=lambda pair: (not data[pair[0]], pair)):
            site, product = Site(here, k, operand=True), known.is_product
            within = _within(step, signature, k, axis)
            yield _Met(site, step.ins[k], axis, product, data[k], steps, closed, within)


def _within(step: Step, signature: Signature, k: int, axis: int) -> Axis | None:
    """Where an axis is summed over in part: an axis with the units that are.

    Of the channels that a grouped convolution takes in, it sums those of a group. The
    kernel's axis holds their units; those of whole groups pass through.
    """
    if len(signature.ins[k][axis]) == 1:
        return None
    gone = signature.contracted.intersection(signature.ins[k][axis])
    return next(step.ins[j].axes[d] for f, (j, d) in signature.alone() if f in gone)


class _Places:
    """Which unit of which group an atom of the solution is."""

    def __init__(
        self, solution: Solution, groups: Groups, known: Mapping[str, Value]
    ) -> None:
        self.solution, self.names = solution, list(groups)
        self.sizes = [group.size for group in groups.values()]
        self.group = np.full(len(solution.why), -1)
        self.unit = np.full(len(solution.why), -1)
        for number, group in enumerate(groups.values()):
            atoms = _atoms_of(solution, group, known)
            self.group[atoms] = number
            self.unit[atoms] = np.arange(group.size)

    def on(self, axis: Any) -> Iterator[tuple[str, np.ndarray]]:
        """The groups with units on an axis, and the unit of every position.

        A group comes twice where a position is of two of its units (a Gram matrix).
        """
        if not is_live(axis):
            return
        for column in axis:
            for atoms in self.solution.atoms(column.units):
                group = np.where(atoms >= 0, self.group[atoms], -1)
                for number in np.unique(group[group >= 0]):
                    none = self.sizes[number]
                    units = np.where(group == number, self.unit[atoms], none)
                    yield self.names[number], units


def _atoms_of(
    solution: Solution, group: Group, known: Mapping[str, Value]
) -> np.ndarray:
    """The atom of every unit: what is the same at all positions of the unit."""
    if group.layers > 1:
        raise ValueError(
            f"group {group.name} has units of its own in each of {group.layers} layers "
            "of a scan, whose values no tap sees one by one; trace without per_layer="
        )
    met = False
    for member in group.members:
        value = known.get(member.path, known.get(member.path.removeprefix("params/")))
        if value is None:
            continue
        met = True
        axis = value.axes[member.axis]
        for atoms in [] if isinstance(axis, int) else solution.atoms(axis[0].units):
            held = atoms[member.index]
            each = held[:, 0]
            same = bool((held == each[:, None]).all())
            if same and (each >= 0).all() and len(np.unique(each)) == len(each):
                return each
    paths = ", ".join(member.path for member in group.members)
    raise ValueError(
        f"group {group.name} cannot be found in the program: "
        + (f"{paths} have other units here" if met else f"it has none of {paths}")
        + "; were the groups traced for other variables?"
    )
