"""Reports: numbers, and a page that needs nothing else and can be read anywhere."""

import dataclasses
import functools
import importlib.metadata
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pages import BROWSER, Page, check_alone, check_seen, contrast, seen_by_a_browser

import jaxprune
from jaxprune import display
from jaxprune.display import _report
from jaxprune.display._colors import group_color, readable_on
from jaxprune.display._pages import TEMPLATES

pytestmark = pytest.mark.once


def test_interval_is_students():
    # The 97.5 % quantile of t with 4 degrees of freedom is 2.7764 in any table.
    values = [1.0, 2.0, 4.0, 4.0, 9.0]
    found = display.interval(values)
    half = 2.7764 * np.sqrt(sum((v - 4) ** 2 for v in values) / 4) / np.sqrt(5)
    np.testing.assert_allclose(found.mean, 4.0)
    np.testing.assert_allclose([found.low, found.high], [4 - half, 4 + half], atol=1e-3)
    assert found.n == 5


def test_interval_of_one_run_claims_no_spread():
    found = display.interval([0.25])
    assert found.mean == 0.25
    assert np.isnan([found.std, found.low, found.high]).all()
    assert str(found) == "0.250"


def test_interval_of_nothing():
    with pytest.raises(ValueError, match="at least one value"):
        display.interval([])


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [display.interval(rng.standard_normal(5)) for _ in range(2000)]
    covered = np.mean([i.low <= 0 <= i.high for i in found])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)


def test_machine_says_versions():
    found = display.machine()
    assert found["versions"]["jax"] == importlib.metadata.version("jax")
    assert found["cores"] >= 1
    assert found["cpu"] and found["cpu"] in display.as_facts(found)["machine"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["/home/me/train.py", "--seed", "a b"], "python train.py --seed 'a b'"),
        (["/usr/bin/jaxprune", "prune"], "jaxprune prune"),
    ],
)
def test_the_command_has_no_paths_of_this_machine(argv, told, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", argv[0], raising=False)
    monkeypatch.setattr(sys, "argv", argv)
    assert display.command() == told
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    assert display.command() == ""  # a notebook


# ------------------------------------------------------------------------------- curves


def test_plotted_runs_are_mean_and_spread():
    runs = [[1.0, 3.0], [2.0, 5.0], [6.0, 4.0]]
    axes = display.new_figure().axes[0]
    display.plot_runs(axes, [0, 10], {"a": runs}, {"a": "#000000"})
    *thin, thick = axes.lines
    assert [line.get_ydata().tolist() for line in thin] == runs
    assert thick.get_ydata().tolist() == [3.0, 4.0]
    assert thick.get_label() == "a"
    corners = axes.collections[0].get_paths()[0].vertices
    # The sample standard deviations are sqrt(7) and 1.
    for x, mean, std in ((0, 3.0, np.sqrt(7)), (10, 4.0, 1.0)):
        ends = corners[corners[:, 0] == x, 1]
        np.testing.assert_allclose([ends.min(), ends.max()], [mean - std, mean + std])


def test_one_run_has_no_band():
    axes = display.new_figure().axes[0]
    display.plot_runs(axes, [0, 1], {"a": [[1.0, 2.0]]}, {"a": "#000000"})
    assert not axes.collections


def test_a_figure_takes_the_colours_of_the_page():
    drawn = display.new_figure()
    drawn.axes[0].plot([0, 1], [0, 1], label="x")
    drawn.axes[0].set(xlabel="how <much>")
    svg = display.as_svg(drawn, "a 'quoted' label")
    assert svg.startswith("<svg role='img' aria-label='a &#39;quoted&#39; label'")
    assert "how &lt;much&gt;" in svg and "currentColor" in svg
    assert "#000000" not in svg and "fill: #ffffff" not in svg
    assert "<!DOCTYPE" not in svg and "<metadata" not in svg


# -------------------------------------------------------------------------------- pages


def net(params, x):
    a = jax.nn.relu(x @ params["a_first_layer_with_a_long_name"]["kernel"])
    b = jax.nn.relu(x @ params["second<b>"]["kernel"] + params["second<b>"]["bias"])
    return jnp.concatenate([a, b], axis=1) @ params["head"]["kernel"]


def weights():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "a_first_layer_with_a_long_name": {
            "kernel": jax.random.normal(keys[0], (3, 8))
        },
        "second<b>": {
            "kernel": jax.random.normal(keys[1], (3, 4)),
            "bias": jnp.zeros((1, 4)),
        },
        "head": {"kernel": jax.random.normal(keys[2], (12, 2))},
    }


