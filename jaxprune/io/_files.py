"""Files replaced as a whole, folders with one writer, sizes known before reading."""

import contextlib
import errno
import os
import stat
import threading
from pathlib import Path
from typing import Any

import filelock

LOCK = ".lock"


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replaces a file as a whole: whoever reads it finds the old or the new content.

    Args:
        path: the file; its folder must exist.
        content: text (written as UTF-8) or bytes.

    Raises:
        OSError: if it cannot be written; the old file is then untouched.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "plan.json")
        >>> write_atomically(path, "old")
        >>> write_atomically(path, "new")
        >>> path.read_text(), [file.name for file in path.parent.iterdir()]
        ('new', ['plan.json'])
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Devices and pipes, which may never end, are refused before they are opened.

    Raises:
        ValueError: if it is no regular file, or larger than `limit`.
        OSError: if it cannot be read.
    """
    size = regular_size(path)
    if size > limit:
        raise ValueError(f"{path.name} has {size} bytes, more than {limit}")
    with path.open("rb") as file:
        data = file.read(size + 1)
    if len(data) > size:
        raise ValueError(f"{path.name} grew while it was read")
    return data


def regular_size(path: Path) -> int:
    """The size of a regular file.

    Raises:
        ValueError: if it is missing, or a device, a pipe or a folder.
    """
    try:
        about = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    return about.st_size


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of what an error says, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


def as_os_error(error: Exception, text: str) -> OSError:
    """An OSError for what failed while a file was written, full disk recognised."""
    if isinstance(error, OSError) and error.errno is not None:
        code = error.errno
    else:
        full = "No space left" in str(error) or "ENOSPC" in str(error)
        code = errno.ENOSPC if full else errno.EIO
    return OSError(code, f"{text}: {first_line(error)}")


class _Held:
    """A folder that this process writes to, and alone."""

    def __init__(self, lock: filelock.BaseFileLock):
        self.lock = lock
        self.process = os.getpid()


_HELD: dict[str, _Held] = {}
_GUARD = threading.Lock()
_TURNS: dict[str, threading.RLock] = {}


def hold(folder: str | os.PathLike[str]) -> None:
    """Makes this process the only writer of a folder, until it ends.

    The lock is the operating system's, so it ends with the process, also by a kill.
    Between writes it stays held: two runs that write in turns replace each other's
    files just as two that write at once.

    Raises:
        BlockingIOError: if another process is the folder's writer.
    """
    folder = Path(folder).resolve()
    with _GUARD:
        held = _HELD.get(str(folder))
        # A forked child inherits the table, but is another writer.
        if held is None or held.process != os.getpid():
            _HELD[str(folder)] = _Held(_acquired(folder))


def release(folder: str | os.PathLike[str]) -> None:
    """Lets another process write to a folder that this process wrote to.

    Nothing happens if this process does not hold the folder.
    """
    with _GUARD:
        held = _HELD.pop(str(Path(folder).resolve()), None)
        if held is not None and held.process == os.getpid():
            held.lock.release()


def turn(folder: str | os.PathLike[str]) -> threading.RLock:
    """The lock by which threads of this process take turns in a folder."""
    with _GUARD:
        return _TURNS.setdefault(str(Path(folder).resolve()), threading.RLock())


def _acquired(folder: Path) -> filelock.BaseFileLock:
    lock: Any = filelock.FileLock(folder / LOCK, blocking=False, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(
            errno.EAGAIN,
            f"another process writes to {folder}; give each run a folder of its own, "
            "or end the other process",
        ) from None
    return lock
