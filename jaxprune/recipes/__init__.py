"""Whole workflows, composed of public pieces."""

from jaxprune.recipes import plans as plans
from jaxprune.recipes._adapruner import Inherited as Inherited
from jaxprune.recipes._adapruner import adapruner as adapruner
from jaxprune.recipes._functionality import Functions as Functions
from jaxprune.recipes._functionality import functionality as functionality
from jaxprune.recipes._layerwise import METHODS as METHODS
from jaxprune.recipes._layerwise import Reconstructed as Reconstructed
from jaxprune.recipes._layerwise import Searched as Searched
from jaxprune.recipes._layerwise import reconstruct as reconstruct
from jaxprune.recipes._layerwise import (
    search_with_compensation as search_with_compensation,
)
from jaxprune.recipes._prunability import prunability as prunability
from jaxprune.recipes._prune import prune as prune
from jaxprune.recipes._pruned import Pruned as Pruned
from jaxprune.recipes._pruned import load as load
from jaxprune.recipes._rounds import Round as Round
from jaxprune.recipes._rounds import Rounds as Rounds
from jaxprune.recipes._rounds import rounds as rounds
from jaxprune.recipes._sensitivity import Sensitivity as Sensitivity
from jaxprune.recipes._sensitivity import plot_sensitivity as plot_sensitivity
from jaxprune.recipes._sensitivity import sensitivity as sensitivity
from jaxprune.recipes._sipp import sipp as sipp
from jaxprune.recipes._sparse_gpt import Sparse as Sparse
from jaxprune.recipes._sparse_gpt import sparse_gpt as sparse_gpt
from jaxprune.recipes._training import State as State
from jaxprune.recipes._trials import FineTune as FineTune
from jaxprune.recipes._trials import Learned as Learned
from jaxprune.recipes._trials import learn_keep as learn_keep
from jaxprune.recipes._try_and_learn import try_and_learn as try_and_learn
