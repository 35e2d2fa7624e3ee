"""What data says: sums streamed over batches, taps on activations, recalibration."""

from jaxprune.statistics import taps as taps
from jaxprune.statistics._recalibration import recalibrate as recalibrate
