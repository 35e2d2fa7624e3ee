"""A JAX program without pruning in it: its jaxpr, and what its primitives do."""

from jaxprune.program._contracted import contracted_axes as contracted_axes
