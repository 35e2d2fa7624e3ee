"""Pruning methods as optax transformations."""

from jaxprune.optimizers.bridgeout import BridgeoutState as BridgeoutState
from jaxprune.optimizers.bridgeout import bridgeout as bridgeout
from jaxprune.optimizers.centripetal import CentripetalState as CentripetalState
from jaxprune.optimizers.centripetal import centripetal as centripetal
from jaxprune.optimizers.dropconnect import DropConnectState as DropConnectState
from jaxprune.optimizers.dropconnect import dropconnect as dropconnect
from jaxprune.optimizers.global_sparse_momentum import (
    GlobalSparseMomentumState as GlobalSparseMomentumState,
)
from jaxprune.optimizers.global_sparse_momentum import Ticket as Ticket
from jaxprune.optimizers.global_sparse_momentum import (
    global_sparse_momentum as global_sparse_momentum,
)
from jaxprune.optimizers.global_sparse_momentum import winning_ticket as winning_ticket
from jaxprune.optimizers.group_bridgeout import (
    GroupBridgeoutState as GroupBridgeoutState,
)
from jaxprune.optimizers.group_bridgeout import group_bridgeout as group_bridgeout
from jaxprune.optimizers.penalties import PenaltyState as PenaltyState
from jaxprune.optimizers.penalties import bridge_penalty as bridge_penalty
from jaxprune.optimizers.penalties import group_lasso as group_lasso
from jaxprune.optimizers.pruning import gradual_pruning as gradual_pruning
from jaxprune.optimizers.pruning import hold_masks as hold_masks
from jaxprune.optimizers.pruning import threshold_pruning as threshold_pruning
from jaxprune.optimizers.regrowth import grow_and_prune as grow_and_prune
from jaxprune.optimizers.regrowth import rigl as rigl
from jaxprune.optimizers.regrowth import (
    sparse_evolutionary_training as sparse_evolutionary_training,
)
from jaxprune.optimizers.rules import Budget as Budget
from jaxprune.optimizers.soft import (
    dynamic_network_surgery as dynamic_network_surgery,
)
from jaxprune.optimizers.soft import (
    iterative_hard_thresholding as iterative_hard_thresholding,
)
from jaxprune.optimizers.soft import (
    iterative_soft_shrinkage as iterative_soft_shrinkage,
)
from jaxprune.optimizers.soft import straight_through as straight_through
from jaxprune.optimizers.sparse import sparse_training as sparse_training
from jaxprune.optimizers.sparse_state import Moment as Moment
from jaxprune.optimizers.sparse_state import Rule as Rule
from jaxprune.optimizers.sparse_state import SparseState as SparseState
from jaxprune.optimizers.sparse_state import current_masks as current_masks
from jaxprune.optimizers.sparse_state import masked_params as masked_params
from jaxprune.optimizers.weight_noise import noisy_params as noisy_params
