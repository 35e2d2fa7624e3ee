"""Slimmable networks: one set of weights, several widths, chosen at run time."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.core._checks import refuse_traced
from jaxprune.core._functions import check_function
from jaxprune.core._groups import Groups
from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import expand_masks, pair_masks
from jaxprune.core._members import refuse_layers
from jaxprune.core._names import listed, matching, nearest, patterns
from jaxprune.core._positions import axis_keep
from jaxprune.core._types import ApplyFn, Array, PyTree
from jaxprune.narrowing._narrow import narrow
from jaxprune.search._nesting import nested, sorted_keeps
from jaxprune.search._prefixes import Runs, put, take
from jaxprune.surgery._permuting import permute
from jaxprune.surgery._slicing import slice_params


class Width(NamedTuple):
    """One width by itself.

    Attributes:
        apply_fn: the function narrowed to this width.
        variables: its variables, of the sizes of this width.
    """

    apply_fn: ApplyFn
    variables: PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Slimmable:
    """A network that runs at several widths; made by `slimmable`.

    ``slim[i]`` is the function ``(variables, *args, **kwargs)`` at width i, for
    variables of the structure of `variables`; ``len(slim)`` is the number of widths.
    Iterating gives the functions, the widest first.

    Attributes:
        variables: one tree for all widths: the leaves of the widest network, units
            sorted. A private leaf is a tuple of arrays, one for every width.
        groups: what the program was traced to.
        order: group name -> int ``[size]``, the old unit at every place.
        sizes: for every width, group name -> how many units stay.
        masks: for every width, of the network with its units sorted.
        private: paths of the private leaves.
    """

    variables: PyTree
    groups: Groups
    order: Mapping[str, np.ndarray]
    sizes: tuple[Mapping[str, int], ...]
    masks: tuple[PyTree, ...]
    private: tuple[str, ...]
    _widths: tuple["_Width", ...]

    def __len__(self) -> int:
        return len(self._widths)

    def __getitem__(self, i: int) -> ApplyFn:
        return self._widths[self._number(i)].run

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return (width.run for width in self._widths)

    def __repr__(self) -> str:
        units = [sum(each.values()) for each in self.sizes]
        return (
            f"Slimmable({len(self)} widths of {listed(list(map(str, units)))} units in "
            f"{len(self.order)} groups, {len(self.private)} private leaves)"
        )

    def at(self, i: int, variables: PyTree = None) -> Width:
        """One width as a network of its own.

        Args:
            i: number of the width, 0 for the widest.
            variables: of all widths; None for those it was made with.

        Returns:
            The narrowed function and its variables.
        """
        width = self._widths[self._number(i)]
        given = self.variables if variables is None else variables
        return Width(width.apply_fn, width.cut(given))

    def write(self, variables: PyTree, i: int, new: Mapping[str, Array]) -> PyTree:
        """Puts new values of one width where it reads them.

        What a network returns of its collections at width i (``mutable=``) has the
        sizes of this width. Private leaves are replaced; of shared leaves the part
        that the width reads.

        Args:
            variables: of all widths.
            i: number of the width.
            new: mapping of collections, such as ``{"batch_stats": ...}``, with the
                leaves to replace.

        Returns:
            Variables of all widths; jit-able.

        Raises:
            ValueError: if a leaf does not exist or has another shape.
        """
        return self._widths[self._number(i)].write(variables, named_leaves(new))

    def switch(
        self, i: object, variables: PyTree, *args: PyTree, **kwargs: PyTree
    ) -> Any:
        """Runs the width whose number is only known at run time.

        All widths are compiled into one program, of which `lax.switch` runs one.

        Args:
            i: int scalar, may be traced; clamped to the widths there are.
            variables: of all widths.
            *args: of the function.
            **kwargs: of the function; what is no array is static.
        """

        def branch(run: Callable[..., object]) -> ApplyFn:
            return lambda variables, args: run(variables, *args, **kwargs)

        number = jnp.asarray(i, jnp.int32)
        return jax.lax.switch(number, [branch(run) for run in self], variables, args)

    def compile(
        self, *args: PyTree, **kwargs: PyTree
    ) -> tuple[Callable[..., Any], ...]:
        """Compiles every width ahead of time, for arguments of these shapes.

        Args:
            *args: example arguments after the variables, arrays or ShapeDtypeStructs.
            **kwargs: keyword arguments, which are part of the programs.

        Returns:
            For every width a compiled function ``(variables, *args)`` that never
            compiles again: it raises on other shapes.
        """
        refuse_traced("compile", args=args)

        def compiled(run: Callable[..., object]) -> ApplyFn:
            def call(variables: PyTree, *args: PyTree) -> Any:
                return run(variables, *args, **kwargs)

            return jax.jit(call).lower(self.variables, *args).compile()

        return tuple(map(compiled, self))

    def _number(self, i: int) -> int:
        if isinstance(i, Tracer):
            raise TypeError(
                "the number of a width is traced, but it chooses a program: make it "
                "static (static_argnums), or call slim.switch(i, variables, *args)"
            )
        if not -len(self) <= i < len(self):
            raise IndexError(f"width {i} of {len(self)} widths, 0 (the widest) and up")
        return i % len(self)


def slimmable(
    apply_fn: ApplyFn,
    variables: PyTree,
    keeps: Sequence[Mapping[str, Array]],
    *,
    groups: Groups,
    order: Mapping[str, Array] | None = None,
    private: str | Sequence[str] = (),
) -> Slimmable:
    r"""Makes one set of weights run at several widths.

    The units of every group are sorted, so that every width keeps a prefix of them
    (slimmable channel sorting) and its kernels are prefix slices of the widest ones:
    changing the width moves no weight. With :math:`n_i` units of a group at width i,

    .. math:: W^{(i)} = W[\,:n_i^{out},\; :n_i^{in}\,].

    Width i computes what the pruned network computes that it stands for:
    ``slim[i](slim.variables, *args)`` equals ``narrow(apply_fn, masks)(slice_params(
    variables, masks), *args)`` for the masks of ``keeps[i]``.

    Args:
        apply_fn: the function; its first argument is the variables.
        variables: its variables, concrete.
        keeps: the widths, the widest first: group name -> bool ``[size]``, True =
            kept, or a count: the units that matter most, by `order`. All widths name
            the same groups, and each keeps a part of what the one before keeps.
            Groups that are not named are whole at every width.
        groups: what `trace` returned. Units that may not be permuted keep their order:
            of these a width keeps the first. A writer of a stream (see `writers` of
            `trace`) keeps any of its units, in the order of the stream; its kernels
            are then as many slices as there are runs of them, and its result is put
            into the stream by index. See `search.fused`.
        order: group name -> float ``[size]``, larger matters more; what a count keeps.
            Missing groups are rated by the scale of their BatchNorm, or else by the
            L2 norm of their weights.
        private: paths or patterns (as `fnmatch`) of leaves of which every width has
            its own, ``"batch_stats/*"`` for BatchNorm statistics (SP-Net), with
            ``"params/*/bn*"`` for all of BatchNorm (S-Net). They start as slices of
            the widest.

    Returns:
        A `Slimmable`. It holds the weights of the widest network and the private
        leaves, nothing else.

    Raises:
        ValueError: if widths do not nest, a group is missing from one of them, a count
            is out of range, units that may not be permuted would have to be, or a
            pattern of `private` matches no leaf. The text names the group and width.
        TypeError: if a width is neither bools nor a count, or values are traced.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.arange(12.0).reshape(3, 4), "w2": jnp.ones((4, 2))}
        >>> x = jnp.ones((1, 3))
        >>> groups = jaxprune.trace(mlp, params, x)
        >>> slim = jaxprune.slimmable(mlp, params, [{"w1:1": 4}, {"w1:1": 2}],
        ...                           groups=groups)
        >>> slim.variables["w1"][0]  # the most important units come first
        Array([3., 2., 1., 0.], dtype=float32)
        >>> slim[0](slim.variables, x), slim[1](slim.variables, x)
        (Array([[66., 66.]], dtype=float32), Array([[39., 39.]], dtype=float32))

    References:
        Yu et al., `Slimmable Neural Networks <https://arxiv.org/abs/1812.08928>`_, 2018
        (S-Net)

        Kuratsu and Nakamura, `Slimmable Pruned Neural Networks
        <https://arxiv.org/abs/2212.03415>`_, 2022 (SP-Net)
    """
    check_function(apply_fn)
    refuse_traced("slimmable", variables=variables, keeps=keeps, order=order)
    widths = nested(groups, variables, keeps, order)
    keeps = sorted_keeps(groups, widths)
    masks = tuple(expand_masks(groups, keep) for keep in keeps)
    own = _private_paths(groups, private)
    sorted_ones = permute(variables, groups, widths.order)
    stored = named_leaves(slice_params(sorted_ones, masks[0]))
    made = []
    for mask in masks:
        cuts = _cuts(groups, masks[0], mask)
        made.append(_Width(groups, len(made), own, cuts, narrow(apply_fn, mask)))
    leaves = [
        _own_copies(leaf, path, made) if path in own else leaf
        for path, leaf in zip(groups.shapes, stored.values(), strict=True)
    ]
    return Slimmable(
        groups.treedef.unflatten(leaves),
        groups,
        widths.order,
        widths.counts,
        masks,
        tuple(path for path in groups.shapes if path in own),
        tuple(made),
    )


class _Width:
    """One width: where it reads every leaf, and its function.

    Attributes:
        cuts: path -> the positions that it reads of the leaf.
        apply_fn: the function narrowed to this width.
    """

    def __init__(
        self,
        groups: Groups,
        number: int,
        private: frozenset[str],
        cuts: Mapping[str, Sequence[Runs]],
        apply_fn: ApplyFn,
    ) -> None:
        self.cuts, self.apply_fn = cuts, apply_fn
        self._groups, self._number, self._private = groups, number, private

    def run(self, variables: PyTree, *args: PyTree, **kwargs: PyTree) -> Any:
        """The function at this width, for variables of all widths."""
        return self.apply_fn(self.cut(variables), *args, **kwargs)

    def cut(self, variables: PyTree) -> PyTree:
        """The variables of this width."""
        leaves = [
            leaf[self._number]
            if path in self._private
            else (take(leaf, self.cuts[path]) if self.cuts[path] else leaf)
            for path, leaf in self._named(variables).items()
        ]
        return self._groups.treedef.unflatten(leaves)

    def write(self, variables: PyTree, new: Mapping[str, Array]) -> PyTree:
        """The variables of all widths with new values of this one."""
        leaves = self._named(variables)
        for path, value in new.items():
            if path not in leaves:
                raise ValueError(
                    f"width {self._number} has no leaf {path!r}{nearest(path, leaves)}"
                )
            old = leaves[path]
            if path in self._private:
                self._check_shape(path, old[self._number], value)
                own = (*old[: self._number], value, *old[self._number + 1 :])
                leaves[path] = own
            else:
                shape = jax.eval_shape(lambda x, c=self.cuts[path]: take(x, c), old)
                self._check_shape(path, shape, value)
                leaves[path] = put(old, self.cuts[path], value)
        return self._groups.treedef.unflatten(leaves.values())

    def _check_shape(self, path: str, own: Any, value: Array) -> None:
        if np.shape(own) != np.shape(value):
            raise ValueError(
                f"{path} has shape {np.shape(own)} at width {self._number}, but the "
                f"new value has {np.shape(value)}; is it of another width?"
            )

    def _named(self, variables: PyTree) -> dict[str, Any]:
        try:
            leaves = self._groups.treedef.flatten_up_to(variables)
        except ValueError as error:
            raise ValueError(
                "the variables do not have the structure of slim.variables, which all "
                f"widths share: {error}"
            ) from error
        return dict(zip(self._groups.shapes, leaves, strict=True))


def _cuts(groups: Groups, widest: PyTree, mask: PyTree) -> dict[str, list[Runs]]:
    """Path -> the positions of a width among those of the widest."""
    refuse_layers(groups, "slimmable")
    shapes = groups.treedef.unflatten(
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in groups.shapes.values()
    )
    found = {}
    pairs = zip(pair_masks(shapes, widest), pair_masks(shapes, mask), strict=True)
    for (path, leaf, whole), (_, _, own) in pairs:
        axes = zip(
            axis_keep(whole, leaf.shape), axis_keep(own, leaf.shape), strict=True
        )
        found[path] = [
            Runs(axis, np.flatnonzero(kept if before is None else kept[before]))
            for axis, (before, kept) in enumerate(axes)
            if kept is not None and (before is None or not np.array_equal(kept, before))
        ]
    return found


def _own_copies(leaf: Array, path: str, widths: Sequence[_Width]) -> tuple[Any, ...]:
    """A private leaf: arrays of their own, so that all may be donated."""
    return tuple(jnp.array(take(leaf, width.cuts[path])) for width in widths)


def _private_paths(groups: Groups, private: str | Sequence[str]) -> frozenset[str]:
    found: set[str] = set()
    for pattern in patterns("private", private):
        matched = matching(pattern, list(groups.shapes))
        if not matched:
            raise ValueError(
                f"private={pattern!r} matches none of the {len(groups.shapes)} leaves"
                f"{nearest(pattern, groups.shapes)}; they are "
                f"{listed(list(groups.shapes), 4)}"
            )
        found.update(matched)
    return frozenset(found)
