"""Sparse training inside any optimiser."""

from jaxprune.training.sparse._pruning import gradual_pruning as gradual_pruning
from jaxprune.training.sparse._pruning import hold_masks as hold_masks
from jaxprune.training.sparse._pruning import threshold_pruning as threshold_pruning
from jaxprune.training.sparse._regrowth import grow_and_prune as grow_and_prune
from jaxprune.training.sparse._regrowth import rigl as rigl
from jaxprune.training.sparse._regrowth import (
    sparse_evolutionary_training as sparse_evolutionary_training,
)
from jaxprune.training.sparse._rules import Budget as Budget
from jaxprune.training.sparse._soft import (
    dynamic_network_surgery as dynamic_network_surgery,
)
from jaxprune.training.sparse._soft import (
    iterative_hard_thresholding as iterative_hard_thresholding,
)
from jaxprune.training.sparse._soft import (
    iterative_soft_shrinkage as iterative_soft_shrinkage,
)
from jaxprune.training.sparse._soft import movement_pruning as movement_pruning
from jaxprune.training.sparse._soft import straight_through as straight_through
from jaxprune.training.sparse._state import Moment as Moment
from jaxprune.training.sparse._state import Rule as Rule
from jaxprune.training.sparse._state import SparseState as SparseState
from jaxprune.training.sparse._state import current_masks as current_masks
from jaxprune.training.sparse._state import masked_params as masked_params
from jaxprune.training.sparse._transform import sparse_training as sparse_training
