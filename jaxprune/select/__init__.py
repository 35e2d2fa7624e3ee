"""Select: scores and a budget decide what stays.

Whole units: `per_group`, `across_groups`, `to_budget`, ... give group name -> bool
``[size]``. Single weights: `per_leaf`, `across_leaves`, `n_of_m`, `blocks` give masks.

All of them remove the lowest-scoring entries and share their guarantees: the count
follows from the budget, not from a threshold, so equal scores or a layer of small
scores cannot change it; no group and no leaf is emptied; of equal scores the earlier
stays. With ``multiple_of > 1`` units leave in blocks (a block is rated by its best
unit), and the count is met to half a block. Limits are one value, or name or pattern ->
value.

Scores may be traced: then the decision is traced too.
"""

from jaxprune.select import clusters as clusters
from jaxprune.select import provable as provable
from jaxprune.select._adaptive import adaptive as adaptive
from jaxprune.select._bisection import bisect as bisect
from jaxprune.select._budget import Selection as Selection
from jaxprune.select._budget import to_budget as to_budget
from jaxprune.select._layerwise import erk as erk
from jaxprune.select._layerwise import lamp as lamp
from jaxprune.select._layerwise import uniform as uniform
from jaxprune.select._one_unit import remove_one as remove_one
from jaxprune.select._patterns import blocks as blocks
from jaxprune.select._patterns import n_of_m as n_of_m
from jaxprune.select._patterns import per_output as per_output
from jaxprune.select._shares import proportional as proportional
from jaxprune.select._shares import widths_from_nonzeros as widths_from_nonzeros
from jaxprune.select._units import across_groups as across_groups
from jaxprune.select._units import per_group as per_group
from jaxprune.select._units import random as random
from jaxprune.select._units import to_sizes as to_sizes
from jaxprune.select._weights import across_leaves as across_leaves
from jaxprune.select._weights import per_leaf as per_leaf
from jaxprune.select._weights import threshold as threshold
