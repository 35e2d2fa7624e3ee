"""The command line: `jaxprune run NAME`, `jaxprune list`."""

from jaxprune.cli._main import UsageError as UsageError
from jaxprune.cli._main import known as known
from jaxprune.cli._main import main as main
from jaxprune.cli._main import parse as parse
