"""The command line: `jaxprune run NAME`, `jaxprune list`.

An experiment is a function whose one argument is a frozen dataclass of settings. Those
of this project lie beside the package in a clone (`experiments/NAME/study.py`); other
packages add theirs as entry points in the group ``jaxprune.experiments``. This package
imports none before it is asked for. What the user got wrong is told in one line with
exit status 2; a traceback means a defect.
"""

import ast
import contextlib
import difflib
import importlib.metadata
import importlib.util
import io
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

GROUP = "jaxprune.experiments"

USAGE = """\
usage: jaxprune run NAME [options]   run an experiment
       jaxprune run NAME --help      its question, its settings, what it leaves
       jaxprune list                 the experiments that there are
       jaxprune --version
"""

ELSEWHERE = (
    "experiments are not installed with the package; they lie in experiments/ of a "
    "clone of the project: run `uv run jaxprune run NAME` there"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after ``jaxprune``; by default those of the process.

    Returns:
        The exit status: 0, 1 if the machine cannot do it (no network, no space), 2 if
        the user asked for something that does not exist, 130 after Ctrl-C.

    Example:
        >>> main(["--version"])
        jaxprune ...
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _command(words)
    except UsageError as error:
        print(f"jaxprune: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # No network, no space, no permission: the world's fault, told in one line.
        print(f"jaxprune: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"\njaxprune: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130


class UsageError(ValueError):
    """Something the user asked for does not exist or does not fit."""


def known(kind: str, name: str, names: Iterable[str]) -> str:
    """Returns `name` if it is one of `names`.

    Args:
        kind: what it is the name of, for the error.
        name: what was asked for.
        names: what exists.

    Returns:
        `name`.

    Raises:
        UsageError: if it is not; the text has the closest and all that exist.

    Example:
        >>> known("model", "vgg17", ["vgg16", "lenet5"])
        Traceback (most recent call last):
            ...
        jaxprune.cli._main.UsageError: no model 'vgg17'; did you mean vgg16? there ...
    """
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"no {kind} {name!r}; {hint}there are {', '.join(names)}")


def _command(words: list[str]) -> int:
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
    elif command == "--version":
        print("jaxprune", importlib.metadata.version("jaxprune"))
    elif known("command", command, ["run", "list"]) == "list":
        _list()
    else:
        _run(words[1:])
    return 0


def _list() -> None:
    experiments = _experiments()
    if not experiments:
        print(ELSEWHERE)
    for name, entry in experiments.items():
        print(f"{name:20} {_first_line(entry.value.partition(':')[0])}")


def _run(words: list[str]) -> None:
    experiments = _experiments()
    names = ", ".join(experiments) or f"none; {ELSEWHERE}"
    if not words or words[0] in ("-h", "--help"):
        print(f"{USAGE}\nexperiments: {names}")
        return
    if not experiments:
        raise UsageError(f"no experiment {words[0]!r}: {ELSEWHERE}")
    name = known("experiment", words[0], experiments)
    try:
        experiment = experiments[name].load()
        config = parse(experiment, f"jaxprune run {name}", words[1:])
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{name} needs {error.name}: pip install 'jaxprune[experiments]'"
        ) from error
    if config is not None:
        experiment(config)


def parse(experiment: Callable[[Any], Any], prog: str, words: Sequence[str]) -> Any:
    """Parses the settings of an experiment, with errors of one line.

    Args:
        experiment: its only argument is annotated with a dataclass; the docstring of
            its module is the help text.
        prog: the words before the options.
        words: the options.

    Returns:
        An instance of the dataclass, or None if help was asked for and printed.

    Raises:
        UsageError: if an option does not exist or has a wrong value.
    """
    import tyro

    config = next(iter(typing.get_type_hints(experiment).values()))
    options = [f"--{field.replace('_', '-')}" for field in config.__dataclass_fields__]
    for word in words:
        if word.startswith("--") and word != "--help":
            option = word.partition("=")[0].replace("_", "-")
            known("option", option.replace("--no-", "--"), options)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            description = sys.modules[experiment.__module__].__doc__
            return tyro.cli(config, prog=prog, description=description, args=words)
    except SystemExit as stop:
        if not stop.code:
            return None
        text = _one_line(told.getvalue())
        raise UsageError(
            text.removeprefix(f"Error parsing {config.__name__}: ")
        ) from None


def _experiments() -> dict[str, importlib.metadata.EntryPoint]:
    entries = {entry.name: entry for entry in _in_clone()}
    for entry in importlib.metadata.entry_points(group=GROUP):
        entries[entry.name] = entry
    return dict(sorted(entries.items()))


def _in_clone() -> Iterable[importlib.metadata.EntryPoint]:
    """The experiments that lie beside the package, made importable."""
    root = Path(__file__).resolve().parents[2]
    for study in root.glob("experiments/*/study.py"):
        if str(root) not in sys.path:
            sys.path.append(str(root))
        name = study.parent.name
        value = f"experiments.{name}.study:main"
        yield importlib.metadata.EntryPoint(name, value, GROUP)


def _first_line(module: str) -> str:
    """The first line of a module's docstring, without importing the module."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin:
        return f"(module {module} is missing)"
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or ""
    return text.partition("\n")[0]


def _one_line(box: str) -> str:
    """What a tyro error box says above its first rule, in one line."""
    rows = [row.strip("│ ") for row in box.splitlines()[1:]]
    rule = next((i for i, row in enumerate(rows) if row.startswith("─")), len(rows))
    return " ".join(row for row in rows[:rule] if row and not row.startswith("╰"))
