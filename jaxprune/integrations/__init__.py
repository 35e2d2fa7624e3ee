"""Everything that knows a module library; nothing else does, but the reference models.

`narrow` gives a function. Where a module is wanted, `nnx.nnx_module` returns an NNX
module whose layers are smaller, and `linen.linen_module` a Linen module that takes
sliced variables. Each submodule imports its library, so none is imported with
`jaxprune`.
"""
