"""Kernels of any traced function, replaced by products of smaller ones."""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun

from jaxprune.core._checks import whole_number
from jaxprune.core._functions import check_function
from jaxprune.core._leaves import leaf_names
from jaxprune.core._names import listed, matching, nearest
from jaxprune.core._types import ApplyFn, Array, PyTree, PyTreeDef
from jaxprune.program._closures import closes_over_tracers
from jaxprune.program._collector import collector_paused
from jaxprune.program._jaxprs import Program, call, is_array, trace_program
from jaxprune.statistics._contractions import contractions
from jaxprune.statistics._moments import Moments
from jaxprune.surgery._factor_data import Inputs, inputs_of, on_data
from jaxprune.surgery._factor_forms import KINDS, FactorKind
from jaxprune.surgery._factor_program import Split, rewritten, split_of
from jaxprune.surgery._factor_walk import Uses

Ranks: TypeAlias = int | float | Mapping[str, int | float]
FIRST, SECOND = "first", "second"


@dataclasses.dataclass(frozen=True, eq=False)
class Factorised:
    """A function and its variables, with some kernels in factors.

    Attributes:
        apply_fn: the function, of `variables`.
        variables: like those it was made from, but each factorised leaf is ``{"first":
            ..., "second": ...}``.
        ranks: path -> rank.
        errors: path -> what the factors miss of the kernel, as a share of its norm.
    """

    apply_fn: ApplyFn
    variables: PyTree
    ranks: dict[str, int]
    errors: dict[str, float]
    _inside: "_Inside"

    def compose(self, variables: PyTree) -> Any:
        """The variables of the original function: products in place of the factors.

        Differentiable: the norm loss of Li et al. (2019) is the distance of these to
        the pretrained kernels.

        Args:
            variables: like `self.variables`, of any rank.
        """
        inside = self._inside
        leaves = inside.leaves(variables)
        named = dict(zip(inside.names, leaves, strict=True))
        whole = [
            _product(inside.splits[name], named) if name in inside.splits else leaf
            for name, leaf in named.items()
        ]
        return jax.tree.unflatten(inside.treedef, whole)


class _Inside(NamedTuple):
    """The original variables, and which leaves of them are split."""

    treedef: PyTreeDef
    names: tuple[str, ...]
    splits: Mapping[str, Split]

    def leaves(self, variables: PyTree) -> list[Any]:
        """The leaves, factors as dicts.

        Raises:
            ValueError: if it is another tree.
        """
        try:
            leaves = self.treedef.flatten_up_to(variables)
        except ValueError as error:
            raise ValueError(
                f"these are not the factorised variables: {error}; pass those of "
                "Factorised.variables, or of their structure"
            ) from None
        for name, leaf in zip(self.names, leaves, strict=True):
            if name in self.splits:
                self._check(name, leaf)
        return leaves

    def _check(self, name: str, leaf: Any) -> None:
        shared = self.splits[name].shared != name
        expected = {SECOND} if shared else {FIRST, SECOND}
        if not isinstance(leaf, Mapping) or set(leaf) != expected:
            got = sorted(leaf) if isinstance(leaf, Mapping) else type(leaf).__name__
            raise ValueError(
                f"variables[{name!r}] was factorised and must hold "
                f"{' and '.join(sorted(expected))}, got {got}"
            )


def _product(split: Split, leaves: Mapping[str, Any]) -> jax.Array:
    first, second = leaves[split.shared][FIRST], leaves[split.path][SECOND]
    left, right = split.form.parts(jnp.asarray(first), jnp.asarray(second))
    with jax.default_matmul_precision("highest"):
        return split.leaf(left @ right)


