"""The command line: `jaxprune inspect`, `prune`, `export`, `run`, `list`."""

from jaxprune.cli._main import main as main
from jaxprune.cli._main import parse as parse
from jaxprune.cli._words import UsageError as UsageError
from jaxprune.cli._words import known as known
