"""The command line: `jaxprune inspect`, `prune`, `export`, `run`, `list`.

An experiment is a function whose one argument is a frozen dataclass of settings. Those
of this project lie beside the package in a clone (`experiments/NAME/study.py`); other
packages add theirs as entry points in the group ``jaxprune.experiments``. This package
imports none before it is asked for. What the user got wrong is told in one line with
exit status 2; a traceback means a defect.
"""

import ast
import contextlib
import importlib.metadata
import importlib.util
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxprune.cli._words import UsageError, known, parse_into

GROUP = "jaxprune.experiments"

USAGE = """\
usage: jaxprune inspect MODULE:FACTORY    what of a model can be cut, and what it costs
       jaxprune prune MODULE:FACTORY --budget .5 --out DIR
       jaxprune export DIR --out FILE     a pruned folder in another format
       jaxprune run MODULE:FACTORY --budget .5 --out DIR
                                          cut in rounds and train in between
       jaxprune run NAME [options]        run an experiment
       jaxprune list                      the experiments that there are
       jaxprune completion bash           for `source <(jaxprune completion bash)`
       jaxprune COMMAND --help            its options
       jaxprune --version
"""

ELSEWHERE = (
    "experiments are not installed with the package; they lie in experiments/ of a "
    "clone of the project: run `uv run jaxprune run NAME` there"
)

COMMANDS = ["inspect", "prune", "export", "run", "list", "completion"]


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


def _command(words: list[str]) -> int:
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
    elif command == "--version":
        print("jaxprune", importlib.metadata.version("jaxprune"))
    elif known("command", command, COMMANDS) == "list":
        _list()
    elif command == "completion":
        _completion(words[1:])
    elif command != "run" or ":" in "".join(words[1:2]):
        _own(command, words[1:])
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


def parse(experiment: Callable[[Any], object], prog: str, words: Sequence[str]) -> Any:
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
    config = next(iter(typing.get_type_hints(experiment).values()))
    description = sys.modules[experiment.__module__].__doc__ or ""
    return parse_into(config, prog, words, description)


def _own(command: str, words: list[str]) -> None:
    """A command for the user's own model."""
    try:
        from jaxprune.cli import _own_model as own
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{command} needs {error.name}: pip install 'jaxprune[experiments]'"
        ) from error
    config, act = {
        "inspect": (own.Inspect, own.inspect),
        "prune": (own.Prune, own.prune),
        "run": (own.Run, own.run),
        "export": (own.Export, own.export),
    }[command]
    found = parse_into(config, f"jaxprune {command}", words, config.__doc__ or "")
    if found is not None:
        act(found)


def _named(name: str) -> Callable[[], None]:
    def command() -> None:
        """Of experiments."""

    command.__name__ = name
    return command


def _completion(words: list[str]) -> None:
    """Prints what a shell sources to complete commands and options."""
    import tyro

    from jaxprune.cli import _own_model as own

    shell = known("shell", words[0] if words else "", ["bash", "zsh"])
    commands = {"inspect": own.Inspect, "prune": own.Prune, "export": own.Export}
    commands["run"] = own.Run
    app: Any = tyro.extras.SubcommandApp()
    for name, config in commands.items():
        app.command(config, name=name)
    app.command(_named("list"), name="list")
    # tyro leaves once it has printed it.
    with contextlib.suppress(SystemExit):
        app.cli(prog="jaxprune", args=["--tyro-print-completion", shell])


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