X = jnp.ones((5, 3))


@functools.cache
def pruned():
    return jaxprune.prune(net, weights(), X, sparsity=0.5, min_keep=1)


@functools.cache
def runs():
    found = []
    for seed in range(2):
        x = jax.random.normal(jax.random.key(seed), (4, 3))
        found.append(
            jaxprune.rounds(
                net,
                weights(),
                X,
                tx=optax.sgd(0.01),
                data=[X],
                steps=0,
                rounds=2,
                sparsity=0.5,
                step=lambda apply_fn, state, batch: state,
                evaluate=lambda fn, p, x=x: float(jnp.mean(fn(p, x))),
            )
        )
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The reports of a pruned function and of two runs."""
    folder = tmp_path_factory.mktemp("reports")
    metrics = {"accuracy": (0.9812, 0.9756)}
    measured = dataclasses.replace(pruned(), seconds=(2e-3, 1e-3))
    measured.report(folder / "pruned.html", title="A & B", metrics=metrics)
    runs()[0].report(
        folder / "rounds.html", runs()[1], metric="accuracy", latency=False
    )
    assert sorted(p.name for p in folder.iterdir()) == ["pruned.html", "rounds.html"]
    return folder


def test_the_report_of_a_pruned_function(written):
    page = Page((written / "pruned.html").read_text())
    check_alone(page)
    costs, layers, pinned, _ = page.tables
    # 3*8 + 3*4 + 4 + 12*2 parameters, half of the units of both groups.
    assert [row[:4] for row in costs] == [
        ["", "units left", "accuracy", "parameters"],
        ["before", "100 %", "0.9812", "64"],
        ["after", "50 %", "0.9756", "322 x less"],
    ]
    flops = [row[4] for row in costs[1:]]
    assert flops == [f"{2 * 5 * 60}", f"{2 * 5 * 30}2 x less"]
    assert [row[5] for row in costs] == ["latency", "2 ms", "1 ms2 x less"]
    assert [row[0] for row in layers[1:]] == [
        "a_first_layer_with_a_long_name",
        "second<b>",
        "head",
    ]
    assert layers[2][1:5] == ["kernel 3 x 4; bias 1 x 4", "3 x 2; 1 x 2", "16", "8"]
    assert ("i", "style", "width:50.0%") in page.attributes
    assert "head/kernel:1" in " ".join(itertools.chain(*pinned))
    assert "A & B" in page.text and "2 of 4" in page.text
    call = "jaxprune.prune(net, variables, float32[5, 3], sparsity=0.5, min_keep=1)"
    assert call in page.text
    assert display.machine()["cpu"] in page.text


def test_the_report_of_runs(written):
    page = Page((written / "rounds.html").read_text())
    check_alone(page)
    costs = page.tables[0]
    assert [row[0] for row in costs[1:]] == [
        "before the first cut",
        "round 1",
        "round 2",
    ]
    found = [[entry.metric for entry in run.history] for run in runs()]
    for row, values in zip(costs[1:], zip(*found, strict=True), strict=True):
        low, high = display.interval(values)[2:4]
        assert row[2].startswith(f"{np.mean(values):.4g}")
        assert row[2].endswith(f"{low:.4g} to {high:.4g}")
    assert page.tags.count("svg") == 2  # the metric against parameters and FLOPs
    assert "jaxprune.rounds(net, variables, float32[5, 3], sparsity=0.5" in page.text
    assert "Mean of 2 runs" in page.text


def test_rounds_without_a_metric_have_curves_of_what_is_left(tmp_path):
    one = jaxprune.rounds(
        net,
        weights(),
        X,
        tx=optax.sgd(0.01),
        data=[X],
        steps=0,
        sparsity=[0.25, 0.5],
        step=lambda apply_fn, state, batch: state,
    )
    one.report(tmp_path / "x.html")
    page = Page((tmp_path / "x.html").read_text())
    assert page.tags.count("svg") == 2
    heads, *rows = page.tables[0]
    assert heads[4] == "latency" and all(row[4] for row in rows)  # measured
    with pytest.raises(ValueError, match="must have the same stages"):
        runs()[0].report(tmp_path / "y.html", one_round(), latency=False)
    assert not (tmp_path / "y.html").exists()


def one_round():
    run = runs()[0]
    return jaxprune.Rounds(run.history[:1], run.load)


def test_a_loaded_program_has_a_report(tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        pruned().save(tmp_path / "small")
        jaxprune.load(tmp_path / "small").report(tmp_path / "x.html")
    page = Page((tmp_path / "x.html").read_text())
    assert "units left" in page.text and "jaxprune.prune(net, variables" in page.text


def test_metrics_are_numbers_or_pairs(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\['accuracy'\] must be the number"):
        pruned().report(
            tmp_path / "x.html", metrics={"accuracy": (1, 2, 3)}, latency=False
        )
    pruned().report(tmp_path / "x.html", metrics={"loss": 0.5}, latency=False)
    costs = Page((tmp_path / "x.html").read_text()).tables[0]
    assert [row[2] for row in costs] == ["loss", "", "0.5"]


def test_what_is_missing_is_told_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxprune\[report\]'"):
        pruned().report(tmp_path / "x.html", latency=False)
    assert not list(tmp_path.iterdir())


def test_a_template_asks_for_nothing_that_is_not_there(tmp_path):
    import jinja2

    with pytest.raises(jinja2.UndefinedError, match="'title' is undefined"):
        display.write_page(tmp_path / "x.html", "page.html.jinja", {})
    assert not list(tmp_path.iterdir())


def test_shapes_of_layers():
    before = {"params/d/kernel": (3, 4), "params/d/bias": (4,), "stats/d/mean": (4,)}
    after = {name: (*shape[:-1], 2) for name, shape in before.items()}
    (layer,) = _report.layers(before, after)
    assert (layer.name, layer.before, layer.after) == ("d", 16, 8)
    (vector,) = _report.layers({"n/scale": (4,)}, {"n/scale": (2,)})
    assert vector.shapes == (("scale", "4", "2"),)


def test_numbers_can_be_read_on_every_colour():
    seen = [group_color(number) for number in range(60)]
    assert len(set(seen)) == 55  # 54 different ones and that of what is pinned
    for color in seen:
        parts = [int(color[k : k + 2], 16) for k in (1, 3, 5)]
        ink = {"black": (0, 0, 0), "white": (255, 255, 255)}[readable_on(color)]
        assert contrast(parts, ink) >= 4.5


def test_both_schemes_have_every_colour():
    style = (TEMPLATES / "style.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    names = set(re.findall(r"var\((--\w+)\)", style)) - {"--color", "--on"}
    for scheme in (light, dark.split("\n}")[0]):
        assert names == set(re.findall(r"(--\w+): #", scheme))


# ---------------------------------------------------------------------------- a browser


@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
def test_a_browser_shows_all_of_it(written, tmp_path):
    pages = {path.stem: path.read_text() for path in written.iterdir()}
    found = seen_by_a_browser(tmp_path, pages)
    assert len(found) == 8
    for name, seen in found.items():
        check_seen(seen)
        if "rounds" in name:
            stacked = len(set(seen["lefts"])) == 1
            assert len(seen["lefts"]) == 2 and stacked == ("390" in name), name
    # The two schemes differ: dark pages are dark.
    light, dark = (found[f"pruned 390 {s}"]["texts"][0] for s in ("light", "dark"))
    assert light["behind"] == [255, 255, 255] and max(dark["behind"][:3]) < 64
