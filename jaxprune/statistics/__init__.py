"""What data says: second moments, taps on activations, recalibration."""

from jaxprune.statistics import taps as taps
from jaxprune.statistics._moments import Moments as Moments
from jaxprune.statistics._moments import moments as moments
from jaxprune.statistics._recalibration import recalibrate as recalibrate
