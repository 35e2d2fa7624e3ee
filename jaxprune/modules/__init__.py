"""Flax modules from masks: with the reference models, the place that knows Flax.

`narrow` gives a function. Where a module is wanted, `nnx_module` returns an NNX module
whose layers are smaller, and `linen_module` a Linen module that takes sliced variables.
Not imported with `jaxprune`, which works without Flax.
"""

from jaxprune.modules.linen_modules import NarrowedModule as NarrowedModule
from jaxprune.modules.linen_modules import linen_module as linen_module
from jaxprune.modules.nnx_layers import fit_sizes as fit_sizes
from jaxprune.modules.nnx_modules import nnx_apply as nnx_apply
from jaxprune.modules.nnx_modules import nnx_module as nnx_module
