"""Progress bars with the time that is left, which go away when they end."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

import rich
import rich.errors
import rich.progress

T = TypeVar("T")


@contextlib.contextmanager
def advancing(
    title: str, total: int | None, progress: bool | None, done: int = 0
) -> Iterator[Callable[..., None]]:
    """A progress bar, advanced by hand.

    Args:
        title: what is being done.
        total: how many steps there are, None if nobody knows.
        progress: show it? None for on a terminal.
        done: how many are done already.

    Yields:
        ``advance(steps=1, title=None)``.
    """
    console = rich.get_console()
    show = console.is_terminal if progress is None else progress
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=console.is_terminal,
        disable=not show,
    )
    task = bar.add_task(title, total=total, completed=done)

    def advance(steps: int = 1, title: str | None = None) -> None:
        bar.update(task, advance=steps, description=title)

    with contextlib.ExitStack() as stack:
        # Another bar may be on the screen; then this one stays away.
        with contextlib.suppress(rich.errors.LiveError):
            stack.enter_context(bar)
        yield advance


def tracked(items: Iterable[T], title: str, progress: bool | None) -> Iterator[T]:
    """The items, under a progress bar.

    Example:
        >>> list(tracked([1, 2], "counting", progress=False))
        [1, 2]
    """
    total = len(items) if isinstance(items, Sized) else None
    with advancing(title, total, progress) as advance:
        for item in items:
            yield item
            advance()
