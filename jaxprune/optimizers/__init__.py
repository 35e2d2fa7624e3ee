"""Pruning methods as optax transformations."""

from jaxprune.optimizers.bridgeout import BridgeoutState as BridgeoutState
from jaxprune.optimizers.bridgeout import bridgeout as bridgeout
from jaxprune.optimizers.dropconnect import DropConnectState as DropConnectState
from jaxprune.optimizers.dropconnect import dropconnect as dropconnect
from jaxprune.optimizers.group_bridgeout import (
    GroupBridgeoutState as GroupBridgeoutState,
)
from jaxprune.optimizers.group_bridgeout import group_bridgeout as group_bridgeout
from jaxprune.optimizers.penalties import PenaltyState as PenaltyState
from jaxprune.optimizers.penalties import bridge_penalty as bridge_penalty
from jaxprune.optimizers.penalties import group_lasso as group_lasso
from jaxprune.optimizers.weight_noise import noisy_params as noisy_params
