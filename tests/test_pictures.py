"""The picture of a model's groups: what it says, and that it can be read."""

import io

import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import jaxprune
from jaxprune.display import _pictures as pictures
from jaxprune.display._columns import Segment, layer_columns

pytestmark = pytest.mark.once


def weights(**shapes):
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def branches(params, x):
    """Two branches, concatenated, with a bias."""
    a = jax.nn.relu(x @ params["left"] + params["bias"][None])
    b = jax.nn.relu(x @ params["right"])
    return jnp.concatenate([a, b], axis=1) @ params["head"]


BRANCHES = weights(left=(3, 2), bias=(2,), right=(3, 6), head=(8, 5))


@pytest.fixture
def two():
    return jaxprune.trace(branches, BRANCHES, jnp.ones((1, 3)))


def bars(groups, keep=None):
    columns = layer_columns(groups, keep)
    return {f"{bar.path}:{bar.axis}": bar for column in columns for bar in column.bars}


def test_segments_are_the_parts_of_an_axis(two):
    keep = {"right:1": np.arange(6) < 2, "left:1": np.array([True, False])}
    found = bars(two, keep)
    assert list(found) == ["left:0", "left:1", "right:0", "right:1", "head:0", "head:1"]
    assert found["head:0"].lanes == (
        (Segment("left:1", 0.0, 0.25, 0.5), Segment("right:1", 0.25, 0.75, 1 / 3)),
    )
    assert (found["head:0"].kept, found["head:0"].size) == (3, 8)
    assert found["left:0"].lanes == ((Segment(None, 0.0, 1.0, 1.0),),)
    assert bars(two)["head:0"].kept == 8


def test_columns_stand_in_program_order():
    def chain(params, x):
        for name in ("z", "b", "y", "a"):
            x = jnp.tanh(x @ params[name])
        return x

    groups = jaxprune.trace(
        chain, weights(z=(3, 4), b=(4, 5), y=(5, 6), a=(6, 2)), jnp.ones((1, 3))
    )
    assert [c.name for c in layer_columns(groups)] == ["z", "b", "y", "a"]


def test_two_groups_on_the_same_positions_stand_side_by_side():
    def heads(params, x):
        q = (x @ params["q"]).reshape(1, 2, 3)
        return jnp.einsum("bhd,hde->be", q, params["out"])

    params = weights(q=(4, 6), out=(2, 3, 5))
    groups = jaxprune.trace(heads, params, jnp.ones((1, 4)))
    one_head = {"q:1": np.array([True, False])}
    assert {groups["q:1"].size, groups["q:1#2"].size} == {2, 3}
    keep = one_head if groups["q:1"].size == 2 else {"q:1#2": one_head["q:1"]}
    bar = bars(groups, keep)["q:1"]
    assert len(bar.lanes) == 2
    assert [len(lane) for lane in bar.lanes] == [1, 1]
    assert {lane[0].size for lane in bar.lanes} == {1.0}
    assert {lane[0].kept for lane in bar.lanes} == {0.5, 1.0}
    assert bar.kept == 3


def test_partly_pinned_axes_have_a_grey_end():
    def leak(params, x):
        hidden = x @ params["w1"]
        return jnp.tanh(hidden) @ params["w2"], hidden[:, :1]

    params = weights(w1=(3, 4), w2=(4, 2))
    groups = jaxprune.trace(leak, params, jnp.ones((1, 3)))
    (lane,) = bars(groups)["w1:1"].lanes
    assert lane == (Segment("w1:1", 0.0, 0.75, 1.0), Segment(None, 0.75, 0.25, 1.0))


def test_windows_and_alike_vectors_have_no_bar():
    def net(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=dims
        )
        x = jnp.tanh(x + params["conv"]["bias"][None, None, None])
        x = x * params["norm"]["scale"][None, None, None]
        return x.mean((1, 2)) @ params["head"]["kernel"]

    params = {
        "conv": weights(kernel=(3, 3, 2, 4), bias=(4,)),
        "norm": weights(scale=(4,)),
        "head": weights(kernel=(4, 3)),
    }
    groups = jaxprune.trace(net, params, jnp.ones((1, 5, 5, 2)))
    columns = layer_columns(groups)
    assert [column.name for column in columns] == ["conv", "head"]
    assert [bar.axis for bar in columns[0].bars] == [2, 3]


