"""Widths: networks that run at several, and what finds good ones."""

from jaxprune.search._counts import Counts as Counts
from jaxprune.search._counts import multi_base as multi_base
from jaxprune.search._counts import threshold_counts as threshold_counts
from jaxprune.search._counts import uniform as uniform
from jaxprune.search._joint import JointState as JointState
from jaxprune.search._joint import calibrate as calibrate
from jaxprune.search._joint import joint_state as joint_state
from jaxprune.search._joint import joint_step as joint_step
from jaxprune.search._nesting import importance as importance
from jaxprune.search._slimmable import Slimmable as Slimmable
from jaxprune.search._slimmable import Width as Width
from jaxprune.search._slimmable import slimmable as slimmable
