"""Folders that hold one thing in several files, described by one JSON file.

The JSON names the other files with their sizes and checksums, and is replaced last, as
a whole: whoever reads finds what was there before or what is there now. Files that are
replaced get new names, so the old ones are intact until nothing refers to them.
"""

import contextlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from jaxprune.io._files import (
    LOCK,
    as_os_error,
    first_line,
    read_regular,
    regular_size,
    write_atomically,
)

_LARGEST_JSON = 2**28
_AT_ONCE = 2**20
# By the file that describes it: a folder of another kind is told apart.
_HOLDS = {
    "pruned.json": "a pruned model, see jaxprune.load",
    "model.json": "an exported model, see io.load_exported",
    "widths.json": "several widths, see io.load_widths",
}
_NAME = re.compile(r"(?P<stem>[a-z]+)(\.\d+)?(?P<suffix>\.[a-z]+|)")

Writer = Callable[[Path], None]


def write_folder(
    folder: Path,
    manifest: str,
    about: Mapping[str, object],
    writers: Mapping[str, Writer],
) -> None:
    """Writes a folder, or replaces what is in it.

    Args:
        folder: made if missing; must be empty or hold the same kind of thing.
        manifest: name of the JSON file.
        about: what it says.
        writers: file name -> what writes a file (or folder) of that content.

    Raises:
        ValueError: if the folder holds something else.
        OSError: if it cannot be written; what was there before is still there.
    """
    _refuse_other(folder, manifest, writers)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / LOCK):
        number = _free_number(folder, writers)
        paths = {name: folder / _numbered(name, number) for name in writers}
        try:
            for name, write in writers.items():
                write(paths[name])
            files = {name: _facts(path) for name, path in paths.items()}
            text = json.dumps(sealed({**about, "files": files}), indent=1)
            write_atomically(folder / manifest, text + "\n")
        except BaseException as error:
            for path in paths.values():
                _remove(path)
            if not isinstance(error, Exception):
                raise
            raise as_os_error(error, f"{folder} could not be written") from error
        for path in folder.iterdir():
            if _logical(path.name) in writers and path not in paths.values():
                _remove(path)


def read_folder(
    folder: Path, kind: str, manifest: str, names: Mapping[str, bool]
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Reads the JSON of a folder and checks the files that it names.

    Args:
        folder: what `write_folder` wrote to.
        kind: what it should hold, for errors.
        manifest: name of the JSON file.
        names: file name -> whether it must be there.

    Returns:
        What the JSON says, and where each file is.

    Raises:
        ValueError: if the folder does not hold this, or what is damaged.
    """
    if not (folder / manifest).exists():
        raise ValueError(f"{folder} holds no {kind}: {_missing(folder, manifest)}")
    with naming_damage(folder, kind):
        try:
            about = json.loads(read_regular(folder / manifest, _LARGEST_JSON))
            right = isinstance(about, dict) and about == sealed(about)
        except RecursionError:
            raise ValueError(f"{manifest} is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{manifest} is no JSON: {error}") from None
        if not right:
            raise ValueError(f"{manifest} is not what was saved")
        files = about["files"]
        for name in names:
            if names[name] and name not in files:
                raise ValueError(f"{manifest} names no {name}")
        present = [name for name in names if name in files]
        return about, {name: _checked(folder, name, files[name]) for name in present}


@contextlib.contextmanager
def naming_damage(folder: Path, kind: str) -> Iterator[None]:
    """Whatever is raised inside becomes a ValueError that names the folder."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"the {kind} in {folder} is damaged: {first_line(error)}"
        ) from error


def _missing(folder: Path, manifest: str) -> str:
    """Why the JSON is not there, as far as can be told."""
    if not folder.exists():
        return f"{folder} does not exist"
    if not folder.is_dir():
        return "it is a file, not a folder"
    others = [name for name in _HOLDS if (folder / name).exists()]
    held = f"; it holds {_HOLDS[others[0]]}" if others else ""
    return f"{manifest} is missing{held}"


def sealed(about: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a checksum of all of it."""
    content = {key: value for key, value in about.items() if key != "sealed"}
    text = json.dumps(content, sort_keys=True)
    return {**content, "sealed": zlib.crc32(text.encode())}


def _facts(path: Path) -> dict[str, Any]:
    if path.is_dir():  # it has checksums of its own
        return {"name": path.name}
    return {"name": path.name, "bytes": path.stat().st_size, "crc32": _crc32(path)}


def _checked(folder: Path, name: str, facts: Mapping[str, Any]) -> Path:
    if _logical(facts["name"]) != name:
        raise ValueError(f"{facts['name']} is not a valid name for {name}")
    path = folder / facts["name"]
    if "crc32" not in facts:
        if not path.is_dir():
            raise ValueError(f"{path.name} is missing")
    elif regular_size(path) != facts["bytes"] or _crc32(path) != facts["crc32"]:
        raise ValueError(f"{path.name} is not what was saved")
    return path


def _crc32(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(_AT_ONCE):
            total = zlib.crc32(chunk, total)
    return total


def _numbered(name: str, number: int) -> str:
    path = Path(name)
    return f"{path.stem}.{number}{path.suffix}" if number else name


def _logical(name: str) -> str:
    """``parameters.npz`` for ``parameters.2.npz``; "" for other names."""
    match = _NAME.fullmatch(name)
    return match["stem"] + match["suffix"] if match else ""


def _free_number(folder: Path, writers: Mapping[str, Writer]) -> int:
    number = 0
    while any((folder / _numbered(name, number)).exists() for name in writers):
        number += 1
    return number


def _refuse_other(folder: Path, manifest: str, writers: Mapping[str, Writer]) -> None:
    if not folder.exists() or (folder / manifest).exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder")
    ours = {*writers, LOCK.lstrip(".")}
    other = [p.name for p in folder.iterdir() if p.name != LOCK]
    other = sorted(n for n in other if _logical(n) not in ours and n[-4:] != ".tmp")
    if other:
        raise ValueError(f"{folder} holds something else, such as {other[0]}")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