def factorise(
    apply_fn: ApplyFn,
    variables: PyTree,
    *args: PyTree,
    ranks: Ranks,
    kind: FactorKind = "channel",
    basis_size: int | None = None,
    share: str | Sequence[str] = (),
    moments: Iterable[Moments] | None = None,
    relu: str | Sequence[str] = (),
    **kwargs: PyTree,
) -> Factorised:
    r"""Replaces kernels by products of smaller ones, in any JAX function.

    A kernel that contractions read becomes the best product of its rank (Eckart and
    Young),

    .. math::
        W \approx (U_r \, \mathrm{diag}(s)^{1/2}) \, (\mathrm{diag}(s)^{1/2} V_r^T),

    and the function contracts with one factor after the other; the kernel is never
    rebuilt. It is a transformation like `narrow`: the program is traced and written
    down anew, so that dense layers, attention, banks of experts, grouped and dilated
    convolutions and layers under scan, jit and remat need no change. The result can be
    traced, pruned (its ranks are groups of their own), trained, costed and exported.

    How a kernel is a matrix, and what a convolution of ``h x w`` becomes:

    * "channel": inputs x outputs; ``h x w`` to `r` channels, then ``1 x 1``;
    * "spatial": (inputs, height) x (outputs, width); ``h x 1``, then ``1 x w``;
    * "depthwise": for every filter inputs x (height, width); ``1 x 1`` to `r` channels
      a filter, then ``h x w`` on these;
    * "basis": groups of `basis_size` inputs share a basis of `r` filters ``h x w``;
      then ``1 x 1``.

    Args:
        apply_fn: the function; its first argument is the variables.
        variables: arrays.
        *args: example arguments, arrays or shapes.
        ranks: an int; a float, the fraction of the full rank, at least 1; or a mapping
            from paths or patterns (as `fnmatch`) to either, where the last that matches
            a leaf counts. A number alone is for every kernel that contractions of this
            kind read and nothing else does. `factor_ranks` chooses them by energy,
            value, count or to a budget.
        kind: see above. A matrix has kinds "channel" and "basis" alone.
        basis_size: of kind "basis"; all inputs if None. It divides them.
        share: paths or patterns of leaves that share one basis, that of the first.
        moments: of the inputs of the kernels (`jaxprune.statistics.moments`), for
            factors that are the best on these inputs (GSVD) and not of all matrices. Of
            kind "channel".
        relu: paths or patterns of kernels that, after their bias, a ReLU follows: their
            factors and bias are fitted to what is behind it, on responses drawn from
            the Gaussian of these moments.
        **kwargs: example keyword arguments of `apply_fn`.

    Returns:
        The new function and variables: `Factorised`.

    Raises:
        TypeError: if the variables are tracers or shapes, or a rank is no number.
        ValueError: if a rank is above the full rank, a named leaf is read by something
            that is no such contraction, or a pattern matches nothing. The text names
            the path and the cause.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((6, 8)), "w2": jnp.ones((8, 2))}
        >>> small = factorise(mlp, params, jnp.ones((1, 6)), ranks={"w1": 1})
        >>> jax.tree.map(jnp.shape, small.variables)
        {'w1': {'first': (6, 1), 'second': (1, 8)}, 'w2': (8, 2)}
        >>> small.apply_fn(small.variables, jnp.ones((1, 6))).shape
        (1, 2)

    References:
        Denton et al., `Exploiting Linear Structure <https://arxiv.org/abs/1404.0736>`_,
        2014; Jaderberg et al., `Speeding up Convolutional Neural Networks with Low Rank
        Expansions <https://arxiv.org/abs/1405.3866>`_, 2014; Li et al., `Learning
        Filter Basis <https://arxiv.org/abs/1908.08932>`_, ICCV 2019; Zhang et al.,
        `Accelerating Very Deep Convolutional Networks
        <https://arxiv.org/abs/1505.06798>`_, 2015, for `moments` and `relu`
    """
    check_function(apply_fn)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind != "basis" and (basis_size is not None or share):
        raise ValueError(f'basis_size and share are of kind="basis", not {kind!r}')
    if basis_size is not None:
        whole_number("basis_size", basis_size)
    leaves, treedef = jax.tree.flatten(variables)
    names = leaf_names(variables, treedef)
    named = dict(zip(names, leaves, strict=True))
    program = trace_program(apply_fn, variables, *args, **kwargs)
    splits, reasons = splits_of(program, named, kind, basis_size)
    found = resolved(ranks, splits, reasons)
    splits = _sharing({path: splits[path] for path in found}, share, found, reasons)
    if moments is None and relu:
        raise ValueError("relu= needs the moments of the kernels' inputs")
    if moments is None:
        factors, errors = _factors(splits, found, named)
    else:
        known = inputs_of(splits, list(moments), relu, contractions(program))
        factors, errors = _factors_on_data(splits, found, named, *known)
    inside = _Inside(treedef, names, splits)
    made = jax.tree.unflatten(treedef, [factors.get(n, named[n]) for n in names])
    small = _transformed(apply_fn, inside)
    pairs = {path: factors[path] for path in splits}
    rewritten(program, splits, _in_order(pairs))  # complains early
    return Factorised(small, made, found, errors, inside)


