"""Costs: what one call of any JAX function costs, as numbers and as functions."""

from jaxprune.costing._count import Costs as Costs
from jaxprune.costing._count import costs as costs
from jaxprune.costing._equations import equations as equations
from jaxprune.costing._latency import LatencyTable as LatencyTable
from jaxprune.costing._latency import latency_table as latency_table
from jaxprune.costing._model import CostModel as CostModel
from jaxprune.costing._model import cost_model as cost_model
from jaxprune.costing._polynomial import Cost as Cost
from jaxprune.costing._polynomial import Polynomial as Polynomial
from jaxprune.costing._polynomial import Product as Product
