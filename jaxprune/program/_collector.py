"""Python's garbage collector, which has nothing to find in a program being traced."""

import contextlib
import gc
from collections.abc import Iterator

_NEVER = 2**31 - 1  # new objects before a collection: more than fit into memory


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses the collector; for code that makes many objects which all stay.

    The collector runs once for so many new objects, and now and then looks at all that
    there are; JAX's programs are made of so many that both happen within one trace.

    Only the threshold of automatic collections is raised. The switch (`gc.enable`,
    `gc.disable`) belongs to the caller: what any thread does to it meanwhile stays
    done, and so does a threshold that somebody sets meanwhile.

    Example:
        >>> before = gc.get_threshold()
        >>> with collector_paused():
        ...     gc.get_threshold() == before
        False
        >>> gc.get_threshold() == before
        True
    """
    before = gc.get_threshold()
    gc.set_threshold(_NEVER, *before[1:])
    try:
        yield
    finally:
        if gc.get_threshold()[0] == _NEVER:
            gc.set_threshold(*before)
