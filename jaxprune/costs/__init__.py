"""Costs: what one call of any JAX function costs, as numbers and as functions."""

from jaxprune.costs.count import Costs as Costs
from jaxprune.costs.count import costs as costs
from jaxprune.costs.model import CostModel as CostModel
from jaxprune.costs.model import cost_model as cost_model
from jaxprune.costs.polynomial import Cost as Cost
from jaxprune.costs.polynomial import Polynomial as Polynomial
from jaxprune.costs.polynomial import Product as Product
