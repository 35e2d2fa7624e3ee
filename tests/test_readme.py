"""The README's examples run, in order, in one namespace."""

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
