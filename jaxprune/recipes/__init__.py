"""Whole workflows, composed of public pieces."""

from jaxprune.recipes import plans as plans
from jaxprune.recipes._prune import Pruned as Pruned
from jaxprune.recipes._prune import prune as prune
from jaxprune.recipes._sensitivity import Sensitivity as Sensitivity
from jaxprune.recipes._sensitivity import plot_sensitivity as plot_sensitivity
from jaxprune.recipes._sensitivity import sensitivity as sensitivity
