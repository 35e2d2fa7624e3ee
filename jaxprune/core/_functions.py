"""What is given as the function to prune, if it is none."""

_LIBRARIES = {
    "flax.nnx": "an NNX module; use jaxprune.integrations.nnx.prune(model, ...), or "
    "jaxprune.integrations.nnx.nnx_apply(model) for a function and its variables",
    "flax.linen": "a Linen module; pass its apply: net.apply",
    "haiku": "a Haiku transform; use jaxprune.integrations.haiku.haiku_apply",
    "keras": "a Keras model; use jaxprune.integrations.keras.keras_apply(model) for a "
    "function and its variables",
}


def check_function(apply_fn: object) -> None:
    """Raises unless this can be called as ``apply_fn(variables, *args)``.

    Raises:
        TypeError: naming the library whose module was given, and what to pass.

    Example:
        >>> check_function(3)
        Traceback (most recent call last):
            ...
        TypeError: apply_fn must be a function of variables, got a int
    """
    for kind in type(apply_fn).__mro__:
        for library, hint in _LIBRARIES.items():
            if kind.__module__.startswith(library):
                raise TypeError(f"apply_fn is {type(apply_fn).__name__}, {hint}")
    if callable(apply_fn):
        return
    if callable(getattr(apply_fn, "apply", None)):
        raise TypeError(
            f"apply_fn is a {type(apply_fn).__name__}; pass its function: .apply"
        )
    kind = type(apply_fn).__name__
    raise TypeError(f"apply_fn must be a function of variables, got a {kind}")
