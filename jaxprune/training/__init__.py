"""Methods that act during training: optax transformations, losses and schedules."""

from jaxprune.training import distillation as distillation
from jaxprune.training import schedules as schedules
from jaxprune.training._centripetal import CentripetalState as CentripetalState
from jaxprune.training._centripetal import centripetal as centripetal
from jaxprune.training._force import ForceState as ForceState
from jaxprune.training._force import force_regularization as force_regularization
from jaxprune.training._global_sparse_momentum import (
    GlobalSparseMomentumState as GlobalSparseMomentumState,
)
from jaxprune.training._global_sparse_momentum import Ticket as Ticket
from jaxprune.training._global_sparse_momentum import (
    global_sparse_momentum as global_sparse_momentum,
)
from jaxprune.training._global_sparse_momentum import winning_ticket as winning_ticket
from jaxprune.training._growing import GrowingState as GrowingState
from jaxprune.training._growing import growing_regularization as growing_regularization
from jaxprune.training._penalties import PenaltyState as PenaltyState
from jaxprune.training._penalties import bridge_penalty as bridge_penalty
from jaxprune.training._penalties import group_lasso as group_lasso
from jaxprune.training._proximal import ProximalState as ProximalState
from jaxprune.training._proximal import proximal_group_lasso as proximal_group_lasso
from jaxprune.training._rank import TrainedRankState as TrainedRankState
from jaxprune.training._rank import trained_rank_pruning as trained_rank_pruning
from jaxprune.training._teacher import TeacherState as TeacherState
from jaxprune.training._teacher import ema_teacher as ema_teacher
from jaxprune.training._teacher import teacher_params as teacher_params
from jaxprune.training.noise import BridgeoutState as BridgeoutState
from jaxprune.training.noise import DropConnectState as DropConnectState
from jaxprune.training.noise import GroupBridgeoutState as GroupBridgeoutState
from jaxprune.training.noise import bridgeout as bridgeout
from jaxprune.training.noise import dropconnect as dropconnect
from jaxprune.training.noise import group_bridgeout as group_bridgeout
from jaxprune.training.noise import noisy_params as noisy_params
from jaxprune.training.sparse import Budget as Budget
from jaxprune.training.sparse import Moment as Moment
from jaxprune.training.sparse import Rule as Rule
from jaxprune.training.sparse import SparseState as SparseState
from jaxprune.training.sparse import current_masks as current_masks
from jaxprune.training.sparse import dynamic_network_surgery as dynamic_network_surgery
from jaxprune.training.sparse import gradual_pruning as gradual_pruning
from jaxprune.training.sparse import grow_and_prune as grow_and_prune
from jaxprune.training.sparse import hold_masks as hold_masks
from jaxprune.training.sparse import (
    iterative_hard_thresholding as iterative_hard_thresholding,
)
from jaxprune.training.sparse import (
    iterative_soft_shrinkage as iterative_soft_shrinkage,
)
from jaxprune.training.sparse import masked_params as masked_params
from jaxprune.training.sparse import movement_pruning as movement_pruning
from jaxprune.training.sparse import rigl as rigl
from jaxprune.training.sparse import (
    sparse_evolutionary_training as sparse_evolutionary_training,
)
from jaxprune.training.sparse import sparse_training as sparse_training
from jaxprune.training.sparse import straight_through as straight_through
from jaxprune.training.sparse import threshold_pruning as threshold_pruning
