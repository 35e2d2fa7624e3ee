"""`Pruned`: a smaller function, and all that one wants to know or do with it."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxprune.core._groups import Groups
from jaxprune.core._kept import Cost, as_html, as_text, kept_table
from jaxprune.core._leaves import named_leaves
from jaxprune.core._progress import tracked
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.costing import Costs, costs
from jaxprune.costing._latency import seconds_per_call
from jaxprune.narrowing._narrow import narrow
from jaxprune.program._jaxprs import is_array
from jaxprune.recipes import plans
from jaxprune.recipes._reports import report_pruned, zeros
from jaxprune.statistics._recalibration import recalibrate
from jaxprune.surgery._composing import units_kept
from jaxprune.surgery._slicing import slice_opt_state, slice_params


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pruned:
    """A smaller function and its variables; prints as a table.

    Attributes:
        apply_fn: the narrowed function, with the signature of the original.
        variables: its variables, sliced.
        masks: what is kept of the original variables, True = kept.
        groups: what `trace` found in the original.
        dense_fn: the original function.
        dense_variables: shapes and dtypes of the original variables.
        args: example arguments, shapes and dtypes where they are arrays.
        kwargs: example keyword arguments, likewise.
        last_masks: what the last of several cuts kept of the variables that it was
            given; `masks` where there was one cut.
        seconds: of one call before and after, once `measured`.
        counted: name, before and after of each cost, where they are not to be counted
            again: of a program that was loaded without its source.
        call: the call that made it, as text.
    """

    apply_fn: ApplyFn
    variables: PyTree
    masks: PyTree
    groups: Groups
    dense_fn: ApplyFn
    dense_variables: PyTree
    args: tuple[PyTree, ...] = ()
    kwargs: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)
    last_masks: PyTree = None
    seconds: tuple[float, float] | None = None
    counted: Any = None
    call: str = ""

    # --- what it is ------------------------------------------------------------------

    @functools.cached_property
    def plan(self) -> dict[str, np.ndarray]:
        """Group name -> bool ``[size]``, True = kept: for `plans.save`."""
        return units_kept(self.groups, self.masks)

    @functools.cached_property
    def costs_before(self) -> Costs:
        """What a call of the original costs."""
        self._need_source("costs_before")
        return costs(self.dense_fn, self.dense_variables, *self.args, **self.kwargs)

    @functools.cached_property
    def costs(self) -> Costs:
        """What a call costs now."""
        self._need_source("costs")
        return costs(self.apply_fn, self.variables, *self.args, **self.kwargs)

    def __str__(self) -> str:
        return as_text(self.__rich__())

    __repr__ = __str__

    def __rich__(self) -> Any:
        found = tuple(Cost(*each) for each in self.counted_costs)
        return kept_table(self.groups, self.plan, found)

    def _repr_html_(self) -> str:
        return as_html(self.__rich__())

    def figure(self) -> Any:
        """Draws the groups, what is removed hatched, see `display.groups_figure`.

        Needs matplotlib.
        """
        from jaxprune.display import groups_figure

        return groups_figure(self.groups, self.plan)

    def report(
        self,
        path: str | Path,
        *,
        title: str = "What was cut",
        metrics: Mapping[str, Any] | None = None,
        latency: bool = True,
        figures: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one HTML file: costs, groups, layers, what is not cut and why.

        It needs nothing else, and is as good on a telephone as on a screen, light or
        dark.

        Args:
            path: the file; replaced as a whole.
            title: of the page.
            metrics: name -> number after the cut, or ``(before, after)``:
                ``{"accuracy": (0.98, 0.97)}``.
            latency: measure a call before and after, unless `measured` has.
            figures: caption -> matplotlib figure, such as `display.functions_figure`
                of what units look for.

        Raises:
            ModuleNotFoundError: if ``jaxprune[report]`` is missing.
        """
        report_pruned(path, self, title, metrics or {}, latency, figures or {})

    @property
    def is_program(self) -> bool:
        """Was it loaded without the source of the original?"""
        return self.dense_fn is self.apply_fn

    def _need_source(self, what: str) -> None:
        if self.is_program:
            raise ValueError(
                f"{what} needs the original function, but this was loaded without it, "
                "as a compiled program; load it with jaxprune.load(folder, apply_fn)"
            )

    # --- what one does with it -------------------------------------------------------

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:
        """Calls the narrowed function on the sliced variables."""
        return self.apply_fn(self._now().variables, *args, **kwargs)

    def replace(self, **changes: Any) -> "Pruned":
        """The same with other values of some attributes, such as trained variables.

        Raises:
            ValueError: if new variables do not have the shapes of the old.
        """
        if "variables" in changes:
            _check_same_shapes(self.variables, changes["variables"])
        return dataclasses.replace(self, **changes)

    def _now(self) -> "Pruned":
        """The same, its variables those of a module that is trained in place."""
        return self

    def _cut_again(self, **changes: Any) -> "Pruned":
        """What a further cut makes of it."""
        return dataclasses.replace(self, **changes)

    def slice_opt_state(
        self, tx: optax.GradientTransformation, opt_state: PyTree
    ) -> PyTree:
        """The optimiser state for the sliced variables, momentum kept.

        Args:
            tx: the `optax.GradientTransformation` that made it.
            opt_state: its state for the variables before this cut, or for their
                collection ``params``.

        Returns:
            The state for `variables`, or for ``variables["params"]``.

        Raises:
            ValueError: as `jaxprune.slice_opt_state`.
        """
        masks = self.masks if self.last_masks is None else self.last_masks
        if not isinstance(masks, Mapping) or "params" not in masks:
            return slice_opt_state(tx, opt_state, masks)
        try:
            return slice_opt_state(tx, opt_state, masks["params"])
        except ValueError as error:
            try:
                return slice_opt_state(tx, opt_state, masks)
            except ValueError:
                raise error from None

    def recalibrate(self, batches: Iterable[PyTree], **kwargs: PyTree) -> "Pruned":
        """The same with BatchNorm statistics measured anew, see `recalibrate`.

        Args:
            batches: inputs, each an array or a tuple of positional arguments.
            **kwargs: as for `jaxprune.recalibrate`.
        """
        now = self._now()
        return now.replace(
            variables=recalibrate(now.apply_fn, now.variables, batches, **kwargs)
        )

    def measured(self, *args: PyTree, **kwargs: PyTree) -> "Pruned":
        """The same with the seconds of a call before and after.

        Args:
            *args: arguments to call with; by default zeros like the example.
            **kwargs: keyword arguments, likewise.

        Raises:
            ValueError: if it was loaded without the original function.
        """
        self._need_source("measured")
        if not args and not kwargs:
            args, kwargs = jax.tree.map(zeros, (self.args, dict(self.kwargs)))
        dense = jax.tree.map(zeros, self.dense_variables)
        calls = (self.dense_fn, dense), (self.apply_fn, self.variables)
        seconds = tuple(
            seconds_per_call(fn, (variables, *args), kwargs)
            for fn, variables in tracked(calls, "latency", None)
        )
        return dataclasses.replace(self, seconds=seconds)

    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        """Writes variables, masks, plan and program into one folder.

        `jaxprune.load` reads it, with the original function or, as the program is in
        it, without. What the folder held before is replaced at the end.

        Args:
            folder: made if missing.
            facts: JSON-like facts to keep beside it, such as the accuracy.

        Raises:
            ValueError: as `io.save_pruned`.
            OSError: if it cannot be written.
        """
        from jaxprune.io import save_pruned

        save_pruned(
            folder,
            self.apply_fn,
            self._now().variables,
            self.masks,
            *self.args,
            groups=self.groups,
            plan=plans.as_json(self.groups, self.plan),
            facts={**(facts or {}), "costs": self.counted_costs, "call": self.call},
            **self.kwargs,
        )

    @property
    def counted_costs(self) -> list[list[Any]]:
        """Name, before and after of each cost; seconds, if measured."""
        seconds = [["seconds", *self.seconds]] if self.seconds else []
        if self.counted is not None:
            known = [list(each) for each in self.counted]
            return [
                each for each in known if each[0] != "seconds" or not seconds
            ] + seconds
        pairs = self.costs_before, self.costs
        found = [
            ["parameters", *(each.parameters for each in pairs)],
            ["FLOPs", *(each.flops for each in pairs)],
        ]
        return [*found, *seconds]

    # --- pickle and copy -------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["apply_fn"]  # narrow(dense_fn, masks), a closure
        return {**fields, "variables": jax.tree.map(_without_key, self.variables)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        variables = jax.tree.map(_with_key, state["variables"], is_leaf=_is_key)
        self.__dict__.update(state, variables=variables)
        self.__dict__["apply_fn"] = narrow(self.dense_fn, self.masks)


def make_pruned(
    dense_fn: ApplyFn,
    variables: PyTree,
    masks: PyTree,
    groups: Groups,
    args: tuple[PyTree, ...] = (),
    kwargs: Mapping[str, PyTree] | None = None,
    call: str = "",
    small: PyTree = None,
) -> Pruned:
    """The `Pruned` of a function and masks.

    Args:
        dense_fn: the original function.
        variables: its variables, full size.
        masks: tree of bools like `variables`, True = kept; concrete.
        groups: what `trace` returned.
        args: example arguments, arrays or shapes.
        kwargs: example keyword arguments.
        call: the call that made it, as text.
        small: its variables, sliced; None to slice them here.

    Returns:
        The smaller function, its variables and the rest.
    """
    return Pruned(
        narrow(dense_fn, masks),
        slice_params(variables, masks) if small is None else small,
        masks,
        groups,
        dense_fn,
        jax.tree.map(abstract, variables),
        jax.tree.map(abstract, tuple(args)),
        jax.tree.map(abstract, dict(kwargs or {})),
        call=call,
    )


def load(
    folder: str | Path, apply_fn: ApplyFn | None = None, *, like: PyTree = None
) -> Pruned:
    """Reads what `Pruned.save` wrote.

    Args:
        folder: what it wrote to.
        apply_fn: the original function, to be narrowed; None for the program in the
            folder, which needs nothing of the model's source.
        like: tree (of anything) whose containers the variables take; by default
            dicts, lists and tuples.

    Returns:
        The pruned function; its variables are those that were saved, bit by bit.

    Raises:
        ValueError: if the folder holds no pruned model, or is damaged: the text says
            which file.

    Example:
        >>> import tempfile, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
        >>> folder = tempfile.mkdtemp()
        >>> jaxprune.prune(mlp, params, jnp.ones((1, 3)), sparsity=0.5).save(folder)
        >>> jaxprune.load(folder)(jnp.ones((5, 3))).shape
        (5, 2)
    """
    from jaxprune.io import load_pruned

    found = load_pruned(folder, apply_fn, like=like)
    if found.groups is None:
        raise ValueError(f"{folder} was saved without groups; use io.load_pruned")
    leaves = named_leaves(found.variables).values()
    shapes = zip(found.groups.shapes.values(), leaves, strict=True)
    full = [jax.ShapeDtypeStruct(shape, leaf.dtype) for shape, leaf in shapes]
    return Pruned(
        found.apply_fn,
        found.variables,
        found.masks,
        found.groups,
        found.apply_fn if apply_fn is None else apply_fn,
        jax.tree.structure(found.variables).unflatten(full),
        found.args,
        found.kwargs,
        counted=found.facts.get("costs"),
        call=found.facts.get("call", ""),
    )


def abstract(leaf: PyTree) -> Any:
    """The shape and dtype of an array; what is no array as it is."""
    if not is_array(leaf):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _check_same_shapes(old: PyTree, new: PyTree) -> None:
    before, after = named_leaves(old), named_leaves(new)
    if different := sorted(before.keys() ^ after.keys()):
        side = "lack" if different[0] in before else "have"
        raise ValueError(f"the new variables {side} {different[0]}, unlike the pruned")
    for path, leaf in before.items():
        if np.shape(leaf) != np.shape(after[path]):
            raise ValueError(
                f"the new {path} has shape {np.shape(after[path])}, but the pruned "
                f"function takes {np.shape(leaf)}; were they trained before the cut?"
            )


class _Key(tuple):
    """A typed key as its implementation and plain data: keys cannot be pickled."""


def _is_key(leaf: PyTree) -> bool:
    return isinstance(leaf, _Key)


def _without_key(leaf: PyTree) -> Any:
    is_key = hasattr(leaf, "dtype") and jax.numpy.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )
    if not is_key or isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    data = np.asarray(jax.random.key_data(leaf))
    return _Key((str(jax.random.key_impl(leaf)), data))


def _with_key(leaf: PyTree) -> Any:
    if not _is_key(leaf):
        return leaf
    impl, data = leaf
    return jax.random.wrap_key_data(jax.numpy.asarray(data), impl=impl)
