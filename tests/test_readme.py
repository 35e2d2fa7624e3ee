"""The README's examples run, in order, in one namespace."""

import json
import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)


def test_continuous_integration_runs_the_readme_command():
    script = (README.parent / ".ci" / "run").read_text()
    assert "uv run --locked pytest -n auto" in README.read_text()
    assert "uv run --locked pytest -n auto" in script


def test_the_areas_are_those_of_the_committed_run():
    committed = README.parent / "experiments" / "batch_bridgeout" / "study.json"
    areas = json.loads(committed.read_text())["summary"]["area"]
    methods = ("bridgeout", "dropout", "weight_decay")
    for model, found in areas.items():
        cells = [
            f"{found[m]['mean']:.3f} [{found[m]['low']:.3f}, {found[m]['high']:.3f}]"
            for m in methods
        ]
        assert f"| {model} | {' | '.join(cells)} |" in README.read_text()
