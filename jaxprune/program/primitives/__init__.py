"""One declaration per primitive: what its axes are indexed by, how it combines."""

from jaxprune.program.primitives import (
    _contractions,
    _elementwise,
    _indexing,
    _moves,
    _others,
    _reductions,
)
from jaxprune.program.primitives._declaration import DECLARATIONS as DECLARATIONS
from jaxprune.program.primitives._declaration import Declaration as Declaration
from jaxprune.program.primitives._declaration import declaration as declaration
from jaxprune.program.primitives._declaration import declare as declare
from jaxprune.program.primitives._declaration import signature as signature
from jaxprune.program.primitives._elementwise import elementwise as elementwise
from jaxprune.program.primitives._signature import Builder as Builder
from jaxprune.program.primitives._signature import Signature as Signature
from jaxprune.program.primitives._zeros import signs_of_zeros as signs_of_zeros

# Importing them fills the table.
_FAMILIES = (_contractions, _elementwise, _indexing, _moves, _others, _reductions)
