"""Pruning methods as optax transformations."""

from jaxprune.optimizers.bridgeout import BridgeoutState as BridgeoutState
from jaxprune.optimizers.bridgeout import bridgeout as bridgeout
from jaxprune.optimizers.bridgeout import noisy_params as noisy_params
