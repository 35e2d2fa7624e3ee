"""How every primitive carries marks (`jaxprune.coupling._marks`).

A primitive without a handler carries nothing: the groups it touches cannot be merged.
Importing the package fills the registry.
"""

from jaxprune.coupling.flow import _arithmetic as _arithmetic
from jaxprune.coupling.flow import _moves as _moves
from jaxprune.coupling.flow import _programs as _programs
from jaxprune.coupling.flow._handlers import HANDLERS, unknown

__all__ = ["HANDLERS", "unknown"]
