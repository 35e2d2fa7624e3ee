"""How every primitive carries marks (`jaxprune.coupling.marks`).

A primitive without a handler carries nothing: the groups it touches cannot be merged.
Importing the package fills the registry.
"""

from jaxprune.coupling.flow import arithmetic, moves, programs
from jaxprune.coupling.flow.handlers import HANDLERS, unknown

__all__ = ["HANDLERS", "arithmetic", "moves", "programs", "unknown"]