def splits_of(
    program: Program,
    leaves: Mapping[str, Any],
    kind: FactorKind,
    basis_size: int | None = None,
) -> tuple[dict[str, Split], dict[str, str]]:
    """Path -> how a leaf is taken apart; path -> why another one is not."""
    uses = Uses(program)
    splits: dict[str, Split] = {}
    reasons: dict[str, str] = {}
    for path, leaf in leaves.items():
        split: Split | str
        if not is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            split = f"its dtype is {getattr(leaf, 'dtype', type(leaf).__name__)}"
        elif path in uses.others:
            split = f"it is {uses.others[path]}, which is no contraction with it"
        elif path not in uses.uses:
            split = "no contraction reads it"
        else:
            split = split_of(path, np.shape(leaf), uses.uses[path], kind, basis_size)
        if isinstance(split, str):
            reasons[path] = split
        else:
            splits[path] = split
    return splits, reasons


def resolved(
    ranks: Ranks, splits: Mapping[str, Split], reasons: Mapping[str, str]
) -> dict[str, int]:
    """Path -> rank of every kernel that is to be factorised, in the order of leaves."""
    if not isinstance(ranks, Mapping):
        chosen = {path: ranks for path, s in splits.items() if s.layer.full_rank > 1}
        if not chosen:
            raise ValueError(
                "there is no kernel to factorise: " + listed(_told(reasons), 3)
            )
    else:
        chosen = {}
        for pattern, rank in ranks.items():
            chosen |= dict.fromkeys(_meant(pattern, splits, reasons), rank)
    return {
        path: _rank(path, chosen[path], splits[path].layer.full_rank)
        for path in splits
        if path in chosen
    }


def _told(reasons: Mapping[str, str]) -> list[str]:
    return [f"{path}: {why}" for path, why in reasons.items()]


def _meant(
    pattern: str, splits: Mapping[str, Split], reasons: Mapping[str, str]
) -> list[str]:
    known = [*splits, *reasons]
    matched = matching(pattern, known)
    found = [path for path in matched if path in splits]
    if pattern in reasons:
        raise ValueError(f"{pattern} cannot be factorised: {reasons[pattern]}")
    if not matched:
        raise ValueError(
            f"ranks name {pattern!r}, which matches no leaf of the variables"
            f"{nearest(pattern, splits)}"
        )
    if not found:
        why = listed([f"{path}: {reasons[path]}" for path in matched], 3)
        raise ValueError(f"nothing that matches {pattern!r} can be factorised: {why}")
    return found


def _rank(path: str, rank: Any, full: int) -> int:
    whole = isinstance(rank, (int, np.integer)) and not isinstance(rank, bool)
    if not whole and not isinstance(rank, (float, np.floating)):
        raise TypeError(
            f"the rank of {path} must be an int, or a float (fraction of the full "
            f"rank), got {rank!r}"
        )
    if not whole:
        if not 0 < rank <= 1:
            raise ValueError(
                f"the rank of {path} as a fraction of the full rank must be in (0, 1], "
                f"got {rank!r}"
            )
        return max(1, round(float(rank) * full))
    if not 1 <= rank <= full:
        raise ValueError(
            f"the rank of {path} must be between 1 and its full rank, {full}, got "
            f"{rank}"
        )
    return int(rank)


def _sharing(
    splits: dict[str, Split],
    share: Sequence[str],
    ranks: dict[str, int],
    reasons: Mapping[str, str],
) -> dict[str, Split]:
    """Splits of which some have the first factor of another."""
    together: list[str] = []
    for pattern in [share] if isinstance(share, str) else share:
        together += _meant(pattern, splits, reasons)
    together = [path for path in splits if path in together]
    if not together:
        return splits
    head, *rest = together
    for path in rest:
        one, other = splits[head].form, splits[path].form
        same = (one.first, one.row_sizes) == (other.first, other.row_sizes)
        if not same or one.batch or ranks[path] != ranks[head]:
            raise ValueError(
                f"{path} cannot share the basis of {head}: it needs kernels outside of "
                "scans with one window, basis_size and rank"
            )
    return {
        path: dataclasses.replace(split, shared=head) if path in rest else split
        for path, split in splits.items()
    }


