"""The command line for a model of one's own."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.cli import main
from jaxprune.io import checkpoints

pytestmark = pytest.mark.once

MODULE = """
import jax, jax.numpy as jnp

def net(variables, x):
    hidden = jax.nn.relu(x @ variables["params"]["a"])
    return hidden @ variables["params"]["b"]

def variables():
    a, b = jax.random.split(jax.random.key(0))
    return {"params": {"a": jax.random.normal(a, (4, 8)), "b": jax.random.normal(b, (8, 2))}}

def make():
    x = jnp.ones((2, 4))
    loss = lambda variables, batch: jnp.mean(net(variables, batch) ** 2)
    return net, variables(), x, [x, 2 * x], loss

def two():
    return net, variables()

def bare():
    return net, variables(), jnp.ones((2, 4))

def uncallable():
    return net, variables(), jnp.ones((2, 3))

def broken():
    raise RuntimeError("no data here")
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    name = f"model_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_inspect(module, capsys, tmp_path):
    assert main(["inspect", f"{module}:make", "--html", "page.html"]) == 0
    out = capsys.readouterr().out
    assert "1 group, 8 units" in out and "output of apply_fn" in out
    assert "48 parameters, 192 FLOPs" in out
    page = (tmp_path / "page.html").read_text()
    assert "params/a:1" in page and "output of apply_fn" in page
    assert f"<h1>{module}:make</h1>" in page
    assert main(["inspect", f"{module}:make", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["groups"][0]["members"] == ["params/a:1", "params/b:0"]
    assert found["costs"]["flops"] == 192 and found["pinned"][0]["path"] == "params/a"
    assert main(["inspect", f"{module}:make", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_prune_and_export(module, capsys, tmp_path):
    import jaxprune

    words = ["prune", f"{module}:make", "--budget", "50%", "--score", "taylor"]
    assert main([*words, "--out", "small", "--html", "report.html"]) == 0
    assert "4 of 8" in (tmp_path / "report.html").read_text()
    out = capsys.readouterr().out
    assert "4 of 8 units kept" in out and "written to small" in out
    loaded = jaxprune.load(tmp_path / "small")
    assert loaded.variables["params"]["a"].shape == (4, 4)
    assert "FLOPs: 192 -> 96 (50.0%)" in str(loaded)
    assert main([*words, "--out", "small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["after"]["flops"] == 96
    export = ["export", "small", "--out", "other", "--model", f"{module}:make"]
    assert main(export) == 0
    model = jaxprune.export.load_exported(tmp_path / "other")
    x = np.ones((3, 4), np.float32)
    np.testing.assert_allclose(model(x), loaded(x), rtol=1e-6)
    # The folder alone is enough.
    assert main(["export", "small", "--out", "alone", "--quiet"]) == 0
    model = jaxprune.export.load_exported(tmp_path / "alone")
    np.testing.assert_allclose(model(x), loaded(x), rtol=1e-6)
    words = ["export", "small", "--out", "x", "--format", "onnx"]
    assert main(words) == 2
    assert "needs --model module:factory" in capsys.readouterr().err


def test_run_goes_on_where_it_stopped(module, capsys, tmp_path):
    import jaxprune

    words = ["run", f"{module}:make", "--sparsity", "0.5", "--rounds", "2"]
    words += ["--steps", "3", "--out", "run"]
    with jax.numpy_dtype_promotion("standard"):
        assert main([*words, "--html", "run.html"]) == 0
        out = capsys.readouterr().out
        assert "written to run/last and run/best" in out and "50%" in out
        assert "minus the loss" in (tmp_path / "run.html").read_text()
        assert main([*words, "--json"]) == 0  # nothing left to do
        history = json.loads(capsys.readouterr().out)["history"]
        assert [row["steps"] for row in history] == [3, 3, 3]
        assert all(row["metric"] < 0 for row in history)
        assert jaxprune.load(tmp_path / "run" / "last").plan["params/a:1"].sum() == 4
        assert main([*words, "--score", "l1"]) == 2
        assert "holds a run with score=l2" in capsys.readouterr().err


def test_variables_of_a_checkpoint(module, tmp_path, capsys):
    import jaxprune

    key = jax.random.key(5)
    made = {"params": {"a": jax.random.normal(key, (4, 8)), "b": jnp.ones((8, 2))}}
    checkpoints.save(tmp_path / "run", 3, made)
    words = ["prune", f"{module}:make", "--sparsity", "0.5", "--out", "small"]
    assert main([*words, "--variables", "run", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    loaded = jaxprune.load(tmp_path / "small")
    kept = np.asarray(loaded.masks["params"]["a"][0])
    np.testing.assert_array_equal(
        loaded.variables["params"]["a"], made["params"]["a"][:, kept]
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["inspect", "nowhere_at_all:make"], ["there is no module 'nowhere_at_all'"]),
        (["inspect", "{module}"], ["not of the form module:factory"]),
        (["inspect", "{module}:mak"], ["no factory in", "did you mean make?"]),
        (
            ["inspect", "{module}:two"],
            ["returned 2 things; expected (apply_fn, variables"],
        ),
        (["inspect", "{module}:broken"], ["raised RuntimeError: no data here"]),
        (
            ["prune", "{module}:uncallable", "--sparsity", ".5", "--out", "x"],
            ["cannot be called with its variables and example args: TypeError: dot"],
        ),
        (
            ["run", "{module}:bare", "--sparsity", ".5", "--out", "x"],
            ["returned no batches and loss to train on"],
        ),
        (
            ["prune", "{module}:make", "--sparsity", ".5", "--out", "{module}.py"],
            ["{module}.py is a file; give another --out"],
        ),
        (["inspect", "{module}:make", "--jsn"], ["no option '--jsn'", "mean --json?"]),
        (
            ["prune", "{module}:make", "--out", "x"],
            ["give either --budget or --sparsity"],
        ),
        (["prune", "{module}:make", "--sparsity", ".5"], ["Missing", "--out"]),
        (
            [
                "prune",
                "{module}:make",
                "--out",
                "x",
                "--rounds",
                "two",
                "--budget",
                ".5",
            ],
            ["--rounds must be a whole number, got 'two'"],
        ),
        (
            ["prune", "{module}:make", "--out", "x", "--sparsity", "half"],
            ["--sparsity"],
        ),
        (
            ["prune", "{module}:make", "--out", "x", "--budget", "0.01"],
            ["cannot be met", "12.5%"],
        ),
        (
            ["prune", "{module}:make", "--out", "x", "--budget", ".5", "--score", "l3"],
            ["unknown score 'l3'"],
        ),
        (
            [
                "prune",
                "{module}:make",
                "--out",
                "x",
                "--budget",
                ".5",
                "--variables",
                "none",
            ],
            ["there is no folder none"],
        ),
        (
            ["prune", "{module}:make", "--out", "x", "--sparsity", "half"],
            ["--sparsity must be a number, got 'half'"],
        ),
        (["export", "nothing", "--out", "x"], ["nothing"]),
        (["completion", "fish"], ["no shell 'fish'", "bash, zsh"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_a_mistake_is_one_line(module, capsys, words, parts):
    assert main([word.replace("{module}", module) for word in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxprune: ") and err.count("\n") == 1
    assert "int()" not in err and "Traceback" not in err
    for part in parts:
        assert part.replace("{module}", module) in err


def test_completion_names_commands_and_options(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "inspect" in script and "--max-sparsity" in script
    done = subprocess.run(["bash", "-n"], input=script, text=True, check=False)
    assert done.returncode == 0


def test_help(capsys):
    assert main(["prune", "--help"]) == 0
    assert "--budget" in capsys.readouterr().out
    assert sys.modules["jaxprune.cli"]
