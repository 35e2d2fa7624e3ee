"""Ranks of kernels by the energy they keep, by value, by count or to a budget."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import numpy as np

from jaxprune.core._functions import check_function
from jaxprune.core._leaves import leaf_names
from jaxprune.core._names import matching, nearest, patterns
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.program._jaxprs import trace_program
from jaxprune.surgery._factor_forms import FactorKind
from jaxprune.surgery._factor_program import Split
from jaxprune.surgery._factor_steps import multiplications
from jaxprune.surgery._factor_walk import Use, Uses
from jaxprune.surgery._factorise import host, splits_of

FactorCost = Literal["flops", "parameters"]


def factor_ranks(
    apply_fn: ApplyFn,
    variables: PyTree,
    *args: PyTree,
    kind: FactorKind = "channel",
    basis_size: int | None = None,
    only: str | Sequence[str] = "*",
    energy: float | None = None,
    value: float | None = None,
    count: int | None = None,
    budget: float | None = None,
    cost: FactorCost = "flops",
    **kwargs: PyTree,
) -> dict[str, int]:
    r"""Chooses the ranks for `factorise` from the singular values of the kernels.

    Exactly one of these is given:

    * ``energy``: the smallest rank with :math:`\sum_{i \le r} s_i^2 \ge energy \sum_i
      s_i^2`;
    * ``value``: as many as there are singular values of at least `value`;
    * ``count``: this rank, or the full rank where that is smaller;
    * ``budget``: what the kernels may cost together, as a fraction of what they cost
      whole. Greedily, the next rank to go is that which loses least of
      :math:`\sum_k \log(\text{energy of kernel } k)` for what it saves.

    A kernel whose factors would cost as much as it does stays whole.

    Args:
        apply_fn: the function; its first argument is the variables.
        variables: arrays.
        *args: example arguments; FLOPs are those at their sizes.
        kind: as in `factorise`.
        basis_size: as in `factorise`.
        only: paths or patterns of the leaves to choose for.
        energy: share of the sum of squares to keep, in (0, 1].
        value: the smallest singular value to keep, positive.
        count: a rank, positive.
        budget: a fraction, in (0, 1).
        cost: what is compared, and what `budget` is of: ``"flops"`` or
            ``"parameters"``.
        **kwargs: example keyword arguments of `apply_fn`.

    Returns:
        Path -> rank, in the order of the leaves.

    Raises:
        TypeError: if not exactly one criterion is given.
        ValueError: if one is out of range, if `only` matches no such kernel, or if rank
            1 everywhere is still above the budget.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.diag(jnp.array([3.0, 2.0, 0.1, 0.1, 0.1]))}
        >>> fn, x = lambda params, x: x @ params["w"], jnp.ones((1, 5))
        >>> factor_ranks(fn, params, x, energy=0.9)
        {'w': 2}

    References:
        Zhang et al., `Accelerating Very Deep Convolutional Networks
        <https://arxiv.org/abs/1505.06798>`_, 2015, for the budget
    """
    check_function(apply_fn)
    _check(energy=energy, value=value, count=count, budget=budget)
    if cost not in ("flops", "parameters"):
        raise ValueError(f'cost must be "flops" or "parameters", got {cost!r}')
    leaves, treedef = jax.tree.flatten(variables)
    named = dict(zip(leaf_names(variables, treedef), leaves, strict=True))
    program = trace_program(apply_fn, variables, *args, **kwargs)
    splits, _ = splits_of(program, named, kind, basis_size)
    uses = Uses(program).uses
    wanted = _matching(only, splits)
    spectra = {
        path: _spectrum(split, named[path], uses[path], cost)
        for path, split in splits.items()
        if path in wanted
    }
    if budget is not None:
        return _to_budget(spectra, budget, cost)
    found = {
        path: _rank(spectrum, energy, value, count)
        for path, spectrum in spectra.items()
    }
    return {path: rank for path, rank in found.items() if rank <= spectra[path].most}


def _check(**criteria: float | None) -> None:
    given = {name: x for name, x in criteria.items() if x is not None}
    if len(given) != 1:
        names = " and ".join(given) or "none"
        raise TypeError(f"give exactly one of {', '.join(criteria)}; got {names}")
    [(name, number)] = given.items()
    ends = {"energy": "(0, 1]", "value": "(0, inf)", "budget": "(0, 1)"}
    least = number > 0
    inside = {"energy": number <= 1, "budget": number < 1}.get(name, True)
    if name == "count" and (not isinstance(number, int) or number < 1):
        raise ValueError(f"count must be a whole number, 1 or more, got {number!r}")
    if not least or not inside:
        raise ValueError(f"{name} must be in {ends[name]}, got {number!r}")


def _matching(only: str | Sequence[str], splits: Mapping[str, Split]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns("only", only):
        names = matching(pattern, splits)
        if not names:
            raise ValueError(
                f"only names {pattern!r}, which matches no kernel that can be "
                f"factorised{nearest(pattern, splits)}"
            )
        found.update(names)
    return found


@dataclasses.dataclass(frozen=True)
class _Spectrum:
    """What a kernel keeps and costs at every rank.

    Attributes:
        values: ``[matrices, full rank]``, singular values, descending.
        whole: the cost of the kernel.
        each: the cost of a rank.
    """

    values: np.ndarray
    whole: int
    each: int

    @property
    def most(self) -> int:
        """The largest rank that is cheaper than the kernel."""
        return min(self.values.shape[-1], (self.whole - 1) // self.each)

    @property
    def energy(self) -> np.ndarray:
        """``[full rank + 1]``: the share of the sum of squares that a rank keeps."""
        squares = (self.values**2).sum(0)
        kept = np.concatenate([[0.0], np.cumsum(squares)])
        return kept / kept[-1] if kept[-1] else np.ones_like(kept)


def _spectrum(
    split: Split, leaf: jax.Array, uses: Sequence[Use], cost: FactorCost
) -> _Spectrum:
    values = np.linalg.svd(split.matrices(host(split.path, leaf)), compute_uv=False)
    if cost == "parameters":
        return _Spectrum(values, leaf.size, split.form.params(1))
    whole, each = (
        sum(use.steps * multiplications(use.eqn, use.operand, form) for use in uses)
        for form in (None, split.layer)
    )
    return _Spectrum(values, whole, each)


def _rank(
    spectrum: _Spectrum,
    energy: float | None,
    value: float | None,
    count: int | None,
) -> int:
    full = spectrum.values.shape[-1]
    if count is not None:
        return min(count, full)
    if value is not None:
        return max(1, int((spectrum.values >= value).sum(-1).max()))
    # Rounding must not ask for more than there is.
    enough = spectrum.energy >= min(energy or 1.0, float(spectrum.energy[-1]))
    return max(1, int(np.argmax(enough)))


def _to_budget(
    spectra: Mapping[str, _Spectrum], budget: float, cost: FactorCost
) -> dict[str, int]:
    limit = budget * sum(spectrum.whole for spectrum in spectra.values())
    ranks: dict[str, int] = {}
    spent = float(sum(spectrum.whole for spectrum in spectra.values()))
    steps = {path: _next(spectrum, None) for path, spectrum in spectra.items()}
    while spent > limit:
        able = {path: step for path, step in steps.items() if step is not None}
        if not able:
            raise ValueError(
                f"rank 1 everywhere still takes {spent / limit * budget:.3g} of the "
                f"{cost} of these kernels, above the budget of {budget}; choose "
                "another kind"
            )
        path = min(able, key=lambda path: able[path][0])
        _, rank, saved = able[path]
        if spent - saved < limit:  # as little as is needed, of the last one
            spectrum = spectra[path]
            room = limit - (spent - saved) + rank * spectrum.each
            rank = min(ranks.get(path, spectrum.most + 1) - 1, room // spectrum.each)
            ranks[path] = int(rank)
            break
        ranks[path], spent = rank, spent - saved
        steps[path] = _next(spectra[path], rank)
    return {path: ranks[path] for path in spectra if path in ranks}


def _next(spectrum: _Spectrum, rank: int | None) -> tuple[float, int, int] | None:
    """(loss per cost saved, rank, cost saved) of the best step down, if any."""
    most = spectrum.most if rank is None else rank - 1
    if most < 1:
        return None
    ranks = np.arange(1, most + 1)
    with np.errstate(divide="ignore"):
        energy = np.log(spectrum.energy)
    now = 0.0 if rank is None else energy[rank]
    cost = spectrum.whole if rank is None else rank * spectrum.each
    saved = cost - ranks * spectrum.each
    loss = (now - energy[ranks]) / saved
    best = len(loss) - 1 - int(np.argmin(loss[::-1]))  # of equals the largest rank
    return float(loss[best]), int(ranks[best]), int(saved[best])