def _factors(
    splits: Mapping[str, Split], ranks: Mapping[str, int], leaves: Mapping[str, Array]
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Path -> both factors, and path -> relative error."""
    factors: dict[str, dict[str, Any]] = {}
    errors: dict[str, float] = {}
    for head in dict.fromkeys(split.shared for split in splits.values()):
        members = [path for path, split in splits.items() if split.shared == head]
        wide = [splits[path].matrices(host(path, leaves[path])) for path in members]
        left, right = truncated(np.concatenate(wide, -1), ranks[head])
        ends = np.cumsum([w.shape[-1] for w in wide])[:-1]
        for path, whole, part in zip(
            members, wide, np.split(right, ends, -1), strict=True
        ):
            both = splits[path].form.factors(left, part)
            dtype = leaves[path].dtype
            pair = dict(zip((FIRST, SECOND), both, strict=True))
            factors[path] = {
                name: jnp.asarray(x.astype(dtype))
                for name, x in pair.items()
                if name == SECOND or path == head
            }
            missed = np.linalg.norm(whole - left @ part)
            errors[path] = float(missed / (np.linalg.norm(whole) or 1.0))
    return factors, errors


def _factors_on_data(
    splits: Mapping[str, Split],
    ranks: Mapping[str, int],
    leaves: Mapping[str, Array],
    inputs: Mapping[str, Inputs],
    behind: Collection[str],
) -> tuple[dict[str, Any], dict[str, float]]:
    """`_factors` by data; what is new among biases, too."""
    found: dict[str, Any] = {}
    errors: dict[str, float] = {}
    for path, split in splits.items():
        here, leaf = inputs[path], host(path, leaves[path])
        bias = host(here.bias_path, leaves[here.bias_path]) if here.bias_path else None
        left, right, new = on_data(split, leaf, here, path in behind, bias, ranks[path])
        both = [x.astype(leaves[path].dtype) for x in split.form.factors(left, right)]
        found[path] = dict(zip((FIRST, SECOND), map(jnp.asarray, both), strict=True))
        whole = split.matrices(leaf)
        missed = np.linalg.norm(whole - left @ right)
        errors[path] = float(missed / (np.linalg.norm(whole) or 1.0))
        if new is not None and bias is not None:
            bias = bias.copy()
            bias.reshape(-1)[here.bias] = new
            dtype = leaves[here.bias_path].dtype
            found[here.bias_path] = jnp.asarray(bias.astype(dtype))
    return found, errors


def truncated(matrices: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the best approximation of this rank of every matrix."""
    u, s, vt = np.linalg.svd(matrices, full_matrices=False)
    root = np.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]


def host(path: str, leaf: Array) -> np.ndarray:
    """A kernel on the host, in double precision."""
    if isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
        raise TypeError(
            f"{path} is a {type(leaf).__name__}, but factorise needs values; call it "
            "outside of jit, on arrays"
        )
    real = jnp.issubdtype(leaf.dtype, jnp.floating)
    wide = np.asarray(leaf).astype(np.float64 if real else np.complex128)
    if not np.isfinite(wide).all():
        raise ValueError(f"{path} holds entries that are not finite, so it has no rank")
    return wide


def _in_order(factors: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Path -> factors in the order in which JAX has the leaves of a dict."""
    return {path: [x for _, x in sorted(d.items())] for path, d in factors.items()}


def _transformed(apply_fn: ApplyFn, inside: _Inside) -> ApplyFn:
    """The function of factorised variables."""
    ready: dict[Any, Any] = {}

    @functools.wraps(apply_fn)
    @collector_paused()
    def small_apply(variables: PyTree, *args: PyTree, **kwargs: PyTree) -> Any:
        leaves = inside.leaves(variables)
        named = dict(zip(inside.names, leaves, strict=True))
        factors = _in_order({path: named[path] for path in inside.splits})
        whole = [
            jax.ShapeDtypeStruct(inside.splits[name].shape, factors[name][-1].dtype)
            if name in inside.splits
            else leaf
            for name, leaf in named.items()
        ]
        full = jax.tree.unflatten(inside.treedef, whole)
        program = trace_program(apply_fn, full, *args, **kwargs)
        shapes = tuple(np.shape(x) for pair in factors.values() for x in pair)
        closed = ready.get((program, shapes))
        lasting = program.lasting and not closes_over_tracers(program.closed)
        if closed is None:
            closed = rewritten(program, inside.splits, factors)
        if lasting:
            ready[program, shapes] = closed
        arrays = [
            x for x in jax.tree.leaves(((variables, *args), kwargs)) if is_array(x)
        ]
        arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in arrays]
        outs = call(closed, arrays) if lasting else jaxpr_as_fun(closed)(*arrays)
        return jax.tree.unflatten(program.out_tree, outs)

    return small_apply
