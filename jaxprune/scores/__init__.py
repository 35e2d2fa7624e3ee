"""Scores: how much every weight matters, and how much every unit of a group.

A score maps a tree of parameters to a tree of floats like it; larger matters more;
None where a leaf has no score. `group_scores` adds these numbers up over everything a
unit occupies. So a published criterion is named by two choices: what a weight counts
(`magnitude`, ...) and how a unit adds up (``reduce``). Scores that are of units from
the start (`geometric_median`, ...) take the groups first and return what
`group_scores` returns.

Scores that look at data take the function that is differentiated or read, then the
parameters, then batches: any iterable of trees of arrays with the examples along axis
0. They stream them, with running sums in float32.
"""

from jaxprune.scores._activations import apoz as apoz
from jaxprune.scores._activations import entropy as entropy
from jaxprune.scores._activations import mean_activation as mean_activation
from jaxprune.scores._curvature import fisher as fisher
from jaxprune.scores._curvature import grasp as grasp
from jaxprune.scores._curvature import hessian_diagonal as hessian_diagonal
from jaxprune.scores._curvature import obd as obd
from jaxprune.scores._flow import synflow as synflow
from jaxprune.scores._gates import contribution as contribution
from jaxprune.scores._gates import group_fisher as group_fisher
from jaxprune.scores._geometry import geometric_median as geometric_median
from jaxprune.scores._gradients import movement as movement
from jaxprune.scores._gradients import snip as snip
from jaxprune.scores._gradients import taylor as taylor
from jaxprune.scores._grouping import Members as Members
from jaxprune.scores._grouping import Normalize as Normalize
from jaxprune.scores._grouping import Reduce as Reduce
from jaxprune.scores._grouping import group_scores as group_scores
from jaxprune.scores._grouping import normalized as normalized
from jaxprune.scores._products import wanda as wanda
from jaxprune.scores._published import REDUCTIONS as REDUCTIONS
from jaxprune.scores._sensitivity import empirical_sensitivity as empirical_sensitivity
from jaxprune.scores._sensitivity import weight_sensitivity as weight_sensitivity
from jaxprune.scores._weights import activation_probability as activation_probability
from jaxprune.scores._weights import batch_norm_scale as batch_norm_scale
from jaxprune.scores._weights import l1 as l1
from jaxprune.scores._weights import l2 as l2
from jaxprune.scores._weights import lamp as lamp
from jaxprune.scores._weights import lp as lp
from jaxprune.scores._weights import magnitude as magnitude
from jaxprune.scores._weights import random as random
