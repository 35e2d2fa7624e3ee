"""Which axes belong together: from any JAX function to its groups."""

from jaxprune.coupling._register import register_rule as register_rule
from jaxprune.coupling._trace import trace as trace