def area(figure, color, hatched=False):
    """Of all bars of a colour, in bars."""
    total = 0.0
    for axes in figure.axes:
        for patch in axes.patches:
            shown = patch.get_edgecolor() if hatched else patch.get_facecolor()
            same = matplotlib.colors.same_color(shown, color)
            if same and bool(patch.get_hatch()) == hatched:
                total += patch.get_width() * patch.get_height()
    return total


def test_the_figure_shows_the_numbers(two):
    figure = pictures.groups_figure(two, {"right:1": np.arange(6) < 2})
    left, right = (handle.get_facecolor() for handle in legend(figure)[:2])
    # left:1 whole, and a quarter of head:0; of right:1 and of head:0 a third stays.
    assert area(figure, left) == pytest.approx(1 + 0.25)
    assert area(figure, right) == pytest.approx((1 + 0.75) / 3)
    assert area(figure, right, hatched=True) == pytest.approx((1 + 0.75) * 2 / 3)
    assert area(figure, pictures.PINNED) == pytest.approx(3)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"3/3", "2/2", "2/6", "4/8", "5/5", "1", "2"} == set(texts)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "1  left:1  (2 of 2)",
        "2  right:1  (2 of 6)",
        "removed",
        "pinned",
    ]
    assert "3 layers, 2 groups of 8 units, 4 kept" in figure.get_suptitle()


def legend(figure):
    return figure.legends[0].legend_handles


def test_no_pyplot_state_and_it_saves(two):
    before = plt.get_fignums()
    file = io.StringIO()
    pictures.groups_figure(two).savefig(file, format="svg")
    assert "<svg" in file.getvalue()
    assert plt.get_fignums() == before


@pytest.mark.parametrize("depth", [1, 5, 60])
def test_nothing_overlaps_whatever_the_depth(depth):
    def chain(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer["a_layer_with_a_name"]["kernel"])
        return x

    kernel = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    params = [{"a_layer_with_a_name": {"kernel": kernel}} for _ in range(depth + 1)]
    x = jax.ShapeDtypeStruct((1, 1024), jnp.float32)
    groups = jaxprune.trace(chain, params, x)
    assert len(groups) == depth
    keep = {name: np.arange(1024) < 512 for name in groups}
    figure = pictures.groups_figure(groups, keep)
    assert figure.get_figwidth() <= 10 and figure.get_figheight() <= 14
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [t for axes in figure.axes for t in (*axes.get_xticklabels(), *axes.texts)]
    boxes = [text.get_window_extent() for text in [*texts, *figure.legends]]
    names = [len(axes.get_xticklabels()) for axes in figure.axes]
    assert sum(names) == depth + 1
    low, high = np.zeros(2), np.array(canvas.get_width_height())
    corners = np.array([[*box.min, *box.max] for box in boxes])
    assert (corners[:, :2] >= low - 1).all() and (corners[:, 2:] <= high + 1).all()
    lower, upper = corners[:, None, :2], corners[:, None, 2:]
    meets = (lower < corners[None, :, 2:] - 0.5) & (corners[None, :, :2] < upper - 0.5)
    overlaps = meets.all(axis=-1) & ~np.eye(len(boxes), dtype=bool)
    assert not overlaps.any()


@pytest.mark.parametrize("letters", [10, 90, 300])
def test_the_legend_is_whole_however_long_its_names(letters):
    layer = "/".join(["abcdefghi"] * (letters // 10))

    def chain(params, x):
        for name in params:
            x = jnp.tanh(x @ params[name])
        return x

    params = {f"{layer}_{k}": jnp.ones((8, 8)) for k in range(4)}
    groups = jaxprune.trace(chain, params, jnp.ones((1, 8)))
    figure = pictures.groups_figure(groups, {})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    texts = figure.legends[0].get_texts()
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1, text
    told = "".join(texts[0].get_text().split())
    assert told == f"1{layer}_0:1(8of8)"


def test_errors(two):
    with pytest.raises(ValueError, match="'wrong', which does not exist"):
        pictures.groups_figure(two, {"wrong": np.ones(2, bool)})
    with pytest.raises(ValueError, match=r"keep\[left:1\] has shape \(3,\)"):
        layer_columns(two, {"left:1": np.ones(3, bool)})
    nothing = jaxprune.trace(
        lambda p, x: x @ p["w"], weights(w=(3, 2)), jnp.ones((1, 3))
    )
    with pytest.raises(ValueError, match=r"no group to draw; print\(groups.pinned\)"):
        pictures.groups_figure(nothing)
