import dataclasses
import importlib.metadata
import subprocess
import sys

import pytest

from jaxprune.cli import _main as cli

pytestmark = pytest.mark.once


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings."""

    dataset: str = "digits"
    """What to train on."""
    seeds: int = 5
    """How many."""
    quick: bool = False
    """Less of everything."""

    def __post_init__(self):
        cli.known("data set", self.dataset, ["digits", "cifar10"])


class Experiment:
    """Stands for an installed experiment and notes what it was called with."""

    def __init__(self, monkeypatch):
        self.configs = []
        self.error = None

        def toy(config: Config) -> None:
            self.configs.append(config)
            if self.error:
                raise self.error

        class Entry:
            value = "experiments.batch_bridgeout.study:main"

            def load(entry):
                return toy

        monkeypatch.setattr(cli, "_experiments", lambda: {"toy_run": Entry()})


@pytest.fixture
def experiment(monkeypatch):
    return Experiment(monkeypatch)


def test_options_arrive_as_settings(experiment):
    assert cli.main(["run", "toy_run"]) == 0
    assert cli.main(["run", "toy_run", "--seeds", "2", "--quick"]) == 0
    assert cli.main(["run", "toy_run", "--dataset=cifar10", "--no-quick"]) == 0
    assert experiment.configs == [
        Config(),
        Config(seeds=2, quick=True),
        Config(dataset="cifar10"),
    ]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["rnu"],
            ["no command 'rnu'", "did you mean run?", "there are inspect, prune"],
        ),
        (["run", "toyrun"], ["no experiment 'toyrun'", "did you mean toy_run?"]),
        (["run", "toy_run", "--seed", "3"], ["no option '--seed'", "mean --seeds?"]),
        (["run", "toy_run", "--sedes=3"], ["no option '--sedes'", "mean --seeds?"]),
        (["run", "toy_run", "--seeds", "many"], ["--seeds", "many"]),
        (["run", "toy_run", "--seeds"], ["--seeds", "Missing value"]),
        (["run", "toy_run", "digits"], ["Unrecognized", "digits"]),
        (
            ["run", "toy_run", "--dataset", "cifar"],
            ["no data set 'cifar'", "did you mean cifar10?", "digits, cifar10"],
        ),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line(experiment, capsys, words, parts):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jaxprune: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    assert experiment.configs == []


def test_no_closest_match_is_no_hint():
    with pytest.raises(cli.UsageError, match=r"^no model 'zzz'; there are a, b$"):
        cli.known("model", "zzz", ["a", "b"])


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ConnectionError("host does not answer"), 1, "ConnectionError: host does not"),
        (cli.UsageError("other settings"), 2, "jaxprune: other settings"),
        (KeyboardInterrupt("go on with x"), 130, "jaxprune: go on with x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_run_ends_with(experiment, capsys, error, status, text):
    experiment.error = error
    assert cli.main(["run", "toy_run"]) == status
    assert text in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(experiment):
    experiment.error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["run", "toy_run"])


def test_help(experiment, capsys):
    for words in ([], ["--help"], ["run"], ["run", "--help"]):
        assert cli.main(words) == 0
        assert "jaxprune run NAME [options]" in capsys.readouterr().out
    assert cli.main(["run", "toy_run", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--dataset" in told
    assert "What to train on." in told
    assert experiment.configs == []


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    version = importlib.metadata.version("jaxprune")
    assert capsys.readouterr().out == f"jaxprune {version}\n"


LISTS_WITHOUT_IMPORTING = """
import sys
from jaxprune.cli import _main as cli
assert cli.main(["list"]) == 0
heavy = {"experiments.batch_bridgeout.study", "tyro", "matplotlib", "orbax", "flax"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


def test_list_reads_docstrings_and_imports_nothing():
    words = [sys.executable, "-c", LISTS_WITHOUT_IMPORTING]
    told = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert "batch_bridgeout" in told
    assert "do filters become dispensable" in told


def test_outside_a_clone_it_says_where_experiments_are(monkeypatch, capsys, tmp_path):
    package = tmp_path / "site-packages" / "jaxprune" / "cli" / "_main.py"
    monkeypatch.setattr(cli, "__file__", str(package))
    assert cli.main(["run", "batch_bridgeout"]) == 2
    assert "experiments/ of a clone" in capsys.readouterr().err
    assert cli.main(["list"]) == 0
    assert "experiments/ of a clone" in capsys.readouterr().out
