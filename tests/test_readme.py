"""The README's examples run, in order, in one namespace."""

import json
import pathlib
import re

import jax

from experiments.batch_bridgeout import comparison_report

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    with jax.numpy_dtype_promotion("standard"):  # as a reader has it
        for block in blocks:
            exec(compile(block, str(README), "exec"), namespace)
    # What the training snippet is for; chance is 0.1.
    assert namespace["accuracy"] > 0.85
    assert len(namespace["accuracies"]) == 3
    assert min(namespace["accuracies"]) > 0.6


def test_continuous_integration_runs_the_readme_command():
    script = (README.parent / ".ci" / "run").read_text()
    command = "uv run --locked pytest -n auto --dist worksteal"
    assert command in README.read_text()
    assert command in script


def test_the_numbers_are_those_of_the_committed_study():
    results = json.loads(comparison_report.RESULT.read_text())
    assert comparison_report.summary(results) in README.read_text()
