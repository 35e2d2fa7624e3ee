"""Packages that only some functions need."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """A missing package is told with the extra that brings it.

    Args:
        what: what needs it, in the plural.
        extra: of ``jaxprune[extra]``.

    Raises:
        ModuleNotFoundError: if an import inside fails.

    Example:
        >>> with needing("moon rockets", "moon"):
        ...     import saturn_five
        Traceback (most recent call last):
            ...
        ModuleNotFoundError: moon rockets need saturn_five: pip install 'jaxprune[moon]'
    """
    try:
        yield
    except ImportError as error:
        missing = error.name or str(error).splitlines()[0]
        raise ModuleNotFoundError(
            f"{what} need {missing}: pip install 'jaxprune[{extra}]'", name=error.name
        ) from error
