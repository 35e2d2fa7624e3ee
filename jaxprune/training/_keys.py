"""PRNG keys in the states of optimisers: as numbers, which every format can store.

A typed key is no array to `flax.serialization`, `equinox.tree_serialise_leaves` or
numpy. States therefore hold its words; the name of its implementation is the key of a
dict, and so part of the tree's structure.
"""

from typing import cast

import jax
import jax.numpy as jnp

StoredKey = dict[str, jax.Array]


def stored_key(key: int | jax.Array) -> StoredKey:
    """The words of a seed or of a typed key, by the name of the implementation.

    Raises:
        TypeError: if it is neither.

    Example:
        >>> stored_key(3)
        {'threefry2x32': Array([0, 3], dtype=uint32)}
    """
    typed = _typed(key)
    # A copy: donating the state's buffers must not delete the caller's key.
    return {str(jax.random.key_impl(typed)): jnp.copy(jax.random.key_data(typed))}


def typed_key(stored: StoredKey) -> jax.Array:
    """The key that was stored.

    Example:
        >>> bool(typed_key(stored_key(3)) == jax.random.key(3))
        True
    """
    ((implementation, words),) = stored.items()
    # Flattening unwraps boxes such as Flax NNX variables.
    return jax.random.wrap_key_data(jax.tree.leaves(words)[0], impl=implementation)


def _typed(key: int | jax.Array) -> jax.Array:
    dtype, shape = jnp.result_type(key), jnp.shape(key)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
        return cast(jax.Array, key)
    if not jnp.issubdtype(dtype, jnp.integer) or shape != ():
        raise TypeError(
            f"key must be an int or a typed key such as jax.random.key(0), got {key!r};"
            " wrap raw uint32 keys with jax.random.wrap_key_data"
        )
    return jax.random.key(key)
