"""What lies on disk: checkpoints between rounds, exported programs."""

from jaxprune.io import checkpoints as checkpoints
from jaxprune.io import export as export
