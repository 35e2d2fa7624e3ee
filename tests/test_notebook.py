"""The notebook for a net of one's own: every cell but the installation, at toy size."""

import json
import pathlib

import jax
import pytest

pytestmark = pytest.mark.once

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "prune_your_own.ipynb"


def test_the_notebook_runs_and_learns(tmp_path, capsys):
    toy = {"BUDGET": 0.5, "COST": "flops", "SCORE": "taylor", "ROUNDS": 1, "STEPS": 40}
    toy["OUT"] = str(tmp_path / "run")
    names = {"__name__": "notebook"}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = [
        ("".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in cells
        if cell["cell_type"] == "code"
    ]
    assert ["install" in tags for _, tags in sources].count(True) == 1
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for source, tags in sources:
            if "install" in tags:
                assert "%pip install" in source
                continue
            exec(compile(source, str(NOTEBOOK), "exec"), names)
            if "parameters" in tags:
                assert {name for name in names if name.isupper()} == toy.keys()
                names |= toy
    history = names["run"].history
    assert history[0].metric > 0.6  # of ten digits
    assert history[1].flops <= 0.5 * history[0].flops
    assert "units kept" in capsys.readouterr().out
