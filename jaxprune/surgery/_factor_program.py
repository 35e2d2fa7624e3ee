"""Writes a program anew with the factors of its kernels.

Equations that no kernel meets are copied. Calls that one does are written out; scans
and remats are traced again around what their programs became.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Literal, Var, jaxpr_as_fun

from jaxprune.core._types import Array
from jaxprune.program._interpret import inner_jaxprs
from jaxprune.program._jaxprs import Program, closed, opened, variable_path
from jaxprune.program._types import Equation, Jaxpr
from jaxprune.program._writer import Writer
from jaxprune.surgery._factor_forms import FactorKind, Form, form_of
from jaxprune.surgery._factor_steps import contract
from jaxprune.surgery._factor_walk import Follower, Held, Use, held


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """How a leaf is taken apart.

    Attributes:
        path: of the leaf.
        shape: of the leaf.
        kind: how the kernel is a matrix.
        basis_size: of a basis, or None.
        at: positions in the leaf, or in a layer of it, as contractions read it.
        lead: sizes of the axes in front that scans take apart.
        layer: the form that contractions see.
        shared: path of the leaf whose first factor this one has, too; itself otherwise.
    """

    path: str
    shape: tuple[int, ...]
    kind: FactorKind
    basis_size: int | None
    at: np.ndarray
    lead: tuple[int, ...]
    layer: Form
    shared: str

    @property
    def form(self) -> Form:
        """Of the whole leaf."""
        return self.layer.of_layers(self.lead)

    def matrices(self, leaf: Array) -> Any:
        """The leaf as ``[matrices, rows, columns]``."""
        layers = leaf.reshape(*self.lead, -1)
        return self.form.matrices(layers[..., self.at])

    def leaf(self, matrices: Array) -> Any:
        """The inverse of `matrices`."""
        layers = self.form.whole(matrices).reshape(*self.lead, -1)
        back = np.empty(self.at.size, self.at.dtype)
        back[self.at.ravel()] = np.arange(self.at.size)
        return layers[..., back].reshape(self.shape)


def split_of(
    path: str,
    shape: tuple[int, ...],
    uses: Sequence[Use],
    kind: FactorKind,
    basis_size: int | None,
) -> Split | str:
    """How a leaf that these contractions read is taken apart, or why it is not."""
    first = uses[0]
    form = form_of(first.eqn, first.operand, kind, basis_size)
    if isinstance(form, str):
        return form
    split = Split(path, shape, kind, basis_size, first.at, first.lead, form, path)
    if not all(_fits(split, use.eqn, use.operand, use.at, use.lead) for use in uses):
        return "read along different axes by several contractions"
    return split


def _fits(
    split: Split, eqn: Equation, operand: int, at: np.ndarray, lead: tuple[int, ...]
) -> bool:
    form = form_of(eqn, operand, split.kind, split.basis_size)
    return form == split.layer and lead == split.lead and np.array_equal(at, split.at)


def rewritten(program: Program, splits: Mapping[str, Split], factors: Any) -> Any:
    """The program on factors, as a closed jaxpr.

    Its inputs are those of the program, with two in place of every leaf that is split:
    both factors, or the second where the first is shared.

    Args:
        program: the program on whole leaves.
        splits: path -> how the leaf is taken apart.
        factors: path -> the factors that this leaf has, arrays or shapes.
    """
    writer = _Rewriter(splits)
    atoms: dict[str, list[Any]] = {}
    for path, var in zip(program.paths, program.jaxpr.invars, strict=True):
        own = variable_path(path)
        shapes = [var.aval.shape]
        if own is not None and own in splits:
            shapes = list(map(np.shape, factors[own]))
        atoms[path] = [writer.resized(var, shape) for shape in shapes]
    by_leaf = {variable_path(path): each for path, each in atoms.items()}
    ins: list[Any] = []
    for path, each in atoms.items():
        own = variable_path(path)
        split = splits.get(own or "")
        ins.append(each[0] if split is None else writer.held(split, by_leaf))
    outs = writer.run(program.closed, ins)
    return writer.closed(
        program.jaxpr, [x for each in atoms.values() for x in each], outs
    )


class _Rewriter(Follower):
    """Writes the equations."""

    def __init__(self, splits: Mapping[str, Split]) -> None:
        self.splits = splits
        self.writer = Writer()
        self.resized = self.writer.resized

    def held(self, split: Split, atoms: Mapping[Any, list[Any]]) -> Held:
        """A leaf that comes as factors."""
        both = atoms[split.shared][0], atoms[split.path][-1]
        return held(split.path, split.shape)._replace(atoms=both)

    def closed(self, like: Jaxpr, ins: Sequence[Any], outs: Sequence[Any]) -> Any:
        """What was written, from these inputs."""
        self.leave(outs, "the function")
        writer = self.writer
        writer.drop_unread(outs)
        consts = list(writer.consts.items())
        return closed(like, consts, ins, outs, writer.eqns, writer.effects)

    def constant(self, var: Any, arrays: dict[Any, Any]) -> Any:
        if isinstance(var, Literal):
            return var
        return self.writer.constant(arrays[var], var.aval)

    def other(self, eqn: Equation, values: list[Any]) -> Sequence[Any]:
        shapes = [getattr(var.aval, "shape", ()) for var in eqn.outvars]
        return self.writer.copied(eqn, values, shapes, eqn.params)

    def move(self, eqn: Equation, own: Held, at: np.ndarray) -> Held:
        if eqn.primitive.name != "convert_element_type":
            return own._replace(at=at)
        dtype = eqn.params["new_dtype"]

        def cast(*factors: jax.Array) -> list[jax.Array]:
            return [lax.convert_element_type(x, dtype) for x in factors]

        made = self.writer.traced(cast, own.atoms, eqn)
        return own._replace(at=at, atoms=tuple(made))

    def product(
        self, eqn: Equation, operand: int, own: Held, other: Any
    ) -> Sequence[Any]:
        split = self.splits[own.path]
        if not _fits(split, eqn, operand, own.at, own.lead):
            line = f"{eqn.primitive.name} reads it along other axes"
            self.refuse(own.path, f"{line} than when it was factorised")

        def both(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
            return contract(eqn, operand, split.layer, x, first, second)

        with eqn.ctx.manager:
            return self.writer.traced(both, [other, *own.atoms], eqn)

    def remat(self, eqn: Equation, values: list[Any]) -> Sequence[Any]:
        p = eqn.params
        body = self._inner(inner_jaxprs(eqn)[0], values, len(values))
        options = {"prevent_cse": p["prevent_cse"], "policy": p["policy"]}
        return self.writer.traced(jax.checkpoint(body, **options), _flat(values), eqn)

    def scan(
        self, eqn: Equation, values: list[Any], consts: int, carries: int
    ) -> Sequence[Any]:
        p = eqn.params
        body = self._inner(inner_jaxprs(eqn)[0], values, consts + carries)
        n = len(_flat(values[:consts]))
        names = ("length", "reverse", "unroll", "_split_transpose")
        options = {name: p[name] for name in names if name in p}

        def run(*xs: jax.Array) -> list[Any]:
            def step(carry: Any, stacked: Any) -> Any:
                outs = body(*xs[:n], *carry, *stacked)
                return outs[:carries], outs[carries:]

            whole = list(xs[n : n + carries]), list(xs[n + carries :])
            carry, made = lax.scan(step, *whole, **options)
            return [*carry, *made]

        return self.writer.traced(run, _flat(values), eqn)

    def _inner(self, jaxpr: Jaxpr, values: Sequence[Any], stacked: int) -> Any:
        """An inner program as a function of arrays; from `stacked` on, of one layer."""
        inner = _Rewriter(self.splits)
        ins = []
        for k, (value, var) in enumerate(
            zip(values, opened(jaxpr)[0].invars, strict=True)
        ):
            if not isinstance(value, Held):
                ins.append(self.resized(var, var.aval.shape))
                continue
            drop = 1 if k >= stacked else 0
            shapes = [atom.aval.shape[drop:] for atom in value.atoms]
            avals: list[Any] = [
                atom.aval.update(shape=shape)
                for atom, shape in zip(value.atoms, shapes, strict=True)
            ]
            value = value.layer() if drop else value
            ins.append(value._replace(atoms=tuple(map(Var, avals))))
        outs = inner.run(jaxpr, ins)
        return jaxpr_as_fun(inner.closed(opened(jaxpr)[0], _flat(ins), outs))

    def refuse(self, path: str, why: str) -> None:
        raise ValueError(
            f"{path} was factorised, but in this call of the function it is {why}"
        )


def _flat(values: Sequence[Any]) -> list[Any]:
    """Atoms, with the factors of kernels side by side."""
    return [
        atom
        for value in values
        for atom in (value.atoms if isinstance(value, Held) else (value,))
    ]
