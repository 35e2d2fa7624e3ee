"""The folder of a run: its journal, its progress on screen, and how it stops.

Whatever is finished is in ``results.json`` at once, under a name; asked for again it is
read and not computed. So the same command goes on where the last one stopped.
"""

import contextlib
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import rich.console
import rich.progress

from jaxprune.cli._main import UsageError
from jaxprune.display import command, machine
from jaxprune.io._files import write_atomically

Tick = Callable[[], None]

RESULTS, LOCK = "results.json", ".lock"


class Job(NamedTuple):
    """Work that makes one record.

    Attributes:
        compute: called with a function to call after every piece of work.
        ticks: how often it calls that.
    """

    compute: Callable[[Tick], Any]
    ticks: int


class Run:
    """One run folder, open for work; see `open_run`.

    Attributes:
        folder: where everything goes.
        results: what is in ``results.json``.
        finished: whether nothing is left to do.
    """

    def __init__(self, folder: Path, results: dict[str, Any]):
        self.folder = folder
        self.results = results
        self.finished = "finished" in results
        self._before, self._begin = results["seconds"], time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:24}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("about"),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("left"),
            console=rich.console.Console(stderr=True, highlight=False),
        )

    def say(self, text: str) -> None:
        """Prints a line above the progress bars."""
        self._progress.console.print(text)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Returns the record of that name, computed and written if there is none."""
        records = self.results["records"]
        if name not in records:
            self.put(name, compute())
        return records[name]

    def put(self, name: str, record: Any) -> None:
        """Writes a record; the file is replaced as a whole, so a kill is no harm."""
        with self._lock:
            # As it will be read again: string keys, lists.
            self.results["records"][name] = json.loads(json.dumps(record))
            self._write()

    def close(self, **final: Any) -> None:
        """Writes the last numbers; the run is finished."""
        with self._lock:
            self.results |= final | {"finished": _now()}
            self._write()

    def _write(self) -> None:
        self.results["seconds"] = round(
            self._before + time.monotonic() - self._begin, 1
        )
        _write(self.folder, self.results)

    def each(
        self, title: str, jobs: Mapping[str, Job], tell: Callable[[str, Any], str]
    ) -> None:
        """Computes the records that are missing, several at a time.

        Small convolutions keep one core busy, so on a CPU there are as many threads
        as cores; XLA computes outside Python's lock.

        Args:
            title: of the progress bar.
            jobs: name of the record -> what computes it, in the order to start.
            tell: ``(name, record)`` -> a line to print when it is there.
        """
        records = self.results["records"]
        missing = {name: job for name, job in jobs.items() if name not in records}
        total = sum(job.ticks for job in missing.values())
        bar = self._progress.add_task(title, total=total)

        def tick() -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._progress.advance(bar)

        workers = (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1
        with ThreadPoolExecutor(min(workers, 8)) as pool:
            running = {pool.submit(j.compute, tick): n for n, j in missing.items()}
            try:
                for future in as_completed(running):
                    self.put(name := running[future], future.result())
                    self.say(tell(name, records[name]))
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    @contextlib.contextmanager
    def _working(self) -> Iterator["Run"]:
        with self._progress:
            try:
                yield self
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"stopped; what is finished is in {self.folder}: "
                    "the same command goes on from there"
                ) from None


@contextlib.contextmanager
def open_run(folder: Path, settings: Mapping[str, Any]) -> Iterator[Run]:
    """Opens a new run folder, or one of the same settings to go on.

    Args:
        folder: made if missing; compiled programs are kept in ``.jax_cache`` beside it.
        settings: everything the numbers depend on, as JSON holds it.

    Yields:
        The run. A Ctrl-C inside says how to go on.

    Raises:
        UsageError: if the folder holds a run of other settings, a damaged one or
            something else, or if another process is at work in it.
    """
    settings = json.loads(json.dumps(settings))
    _refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        results = _opened(folder, settings)
        _keep_compiled(folder.parent / ".jax_cache")
        with Run(folder, results)._working() as run:
            yield run


def _opened(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    results = _read(folder)
    if results is None:
        results = {
            "command": "",
            "started": _now(),
            "seconds": 0.0,
            "settings": settings,
            "machine": machine(),
            "records": {},
        }
        _write(folder, results)
    _refuse_other(folder, results["settings"], settings)
    results["command"] = command()
    return results


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Ends with the process, also by a kill; see `filelock`."""
    lock: Any = filelock.FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(
            f"another run is at work in {folder}; wait for it, or give another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give another --out")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names - {LOCK} and RESULTS not in names:
        raise UsageError(f"{folder} is not empty and holds no run; give another --out")


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / RESULTS
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_bytes())
        kinds = {"settings": dict, "records": dict, "seconds": (int, float)}
        for name, kind in kinds.items():
            if not isinstance(results[name], kind):
                raise TypeError(f"{name} is {results[name]!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UsageError(
            f"{path} is damaged ({reason}); give another --out, or delete the folder"
        ) from error
    return results


def _write(folder: Path, results: Mapping[str, Any]) -> None:
    write_atomically(folder / RESULTS, json.dumps(results, indent=1) + "\n")


def _refuse_other(
    folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]
) -> None:
    different = [
        f"{name} was {there.get(name)} and is now {here.get(name)}"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if different:
        raise UsageError(
            f"{folder} holds a run of other settings ({'; '.join(different)}); give "
            "another --out, or delete the folder"
        )


def _keep_compiled(folder: Path) -> None:
    """Keeps compiled programs in a folder, if nobody else can put theirs there."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    foreign = hasattr(os, "getuid") and about.st_uid != os.getuid()
    if foreign or not stat.S_ISDIR(about.st_mode) or about.st_mode & 0o022:
        print(
            f"{folder} is not yours alone, so no compiled program is kept or read",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
