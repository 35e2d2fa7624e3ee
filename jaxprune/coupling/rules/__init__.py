"""Rules, one file per family of primitives; importing the package registers them."""

from jaxprune.coupling._registry import RULES, register_label
from jaxprune.coupling.rules import _algebra as _algebra
from jaxprune.coupling.rules import _collective as _collective
from jaxprune.coupling.rules import _control as _control
from jaxprune.coupling.rules import _custom as _custom
from jaxprune.coupling.rules import _elementwise as _elementwise
from jaxprune.coupling.rules import _indexing as _indexing
from jaxprune.coupling.rules import _linear as _linear
from jaxprune.coupling.rules import _pieces as _pieces
from jaxprune.coupling.rules import _random as _random
from jaxprune.coupling.rules import _reduction as _reduction
from jaxprune.coupling.rules import _scatter as _scatter
from jaxprune.coupling.rules import _shape as _shape
from jaxprune.coupling.rules import _shuffle as _shuffle
from jaxprune.coupling.rules._factors import by_factors
from jaxprune.program.primitives import DECLARATIONS

for _name in DECLARATIONS.keys() - RULES.keys():
    register_label(by_factors, _name)
