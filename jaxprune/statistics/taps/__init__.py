"""Taps: read or change the activations inside any function, without editing it.

`names` lists what can be tapped, `read` returns activations beside the result,
`modify` changes them on their way, `gate` multiplies the units of groups and
`gate_branches` whole residual branches. These are
transformations of the function, like `jax.vmap`: they work under jit, grad and vmap,
on Linen, NNX, Equinox and plain code. `exciting_inputs` looks for what every unit
answers to.
"""

from jaxprune.statistics.taps._branches import gate_branches as gate_branches
from jaxprune.statistics.taps._contracted import contracted_axes as contracted_axes
from jaxprune.statistics.taps._gates import gate as gate
from jaxprune.statistics.taps._images import exciting_inputs as exciting_inputs
from jaxprune.statistics.taps._named import modify as modify
from jaxprune.statistics.taps._named import names as names
from jaxprune.statistics.taps._named import read as read
