"""Noise on weights and activations that amounts to a penalty: the Bridgeout family."""

from jaxprune.training.noise._bridgeout import BridgeoutState as BridgeoutState
from jaxprune.training.noise._bridgeout import bridgeout as bridgeout
from jaxprune.training.noise._dropconnect import DropConnectState as DropConnectState
from jaxprune.training.noise._dropconnect import dropconnect as dropconnect
from jaxprune.training.noise._group_bridgeout import (
    GroupBridgeoutState as GroupBridgeoutState,
)
from jaxprune.training.noise._group_bridgeout import group_bridgeout as group_bridgeout
from jaxprune.training.noise._weight_noise import noisy_params as noisy_params
