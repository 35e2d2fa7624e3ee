"""What several runs say about one number."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats


class Interval(NamedTuple):
    """What several runs say about one number.

    Attributes:
        mean: of the runs.
        std: sample standard deviation of the runs; nan for a single one.
        low: lower end of the 95 % confidence interval of the mean; nan likewise.
        high: upper end.
        n: how many runs.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.n < 2:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[float]) -> Interval:
    """Estimates the mean of independent runs by Student's t.

    Args:
        values: one number per run.

    Returns:
        Mean, sample standard deviation and 95 % confidence interval of the mean.

    Raises:
        ValueError: if there are no values.

    Example:
        >>> print(interval([1.0, 2.0, 3.0]))
        2.000 [-0.484, 4.484]
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan, math.nan, 1)
    std = float(np.std(values, ddof=1))
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * std / np.sqrt(len(values))
    return Interval(mean, std, mean - float(half), mean + float(half), len(values))
