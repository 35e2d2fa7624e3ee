import html.parser
import importlib.metadata

import numpy as np
import pytest

from jaxprune.display import _report as report

pytestmark = pytest.mark.once


def test_interval_is_students():
    # The 97.5 % quantile of t with 4 degrees of freedom is 2.7764 in any table.
    values = [1.0, 2.0, 4.0, 4.0, 9.0]
    found = report.interval(values)
    half = 2.7764 * np.sqrt(sum((v - 4) ** 2 for v in values) / 4) / np.sqrt(5)
    np.testing.assert_allclose(found.mean, 4.0)
    np.testing.assert_allclose([found.low, found.high], [4 - half, 4 + half], atol=1e-3)
    assert found.n == 5


def test_interval_of_one_run_claims_no_spread():
    found = report.interval([0.25])
    assert found.mean == 0.25
    assert np.isnan([found.std, found.low, found.high]).all()
    assert str(found) == "0.250"


def test_interval_of_nothing():
    with pytest.raises(ValueError, match="at least one value"):
        report.interval([])


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [report.interval(rng.standard_normal(5)) for _ in range(2000)]
    covered = np.mean([i.low <= 0 <= i.high for i in found])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)


def test_machine_says_versions():
    found = report.machine()
    assert found["versions"]["jax"] == importlib.metadata.version("jax")
    assert found["cores"] >= 1
    assert found["cpu"]


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_needs_nothing_else(tmp_path):
    drawn = report.new_figure(2)
    drawn.axes[0].plot([0, 1], [0, 1])
    path = tmp_path / "report.html"
    report.write_page(
        path,
        "A & B",
        report.text("x < y"),
        report.cards({"size": "3"}),
        report.section("One", report.figure(drawn, "a line"), report.heading("two")),
        report.table(["a", "b"], [["<script>", report.bar(0.25)]], "note"),
        report.code("if a < b:"),
    )
    page = Page(path.read_text())
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert name not in ("src", "action"), (tag, value)
        if name.endswith("href"):
            assert value.startswith("#"), (tag, value)
    assert "url(http" not in path.read_text()
    assert "<!DOCTYPE svg" not in path.read_text()
    assert page.tags.count("svg") == 1
    words = "".join(page.words)
    for text in ("A & B", "x < y", "<script>", "a line", "note", "if a < b:"):
        assert text in words
    assert ("i", "style", "width:25.0%") in page.attributes
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_panels_wrap_and_the_page_has_a_dark_form(tmp_path):
    figures = [report.figure(report.new_figure(width=4.6), name) for name in "ab"]
    report.write_page(tmp_path / "x.html", "x", report.panels(*figures))
    page = (tmp_path / "x.html").read_text()
    assert Page(page).tags.count("figure") == 2
    assert page.index("class='panels'") < page.index("<figure>")
    assert ".panels { display: flex; flex-wrap: wrap" in page
    style = page[page.index("<style>") : page.index("</style>")]
    dark = style[style.index("@media (prefers-color-scheme: dark)") :].split("\n}")[0]
    light = style[style.index(":root") : style.index("@media")]
    for name in ("--ink", "--soft", "--line", "--accent", "--page", "--box"):
        assert f"{name}: #" in light and f"{name}: #" in dark


def test_plain_text_is_no_part_of_a_page(tmp_path):
    with pytest.raises(TypeError, match=r"'hello' is plain text; wrap it in text"):
        report.write_page(tmp_path / "x.html", "x", "hello")


def test_a_row_fits_the_columns():
    with pytest.raises(ValueError, match=r"row \['a', 'b'\] does not fit"):
        report.table(["one"], [["a", "b"]])


def test_plotted_runs_are_mean_and_spread():
    runs = [[1.0, 3.0], [2.0, 5.0], [6.0, 4.0]]
    axes = report.new_figure().axes[0]
    report.plot_runs(axes, [0, 10], {"a": runs}, {"a": "#000000"})
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
    axes = report.new_figure().axes[0]
    report.plot_runs(axes, [0, 1], {"a": [[1.0, 2.0]]}, {"a": "#000000"})
    assert not axes.collections
