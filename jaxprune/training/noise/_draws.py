"""What a draw of noise is made of: random factors, and the ranks of small weights."""

import jax
import jax.numpy as jnp


def kept_or_dropped(key: jax.Array, w: jax.Array, rate: jax.Array) -> jax.Array:
    """The random factor of the family, like `w`: mean 0, variance rate / (1 - rate).

    It is ``rate / (1 - rate)`` where a weight is kept, with probability ``1 - rate``,
    and -1 where it is dropped.
    """
    # Rounded down by at most 2^-32; a rate of 0 drops nothing.
    threshold = (rate.astype(jnp.float32) * jnp.float32(2**32)).astype(jnp.uint32)
    dropped = random_words(key, w.shape) < threshold
    rate = rate.astype(w.dtype)
    return jnp.where(dropped, -1.0, rate / (1 - rate))


def random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform words uint32, of half the random bits.

    Every second word is the one before with its halves swapped: each is uniform, and
    two of a pair compare with a threshold independently unless the upper half of one
    ties with it, which has probability 2^-16. The pairs lie side by side on the last
    axis, so that sharded words are drawn where they are needed.
    """
    *rows, last = shape or (1,)
    words = jax.random.bits(key, (*rows, -(-last // 2)), jnp.uint32)
    pairs = jnp.stack([words, (words << 16) | (words >> 16)], axis=-1)
    return pairs.reshape((*rows, -1))[..., :last].reshape(shape)


def smallest(w: jax.Array, fraction: jax.Array) -> jax.Array:
    """Which inputs of each output filter are small.

    An input of a filter is as large as the norm of its weights over the leading axes.
    Filters of a single input (a grey stem, a depthwise kernel) have nothing to rank
    but their weights, which are then ranked one by one. At least one is small.

    Returns:
        bool ``[1, ..., 1, in, out]``, or like `w` where ``in`` is 1.
    """
    if w.shape[-2] == 1:
        weights = jnp.abs(w).reshape(-1, w.shape[-1])
        return lowest(weights, fraction, axis=0, least=1).reshape(w.shape)
    leading = tuple(range(w.ndim - 2))
    norms = jnp.sqrt(jnp.sum(w * w, leading, keepdims=True)) if leading else jnp.abs(w)
    return lowest(norms, fraction, axis=-2, least=1)


def lowest(
    x: jax.Array, fraction: jax.Array | float, *, axis: int, least: int = 0
) -> jax.Array:
    """Which entries along an axis lie below the one of rank ``int(size * fraction)``.

    Entries are not negative. Ranks count from 0 and the comparison is strict, so ties
    with that entry are out. The rank is never below `least`.
    """
    size = x.shape[axis]
    # The margin covers the rounding of float32 products: 100 * 0.29 has rank 29.
    rank = jnp.floor(size * jnp.asarray(fraction) * (1 + 1e-6)).astype(jnp.int32)
    rank = jnp.maximum(rank, least)
    # As unsigned integers the bits of floats that are not negative have their order.
    width = jnp.finfo(x.dtype).bits
    bits = jax.lax.bitcast_convert_type(x, f"uint{width}")

    def settle(index: jax.Array, bound: jax.Array) -> jax.Array:
        bit = jnp.asarray(1, bits.dtype) << (width - 2 - index).astype(bits.dtype)
        below = jnp.sum(bits < (bound | bit), axis, jnp.int32, keepdims=True)
        return jnp.where(below <= rank, bound | bit, bound)

    # The largest number with at most `rank` entries below it is the entry of that rank,
    # found from its highest bit down, without a sort.
    begin = jnp.zeros_like(jax.lax.slice_in_dim(bits, 0, 1, axis=axis % x.ndim))
    bound = jax.lax.fori_loop(jnp.int32(0), jnp.int32(width - 1), settle, begin)
    return (bits < bound) | (rank >= size)
