"""Prepares a data set on first use and reads it: the same code for every name."""

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from jaxprune.data._specs import DATASETS, Dataset, Spec

_TIMEOUT_S = 5.0
_READ_AT_ONCE = 4096


def data_folder(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns where prepared data sets live.

    Args:
        data_dir: a folder; by default ``$JAXPRUNE_DATA``, else ``jaxprune`` in the
            user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``).

    Returns:
        The folder, which need not exist.

    Example:
        >>> data_folder("/data").as_posix()
        '/data'
    """
    if data_dir is None:
        data_dir = os.environ.get("JAXPRUNE_DATA")
    if not data_dir:
        data_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "jaxprune")
    return Path(data_dir).expanduser()


def _find(name: str) -> Spec:
    """Returns the spec of this name, or raises with what exists."""
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(str(name), DATASETS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no data set {name!r}; there are {', '.join(DATASETS)}{hint}")


def _builder(spec: Spec, folder: Path) -> Any:
    module, _, name = spec.builder.partition(":")
    builder_class = getattr(importlib.import_module(module), name)
    return builder_class(data_dir=folder, file_format="array_record")


def _missing(sources: Sequence[str], downloads: Path) -> list[str]:
    """Returns the archives that TFDS would have to fetch.

    TFDS takes an archive from ``manual`` by its original name, or from its own
    cache, where ``*.INFO`` beside a file names the address it came from.
    """
    cached = "".join(info.read_text() for info in downloads.rglob("*.INFO"))
    return [
        source
        for source in sources
        if source not in cached
        and not (downloads / "manual" / Path(urlsplit(source).path).name).exists()
    ]


def _require_reachable(spec: Spec, builder: object, folder: Path) -> None:
    """Raises within seconds when a download cannot work.

    TFDS would try ten times with growing pauses, more than two minutes in all. The
    question is asked through ``requests``, as TFDS downloads, so that proxies and
    certificates are the same; any answer will do.
    """
    import requests

    downloads = folder / "downloads"
    local = getattr(builder, "local_archives", lambda downloads: {})(downloads)
    sources = [s for s in getattr(builder, "SOURCES", ()) if s not in local]
    missing = _missing(sources, downloads)
    if not missing:
        return
    try:
        requests.head(missing[0], timeout=_TIMEOUT_S).close()
    except requests.RequestException as error:
        files = ", ".join(Path(urlsplit(source).path).name for source in missing)
        offline = ", ".join(spec.name for spec in DATASETS.values() if not spec.sources)
        host = urlsplit(missing[0]).netloc
        package = f"install Debian's {spec.package}, or " if spec.package else ""
        raise ConnectionError(
            f"{spec.name} is not prepared in {folder} and {host} "
            f"does not answer ({type(error).__name__}): put {files} into "
            f"{downloads / 'manual'}, or {package}load it once where there is a "
            f"network and pass that folder as data_dir; without any download there "
            f"are {offline}"
        ) from error


def prepare(spec: Spec, folder: Path) -> Any:
    """Returns the TFDS builder of a data set whose files are in `folder`.

    Args:
        spec: which data set.
        folder: the data directory; written to unless the files are there.

    Returns:
        A prepared ``tfds.core.DatasetBuilder``.

    Raises:
        ConnectionError: if an archive is missing and its host does not answer.
    """
    builder = _builder(spec, folder)
    if builder.data_path.exists():
        return builder
    _require_reachable(spec, builder, folder)
    try:
        # TFDS reports on its work by print, and stdout is for results.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    except OSError:
        # TFDS writes aside and renames the finished folder. Of two processes at
        # work the later cannot rename over the earlier, whose files are the same.
        builder = _builder(spec, folder)
        if not builder.data_path.exists():
            raise
    return builder


def _read(source: Any, spec: Spec) -> Dataset:
    images = np.empty((len(source), *spec.image_shape), np.uint8)
    labels = np.empty((len(source), *spec.label_shape), np.int32)
    for start in range(0, len(source), _READ_AT_ONCE):
        rows = range(start, min(start + _READ_AT_ONCE, len(source)))
        for row, record in zip(rows, source.__getitems__(list(rows)), strict=True):
            images[row] = record["image"]
            labels[row] = record["label"]
    images.setflags(write=False)
    labels.setflags(write=False)
    return Dataset(spec, images, labels)


def load(
    name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None
) -> Dataset:
    """Reads one split of a data set into memory, preparing it on first use.

    Files are TFDS's, in array_record format, read without TensorFlow. Examples come
    in the order of the files: shuffled once, the same for everybody, so that a
    slice is a random part. ``train[:90%]`` and ``train[90%:]`` are disjoint.

    Args:
        name: a key of ``DATASETS``.
        split: a TFDS split, such as ``train``, ``test``, ``train[:90%]``.
        data_dir: where prepared files are; by default ``$JAXPRUNE_DATA``, else
            ``~/.cache/jaxprune``.

    Returns:
        The images, uint8 ``[N, H, W, C]``, and the labels, int32 ``[N]``, or
        ``[N, H, W]`` where every pixel has one.

    Raises:
        ValueError: if the name or the split does not exist, or the split is empty.
        ConnectionError: if an archive is missing and its host does not answer.
        ModuleNotFoundError: if the extra ``jaxprune[experiments]`` is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     train = load("digits", "train", data_dir=folder)
        ...     validation = load("digits", "train[90%:]", data_dir=folder)
        >>> train.images.shape, train.labels.dtype, len(validation)
        ((1437, 8, 8, 1), dtype('int32'), 144)
    """
    spec = _find(name)
    try:
        builder = prepare(spec, data_folder(data_dir))
        if not builder.info.splits[split].num_examples:
            raise ValueError(f"split {split!r} of {name} holds no example")
        return _read(builder.as_data_source(split=split), spec)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs {error.name}: pip install 'jaxprune[experiments]'",
            name=error.name,
        ) from error
