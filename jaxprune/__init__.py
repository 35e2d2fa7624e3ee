"""jaxprune: prune any JAX function.

Five questions, in this order: which axes belong together (`trace`), how much does each
matter (`scores`, `group_scores`), which ones stay (`select`), what if they were gone
(`expand_masks`, `apply_masks`, `hold_masks`, `bridgeout`), make them gone
(`slice_params`, `narrow`).
"""

from jaxprune import clusters as clusters
from jaxprune import noisy_layers as noisy_layers
from jaxprune import optimizers as optimizers
from jaxprune import plans as plans
from jaxprune import schedules as schedules
from jaxprune import scores as scores
from jaxprune import select as select
from jaxprune import taps as taps
from jaxprune.costs import CostModel as CostModel
from jaxprune.costs import Costs as Costs
from jaxprune.costs import cost_model as cost_model
from jaxprune.costs import costs as costs
from jaxprune.coupling.groups import Group as Group
from jaxprune.coupling.groups import Groups as Groups
from jaxprune.coupling.groups import Member as Member
from jaxprune.coupling.groups import Pinned as Pinned
from jaxprune.coupling.narrow import narrow as narrow
from jaxprune.coupling.registry import register_rule as register_rule
from jaxprune.coupling.trace import trace as trace
from jaxprune.latency import LatencyTable as LatencyTable
from jaxprune.latency import latency_table as latency_table
from jaxprune.masks import apply_masks as apply_masks
from jaxprune.masks import expand_masks as expand_masks
from jaxprune.masks import sparsity as sparsity
from jaxprune.merging import Merged as Merged
from jaxprune.merging import MergeError as MergeError
from jaxprune.merging import deviation as deviation
from jaxprune.merging import merge as merge
from jaxprune.merging import merge_error as merge_error
from jaxprune.optimizers.bridgeout import bridgeout as bridgeout
from jaxprune.optimizers.pruning import hold_masks as hold_masks
from jaxprune.optimizers.weight_noise import noisy_params as noisy_params
from jaxprune.pruning import Pruned as Pruned
from jaxprune.pruning import prune as prune
from jaxprune.recalibration import recalibrate as recalibrate
from jaxprune.scores import group_scores as group_scores
from jaxprune.sensitivity import Sensitivity as Sensitivity
from jaxprune.sensitivity import sensitivity as sensitivity
from jaxprune.slicing import slice_opt_state as slice_opt_state
from jaxprune.slicing import slice_params as slice_params
from jaxprune.slicing import unslice_params as unslice_params
