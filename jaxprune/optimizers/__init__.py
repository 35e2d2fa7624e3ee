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
from jaxprune.optimizers.weight_noise import noisy_params as noisy_params
