"""Progress bars: shown when asked for, with the time left, and gone when done."""

import io

import jax.numpy as jnp
import optax
import pytest
import rich
import rich.console

import jaxprune
from jaxprune.core._progress import tracked

pytestmark = pytest.mark.once


@pytest.fixture
def screen(monkeypatch):
    text = io.StringIO()
    console = rich.console.Console(file=text, force_terminal=True, width=100)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    return text


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


PARAMS = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
X = jnp.ones((1, 3))


def test_items_come_through(screen):
    assert list(tracked(iter("abc"), "letters", True)) == ["a", "b", "c"]
    assert "letters" in screen.getvalue() and "left" in screen.getvalue()


def test_one_bar_within_another(screen):
    for _ in tracked([1, 2], "outer", True):
        assert list(tracked([3], "inner", True)) == [3]
    assert "inner" not in screen.getvalue()


def test_none_when_not_asked_for(screen):
    list(tracked([1, 2], "quiet", False))
    assert screen.getvalue() == ""


def normed(variables, x, train=False, mutable=()):
    x = x @ variables["params"]["a"]
    mean = variables["batch_stats"]["mean"]
    new = 0.9 * mean + 0.1 * x.mean(0) if train else mean
    out = x - mean[None]
    return (out, {"batch_stats": {"mean": new}}) if mutable else out


TASKS = ["latency table", "taylor", "sensitivity", "recalibrate", "latency", "round 1"]


@pytest.mark.parametrize("what", TASKS)
def test_what_may_take_long_shows_one(screen, what):
    if what == "recalibrate":
        variables = {"params": PARAMS, "batch_stats": {"mean": jnp.zeros(4)}}
        jaxprune.recalibrate(normed, variables, [X, X], progress=True)
        assert "2/2" in screen.getvalue()
    elif what == "latency":
        jaxprune.prune(mlp, PARAMS, X, sparsity=0.5).measured()
    elif what == "round 1":
        jaxprune.rounds(
            mlp,
            PARAMS,
            X,
            tx=optax.identity(),
            data=[X],
            steps=2,
            sparsity=[0.5],
            step=lambda apply_fn, state, batch: state,
            progress=True,
        )
        assert "round 1 of 1" in screen.getvalue() and "4/4" in screen.getvalue()
    elif what == "latency table":
        jaxprune.latency_table(mlp, PARAMS, X, measure=lambda *call: 1.0, progress=True)
    elif what == "taylor":
        loss = lambda p, x: mlp(p, x).sum()  # noqa: E731
        options = {"score": "taylor", "loss_fn": loss, "batches": [X], "progress": True}
        jaxprune.prune(mlp, PARAMS, X, sparsity=0.5, **options)
    else:
        groups = jaxprune.trace(mlp, PARAMS, X)
        scores = jaxprune.group_scores(groups, PARAMS)
        metric = lambda p, x: mlp(p, x).sum()  # noqa: E731
        jaxprune.sensitivity(
            metric, PARAMS, groups, scores, sparsities=[0.5], data=[X], progress=True
        )
        no_data = lambda p: mlp(p, X).sum()  # noqa: E731
        options = {"sparsities": [0.25, 0.5], "batch_size": 1, "progress": True}
        jaxprune.sensitivity(no_data, PARAMS, groups, scores, **options)
        assert "3/3" in screen.getvalue()  # the whole net and two cuts
    assert what in screen.getvalue()
