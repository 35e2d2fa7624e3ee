"""What a score declares of itself: how a unit adds up in its paper, what it looks at.

A declaration stands at the function, so that a new score is one function; `prune` knows
by name those that say what they are given.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, TypeVar

from jaxprune.scores._unit_sums import Reduce

# What is passed: the variables; a loss, variables and batches; or a function of
# variables and a batch, variables and batches. Scores of units get the groups first.
Given = Literal["variables", "loss", "outputs"]
F = TypeVar("F", bound=Callable[..., object])

_REDUCTIONS: dict[str, Reduce] = {}
OF_WEIGHTS: dict[str, Given] = {}
OF_UNITS: dict[str, Given] = {}

REDUCTIONS: Mapping[str, Reduce] = MappingProxyType(_REDUCTIONS)
"""Name of a score of weights -> the `reduce` that `group_scores` is to be given.

``taylor(form="signed")`` wants "abs_of_sum" or "square_of_sum". Scores of units
(`geometric_median`, `group_fisher`, `mean_activation`, `apoz`, `entropy`,
`empirical_sensitivity`) need none.
"""


def of_weights(reduce: Reduce, given: Given | None = None) -> Callable[[F], F]:
    """Declares a score of weights.

    Scores that may be negative reduce to how much a whole unit changes the loss,
    whatever its sign: GraSP and OBD with a measured Hessian are below 0 for many
    weights of live units, which a sum would rank below dead ones. Movement ranks by
    sign on purpose.

    Args:
        reduce: how the scores of the weights of a unit add up.
        given: its arguments; None if `prune` cannot make them.

    Returns:
        A decorator that leaves the function as it is.
    """

    def declare(score: F) -> F:
        name = getattr(score, "__name__", "")
        _REDUCTIONS[name] = reduce
        if given is not None:
            OF_WEIGHTS[name] = given
        return score

    return declare


def of_units(given: Given) -> Callable[[F], F]:
    """Declares a score of units, which takes the groups first; see `of_weights`."""

    def declare(score: F) -> F:
        OF_UNITS[getattr(score, "__name__", "")] = given
        return score

    return declare
