"""Words of a command: what exists, and what is wrong with them, in one line."""

import contextlib
import difflib
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any


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
        jaxprune.cli._words.UsageError: no model 'vgg17'; did you mean vgg16? there ...
    """
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"no {kind} {name!r}; {hint}there are {', '.join(names)}")


def parse_into(config: type, prog: str, words: Sequence[str], description: str) -> Any:
    """Parses options into a dataclass, with errors of one line.

    Args:
        config: the dataclass.
        prog: the words before the options.
        words: the options.
        description: the help text.

    Returns:
        An instance of the dataclass, or None if help was asked for and printed.

    Raises:
        UsageError: if an option does not exist or has a wrong value.
    """
    import tyro

    fields: Any = config
    options = [f"--{name.replace('_', '-')}" for name in fields.__dataclass_fields__]
    for word in words:
        if word.startswith("--") and word != "--help":
            option = word.partition("=")[0].replace("_", "-")
            known("option", option.replace("--no-", "--"), options)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(config, prog=prog, description=description, args=words)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise UsageError(_plain(_one_line(told.getvalue()), config.__name__)) from None


_PARSED = re.compile(r"Error parsing (?P<option>\S+): (?P<cause>.*)")
_WANTED = {
    r"invalid literal for int\(\) with base \d+: (?P<got>.*)": "a whole number",
    r"could not convert string to float: (?P<got>.*)": "a number",
    # What may also be left out is a union with None.
    r"no type matching .*\|INT could be instantiated from \[(?P<got>.*?)\].*": (
        "a whole number"
    ),
    r"no type matching .*\|FLOAT could be instantiated from \[(?P<got>.*?)\].*": (
        "a number"
    ),
}


def _plain(text: str, config: str) -> str:
    """The parser's message without the names of its own parts.

    Example:
        >>> _plain("Error parsing --n: invalid literal for int() with base 10: 'x'", "")
        "--n must be a whole number, got 'x'"
        >>> _plain("Error parsing --n: no type matching {None}|FLOAT could be "
        ...        "instantiated from ['x']. Got errors: - <class 'NoneType'>", "")
        "--n must be a number, got 'x'"
    """
    text = text.removeprefix(f"Error parsing {config}: ")
    found = _PARSED.fullmatch(text)
    if not found:
        return text.removeprefix("Error parsing ")
    for pattern, wanted in _WANTED.items():
        cause = re.fullmatch(pattern, found["cause"])
        if cause:
            return f"{found['option']} must be {wanted}, got {cause['got']}"
    return f"{found['option']}: {found['cause']}"


def _one_line(box: str) -> str:
    """What a tyro error box says above its first rule, in one line."""
    rows = [row.strip("│| ") for row in box.splitlines()[1:]]
    said: list[str] = []
    for row in rows:
        is_rule = row != "" and not row.strip("─-╰╯")
        if is_rule and said:  # where the terminal is not UTF-8 one is above it too
            break
        said += [] if is_rule or not row else [row]
    return " ".join(said)
