"""The judge of third-party models: what it sees, and that its page shows its results."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from benchmarks import tables
from benchmarks.third_party import judge, packages, page
from benchmarks.third_party.models import Model, randomized

pytestmark = pytest.mark.once


def _net(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b"][None]) @ params["w2"]


def _model():
    shapes = {"w1": (4, 8), "b": (8,), "w2": (8, 3)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    return Model(_net, params | {"b": jnp.zeros(8)}, (jnp.ones((2, 4)),))


def test_a_row_says_what_is_cut_and_what_is_pinned():
    row = judge.judged(_model)
    assert (row["groups"], row["exact"], row["parameters"]) == (1, 1, 64)
    assert row["can_be_cut"] == 1.0  # every number is in a row or column of the group
    assert row["difference"] < 1e-6 < row["change"]
    pins = {each["why"]: (each["axes"], each["first"]) for each in row["pinned"]}
    assert pins == {
        "coupled to the input args": (1, "w1:0"),
        "coupled to the output of apply_fn": (1, "w2:1"),
    }
    assert row["seconds"]["trace"]["repeats"] == judge.REPEATS


def test_wrong_numbers_are_seen(monkeypatch):
    right = jaxprune.narrow

    def wrong(fn, masks):
        return lambda *args: 1.01 * right(fn, masks)(*args)

    monkeypatch.setattr(jaxprune, "narrow", wrong)
    assert judge.judged(_model)["difference"] == pytest.approx(0.01, rel=1e-3)


def test_a_model_that_raises_is_told():
    def build():
        raise TypeError("no such layer\nat some place")

    assert judge.judged(build) == {"error": "TypeError: no such layer"}
    broken = _model()._replace(apply_fn=lambda params, x: _net(params, x) * jnp.nan)
    assert judge.judged(lambda: broken)["error"].startswith("FloatingPointError")


def test_random_variables_hide_nothing():
    old = {"bias": jnp.zeros(5), "variance": jnp.ones(5), "count": jnp.arange(3)}
    new = randomized(old)
    assert np.all(np.asarray(new["bias"]) != 0)
    assert np.all(np.asarray(new["variance"]) > 0) and np.ptp(new["variance"]) > 0
    np.testing.assert_array_equal(new["count"], old["count"])


def test_packages_that_are_not_here_are_skipped(monkeypatch):
    def version(package):
        if package == "keras":
            raise importlib.metadata.PackageNotFoundError(package)
        return "5.1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert packages.missing("keras") == "not installed"
    assert packages.missing("transformers").startswith("has no models in Flax")
    assert packages.missing("equinox") == ""


@pytest.mark.parametrize("package", ["dm-haiku", "equinox"])
def test_models_of_packages_can_be_judged(package):
    row = judge.judged(packages.models(package)["MLP"])
    assert row["exact"] == 2 and row["difference"] < 1e-6


def test_the_page_shows_the_committed_results():
    results = page.load()
    document = page.DOCUMENT.read_text()
    assert tables.filled(document, page.texts(results)) == document
    assert list(results) == [name for name in packages.PACKAGES if name in results]
    for found in results.values():
        assert found["origin"]["command"].startswith("python -m benchmarks.third_party")
    assert ".py" not in "".join(page.legend(results))
