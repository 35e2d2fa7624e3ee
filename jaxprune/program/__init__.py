"""A JAX program without pruning in it: jaxprs of every supported JAX."""
