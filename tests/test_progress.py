"""Progress bars: shown when asked for, with the time left, and gone when done."""

import io

import jax.numpy as jnp
import pytest
import rich
import rich.console

import jaxprune
from jaxprune.core._progress import tracked


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


@pytest.mark.parametrize("what", ["latency table", "taylor", "sensitivity"])
def test_what_may_take_long_shows_one(screen, what):
    if what == "latency table":
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
    assert what in screen.getvalue()
