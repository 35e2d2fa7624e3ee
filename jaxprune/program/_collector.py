"""Python's garbage collector, which has nothing to find in a program being traced."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses the collector; for code that makes many objects which all stay.

    The collector runs once for so many new objects, and now and then looks at all that
    there are; JAX's programs are made of so many that both happen within one trace.
    Who had switched it off finds it off, also in other threads.

    Example:
        >>> with collector_paused():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
