"""How the scores of the weights of a unit add up in the papers."""

from collections.abc import Mapping
from types import MappingProxyType

from jaxprune.scores._unit_sums import Reduce

# Scores that may be negative reduce to how much a whole unit changes the loss, whatever
# its sign: GraSP and OBD with a measured Hessian are below 0 for many weights of live
# units, which a sum would rank below dead ones. Movement ranks by sign on purpose.
REDUCTIONS: Mapping[str, Reduce] = MappingProxyType(
    {
        "magnitude": "l2",
        "l1": "l1",
        "l2": "l2",
        "lp": "sum",
        "batch_norm_scale": "l1",
        "activation_probability": "mean",
        "random": "mean",
        "synflow": "sum",
        "snip": "sum",
        "taylor": "sum",
        "fisher": "sum",
        "obd": "abs_of_sum",
        "hessian_diagonal": "abs_of_sum",
        "grasp": "abs_of_sum",
        "movement": "signed_sum",
        "wanda": "l2",
        "weight_sensitivity": "sum",
    }
)
"""Name of a score of weights -> the `reduce` that `group_scores` is to be given.

``taylor(form="signed")`` wants "abs_of_sum" or "square_of_sum". Scores of units
(`geometric_median`, `group_fisher`, `mean_activation`, `apoz`, `entropy`,
`empirical_sensitivity`) need none.
"""
